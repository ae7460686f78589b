//! Where the data of a stream is: one pass over its frames.
//!
//! The pass is strict. Frames must ascend without overlap, lie inside the disk, add up to the size
//! that the metadata announces, and the file must end where they end. A full stream mentions every
//! byte of the disk, if it mentions zeros at all: a gap is a frame that was lost or damaged.

use std::io::Read;
use std::ops::Range;

use super::frame::{self, Frame, HEADER, Kinds, Meta, Sizes, TERM, corrupt, cut};
use crate::error::{Error, Kind, Result};
use crate::storage::{ReadAt, Section};

/// The most that is decompressed at once. The writer's frames hold at most 32 MiB.
pub const MAX_UNIT: u64 = 64 << 20;
/// "lz4 frame" in little-endian.
const LZ4_MAGIC: [u8; 4] = 0x184d_2204u32.to_le_bytes();
/// The bit of an lz4 frame's descriptor that says that its content's size follows.
const LZ4_HAS_SIZE: u8 = 1 << 3;

/// One range that a stream mentions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// First guest byte.
    pub start: u64,
    /// Guest bytes.
    pub len: u64,
    /// Where it is in the file.
    pub host: u64,
    /// How.
    pub how: How,
}

/// How a piece is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// Not at all: it is zeros.
    Zero,
    /// As it is.
    Plain,
    /// As one lz4 frame of so many bytes.
    Lz4(u32),
}

impl Piece {
    /// One past the last guest byte; `read` has checked that it does not overflow.
    pub fn end(&self) -> u64 {
        self.start + self.len
    }
}

/// Reads all frames after the metadata, which ended at `at`.
///
/// # Errors
/// The stream breaks a rule, or cannot be read; without the file's name.
pub fn read(storage: &dyn ReadAt, meta: &Meta, at: u64) -> Result<Vec<Piece>> {
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
    };
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
}

impl Walk<'_> {
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
                    self.push(frame.start, frame.len, 0, How::Zero);
                }
            }
            Kinds::Stop if frame.start == 0 && frame.len == 0 => {
                self.note_gap(at, self.meta.virtual_size);
                return Ok(false);
            }
            _ => return Err(corrupt(at, "a frame is not what it can be here")),
        }
        Ok(true)
    }

    fn push(&mut self, start: u64, len: u64, host: u64, how: How) {
        self.pieces.push(Piece { start, len, host, how });
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
            None => {
                self.push(frame.start, frame.len, self.at, How::Plain);
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
            self.push(start, len, host, How::Lz4(size));
            start += len;
            host += u64::from(size);
        }
        if start != end {
            return Err(mismatch(host));
        }
        Ok(host - self.at)
    }

    fn finish(mut self) -> Result<Vec<Piece>> {
        if self.at != self.end {
            return Err(corrupt(self.at, "bytes follow the end of the stream"));
        }
        if self.sizes.is_some_and(|mut rest| rest.next().is_some()) {
            return Err(corrupt(self.end, "the list of sizes is longer than the stream"));
        }
        if let Some(at) = self.gap.filter(|_| self.zeros && !self.meta.incremental) {
            return Err(corrupt(at, "a full stream leaves out a range before this frame"));
        }
        let data = self.pieces.iter().filter(|p| p.how != How::Zero);
        // Pieces do not overlap and lie inside the disk, so the sum cannot overflow.
        let sum: u64 = data.map(|p| p.len).sum();
        if sum != self.meta.data_size {
            let what = format!("{sum} bytes of data where {} are announced", self.meta.data_size);
            return Err(corrupt(HEADER, what));
        }
        self.pieces.shrink_to_fit();
        Ok(self.pieces)
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
    if size < 11 || head[..4] != LZ4_MAGIC {
        return Err(corrupt(host, "there is no lz4 frame where one has to be"));
    }
    if head[4] & LZ4_HAS_SIZE == 0 {
        return Ok(None);
    }
    read.map_err(|_| corrupt(host, "an lz4 frame is cut"))?;
    let mut content = [0; 8];
    content.copy_from_slice(&head[6..14]);
    Ok(Some(u64::from_le_bytes(content)))
}
