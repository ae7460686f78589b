//! Names that nobody can remove or replace, so that this is told before the work that would end with
//! it, and not after.

use std::ffi::OsStr;
use std::io;

use rustix::fs::{AtFlags, StatxAttributes, StatxFlags};
use rustix::io::Errno;

use super::{Folder, plain, temp};

/// What keeps a name in its folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Undeletable {
    /// The file is immutable or append-only (chattr(1)).
    File,
    /// The folder is.
    Folder,
    /// Something is mounted there.
    Mount,
}

impl Folder {
    /// What keeps `name` from being removed and replaced, as far as the file system tells.
    ///
    /// # Errors
    /// What the operating system said; that there is no such name is no error.
    pub fn fixed(&self, name: impl AsRef<OsStr>) -> io::Result<Option<Undeletable>> {
        let still = StatxAttributes::IMMUTABLE | StatxAttributes::APPEND;
        let of_folder = self.attributes(OsStr::new(""), AtFlags::EMPTY_PATH)?;
        let of_file = self.attributes(plain(name.as_ref())?, AtFlags::SYMLINK_NOFOLLOW)?;
        Ok(match () {
            () if of_file.contains(StatxAttributes::MOUNT_ROOT) => Some(Undeletable::Mount),
            () if of_file.intersects(still) => Some(Undeletable::File),
            () if of_folder.intersects(still) => Some(Undeletable::Folder),
            () => None,
        })
    }

    fn attributes(&self, name: &OsStr, flags: AtFlags) -> io::Result<StatxAttributes> {
        match rustix::fs::statx(self.as_fd(), name, flags, StatxFlags::empty()) {
            Ok(found) => Ok(found.stx_attributes),
            // The filters of older container runtimes.
            Err(Errno::NOENT | Errno::NOSYS | Errno::PERM) => Ok(StatxAttributes::empty()),
            Err(e) => Err(e.into()),
        }
    }

    /// Whether files of this folder can be renamed into `to`: not where one of the two is mounted from
    /// elsewhere. Nothing is renamed.
    ///
    /// # Errors
    /// There are no random numbers.
    pub fn can_rename_to(&self, to: &Folder) -> io::Result<bool> {
        // The mounts are compared before the name is looked for, which no file has.
        let none = temp::random_name()?;
        let renamed = rustix::fs::renameat(self.as_fd(), &none, to.as_fd(), &none);
        Ok(renamed != Err(Errno::XDEV))
    }
}
