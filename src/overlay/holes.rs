//! Where a sparse file has data.

use std::fs::File;
use std::io;
use std::ops::Range;

use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;

/// The next stretch of `file` in `range` that is no hole; a file system that cannot tell says that all is data.
///
/// # Errors
/// What the operating system said.
pub(super) fn next_data(file: &File, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
    if range.is_empty() {
        return Ok(None);
    }
    let start = match rustix::fs::seek(file, SeekFrom::Data(range.start)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(None),
        Err(Errno::INVAL | Errno::OPNOTSUPP) => range.start.min(file.metadata()?.len()),
        Err(e) => return Err(e.into()),
    };
    let end = match rustix::fs::seek(file, SeekFrom::Hole(start)) {
        Ok(end) => end,
        Err(Errno::NXIO | Errno::INVAL | Errno::OPNOTSUPP) => file.metadata()?.len(),
        Err(e) => return Err(e.into()),
    };
    let found = start..end.min(range.end);
    Ok((!found.is_empty()).then_some(found))
}

/// Has room for a stretch of `file`, which reads as before; where the file system cannot reserve any, nothing is done.
///
/// # Errors
/// What the operating system said: there is no room, say.
pub(super) fn reserve(file: &File, range: Range<u64>) -> io::Result<()> {
    loop {
        let len = range.end - range.start;
        return match rustix::fs::fallocate(file, FallocateFlags::KEEP_SIZE, range.start, len) {
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
            Err(Errno::INTR) => continue,
            Err(e) => Err(e.into()),
        };
    }
}

/// Gives the space of a stretch of `file` back; false where the file system cannot.
///
/// # Errors
/// What the operating system said.
pub(super) fn punch(file: &File, range: Range<u64>) -> io::Result<bool> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    loop {
        return match rustix::fs::fallocate(file, flags, range.start, range.end - range.start) {
            Ok(()) => Ok(true),
            Err(Errno::INTR) => continue,
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(false),
            Err(e) => Err(e.into()),
        };
    }
}
