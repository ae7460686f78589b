//! Telling systemd how a service stands, where it has asked to be told: `NOTIFY_SOCKET`, as `sd_notify(3)` says.
//! A service manager that does not listen does no harm.

use std::ffi::OsStr;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use crate::text::visible;

/// Bytes of a status line: `systemctl status` shows one line of a terminal.
const STATUS: usize = 300;

/// The service is ready (`Type=notify`).
pub(crate) fn ready() {
    // Whoever waits for this waits in vain if it is lost: the socket's buffer may be full for a moment.
    tell(b"READY=1", true);
}

/// One line for `systemctl status`, such as what is being worked on: its control characters are made visible, and
/// it is cut where it is too long. A line that systemd has no time for is lost: the next one says more.
pub(crate) fn status(text: &str) {
    tell(&status_message(text), false);
}

fn status_message(text: &str) -> Vec<u8> {
    let text = visible(text);
    let end = text.char_indices().map(|(at, c)| at + c.len_utf8()).take_while(|e| *e <= STATUS);
    let line = text.get(..end.last().unwrap_or(0)).unwrap_or_default();
    format!("STATUS={line}").into_bytes()
}

fn tell(message: &[u8], waits: bool) {
    if let Some(name) = std::env::var_os("NOTIFY_SOCKET") {
        let told = send(&name, message, waits);
        log::debug!("NOTIFY_SOCKET: {told:?}");
    }
}

fn send(name: &OsStr, message: &[u8], waits: bool) -> std::io::Result<()> {
    let address = match name.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(name)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(!waits)?;
    socket.send_to_addr(message, &address).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_one_line_of_bounded_length() {
        let message = |text: &str| String::from_utf8(status_message(text)).unwrap();
        assert_eq!(message("vm1: copying sda"), "STATUS=vm1: copying sda");
        // Another line would be another message: one that ends the watching of the main process, say.
        let odd = message("vm1\nMAINPID=1\u{1b}[2J");
        assert!(!odd.contains(['\n', '\u{1b}']), "{odd:?}");
        let long = message(&"ä".repeat(STATUS));
        assert_eq!(long, format!("STATUS={}", "ä".repeat(STATUS / 2)));
    }

    #[test]
    fn a_socket_whose_owner_does_not_read_holds_nobody_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        // The buffer holds no end of messages: a call that waited would wait forever.
        let full = (0..100_000).any(|_| send(path.as_os_str(), &[b'x'; 300], false).is_err());
        assert!(full);
        drop(socket);
        assert!(send(path.as_os_str(), b"READY=1", true).is_err());
    }
}
