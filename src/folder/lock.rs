//! Locks on files: held by flock(2), so that a killed process leaves none.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use super::{FileId, Folder, degraded, refused};

/// How often somebody may take a lock file's name away while it is being locked.
const TRIES: usize = 16;

/// A lock, held until it is dropped.
#[derive(Debug)]
pub struct Lock {
    file: File,
}

/// What [`Locked::of`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Locked {
    /// This process has the lock.
    Own,
    /// Somebody else has it.
    Other,
    /// This file system has no locks.
    Without,
}

impl Locked {
    /// Tries to lock an open file.
    ///
    /// # Errors
    /// What the operating system said.
    pub fn of(file: &File) -> io::Result<Self> {
        loop {
            return match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => Ok(Locked::Own),
                Err(Errno::INTR) => continue,
                // On CIFS a lock that another host holds is ACCES.
                Err(Errno::WOULDBLOCK | Errno::ACCESS) => Ok(Locked::Other),
                Err(Errno::NOLCK | Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
                    Ok(Locked::Without)
                }
                Err(e) => Err(e.into()),
            };
        }
    }
}

/// Whether somebody else has a lock on a part of the file, as QEMU has on the images that it has open
/// (file-posix.c: bytes from 100 on). Where the file system does not tell, nobody has.
pub fn is_in_use(file: &File) -> bool {
    has_lock(file, (0, 0))
}

/// Whether a QEMU or one of its tools may write to an image (byte 101 is locked), or lets nobody else
/// write to it (byte 201). As [`is_in_use`].
pub fn qemu_writes(file: &File) -> (bool, bool) {
    (has_lock(file, (101, 1)), has_lock(file, (201, 1)))
}

/// Whether somebody else has a lock on a part of `len` bytes, 0 for all of them.
fn has_lock(file: &File, (start, len): (libc::off_t, libc::off_t)) -> bool {
    let mut part = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start,
        l_len: len,
        l_pid: 0,
    };
    // SAFETY: the file is open, and `part` is a struct flock that is written to.
    let told = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut part) };
    told == 0 && part.l_type != libc::F_UNLCK as libc::c_short
}

impl Lock {
    /// See [`Folder::lock`].
    pub(super) fn take(folder: &Folder, name: &OsStr) -> io::Result<Option<Lock>> {
        for _ in 0..TRIES {
            let file = open(folder, name)?;
            match Locked::of(&file)? {
                Locked::Other => return Ok(None),
                Locked::Own => {}
                Locked::Without => degraded::MissingFeature::Locks.tell(&folder.join(name)),
            }
            // Its last holder may have removed it before it was locked here.
            let there = super::absent_is_none(folder.look(name))?;
            if there.map(|m| FileId::of(&m)) == Some(FileId::of(&file.metadata()?)) {
                return Ok(Some(Lock { file }));
            }
        }
        Err(refused("the lock file is replaced again and again"))
    }

    /// The open lock file.
    pub fn file(&self) -> &File {
        &self.file
    }
}

fn open(folder: &Folder, name: &OsStr) -> io::Result<File> {
    let flags =
        OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let fd = match rustix::fs::openat(folder.as_fd(), name, flags, Mode::RUSR | Mode::WUSR) {
        Err(Errno::LOOP) => return Err(refused("the lock file is a symbolic link")),
        other => other?,
    };
    let file = File::from(fd);
    if !file.metadata()?.is_file() {
        return Err(refused("the lock file is not a plain file"));
    }
    Ok(file)
}
