//! [`SourceFile`]: a file of a backup directory that must be what it was when it was scanned.
//!
//! It is opened when it is first read, may be closed at any time ([`files`]), and is opened again then.
//! Each time its identity is compared: what is not provably the same file with the same bytes is an
//! error. State: the identity of the scan; what was seen of its names since ([`super::names`]); the
//! kernel's word on writes, from when it is first read ([`super::writes`]); the slot of its descriptor;
//! whether it was seen to have changed, which is never undone.

use std::fs::{File, Metadata};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use super::files::{self, Opened, Slot};
use super::identity::Identity;
use super::names::{Ask, Names};
use super::writes::Writes;
use super::{ReadAt, past_end};
use crate::error::{Error, Kind, Result};
use crate::folder::{self, Folder, Handle};

/// A file that is opened when it is first read and that must then still be what it was when the
/// backup directory was scanned.
#[derive(Debug)]
pub struct SourceFile {
    path: PathBuf,
    identity: Identity,
    names: Names,
    /// From when bytes may have been read from it. `None`: nobody tells of them.
    writes: OnceLock<Option<Writes>>,
    slot: Arc<Slot>,
    /// Whether bytes may have been read from it: then they have to be checked, open or not.
    was_open: AtomicBool,
    changed: AtomicBool,
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
            .map_err(|e| Error::io(e, "cannot check the file").at_path(&path))?;
        Self::of_looked(path, &meta)
    }

    /// As [`SourceFile::look`] at `name` in a folder that is held; and opens it.
    ///
    /// # Errors
    /// As [`SourceFile::look`] and [`SourceFile::file`].
    pub(crate) fn open_in(folder: &Folder, name: &str) -> Result<Self> {
        let path = folder.join(name);
        let handle = folder
            .handle(name.as_ref())
            .map_err(|e| Error::io(e, "cannot check the file").at_path(&path))?;
        let file = Self::of_looked(path, handle.metadata())?;
        let opened = file.open_through(&handle)?;
        // Before bytes are read: what is written from now on is told.
        file.watch(&opened);
        let now = Identity::of_open(&opened)
            .map_err(|e| Error::io(e, "cannot check the file").at_path(&file.path))?;
        if now != file.identity {
            file.has_changed()?;
        }
        file.was_open.store(true, Ordering::Release);
        Ok(file)
    }

    fn of_looked(path: PathBuf, meta: &Metadata) -> Result<Self> {
        if meta.is_file() {
            return Ok(Self::with_identity(path, Identity::of(meta)));
        }
        let what = match meta.is_symlink() {
            true => "a symbolic link; links are not followed here",
            false => "not a plain file",
        };
        Err(Error::new(Kind::Unsupported, what).at_path(&path))
    }

    /// A file whose identity a directory scan has read already.
    pub fn with_identity(path: PathBuf, identity: Identity) -> Self {
        Self::in_slot(path, identity, Slot::new())
    }

    fn in_slot(path: PathBuf, identity: Identity, slot: Arc<Slot>) -> Self {
        let (was_open, changed) = (AtomicBool::new(false), AtomicBool::new(false));
        let (names, writes) = (Names::of(&identity), OnceLock::new());
        SourceFile { path, names, writes, identity, slot, was_open, changed }
    }

    /// A file that is open already; `path` is what to call it.
    ///
    /// # Errors
    /// `Unsupported` for anything but a plain file, or what the operating system said.
    pub fn of_open(file: File, path: PathBuf) -> Result<Self> {
        let meta =
            file.metadata().map_err(|e| Error::io(e, "cannot check the file").at_path(&path))?;
        if !meta.is_file() {
            return Err(Error::new(Kind::Unsupported, "not a plain file").at_path(&path));
        }
        Ok(Self::in_slot(path, Identity::of(&meta), Slot::fixed(file)))
    }

    /// Whether the file of its name, which just looked like `now`, has the bytes that it had when it was
    /// looked at, as far as can be known without reading them. (Device and inode number of `now` are not
    /// compared.)
    pub(crate) fn has_same_bytes(&self, now: &Identity) -> bool {
        self.is_unchanged(now, || self.look_again()).unwrap_or(false)
    }

    /// As [`SourceFile::has_same_bytes`], where `again` says what the same inode looks like, `None` if it is
    /// another now.
    fn is_unchanged(
        &self,
        now: &Identity,
        again: impl Fn() -> io::Result<Option<Identity>>,
    ) -> io::Result<bool> {
        let old = &self.identity;
        let fits = |now: &Identity| (old.size, old.mtime) == (now.size, now.mtime);
        let ask = Ask {
            now: &|| Ok(again()?.filter(fits)),
            is_gone: &|| self.is_name_gone(),
            unwritten: &|| Some(self.writes.get()?.as_ref()?.are_none()),
        };
        Ok(fits(now) && self.names.allow(now, &ask)?)
    }

    /// What its name stands for, if that is the same inode.
    fn look_again(&self) -> io::Result<Option<Identity>> {
        let now = Identity::of(&folder::look(&self.path)?);
        Ok(self.is_inode(&now).then_some(now))
    }

    fn is_inode(&self, now: &Identity) -> bool {
        (now.dev, now.ino) == (self.identity.dev, self.identity.ino)
    }

    /// Has the kernel tell of writes from now on.
    fn watch(&self, file: &File) {
        self.writes.get_or_init(|| Writes::of(file));
    }

    /// Whether nothing has the name any more.
    fn is_name_gone(&self) -> bool {
        let is_absent = || folder::look(&self.path).is_err_and(|e| is_absent(&e));
        // While a name goes, its file can have the new times already. Whoever lists the folder waits for that.
        is_absent()
            || self.path.parent().is_some_and(|dir| folder::entries(dir).is_ok() && is_absent())
    }

    /// Whether what looked like `now` is this file with the same bytes.
    fn is_same(
        &self,
        now: &Identity,
        again: impl Fn() -> io::Result<Option<Identity>>,
    ) -> io::Result<bool> {
        Ok(self.is_inode(now) && self.is_unchanged(now, again)?)
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
        let same = self.is_same(&Identity::of(&meta), || self.look_again());
        // The name may go meanwhile.
        same.is_ok_and(|same| !same)
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
        let failed = |e| Error::io(e, "cannot check the file").at_path(&self.path);
        // Before it is compared: what is written from now on is told.
        self.watch(&file);
        let again = || Identity::of_open(&file).map(Some);
        let now = Identity::of_open(&file).map_err(failed)?;
        if !self.is_same(&now, again).map_err(failed)? {
            self.has_changed()?;
        }
        self.was_open.store(true, Ordering::Release);
        Ok(self.slot.put(file))
    }

    /// Where others have used up the descriptors, some files that nobody pins are closed.
    fn try_to_open(&self, open: impl Fn() -> io::Result<File>) -> Result<File> {
        files::open_with_room(open).map_err(|e| self.open_error(e))
    }

    /// Whether the file that has the name now is the one that was read.
    fn check_name(&self) -> Result<()> {
        let failed = |e| Error::io(e, "cannot check the file").at_path(&self.path);
        let now = Identity::of(&folder::look(&self.path).map_err(failed)?);
        match self.is_same(&now, || self.look_again()).map_err(failed)? {
            true => Ok(()),
            false => self.has_changed(),
        }
    }

    fn has_changed(&self) -> Result<()> {
        self.mark_changed();
        Err(self.changed_error())
    }

    fn open_error(&self, e: io::Error) -> Error {
        let too_many = files::is_too_many(&e);
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
        let failed = |e| Error::io(e, "cannot check the file").at_path(&self.path);
        self.watch(file);
        let again = || Identity::of_open(file).map(Some);
        let now = Identity::of_open(file).map_err(failed)?;
        match self.is_unchanged(&now, again).map_err(failed)? {
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
mod tests;
