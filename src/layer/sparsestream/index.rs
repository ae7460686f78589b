//! Where the data of a stream is: one pass over its frames.
//!
//! The pass is strict. Frames must ascend without overlap, lie inside the disk, add up to the size
//! that the metadata announces, and the file must end where they end. A full stream mentions every
//! byte of the disk, if it mentions zeros at all: a gap is a frame that was lost or damaged.
//!
//! A stream that only ends too early is what its writer made as far as it goes. Without its last
//! frame a compressed one has no list of sizes: then the lz4 frames themselves say how long they are.

use std::io::Read;
use std::ops::Range;

use super::frame::{self, Frame, HEADER, Kinds, Meta, Sizes, TERM, corrupt, cut};
use super::measure;
use crate::error::{Error, Kind, Result};
use crate::storage::{ReadAt, Section};

/// The most that is decompressed at once. The writer's frames hold at most 32 MiB.
pub(super) const MAX_UNIT: u64 = 64 << 20;

/// The most ranges that are kept of a stream that ends too early: 64 MiB of them. Of a whole one the
/// list of sizes is bounded; a cut one would say by itself how many there are.
pub(super) const MAX_PIECES: usize = (64 << 20) / size_of::<Piece>();

/// One range that a stream mentions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    /// First guest byte.
    pub start: u64,
    /// Guest bytes.
    pub len: u64,
    /// Where it is in the file.
    pub host: u64,
    /// How it is stored.
    pub how: Encoding,
}

/// How a piece is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Encoding {
    /// Not stored: it is zeros.
    Zero,
    /// As plain bytes.
    Plain,
    /// As one lz4 frame of so many bytes.
    Lz4(u32),
}

impl Piece {
    /// One past the last guest byte; `read` has checked that it does not overflow.
    pub(super) fn end(&self) -> u64 {
        self.start + self.len
    }
}

/// What a stream mentions.
pub(super) struct StreamIndex {
    /// Ascending, without overlap.
    pub pieces: Vec<Piece>,
    /// Where the stream ends too early: from this guest offset on nothing is known.
    pub cut: Option<Truncation>,
}

/// A stream that ends too early.
#[derive(Debug, Clone, Copy)]
pub(super) struct Truncation {
    /// The first guest byte that it would still have mentioned.
    pub from: u64,
    /// Where in the file something is missing.
    at: u64,
}

impl Truncation {
    /// The reason, without the file's name.
    pub(super) fn error(&self) -> Error {
        cut(self.at, "the stream ends too early: what it had from here on is lost")
    }
}

/// Reads all frames after the metadata, which ended at `at`.
///
/// # Errors
/// The stream breaks a rule, or cannot be read; without the file's name.
pub(super) fn read(storage: &dyn ReadAt, meta: &Meta, at: u64) -> Result<StreamIndex> {
    read_at_most(storage, meta, at, MAX_PIECES)
}

/// The same; of a stream that ends too early, what comes after `most` ranges counts as cut off.
pub(super) fn read_at_most(
    storage: &dyn ReadAt,
    meta: &Meta,
    at: u64,
    most: usize,
) -> Result<StreamIndex> {
    let mut walk = Walk {
        storage,
        meta,
        sizes: None,
        end: storage.len(),
        at,
        after: 0,
        gap: None,
        zeros: false,
        pieces: Vec::new(),
        most: usize::MAX,
        unlisted: false,
    };
    if frame::check_end(storage, meta).is_err_and(|e| e.kind() == Kind::Truncated) {
        walk.unlisted = meta.compressed;
        walk.most = most;
        return walk.until_cut();
    }
    if meta.compressed {
        let (list, text_at) = frame::read_trailer(storage)?;
        walk.sizes = Some(list);
        walk.end = text_at;
    }
    while walk.step()? {}
    walk.finish()
}

struct Walk<'a> {
    storage: &'a dyn ReadAt,
    meta: &'a Meta,
    /// Sizes of the data frames to come, of a compressed stream.
    sizes: Option<Sizes>,
    /// Where the frames have to end.
    end: u64,
    at: u64,
    /// Where the guest range of the last frame ended.
    after: u64,
    /// The first frame before which a range is not mentioned.
    gap: Option<u64>,
    /// Whether there are frames for zeros.
    zeros: bool,
    pieces: Vec<Piece>,
    /// How many of them are kept.
    most: usize,
    /// Whether it is compressed, and the list of sizes is lost.
    unlisted: bool,
}

/// A part of a plain data frame that is cut off is given up in these units.
const UNIT: u64 = 4096;

impl Walk<'_> {
    /// Takes the frames that are there of a stream that ends too early.
    fn until_cut(mut self) -> Result<StreamIndex> {
        let mut known = self.after;
        let at = loop {
            match self.step() {
                Ok(true) => known = self.after,
                // Nothing but the list of sizes is missing.
                Ok(false) => {
                    self.end = if self.unlisted { self.at } else { self.end };
                    return self.finish();
                }
                Err(e) if e.kind() == Kind::Truncated => break self.at,
                Err(e) => return Err(e),
            }
        };
        if let Some(lost) = self.lost_frame() {
            return Err(lost);
        }
        // A plain data frame is there as far as it goes; of lz4 frames those that are whole.
        let last = self.pieces.last().filter(|p| p.end() > known);
        known = last.map_or(known, Piece::end);
        Ok(StreamIndex { pieces: self.pieces, cut: Some(Truncation { from: known, at }) })
    }

    /// Takes one frame; `false` at the last.
    fn step(&mut self) -> Result<bool> {
        let at = self.at;
        let frame = Frame::read(self.storage, at)?;
        self.at += HEADER;
        match frame.kind {
            Kinds::Data => self.data(at, frame)?,
            Kinds::Zero => {
                self.check_range(at, frame)?;
                self.zeros = true;
                // What a full backup does not keep a piece for reads as zeros anyhow.
                if self.meta.incremental {
                    self.push(frame.start, frame.len, 0, Encoding::Zero)?;
                }
            }
            Kinds::Stop if frame.start == 0 && frame.len == 0 => {
                self.note_gap(at, self.meta.virtual_size);
                return Ok(false);
            }
            _ => return Err(corrupt(at, "an unexpected frame")),
        }
        Ok(true)
    }

    fn push(&mut self, start: u64, len: u64, host: u64, how: Encoding) -> Result<()> {
        if self.pieces.len() >= self.most {
            return Err(cut(self.at, "the stream ends too early and has too many pieces"));
        }
        self.pieces.push(Piece { start, len, host, how });
        Ok(())
    }

    fn check_range(&mut self, at: u64, frame: Frame) -> Result<()> {
        let end = frame.start.checked_add(frame.len).filter(|end| *end <= self.meta.virtual_size);
        let Some(end) = end.filter(|_| frame.len > 0 && frame.start >= self.after) else {
            return Err(corrupt(at, "a frame is out of order or past the end of the disk"));
        };
        self.note_gap(at, frame.start);
        self.after = end;
        Ok(())
    }

    fn note_gap(&mut self, at: u64, start: u64) {
        if start > self.after {
            self.gap.get_or_insert(at);
        }
    }

    fn data(&mut self, at: u64, frame: Frame) -> Result<()> {
        self.check_range(at, frame)?;
        let stored = match self.sizes.as_mut().map(Sizes::next) {
            None if self.unlisted => self.unlisted(frame)?,
            None => {
                let there = self.end.saturating_sub(self.at).min(frame.len);
                let there = if there < frame.len { there - there % UNIT } else { there };
                if there > 0 {
                    self.push(frame.start, there, self.at, Encoding::Plain)?;
                }
                frame.len
            }
            Some(Some(places)) => self.compressed(frame, places)?,
            Some(None) => return Err(corrupt(at, "the size of a data frame is not in the list")),
        };
        let end = self.at.checked_add(stored).filter(|e| e.saturating_add(TERM) <= self.end);
        let end = end.ok_or_else(|| cut(at, "the stream ends inside a data frame"))?;
        frame::expect_term(self.storage, end)?;
        self.at = end + TERM;
        Ok(())
    }

    /// Takes the lz4 frames of one data frame; returns the bytes they take.
    fn compressed(&mut self, frame: Frame, places: Range<usize>) -> Result<u64> {
        let (mut start, end, mut host) = (frame.start, frame.start + frame.len, self.at);
        let single = places.len() == 1;
        for place in places {
            let room = self.end.saturating_sub(host);
            let size = self.sizes.as_ref().map(|s| s.size(place));
            let size = size.filter(|s| u64::from(*s) <= room);
            let size = size.ok_or_else(|| cut(host, "the stream ends inside a data frame"))?;
            let content = lz4_content(self.storage, host, size)?;
            // A frame on its own need not say how much it holds.
            let len = content.or(single.then_some(frame.len)).filter(|n| *n > 0);
            let len = len.filter(|n| *n <= end - start).ok_or_else(|| mismatch(host))?;
            if len > MAX_UNIT {
                let what = format!("a compressed frame of {len} bytes is too large");
                let error = Error::new(Kind::Unsupported, what).at_offset(host);
                return Err(error.remedy("restore the disk with virtnbdrestore"));
            }
            self.push(start, len, host, Encoding::Lz4(size))?;
            start += len;
            host += u64::from(size);
        }
        if start != end {
            return Err(mismatch(host));
        }
        Ok(host - self.at)
    }

    /// Takes the lz4 frames of one data frame, which say themselves how long they are.
    fn unlisted(&mut self, frame: Frame) -> Result<u64> {
        let (mut start, end, mut host) = (frame.start, frame.start + frame.len, self.at);
        while start < end {
            let single = start == frame.start;
            let found = measure::measure(self.storage, host)?;
            let len = found.content.or(single.then_some(frame.len)).filter(|n| *n > 0);
            let len = len.filter(|n| *n <= end - start).ok_or_else(|| mismatch(host))?;
            let size = u32::try_from(found.len).ok().filter(|_| len <= MAX_UNIT);
            let size = size.ok_or_else(|| corrupt(host, "an lz4 frame is too large"))?;
            self.push(start, len, host, Encoding::Lz4(size))?;
            start += len;
            host += found.len;
        }
        Ok(host - self.at)
    }

    /// A range that a full stream leaves out, though it has frames for zeros.
    fn lost_frame(&self) -> Option<Error> {
        let at = self.gap.filter(|_| self.zeros && !self.meta.incremental)?;
        Some(corrupt(at, "a full stream leaves out a range before this frame"))
    }

    fn finish(mut self) -> Result<StreamIndex> {
        if self.at != self.end {
            return Err(corrupt(self.at, "bytes follow the end of the stream"));
        }
        if self.sizes.as_mut().is_some_and(|rest| rest.next().is_some()) {
            return Err(corrupt(self.end, "the list of sizes is longer than the stream"));
        }
        if let Some(lost) = self.lost_frame() {
            return Err(lost);
        }
        let data = self.pieces.iter().filter(|p| p.how != Encoding::Zero);
        // Pieces do not overlap and lie inside the disk, so the sum cannot overflow.
        let sum: u64 = data.map(|p| p.len).sum();
        if sum != self.meta.data_size {
            let what = format!("{sum} bytes of data where {} are announced", self.meta.data_size);
            return Err(corrupt(HEADER, what));
        }
        self.pieces.shrink_to_fit();
        Ok(StreamIndex { pieces: self.pieces, cut: None })
    }
}

fn mismatch(at: u64) -> Error {
    corrupt(at, "the compressed frames do not hold what their data frame announces")
}

/// The content size in the header of the lz4 frame at `host`.
fn lz4_content(storage: &dyn ReadAt, host: u64, size: u32) -> Result<Option<u64>> {
    let mut head = [0; 14];
    let mut from = Section::new(storage, host, host + u64::from(size));
    let read = from.read_exact(&mut head);
    // The smallest frame: magic, descriptor of 3 bytes, end mark.
    if size < 11 || head[..4] != measure::MAGIC {
        return Err(corrupt(host, "there is no lz4 frame where one has to be"));
    }
    if head[4] & measure::HAS_SIZE == 0 {
        return Ok(None);
    }
    read.map_err(|_| corrupt(host, "an lz4 frame is cut"))?;
    let mut content = [0; 8];
    content.copy_from_slice(&head[6..14]);
    Ok(Some(u64::from_le_bytes(content)))
}
