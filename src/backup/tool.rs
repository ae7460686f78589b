//! Running qemu-img.

use std::path::Path;
use std::process::{Command, Stdio};

use crate::error::{Error, Kind, Result};

/// Runs `qemu-img` with `args`; gives what it printed.
///
/// # Errors
/// `NotFound` if it is not installed, else `Io` (or `NoSpace`) with its own words.
pub fn qemu_img(args: &[&std::ffi::OsStr], about: &Path) -> Result<Vec<u8>> {
    let output = Command::new("qemu-img")
        .args(args)
        .stdin(Stdio::null())
        .output()
        .map_err(|e| Error::io(e, "cannot run qemu-img").remedy("install qemu-utils"))?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let text = String::from_utf8_lossy(&output.stderr).trim().to_string();
    let kind = if text.contains("No space left") { Kind::NoSpace } else { Kind::Io };
    Err(Error::new(kind, format!("qemu-img failed: {text}")).at_path(about))
}
