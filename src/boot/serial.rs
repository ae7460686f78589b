//! What the guest writes to its serial port: kept in a log, shown, and compared with what is waited for.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use regex::bytes::Regex;

use crate::output;
use crate::text::visible_lines;

/// The longest line that is compared as a whole, in bytes: what comes after it counts as the next.
const LONGEST_LINE: usize = 16 << 10;
/// A log is at most this long, in bytes: a guest may write for ever.
const LONGEST_LOG: u64 = 64 << 20;
/// What was written last is told where a guest did not come up, in bytes.
const LAST: usize = 4 << 10;

/// What has been seen so far.
#[derive(Debug, Default)]
struct Seen {
    matched: bool,
    last: Vec<u8>,
}

/// Where it goes.
pub(super) struct SerialOutputs {
    /// The log.
    pub log: Option<File>,
    /// Whether it is printed.
    pub echo: bool,
    /// What is waited for.
    pub expect: Option<Regex>,
}

/// A serial port that is being read.
#[derive(Debug, Clone, Default)]
pub(super) struct Serial {
    seen: Arc<Mutex<Seen>>,
}

impl Serial {
    /// Reads `port` in a thread of its own, until QEMU ends.
    pub(super) fn read(port: UnixStream, outputs: SerialOutputs) -> Self {
        let serial = Serial::default();
        let mut reader = Reader { seen: serial.seen.clone(), outputs, line: Vec::new(), logged: 0 };
        std::thread::spawn(move || {
            let mut port = port;
            let mut buf = [0; 4096];
            while let Ok(n @ 1..) = port.read(&mut buf) {
                reader.take(&buf[..n]);
            }
        });
        serial
    }

    /// Whether a line was what is waited for.
    pub(super) fn matched(&self) -> bool {
        self.lock().matched
    }

    /// The last that was written.
    pub(super) fn last(&self) -> String {
        String::from_utf8_lossy(&self.lock().last).into_owned()
    }

    fn lock(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Reader {
    seen: Arc<Mutex<Seen>>,
    outputs: SerialOutputs,
    /// The line that is being written.
    line: Vec<u8>,
    logged: u64,
}

impl Reader {
    fn take(&mut self, bytes: &[u8]) {
        if let Some(log) = &mut self.outputs.log
            && self.logged < LONGEST_LOG
        {
            self.logged += bytes.len() as u64;
            if let Err(e) = log.write_all(bytes) {
                log::warn!("cannot write the serial log: {e}");
                self.outputs.log = None;
            }
        }
        if self.outputs.echo {
            let text = String::from_utf8_lossy(bytes).replace('\r', "");
            // Nobody may read it any more.
            let _ = output::print(&visible_lines(&text));
        }
        let matched = self.matches(bytes);
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.matched |= matched;
        seen.last.extend_from_slice(bytes);
        let more = seen.last.len().saturating_sub(LAST);
        seen.last.drain(..more);
    }

    /// Whether a line that ends here is what is waited for, or one that does not end yet (a prompt): that only if it
    /// matches before its end, which may be anywhere so far.
    fn matches(&mut self, bytes: &[u8]) -> bool {
        let Some(expect) = &self.outputs.expect else { return false };
        let mut found = false;
        for piece in bytes.split_inclusive(|b| *b == b'\n') {
            self.line.extend(piece.iter().filter(|b| !b"\r\n".contains(b)));
            let is_whole = piece.ends_with(b"\n") || self.line.len() > LONGEST_LINE;
            let matched = expect.find(&self.line);
            found |= matched.is_some_and(|m| is_whole || m.end() < self.line.len());
            if is_whole {
                self.line.clear();
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(expect: &str, pieces: &[&str]) -> bool {
        let expect = Some(Regex::new(expect).unwrap());
        let outputs = SerialOutputs { log: None, echo: false, expect };
        let mut r = Reader { seen: Arc::default(), outputs, line: Vec::new(), logged: 0 };
        pieces.iter().for_each(|p| r.take(p.as_bytes()));
        r.seen.lock().unwrap().matched
    }

    #[test]
    fn a_line_is_one_however_it_was_cut_and_a_prompt_has_no_end() {
        assert!(seen("^guest: ready$", &["boot\r\nguest", ": re", "ady\r\n"]));
        assert!(seen("login:", &["host log", "in: "]));
        assert!(!seen("^ready", &["guest: ", "ready\n"]));
        // It may go on.
        assert!(!seen("errors: 0$", &["errors: 0", "5\n"]));
        assert!(!seen("errors: 0", &["errors: 0"]) && seen("errors: 0$", &["errors: 0", "\r\n"]));
        // Two lines are never one.
        assert!(!seen("a.*b", &["a\n", "b\n"]));
    }

    #[test]
    fn a_line_without_end_takes_no_memory() {
        let outputs =
            SerialOutputs { log: None, echo: false, expect: Some(Regex::new("x").unwrap()) };
        let mut r = Reader { seen: Arc::default(), outputs, line: Vec::new(), logged: 0 };
        for _ in 0..100 {
            r.take(&[b'a'; 4096]);
        }
        assert!(r.line.len() <= LONGEST_LINE + 4096 && r.seen.lock().unwrap().last.len() == LAST);
    }
}
