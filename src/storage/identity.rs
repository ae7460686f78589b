//! [`Identity`]: what tells one state of a file from another.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;

/// What tells one state of a file from another. Two equal identities mean the same bytes, as far
/// as the file system lets one know without reading them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Identity {
    /// Device number.
    pub dev: u64,
    /// Inode number.
    pub ino: u64,
    /// Length in bytes.
    pub size: u64,
    /// Modification time in nanoseconds since the epoch.
    pub mtime: i128,
    /// Change time in nanoseconds since the epoch.
    pub ctime: i128,
    /// Link count: removing or renaming a file moves its ctime without touching its bytes.
    pub nlink: u64,
}

impl Identity {
    /// Reads it off file metadata.
    pub fn of(m: &std::fs::Metadata) -> Self {
        let nanos = |s: i64, n: i64| i128::from(s) * 1_000_000_000 + i128::from(n);
        Identity {
            dev: m.dev(),
            ino: m.ino(),
            size: m.size(),
            mtime: nanos(m.mtime(), m.mtime_nsec()),
            ctime: nanos(m.ctime(), m.ctime_nsec()),
            nlink: m.nlink(),
        }
    }

    /// Asks for it after each read, and so by `fstat`: the standard library's `statx` takes three times as
    /// long. Nothing else tells in time: a write moves the times before its first byte can be read, but is told
    /// (inotify, see [`super::writes`]) after its last.
    pub(super) fn of_open(file: &File) -> io::Result<Self> {
        let m = rustix::fs::fstat(file)?;
        let nanos = |s: i64, n: u64| i128::from(s) * 1_000_000_000 + i128::from(n);
        Ok(Identity {
            dev: m.st_dev,
            ino: m.st_ino,
            size: m.st_size as u64,
            mtime: nanos(m.st_mtime, m.st_mtime_nsec),
            ctime: nanos(m.st_ctime, m.st_ctime_nsec),
            nlink: m.st_nlink,
        })
    }
}
