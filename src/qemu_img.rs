//! Starting qemu-img, for the few steps that are its own: making images, changing backing pointers.

use std::ffi::OsStr;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::error::{Error, Kind, Result};

/// A `qemu-img` with `args` that reads nothing and does not outlive this process.
pub fn command(args: &[&OsStr]) -> Command {
    let parent = std::process::id();
    let mut command = Command::new("qemu-img");
    command.args(args).stdin(Stdio::null());
    // SAFETY: die_with makes plain system calls only, as must be between fork and exec.
    unsafe { command.pre_exec(move || die_with(parent)) };
    command
}

/// Ties this new process to its parent: left behind by a killed run, QEMU would go on writing to an
/// image while the next run puts it right.
fn die_with(parent: u32) -> std::io::Result<()> {
    // SAFETY: prctl and getppid are plain system calls.
    let (tied, now) =
        unsafe { (libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL), libc::getppid()) };
    match tied {
        // A parent that died before has another in its place, and sends no signal any more.
        0 if u32::try_from(now) == Ok(parent) => Ok(()),
        0 => Err(std::io::ErrorKind::Interrupted.into()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Runs `qemu-img` with `args` to its end and gives what it printed; `about` is the file to name
/// in errors.
///
/// # Errors
/// `NotFound` if it is not installed, else `NoSpace` or `Peer` with its own words.
pub fn output(args: &[&OsStr], about: &Path) -> Result<Vec<u8>> {
    let output = command(args).output().map_err(not_started)?;
    match output.status.success() {
        true => Ok(output.stdout),
        false => Err(failure(args, about, String::from_utf8_lossy(&output.stderr).trim())),
    }
}

/// It could not be started.
pub fn not_started(e: std::io::Error) -> Error {
    Error::io(e, "cannot run qemu-img").remedy("install it (Debian: qemu-utils)")
}

/// It ran, and failed with these words.
pub fn failure(args: &[&OsStr], about: &Path, said: &str) -> Error {
    let kind = if said.contains("No space left") { Kind::NoSpace } else { Kind::Peer };
    let verb = args.first().map_or(String::new(), |v| v.to_string_lossy().into_owned());
    Error::new(kind, format!("qemu-img {verb} failed: {said}")).at_path(about)
}
