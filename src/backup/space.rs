//! Whether there is room, before anything is begun.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::error::{Error, Kind, Result};
use crate::units::human_bytes;

/// The least that must be free for a fleece, whatever the guest writes.
const FLEECE_MIN: u64 = 16 << 20;

/// Bytes that an unprivileged user may still write where `path` (or its closest existing folder)
/// is.
///
/// # Errors
/// What the operating system said.
pub fn available(path: &Path) -> Result<u64> {
    let dir = path.ancestors().find(|p| p.exists()).unwrap_or(Path::new("/"));
    let name = CString::new(dir.as_os_str().as_bytes())
        .map_err(|_| Error::new(Kind::Usage, "a NUL byte in a file name").at_path(dir))?;
    // SAFETY: all zeros is a valid statvfs; name is a C string.
    let mut s: libc::statvfs = unsafe { std::mem::zeroed() };
    if unsafe { libc::statvfs(name.as_ptr(), &mut s) } != 0 {
        return Err(
            Error::io(std::io::Error::last_os_error(), "cannot see the free space").at_path(dir)
        );
    }
    Ok(s.f_bavail.saturating_mul(s.f_frsize))
}

/// Fails with `NoSpace` if fewer than `need` bytes are free for `what`.
///
/// # Errors
/// `NoSpace`, or what the operating system said.
pub fn require(dir: &Path, need: u64, what: &str) -> Result<()> {
    let free = available(dir)?;
    if free >= need {
        return Ok(());
    }
    let text =
        format!("{what} needs about {} and {} are free", human_bytes(need), human_bytes(free));
    Err(Error::new(Kind::NoSpace, text).at_path(dir).remedy("--no-space-check begins anyway"))
}

/// What a fleece needs at least when `copied` bytes are to be copied: a twentieth of it.
pub fn fleece_need(copied: u64) -> u64 {
    (copied / 20).max(FLEECE_MIN).min(copied.max(1 << 20))
}
