//! Whether a TCP port of the guest answers, over QEMU's user networking.
//!
//! QEMU takes a connection to a port that it forwards before the guest has been asked. So what tells is QEMU's list of
//! connections: there the guest has answered once the connection is established.

use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::error::Result;
use crate::qmp::Client;

/// How long one connection is given.
const PATIENCE: Duration = Duration::from_secs(5);

/// A port of the guest, and what is under way to it.
#[derive(Debug)]
pub(super) struct GuestPort {
    port: u16,
    trying: Option<Trying>,
}

/// A connection to the port of this machine that leads to the guest's.
#[derive(Debug)]
struct Trying {
    _connection: TcpStream,
    since: Instant,
    /// That port of this machine, and the one that the connection comes from.
    ports: [u16; 2],
}

/// A line of `info usernet`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Line<'a> {
    state: &'a str,
    is_local: bool,
    source: u16,
    guest: u16,
}

/// Whether one of them is our connection, to which the guest has answered. (Those that the guest makes go to ports of the
/// same number elsewhere.)
fn answered(lines: &[Line<'_>], guest: u16, ports: [u16; 2]) -> bool {
    let is_ours = |l: &Line<'_>| l.guest == guest && l.is_local && ports.contains(&l.source);
    lines.iter().any(|l| l.state == "ESTABLISHED" && is_ours(l))
}

impl GuestPort {
    /// The guest's port of this number.
    pub(super) fn new(port: u16) -> Self {
        GuestPort { port, trying: None }
    }

    /// Whether it has answered by now. Asked again and again.
    ///
    /// # Errors
    /// QEMU is gone or does not answer.
    pub(super) fn answers(&mut self, qmp: &mut Client) -> Result<bool> {
        let told = qmp.execute("human-monitor-command", json!({"command-line": "info usernet"}))?;
        let told = told.as_str().unwrap_or_default();
        let lines: Vec<Line<'_>> = told.lines().filter_map(line).collect();
        let ours = |l: &&Line<'_>| l.guest == self.port;
        if self.trying.as_ref().is_some_and(|t| answered(&lines, self.port, t.ports)) {
            return Ok(true);
        }
        if self.trying.as_ref().is_some_and(|t| t.since.elapsed() < PATIENCE) {
            return Ok(false);
        }
        let forward = lines.iter().filter(ours).find(|l| l.state == "HOST_FORWARD");
        self.trying = forward.and_then(|l| {
            let address = SocketAddr::from((Ipv4Addr::LOCALHOST, l.source));
            let connection = TcpStream::connect_timeout(&address, PATIENCE).ok()?;
            let own = connection.local_addr().ok()?.port();
            let ports = [l.source, own];
            Some(Trying { _connection: connection, since: Instant::now(), ports })
        });
        Ok(false)
    }
}

/// `TCP[ESTABLISHED]  12  127.0.0.1 34567  10.0.2.15  22  0  0`.
fn line(text: &str) -> Option<Line<'_>> {
    let (state, rest) = text.trim().strip_prefix("TCP[")?.split_once(']')?;
    let mut words = rest.split_ascii_whitespace();
    let is_local = words.nth(1)? == "127.0.0.1";
    let source = words.next()?.parse().ok()?;
    let guest = words.nth(1)?.parse().ok()?;
    Some(Line { state, is_local, source, guest })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qemus_list_is_read() {
        let head =
            "  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ";
        assert_eq!(line(head), None);
        let text =
            "  TCP[HOST_FORWARD]  12       127.0.0.1 34567       10.0.2.15    22     0     0";
        assert_eq!(
            line(text),
            Some(Line { state: "HOST_FORWARD", is_local: true, source: 34567, guest: 22 })
        );
        // What the guest connects to elsewhere is no answer of its own.
        let state = "ESTABLISHED";
        let out = Line { state, is_local: false, source: 34567, guest: 22 };
        let other = Line { is_local: true, source: 40000, ..out };
        assert!(!answered(&[out, other], 22, [34567, 50000]));
        for source in [34567, 50000] {
            let back = Line { state, is_local: true, source, guest: 22 };
            assert!(answered(&[back], 22, [34567, 50000]));
        }
        for odd in ["", "TCP[", "TCP[X] 1 2", "UDP[X] 1 127.0.0.1 5 10.0.2.15 22"] {
            assert_eq!(line(odd), None, "{odd}");
        }
    }
}
