//! The folder gate: the one way to reach files in a folder that somebody else may own or write.
//!
//! fleecefs runs as root over folders of others, who may exchange any name for a symbolic link, a
//! pipe, a device or another folder at any time. So nothing is reached twice by its path:
//!
//! - A [`Folder`] holds a descriptor. Its path was walked without following a symbolic link. (Links
//!   on the command line are followed once, by [`resolve`], before anything is opened.)
//! - Everything in it is named by one plain file name: no `/`, no `.` or `..`, see [`plain`].
//! - A name is looked at before it is opened, and only plain files are opened, for good: see
//!   [`Folder::open_file`].
//! - What is read whole has a limit: [`Folder::read_small`].
//! - What is written appears whole or not at all: [`Temp`].
//!
//! The functions that take a path ([`open_file`], [`read_small`] and so on) are the same
//! for a single act: they open the folder without following links, act, and close it.
//!
//! `clippy.toml` forbids `std::fs` everywhere else.

#![allow(clippy::disallowed_methods)]

mod changes;
mod degraded;
mod file_id;
mod file_mode;
mod handle;
mod lock;
mod made;
mod name;
mod one_shot;
mod open;
mod owner;
mod resolve;
mod stat_timeout;
pub(crate) mod system;
mod temp;
mod undeletable;
mod unnamed;
pub(crate) mod user_paths;

use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{Mode, OFlags};

pub use self::file_mode::FileMode;
pub use self::one_shot::{
    entries, exists, is_file, is_folder, look, make_folders, open_device, open_device_with,
    open_file, open_with, pin, read_small, remove_if_there, write_shared, write_whole,
};
pub use self::stat_timeout::{ask, ask_within, is_on_fuse, mount_number, within};
pub use self::undeletable::Undeletable;
pub use self::unnamed::reopen;
pub use degraded::{STANDING, set_modified, set_times};
pub use file_id::FileId;
pub use handle::Handle;
pub use lock::{Lock, Locked, is_in_use, qemu_writes};
pub use made::{FileTime, Made, NewNode};
pub use name::{PlainName, plain};
use open::refused;
pub use open::{Access, DeviceAccess};
pub use owner::{
    ForeignOwner, check_private, check_unchangeable, check_unchangeable_file,
    check_unchangeable_to_make, foreign_owner, is_own,
};
pub use resolve::{
    ResolvedPath, follow_path, resolve, resolve_path, resolve_target, resolve_to_make,
};
pub use temp::{Replace, Swept, TEMPORARY, Temp, random, sweep, sweep_counted};

/// A folder, held by its descriptor. Its contents are named relative to that, whatever happens to
/// the path in the meantime.
#[derive(Debug)]
pub struct Folder {
    fd: OwnedFd,
    path: PathBuf,
}

/// What a name in a folder stands for, as far as listing it tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryKind {
    /// A plain file.
    File,
    /// A folder.
    Folder,
    /// A symbolic link.
    Link,
    /// A pipe, socket or device.
    Other,
}

/// One name of a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its name.
    pub name: OsString,
    /// What it stands for.
    pub kind: EntryKind,
}

impl Folder {
    /// Opens a folder by its path, on which no component may be a symbolic link.
    ///
    /// # Errors
    /// What the operating system said; a refusal if there is a link on the path.
    pub fn open(path: &Path) -> io::Result<Self> {
        let path = std::path::absolute(path)?;
        let fd = open::folder(rustix::fs::CWD, &path)?;
        Ok(Folder { fd, path })
    }

    /// Opens the folder that `path` is in, and gives the last component.
    ///
    /// # Errors
    /// As [`Folder::open`]; `InvalidInput` if the path ends in `..` or is `/`.
    pub fn of(path: &Path) -> io::Result<(Self, OsString)> {
        let path = std::path::absolute(path)?;
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the path has no file name"));
        };
        Ok((Folder::open(parent)?, name.to_os_string()))
    }

    /// The folder `name` in this one.
    ///
    /// # Errors
    /// What the operating system said; a refusal if it is a link.
    pub fn folder(&self, name: impl AsRef<OsStr>) -> io::Result<Folder> {
        let name = plain(name.as_ref())?;
        let fd = open::folder(self.fd.as_fd(), Path::new(name))?;
        Ok(Folder { fd, path: self.path.join(name) })
    }

    /// The folder at the relative path `below`, each component a plain name.
    ///
    /// # Errors
    /// As [`Folder::folder`].
    pub fn beneath(&self, below: &Path) -> io::Result<Folder> {
        let mut path = self.path.clone();
        for part in below.components() {
            path.push(plain(part.as_os_str())?);
        }
        if below.as_os_str().is_empty() {
            return self.try_clone();
        }
        let fd = open::folder(self.fd.as_fd(), below)?;
        Ok(Folder { fd, path })
    }

    /// Another handle of the same folder.
    ///
    /// # Errors
    /// No more descriptors.
    pub fn try_clone(&self) -> io::Result<Folder> {
        Ok(Folder { fd: self.fd.try_clone()?, path: self.path.clone() })
    }

    /// The path by which it was opened, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The path of `name` in it, for messages.
    pub fn join(&self, name: impl AsRef<OsStr>) -> PathBuf {
        self.path.join(name.as_ref())
    }

    /// The folder's own metadata.
    ///
    /// # Errors
    /// What the operating system said.
    pub fn metadata(&self) -> io::Result<Metadata> {
        File::from(self.fd.try_clone()?).metadata()
    }

    /// Metadata of `name`; of the link itself if it is one.
    ///
    /// # Errors
    /// What the operating system said, `NotFound` among it.
    pub fn look(&self, name: impl AsRef<OsStr>) -> io::Result<Metadata> {
        self.probe(name.as_ref())?.metadata()
    }

    /// When the plain file `name` was last written to; `None` if that is none.
    ///
    /// # Errors
    /// What the operating system said, `NotFound` among it.
    pub fn modified(&self, name: impl AsRef<OsStr>) -> io::Result<Option<SystemTime>> {
        let name = plain(name.as_ref())?;
        let meta = rustix::fs::statat(&self.fd, name, rustix::fs::AtFlags::SYMLINK_NOFOLLOW)?;
        let since = |seconds: u64| Duration::new(seconds, meta.st_mtime_nsec as u32);
        let time = match u64::try_from(meta.st_mtime) {
            Ok(seconds) => SystemTime::UNIX_EPOCH.checked_add(since(seconds)),
            Err(_) => Some(SystemTime::UNIX_EPOCH),
        };
        let is_file = rustix::fs::FileType::from_raw_mode(meta.st_mode).is_file();
        Ok(time.filter(|_| is_file))
    }

    /// Whether `name` is there, as anything at all.
    pub fn has(&self, name: impl AsRef<OsStr>) -> bool {
        self.look(name).is_ok()
    }

    /// All names, in no order.
    ///
    /// # Errors
    /// What the operating system said.
    pub fn entries(&self) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        self.list(&mut entries)?;
        Ok(entries)
    }

    /// As [`Folder::entries`]; names that were read before an error are in `entries`.
    ///
    /// # Errors
    /// What the operating system said.
    pub fn list(&self, entries: &mut Vec<Entry>) -> io::Result<()> {
        for entry in rustix::fs::Dir::new(self.reopen()?)? {
            let entry = entry?;
            let bytes = entry.file_name().to_bytes();
            if bytes == b"." || bytes == b".." {
                continue;
            }
            let name = OsStr::from_bytes(bytes).to_os_string();
            let kind = match kind_of(entry.file_type()) {
                Some(kind) => kind,
                // Not every file system tells in its listing; a name that is gone again is no entry.
                None => match self.look(&name) {
                    Ok(meta) => kind_of_file(&meta),
                    Err(_) => continue,
                },
            };
            entries.push(Entry { name, kind });
        }
        Ok(())
    }

    /// Fails if its names cannot be read.
    ///
    /// # Errors
    /// What the operating system said.
    pub fn check_readable(&self) -> io::Result<()> {
        self.reopen().map(drop)
    }

    /// Opens the plain file `name` for reading.
    ///
    /// The name is opened as a mere handle first, which has no effect on a pipe or a device; only if
    /// that is a plain file it is opened for good, through the handle.
    ///
    /// # Errors
    /// What the operating system said; a refusal for anything but a plain file.
    pub fn open_file(&self, name: impl AsRef<OsStr>) -> io::Result<File> {
        self.open_with(name, Access::Read)
    }

    /// As [`Folder::open_file`], with a choice of access.
    ///
    /// # Errors
    /// As [`Folder::open_file`].
    pub fn open_with(&self, name: impl AsRef<OsStr>, access: Access) -> io::Result<File> {
        let name = name.as_ref();
        let probe = self.probe(name)?;
        open::plain_file(self.fd.as_fd(), name, (&probe, &probe.metadata()?), access)
    }

    /// The whole contents of a plain file of at most `max` bytes.
    ///
    /// # Errors
    /// As [`Folder::open_file`]; a refusal if it is longer.
    pub fn read_small(&self, name: impl AsRef<OsStr>, max: u64) -> io::Result<Vec<u8>> {
        read_bounded(self.open_file(name)?, max)
    }

    /// As [`Folder::read_small`]; `None` if there is no such file.
    ///
    /// # Errors
    /// As [`Folder::read_small`].
    pub fn read_if_there(&self, name: impl AsRef<OsStr>, max: u64) -> io::Result<Option<Vec<u8>>> {
        absent_is_none(self.read_small(name, max))
    }

    /// The text of a symbolic link, which is not followed.
    ///
    /// # Errors
    /// What the operating system said.
    pub fn read_link(&self, name: impl AsRef<OsStr>) -> io::Result<PathBuf> {
        let text = rustix::fs::readlinkat(&self.fd, plain(name.as_ref())?, Vec::new())?;
        Ok(PathBuf::from(OsStr::from_bytes(text.to_bytes())))
    }

    /// Makes an empty file with mode 0600 that was not there.
    ///
    /// # Errors
    /// What the operating system said, `AlreadyExists` among it.
    pub fn create_new(&self, name: impl AsRef<OsStr>) -> io::Result<File> {
        let flags =
            OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        let fd = rustix::fs::openat(&self.fd, plain(name.as_ref())?, flags, mode)?;
        Ok(File::from(fd))
    }

    /// Opens `name` for appending: a log. It is made with mode 0600 if it is not there. A device
    /// such as `/dev/null` is taken as well as a plain file.
    ///
    /// # Errors
    /// What the operating system said; a refusal for anything else, and for a file with more than
    /// one name.
    pub fn append(&self, name: impl AsRef<OsStr>) -> io::Result<File> {
        let name = plain(name.as_ref())?;
        open::append(self.fd.as_fd(), name)
    }

    /// The folder `name`, made with mode 0700 if it is not there; its name survives a power cut.
    ///
    /// # Errors
    /// What the operating system said; a refusal if the name is a link.
    pub fn make_folder(&self, name: impl AsRef<OsStr>) -> io::Result<Folder> {
        let name = plain(name.as_ref())?;
        match rustix::fs::mkdirat(&self.fd, name, Mode::RWXU) {
            Ok(()) => self.sync()?,
            Err(rustix::io::Errno::EXIST) => {}
            Err(e) => return Err(e.into()),
        }
        self.folder(name)
    }

    /// The folder `name`, made with mode 0700 for the user `uid` if it is not there. One that is
    /// there has to belong to that user or root already.
    ///
    /// # Errors
    /// As [`Folder::make_folder`]; a refusal if it is somebody else's.
    pub fn make_folder_of(&self, name: impl AsRef<OsStr>, uid: u32) -> io::Result<Folder> {
        use std::os::unix::fs::MetadataExt;
        let folder = self.make_folder(name)?;
        match folder.metadata()?.uid() {
            owner if owner == uid => {}
            0 => std::os::unix::fs::fchown(File::from(folder.reopen()?), Some(uid), None)?,
            _ => return Err(refused("the folder belongs to another user")),
        }
        Ok(folder)
    }

    /// Makes what happened to names in it survive a power cut. Where that is refused (by shares, some
    /// FUSE file systems, and a folder that may be written and not read) it is told.
    ///
    /// # Errors
    /// What the operating system said.
    pub fn sync(&self) -> io::Result<()> {
        let synced = self.reopen().and_then(|fd| Ok(rustix::fs::fsync(fd)?));
        degraded::without(synced, degraded::MissingFeature::FolderSync, &self.path)
    }

    /// Space on its file system.
    ///
    /// # Errors
    /// What the operating system said.
    pub fn space(&self) -> io::Result<rustix::fs::StatVfs> {
        Ok(rustix::fs::fstatvfs(&self.fd)?)
    }

    /// Whether it is on a FUSE file system.
    pub fn is_fuse(&self) -> bool {
        /// See statfs(2).
        const FUSE_SUPER_MAGIC: i128 = 0x6573_5546;
        rustix::fs::fstatfs(&self.fd).is_ok_and(|s| i128::from(s.f_type) == FUSE_SUPER_MAGIC)
    }

    /// Writes a small file, mode 0600, whole or not at all, replacing what was there; it survives a
    /// power cut.
    ///
    /// # Errors
    /// What the operating system said.
    pub fn write_whole(&self, name: impl AsRef<OsStr>, bytes: &[u8]) -> io::Result<()> {
        self.write_shared(name, bytes, FileMode::default())
    }

    /// A new file in this folder that has no name yet, or one that nobody can guess.
    ///
    /// # Errors
    /// What the operating system said.
    pub fn temp(&self) -> io::Result<Temp> {
        Temp::create(self.try_clone()?)
    }

    /// Opens or makes the lock file `name` and locks it; `None` if somebody else has it.
    ///
    /// # Errors
    /// What the operating system said.
    pub fn lock(&self, name: impl AsRef<OsStr>) -> io::Result<Option<Lock>> {
        Lock::take(self, plain(name.as_ref())?)
    }

    /// Its descriptor, for system calls that are made with a descriptor.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// `/proc/self/fd/N`: a path to this very folder, good for as long as it is open and in this
    /// process alone (a socket's address, an inotify watch).
    pub fn proc_path(&self) -> PathBuf {
        open::proc_path(self.fd.as_raw_fd())
    }

    /// A handle of what `name` stands for, whatever that is.
    fn probe(&self, name: &OsStr) -> io::Result<File> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(File::from(rustix::fs::openat(&self.fd, plain(name)?, flags, Mode::empty())?))
    }

    /// The same folder, readable.
    fn reopen(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(&self.fd, ".", flags, Mode::empty())?)
    }
}

/// As [`Folder::proc_path`], of an open file.
pub fn path_of(file: &File) -> PathBuf {
    open::proc_path(file.as_raw_fd())
}

fn kind_of(kind: rustix::fs::FileType) -> Option<EntryKind> {
    use rustix::fs::FileType;
    match kind {
        FileType::RegularFile => Some(EntryKind::File),
        FileType::Directory => Some(EntryKind::Folder),
        FileType::Symlink => Some(EntryKind::Link),
        FileType::Unknown => None,
        _ => Some(EntryKind::Other),
    }
}

fn kind_of_file(meta: &Metadata) -> EntryKind {
    match () {
        () if meta.is_file() => EntryKind::File,
        () if meta.is_dir() => EntryKind::Folder,
        () if meta.is_symlink() => EntryKind::Link,
        () => EntryKind::Other,
    }
}

/// Reads an open file to its end, at most `max` bytes.
///
/// # Errors
/// What the operating system said; a refusal if it is longer.
pub fn read_bounded(file: File, max: u64) -> io::Result<Vec<u8>> {
    let too_large = || refused("the file is larger than such a file can be");
    let len = file.metadata()?.len();
    if len > max {
        return Err(too_large());
    }
    // It may grow meanwhile. With room for the end to be seen, it is read by one call.
    let mut bytes = Vec::with_capacity(usize::try_from(len).unwrap_or(0).saturating_add(64));
    file.take(max.saturating_add(1)).read_to_end(&mut bytes)?;
    match bytes.len() as u64 > max {
        true => Err(too_large()),
        false => Ok(bytes),
    }
}

/// `NotFound` as `None`; so is a name that is too long, which no file can have.
///
/// # Errors
/// Every other one.
pub fn absent_is_none<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(e) if is_absent(&e) => Ok(None),
        Err(e) => Err(e),
    }
}

fn is_absent(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidFilename)
}

#[cfg(test)]
mod tests;
