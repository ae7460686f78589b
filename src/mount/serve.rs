//! The life of a mount.
//!
//! Threads: those of [`crate::fuse`] that serve requests; `watch`, which looks at the backup
//! directory again, swaps the tree and tells the kernel; `control`, which unmounts on a signal or
//! when idle, or has `supervisor` do it; and the first, which waits for the end.

use std::fs::File;

use super::daemon::Ready;
use super::plan::Plan;
use super::process::{give_memory_back, log_panics, raise_file_limit};
use super::{daemon, supervisor, user_mount};
use crate::error::Result;
use crate::output::logging;
use crate::output::logging::Sink;
use crate::privileges;

/// Mounts and serves: in the foreground until it is unmounted, else by a process in the background, once
/// that is ready. Logs go to `log` from then on. Ends the process where the one that serves has told why it
/// failed. Must be called while there is one thread only.
///
/// # Errors
/// Mounting failed, or the connection to the kernel broke.
pub(crate) fn run(plan: &Plan, foreground: bool, log: Option<File>) -> Result<()> {
    if !foreground {
        return daemon::background(log, |ready| serve(plan, ready));
    }
    if let Some(file) = log {
        logging::redirect(Sink::File(file));
    }
    match serve(plan, Ready::Foreground)? {
        0 => Ok(()),
        code => std::process::exit(i32::from(code)),
    }
}

/// Mounts, tells `ready` once the mount answers, and serves until it is unmounted; the exit code. If
/// that is not 0, what it means has been told. Must be called while there is one thread only.
///
/// # Errors
/// Mounting failed, or the connection to the kernel broke.
fn serve(plan: &Plan, ready: Ready) -> Result<u8> {
    raise_file_limit();
    give_memory_back();
    log_panics();
    match privileges::is_root() {
        true => supervisor::run(plan, ready),
        false => user_mount::run(plan, ready).map(|()| 0),
    }
}
