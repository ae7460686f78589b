//! Changes of names in a folder: links, renames, removal.

use std::ffi::OsStr;
use std::io;
use std::path::Path;

use rustix::fs::{AtFlags, RenameFlags};

use super::{FileId, Folder, absent_is_none, degraded, plain, temp};

impl Folder {
    /// Makes a symbolic link with this text.
    ///
    /// # Errors
    /// What the operating system said.
    pub fn make_link(&self, text: &Path, name: impl AsRef<OsStr>) -> io::Result<()> {
        Ok(rustix::fs::symlinkat(text, &self.fd, plain(name.as_ref())?)?)
    }

    /// As [`Folder::make_link`], replacing what has the name, in one step. Where the file system has
    /// no links there is none.
    ///
    /// # Errors
    /// What the operating system said.
    pub fn set_link(&self, text: &Path, name: impl AsRef<OsStr>) -> io::Result<()> {
        let interim = temp::random_name()?;
        match self.make_link(text, &interim) {
            Err(e) if degraded::is_refusal(&e) => {
                degraded::MissingFeature::Links.tell(&self.join(name));
                return Ok(());
            }
            made => made?,
        }
        let renamed = self.rename(&interim, self, name);
        if renamed.is_err() {
            let _ = self.remove_if_there(&interim);
        }
        renamed?;
        self.sync()
    }

    /// Renames, replacing what has the new name.
    ///
    /// # Errors
    /// What the operating system said.
    pub fn rename(
        &self,
        name: impl AsRef<OsStr>,
        to: &Folder,
        new: impl AsRef<OsStr>,
    ) -> io::Result<()> {
        let (from, new) = (plain(name.as_ref())?, plain(new.as_ref())?);
        Ok(rustix::fs::renameat(&self.fd, from, &to.fd, new)?)
    }

    /// Renames without replacing anything.
    ///
    /// # Errors
    /// What the operating system said, `AlreadyExists` among it.
    pub fn rename_new(
        &self,
        name: impl AsRef<OsStr>,
        to: &Folder,
        new: impl AsRef<OsStr>,
    ) -> io::Result<()> {
        use rustix::io::Errno;
        let (from, new) = (plain(name.as_ref())?, plain(new.as_ref())?);
        match rustix::fs::renameat_with(&self.fd, from, &to.fd, new, RenameFlags::NOREPLACE) {
            // NFS, CIFS and some FUSE file systems.
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                self.rename_new_by_link(from, to, new)
            }
            Err(Errno::EXIST) if self.same_file(from, to, new) => self.remove(from),
            other => Ok(other?),
        }
    }

    /// [`Folder::rename_new`] where the file system can't: a second name, then the first one goes. A
    /// crash in between leaves both, which the next call notices.
    pub(super) fn rename_new_by_link(
        &self,
        from: &OsStr,
        to: &Folder,
        new: &OsStr,
    ) -> io::Result<()> {
        use rustix::io::Errno;
        match rustix::fs::linkat(&self.fd, from, &to.fd, new, AtFlags::empty()) {
            Ok(()) => self.remove(from),
            Err(Errno::EXIST) if self.same_file(from, to, new) => self.remove(from),
            // No second names either (FAT, some shares): the directory's lock keeps fleecefs out.
            Err(Errno::PERM | Errno::OPNOTSUPP | Errno::NOSYS | Errno::MLINK | Errno::INVAL) => {
                if to.has(new) {
                    return Err(Errno::EXIST.into());
                }
                log::debug!(
                    "{}: this file system has no RENAME_NOREPLACE: checked, then renamed",
                    crate::text::path_text(&to.join(new))
                );
                self.rename(from, to, new)
            }
            Err(e) => Err(e.into()),
        }
    }

    fn same_file(&self, name: &OsStr, other: &Folder, theirs: &OsStr) -> bool {
        let id = |f: &Folder, n: &OsStr| f.look(n).ok().map(|m| FileId::of(&m));
        id(self, name).is_some() && id(self, name) == id(other, theirs)
    }

    /// Gives the plain file `name` a second name.
    ///
    /// # Errors
    /// What the operating system said, `AlreadyExists` among it.
    pub fn link(
        &self,
        name: impl AsRef<OsStr>,
        to: &Folder,
        new: impl AsRef<OsStr>,
    ) -> io::Result<()> {
        let (from, new) = (plain(name.as_ref())?, plain(new.as_ref())?);
        Ok(rustix::fs::linkat(&self.fd, from, &to.fd, new, AtFlags::empty())?)
    }

    /// Removes a name that is no folder.
    ///
    /// # Errors
    /// What the operating system said.
    pub fn remove(&self, name: impl AsRef<OsStr>) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(&self.fd, plain(name.as_ref())?, AtFlags::empty())?)
    }

    /// Removes the folder `name`, which is empty.
    ///
    /// # Errors
    /// What the operating system said, `DirectoryNotEmpty` among it.
    pub fn remove_folder(&self, name: impl AsRef<OsStr>) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(&self.fd, plain(name.as_ref())?, AtFlags::REMOVEDIR)?)
    }

    /// As [`Folder::remove`]; whether there was one.
    ///
    /// # Errors
    /// What the operating system said, but for `NotFound`.
    pub fn remove_if_there(&self, name: impl AsRef<OsStr>) -> io::Result<bool> {
        Ok(absent_is_none(self.remove(name))?.is_some())
    }

    /// Removes a name if it still stands for the file `id`; whether it did.
    ///
    /// # Errors
    /// What the operating system said, but for `NotFound`.
    pub fn remove_if_same(&self, name: impl AsRef<OsStr>, id: FileId) -> io::Result<bool> {
        let name = name.as_ref();
        let there = absent_is_none(self.look(name))?.map(|m| FileId::of(&m));
        if there != Some(id) {
            return Ok(false);
        }
        self.remove_if_there(name)
    }
}
