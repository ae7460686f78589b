//! Copying between two files of one file system inside the kernel (copy_file_range): one copy of the
//! bytes instead of two, a fifth less work where both are in memory.
//!
//! Only on file systems where this is a plain copy. Others may share blocks (XFS, btrfs: that is
//! `clone`'s business, and may be unwanted) or leave the work to a server.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::{AtomicBool, Ordering};

/// Bytes copied by one call, so that progress, limits and signals are seen to.
pub const STEP: u64 = 1 << 20;
/// How much of a block is looked at to know that it is not all zeros.
const PROBE: usize = 64;

/// Copies into one target, as long as that works.
pub struct KernelCopy {
    on: AtomicBool,
    device: u64,
}

impl KernelCopy {
    /// For ranges that end up in `target`; with `wanted` unset it is off.
    pub fn new(target: &File, wanted: bool) -> Self {
        let device = target.metadata().map_or(0, |m| m.dev());
        let on = wanted && device != 0 && is_plain(target);
        KernelCopy { on: AtomicBool::new(on), device }
    }

    /// Whether it is worth trying for a source on device number `device`.
    pub fn is_on(&self, device: u64) -> bool {
        device == self.device && self.on.load(Ordering::Relaxed)
    }

    /// Copies `len` bytes at `from` in `source` to `to` in `target`. `false` if the kernel would not
    /// or could not: any part may have been written then, and all has to be copied another way.
    pub fn copy(&self, source: &File, from: u64, target: &File, to: u64, len: u64) -> bool {
        let (Ok(mut from), Ok(mut to)) = (libc::off_t::try_from(from), libc::off_t::try_from(to))
        else {
            return false;
        };
        let mut left = len as usize;
        while left > 0 {
            // SAFETY: two open descriptors and pointers to two offsets that are ours.
            let n = unsafe {
                libc::copy_file_range(
                    source.as_raw_fd(),
                    &mut from,
                    target.as_raw_fd(),
                    &mut to,
                    left,
                    0,
                )
            };
            match usize::try_from(n) {
                // The end of the source: reading will say so.
                Ok(0) => return false,
                Ok(n) => left = left.saturating_sub(n),
                Err(_) => {
                    let e = std::io::Error::last_os_error();
                    if e.kind() == std::io::ErrorKind::Interrupted {
                        continue;
                    }
                    // A full disk or a bad block is not the end of it; that it cannot be is.
                    let cannot = [libc::EXDEV, libc::ENOSYS, libc::EOPNOTSUPP, libc::EINVAL];
                    if e.raw_os_error().is_some_and(|c| cannot.contains(&c)) {
                        log::debug!("copying in the kernel is off: {e}");
                        self.on.store(false, Ordering::Relaxed);
                    }
                    return false;
                }
            }
        }
        true
    }
}

/// Whether the block of `file` at `offset` certainly is not all zeros: by its first bytes.
pub fn is_surely_data(file: &File, offset: u64) -> bool {
    let mut bytes = [0; PROBE];
    file.read_exact_at(&mut bytes, offset).is_ok() && bytes.iter().any(|b| *b != 0)
}

/// File systems that copy a range as read and write would.
fn is_plain(file: &File) -> bool {
    const TMPFS: i64 = 0x0102_1994;
    const EXT4: i64 = 0xef53;
    // SAFETY: a plain-old-data structure of integers, for which zeros are a value.
    let mut s: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: fstatfs fills the structure that it is given.
    let known = unsafe { libc::fstatfs(file.as_raw_fd(), &mut s) } == 0;
    #[allow(clippy::unnecessary_cast)]
    let kind = s.f_type as i64;
    known && [TMPFS, EXT4].contains(&kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_copied_or_refused_as_a_whole() {
        let (a, b) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        let bytes: Vec<u8> = (0..100_000_u32).map(|i| (i % 251) as u8).collect();
        a.write_all_at(&bytes, 0).unwrap();
        let copier = KernelCopy { on: AtomicBool::new(true), device: 1 };
        assert!(copier.is_on(1) && !copier.is_on(2));
        if copier.copy(&a, 1000, &b, 5, 90_000) {
            let mut got = vec![0; 90_000];
            b.read_exact_at(&mut got, 5).unwrap();
            assert_eq!(got, bytes[1000..91_000]);
        }
        assert!(!copier.copy(&a, 50_000, &b, 0, 60_000), "beyond the end");
        assert!(is_surely_data(&a, 1) && !is_surely_data(&a, 99_990));
        assert!(!KernelCopy::new(&b, false).is_on(b.metadata().unwrap().dev()));
    }
}
