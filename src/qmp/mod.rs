//! Talking to QEMU: the QMP wire and client, the answers we read, events, and the guest agent.
//!
//! Synchronous, with a deadline on everything: a QEMU that dies is an end of file and a
//! [`crate::error::Kind::Peer`] error at once, one that hangs is `Timeout`, never a hang of ours.

pub mod agent;
pub mod client;
pub mod events;
pub mod nbd;
pub mod peer;
pub mod steps;
pub mod types;
pub mod wire;

pub use client::{Client, Refusal};
pub use events::Event;
pub use wire::Address;
