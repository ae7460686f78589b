//! Looking at what may be a mount whose server is dead or hangs: by asking it for certain, or by asking
//! nobody but the kernel.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use rustix::fs::{AtFlags, FileType, StatxFlags};
use rustix::io::Errno;

use super::{Folder, open, system};

/// Fails as the file system at `path` does when it is asked now. [`super::look`] may be told what the
/// kernel remembers, which a FUSE server that was killed outlives by a second.
///
/// # Errors
/// What the operating system said; `ENOTCONN` if its server is dead.
pub fn ask(path: &Path) -> io::Result<()> {
    statx(path, AtFlags::STATX_FORCE_SYNC).map(drop)
}

/// As [`ask`], but no longer than that. A thread may be left that waits on; it ends with the process.
///
/// # Errors
/// As [`ask`]; `TimedOut`.
pub fn ask_within(path: &Path, patience: Duration) -> io::Result<()> {
    let path = path.to_path_buf();
    within(patience, move || ask(&path))
}

/// Does what may hang with a file system, but waits no longer than that. A thread may be left that waits on; it
/// ends with the process.
///
/// # Errors
/// Those of `act`; `TimedOut`.
pub fn within<T: Send + 'static>(
    patience: Duration,
    act: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let (say, heard) = mpsc::channel();
    std::thread::Builder::new().spawn(move || say.send(act()))?;
    heard.recv_timeout(patience).unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// What is at `path`, as far as the kernel knows without asking a server.
pub(super) struct StatCache {
    pub uid: u32,
    pub kind: FileType,
}

/// What the kernel remembers of `path`.
pub(super) fn remembered(path: &Path) -> io::Result<StatCache> {
    statx(path, AtFlags::STATX_DONT_SYNC)
}

fn statx(path: &Path, sync: AtFlags) -> io::Result<StatCache> {
    let handle = open::handle(&std::path::absolute(path)?)?;
    let flags = AtFlags::EMPTY_PATH | sync;
    match rustix::fs::statx(handle.as_fd(), c"", flags, StatxFlags::BASIC_STATS) {
        Ok(found) => Ok(StatCache {
            uid: found.stx_uid,
            kind: FileType::from_raw_mode(u32::from(found.stx_mode)),
        }),
        // The filters of older container runtimes.
        Err(Errno::NOSYS | Errno::PERM) => {
            let found = rustix::fs::fstat(&handle)?;
            Ok(StatCache { uid: found.st_uid, kind: FileType::from_raw_mode(found.st_mode) })
        }
        Err(e) => Err(e.into()),
    }
}

/// The number of the mount that the folder `path` is in, as `/proc/self/mountinfo` begins its line.
/// Nothing is asked of what is mounted there.
///
/// # Errors
/// As [`Folder::open`]; `NotFound` where the kernel does not tell.
pub fn mount_number(path: &Path) -> io::Result<String> {
    let folder = Folder::open(path)?;
    let info = format!("/proc/self/fdinfo/{}", folder.as_fd().as_raw_fd());
    let text = system::text(Path::new(&info))?;
    let number = text.lines().find_map(|l| l.strip_prefix("mnt_id:"));
    number.map(|n| n.trim().to_string()).ok_or_else(|| Errno::NOENT.into())
}

/// `FUSE_SUPER_MAGIC` of linux/magic.h.
const FUSE: rustix::fs::FsWord = 0x6573_5546;

/// Whether what `path` leads to is on a FUSE file system: what is told of files there, their times too, is
/// what its server says. Asks that server.
///
/// # Errors
/// What the operating system said.
pub fn is_on_fuse(path: &Path) -> io::Result<bool> {
    Ok(rustix::fs::statfs(path)?.f_type == FUSE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_of_a_folder_is_in_the_kernels_list() {
        let number = mount_number(Path::new("/proc")).unwrap();
        // Others may have mounts at paths that are no text.
        let list = std::fs::read("/proc/self/mountinfo").unwrap();
        let list = String::from_utf8_lossy(&list);
        let line = list.lines().find(|l| l.split(' ').next() == Some(&number)).unwrap();
        assert_eq!(line.split(' ').nth(4), Some("/proc"));
        assert!(mount_number(Path::new("/proc/none")).is_err());
    }

    #[test]
    fn what_is_asked_and_what_is_remembered_is_there_or_not() {
        ask(Path::new("/proc/sys")).unwrap();
        ask_within(Path::new("/proc/sys"), Duration::from_secs(60)).unwrap();
        assert!(remembered(Path::new("/proc/self")).unwrap().kind.is_symlink());
        assert!(remembered(Path::new("/")).unwrap().kind.is_dir());
        let none = ask(Path::new("/none")).unwrap_err();
        assert_eq!(none.kind(), io::ErrorKind::NotFound);
    }
}
