//! Reading the point, and what happens where it cannot be read.

use std::sync::{Arc, Mutex};

use crate::error::{Error, Kind, Result};
use crate::image::{Image, MergedExtent, Source};

/// The smallest range that salvaging gives up as a whole.
const SALVAGE_UNIT: usize = 4096;
/// Bad ranges that are listed one by one.
const MAX_LISTED: usize = 10_000;

/// A range that is zeros in the target because it could not be read.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub(crate) struct BadRange {
    /// First guest byte.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// Why.
    pub reason: String,
}

/// A point that is being restored.
pub(crate) struct Reader<'a> {
    /// The point.
    pub image: &'a Arc<Image>,
    salvage: bool,
    bad: Mutex<Vec<BadRange>>,
}

impl<'a> Reader<'a> {
    /// Reads `image`; with `salvage`, unreadable ranges become zeros and are listed.
    pub(crate) fn new(image: &'a Arc<Image>, salvage: bool) -> Self {
        Reader { image, salvage, bad: Mutex::new(Vec::new()) }
    }

    /// The same point, to read it once more: what is given up is not listed again.
    pub(crate) fn again(&self) -> Self {
        Reader::new(self.image, self.salvage)
    }

    /// Fills `buf` with the bytes at `offset`.
    ///
    /// # Errors
    /// What the image says; with `salvage` only what concerns more than one range.
    pub(crate) fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        match self.image.read_at(buf, offset) {
            Err(e) if self.salvage && is_local(&e) => self.salvage(buf, offset, &e),
            other => other,
        }
    }

    /// Whether a range that the tables already show as bad is given up; it is listed then.
    pub(crate) fn gives_up(&self, e: &MergedExtent) -> bool {
        if self.salvage {
            let why = match e.content {
                Source::Bad { layer } => self.image.why_bad(layer, e.start),
                _ => None,
            };
            let text = why.map_or("cannot be read".to_string(), |f| f.to_string());
            self.note(e.start, e.len, &Error::new(Kind::Corrupt, text));
        }
        self.salvage
    }

    fn salvage(&self, buf: &mut [u8], offset: u64, error: &Error) -> Result<()> {
        if buf.len() <= SALVAGE_UNIT {
            buf.fill(0);
            self.note(offset, buf.len() as u64, error);
            return Ok(());
        }
        let half = (buf.len() / 2).next_multiple_of(SALVAGE_UNIT).min(buf.len() - 1);
        let (low, high) = buf.split_at_mut(half);
        self.read(low, offset)?;
        self.read(high, offset + half as u64)
    }

    fn note(&self, start: u64, len: u64, error: &Error) {
        let mut bad = self.bad.lock().unwrap_or_else(|e| e.into_inner());
        let reason = error.report();
        let joins = |b: &BadRange| b.start + b.len == start && is_same(&b.reason, &reason);
        match bad.iter().rposition(joins) {
            Some(i) => bad[i].len += len,
            None if bad.len() < MAX_LISTED => bad.push(BadRange { start, len, reason }),
            // Bytes are never dropped from the report, only their places.
            None => bad[MAX_LISTED - 1].len += len,
        }
    }

    /// What was given up, ascending.
    pub(crate) fn into_bad(self) -> Vec<BadRange> {
        let mut bad = self.bad.into_inner().unwrap_or_else(|e| e.into_inner());
        bad.sort_by_key(|b| b.start);
        // In a full list the last one stands for bytes elsewhere, too.
        if bad.len() < MAX_LISTED { merged(bad) } else { bad }
    }
}

/// The same without a byte that is in it twice: what the tables show as bad may have been read, too.
fn merged(sorted: Vec<BadRange>) -> Vec<BadRange> {
    let mut out: Vec<BadRange> = Vec::with_capacity(sorted.len());
    for b in sorted {
        let end = b.start.saturating_add(b.len);
        let known = out.last().map_or(0, |l| l.start.saturating_add(l.len));
        match out.last_mut() {
            Some(last) if b.start == known && is_same(&b.reason, &last.reason) => last.len += b.len,
            _ if end <= known => {}
            _ => {
                let start = b.start.max(known);
                out.push(BadRange { start, len: end - start, ..b });
            }
        }
    }
    out
}

/// Whether two reasons differ at most in their offset: what is lost of an image that was cut has a table entry for each
/// cluster, and is one range.
fn is_same(a: &str, b: &str) -> bool {
    fn parts(reason: &str) -> (&str, &str) {
        let (file, rest) = reason.split_once(" at offset ").unwrap_or((reason, ""));
        (file, rest.split_once(": ").map_or("", |(_, what)| what))
    }
    parts(a) == parts(b)
}

/// Whether only the range that was read is affected.
fn is_local(e: &Error) -> bool {
    matches!(e.kind(), Kind::Corrupt | Kind::Truncated | Kind::Io)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_byte_is_listed_twice() {
        let range = |start, len, reason: &str| BadRange { start, len, reason: reason.into() };
        let listed = vec![
            range(0, 10, "a"),
            range(4, 6, "b"),
            range(10, 5, "a"),
            range(12, 8, "b"),
            range(30, 5, "b"),
        ];
        let want = [range(0, 15, "a"), range(15, 5, "b"), range(30, 5, "b")];
        assert_eq!(merged(listed), want);
        // Of neighbours that differ in their offset alone the first is told.
        let at = |offset: &str, what: &str| format!("/b/x at offset {offset}: {what}");
        let listed = [(0, "0x10", "cut"), (4, "0x18", "cut"), (8, "0x20", "odd")];
        let listed = listed.map(|(start, o, what)| range(start, 4, &at(o, what)));
        let want = [range(0, 8, &at("0x10", "cut")), range(8, 4, &at("0x20", "odd"))];
        assert_eq!(merged(listed.to_vec()), want);
    }
}
