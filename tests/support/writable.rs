//! Writable mounts for tests: how points are opened, written and discarded.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::images::Rng;
use super::mount::Mount;
use super::three_points::MIB;

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

/// The bytes that a kill or a power cut may leave: those that were last synced, or what was written over them since,
/// block by block.
pub struct Possible {
    blocks: Vec<Vec<Vec<u8>>>,
}

impl Possible {
    pub fn new(bytes: &[u8]) -> Self {
        Possible { blocks: bytes.chunks(BLOCK as usize).map(|b| vec![b.to_vec()]).collect() }
    }

    pub fn write(&mut self, data: &[u8], at: u64) {
        for (i, byte) in data.iter().enumerate() {
            let place = at + i as u64;
            let versions = &mut self.blocks[(place / BLOCK) as usize];
            if i == 0 || place.is_multiple_of(BLOCK) {
                versions.push(versions.last().unwrap().clone());
            }
            versions.last_mut().unwrap()[(place % BLOCK) as usize] = *byte;
        }
    }

    pub fn synced(&mut self) {
        self.blocks.iter_mut().for_each(|v| drop(v.drain(..v.len() - 1)));
    }

    pub fn check(&self, bytes: &[u8], what: &str) {
        for (i, (got, any)) in bytes.chunks(BLOCK as usize).zip(&self.blocks).enumerate() {
            assert!(any.iter().any(|b| b == got), "{what}: block {i} is neither old nor new");
        }
    }
}

/// Writes, discards and syncs until the server is gone; whether it came to the end.
pub fn work(file: &File, possible: &mut Possible, seed: u64) -> bool {
    let mut rng = Rng(seed);
    for step in 0..14_u8 {
        let (at, len) = rng.range(2 * MIB, if step % 2 == 0 { 512 } else { BLOCK });
        let data = vec![if step % 5 == 4 { 0 } else { 100 + step }; len as usize];
        possible.write(&data, at);
        let done = match step % 5 {
            4 => fallocate(file, PUNCH, at, len),
            _ => file.write_all_at(&data, at),
        };
        if done.is_err() {
            return false;
        }
        if step % 3 == 2 {
            if file.sync_all().is_err() {
                return false;
            }
            possible.synced();
        }
    }
    true
}
