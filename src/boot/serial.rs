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
    expected: Expected,
    last: Vec<u8>,
}

/// What is waited for, and the line that is being written. A line is compared when it ends, and one that has not ended when
/// somebody asks: a guest decides in how many pieces it comes, and not how often all of it is compared.
#[derive(Debug, Default)]
struct Expected {
    expect: Option<Regex>,
    line: Vec<u8>,
    /// Whether the line has grown since it was compared.
    has_grown: bool,
    found: bool,
    /// How often a line was compared.
    #[cfg(test)]
    compared: u64,
}

impl Expected {
    fn take(&mut self, bytes: &[u8]) {
        if self.expect.is_none() || self.found {
            return;
        }
        for piece in bytes.split_inclusive(|b| *b == b'\n') {
            self.line.extend(piece.iter().filter(|b| !b"\r\n".contains(b)));
            self.has_grown = true;
            if piece.ends_with(b"\n") || self.line.len() > LONGEST_LINE {
                self.compare(true);
                self.line.clear();
                self.has_grown = false;
            }
        }
    }

    /// Whether it came: also in a line that does not end yet (a prompt).
    fn has_come(&mut self) -> bool {
        if self.has_grown {
            self.has_grown = false;
            self.compare(false);
        }
        self.found
    }

    /// Of a line that is not whole a match counts only if it ends before it: its end may be anywhere so far. (Such a match
    /// is one in the whole line as well, so that none is missed between two looks.)
    fn compare(&mut self, is_whole: bool) {
        #[cfg(test)]
        {
            self.compared += 1;
        }
        let matched = self.expect.as_ref().and_then(|e| e.find(&self.line));
        self.found |= matched.is_some_and(|m| is_whole || m.end() < self.line.len());
    }
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
        let mut reader = Reader::new(&serial, outputs);
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
        self.lock().expected.has_come()
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
    logged: u64,
}

impl Reader {
    fn new(serial: &Serial, mut outputs: SerialOutputs) -> Self {
        serial.lock().expected.expect = outputs.expect.take();
        Reader { seen: serial.seen.clone(), outputs, logged: 0 }
    }

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
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.expected.take(bytes);
        seen.last.extend_from_slice(bytes);
        let more = seen.last.len().saturating_sub(LAST);
        seen.last.drain(..more);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A port on which this is waited for, and what reads it.
    fn port(expect: &str) -> (Serial, Reader) {
        let expect = Some(Regex::new(expect).unwrap());
        let serial = Serial::default();
        let reader = Reader::new(&serial, SerialOutputs { log: None, echo: false, expect });
        (serial, reader)
    }

    /// Whether it is seen, whenever somebody asks.
    fn seen(expect: &str, pieces: &[&str]) -> bool {
        let (serial, mut r) = port(expect);
        let asked: Vec<bool> = (pieces.iter())
            .map(|p| {
                r.take(p.as_bytes());
                serial.matched()
            })
            .collect();
        let (late, mut r) = port(expect);
        pieces.iter().for_each(|p| r.take(p.as_bytes()));
        assert_eq!(late.matched(), asked.last() == Some(&true));
        late.matched()
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
        let (serial, mut r) = port("x");
        for _ in 0..100 {
            r.take(&[b'a'; 4096]);
        }
        let seen = serial.lock();
        assert!(seen.expected.line.len() <= LONGEST_LINE + 4096 && seen.last.len() == LAST);
    }

    #[test]
    fn a_guest_that_sends_single_bytes_has_no_line_compared_for_each() {
        let (serial, mut r) = port("ready");
        for n in 0..2 * LONGEST_LINE {
            r.take(b"a");
            if n % 4096 == 0 {
                assert!(!serial.matched() && !serial.matched());
            }
        }
        // When somebody asked, and when the line had become too long.
        let compared = serial.lock().expected.compared;
        assert!((2..=10).contains(&compared), "{compared}");
        b"\nready> ".chunks(1).for_each(|b| r.take(b));
        assert!(serial.matched());
    }
}
