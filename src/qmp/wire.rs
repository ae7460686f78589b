//! Lines of JSON over a socket, with a limit on their length and a deadline on every wait.

use std::io;
use std::mem;
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::error::{Error, Kind, Result};

/// The longest line that is accepted, in bytes. `query-qmp-schema` is about 200 KiB, a
/// `query-named-block-nodes` of hundreds of nodes some MiB; beyond this nothing sane remains.
pub const MAX_LINE: usize = 64 << 20;

/// Where a socket listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A unix socket.
    Unix(PathBuf),
    /// `host:port`.
    Tcp(String),
}

impl Address {
    /// Reads `tcp:host:port`, `unix:/path` or a plain path.
    ///
    /// # Errors
    /// `Usage` if it is empty or a TCP address without a port.
    pub fn parse(text: &str) -> Result<Self> {
        if let Some(rest) = text.strip_prefix("tcp:") {
            let port = rest.rsplit_once(':').and_then(|(h, p)| {
                (!h.is_empty()).then_some(())?;
                p.parse::<u16>().ok()
            });
            return match port {
                Some(_) => Ok(Address::Tcp(rest.to_string())),
                None => Err(Error::new(Kind::Usage, format!("{text:?} is not tcp:host:port"))),
            };
        }
        let path = text.strip_prefix("unix:").unwrap_or(text);
        if path.is_empty() {
            return Err(Error::new(Kind::Usage, "the socket's address is empty"));
        }
        Ok(Address::Unix(PathBuf::from(path)))
    }

    /// A text that names the same socket however it was written: its path made absolute.
    pub fn canonical(&self) -> String {
        match self {
            Address::Unix(p) => {
                format!("unix:{}", resolve(p).display())
            }
            Address::Tcp(a) => format!("tcp:{a}"),
        }
    }

    /// The same socket by its real path, which stays right when QEMU has gone and taken the
    /// socket, or its folder, with it.
    pub fn resolved(&self) -> Self {
        match self {
            Address::Unix(p) => Address::Unix(resolve(p)),
            Address::Tcp(_) => self.clone(),
        }
    }

    /// Whether nobody listens there any more.
    pub fn is_dead(&self) -> bool {
        let e = Wire::connect(self, Duration::from_secs(1)).err();
        e.is_some_and(|e| matches!(e.kind(), Kind::NotFound | Kind::Peer))
    }
}

/// How many symbolic links are followed: as many as Linux does.
const LINKS: usize = 40;

/// The absolute path without links, as far as it exists: also of a socket that is gone.
fn resolve(path: &Path) -> PathBuf {
    let mut path = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    for _ in 0..LINKS {
        // A link whose end is gone still says where that was.
        let Ok(to) = std::fs::read_link(&path) else { break };
        path = path.parent().unwrap_or(Path::new("/")).join(to);
    }
    let there = |p: &Path| p.canonicalize().ok();
    let found = path.ancestors().find_map(|a| Some((a, there(a)?)));
    match found {
        Some((old, real)) => match path.strip_prefix(old) {
            Ok(rest) if rest.as_os_str().is_empty() => real,
            Ok(rest) => real.join(rest),
            Err(_) => path,
        },
        None => path,
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Address::Unix(p) => write!(f, "{}", p.display()),
            Address::Tcp(a) => write!(f, "tcp:{a}"),
        }
    }
}

/// A connected socket and the bytes read but not yet consumed.
#[derive(Debug)]
pub struct Wire {
    fd: OwnedFd,
    peer: String,
    unix: bool,
    buf: Vec<u8>,
    /// Bytes of `buf` already searched for a newline.
    scanned: usize,
}

impl Wire {
    /// Connects.
    ///
    /// # Errors
    /// `NotFound`, `Permission` or `Peer` if nobody listens; `Busy` if the queue of waiting
    /// clients is full; `Timeout`.
    pub fn connect(address: &Address, timeout: Duration) -> Result<Self> {
        let (fd, unix) = match address {
            Address::Unix(path) => (connect_unix(path, timeout)?, true),
            Address::Tcp(a) => (connect_tcp(a, timeout)?, false),
        };
        set_nonblocking(&fd).map_err(|e| Error::io(e, "cannot set up the socket"))?;
        Ok(Wire { fd, peer: address.to_string(), unix, buf: Vec::new(), scanned: 0 })
    }

    /// Who is at the other end, for messages.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// Whether descriptors can be passed.
    pub fn passes_descriptors(&self) -> bool {
        self.unix
    }

    /// Sends `bytes`; `pass` travels with the first of them.
    ///
    /// # Errors
    /// `Peer` if the other end is gone, `Timeout` if it does not read.
    pub fn send(
        &mut self,
        bytes: &[u8],
        pass: Option<BorrowedFd<'_>>,
        deadline: Instant,
    ) -> Result<()> {
        let mut rest = bytes;
        let mut pass = pass.map(|f| f.as_raw_fd());
        while !rest.is_empty() {
            match send_some(self.fd.as_raw_fd(), rest, pass) {
                Ok(n) => {
                    pass = None;
                    rest = rest.get(n..).unwrap_or_default();
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    if !self.wait(libc::POLLOUT, deadline)? {
                        return Err(self.timeout("it does not read what it is sent"));
                    }
                }
                Err(e) => return Err(self.gone().with_source(e)),
            }
        }
        Ok(())
    }

    /// The next line without its newline, or `None` at the deadline.
    ///
    /// # Errors
    /// `Peer` at the end of the stream, `Corrupt` for a line over [`MAX_LINE`].
    pub fn line(&mut self, deadline: Instant) -> Result<Option<Vec<u8>>> {
        loop {
            if let Some(line) = self.take_line() {
                return Ok(Some(line));
            }
            if self.buf.len() > MAX_LINE {
                return Err(Error::new(Kind::Corrupt, format!("a line of over {MAX_LINE} bytes"))
                    .at_path(&self.peer));
            }
            if !self.fill(deadline)? {
                return Ok(None);
            }
        }
    }

    /// The next line as JSON, or `None` at the deadline. Empty lines are skipped.
    ///
    /// # Errors
    /// As [`Wire::line`]; `Corrupt` if the line is no JSON.
    pub fn json(&mut self, deadline: Instant) -> Result<Option<Value>> {
        loop {
            let Some(line) = self.line(deadline)? else { return Ok(None) };
            if line.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            return serde_json::from_slice(&line).map(Some).map_err(|e| {
                Error::new(Kind::Corrupt, "the answer is not JSON")
                    .at_path(&self.peer)
                    .with_source(e)
            });
        }
    }

    /// Whether something has arrived that is no whole line yet.
    pub fn has_fragment(&self) -> bool {
        !self.buf.is_empty()
    }

    fn take_line(&mut self) -> Option<Vec<u8>> {
        let fresh = self.buf.get(self.scanned..)?;
        let Some(at) = fresh.iter().position(|b| *b == b'\n') else {
            self.scanned = self.buf.len();
            return None;
        };
        let end = self.scanned + at;
        let mut line: Vec<u8> = self.buf.drain(..=end).collect();
        line.pop();
        self.scanned = 0;
        Some(line)
    }

    /// Reads once; false at the deadline.
    fn fill(&mut self, deadline: Instant) -> Result<bool> {
        if !self.wait(libc::POLLIN, deadline)? {
            return Ok(false);
        }
        let mut chunk = [0u8; 65536];
        // SAFETY: the buffer is ours and as long as we say.
        let n =
            unsafe { libc::recv(self.fd.as_raw_fd(), chunk.as_mut_ptr().cast(), chunk.len(), 0) };
        match usize::try_from(n) {
            Ok(0) => Err(self.gone()),
            Ok(n) => {
                self.buf.extend_from_slice(chunk.get(..n).unwrap_or_default());
                Ok(true)
            }
            Err(_) => {
                let e = io::Error::last_os_error();
                match e.kind() {
                    io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock => Ok(true),
                    _ => Err(self.gone().with_source(e)),
                }
            }
        }
    }

    fn wait(&self, what: libc::c_short, deadline: Instant) -> Result<bool> {
        let left = deadline.saturating_duration_since(Instant::now());
        let ms = libc::c_int::try_from(left.as_millis().saturating_add(1)).unwrap_or(i32::MAX);
        let ms = if left.is_zero() { 0 } else { ms };
        let mut p = libc::pollfd { fd: self.fd.as_raw_fd(), events: what, revents: 0 };
        // SAFETY: one pollfd that lives on our stack.
        match unsafe { libc::poll(&mut p, 1, ms) } {
            0 => Ok(false),
            n if n > 0 => Ok(true),
            _ => {
                let e = io::Error::last_os_error();
                if e.kind() == io::ErrorKind::Interrupted {
                    return Ok(Instant::now() < deadline);
                }
                Err(Error::io(e, "waiting for the socket failed").at_path(&self.peer))
            }
        }
    }

    fn gone(&self) -> Error {
        Error::new(Kind::Peer, "the connection was closed by the other end").at_path(&self.peer)
    }

    fn timeout(&self, what: &str) -> Error {
        Error::new(Kind::Timeout, what).at_path(&self.peer)
    }
}

impl AsRawFd for Wire {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
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
    for a in address.to_socket_addrs().map_err(fail)? {
        match TcpStream::connect_timeout(&a, timeout) {
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
pub fn shorten(path: &Path) -> Result<(PathBuf, Option<std::fs::File>)> {
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
        return Error::new(Kind::Peer, "nobody listens on the socket: is QEMU running?")
            .at_path(path);
    }
    Error::io(e, "cannot connect").at_path(path)
}

/// The error for a socket that another client holds.
pub fn in_use(path: &Path) -> Error {
    Error::new(Kind::Busy, "the socket accepts the connection but nobody answers: another program holds it")
        .at_path(path)
        .remedy("a QMP socket serves one client; give QEMU a second one: -qmp unix:/run/vm-backup.sock,server=on,wait=off (libvirt: a <qemu:commandline> with the same argument)")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixListener;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(5)
    }

    fn pair() -> (tempfile::TempDir, Wire, std::os::unix::net::UnixStream) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let l = UnixListener::bind(&path).unwrap();
        let w = Wire::connect(&Address::Unix(path), Duration::from_secs(5)).unwrap();
        let (s, _) = l.accept().unwrap();
        (dir, w, s)
    }

    #[test]
    fn addresses() {
        assert_eq!(Address::parse("tcp:h:1").unwrap(), Address::Tcp("h:1".into()));
        assert_eq!(Address::parse("unix:/a").unwrap(), Address::Unix("/a".into()));
        assert_eq!(Address::parse("/a").unwrap(), Address::Unix("/a".into()));
        assert_eq!(Address::parse("tcp:h").unwrap_err().kind(), Kind::Usage);
        assert_eq!(Address::parse("").unwrap_err().kind(), Kind::Usage);
    }

    #[test]
    fn a_socket_has_one_name_by_any_link_and_when_it_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().canonicalize().unwrap();
        std::fs::create_dir(real.join("vm")).unwrap();
        std::os::unix::fs::symlink("vm", real.join("link")).unwrap();
        std::os::unix::fs::symlink("link/s", real.join("short")).unwrap();
        let want = format!("unix:{}", real.join("vm/s").display());
        let names = || {
            ["vm/s", "link/s", "short"].map(|n| Address::Unix(real.join(n)).canonical()).to_vec()
        };
        let listener = UnixListener::bind(real.join("vm/s")).unwrap();
        assert!(!Address::Unix(real.join("short")).is_dead());
        assert_eq!(names(), vec![want.clone(); 3]);
        drop(listener);
        assert!(Address::Unix(real.join("short")).is_dead());
        std::fs::remove_file(real.join("vm/s")).unwrap();
        assert_eq!(names(), vec![want.clone(); 3]);
        let before = Address::Unix(real.join("link/s")).resolved();
        std::fs::remove_dir(real.join("vm")).unwrap();
        assert_eq!(before.canonical(), want);
    }

    #[test]
    fn lines_arrive_whole_however_they_were_cut() {
        let (_d, mut w, mut s) = pair();
        s.write_all(b"{\"a\":1}\n\n{\"b\"").unwrap();
        assert_eq!(w.json(soon()).unwrap().unwrap()["a"], 1);
        let none = w.json(Instant::now() + Duration::from_millis(20)).unwrap();
        assert!(none.is_none());
        s.write_all(b":2}\n").unwrap();
        assert_eq!(w.json(soon()).unwrap().unwrap()["b"], 2);
    }

    #[test]
    fn the_end_of_the_stream_is_a_peer_error_at_once() {
        let (_d, mut w, s) = pair();
        drop(s);
        assert_eq!(w.json(soon()).unwrap_err().kind(), Kind::Peer);
        assert_eq!(w.send(b"x", None, soon()).unwrap_err().kind(), Kind::Peer);
    }

    #[test]
    fn a_long_socket_path_works() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("d".repeat(120));
        std::fs::create_dir(&deep).unwrap();
        let (short, _keep) = shorten(&deep.join("s")).unwrap();
        let l = UnixListener::bind(&short).unwrap();
        Wire::connect(&Address::Unix(deep.join("s")), Duration::from_secs(5)).unwrap();
        drop(l);
    }
}
