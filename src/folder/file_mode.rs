//! Who besides the owner may read what is made: everything is private at first, and gets its group before
//! that group may read it.

use std::fs::{File, Metadata, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use super::{Folder, Replace};

/// What a file has that only its owner reads.
const PRIVATE: u32 = 0o600;
/// What may be given away: never the right to write to everybody, nor to run.
const MAY_HAVE: u32 = 0o664;

/// The group and the permission bits of new files; a folder has x where they have r.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FileMode {
    /// Permission bits; `None` for those that only the owner has.
    pub mode: Option<u32>,
    /// The group; `None` for the user's own.
    pub group: Option<u32>,
}

impl FileMode {
    /// As a file of this user's has it: whoever may read an image may read what is said of it. What
    /// belongs to somebody else decides nothing.
    pub fn like(file: &Metadata) -> Self {
        let own = file.uid() == rustix::process::geteuid().as_raw();
        let mode = file.mode() & MAY_HAVE | PRIVATE;
        match file.is_file() && own && mode != PRIVATE {
            true => FileMode { mode: Some(mode), group: Some(file.gid()) },
            false => FileMode::default(),
        }
    }

    /// Gives an open file group and mode.
    ///
    /// # Errors
    /// What the operating system said; the file stays private then.
    pub fn give(&self, file: &File) -> io::Result<()> {
        let Some(mode) = self.mode else { return Ok(()) };
        self.give_with(file, mode & MAY_HAVE | PRIVATE)
    }

    /// Gives a folder of this user's at least that, with x where a file has r.
    ///
    /// # Errors
    /// What the operating system said.
    pub fn give_folder(&self, folder: &Folder) -> io::Result<()> {
        let Some(mode) = self.mode else { return Ok(()) };
        let open = File::from(folder.reopen()?);
        let meta = open.metadata()?;
        if meta.uid() != rustix::process::geteuid().as_raw() {
            return Ok(());
        }
        let mode = mode & MAY_HAVE | (mode & 0o444) >> 2 | 0o700;
        let both = meta.mode() & 0o7777 | mode;
        if both == meta.mode() & 0o7777 && self.group.is_none_or(|g| g == meta.gid()) {
            return Ok(());
        }
        self.give_with(&open, both)
    }

    fn give_with(&self, file: &File, mode: u32) -> io::Result<()> {
        if self.group.is_some_and(|g| file.metadata().is_ok_and(|m| m.gid() != g)) {
            std::os::unix::fs::fchown(file, None, self.group)?;
        }
        file.set_permissions(Permissions::from_mode(mode))
    }
}

impl Folder {
    /// As [`Folder::write_whole`], for others to read, too.
    ///
    /// # Errors
    /// As [`Folder::write_whole`]; what [`FileMode::give`] says.
    pub fn write_shared(
        &self,
        name: impl AsRef<std::ffi::OsStr>,
        bytes: &[u8],
        share: FileMode,
    ) -> io::Result<()> {
        let temp = self.temp()?;
        io::Write::write_all(&mut temp.file(), bytes)?;
        share.give(temp.file())?;
        temp.publish(name.as_ref(), Replace::Yes)
    }
}
