//! Writable mounts for tests: how points are opened, written and discarded.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::mount::Mount;

/// What is needed beside what makes points.
pub const TOOLS: [&str; 3] = ["qemu-img", "qemu-io", "/dev/fuse"];
/// Bytes of a block of an overlay.
pub const BLOCK: u64 = 4096;

pub fn rw(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}

pub fn errno<T>(result: std::io::Result<T>) -> Option<i32> {
    result.err().and_then(|e| e.raw_os_error())
}

pub fn fallocate(file: &File, mode: i32, at: u64, len: u64) -> std::io::Result<()> {
    // SAFETY: a call with an open descriptor and numbers.
    match unsafe { libc::fallocate(file.as_raw_fd(), mode, at as i64, len as i64) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

pub const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
pub const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE;

/// Hash and times of all files below a folder.
pub fn hashes(dir: &Path) -> BTreeMap<PathBuf, (blake3::Hash, i64, i64)> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(hashes(&path));
        } else {
            let (bytes, meta) = (std::fs::read(&path).unwrap(), path.metadata().unwrap());
            found.insert(path, (blake3::hash(&bytes), meta.mtime(), meta.ctime()));
        }
    }
    found
}

pub fn scratch_option(scratch: &Path) -> String {
    format!("--writable={}", scratch.display())
}

/// A mount that keeps what is written in `scratch`.
pub fn keeping(backups: &Path, scratch: &Path) -> Mount {
    Mount::with(backups, &[&scratch_option(scratch), "--keep"])
}
