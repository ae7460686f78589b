//! Sharing blocks with the backup instead of copying them (FICLONERANGE).

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU8, Ordering};

use super::Reflink;
use crate::error::{Error, Kind, Result};

/// `struct file_clone_range` of linux/fs.h.
#[repr(C)]
struct CloneRange {
    src_fd: i64,
    src_offset: u64,
    src_length: u64,
    dest_offset: u64,
}

/// _IOW(0x94, 13, struct file_clone_range), where _IOC_WRITE is 1 and the size has 14 bits.
#[cfg(not(any(
    target_arch = "mips",
    target_arch = "mips64",
    target_arch = "powerpc",
    target_arch = "powerpc64",
    target_arch = "sparc64"
)))]
const FICLONERANGE: libc::c_ulong = 0x4020_940d;
/// The same where _IOC_WRITE is 4 and the size has 13 bits.
#[cfg(any(
    target_arch = "mips",
    target_arch = "mips64",
    target_arch = "powerpc",
    target_arch = "powerpc64",
    target_arch = "sparc64"
))]
const FICLONERANGE: libc::c_ulong = 0x8020_940d;

const UNKNOWN: u8 = 0;
const WORKS: u8 = 1;
const OFF: u8 = 2;

/// Clones into one target, as long as that works.
pub(crate) struct Cloner {
    state: AtomicU8,
    wanted: Reflink,
    block: u64,
}

impl Cloner {
    /// For ranges that end up in `target`.
    pub(crate) fn new(target: &File, wanted: Reflink) -> Self {
        let state = if wanted == Reflink::Never { OFF } else { UNKNOWN };
        Cloner { state: AtomicU8::new(state), wanted, block: block_size(target).unwrap_or(0) }
    }

    /// Whether it is worth trying.
    pub(crate) fn is_on(&self) -> bool {
        self.block > 0 && self.state.load(Ordering::Relaxed) != OFF
    }

    /// The part of a run of `len` bytes that can be cloned from offset `from` to offset `to`:
    /// whole blocks, at the same place within a block on both sides.
    pub(crate) fn part(&self, from: u64, to: u64, len: u64) -> Option<Range<u64>> {
        if !self.is_on() || from % self.block != to % self.block {
            return None;
        }
        let start = from.checked_next_multiple_of(self.block)? - from;
        let end = from.checked_add(len)? / self.block * self.block;
        let end = end.checked_sub(from)?;
        (start < end).then_some(start..end)
    }

    /// Shares `len` bytes at `from` in `source` with `target` at `to`. `false` if that does not
    /// work here, and then it is not tried again.
    ///
    /// # Errors
    /// `NoSpace` or `Io`: it works here, but not this time. Also when cloning was insisted on.
    pub(crate) fn clone(
        &self,
        source: &File,
        from: u64,
        target: &File,
        to: u64,
        len: u64,
    ) -> Result<bool> {
        let range = CloneRange {
            src_fd: i64::from(source.as_raw_fd()),
            src_offset: from,
            src_length: len,
            dest_offset: to,
        };
        // SAFETY: FICLONERANGE reads one file_clone_range, which `range` is.
        if unsafe { libc::ioctl(target.as_raw_fd(), FICLONERANGE as _, &range) } == 0 {
            self.state.store(WORKS, Ordering::Relaxed);
            return Ok(true);
        }
        let e = io::Error::last_os_error();
        match e.raw_os_error() {
            // Not here: another file system, one that cannot, a file that may not.
            Some(
                libc::EXDEV
                | libc::EOPNOTSUPP
                | libc::ENOTTY
                | libc::ENOSYS
                | libc::EINVAL
                | libc::EPERM
                | libc::ETXTBSY,
            ) => self.give_up(e),
            _ => Err(Error::io(e, "cannot clone a range")),
        }
    }

    fn give_up(&self, e: io::Error) -> Result<bool> {
        if self.wanted == Reflink::Always {
            return Err(Error::new(Kind::Unsupported, "ranges cannot be cloned to this target")
                .with_source(e)
                .remedy("put the target on the same XFS or btrfs, or allow copying"));
        }
        // One file that cannot (EINVAL on a swap file, say) must not end it for all others.
        if self.state.load(Ordering::Relaxed) == UNKNOWN {
            log::debug!("copying instead of cloning: {e}");
            self.state.store(OFF, Ordering::Relaxed);
        }
        Ok(false)
    }

    /// Fails if cloning was insisted on and nothing could be.
    ///
    /// # Errors
    /// `Unsupported`.
    pub(crate) fn check_wanted(&self, copied: u64) -> Result<()> {
        if self.wanted == Reflink::Always
            && copied > 0
            && self.state.load(Ordering::Relaxed) != WORKS
        {
            return Err(Error::new(Kind::Unsupported, "nothing of this point can be cloned")
                .remedy("allow copying: compressed and unaligned data cannot be cloned"));
        }
        Ok(())
    }
}

/// The file system's block size, which clones are aligned to.
fn block_size(file: &File) -> Option<u64> {
    // SAFETY: a plain-old-data structure of integers, for which zeros are a value.
    let mut s: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: fstatfs fills the structure that it is given.
    if unsafe { libc::fstatfs(file.as_raw_fd(), &mut s) } != 0 {
        return None;
    }
    u64::try_from(s.f_bsize).ok().filter(|b| b.is_power_of_two())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_blocks_at_the_same_place_are_cloned() {
        let c = Cloner { state: AtomicU8::new(UNKNOWN), wanted: Reflink::Auto, block: 4096 };
        assert_eq!(c.part(8192, 4096, 8192), Some(0..8192));
        assert_eq!(c.part(8192 + 512, 512, 9000), Some(3584..7680));
        assert_eq!(c.part(8192 + 512, 0, 9000), None);
        assert_eq!(c.part(100, 100, 4000), None);
        assert_eq!(c.part(u64::MAX - 5, 4091, 4), None);
    }
}
