//! Positioned reads: the one way bytes come in.
//!
//! [`ReadAt`] is implemented by a file that is opened when it is read, and that knows its own identity
//! ([`SourceFile`]), by memory ([`MemStorage`]) and, for tests, by a wrapper that injects faults
//! ([`FaultyStorage`]). Nothing here seeks, so everything can be shared between threads. [`files`]
//! bounds how many files are open.

mod closing;
pub(crate) mod files;
mod identity;
mod names;
mod source;
mod writes;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Kind, Result};
pub use identity::Identity;
pub use source::SourceFile;

/// Positioned reads of something with a length.
pub trait ReadAt: Send + Sync {
    /// Reads at most `buf.len()` bytes at `offset`; 0 only at the end.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Length in bytes, as it was when the storage was first looked at.
    fn len(&self) -> u64;

    /// Whether there is no byte at all.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What to call it in messages.
    fn name(&self) -> &Path;

    /// Fails if the contents may have changed since they were first looked at.
    fn check_unchanged(&self) -> Result<()> {
        Ok(())
    }

    /// The next offset at or after `offset` that holds data, or `None` if only a hole follows.
    /// A storage that cannot tell says that all is data.
    fn seek_data(&self, offset: u64) -> io::Result<Option<u64>> {
        Ok((offset < self.len()).then_some(offset))
    }

    /// The next offset at or after `offset` that begins a hole; the end counts as one.
    fn seek_hole(&self, _offset: u64) -> io::Result<u64> {
        Ok(self.len())
    }

    /// How many of its bytes the file system has not allocated.
    fn unallocated(&self) -> u64 {
        0
    }

    /// The file whose bytes these are, offset by offset, so that ranges of it may be cloned; `None`
    /// for anything that is made out of a file (an unpacked copy, say).
    fn as_file(&self) -> Option<&SourceFile> {
        None
    }

    /// Reads exactly `buf.len()` bytes; the error names file and offset.
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let at =
                offset.checked_add(done as u64).ok_or_else(|| past_end(self.name(), offset))?;
            match self.read_at(&mut buf[done..], at) {
                Ok(0) => return Err(past_end(self.name(), at)),
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    return Err(Error::io(e, "reading failed").at_path(self.name()).at_offset(at));
                }
            }
        }
        Ok(())
    }
}

fn past_end(path: &Path, offset: u64) -> Error {
    Error::new(Kind::Truncated, "the file ends before the data that is needed")
        .at_path(path)
        .at_offset(offset)
        .remedy("restore this file from another copy of the backup")
}

/// A file that the caller has open and keeps open, with a length that stays what it was. Its start
/// may be read once and for all: whoever parses it twice finds the same bytes.
#[derive(Debug)]
pub struct OpenFile<'a> {
    file: &'a File,
    path: &'a Path,
    len: u64,
    start: Vec<u8>,
}

impl<'a> OpenFile<'a> {
    /// Takes note of its length; `path` is what to call it in messages.
    ///
    /// # Errors
    /// What the operating system said.
    pub fn new(file: &'a File, path: &'a Path) -> Result<Self> {
        Self::with_start(file, path, 0)
    }

    /// As [`OpenFile::new`], and reads the first `fixed` bytes, which it serves from memory then.
    ///
    /// # Errors
    /// What the operating system said.
    pub fn with_start(file: &'a File, path: &'a Path, fixed: usize) -> Result<Self> {
        let failed = |e| Error::io(e, "cannot check the file").at_path(path);
        let len = file.metadata().map_err(failed)?.len();
        let mut open = OpenFile { file, path, len, start: Vec::new() };
        let mut start = vec![0; fixed.min(usize::try_from(len).unwrap_or(usize::MAX))];
        open.read_exact_at(&mut start, 0)?;
        open.start = start;
        Ok(open)
    }

    /// The file.
    pub fn file(&self) -> &'a File {
        self.file
    }

    /// Its length in bytes when it was first looked at.
    pub fn length(&self) -> u64 {
        self.len
    }
}

impl ReadAt for OpenFile<'_> {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let fixed = usize::try_from(offset).ok().and_then(|at| self.start.get(at..));
        match fixed.filter(|bytes| !bytes.is_empty()) {
            Some(bytes) => {
                let n = bytes.len().min(buf.len());
                buf[..n].copy_from_slice(&bytes[..n]);
                Ok(n)
            }
            None => self.file.read_at(buf, offset),
        }
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn name(&self) -> &Path {
        self.path
    }
}

/// A range of a storage as a stream.
pub struct Section<'a> {
    storage: &'a dyn ReadAt,
    at: u64,
    end: u64,
}

impl<'a> Section<'a> {
    /// The bytes from `at` to `end`.
    pub fn new(storage: &'a dyn ReadAt, at: u64, end: u64) -> Self {
        Section { storage, at, end }
    }

    /// How many bytes are left.
    pub fn left(&self) -> u64 {
        self.end.saturating_sub(self.at)
    }
}

impl io::Read for Section<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = usize::try_from(self.left()).unwrap_or(usize::MAX).min(buf.len());
        if n == 0 {
            return Ok(0);
        }
        let got = self.storage.read_at(&mut buf[..n], self.at)?;
        self.at += got as u64;
        Ok(got)
    }
}

/// Bytes in memory: for tests and fuzzing.
#[derive(Debug, Clone)]
pub struct MemStorage {
    name: PathBuf,
    bytes: Vec<u8>,
}

impl MemStorage {
    /// Wraps `bytes`; `name` appears in messages.
    pub fn new(name: impl Into<PathBuf>, bytes: Vec<u8>) -> Self {
        MemStorage { name: name.into(), bytes }
    }
}

impl ReadAt for MemStorage {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(self.bytes.len());
        let n = buf.len().min(self.bytes.len() - start);
        buf[..n].copy_from_slice(&self.bytes[start..start + n]);
        Ok(n)
    }

    fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn name(&self) -> &Path {
        &self.name
    }
}

/// Fails reads that touch a chosen range: for faults that cannot be made otherwise.
pub struct FaultyStorage<S> {
    inner: S,
    bad: std::ops::Range<u64>,
}

impl<S: ReadAt> FaultyStorage<S> {
    /// Reads of `inner` that touch `bad` fail with EIO.
    pub fn new(inner: S, bad: std::ops::Range<u64>) -> Self {
        FaultyStorage { inner, bad }
    }
}

impl<S: ReadAt> ReadAt for FaultyStorage<S> {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let end = offset.saturating_add(buf.len() as u64);
        if offset < self.bad.end && self.bad.start < end {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        self.inner.read_at(buf, offset)
    }

    fn len(&self) -> u64 {
        self.inner.len()
    }

    fn name(&self) -> &Path {
        self.inner.name()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reading_past_the_end_names_file_and_offset() {
        let m = MemStorage::new("m", vec![0; 10]);
        let e = m.read_exact_at(&mut [0; 4], 8).unwrap_err();
        assert_eq!((e.kind(), e.offset()), (Kind::Truncated, Some(10)));
    }
}
