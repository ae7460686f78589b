//! [`SourceFile`]: a file of a backup directory that must be what it was when it was scanned.
//!
//! It is opened when it is first read, may be closed at any time ([`files`]), and is opened again then.
//! Each time its identity is compared: what is not provably the same file with the same bytes is an
//! error. State: the identity of the scan; the slot of its descriptor; whether it was seen to have
//! changed, which is never undone.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::files::{self, Opened, Slot};
use super::{ReadAt, past_end};
use crate::error::{Error, Kind, Result};
use crate::folder::{self, Handle};

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

    /// Asks for it after each read, and so by `fstat`: the standard library's `statx` takes three times as
    /// long.
    fn of_open(file: &File) -> io::Result<Self> {
        let m = rustix::fs::fstat(file)?;
        let nanos = |s: i64, n: u64| i128::from(s) * 1_000_000_000 + i128::from(n);
        Ok(Identity {
            dev: m.st_dev,
            ino: m.st_ino,
            size: m.st_size as u64,
            mtime: nanos(m.st_mtime, m.st_mtime_nsec),
            ctime: nanos(m.st_ctime, m.st_ctime_nsec),
            nlink: m.st_nlink,
        })
    }
}

/// A file that is opened when it is first read and that must then still be what it was when the
/// backup directory was scanned.
#[derive(Debug)]
pub struct SourceFile {
    path: PathBuf,
    identity: Identity,
    names: Names,
    slot: Arc<Slot>,
    /// Whether bytes may have been read from it: then they have to be checked, open or not.
    was_open: AtomicBool,
    changed: AtomicBool,
}

/// Change time and link count as they were last seen with the same bytes. Adding or removing a name
/// moves both; from then on the new pair is what the file is compared with.
#[derive(Debug)]
struct Names {
    /// Nanoseconds since the epoch: enough until 2262.
    ctime: AtomicI64,
    nlink: AtomicU64,
    /// Whether the name's end has explained a new ctime: it does so once. Held while the pair is
    /// replaced; a reader that sees half of a new pair asks again under it.
    name_went: Mutex<bool>,
}

impl Names {
    fn of(identity: &Identity) -> Self {
        Names {
            ctime: AtomicI64::new(identity.ctime as i64),
            nlink: AtomicU64::new(identity.nlink),
            name_went: Mutex::new(false),
        }
    }

    /// Whether ctime and link count are what they were, or moved together; or whether the one name that
    /// is known is gone, as `is_gone` tells, while another one came (link-disk, a rename): that moves ctime
    /// and leaves the count as it was.
    fn allow(&self, now: &Identity, is_gone: impl Fn() -> bool) -> bool {
        let ctime = now.ctime as i64;
        let same = || {
            let old = (self.ctime.load(Ordering::Acquire), self.nlink.load(Ordering::Acquire));
            (old.0 == ctime, old.1 == now.nlink)
        };
        if same() == (true, true) {
            return true;
        }
        let mut name_went = self.name_went.lock().unwrap_or_else(PoisonError::into_inner);
        match same() {
            // Clocks tick coarsely: a name can come within the tick of the last change.
            (true, _) => {
                self.nlink.store(now.nlink, Ordering::Release);
                true
            }
            (false, true) if *name_went || !is_gone() => false,
            (false, _) => {
                // Whichever of both it was that moved ctime: it will not go a second time.
                *name_went = *name_went || is_gone();
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
        Self::in_slot(path, identity, Slot::new())
    }

    fn in_slot(path: PathBuf, identity: Identity, slot: Arc<Slot>) -> Self {
        let (was_open, changed) = (AtomicBool::new(false), AtomicBool::new(false));
        SourceFile { path, names: Names::of(&identity), identity, slot, was_open, changed }
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
        Ok(Self::in_slot(path, Identity::of(&meta), Slot::fixed(file)))
    }

    /// Whether an inode that now looks like `now` has the bytes that it had when it was looked at,
    /// as far as can be known without reading them. (Device and inode number are not compared.)
    pub(crate) fn has_same_bytes(&self, now: &Identity) -> bool {
        let old = &self.identity;
        (old.size, old.mtime) == (now.size, now.mtime)
            && self.names.allow(now, || self.is_name_gone())
    }

    /// Whether nothing has the name any more.
    fn is_name_gone(&self) -> bool {
        let is_absent = || folder::look(&self.path).is_err_and(|e| is_absent(&e));
        // While a name goes, its file can have the new times already. Whoever lists the folder waits for that.
        is_absent()
            || self.path.parent().is_some_and(|dir| folder::entries(dir).is_ok() && is_absent())
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

    /// Closes it, for scans that touch more files than may be open at once.
    pub fn close(&mut self) {
        self.slot.close();
        self.was_open = AtomicBool::new(false);
    }

    /// Where its descriptor is, for [`files::pin`].
    pub fn slot(&self) -> &Arc<Slot> {
        &self.slot
    }

    /// The open file; opened, and its identity compared, if it is not open. It may be closed as soon
    /// as the result is dropped.
    ///
    /// # Errors
    /// As opening says; `Changed` if it is not what was scanned.
    pub fn file(&self) -> Result<Arc<Opened>> {
        match self.slot.get().as_ref() {
            Some(opened) => Ok(opened.clone()),
            None => self.open(),
        }
    }

    /// Calls `f` with the open file. Takes no lock and allocates nothing if it is open.
    fn with<T>(&self, f: impl FnOnce(&File) -> T) -> Result<T> {
        match self.slot.get().as_ref() {
            Some(opened) => Ok(f(opened)),
            None => self.open().map(|opened| f(&opened)),
        }
    }

    /// As [`SourceFile::file`], through the handle by which a scan has just read its identity: it is
    /// that file, whatever has its name by now.
    ///
    /// # Errors
    /// As [`SourceFile::file`], but for a change since then.
    pub fn open_through(&self, handle: &Handle) -> Result<Arc<Opened>> {
        if let Some(opened) = self.slot.get().as_ref() {
            return Ok(opened.clone());
        }
        let file = self.try_to_open(|| handle.open())?;
        Ok(self.slot.put(file))
    }

    fn open(&self) -> Result<Arc<Opened>> {
        let file = self.try_to_open(|| folder::open_file(&self.path))?;
        let meta = file
            .metadata()
            .map_err(|e| Error::io(e, "cannot look at the file").at_path(&self.path))?;
        if !self.is_same(&Identity::of(&meta)) {
            self.has_changed()?;
        }
        self.was_open.store(true, Ordering::Release);
        Ok(self.slot.put(file))
    }

    /// Where others have used up the descriptors, some files that nobody pins are closed.
    fn try_to_open(&self, open: impl Fn() -> io::Result<File>) -> Result<File> {
        loop {
            match open() {
                Err(e) if is_too_many(&e) && files::shed() => {}
                result => return result.map_err(|e| self.open_error(e)),
            }
        }
    }

    /// Whether the file that has the name now is the one that was read.
    fn check_name(&self) -> Result<()> {
        let meta = folder::look(&self.path)
            .map_err(|e| Error::io(e, "cannot look at the file").at_path(&self.path))?;
        match self.is_same(&Identity::of(&meta)) {
            true => Ok(()),
            false => self.has_changed(),
        }
    }

    fn has_changed(&self) -> Result<()> {
        self.mark_changed();
        Err(self.changed_error())
    }

    fn open_error(&self, e: io::Error) -> Error {
        let too_many = is_too_many(&e);
        let error = Error::io(e, "cannot open the file").at_path(&self.path);
        if too_many { error.remedy("raise the limit of open files (ulimit -n)") } else { error }
    }

    fn changed_error(&self) -> Error {
        Error::new(Kind::Changed, "the file changed after the backup directory was read")
            .at_path(&self.path)
            .remedy("open the point again")
    }

    fn os_seek(&self, offset: u64, whence: i32) -> io::Result<Option<u64>> {
        let seek = |file: &File| {
            // SAFETY: lseek on a descriptor we own; this file is only ever read by position.
            let at = unsafe { libc::lseek(file.as_raw_fd(), offset as libc::off_t, whence) };
            if at >= 0 {
                return Ok(Some(at as u64));
            }
            let e = io::Error::last_os_error();
            if e.raw_os_error() == Some(libc::ENXIO) { Ok(None) } else { Err(e) }
        };
        self.with(seek).map_err(io::Error::other)?
    }
}

impl Drop for SourceFile {
    fn drop(&mut self) {
        self.slot.close();
    }
}

fn is_absent(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

fn is_too_many(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EMFILE | libc::ENFILE))
}

impl ReadAt for SourceFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.with(|file| file.read_at(buf, offset)).map_err(io::Error::other)?
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
        let open = self.slot.get();
        let Some(file) = open.as_ref() else {
            return if self.was_open.load(Ordering::Acquire) { self.check_name() } else { Ok(()) };
        };
        let now = Identity::of_open(file)
            .map_err(|e| Error::io(e, "cannot look at the file").at_path(&self.path))?;
        match self.has_same_bytes(&now) {
            true => Ok(()),
            false => self.has_changed(),
        }
    }

    fn as_file(&self) -> Option<&SourceFile> {
        Some(self)
    }

    fn unallocated(&self) -> u64 {
        let meta = self.with(|f| f.metadata().ok()).ok().flatten();
        meta.map_or(0, |m| m.size().saturating_sub(m.blocks().saturating_mul(512)))
    }

    fn seek_data(&self, offset: u64) -> io::Result<Option<u64>> {
        self.os_seek(offset, libc::SEEK_DATA)
    }

    fn seek_hole(&self, offset: u64) -> io::Result<u64> {
        Ok(self.os_seek(offset, libc::SEEK_HOLE)?.unwrap_or(self.len()))
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.with(|file| file.read_exact_at(buf, offset))?.map_err(|e| {
            if e.kind() == io::ErrorKind::UnexpectedEof {
                past_end(&self.path, offset)
            } else {
                Error::io(e, "reading failed").at_path(&self.path).at_offset(offset)
            }
        })
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
        write_hidden(f.path());
        assert_eq!(s.check_unchanged().unwrap_err().kind(), Kind::Changed);
        std::fs::remove_file(&other).unwrap();
    }

    /// A write that hides its mtime.
    fn write_hidden(path: &Path) {
        let file = std::fs::File::options().write(true).open(path).unwrap();
        let time = file.metadata().unwrap().modified().unwrap();
        let before = file.metadata().unwrap().ctime_nsec();
        while file.metadata().unwrap().ctime_nsec() == before {
            file.write_at(b"J", 0).unwrap();
            file.set_modified(time).unwrap();
        }
    }

    #[test]
    fn a_file_that_got_another_name_stays_readable_and_a_later_write_is_noticed() {
        let rename = |from: &Path, to: &Path| std::fs::rename(from, to).unwrap();
        let link = |from: &Path, to: &Path| {
            std::fs::hard_link(from, to).unwrap();
            std::fs::remove_file(from).unwrap();
        };
        for give in [&rename as &dyn Fn(&Path, &Path), &link] {
            let dir = tempfile::tempdir().unwrap();
            let (old, new) = (dir.path().join("old"), dir.path().join("new"));
            std::fs::write(&old, b"hello").unwrap();
            let s = SourceFile::look(&old).unwrap();
            s.read_exact_at(&mut [0; 5], 0).unwrap();
            let before = std::fs::metadata(&old).unwrap().ctime_nsec();
            // Clocks tick coarsely.
            let mut names = [&old, &new];
            while std::fs::metadata(names[0]).unwrap().ctime_nsec() == before || names[0] == &old {
                give(names[0], names[1]);
                names.reverse();
            }
            s.check_unchanged().unwrap();
            s.read_exact_at(&mut [0; 5], 0).unwrap();
            s.check_unchanged().unwrap();
            write_hidden(&new);
            assert_eq!(s.check_unchanged().unwrap_err().kind(), Kind::Changed);
        }
    }

    #[test]
    fn a_name_that_went_before_explains_no_later_ctime() {
        let dir = tempfile::tempdir().unwrap();
        let (old, new) = (dir.path().join("old"), dir.path().join("new"));
        std::fs::write(&old, b"hello").unwrap();
        let s = SourceFile::look(&old).unwrap();
        s.file().unwrap();
        std::fs::hard_link(&old, &new).unwrap();
        s.check_unchanged().unwrap();
        std::fs::remove_file(&old).unwrap();
        s.check_unchanged().unwrap();
        write_hidden(&new);
        assert_eq!(s.check_unchanged().unwrap_err().kind(), Kind::Changed);
        // Nor does any, while the name is there.
        let s = SourceFile::look(&new).unwrap();
        s.file().unwrap();
        write_hidden(&new);
        assert_eq!(s.check_unchanged().unwrap_err().kind(), Kind::Changed);
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
    fn what_was_closed_meanwhile_is_opened_again_if_it_is_the_same() {
        let f = temp(b"hello");
        let s = SourceFile::look(f.path()).unwrap();
        let mut buf = [0; 5];
        for _ in 0..2 {
            s.read_exact_at(&mut buf, 0).unwrap();
            s.check_unchanged().unwrap();
            s.slot.close();
            s.check_unchanged().unwrap();
            assert_eq!(&buf, b"hello");
        }
        let moved = f.path().with_extension("moved");
        std::fs::rename(f.path(), &moved).unwrap();
        assert_eq!(s.check_unchanged().unwrap_err().kind(), Kind::NotFound);
        assert_eq!(s.read_exact_at(&mut buf, 0).unwrap_err().kind(), Kind::NotFound);
        // Same length, same time, another inode.
        let time = std::fs::metadata(&moved).unwrap().modified().unwrap();
        std::fs::write(f.path(), b"world").unwrap();
        std::fs::File::options().write(true).open(f.path()).unwrap().set_modified(time).unwrap();
        assert_eq!(s.check_unchanged().unwrap_err().kind(), Kind::Changed);
        assert_eq!(s.read_exact_at(&mut buf, 0).unwrap_err().kind(), Kind::Changed);
        std::fs::remove_file(&moved).unwrap();
    }
}
