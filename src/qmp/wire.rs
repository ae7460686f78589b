//! Lines of JSON over a socket, bounded in length, in what they hold, and in time.

use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::address::Address;
use super::budget;
use super::socket::Socket;
use crate::error::{Error, Kind, Result};

/// What is accepted of a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limits {
    /// The longest line, in bytes.
    pub line: usize,
    /// Memory that the values of one line may take, in bytes, as [`budget`] counts it.
    pub memory: usize,
    /// Bytes that may come while one answer is waited for.
    pub flood: usize,
}

impl Limits {
    /// QEMU's. `query-qmp-schema` is about 200 KiB, `query-named-block-nodes` 1 to 2 KiB for each
    /// node: of thousands of nodes, some MiB. An answer takes up to 48 MiB of memory: three of them
    /// are looked at together, within the 256 MiB that a backup may take. QEMU's events are some
    /// hundred bytes each.
    pub(crate) const QEMU: Limits = Limits { line: 16 << 20, memory: 48 << 20, flood: 128 << 20 };

    /// The guest agent's: a few KiB for each file system, and answers to an earlier client that
    /// come late.
    pub(crate) const AGENT: Limits = Limits { line: 4 << 20, memory: 16 << 20, flood: 16 << 20 };

    /// A backup's own, about itself: some hundred bytes for each disk.
    pub(crate) const CONTROL: Limits = Limits { line: 4 << 20, memory: 16 << 20, flood: 4 << 20 };
}

/// How much is read at once, in bytes.
const CHUNK: usize = 64 << 10;

/// A connected socket and the bytes read but not yet consumed.
#[derive(Debug)]
pub(crate) struct Wire {
    socket: Socket,
    limits: Limits,
    buf: Vec<u8>,
    /// Where in `buf` the next line begins.
    start: usize,
    /// Up to where `buf` was searched for a newline.
    scanned: usize,
    /// Bytes received since the last [`Wire::send`].
    received: usize,
}

impl Wire {
    /// Connects.
    ///
    /// # Errors
    /// As [`Socket::connect`].
    pub(crate) fn connect(address: &Address, timeout: Duration, limits: Limits) -> Result<Self> {
        Ok(Self::over(Socket::connect(address, timeout)?, limits))
    }

    /// Over a socket that is connected.
    pub(crate) fn over(socket: Socket, limits: Limits) -> Self {
        Wire { socket, limits, buf: Vec::new(), start: 0, scanned: 0, received: 0 }
    }

    /// Who is at the other end, for messages.
    pub(crate) fn peer(&self) -> &str {
        self.socket.peer()
    }

    /// Whether descriptors can be passed.
    pub(crate) fn passes_descriptors(&self) -> bool {
        self.socket.passes_descriptors()
    }

    /// As [`Socket::stop_by`].
    pub(crate) fn stop_by(&mut self, flag: Option<Arc<AtomicBool>>) {
        self.socket.stop_by(flag);
    }

    /// As [`Socket::check_stop`].
    ///
    /// # Errors
    /// `Interrupted`.
    pub(crate) fn check_stop(&self) -> Result<()> {
        self.socket.check_stop()
    }

    /// Sends `bytes`; `pass` travels with the first of them.
    ///
    /// # Errors
    /// As [`Socket::send`].
    pub(crate) fn send(
        &mut self,
        bytes: &[u8],
        pass: Option<BorrowedFd<'_>>,
        deadline: Instant,
    ) -> Result<()> {
        self.rest();
        self.socket.send(bytes, pass, deadline)
    }

    /// Begins to count anew what comes: something else is waited for.
    pub(crate) fn rest(&mut self) {
        self.received = 0;
    }

    /// The next line without its newline, or `None` at the deadline.
    ///
    /// # Errors
    /// `Peer` at the end of the stream, `Corrupt` for a line that is too long, or for more lines
    /// than anybody sends who has something to say; `Interrupted`.
    pub(crate) fn line(&mut self, deadline: Instant) -> Result<Option<&[u8]>> {
        let Some((from, to)) = self.next_line(deadline)? else { return Ok(None) };
        Ok(self.buf.get(from..to))
    }

    fn next_line(&mut self, deadline: Instant) -> Result<Option<(usize, usize)>> {
        loop {
            let fresh = self.buf.get(self.scanned..).unwrap_or_default();
            if let Some(at) = fresh.iter().position(|b| *b == b'\n') {
                let end = self.scanned.saturating_add(at);
                let line = (self.start, end);
                self.start = end.saturating_add(1);
                self.scanned = self.start;
                return Ok(Some(line));
            }
            self.scanned = self.buf.len();
            if !self.fill(deadline)? {
                return Ok(None);
            }
        }
    }

    /// The next line as JSON, or `None` at the deadline. Empty lines are skipped.
    ///
    /// # Errors
    /// As [`Wire::line`]; `Corrupt` if the line is no JSON, or holds more than is accepted.
    pub(crate) fn json(&mut self, deadline: Instant) -> Result<Option<Value>> {
        let memory = self.limits.memory;
        loop {
            let Some((from, to)) = self.next_line(deadline)? else { return Ok(None) };
            let line = self.buf.get(from..to).unwrap_or_default();
            if line.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            let value = budget::parse(line, memory).map_err(|e| e.at_path(self.peer()))?;
            return Ok(Some(value));
        }
    }

    /// Whether something has arrived that is no whole line yet.
    pub(crate) fn has_fragment(&self) -> bool {
        self.start < self.buf.len()
    }

    /// Reads once; false at the deadline. All that is read comes by here.
    fn fill(&mut self, deadline: Instant) -> Result<bool> {
        self.compact();
        if self.buf.len() > self.limits.line {
            return Err(self.too_much(&format!("a line of over {} bytes", self.limits.line)));
        }
        if self.received > self.limits.flood {
            return Err(self.too_much("it sends endless unsolicited messages"));
        }
        let mut chunk = [0u8; CHUNK];
        let Some(n) = self.socket.read(&mut chunk, deadline)? else { return Ok(false) };
        self.buf.extend_from_slice(chunk.get(..n).unwrap_or_default());
        self.received = self.received.saturating_add(n);
        Ok(true)
    }

    /// Drops the lines that are done with, and the memory that a long one took.
    fn compact(&mut self) {
        self.buf.drain(..self.start.min(self.buf.len()));
        self.scanned = self.scanned.saturating_sub(self.start);
        self.start = 0;
        if self.buf.len() <= CHUNK {
            self.buf.shrink_to(CHUNK.saturating_mul(2));
        }
    }

    fn too_much(&self, what: &str) -> Error {
        Error::new(Kind::Corrupt, what).at_path(self.peer())
    }
}

impl AsRawFd for Wire {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::sync::atomic::Ordering;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(5)
    }

    fn pair() -> (tempfile::TempDir, Wire, UnixStream) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let l = UnixListener::bind(&path).unwrap();
        let w = Wire::connect(&Address::Unix(path), Duration::from_secs(5), Limits::QEMU).unwrap();
        let (s, _) = l.accept().unwrap();
        (dir, w, s)
    }

    /// Sends `bytes` again and again until the other end is closed.
    fn flood(mut s: UnixStream, bytes: Vec<u8>) -> std::thread::JoinHandle<()> {
        std::thread::spawn(move || while s.write_all(&bytes).is_ok() {})
    }

    #[test]
    fn lines_arrive_whole_however_they_were_cut() {
        let (_d, mut w, mut s) = pair();
        s.write_all(b"{\"a\":1}\n\n{\"b\"").unwrap();
        assert_eq!(w.json(soon()).unwrap().unwrap()["a"], 1);
        let none = w.json(Instant::now() + Duration::from_millis(20)).unwrap();
        assert!(none.is_none() && w.has_fragment());
        s.write_all(b":2}\n").unwrap();
        assert_eq!(w.json(soon()).unwrap().unwrap()["b"], 2);
        assert!(!w.has_fragment());
    }

    #[test]
    fn the_end_of_the_stream_is_a_peer_error_at_once() {
        let (_d, mut w, s) = pair();
        drop(s);
        assert_eq!(w.json(soon()).unwrap_err().kind(), Kind::Peer);
        assert_eq!(w.send(b"x", None, soon()).unwrap_err().kind(), Kind::Peer);
    }

    #[test]
    fn a_flood_holds_nobody_beyond_the_deadline() {
        for text in ["\n", "  \n\n", "{}\n", "[[[\n"] {
            let (_d, mut w, s) = pair();
            w.limits.flood = usize::MAX;
            let sender = flood(s, text.repeat(4096).into_bytes());
            let deadline = Instant::now() + Duration::from_millis(50);
            // Lines of JSON end each call: it is the caller's loop that has to end.
            while w.line(deadline).unwrap().is_some() {}
            assert!(Instant::now() >= deadline);
            drop(w);
            sender.join().unwrap();
        }
    }

    #[test]
    fn a_flood_ends_before_the_deadline_where_it_is_too_much() {
        let (_d, mut w, s) = pair();
        w.limits.flood = 1 << 20;
        let sender = flood(s, vec![b'\n'; 4096]);
        let e = w.json(Instant::now() + Duration::from_secs(600)).unwrap_err();
        assert_eq!(e.kind(), Kind::Corrupt);
        drop(w);
        sender.join().unwrap();
    }

    #[test]
    fn what_came_for_other_questions_is_no_flood() {
        let (_d, mut w, mut s) = pair();
        w.limits.flood = 1000;
        for _ in 0..10 {
            s.write_all(&[&[b' '; 600][..], b"{}\n"].concat()).unwrap();
            assert!(w.json(soon()).unwrap().is_some());
            w.rest();
        }
    }

    #[test]
    fn a_line_without_end_is_cut_off() {
        let (_d, mut w, s) = pair();
        w.limits.line = 1 << 20;
        let sender = flood(s, vec![b'x'; 4096]);
        let e = w.json(Instant::now() + Duration::from_secs(600)).unwrap_err();
        assert_eq!(e.kind(), Kind::Corrupt);
        assert!(w.buf.len() < 2 << 20);
        drop(w);
        sender.join().unwrap();
    }

    #[test]
    fn a_signal_ends_a_wait_whatever_arrives() {
        let (_d, mut w, s) = pair();
        let flag = Arc::new(AtomicBool::new(false));
        w.stop_by(Some(flag.clone()));
        w.limits.flood = usize::MAX;
        let sender = flood(s, vec![b'\n'; 4096]);
        flag.store(true, Ordering::SeqCst);
        let e = w.json(Instant::now() + Duration::from_secs(600)).unwrap_err();
        assert_eq!(e.kind(), Kind::Interrupted);
        drop(w);
        sender.join().unwrap();
    }
}
