//! What is kept in the state folder and beside the images while a run is at work: journal, locks, the control socket.

pub mod control;
pub mod journal;
pub mod leftover;
pub mod lock;
