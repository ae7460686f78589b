//! A block device as a target.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use super::target_error;
use crate::error::{Error, Kind, Result};
use crate::folder;

/// _IO(0x12, 119): discard a range given as two u64, start and length.
const BLKDISCARD: libc::c_ulong = 0x1277;
/// _IO(0x12, 127): zero a range given as two u64, start and length.
const BLKZEROOUT: libc::c_ulong = 0x127f;
/// How much is written at once where the device cannot zero by itself.
const ZEROS: usize = 1 << 20;
/// How much is zeroed or discarded in one call, so that a signal is noticed.
pub(super) const STEP: u64 = 1 << 30;

/// An opened block device that nobody else uses.
#[derive(Debug)]
pub(crate) struct Device {
    file: File,
    path: PathBuf,
    size: u64,
    sector: u64,
    can_punch: AtomicBool,
    can_zero: AtomicBool,
}

impl Device {
    /// Opens the device for us alone. Links that lead to it (`/dev/vg/lv`) are followed.
    ///
    /// # Errors
    /// `Busy` if it is mounted or used otherwise, `Usage` if it is no block device, or what the
    /// operating system said.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let real = folder::resolve(path).map_err(|e| target_error(e, "cannot find it", path))?;
        let is_device = folder::look(&real).is_ok_and(|m| m.file_type().is_block_device());
        if !is_device {
            return Err(Error::new(Kind::Usage, "not a block device").at_path(path));
        }
        let file = folder::open_device(&real).map_err(|e| open_error(e, path))?;
        let size =
            size_of_device(&file).map_err(|e| target_error(e, "cannot ask its size", path))?;
        let sector = sector_size(&file).unwrap_or(512);
        let (can_punch, can_zero) = (AtomicBool::new(true), AtomicBool::new(true));
        Ok(Device { file, path: path.to_path_buf(), size, sector, can_punch, can_zero })
    }

    /// The open device.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Its size in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// Fails if `size` bytes do not fit.
    ///
    /// # Errors
    /// `NoSpace`.
    pub(crate) fn check_size(&self, size: u64) -> Result<()> {
        if size <= self.size {
            return Ok(());
        }
        let text = format!("the disk has {size} bytes, the device only {}", self.size);
        Err(Error::new(Kind::NoSpace, text).at_path(&self.path).remedy("use a larger device"))
    }

    /// Discards `start..start + len` (both within the device). Whether it is certain that zeros
    /// are read there from now on.
    pub(crate) fn discard(&self, start: u64, len: u64) -> bool {
        if self.aligned(start, len) && self.punch(start, len) {
            return true;
        }
        // What is read after this is up to the device.
        let _ = self.range_ioctl(BLKDISCARD, start, len);
        false
    }

    /// Makes `start..start + len` read as zeros: by the device itself, else by writing.
    ///
    /// # Errors
    /// What the operating system said.
    pub(crate) fn zero(&self, start: u64, len: u64, discard: bool) -> Result<()> {
        if self.aligned(start, len) {
            if discard && self.punch(start, len) {
                return Ok(());
            }
            if self.can_zero.load(Ordering::Relaxed) {
                match self.range_ioctl(BLKZEROOUT, start, len) {
                    Ok(()) => return Ok(()),
                    Err(_) => self.can_zero.store(false, Ordering::Relaxed),
                }
            }
        }
        self.write_zeros(start, len)
    }

    fn aligned(&self, start: u64, len: u64) -> bool {
        (start | len).is_multiple_of(self.sector)
    }

    /// FALLOC_FL_PUNCH_HOLE on a device frees the range and makes it read as zeros, or fails.
    fn punch(&self, start: u64, len: u64) -> bool {
        let (Ok(start), Ok(len)) = (libc::off_t::try_from(start), libc::off_t::try_from(len))
        else {
            return false;
        };
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        if !self.can_punch.load(Ordering::Relaxed) {
            return false;
        }
        // SAFETY: fallocate on an open descriptor with plain integers.
        let done = unsafe { libc::fallocate(self.file.as_raw_fd(), mode, start, len) } == 0;
        if !done {
            self.can_punch.store(false, Ordering::Relaxed);
        }
        done
    }

    fn range_ioctl(&self, request: libc::c_ulong, start: u64, len: u64) -> io::Result<()> {
        let range = [start, len];
        // SAFETY: both requests read two u64, which `range` is.
        match unsafe { libc::ioctl(self.file.as_raw_fd(), request as _, range.as_ptr()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn write_zeros(&self, start: u64, len: u64) -> Result<()> {
        let zeros = vec![0; ZEROS.min(usize::try_from(len).unwrap_or(ZEROS))];
        let mut at = start;
        while at < start + len {
            let n = zeros.len().min((start + len - at) as usize);
            self.file
                .write_all_at(&zeros[..n], at)
                .map_err(|e| target_error(e, "writing failed", &self.path).at_offset(at))?;
            at += n as u64;
        }
        Ok(())
    }
}

fn open_error(e: io::Error, path: &Path) -> Error {
    let busy = e.raw_os_error() == Some(libc::EBUSY);
    let error = target_error(e, "cannot open the device for writing", path);
    if busy { error.remedy("unmount it, or stop what uses it or its partitions") } else { error }
}

/// A device's size is where its end is.
fn size_of_device(mut file: &File) -> io::Result<u64> {
    use std::io::{Seek, SeekFrom};
    let end = file.seek(SeekFrom::End(0))?;
    file.rewind()?;
    Ok(end)
}

fn sector_size(file: &File) -> Option<u64> {
    let mut sector: libc::c_int = 0;
    // SAFETY: BLKSSZGET writes one int.
    let rc = unsafe { libc::ioctl(file.as_raw_fd(), libc::BLKSSZGET, &mut sector) };
    (rc == 0).then(|| u64::try_from(sector).ok()).flatten().filter(|s| *s > 0)
}
