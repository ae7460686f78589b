//! Starting qemu-img, for the few steps that are its own: making images, changing backing pointers.

use std::ffi::OsStr;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use crate::error::{Error, Kind, Result};

/// A `qemu-img` with `args` that reads nothing and does not outlive this process. To be started by
/// the thread that waits for it: the kernel ends it with the thread, not with the process.
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
/// `NotFound` if it is not installed, `Busy` if it could not be started now, `Interrupted` if it was
/// killed; else `NoSpace` or `Peer` with its own words.
pub fn output(args: &[&OsStr], about: &Path) -> Result<Vec<u8>> {
    let (code, output) = ended(args, about)?;
    match code {
        0 => Ok(output.stdout),
        _ => Err(failure(args, about, String::from_utf8_lossy(&output.stderr).trim())),
    }
}

/// What qemu-img thinks of a qcow2 image: no error, and no cluster that nobody uses.
///
/// # Errors
/// `Unsound` if it found something wrong. The others of [`output`] if it could not look.
pub fn check(image: &Path) -> Result<()> {
    let args = ["check", "-q", "-f", "qcow2"].map(OsStr::new);
    let args = [args.as_slice(), &[image.as_os_str()]].concat();
    let (code, output) = ended(&args, image)?;
    let said = String::from_utf8_lossy(&output.stderr);
    match code {
        0 => Ok(()),
        2 | 3 => {
            Err(Error::new(Kind::Unsound, format!("qemu-img check: {}", said.trim()))
                .at_path(image))
        }
        _ => Err(failure(&args, image, said.trim())),
    }
}

/// Its exit code and all that it printed.
fn ended(args: &[&OsStr], about: &Path) -> Result<(i32, Output)> {
    let output = command(args).output().map_err(not_started)?;
    match output.status.code() {
        Some(code) => Ok((code, output)),
        None => Err(Error::new(Kind::Interrupted, "qemu-img was killed").at_path(about)),
    }
}

/// It could not be started.
pub fn not_started(e: std::io::Error) -> Error {
    match e.kind() {
        std::io::ErrorKind::NotFound => {
            Error::io(e, "cannot run qemu-img").remedy("install it (Debian: qemu-utils)")
        }
        _ => Error::new(Kind::Busy, "cannot run qemu-img now").with_source(e),
    }
}

/// It ran, and failed with these words.
pub fn failure(args: &[&OsStr], about: &Path, said: &str) -> Error {
    let kind = if said.contains("No space left") { Kind::NoSpace } else { Kind::Peer };
    let verb = args.first().map_or(String::new(), |v| v.to_string_lossy().into_owned());
    Error::new(kind, format!("qemu-img {verb} failed: {said}")).at_path(about)
}
