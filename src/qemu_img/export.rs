//! An open file as a child process may see it over a socket pair: what [`super::nbd`] serves.

use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use super::nbd::{Device, whole_sectors};
use crate::storage::{OpenFile, ReadAt};

/// Zeros written at once where no hole can be made.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// A file as a child process may see it.
pub(super) struct Export<'a> {
    image: &'a OpenFile<'a>,
    size: u64,
    writable: bool,
}

/// A client that asks for nothing for so long has met what it cannot handle; it thinks much less
/// between two requests.
const LONGEST_SILENCE: Duration = Duration::from_secs(600);

impl<'a> Export<'a> {
    /// One that is only read.
    pub(super) fn reading(image: &'a OpenFile<'a>) -> Self {
        // Whole sectors: QEMU waits for ever for one that is not whole.
        Export { image, size: whole_sectors(image.length()), writable: false }
    }

    /// One of `size` bytes that may be written; the file grows as far as that is done.
    pub(super) fn writing(image: &'a OpenFile<'a>, size: u64) -> Self {
        Export { image, size: whole_sectors(size), writable: true }
    }
}

impl Device for Export<'_> {
    fn size(&self) -> u64 {
        self.size
    }

    fn is_writable(&self) -> bool {
        self.writable
    }

    fn patience(&self) -> Option<Duration> {
        Some(LONGEST_SILENCE)
    }

    /// Behind the end of a file that may grow, and in the rest of a last sector, there are zeros.
    fn read(&self, from: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut buf = vec![0; len];
        let mut done = 0;
        while done < len {
            match self.image.read_at(&mut buf[done..], from + done as u64) {
                Ok(0) if self.writable || from + done as u64 >= self.image.length() => break,
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(buf)
    }

    fn write(&self, data: &[u8], from: u64) -> io::Result<()> {
        self.image.file().write_all_at(data, from)
    }

    /// Makes a hole, or writes zeros where there can be none.
    fn zero(&self, Range { start: from, end }: Range<u64>) -> io::Result<()> {
        let file = self.image.file();
        let len = file.metadata()?.len();
        if end > len {
            file.set_len(end)?;
        }
        let end = end.min(len);
        if from >= end || punch(file, from, end - from).is_ok() {
            return Ok(());
        }
        let mut at = from;
        while at < end {
            let n = (ZEROS.len() as u64).min(end - at);
            file.write_all_at(&ZEROS[..n as usize], at)?;
            at += n;
        }
        Ok(())
    }
}

fn punch(file: &std::fs::File, from: u64, len: u64) -> io::Result<()> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    let (from, len) = (from as libc::off_t, len as libc::off_t);
    // SAFETY: fallocate on a descriptor that is open for as long as the call takes.
    match unsafe { libc::fallocate(file.as_raw_fd(), mode, from, len) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
