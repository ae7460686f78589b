//! What the kernel tells in `/proc` and `/sys`, and the devices that every system has. These are no
//! folders of others, but they are full of links; nothing else is reached this way.

use std::ffi::OsString;
use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::refused;

/// Longer than any file there that is read here; a list of very many mounts has some megabytes.
const LONGEST: u64 = 64 << 20;

/// Whether the path belongs to the kernel. Tests have a `/proc` of their own.
fn check(path: &Path) -> io::Result<()> {
    let known = path.starts_with("/proc") || path.starts_with("/sys");
    let plain = path.components().all(|c| c != std::path::Component::ParentDir);
    match cfg!(test) || (known && plain) {
        true => Ok(()),
        false => Err(refused("not a file of /proc or /sys")),
    }
}

/// The contents of a file of `/proc` or `/sys`.
///
/// # Errors
/// What the operating system said; a refusal for other paths.
pub(crate) fn read(path: &Path) -> io::Result<Vec<u8>> {
    check(path)?;
    let mut bytes = Vec::new();
    File::open(path)?.take(LONGEST).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Opens a file of `/proc` or `/sys`, to be polled.
///
/// # Errors
/// As [`read`].
pub(crate) fn open(path: &Path) -> io::Result<File> {
    check(path)?;
    File::open(path)
}

/// The contents as text; what is no UTF-8 is replaced.
///
/// # Errors
/// As [`read`].
pub(crate) fn text(path: &Path) -> io::Result<String> {
    read(path).map(|b| String::from_utf8_lossy(&b).into_owned())
}

/// Changes a setting in `/proc` or `/sys`.
///
/// # Errors
/// As [`read`].
pub(crate) fn set(path: &Path, value: &str) -> io::Result<()> {
    check(path)?;
    std::fs::write(path, value)
}

/// Where a link of `/proc` or `/sys` leads.
///
/// # Errors
/// As [`read`].
pub(crate) fn link(path: &Path) -> io::Result<PathBuf> {
    check(path)?;
    std::fs::read_link(path)
}

/// What the file behind a link of `/proc` is, also one that no path leads to any more.
///
/// # Errors
/// As [`read`].
pub(crate) fn behind(path: &Path) -> io::Result<Metadata> {
    check(path)?;
    std::fs::metadata(path)
}

/// The names in a folder of `/proc` or `/sys`; none if it cannot be read.
pub(crate) fn names(path: &Path) -> Vec<OsString> {
    if check(path).is_err() {
        return Vec::new();
    }
    std::fs::read_dir(path).into_iter().flatten().flatten().map(|e| e.file_name()).collect()
}

/// Opens a character device such as `/dev/null` for reading and writing.
///
/// # Errors
/// What the operating system said; a refusal for anything but a character device below `/dev`.
pub(crate) fn device(path: &Path) -> io::Result<File> {
    let flags = libc::O_CLOEXEC | libc::O_NOFOLLOW | libc::O_NOCTTY;
    let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)?;
    let is_device = file.metadata()?.file_type().is_char_device();
    match path.starts_with("/dev") && is_device {
        true => Ok(file),
        false => Err(refused("this is not a device")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_and_its_devices_can_be_asked() {
        assert!(text(Path::new("/proc/self/mountinfo")).unwrap().contains(" - "));
        assert!(names(Path::new("/proc/self")).contains(&"fd".into()));
        assert!(link(Path::new("/proc/self/cwd")).is_ok());
        device(Path::new("/dev/null")).unwrap();
        assert!(device(Path::new("/dev/none")).is_err());
    }
}
