//! A file that appears whole or not at all.
//!
//! Where the file system can (`O_TMPFILE`), it has no name until it is complete: there is nothing to
//! guess and nothing is left behind. Elsewhere it has a random name, and a lock as long as its maker
//! lives; the next run removes what a killed one left ([`sweep`]).

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;

use super::{Access, EntryKind, Folder, Locked, open, plain};

/// Begins every temporary name.
pub const TEMPORARY: &str = ".fleecefs-tmp-";

/// Whether a file that has the name already may be replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Replace {
    /// It is replaced.
    Yes,
    /// The new file is given up.
    No,
}

/// A file without a lasting name. It goes when it is dropped unpublished.
#[derive(Debug)]
pub struct Temp {
    folder: Folder,
    file: File,
    /// Its random name, where it has one.
    name: Option<OsString>,
}

impl Temp {
    /// See [`Folder::temp`].
    pub(super) fn create(folder: Folder) -> io::Result<Self> {
        let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
        match rustix::fs::openat(folder.as_fd(), ".", flags, Mode::RUSR | Mode::WUSR) {
            Ok(fd) => Ok(Temp { folder, file: File::from(fd), name: None }),
            // File systems without it have their own ways to say so.
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL | Errno::NOENT | Errno::NOSYS) => {
                Self::create_named(folder)
            }
            Err(e) => Err(e.into()),
        }
    }

    /// One that has a name from the beginning.
    ///
    /// # Errors
    /// What the operating system said.
    pub fn create_named(folder: Folder) -> io::Result<Self> {
        let name = random_name()?;
        let file = folder.create_new(&name)?;
        // Tells whoever sweeps that its maker lives.
        Locked::of(&file)?;
        Ok(Temp { folder, file, name: Some(name) })
    }

    /// The open file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The folder that it is in.
    pub fn folder(&self) -> &Folder {
        &self.folder
    }

    /// Writes everything out and gives the file its name in its folder; both survive a power cut.
    ///
    /// # Errors
    /// What the operating system said; `AlreadyExists` if there is one and it may not be replaced.
    /// The temporary file is gone then.
    pub fn publish(mut self, name: impl AsRef<OsStr>, replace: Replace) -> io::Result<()> {
        let name = plain(name.as_ref())?;
        self.file.sync_all()?;
        match (&self.name, replace) {
            (None, Replace::No) => link_unnamed(&self.file, &self.folder, name)?,
            (None, Replace::Yes) => {
                let interim = random_name()?;
                link_unnamed(&self.file, &self.folder, &interim)?;
                self.name = Some(interim);
                self.rename(name)?;
            }
            (Some(own), Replace::No) => {
                self.folder.rename_new(own, &self.folder, name)?;
                self.name = None;
            }
            (Some(_), Replace::Yes) => self.rename(name)?,
        }
        self.folder.sync()
    }

    fn rename(&mut self, name: &OsStr) -> io::Result<()> {
        let Some(own) = &self.name else { return Ok(()) };
        self.folder.rename(own, &self.folder, name)?;
        self.name = None;
        Ok(())
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        let Some(name) = &self.name else { return };
        if let Err(e) = self.folder.remove_if_there(name) {
            let path = crate::text::path_text(&self.folder.join(name));
            log::warn!("{path}: cannot remove the temporary file: {e}");
        }
    }
}

fn link_unnamed(file: &File, folder: &Folder, name: &OsStr) -> io::Result<()> {
    let from = open::proc_path(file.as_raw_fd());
    let follow = AtFlags::SYMLINK_FOLLOW;
    match rustix::fs::linkat(rustix::fs::CWD, &from, folder.as_fd(), name, follow) {
        // No /proc: needs CAP_DAC_READ_SEARCH.
        Err(Errno::NOENT) => {
            Ok(rustix::fs::linkat(file, "", folder.as_fd(), name, AtFlags::EMPTY_PATH)?)
        }
        other => Ok(other?),
    }
}

fn random_name() -> io::Result<OsString> {
    let mut bytes = [0u8; 12];
    let mut done = 0;
    while done < bytes.len() {
        match rustix::rand::getrandom(&mut bytes[done..], rustix::rand::GetRandomFlags::empty()) {
            Ok(n) => done += n,
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    let mut name = String::from(TEMPORARY);
    bytes.iter().for_each(|b| name.push_str(&format!("{b:02x}")));
    Ok(name.into())
}

/// Removes what killed runs left in the folder: plain files of this user's, under names that begin
/// with [`TEMPORARY`] or end in one of `suffixes`, that nobody has locked. How many went.
///
/// # Errors
/// The folder cannot be listed.
pub fn sweep(folder: &Folder, suffixes: &[&str]) -> io::Result<usize> {
    let temporary = |name: &OsStr| {
        let bytes = name.as_bytes();
        bytes.starts_with(TEMPORARY.as_bytes())
            || suffixes.iter().any(|s| bytes.ends_with(s.as_bytes()))
    };
    let mut gone = 0;
    for entry in folder.entries()? {
        if entry.kind == EntryKind::File && temporary(&entry.name) && is_left(folder, &entry.name) {
            gone += usize::from(folder.remove_if_there(&entry.name)?);
        }
    }
    Ok(gone)
}

/// Whether a temporary file is this user's and nobody is at work on it.
fn is_left(folder: &Folder, name: &OsStr) -> bool {
    let Ok(file) = folder.open_with(name, Access::Read) else { return false };
    let own = rustix::process::geteuid().as_raw();
    let ours = file.metadata().is_ok_and(|m| m.uid() == own && m.nlink() == 1);
    ours && Locked::of(&file).is_ok_and(|l| l != Locked::Other)
}
