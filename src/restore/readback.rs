//! `--verify`: reads the result from the disk and compares it with the point.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::plan::Plan;
use super::source::Reader;
use super::target_error;
use crate::error::{Error, Kind, Result};
use crate::image::Image;
use crate::job::{Work, pool};
use crate::storage::ReadAt;

/// Bytes compared at once.
const BUFFER: usize = 1 << 20;

/// Compares a raw file or device with the point.
///
/// # Errors
/// `Unsound` with the first offset that differs, or what reading said.
pub(crate) fn file(
    reader: &Reader,
    plan: &Plan,
    out: &File,
    path: &Path,
    work: &Work,
) -> Result<()> {
    out.sync_all().map_err(|e| target_error(e, "cannot write to disk", path))?;
    // From the disk, not from memory. Advice only: what stays cached is compared all the same.
    // SAFETY: posix_fadvise on an open descriptor with plain integers.
    unsafe { libc::posix_fadvise(out.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    let next = |at| next_data(out, plan.size, at).map_err(|e| target_error(e, "cannot seek", path));
    compare(reader, plan, path, work, next, |buf, at| {
        out.read_exact_at(buf, at)
            .map_err(|e| target_error(e, "reading back failed", path).at_offset(at))
    })
}

/// Compares an image (a qcow2 file that was just written) with the point.
///
/// # Errors
/// See [`file`].
pub(crate) fn image(
    reader: &Reader,
    plan: &Plan,
    result: &Image,
    path: &Path,
    work: &Work,
) -> Result<()> {
    if result.len() != plan.size {
        let text = format!("the result has {} bytes instead of {}", result.len(), plan.size);
        return Err(Error::new(Kind::Unsound, text).at_path(path));
    }
    let next = |at| result.next_data(at);
    compare(reader, plan, path, work, next, |buf, at| result.read_exact_at(buf, at))
}

fn compare(
    reader: &Reader,
    plan: &Plan,
    path: &Path,
    work: &Work,
    next: impl Fn(u64) -> Result<u64>,
    read: impl Fn(&mut [u8], u64) -> Result<()> + Sync,
) -> Result<()> {
    let reader = reader.again();
    // Where neither has anything there is nothing to compare.
    let chunks = plan.chunks_with(work, next)?;
    work.progress.begin("verify", chunks.iter().map(|c| c.len).sum());
    let buffers = || (vec![0; BUFFER], vec![0; BUFFER]);
    pool::run(chunks.len(), work, buffers, |(a, b), i| {
        let range = chunks[i].range();
        let mut at = range.start;
        while at < range.end {
            let n = (BUFFER as u64).min(range.end - at) as usize;
            reader.read(&mut a[..n], at)?;
            read(&mut b[..n], at)?;
            if let Some(i) = (a[..n] != b[..n]).then(|| first_difference(&a[..n], &b[..n])) {
                let text = "the result differs from the point after it was written";
                return Err(Error::new(Kind::Unsound, text)
                    .at_path(path)
                    .at_offset(at + i as u64)
                    .remedy("check the target's disk and memory, then restore again"));
            }
            work.progress.advance(n as u64);
            work.check()?;
            at += n as u64;
        }
        Ok(())
    })
}

/// Where the next data of a file begins; a device, or a file system that cannot tell, has data
/// everywhere.
fn next_data(file: &File, size: u64, from: u64) -> io::Result<u64> {
    let Ok(offset) = libc::off_t::try_from(from) else { return Ok(from) };
    // SAFETY: lseek on an open descriptor; this file is read by position only.
    let at = unsafe { libc::lseek(file.as_raw_fd(), offset, libc::SEEK_DATA) };
    if let Ok(at) = u64::try_from(at) {
        return Ok(at);
    }
    let e = io::Error::last_os_error();
    match e.raw_os_error() {
        Some(libc::ENXIO) => Ok(size),
        Some(libc::EINVAL | libc::EOPNOTSUPP) => Ok(from),
        _ => Err(e),
    }
}

fn first_difference(a: &[u8], b: &[u8]) -> usize {
    a.iter().zip(b).position(|(x, y)| x != y).unwrap_or(0)
}
