//! What is kept in the state folder and beside the images while a run is at work: journal, locks, the control socket.

pub(crate) mod control;
pub mod journal;
pub(crate) mod leftover;
pub(crate) mod lock;
