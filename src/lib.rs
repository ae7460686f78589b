//! fleecefs: every backup point of every disk of a QEMU backup directory as a plain raw image.
//!
//! The rooms, each of which imports only from those above it: [`error`], [`units`], [`progress`];
//! [`storage`] (positioned reads); [`extent`] (the extent list); [`layer`] (one file's own map and
//! bytes); `chain` (directory to disks, chains and points); `image` (folded maps and reads).

pub mod backup;
pub mod chain;
pub mod cli;
pub mod error;
pub mod extent;
pub mod fs;
pub mod fuse;
pub mod image;
pub mod layer;
pub mod lock;
pub mod progress;
pub mod prune;
pub mod qmp;
pub mod restore;
pub mod storage;
pub mod units;
pub mod verify;
