//! Things of all kinds that are made in a folder, as a copy of a tree needs them, and what they are given
//! afterwards: by descriptors, so that whoever exchanges a name gets nothing.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, Timespec, Timestamps, Uid, XattrFlags};

use super::{FileId, Folder, open, plain, refused};

/// A time of a file, in seconds and nanoseconds since the epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileTime {
    /// Seconds.
    pub seconds: i64,
    /// Nanoseconds.
    pub nanos: u32,
}

/// What a new node is that is neither file, folder nor link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NewNode {
    /// A named pipe.
    Pipe,
    /// A socket that nobody listens on.
    Socket,
    /// A character device of these numbers.
    CharDevice(u32, u32),
    /// A block device of these numbers.
    BlockDevice(u32, u32),
}

/// Something that was just made, held by a handle.
#[derive(Debug)]
pub struct Made {
    handle: File,
}

impl Folder {
    /// The folder `name`, which must not have been there; mode 0700.
    ///
    /// # Errors
    /// What the operating system said, `AlreadyExists` among it.
    pub fn new_folder(&self, name: impl AsRef<OsStr>) -> io::Result<Folder> {
        let name = plain(name.as_ref())?;
        rustix::fs::mkdirat(self.as_fd(), name, Mode::RWXU)?;
        let made = self.folder(name)?;
        match self.gives_to(made.metadata()?.uid())? {
            true => Ok(made),
            false => Err(refused("another directory has taken its name")),
        }
    }

    /// Makes a node that was not there, mode 0600.
    ///
    /// # Errors
    /// What the operating system said, `AlreadyExists` among it.
    pub fn new_node(&self, name: impl AsRef<OsStr>, what: NewNode) -> io::Result<Made> {
        let name = plain(name.as_ref())?;
        let (kind, device) = match what {
            NewNode::Pipe => (FileType::Fifo, 0),
            NewNode::Socket => (FileType::Socket, 0),
            NewNode::CharDevice(major, minor) => {
                (FileType::CharacterDevice, rustix::fs::makedev(major, minor))
            }
            NewNode::BlockDevice(major, minor) => {
                (FileType::BlockDevice, rustix::fs::makedev(major, minor))
            }
        };
        rustix::fs::mknodat(self.as_fd(), name, kind, Mode::RUSR | Mode::WUSR, device)?;
        self.made(name, kind)
    }

    /// Makes a symbolic link that was not there.
    ///
    /// # Errors
    /// What the operating system said, `AlreadyExists` among it.
    pub fn new_link(&self, name: impl AsRef<OsStr>, text: &Path) -> io::Result<Made> {
        self.make_link(text, name.as_ref())?;
        self.made(name.as_ref(), FileType::Symlink)
    }

    /// The handle of what we made under this name, if it is still that.
    fn made(&self, name: &OsStr, kind: FileType) -> io::Result<Made> {
        let handle = self.probe(name)?;
        let stat = rustix::fs::fstat(&handle)?;
        let own = stat.st_nlink <= 1 && self.gives_to(stat.st_uid)?;
        match own && FileType::from_raw_mode(stat.st_mode) == kind {
            true => Ok(Made { handle }),
            false => Err(refused("something else has taken its name")),
        }
    }

    /// Whether what we have just made here may be this user's: where others can exchange it, it must be ours, or
    /// the folder's owner's, to whom some file systems give everything.
    fn gives_to(&self, uid: u32) -> io::Result<bool> {
        let own = [rustix::process::geteuid().as_raw(), self.metadata()?.uid()].contains(&uid);
        Ok(own || super::foreign_owner(self)?.is_none())
    }

    /// Gives the file `id`, which `from` has under the name `name`, the further name `new` in this folder.
    ///
    /// # Errors
    /// What the operating system said, `AlreadyExists` among it; a refusal if another file has taken `name`.
    pub fn further_name(
        &self,
        new: impl AsRef<OsStr>,
        from: &Folder,
        name: impl AsRef<OsStr>,
        id: FileId,
    ) -> io::Result<()> {
        let handle = from.probe(name.as_ref())?;
        if FileId::of(&handle.metadata()?) != id {
            return Err(refused("another file has taken the name of the first copy"));
        }
        let path = open::proc_path(handle.as_raw_fd());
        let new = plain(new.as_ref())?;
        Ok(rustix::fs::linkat(CWD, &path, self.as_fd(), new, AtFlags::SYMLINK_FOLLOW)?)
    }

    /// This folder as something that was made.
    ///
    /// # Errors
    /// No more descriptors.
    pub fn as_made(&self) -> io::Result<Made> {
        Ok(Made { handle: File::from(self.fd.try_clone()?) })
    }
}

impl Made {
    /// An open file as something that was made.
    ///
    /// # Errors
    /// No more descriptors.
    pub fn of(file: &File) -> io::Result<Made> {
        Ok(Made { handle: file.try_clone()? })
    }

    /// Which file it is.
    ///
    /// # Errors
    /// What the operating system said.
    pub fn id(&self) -> io::Result<FileId> {
        Ok(FileId::of(&self.handle.metadata()?))
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.handle.as_fd()
    }

    /// A path to it that leads nowhere else.
    fn path(&self) -> PathBuf {
        open::proc_path(self.handle.as_raw_fd())
    }

    /// Gives it an owner and a group.
    ///
    /// # Errors
    /// What the operating system said.
    pub fn set_owner(&self, uid: u32, gid: u32) -> io::Result<()> {
        // The highest number means "leave it as it is".
        let (uid, gid) = (
            (uid != u32::MAX).then(|| Uid::from_raw(uid)),
            (gid != u32::MAX).then(|| Gid::from_raw(gid)),
        );
        Ok(rustix::fs::chownat(self.fd(), "", uid, gid, AtFlags::EMPTY_PATH)?)
    }

    /// Gives it permission bits. A symbolic link has none.
    ///
    /// # Errors
    /// What the operating system said.
    pub fn set_mode(&self, mode: u32) -> io::Result<()> {
        Ok(rustix::fs::chmod(self.path(), Mode::from_raw_mode(mode & 0o7777))?)
    }

    /// Gives it an extended attribute.
    ///
    /// # Errors
    /// What the operating system said.
    pub fn set_attribute(&self, name: &OsStr, value: &[u8]) -> io::Result<()> {
        Ok(rustix::fs::setxattr(self.path(), name, value, XattrFlags::empty())?)
    }

    /// Gives it the times of its last reading and last change.
    ///
    /// # Errors
    /// What the operating system said.
    pub fn set_times(&self, read: FileTime, changed: FileTime) -> io::Result<()> {
        let spec = |m: FileTime| Timespec { tv_sec: m.seconds, tv_nsec: i64::from(m.nanos) };
        let times = Timestamps { last_access: spec(read), last_modification: spec(changed) };
        Ok(rustix::fs::utimensat(CWD, self.path(), &times, AtFlags::empty())?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_made_was_not_there_and_is_changed_by_its_handle() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::open(&dir.path().canonicalize().unwrap()).unwrap();
        std::fs::create_dir(dir.path().join("there")).unwrap();
        std::os::unix::fs::symlink("there", dir.path().join("link")).unwrap();
        for name in ["there", "link"] {
            let made = folder.new_folder(name).unwrap_err();
            assert_eq!(made.kind(), io::ErrorKind::AlreadyExists);
            assert!(folder.new_node(name, NewNode::Pipe).is_err());
            assert!(folder.new_link(name, Path::new("x")).is_err());
        }
        let times = (FileTime { seconds: 5, nanos: 7 }, FileTime { seconds: -3, nanos: 9 });
        let link = folder.new_link("l", Path::new("/etc/passwd")).unwrap();
        link.set_times(times.0, times.1).unwrap();
        let seen = std::fs::symlink_metadata(dir.path().join("l")).unwrap();
        assert_eq!((seen.atime(), seen.atime_nsec()), (5, 7));
        assert_eq!((seen.mtime(), seen.mtime_nsec()), (-3, 9));
        let inner = folder.new_folder("new").unwrap();
        inner.as_made().unwrap().set_mode(0o1751).unwrap();
        assert_eq!(inner.metadata().unwrap().mode() & 0o7777, 0o1751);
    }

    #[test]
    fn a_further_name_is_one_of_the_same_file() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::open(&dir.path().canonicalize().unwrap()).unwrap();
        let made = Made::of(&folder.create_new("a").unwrap()).unwrap();
        folder.further_name("b", &folder, "a", made.id().unwrap()).unwrap();
        assert_eq!(folder.look("b").unwrap().nlink(), 2);
        std::fs::remove_file(dir.path().join("a")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("a")).unwrap();
        assert!(folder.further_name("c", &folder, "a", made.id().unwrap()).is_err());
        assert!(!folder.has("c"));
    }

    #[test]
    fn what_has_a_second_name_was_not_made_just_now() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::open(&dir.path().canonicalize().unwrap()).unwrap();
        folder.new_node("pipe", NewNode::Pipe).unwrap();
        folder.made(OsStr::new("pipe"), FileType::Fifo).unwrap();
        assert!(folder.made(OsStr::new("pipe"), FileType::Socket).is_err());
        std::fs::hard_link(dir.path().join("pipe"), dir.path().join("second")).unwrap();
        assert!(folder.made(OsStr::new("pipe"), FileType::Fifo).is_err());
    }
}
