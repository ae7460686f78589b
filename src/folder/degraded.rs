//! Operations that not every file system supports (network shares, FUSE, FAT) and that can be done without.
//! The first refusal in a process is logged, with what is weaker without it, and the work goes on.

use std::fs::{File, FileTimes};
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use rustix::io::Errno;

use crate::text::path_text;

/// Target, in the log, of warnings about a set-up that stays as it is: whose a folder is, what its file
/// system lacks. Others come with an event.
pub const STANDING: &str = "fleecefs::standing";

/// What is done without.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum MissingFeature {
    /// fsync of a folder.
    FolderSync,
    /// flock.
    Locks,
    /// Setting a file's times.
    Times,
    /// Symbolic links.
    Links,
}

impl MissingFeature {
    fn note_missing(self) -> &'static str {
        match self {
            MissingFeature::FolderSync => {
                "this file system cannot sync folders: after a power cut the newest files may be \
                 missing (the next backup then takes a FULL)"
            }
            MissingFeature::Locks => {
                "this file system has no locks: make sure that only one fleecefs writes here"
            }
            MissingFeature::Times => {
                "this file system cannot set file times: qmprestore, which sorts by them, may use \
                 a wrong order (fleecefs does not)"
            }
            MissingFeature::Links => {
                "this file system has no symbolic links: qmpbackup's links beside images are \
                 skipped (fleecefs does not need them)"
            }
        }
    }

    /// Warns, the first time.
    pub(super) fn tell(self, path: &Path) {
        static TOLD: [AtomicBool; 4] = [const { AtomicBool::new(false) }; 4];
        let first = TOLD.get(self as usize).is_some_and(|t| !t.swap(true, Ordering::Relaxed));
        if first {
            log::warn!(target: STANDING, "{}: {}", path_text(path), self.note_missing());
        } else {
            log::debug!("{}: {self:?} is refused", path_text(path));
        }
    }
}

/// Whether an error says that the file system does not do such a thing at all, in one of the ways in
/// which file systems say so: not that it failed.
pub(super) fn is_refusal(e: &io::Error) -> bool {
    let code = e.raw_os_error().map(Errno::from_raw_os_error);
    code.is_some_and(|c| {
        matches!(
            c,
            Errno::INVAL
                | Errno::NOSYS
                | Errno::OPNOTSUPP
                | Errno::PERM
                | Errno::ACCESS
                | Errno::BADF
                | Errno::ISDIR
                | Errno::NOTTY
                | Errno::NOLCK
        )
    })
}

/// `Ok` where something is refused that can be done without.
pub(super) fn without(done: io::Result<()>, what: MissingFeature, path: &Path) -> io::Result<()> {
    match done {
        Err(e) if is_refusal(&e) => {
            what.tell(path);
            Ok(())
        }
        other => other,
    }
}

/// Gives the open file `path` a time, if its file system lets us.
///
/// # Errors
/// What the operating system said.
pub fn set_modified(file: &File, time: SystemTime, path: &Path) -> io::Result<()> {
    set_times(file, FileTimes::new().set_modified(time), path)
}

/// Gives the open file `path` times, if its file system lets us.
///
/// # Errors
/// What the operating system said.
pub fn set_times(file: &File, times: FileTimes, path: &Path) -> io::Result<()> {
    without(file.set_times(times), MissingFeature::Times, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_no_refusal() {
        let of = |code| io::Error::from_raw_os_error(code);
        let path = Path::new("/t");
        for code in [libc::EINVAL, libc::EPERM, libc::EACCES, libc::ENOTSUP, libc::ENOSYS] {
            without(Err(of(code)), MissingFeature::FolderSync, path).unwrap();
        }
        for code in [libc::EIO, libc::ENOSPC, libc::EDQUOT, libc::EROFS, libc::ESTALE] {
            let failed = without(Err(of(code)), MissingFeature::FolderSync, path).unwrap_err();
            assert_eq!(failed.raw_os_error(), Some(code));
        }
    }
}
