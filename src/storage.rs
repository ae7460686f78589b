//! Positioned reads: the one way bytes come in.
//!
//! [`ReadAt`] is implemented by a lazily opened file that knows its own identity
//! ([`SourceFile`]), by memory ([`MemStorage`]) and, for tests, by a wrapper that injects faults
//! ([`FaultyStorage`]). Nothing here seeks, so everything can be shared between threads.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::error::{Error, Kind, Result};
use crate::folder::{self, Handle};

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
}

/// A file that is opened when it is first read and that must then still be what it was when the
/// backup directory was scanned.
#[derive(Debug)]
pub struct SourceFile {
    path: PathBuf,
    identity: Identity,
    names: Names,
    file: OnceLock<File>,
    changed: AtomicBool,
}

/// Change time and link count as they were last seen with the same bytes. Adding or removing a name
/// moves both; from then on the new pair is what the file is compared with.
#[derive(Debug)]
struct Names {
    /// Nanoseconds since the epoch: enough until 2262.
    ctime: AtomicI64,
    nlink: AtomicU64,
    /// Held while the pair is replaced. A reader that sees half of a new pair asks again under it.
    replacing: Mutex<()>,
}

impl Names {
    fn of(identity: &Identity) -> Self {
        Names {
            ctime: AtomicI64::new(identity.ctime as i64),
            nlink: AtomicU64::new(identity.nlink),
            replacing: Mutex::new(()),
        }
    }

    /// Whether ctime and link count are what they were, or moved together.
    fn allow(&self, now: &Identity) -> bool {
        let ctime = now.ctime as i64;
        let same = || {
            let old = (self.ctime.load(Ordering::Acquire), self.nlink.load(Ordering::Acquire));
            (old.0 == ctime, old.1 == now.nlink)
        };
        if same() == (true, true) {
            return true;
        }
        let _guard = self.replacing.lock().unwrap_or_else(PoisonError::into_inner);
        match same() {
            // Clocks tick coarsely: a name can come within the tick of the last change.
            (true, _) => {
                self.nlink.store(now.nlink, Ordering::Release);
                true
            }
            (false, true) => false,
            (false, false) => {
                self.nlink.store(now.nlink, Ordering::Release);
                self.ctime.store(ctime, Ordering::Release);
                true
            }
        }
    }
}

impl SourceFile {
    /// Looks at the file without keeping it open.
    ///
    /// # Errors
    /// `NotFound`/`Permission`/`Io` as `stat` says; `Unsupported` for anything but a plain file, and
    /// where there is a symbolic link on the path.
    pub fn look(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        let meta = folder::look(&path)
            .map_err(|e| Error::io(e, "cannot look at the file").at_path(&path))?;
        if !meta.is_file() {
            let what = match meta.is_symlink() {
                true => "a symbolic link; links are not followed here",
                false => "not a plain file",
            };
            return Err(Error::new(Kind::Unsupported, what).at_path(&path));
        }
        Ok(Self::with_identity(path, Identity::of(&meta)))
    }

    /// A file whose identity a directory scan has read already.
    pub fn with_identity(path: PathBuf, identity: Identity) -> Self {
        let (names, changed) = (Names::of(&identity), AtomicBool::new(false));
        SourceFile { path, identity, names, file: OnceLock::new(), changed }
    }

    /// A file that is open already; `path` is what to call it.
    ///
    /// # Errors
    /// `Unsupported` for anything but a plain file, or what the operating system said.
    pub fn of_open(file: File, path: PathBuf) -> Result<Self> {
        let meta =
            file.metadata().map_err(|e| Error::io(e, "cannot look at the file").at_path(&path))?;
        if !meta.is_file() {
            return Err(Error::new(Kind::Unsupported, "not a plain file").at_path(&path));
        }
        let source = Self::with_identity(path, Identity::of(&meta));
        let _ = source.file.set(file);
        Ok(source)
    }

    /// Whether an inode that now looks like `now` has the bytes that it had when it was looked at,
    /// as far as can be known without reading them. (Device and inode number are not compared.)
    pub(crate) fn has_same_bytes(&self, now: &Identity) -> bool {
        let old = &self.identity;
        (old.size, old.mtime) == (now.size, now.mtime) && self.names.allow(now)
    }

    fn is_same(&self, now: &Identity) -> bool {
        (now.dev, now.ino) == (self.identity.dev, self.identity.ino) && self.has_same_bytes(now)
    }

    /// The identity it had when it was looked at.
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Marks it as replaced: from now on every check fails.
    pub fn mark_changed(&self) {
        self.changed.store(true, Ordering::Release);
    }

    /// Whether the name now stands for other contents: the file was changed in place or replaced.
    /// A name that is gone does not: whoever has the file open goes on reading the old bytes.
    pub fn is_changed_on_disk(&self) -> bool {
        let Ok(meta) = folder::look(&self.path) else { return false };
        !self.is_same(&Identity::of(&meta))
    }

    /// Forgets the descriptor, for scans that touch more files than may be open at once.
    pub fn close(&mut self) {
        self.file.take();
    }

    /// Whether it has been opened.
    pub fn is_open(&self) -> bool {
        self.file.get().is_some()
    }

    /// The open file; opened, and its identity compared, on first use.
    pub fn file(&self) -> Result<&File> {
        if let Some(f) = self.file.get() {
            return Ok(f);
        }
        let file = self.open()?;
        Ok(self.file.get_or_init(|| file))
    }

    /// As [`SourceFile::file`], through the handle by which a scan has just read its identity: it is
    /// that file, whatever has its name by now.
    ///
    /// # Errors
    /// As [`SourceFile::file`], but for a change since then.
    pub fn open_through(&self, handle: &Handle) -> Result<&File> {
        if let Some(f) = self.file.get() {
            return Ok(f);
        }
        let file = handle.open().map_err(|e| self.open_error(e))?;
        Ok(self.file.get_or_init(|| file))
    }

    fn open(&self) -> Result<File> {
        let file = folder::open_file(&self.path).map_err(|e| self.open_error(e))?;
        let meta = file
            .metadata()
            .map_err(|e| Error::io(e, "cannot look at the file").at_path(&self.path))?;
        if !self.is_same(&Identity::of(&meta)) {
            self.mark_changed();
            return Err(self.changed_error());
        }
        Ok(file)
    }

    fn open_error(&self, e: io::Error) -> Error {
        let too_many = matches!(e.raw_os_error(), Some(libc::EMFILE) | Some(libc::ENFILE));
        let error = Error::io(e, "cannot open the file").at_path(&self.path);
        if too_many { error.remedy("raise the limit of open files (ulimit -n)") } else { error }
    }

    fn changed_error(&self) -> Error {
        Error::new(Kind::Changed, "the file changed after the backup directory was read")
            .at_path(&self.path)
            .remedy("open the point again")
    }

    fn os_seek(&self, offset: u64, whence: i32) -> io::Result<Option<u64>> {
        use std::os::fd::AsRawFd;
        let file = self.file().map_err(io::Error::other)?;
        // SAFETY: lseek on a descriptor we own; this file is only ever read by position.
        let at = unsafe { libc::lseek(file.as_raw_fd(), offset as libc::off_t, whence) };
        if at >= 0 {
            return Ok(Some(at as u64));
        }
        let e = io::Error::last_os_error();
        if e.raw_os_error() == Some(libc::ENXIO) { Ok(None) } else { Err(e) }
    }
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
        let failed = |e| Error::io(e, "cannot look at the file").at_path(path);
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

impl ReadAt for SourceFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let file = self.file().map_err(io::Error::other)?;
        file.read_at(buf, offset)
    }

    fn len(&self) -> u64 {
        self.identity.size
    }

    fn name(&self) -> &Path {
        &self.path
    }

    fn check_unchanged(&self) -> Result<()> {
        if self.changed.load(Ordering::Acquire) {
            return Err(self.changed_error());
        }
        let Some(file) = self.file.get() else { return Ok(()) };
        let meta = file
            .metadata()
            .map_err(|e| Error::io(e, "cannot look at the file").at_path(&self.path))?;
        if !self.has_same_bytes(&Identity::of(&meta)) {
            self.mark_changed();
            return Err(self.changed_error());
        }
        Ok(())
    }

    fn as_file(&self) -> Option<&SourceFile> {
        Some(self)
    }

    fn unallocated(&self) -> u64 {
        let meta = self.file().ok().and_then(|f| f.metadata().ok());
        meta.map_or(0, |m| m.size().saturating_sub(m.blocks().saturating_mul(512)))
    }

    fn seek_data(&self, offset: u64) -> io::Result<Option<u64>> {
        self.os_seek(offset, libc::SEEK_DATA)
    }

    fn seek_hole(&self, offset: u64) -> io::Result<u64> {
        Ok(self.os_seek(offset, libc::SEEK_HOLE)?.unwrap_or(self.len()))
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let file = self.file()?;
        file.read_exact_at(buf, offset).map_err(|e| {
            if e.kind() == io::ErrorKind::UnexpectedEof {
                past_end(&self.path, offset)
            } else {
                Error::io(e, "reading failed").at_path(&self.path).at_offset(offset)
            }
        })
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

    fn temp(bytes: &[u8]) -> tempfile::NamedTempFile {
        let f = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(f.path(), bytes).unwrap();
        f
    }

    #[test]
    fn a_file_changed_in_place_is_noticed() {
        let f = temp(b"hello");
        let s = SourceFile::look(f.path()).unwrap();
        let mut buf = [0; 5];
        s.read_exact_at(&mut buf, 0).unwrap();
        s.check_unchanged().unwrap();
        std::fs::write(f.path(), b"hello, world").unwrap();
        assert_eq!(s.check_unchanged().unwrap_err().kind(), Kind::Changed);
    }

    #[test]
    fn another_name_is_no_change_but_a_later_ctime_is_one_even_then() {
        let f = temp(b"hello");
        let s = SourceFile::look(f.path()).unwrap();
        s.file().unwrap();
        let other = f.path().with_extension("link");
        for _ in 0..2 {
            std::fs::hard_link(f.path(), &other).unwrap();
            s.check_unchanged().unwrap();
            assert!(!s.is_changed_on_disk());
            std::fs::remove_file(&other).unwrap();
            s.check_unchanged().unwrap();
        }
        // With one name more than at the scan, a write that hides its mtime still shows.
        std::fs::hard_link(f.path(), &other).unwrap();
        s.check_unchanged().unwrap();
        let file = std::fs::File::options().write(true).open(f.path()).unwrap();
        let time = file.metadata().unwrap().modified().unwrap();
        let before = file.metadata().unwrap().ctime_nsec();
        while file.metadata().unwrap().ctime_nsec() == before {
            file.write_at(b"J", 0).unwrap();
            file.set_modified(time).unwrap();
        }
        assert_eq!(s.check_unchanged().unwrap_err().kind(), Kind::Changed);
        std::fs::remove_file(&other).unwrap();
    }

    #[test]
    fn a_file_replaced_before_it_was_opened_is_noticed() {
        let f = temp(b"hello");
        let s = SourceFile::look(f.path()).unwrap();
        let other = temp(b"world");
        std::fs::rename(other.path(), f.path()).unwrap();
        assert_eq!(s.file().unwrap_err().kind(), Kind::Changed);
    }

    #[test]
    fn an_unlinked_file_stays_readable_for_those_who_hold_it() {
        let f = temp(b"hello");
        let s = SourceFile::look(f.path()).unwrap();
        s.file().unwrap();
        drop(f);
        s.check_unchanged().unwrap();
        s.read_exact_at(&mut [0; 5], 0).unwrap();
    }

    #[test]
    fn reading_past_the_end_names_file_and_offset() {
        let m = MemStorage::new("m", vec![0; 10]);
        let e = m.read_exact_at(&mut [0; 4], 8).unwrap_err();
        assert_eq!((e.kind(), e.offset()), (Kind::Truncated, Some(10)));
    }
}
