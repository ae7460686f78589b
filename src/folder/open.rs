//! Opening without following links: by openat2(2), or component by component where the kernel (or a
//! container's filter) does not have it.

use std::ffi::OsStr;
use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::file_id::FileId;

/// How a plain file is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// For reading.
    Read,
    /// For writing alone; as with [`Access::ReadWrite`] the file must have no other name.
    Write,
    /// For reading and for changing it in place. A file with more than one name is refused: its
    /// other name may be anywhere.
    ReadWrite,
}

/// A refusal of the gate's own; [`crate::error::Error::io`] makes it `Unsupported`.
pub(super) fn refused(why: &'static str) -> io::Error {
    io::Error::other(crate::error::Refused(why))
}

/// Set when openat2 turned out not to be there.
static WITHOUT_OPENAT2: AtomicBool = AtomicBool::new(false);
/// A rename somewhere on the path makes openat2 give up and ask for another try.
const TRIES: usize = 64;

/// A handle (`O_PATH`) of the folder at `path`, relative to `at`.
pub(super) fn folder(at: BorrowedFd<'_>, path: &Path) -> io::Result<OwnedFd> {
    open(at, path, OFlags::PATH | OFlags::DIRECTORY)
}

/// A handle of whatever is at the absolute `path`; of a link itself if it is one.
pub(super) fn handle(path: &Path) -> io::Result<File> {
    // With both, openat2 gives a link at the end itself, for all that it resolves none (its man page).
    open(rustix::fs::CWD, path, OFlags::PATH | OFlags::NOFOLLOW).map(File::from)
}

fn open(at: BorrowedFd<'_>, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
    let flags = flags | OFlags::CLOEXEC;
    if path.components().any(|c| c == Component::ParentDir) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "'..' in a path"));
    }
    if !WITHOUT_OPENAT2.load(Ordering::Relaxed) {
        match openat2(at, path, flags) {
            // EPERM: the filters of older container runtimes.
            Err(Errno::NOSYS | Errno::PERM) => WITHOUT_OPENAT2.store(true, Ordering::Relaxed),
            result => return result.map_err(explain),
        }
    }
    walk(at, path, flags | OFlags::NOFOLLOW).map_err(explain)
}

fn openat2(at: BorrowedFd<'_>, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    for _ in 1..TRIES {
        match rustix::fs::openat2(at, path, flags, Mode::empty(), resolve) {
            Err(Errno::AGAIN | Errno::INTR) => {}
            other => return other,
        }
    }
    rustix::fs::openat2(at, path, flags, Mode::empty(), resolve)
}

/// The same by hand.
pub(super) fn walk(at: BorrowedFd<'_>, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    let step = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let start = if path.is_absolute() { "/" } else { "." };
    let mut held = rustix::fs::openat(at, start, step | OFlags::DIRECTORY, Mode::empty())?;
    let mut parts = path.components().filter(|c| matches!(c, Component::Normal(_))).peekable();
    while let Some(part) = parts.next() {
        let is_last = parts.peek().is_none();
        let flags = if is_last { flags } else { step | OFlags::DIRECTORY };
        held = match rustix::fs::openat(&held, part.as_os_str(), flags, Mode::empty()) {
            // What O_NOFOLLOW with O_DIRECTORY says of a link.
            Err(Errno::NOTDIR) if is_link(held.as_fd(), part.as_os_str()) => Err(Errno::LOOP),
            other => other,
        }?;
    }
    Ok(held)
}

fn is_link(at: BorrowedFd<'_>, name: &OsStr) -> bool {
    let meta = rustix::fs::statat(at, name, rustix::fs::AtFlags::SYMLINK_NOFOLLOW);
    meta.is_ok_and(|m| rustix::fs::FileType::from_raw_mode(m.st_mode).is_symlink())
}

fn explain(e: Errno) -> io::Error {
    match e {
        Errno::LOOP => refused("there is a symbolic link on the path; links are not followed here"),
        e => e.into(),
    }
}

/// Opens for good what `probe` is a handle of and `meta` was seen of, if that is a plain file. `name`
/// relative to `at` is its name, for systems without /proc.
pub(super) fn plain_file(
    at: BorrowedFd<'_>,
    name: &OsStr,
    (probe, meta): (&File, &Metadata),
    access: Access,
) -> io::Result<File> {
    if meta.is_symlink() {
        return Err(refused("it is a symbolic link; links are not followed here"));
    }
    if !meta.is_file() {
        return Err(refused("it is not a plain file"));
    }
    if access != Access::Read && meta.nlink() > 1 {
        return Err(refused("it has more than one name (hard links), and is not changed in place"));
    }
    let file = match through_proc(probe, access) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => by_name(at, name, access)?,
        other => return other,
    };
    // Without /proc the name may stand for another file by now.
    if FileId::of(&file.metadata()?) == FileId::of(meta) {
        Ok(file)
    } else {
        Err(refused("another file has taken its name"))
    }
}

/// Opens `name` in the folder `at` for appending, or makes it. See [`super::Folder::append`].
pub(super) fn append(at: BorrowedFd<'_>, name: &OsStr) -> io::Result<File> {
    use std::os::unix::fs::FileTypeExt;
    // Without NONBLOCK a pipe that nobody reads would hold us here.
    let flags = OFlags::WRONLY
        | OFlags::APPEND
        | OFlags::CREATE
        | OFlags::NOFOLLOW
        | OFlags::NONBLOCK
        | OFlags::NOCTTY
        | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(at, name, flags, Mode::RUSR | Mode::WUSR).map_err(explain)?;
    let file = File::from(fd);
    let meta = file.metadata()?;
    if !meta.is_file() && !meta.file_type().is_char_device() {
        return Err(refused("it is neither a plain file nor a device such as /dev/null"));
    }
    if meta.is_file() && meta.nlink() > 1 {
        return Err(refused("it has more than one name (hard links), and is not written to"));
    }
    // A terminal that is slow is waited for.
    rustix::fs::fcntl_setfl(&file, OFlags::APPEND)?;
    Ok(file)
}

/// How a block device is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceAccess {
    /// For reading, beside others.
    Read,
    /// For asking and commanding it, for us alone: it must not be mounted, or held by RAID, LVM or swap.
    Alone,
    /// As [`DeviceAccess::Alone`], for reading and writing.
    WriteAlone,
}

impl DeviceAccess {
    fn flags(self) -> i32 {
        match self {
            DeviceAccess::Read => 0,
            DeviceAccess::Alone | DeviceAccess::WriteAlone => libc::O_EXCL,
        }
    }
}

/// Opens the block device for good that `probe` is a handle of. `path` is its name, for systems
/// without /proc.
pub(super) fn device(probe: &File, path: &Path, access: DeviceAccess) -> io::Result<File> {
    let meta = probe.metadata()?;
    if meta.is_symlink() {
        return Err(refused("it is a symbolic link; links are not followed here"));
    }
    if !meta.file_type().is_block_device() {
        return Err(refused("it is not a block device"));
    }
    let open = |path: &Path, more: i32| {
        let flags = access.flags() | libc::O_CLOEXEC | libc::O_NOCTTY | more;
        let write = access == DeviceAccess::WriteAlone;
        OpenOptions::new().read(true).write(write).custom_flags(flags).open(path)
    };
    let file = match open(&proc_path(probe.as_raw_fd()), 0) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => open(path, libc::O_NOFOLLOW),
        other => other,
    }?;
    let now = file.metadata()?;
    if now.file_type().is_block_device() && now.rdev() == meta.rdev() {
        Ok(file)
    } else {
        Err(refused("another file has taken its name"))
    }
}

/// A path to an open descriptor of this process.
pub(super) fn proc_path(fd: RawFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{fd}"))
}

pub(super) fn through_proc(probe: &File, access: Access) -> io::Result<File> {
    OpenOptions::new()
        .read(access != Access::Write)
        .write(access != Access::Read)
        .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(proc_path(probe.as_raw_fd()))
}

fn by_name(at: BorrowedFd<'_>, name: &OsStr, access: Access) -> io::Result<File> {
    let mode = match access {
        Access::Read => OFlags::RDONLY,
        Access::Write => OFlags::WRONLY,
        Access::ReadWrite => OFlags::RDWR,
    };
    let flags = mode | OFlags::NONBLOCK | OFlags::NOCTTY;
    open(at.as_fd(), Path::new(name), flags).map(File::from)
}
