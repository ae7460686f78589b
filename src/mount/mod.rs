//! Mounting: from the plan to the process that serves, and unmounting.
//!
//! The order matters: the background process is forked before any thread exists, watches are set
//! before the directory is read (so that no change falls between), and mounting ends only
//! after the mount has answered a first request.
//!
//! - `plan`: what is checked and decided before
//! - `scratch_place`: where that is which is written to points
//! - `serve`: the life of a mount; `user_mount` in a user's one process, `supervisor` in root's two
//! - `daemon`: going into the background; `process`: signals, threads and limits of the one that serves
//! - `prepared`: the directory as it was read, and looking at it again; `mounted`: what the kernel has
//! - `table`: what is mounted where; `holders`: who holds a mount; `umount`
//!
//! Whoever needs points that can be written to, makes a [`Plan`] with [`Options::writable`] and calls [`run`]: with
//! `Writable::default()` what is written goes to unnamed files, and is gone when the mount ends, however that happens.
//! A file system whose journal is to be replayed is mounted from a loop device over a point of such a mount.

mod daemon;
mod holders;
mod mounted;
mod plan;
mod prepared;
mod process;
mod scratch_place;
mod serve;
mod supervisor;
pub(crate) mod table;
mod umount;
mod user_mount;

pub(crate) use plan::{Files, Options, Plan};
pub(crate) use process::raise_file_limit;
pub(crate) use scratch_place::{Writable, check_outside, find as find_scratch};
pub(crate) use serve::run;
pub(crate) use umount::umount;
