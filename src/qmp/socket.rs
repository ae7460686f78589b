//! A connected socket whose every wait ends: the one place where a peer's bytes come in.
//!
//! A deadline is an instant. Before each read and each write it is compared with the clock, and the
//! flag that asks for the end is looked at, whether or not the peer has something to say: one that
//! sends faster than it is read must not keep anybody beyond them. Whatever reads in a loop ends by
//! reading through here.

use std::io;
use std::mem;
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::address::Address;
use crate::error::{Error, Kind, Result};

/// How often a wait looks at the flag that asks for its end.
const SLICE: Duration = Duration::from_millis(100);

/// A connected socket.
#[derive(Debug)]
pub(crate) struct Socket {
    fd: OwnedFd,
    peer: String,
    unix: bool,
    stop: Option<Arc<AtomicBool>>,
}

impl Socket {
    /// Connects.
    ///
    /// # Errors
    /// `NotFound`, `Permission` or `Peer` if nobody listens; `Busy` if the queue of waiting
    /// clients is full; `Timeout`.
    pub(crate) fn connect(address: &Address, timeout: Duration) -> Result<Self> {
        let (fd, unix) = match address {
            Address::Unix(path) => (connect_unix(path, timeout)?, true),
            Address::Tcp(a) => (connect_tcp(a, timeout)?, false),
        };
        Self::of(fd, address.to_string(), unix)
    }

    /// Whether nobody listens at `address` any more.
    pub(crate) fn is_dead(address: &Address) -> bool {
        let e = Self::connect(address, Duration::from_secs(1)).err();
        e.is_some_and(|e| matches!(e.kind(), Kind::NotFound | Kind::Peer))
    }

    /// One that was accepted; `name` is for messages.
    ///
    /// # Errors
    /// It cannot be set up.
    pub(crate) fn accepted(stream: UnixStream, name: &str) -> Result<Self> {
        Self::of(stream.into(), name.to_string(), true)
    }

    fn of(fd: OwnedFd, peer: String, unix: bool) -> Result<Self> {
        set_nonblocking(&fd).map_err(|e| Error::io(e, "cannot set up the socket"))?;
        Ok(Socket { fd, peer, unix, stop: None })
    }

    /// Who is at the other end, for messages.
    pub(crate) fn peer(&self) -> &str {
        &self.peer
    }

    /// Whether descriptors can be passed.
    pub(crate) fn passes_descriptors(&self) -> bool {
        self.unix
    }

    /// From now on waits end with `Interrupted` once the flag is set; `None` ends that.
    pub(crate) fn stop_by(&mut self, flag: Option<Arc<AtomicBool>>) {
        self.stop = flag;
    }

    /// Sends `bytes`; `pass` travels with the first of them.
    ///
    /// # Errors
    /// `Peer` if the other end is gone, `Timeout` if it does not read, `Interrupted`.
    pub(crate) fn send(
        &self,
        bytes: &[u8],
        pass: Option<BorrowedFd<'_>>,
        deadline: Instant,
    ) -> Result<()> {
        let mut rest = bytes;
        let mut pass = pass.map(|f| f.as_raw_fd());
        while !rest.is_empty() {
            if !self.ready(libc::POLLOUT, deadline)? {
                return Err(self.timeout("it does not read its requests"));
            }
            match send_some(self.fd.as_raw_fd(), rest, pass) {
                Ok(n) => {
                    pass = None;
                    rest = rest.get(n..).unwrap_or_default();
                }
                Err(e) if is_passing(&e) => {}
                Err(e) => return Err(self.gone().with_source(e)),
            }
        }
        Ok(())
    }

    /// Reads what has come, at least a byte; `None` at the deadline.
    ///
    /// # Errors
    /// `Peer` at the end of the stream, `Interrupted`.
    pub(crate) fn read(&self, buf: &mut [u8], deadline: Instant) -> Result<Option<usize>> {
        while self.ready(libc::POLLIN, deadline)? {
            // SAFETY: the buffer is ours and as long as we say.
            let n =
                unsafe { libc::recv(self.fd.as_raw_fd(), buf.as_mut_ptr().cast(), buf.len(), 0) };
            match usize::try_from(n) {
                Ok(0) => return Err(self.gone()),
                Ok(n) => return Ok(Some(n)),
                Err(_) => {
                    let e = io::Error::last_os_error();
                    if !is_passing(&e) {
                        return Err(self.gone().with_source(e));
                    }
                }
            }
        }
        Ok(None)
    }

    /// Fills the whole of `buf`.
    ///
    /// # Errors
    /// `Timeout` if it is not full at the deadline, and as [`Socket::read`].
    pub(crate) fn read_exact(&self, buf: &mut [u8], deadline: Instant) -> Result<()> {
        let mut rest = buf;
        while !rest.is_empty() {
            let Some(n) = self.read(rest, deadline)? else {
                return Err(self.timeout("it does not answer in time"));
            };
            rest = rest.get_mut(n..).unwrap_or_default();
        }
        Ok(())
    }

    /// Waits until something can be done; false at the deadline, also if it could be.
    fn ready(&self, what: libc::c_short, deadline: Instant) -> Result<bool> {
        loop {
            self.check_stop()?;
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            let ms = left.min(SLICE).as_millis().saturating_add(1);
            let ms = libc::c_int::try_from(ms).unwrap_or(1);
            let mut p = libc::pollfd { fd: self.fd.as_raw_fd(), events: what, revents: 0 };
            // SAFETY: one pollfd that lives on our stack.
            match unsafe { libc::poll(&mut p, 1, ms) } {
                0 => {}
                n if n > 0 => return Ok(true),
                _ => {
                    let e = io::Error::last_os_error();
                    if !is_passing(&e) {
                        let e = Error::io(e, "waiting for the socket failed");
                        return Err(e.at_path(&self.peer));
                    }
                }
            }
        }
    }

    /// `Interrupted` if the end was asked for.
    ///
    /// # Errors
    /// `Interrupted`.
    pub(crate) fn check_stop(&self) -> Result<()> {
        match &self.stop {
            Some(f) if f.load(Ordering::SeqCst) => {
                Err(Error::new(Kind::Interrupted, "ended by a signal or by cancel"))
            }
            _ => Ok(()),
        }
    }

    fn gone(&self) -> Error {
        Error::new(Kind::Peer, "the connection was closed by the other end").at_path(&self.peer)
    }

    /// The error for a peer that was too slow.
    pub(crate) fn timeout(&self, what: &str) -> Error {
        Error::new(Kind::Timeout, what).at_path(&self.peer)
    }
}

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

fn is_passing(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock)
}

fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    // SAFETY: fcntl on a descriptor we own.
    let r = unsafe {
        let flags = libc::fcntl(fd.as_raw_fd(), libc::F_GETFL);
        libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK)
    };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn send_some(fd: RawFd, bytes: &[u8], pass: Option<RawFd>) -> io::Result<usize> {
    let mut iov = libc::iovec { iov_base: bytes.as_ptr() as *mut _, iov_len: bytes.len() };
    // u64 elements, so that the control header is aligned.
    let mut control = [0u64; 8];
    // SAFETY: a zeroed msghdr is valid; all pointers outlive the call; the control buffer has
    // room for one header and one descriptor (24 of 64 bytes).
    let n = unsafe {
        let mut msg: libc::msghdr = mem::zeroed();
        msg.msg_iov = &mut iov;
        msg.msg_iovlen = 1;
        if let Some(pass) = pass {
            let len = mem::size_of::<RawFd>() as u32;
            msg.msg_control = control.as_mut_ptr().cast();
            msg.msg_controllen = libc::CMSG_SPACE(len) as _;
            let head = libc::CMSG_FIRSTHDR(&msg);
            (*head).cmsg_level = libc::SOL_SOCKET;
            (*head).cmsg_type = libc::SCM_RIGHTS;
            (*head).cmsg_len = libc::CMSG_LEN(len) as _;
            libc::CMSG_DATA(head).cast::<RawFd>().write_unaligned(pass);
        }
        libc::sendmsg(fd, &msg, libc::MSG_NOSIGNAL)
    };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

fn connect_tcp(address: &str, timeout: Duration) -> Result<OwnedFd> {
    let fail = |e: io::Error| Error::io(e, "cannot connect").at_path(format!("tcp:{address}"));
    let mut last = io::Error::from_raw_os_error(libc::EADDRNOTAVAIL);
    let addresses = address.to_socket_addrs().map_err(fail)?;
    // For all addresses that a name has.
    let deadline = Instant::now() + timeout;
    for a in addresses {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        match TcpStream::connect_timeout(&a, left) {
            Ok(s) => {
                s.set_nodelay(true).map_err(fail)?;
                // SAFETY: the descriptor was just given up by its former owner.
                return Ok(unsafe { OwnedFd::from_raw_fd(s.into_raw_fd()) });
            }
            Err(e) => last = e,
        }
    }
    Err(connect_error(last, Path::new(&format!("tcp:{address}"))))
}

fn connect_unix(path: &Path, timeout: Duration) -> Result<OwnedFd> {
    // SAFETY: socket has no preconditions; the result is checked.
    let fd = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(Error::io(io::Error::last_os_error(), "cannot make a socket"));
    }
    // SAFETY: a fresh descriptor that nobody else owns.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    limit_send(&fd, timeout);
    // A long path goes through its folder's descriptor: sun_path has 108 bytes.
    let (short, _dir) = shorten(path)?;
    let (addr, len) = unix_address(&short)?;
    // SAFETY: addr is a valid sockaddr_un of len bytes.
    let r = unsafe { libc::connect(fd.as_raw_fd(), (&raw const addr).cast(), len) };
    if r < 0 {
        return Err(connect_error(io::Error::last_os_error(), path));
    }
    Ok(fd)
}

/// Bounds connect (which waits while the listener's queue is full) by SO_SNDTIMEO.
fn limit_send(fd: &OwnedFd, timeout: Duration) {
    let tv = libc::timeval {
        tv_sec: libc::time_t::try_from(timeout.as_secs().max(1)).unwrap_or(60),
        tv_usec: 0,
    };
    // SAFETY: a valid timeval of the size given. A failure leaves connect unbounded only where
    // the listener's queue is full.
    unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_SNDTIMEO,
            (&raw const tv).cast(),
            mem::size_of::<libc::timeval>() as _,
        );
    }
}

/// A path that fits into sun_path, and what must stay open while it is used.
///
/// # Errors
/// The folder of a long path cannot be opened.
// The caller names a socket; links on the way to it are his.
#[allow(clippy::disallowed_methods)]
pub(crate) fn shorten(path: &Path) -> Result<(PathBuf, Option<std::fs::File>)> {
    use std::os::unix::fs::OpenOptionsExt;
    if path.as_os_str().len() < 108 {
        return Ok((path.to_path_buf(), None));
    }
    let parent = path.parent().unwrap_or(Path::new("."));
    let dir = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
        .open(parent)
        .map_err(|e| Error::io(e, "cannot open the socket's folder").at_path(parent))?;
    let name = path.file_name().unwrap_or_default();
    let short = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd())).join(name);
    Ok((short, Some(dir)))
}

fn unix_address(path: &Path) -> Result<(libc::sockaddr_un, libc::socklen_t)> {
    // SAFETY: all zeros is a valid sockaddr_un.
    let mut addr: libc::sockaddr_un = unsafe { mem::zeroed() };
    addr.sun_family = libc::AF_UNIX as _;
    let bytes = path.as_os_str().as_bytes();
    if bytes.len() >= addr.sun_path.len() {
        return Err(Error::new(Kind::Usage, "the socket's name is too long").at_path(path));
    }
    for (to, from) in addr.sun_path.iter_mut().zip(bytes) {
        *to = *from as _;
    }
    Ok((addr, mem::size_of::<libc::sockaddr_un>() as _))
}

fn connect_error(e: io::Error, path: &Path) -> Error {
    let busy = e.kind() == io::ErrorKind::WouldBlock;
    let refused = e.raw_os_error() == Some(libc::ECONNREFUSED);
    if busy {
        return in_use(path);
    }
    if refused {
        return Error::new(Kind::Peer, "nothing listens on the socket")
            .at_path(path)
            .remedy("is QEMU running, and was it given this address?");
    }
    Error::io(e, "cannot connect").at_path(path)
}

/// The error for a socket that another client holds.
pub(crate) fn in_use(path: &Path) -> Error {
    Error::new(
        Kind::Busy,
        "the socket accepts the connection but does not answer: another \
                            program uses it",
    )
    .at_path(path)
    .remedy(
        "a QMP socket serves one client; add a second one to QEMU: -qmp \
                 unix:/run/vm-backup.sock,server=on,wait=off (libvirt: a <qemu:commandline> with \
                 the same argument)",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_long_socket_path_works() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("d".repeat(120));
        std::fs::create_dir(&deep).unwrap();
        let (short, _keep) = shorten(&deep.join("s")).unwrap();
        let l = UnixListener::bind(&short).unwrap();
        Socket::connect(&Address::Unix(deep.join("s")), Duration::from_secs(5)).unwrap();
        drop(l);
    }
}
