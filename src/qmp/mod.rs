//! Talking to QEMU: the QMP wire and client, the answers we read, and the guest agent.
//!
//! Synchronous, with a deadline on everything: a QEMU that dies is an end of file and a
//! [`crate::error::Kind::Peer`] error at once, one that hangs is `Timeout`, never a hang of ours.
//!
//! None of them is trusted, since a guest may have taken over its agent or its QEMU: all waits go
//! through [`socket`], all JSON through [`budget`], which bound the time, bytes, nesting and memory
//! of an answer.

pub(crate) mod address;
pub(crate) mod agent;
pub mod budget;
pub(crate) mod client;
pub(crate) mod events;
pub(crate) mod guest_command;
pub mod nbd;
pub(crate) mod peer;
pub(crate) mod socket;
pub(crate) mod timeout;
pub mod types;
pub(crate) mod wire;

pub use address::Address;
pub use client::{Client, Refusal};
