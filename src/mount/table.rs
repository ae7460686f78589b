//! What is mounted where (`/proc/self/mountinfo`), and unmounting.
//!
//! Nothing here touches the mount itself, so a mount whose server hangs or is dead cannot
//! stop it from being unmounted.

use std::ffi::{CString, OsString};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::error::{Error, Kind, Result};
use crate::folder::{self, Folder};

/// How long a mount that has ended may have its socket.
const ENDING: Duration = Duration::from_secs(1);
/// More than these do not wait for the end of one mount.
const MOST_WAITING: usize = 64;
/// How often it is looked at.
const LOOK: Duration = Duration::from_millis(2);

/// One line of `/proc/self/mountinfo`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mount {
    /// The mount point.
    pub path: PathBuf,
    /// What of its file system is seen there.
    pub root: PathBuf,
    /// Number of the mount.
    pub number: String,
    /// Device number, `major:minor`.
    pub dev: String,
    /// File system type.
    pub fstype: String,
    /// The source, as shown by `mount`.
    pub source: String,
}

impl Mount {
    /// Whether it is one of ours.
    pub(crate) fn is_fleecefs(&self) -> bool {
        self.fstype == "fuse.fleecefs"
    }

    pub(super) fn parse(line: &str) -> Option<Mount> {
        let (front, back) = line.split_once(" - ")?;
        let front: Vec<&str> = front.split(' ').collect();
        let mut back = back.split(' ');
        Some(Mount {
            number: (*front.first()?).to_string(),
            dev: (*front.get(2)?).to_string(),
            root: PathBuf::from(unescape(front.get(3)?)),
            path: PathBuf::from(unescape(front.get(4)?)),
            fstype: back.next()?.to_string(),
            source: unescape(back.next()?).to_string_lossy().into_owned(),
        })
    }

    /// Unmounts it, if it is still there.
    ///
    /// # Errors
    /// As [`unmount`]; `Busy` if something else is mounted over it.
    pub(super) fn end(&self, lazy: bool) -> Result<()> {
        // Somebody may have unmounted it and mounted something else.
        if !listed()?.iter().any(|m| m.path == self.path && m.dev == self.dev) {
            return Ok(());
        }
        match find(&self.path)? {
            Some(m) if m.dev == self.dev => unmount(&self.path, lazy),
            _ => Err(Error::new(Kind::Busy, "another mount hides it").at_path(&self.path)),
        }
    }

    fn socket_name(&self) -> String {
        format!("fleecefs-mount-{}", self.dev)
    }

    /// A socket that tells `umount` which process serves this mount, and in the end how that went. The mount that had
    /// this device number before may be ending: its socket goes in a moment.
    pub(super) fn announce(&self) -> std::io::Result<Announced> {
        let address = SocketAddr::from_abstract_name(self.socket_name())?;
        let deadline = Instant::now() + ENDING;
        loop {
            match UnixListener::bind_addr(&address) {
                Err(e) if e.kind() == ErrorKind::AddrInUse && Instant::now() < deadline => {
                    std::thread::sleep(LOOK);
                }
                bound => return Ok(Announced(bound?)),
            }
        }
    }

    /// The process that serves this mount, if it can be told.
    pub(crate) fn server(&self) -> Option<Server> {
        let address = SocketAddr::from_abstract_name(self.socket_name()).ok()?;
        let stream = UnixStream::connect_addr(&address).ok()?;
        let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
        let mut len = size_of::<libc::ucred>() as libc::socklen_t;
        // SAFETY: the buffer is as long as said. As long as we are connected, the process that
        // listens lives, so its number cannot be another's yet.
        let pidfd = unsafe {
            let (fd, peer) = (stream.as_raw_fd(), &raw mut peer);
            let level = (libc::SOL_SOCKET, libc::SO_PEERCRED);
            if libc::getsockopt(fd, level.0, level.1, peer.cast(), &mut len) != 0 {
                return None;
            }
            libc::syscall(libc::SYS_pidfd_open, (*peer).pid, 0)
        };
        let pidfd = i32::try_from(pidfd).ok().filter(|fd| *fd >= 0)?;
        let is_trusted = [0, rustix::process::geteuid().as_raw()].contains(&peer.uid);
        // SAFETY: a fresh descriptor, checked just above.
        let process = unsafe { OwnedFd::from_raw_fd(pidfd) };
        Some(Server { process, stream, heard: None, is_trusted })
    }
}

/// Says that the process of a mount lives, as long as this does.
#[derive(Debug)]
pub(super) struct Announced(UnixListener);

/// Those who wait for the end of a process.
#[derive(Debug, Default)]
pub(super) struct Waiting(Vec<UnixStream>);

/// Said to those who wait, before what was written to points is written down. No exit code is that.
const WRITES_DOWN: u8 = u8::MAX;

impl Announced {
    /// Ends it: nobody new finds this process. Who has is told that it goes on for a while, and later how it ended.
    pub(super) fn end(self) -> Waiting {
        let mut waiting = Vec::new();
        if self.0.set_nonblocking(true).is_ok() {
            // Anybody may connect: not for ever.
            waiting.extend(self.0.incoming().take(MOST_WAITING).map_while(Result::ok));
        }
        let mut waiting = Waiting(waiting);
        waiting.tell(WRITES_DOWN);
        waiting
    }
}

impl Waiting {
    /// Tells them the exit code.
    pub(super) fn tell(&mut self, code: u8) {
        // A byte has room in a fresh socket; who is gone need not know.
        self.0.iter_mut().for_each(|s| drop(s.write_all(&[code])));
    }
}

/// A process that serves a mount.
pub(crate) struct Server {
    process: OwnedFd,
    stream: UnixStream,
    heard: Option<u8>,
    /// Whether it is root's or the caller's own: anybody may have taken the name of a socket.
    is_trusted: bool,
}

impl Server {
    /// What it has said last, as far as that has come.
    fn hear(&mut self) -> Option<u8> {
        let mut words = [0; 16];
        self.stream.set_nonblocking(true).ok()?;
        while let Ok(n @ 1..) = self.stream.read(&mut words) {
            self.heard = words[..n].last().copied();
        }
        self.heard
    }

    /// Whether it is unmounted and writes down what was written to points, which takes as long as it does.
    pub(super) fn writes_down(&mut self) -> bool {
        self.hear() == Some(WRITES_DOWN) && self.is_trusted
    }

    /// The exit code that it has told before it ended; `None` if it told none.
    pub(super) fn told(&mut self) -> Option<u8> {
        self.hear().filter(|word| *word != WRITES_DOWN)
    }

    /// Waits until it has ended; false if it has not after `patience`.
    pub(super) fn wait(&self, patience: Duration) -> bool {
        let mut fd =
            libc::pollfd { fd: self.process.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let ms = i32::try_from(patience.as_millis()).unwrap_or(i32::MAX);
        // SAFETY: one valid entry.
        unsafe { libc::poll(&mut fd, 1, ms) != 0 }
    }
}

/// `\040` and its like, as the kernel escapes them.
fn unescape(text: &str) -> OsString {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    while i < bytes.len() {
        let octal = bytes.get(i + 1..i + 4).filter(|_| bytes[i] == b'\\');
        let value = octal.and_then(|o| std::str::from_utf8(o).ok());
        match value.and_then(|v| u8::from_str_radix(v, 8).ok()) {
            Some(byte) => {
                out.push(byte);
                i += 4;
            }
            None => {
                out.push(bytes[i]);
                i += 1;
            }
        }
    }
    OsString::from_vec(out)
}

/// All mounts that this process sees.
///
/// # Errors
/// The list cannot be read.
pub(super) fn listed() -> Result<Vec<Mount>> {
    let list = "/proc/self/mountinfo";
    let bytes = folder::system::read(Path::new(list))
        .map_err(|e| Error::io(e, "cannot read the list of mounts").at_path(list))?;
    Ok(escaped(&bytes).lines().filter_map(Mount::parse).collect())
}

/// The list as text: the kernel escapes spaces and the like, and leaves bytes that may be no UTF-8 as they are.
fn escaped(list: &[u8]) -> String {
    let mut text = String::with_capacity(list.len());
    for byte in list {
        match byte.is_ascii() {
            true => text.push(char::from(*byte)),
            false => text.push_str(&format!("\\{byte:03o}")),
        }
    }
    text
}

/// What is mounted at `path`, which must be absolute and without links; the topmost of several. One
/// that a later mount above it hides is not there.
///
/// # Errors
/// The list cannot be read.
pub(crate) fn find(path: &Path) -> Result<Option<Mount>> {
    let mut here = listed()?;
    here.retain(|m| m.path == path);
    if here.is_empty() {
        return Ok(None);
    }
    Ok(match folder::mount_number(path) {
        Ok(number) => here.into_iter().find(|m| m.number == number),
        // Where nobody may look, the list has to do.
        Err(_) => here.pop(),
    })
}

/// What is mounted at `path`, however it is written. What is mounted there is not asked: its server
/// may be dead or hang.
///
/// # Errors
/// The list cannot be read.
pub(super) fn at(path: &Path) -> Result<Option<Mount>> {
    let wrong = |e| Error::io(e, "cannot find the mount point").at_path(path);
    let absolute = std::path::absolute(path).map_err(wrong)?;
    if let Some(mount) = find(&absolute)? {
        return Ok(Some(mount));
    }
    // The folder it is in first: what is mounted may be somebody's who lets nobody look at it.
    if let (Some(parent), Some(name)) = (absolute.parent(), absolute.file_name())
        && let Ok(parent) = folder::resolve(parent)
        && let Some(mount) = find(&parent.join(name))?
    {
        return Ok(Some(mount));
    }
    folder::resolve_path(path).ok().map_or(Ok(None), |real| find(&real))
}

/// Unmounts what is at `path`: directly, or with fusermount where the kernel wants root. There may be
/// no link on the path: its folder is held while the last name is unmounted in it, which cannot be
/// renamed as long as something is mounted there.
///
/// # Errors
/// `Busy` if it is in use, `NotFound` if nothing is mounted there, `Permission`.
pub(crate) fn unmount(path: &Path, lazy: bool) -> Result<()> {
    let (folder, name) =
        Folder::of(path).map_err(|e| Error::io(e, "cannot unmount").at_path(path))?;
    let name = CString::new(folder.proc_path().join(name).as_os_str().as_bytes())
        .map_err(|_| Error::new(Kind::Usage, "a path with a zero byte").at_path(path))?;
    let flags = libc::UMOUNT_NOFOLLOW | if lazy { libc::MNT_DETACH } else { 0 };
    // SAFETY: the path is a C string.
    if unsafe { libc::umount2(name.as_ptr(), flags) } == 0 {
        return Ok(());
    }
    let e = std::io::Error::last_os_error();
    match e.raw_os_error() {
        Some(libc::EPERM) => with_fusermount(path, lazy),
        Some(libc::EBUSY) => Err(busy(path)),
        Some(libc::EINVAL) => {
            Err(Error::new(Kind::NotFound, "nothing is mounted here").at_path(path))
        }
        _ => Err(Error::io(e, "cannot unmount").at_path(path)),
    }
}

fn busy(path: &Path) -> Error {
    Error::new(Kind::Busy, "still in use: a file is open or a process works inside")
        .at_path(path)
        .remedy("close it (fuser -vm, losetup -a), or detach with --lazy")
}

fn with_fusermount(path: &Path, lazy: bool) -> Result<()> {
    for program in ["fusermount3", "fusermount"] {
        let mut command = Command::new(program);
        command.arg("-u").args(lazy.then_some("-z")).arg("--").arg(path);
        match command.output() {
            Ok(out) if out.status.success() => return Ok(()),
            Ok(out) => {
                let text = String::from_utf8_lossy(&out.stderr).trim().to_string();
                if text.contains("busy") {
                    return Err(busy(path));
                }
                return Err(Error::new(Kind::Permission, text).at_path(path));
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(Error::io(e, format!("cannot run {program}"))),
        }
    }
    Err(Error::new(Kind::Permission, "only root may unmount without fusermount3")
        .at_path(path)
        .remedy("install the package fuse3"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_kernel_are_read() {
        let line =
            "77 29 0:51 / /mnt/a\\040b ro,nosuid shared:1 - fuse.fleecefs /b\\134x ro,user_id=0";
        let mount = Mount::parse(line).unwrap();
        assert_eq!(mount.path, Path::new("/mnt/a b"));
        assert_eq!((mount.dev.as_str(), mount.source.as_str()), ("0:51", "/b\\x"));
        assert!(mount.is_fleecefs());
        assert_eq!(Mount::parse("garbage"), None);
        let line = b"77 29 0:51 / /m\xffn\xc3\xbct\\040 ro shared:1 - ext4 /d\xff ro";
        let mount = Mount::parse(&escaped(line)).unwrap();
        assert_eq!(mount.path.as_os_str().as_bytes(), b"/m\xffn\xc3\xbct ");
        assert_eq!(mount.source, "/d\u{fffd}");
    }

    #[test]
    fn who_waits_for_the_end_hears_that_it_takes_long_and_how_it_went() {
        // The device number of no mount.
        let line = format!("77 29 test-{} / /mnt ro - fuse.fleecefs x ro", std::process::id());
        let mount = Mount::parse(&line).unwrap();
        assert!(mount.server().is_none());
        let announced = mount.announce().unwrap();
        let mut servers = [mount.server().unwrap(), mount.server().unwrap()];
        for server in &mut servers {
            assert!(!server.wait(Duration::ZERO) && !server.writes_down());
            assert_eq!(server.told(), None);
        }
        let mut waiting = announced.end();
        assert!(mount.server().is_none());
        assert!(servers[0].writes_down() && servers[0].told().is_none());
        waiting.tell(7);
        // Whoever has not asked in between, too.
        assert!(servers.iter_mut().all(|s| !s.writes_down() && s.told() == Some(7)));
    }

    #[test]
    fn the_root_is_mounted_and_a_plain_folder_is_not() {
        assert!(find(Path::new("/")).unwrap().is_some());
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(find(dir.path()).unwrap(), None);
        let e = unmount(dir.path(), false).unwrap_err();
        assert!(matches!(e.kind(), Kind::NotFound | Kind::Permission));
    }
}
