//! The system log: journald by its own protocol, with fields beside the text, so that `journalctl VM=vm1` finds what
//! concerns one VM; where there is no journal, syslog(3) with the text alone.
//!
//! A message is one datagram of fields, `KEY=value` and a line break each; a value with line breaks has its length
//! before it. One that is too large for a datagram goes as a sealed file in memory, whose descriptor is sent.

use std::ffi::CString;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

use rustix::fs::{MemfdFlags, SealFlags};

use crate::failpoint;
use crate::text::visible;

/// Where journald listens.
const SOCKET: &str = "/run/systemd/journal/socket";
/// Who writes, as `journalctl -t` has it.
const IDENTIFIER: &str = "fleecefs";
/// Bytes of a value that are sent; journald's own limit is far above.
const MAX_VALUE: usize = 48 << 10;

/// How long a journal may take for a message, which is lost then.
const PATIENCE: Duration = Duration::from_secs(2);

/// What a message is about, as fields of the journal.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct About<'a> {
    /// `VM`: the VM's name, else its UUID.
    pub vm: &'a str,
    /// `DISK`: as the VM calls it.
    pub disk: &'a str,
    /// `POINT`: the point that was made.
    pub point: &'a str,
    /// `RUN`: the id of the backup run.
    pub run: &'a str,
}

/// Sends a message with `priority`, one of syslog's (`libc::LOG_ERR` and so on).
pub(crate) fn send(priority: libc::c_int, text: &str, about: About<'_>) {
    static JOURNAL: OnceLock<Option<UnixDatagram>> = OnceLock::new();
    let journal = JOURNAL.get_or_init(|| {
        let socket = failpoint::journal_socket();
        connect(socket.as_deref().unwrap_or(Path::new(SOCKET))).ok()
    });
    let text = visible(text);
    match journal.as_ref().map(|journal| send_to(journal, &message(priority, &text, about))) {
        Some(Ok(())) => return,
        Some(Err(e)) if e.kind() == io::ErrorKind::WouldBlock => return,
        // There is none, or it is gone.
        Some(Err(_)) | None => {}
    }
    if let Ok(text) = CString::new(format!("{IDENTIFIER}: {text}")) {
        // SAFETY: a constant format with one matching C string.
        unsafe { libc::syslog(priority | libc::LOG_DAEMON, c"%s".as_ptr(), text.as_ptr()) };
    }
}

fn connect(path: &Path) -> io::Result<UnixDatagram> {
    let socket = UnixDatagram::unbound()?;
    // A journal that does not read must not hold up a backup for long.
    socket.set_write_timeout(Some(PATIENCE))?;
    socket.connect(path)?;
    Ok(socket)
}

fn message(priority: libc::c_int, text: &str, about: About<'_>) -> Vec<u8> {
    let priority = priority.to_string();
    let pid = std::process::id().to_string();
    let fields = [
        ("MESSAGE", text),
        ("PRIORITY", &priority),
        ("SYSLOG_IDENTIFIER", IDENTIFIER),
        ("SYSLOG_PID", &pid),
        ("VM", about.vm),
        ("DISK", about.disk),
        ("POINT", about.point),
        ("RUN", about.run),
    ];
    let mut bytes = Vec::new();
    for (key, value) in
        fields.into_iter().filter(|(key, value)| *key == "MESSAGE" || !value.is_empty())
    {
        add_field(&mut bytes, key, value);
    }
    bytes
}

fn add_field(bytes: &mut Vec<u8>, key: &str, value: &str) {
    let value = value.as_bytes();
    let value = value.get(..MAX_VALUE).unwrap_or(value);
    bytes.extend_from_slice(key.as_bytes());
    if value.contains(&b'\n') {
        bytes.push(b'\n');
        bytes.extend_from_slice(&(value.len() as u64).to_le_bytes());
    } else {
        bytes.push(b'=');
    }
    bytes.extend_from_slice(value);
    bytes.push(b'\n');
}

fn send_to(journal: &UnixDatagram, message: &[u8]) -> io::Result<()> {
    match journal.send(message) {
        Ok(_) => Ok(()),
        Err(e) if matches!(e.raw_os_error(), Some(libc::EMSGSIZE | libc::ENOBUFS)) => {
            send_file(journal, &sealed(message)?)
        }
        Err(e) => Err(e),
    }
}

/// A file in memory that nobody can change any more: journald takes no other.
fn sealed(message: &[u8]) -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let mut file = std::fs::File::from(rustix::fs::memfd_create("fleecefs-journal", flags)?);
    file.write_all(message)?;
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&file, seals)?;
    Ok(file.into())
}

/// Room for one descriptor in a control message, aligned as its header has to be.
#[repr(C)]
union Control {
    header: libc::cmsghdr,
    bytes: [u8; 64],
}

fn send_file(journal: &UnixDatagram, file: &OwnedFd) -> io::Result<()> {
    let mut control = Control { bytes: [0; 64] };
    // SAFETY: zeros are a message header without name, data and control.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_control = (&raw mut control).cast();
    // SAFETY: CMSG_SPACE and CMSG_LEN only compute; the header fits the 64 bytes, which `msg_controllen` says.
    unsafe {
        header.msg_controllen = libc::CMSG_SPACE(size_of::<libc::c_int>() as u32) as _;
        let first = libc::CMSG_FIRSTHDR(&header);
        (*first).cmsg_level = libc::SOL_SOCKET;
        (*first).cmsg_type = libc::SCM_RIGHTS;
        (*first).cmsg_len = libc::CMSG_LEN(size_of::<libc::c_int>() as u32) as _;
        libc::CMSG_DATA(first).cast::<libc::c_int>().write_unaligned(file.as_raw_fd());
    }
    // SAFETY: a connected socket, and a header whose control part lives until the end.
    let sent = unsafe { libc::sendmsg(journal.as_fd().as_raw_fd(), &header, libc::MSG_NOSIGNAL) };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A journal of the test's own, and what writes to it.
    fn journal() -> (tempfile::TempDir, UnixDatagram, UnixDatagram) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listening = UnixDatagram::bind(&path).unwrap();
        let writing = connect(&path).unwrap();
        (dir, listening, writing)
    }

    #[test]
    fn fields_stand_beside_the_text() {
        let (_dir, listening, writing) = journal();
        let about = About { vm: "vm1", disk: "sda", point: "", run: "0123456789ab" };
        send_to(&writing, &message(libc::LOG_WARNING, "it = odd", about)).unwrap();
        let mut bytes = [0; 4096];
        let len = listening.recv(&mut bytes).unwrap();
        let text = std::str::from_utf8(&bytes[..len]).unwrap();
        let pid = std::process::id();
        let want = format!(
            "MESSAGE=it = odd\nPRIORITY=4\nSYSLOG_IDENTIFIER=fleecefs\nSYSLOG_PID={pid}\nVM=vm1\nDISK=sda\n\
             RUN=0123456789ab\n"
        );
        assert_eq!(text, want);
    }

    /// Else a name from outside could begin a field of its own.
    #[test]
    fn a_value_with_line_breaks_has_its_length_before_it() {
        let mut bytes = Vec::new();
        add_field(&mut bytes, "VM", "a\nPRIORITY=0");
        let mut want = b"VM\n".to_vec();
        want.extend(12u64.to_le_bytes());
        want.extend(b"a\nPRIORITY=0\n");
        assert_eq!(bytes, want);
        let mut bytes = Vec::new();
        add_field(&mut bytes, "MESSAGE", &"x".repeat(1 << 20));
        assert_eq!(bytes.len(), "MESSAGE=\n".len() + MAX_VALUE);
    }

    #[test]
    fn what_is_too_large_for_a_datagram_goes_as_a_sealed_file() {
        let (_dir, listening, writing) = journal();
        // The least that the kernel grants is less than two values.
        let tiny: libc::c_int = 1;
        // SAFETY: an option of an open socket, with its size.
        let set = unsafe {
            let (value, len) = ((&raw const tiny).cast(), size_of_val(&tiny) as u32);
            libc::setsockopt(writing.as_raw_fd(), libc::SOL_SOCKET, libc::SO_SNDBUF, value, len)
        };
        assert_eq!(set, 0);
        let text = "y".repeat(MAX_VALUE);
        let sent = message(libc::LOG_INFO, &text, About { vm: &text, ..About::default() });
        send_to(&writing, &sent).unwrap();
        let file = received(&listening);
        assert_eq!(
            rustix::fs::fcntl_get_seals(&file).unwrap() & SealFlags::WRITE,
            SealFlags::WRITE
        );
        let mut got = vec![0; sent.len() + 1];
        let len =
            std::os::unix::fs::FileExt::read_at(&std::fs::File::from(file), &mut got, 0).unwrap();
        assert!(got[..len] == sent);
    }

    /// The descriptor that comes with an empty datagram.
    fn received(listening: &UnixDatagram) -> OwnedFd {
        use std::os::fd::FromRawFd;
        let mut control = Control { bytes: [0; 64] };
        // SAFETY: as in `send_file`, with room for a descriptor, which is ours then.
        unsafe {
            let mut header: libc::msghdr = std::mem::zeroed();
            header.msg_control = (&raw mut control).cast();
            header.msg_controllen = 64;
            assert_eq!(libc::recvmsg(listening.as_raw_fd(), &raw mut header, 0), 0);
            let first = libc::CMSG_FIRSTHDR(&header);
            assert!(!first.is_null());
            OwnedFd::from_raw_fd(libc::CMSG_DATA(first).cast::<libc::c_int>().read_unaligned())
        }
    }
}
