//! A file that appears whole or not at all.
//!
//! Where the file system can (`O_TMPFILE`), it has no name until it is complete: there is nothing to
//! guess and nothing is left behind. Elsewhere it has a random name, and a lock as long as its maker
//! lives; the next run removes what a killed one left ([`sweep`]).

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;

use super::{Access, EntryKind, FileId, Folder, Locked, open, plain};

/// Begins every temporary name.
pub const TEMPORARY: &str = ".fleecefs-tmp-";
/// How often somebody may take a new file's name away.
const TRIES: usize = 16;

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
            Ok(fd) if can_be_linked(fd.as_raw_fd()) => {
                Ok(Temp { folder, file: File::from(fd), name: None })
            }
            // It could get no name in the end, after hours perhaps.
            Ok(_) => Self::create_named(folder),
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
        for _ in 0..TRIES {
            let name = random_name()?;
            let file = folder.create_new(&name)?;
            // Tells whoever sweeps that its maker lives; one that swept before that has removed it.
            let held = Locked::of(&file)? != Locked::Other;
            let there = super::absent_is_none(folder.look(&name))?.map(|m| FileId::of(&m));
            if held && there == Some(FileId::of(&file.metadata()?)) {
                return Ok(Temp { folder, file, name: Some(name) });
            }
        }
        Err(super::refused("the temporary file is replaced again and again"))
    }

    /// Its random name, if it has one.
    pub fn name(&self) -> Option<&OsStr> {
        self.name.as_deref()
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
    pub fn publish(self, name: impl AsRef<OsStr>, replace: Replace) -> io::Result<()> {
        let folder = self.folder.try_clone()?;
        self.publish_in(&folder, name, replace)
    }

    /// As [`Temp::publish`], in another folder of the same file system.
    ///
    /// # Errors
    /// As [`Temp::publish`].
    pub fn publish_in(
        mut self,
        to: &Folder,
        name: impl AsRef<OsStr>,
        replace: Replace,
    ) -> io::Result<()> {
        let name = plain(name.as_ref())?;
        self.file.sync_all()?;
        if self.name.is_none() && replace == Replace::Yes {
            self.name_temporarily()?;
        }
        match (&self.name, replace) {
            (None, _) => link_unnamed(&self.file, to, name)?,
            (Some(own), Replace::No) => self.folder.rename_new(own, to, name)?,
            (Some(own), Replace::Yes) => self.folder.rename(own, to, name)?,
        }
        self.name = None;
        to.sync()
    }

    /// Gives an unnamed file a random name: only what has a name replaces another by renaming. Whoever
    /// sweeps just then sees by the lock that its maker lives.
    pub(super) fn name_temporarily(&mut self) -> io::Result<()> {
        Locked::of(&self.file)?;
        let interim = random_name()?;
        link_unnamed(&self.file, &self.folder, &interim)?;
        self.name = Some(interim);
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

/// Whether an unnamed file can be given a name later: by way of /proc, or with a capability.
fn can_be_linked(fd: RawFd) -> bool {
    let proc = std::fs::symlink_metadata(open::proc_path(fd)).is_ok();
    proc || rustix::process::geteuid().is_root()
}

/// Fills `bytes` with what nobody can guess.
///
/// # Errors
/// What the operating system said.
pub fn random(bytes: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        match rustix::rand::getrandom(&mut bytes[done..], rustix::rand::GetRandomFlags::empty()) {
            Ok(n) => done += n,
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

pub(super) fn random_name() -> io::Result<OsString> {
    let mut bytes = [0u8; 12];
    random(&mut bytes)?;
    let mut name = String::from(TEMPORARY);
    bytes.iter().for_each(|b| name.push_str(&format!("{b:02x}")));
    Ok(name.into())
}

/// What [`sweep`] removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Swept {
    /// How many files.
    pub files: usize,
    /// Their length in bytes, all together.
    pub bytes: u64,
}

/// Removes what killed runs left in the folder: plain files of this user's, under names that begin
/// with [`TEMPORARY`], or with a dot and end in one of `suffixes`, that nobody has locked. How many went.
///
/// # Errors
/// The folder cannot be listed.
pub fn sweep(folder: &Folder, suffixes: &[&str]) -> io::Result<usize> {
    sweep_counted(folder, suffixes).map(|swept| swept.files)
}

/// As [`sweep`]; also how long the files were.
///
/// # Errors
/// As [`sweep`].
pub fn sweep_counted(folder: &Folder, suffixes: &[&str]) -> io::Result<Swept> {
    let temporary = |name: &OsStr| {
        let bytes = name.as_bytes();
        bytes.starts_with(TEMPORARY.as_bytes())
            || bytes.starts_with(b".") && suffixes.iter().any(|s| bytes.ends_with(s.as_bytes()))
    };
    let mut swept = Swept::default();
    for entry in folder.entries()? {
        if entry.kind != EntryKind::File || !temporary(&entry.name) {
            continue;
        }
        // Locked until it is gone, so that it is nobody else's.
        let Some((file, len)) = left(folder, &entry.name) else { continue };
        let Ok(meta) = file.metadata() else { continue };
        if folder.remove_if_same(&entry.name, FileId::of(&meta))? {
            swept.files += 1;
            swept.bytes += len;
        }
    }
    Ok(swept)
}

/// A temporary file that is this user's and that nobody is at work on, locked, and its length. Where
/// there are no locks nobody knows, and it stays.
fn left(folder: &Folder, name: &OsStr) -> Option<(File, u64)> {
    let file = folder.open_with(name, Access::Read).ok()?;
    let own = rustix::process::geteuid().as_raw();
    let meta = file.metadata().ok().filter(|m| m.uid() == own && m.nlink() == 1)?;
    let free = Locked::of(&file).is_ok_and(|l| l == Locked::Own);
    free.then_some((file, meta.len()))
}
