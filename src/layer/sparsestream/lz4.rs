//! One lz4 frame, block by block: so that a small read from a large frame stops where it has what it
//! wants, and the next one goes on there.
//!
//! Every checksum that a frame has is verified before a byte of it is used. That of the whole content,
//! which the writer leaves out, is at the frame's end: such a frame is gone through once more first.

use std::hash::Hasher;

use twox_hash::XxHash32;

use super::frame::{corrupt, cut};
use crate::error::Result;
use crate::layer::{PIECE, Piece, Unit};
use crate::storage::ReadAt;

/// "lz4 frame" in little-endian.
const MAGIC: u32 = 0x184d_2204;
/// How far back a block refers to those before it.
const WINDOW: usize = 64 << 10;
/// The bit of a block's size that says that it is stored as it is.
const STORED: u32 = 1 << 31;
/// Magic, descriptor with content size and dictionary number, checksum.
const LONGEST_HEADER: usize = 4 + 2 + 8 + 4 + 1;

/// What a frame's descriptor says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Info {
    /// Blocks refer to those before them.
    linked: bool,
    block_sums: bool,
    content_sum: bool,
    block_max: usize,
    /// Bytes before the first block.
    len: u64,
}

fn sum(bytes: &[u8]) -> u32 {
    XxHash32::oneshot(0, bytes)
}

impl Info {
    fn read(storage: &dyn ReadAt, unit: Unit) -> Result<Info> {
        let mut head = [0; LONGEST_HEADER];
        let there = (unit.len as usize).min(LONGEST_HEADER);
        storage.read_exact_at(&mut head[..there], unit.host)?;
        Self::parse(&head)
            .ok_or_else(|| corrupt(unit.host, "the header of an lz4 frame is damaged"))
    }

    fn parse(head: &[u8; LONGEST_HEADER]) -> Option<Info> {
        let (magic, rest) = head.split_first_chunk()?;
        let [flags, sizes, ..] = *rest else { return None };
        let has = |bit: u8| flags & 1 << bit != 0;
        // Version 1, no dictionary, no bits that nobody knows.
        if u32::from_le_bytes(*magic) != MAGIC || flags >> 6 != 1 || has(0) || has(1) {
            return None;
        }
        let block_max = match sizes {
            0x40 => 64 << 10,
            0x50 => 256 << 10,
            0x60 => 1 << 20,
            0x70 => 4 << 20,
            _ => return None,
        };
        let described = 2 + if has(3) { 8 } else { 0 };
        let check = (sum(rest.get(..described)?) >> 8) as u8;
        (rest.get(described) == Some(&check)).then_some(Info {
            linked: !has(5),
            block_sums: has(4),
            content_sum: has(2),
            block_max,
            len: 4 + described as u64 + 1,
        })
    }
}

/// Goes through the blocks of a frame.
struct Blocks<'a> {
    storage: &'a dyn ReadAt,
    unit: Unit,
    info: Info,
    /// Where the next block begins.
    at: u64,
    packed: Vec<u8>,
    /// The end of what was decompressed.
    window: Vec<u8>,
}

impl Blocks<'_> {
    fn end(&self) -> u64 {
        self.unit.host.saturating_add(u64::from(self.unit.len))
    }

    /// The next four bytes as a number.
    fn word(&mut self) -> Result<u32> {
        let mut word = [0; 4];
        self.take(&mut word)?;
        Ok(u32::from_le_bytes(word))
    }

    fn take(&mut self, bytes: &mut [u8]) -> Result<()> {
        let after = self.at.saturating_add(bytes.len() as u64);
        if after > self.end() {
            return Err(cut(self.at, "compressed data is damaged: the lz4 frame is cut"));
        }
        self.storage.read_exact_at(bytes, self.at)?;
        self.at = after;
        Ok(())
    }

    /// Appends the next block's bytes to `out`; false at the end of the frame.
    fn next(&mut self, out: &mut Vec<u8>) -> Result<bool> {
        let at = self.at;
        let bad = |what: &str| corrupt(at, format!("compressed data is damaged: {what}"));
        let size = self.word()?;
        if size == 0 {
            return Ok(false);
        }
        let (stored, len) = (size & STORED != 0, (size & !STORED) as usize);
        if len > self.info.block_max {
            return Err(bad("a block is too large"));
        }
        // Of their full length from the start: growing, they would take up to twice that.
        let mut packed = std::mem::take(&mut self.packed);
        packed.clear();
        packed.reserve_exact(self.info.block_max);
        out.reserve_exact(self.info.block_max);
        packed.resize(len, 0);
        self.take(&mut packed)?;
        if self.info.block_sums && self.word()? != sum(&packed) {
            return Err(bad("a block has another checksum"));
        }
        let from = out.len();
        if stored {
            out.extend_from_slice(&packed);
        } else {
            out.resize(from + self.info.block_max, 0);
            let into = out.get_mut(from..).unwrap_or_default();
            let done = lz4_flex::block::decompress_into_with_dict(&packed, into, &self.window);
            out.truncate(from + done.map_err(|e| bad(&e.to_string()))?);
        }
        self.packed = packed;
        if self.info.linked {
            let fresh = out.get(from..).unwrap_or_default();
            self.remember(fresh);
        }
        Ok(true)
    }

    fn remember(&mut self, fresh: &[u8]) {
        let old = WINDOW.saturating_sub(fresh.len()).min(self.window.len());
        self.window.drain(..self.window.len() - old);
        self.window.extend_from_slice(&fresh[fresh.len().saturating_sub(WINDOW)..]);
    }

    /// Checks that nothing follows what was decompressed.
    fn check_end(&mut self, content: Option<u32>) -> Result<()> {
        let at = self.at;
        let wrong = || corrupt(at, "compressed data is damaged: the frame has another length");
        if self.next(&mut Vec::new())? {
            return Err(wrong());
        }
        if self.info.content_sum {
            let told = self.word()?;
            if content.is_some_and(|sum| sum != told) {
                let what = "compressed data is damaged: the content has another checksum";
                return Err(corrupt(at, what));
            }
        }
        if self.at == self.end() { Ok(()) } else { Err(wrong()) }
    }
}

/// One unit of a stream, to be decompressed piece by piece.
pub(super) struct Frame<'a> {
    blocks: Blocks<'a>,
}

impl<'a> Frame<'a> {
    /// Reads the descriptor.
    ///
    /// # Errors
    /// `Corrupt`, `Truncated` or `Io`, without the file's name.
    pub(super) fn open(storage: &'a dyn ReadAt, unit: Unit) -> Result<Self> {
        let info = Info::read(storage, unit)?;
        let at = unit.host.saturating_add(info.len);
        let blocks = Blocks { storage, unit, info, at, packed: Vec::new(), window: Vec::new() };
        Ok(Frame { blocks })
    }

    /// Bytes that decompressing takes at a time, beside the pieces that are kept: a block as it is stored
    /// and as it was, one piece, and what blocks refer to.
    pub(super) fn working_memory(&self) -> u64 {
        2 * self.blocks.info.block_max as u64 + 2 * u64::from(PIECE)
    }

    /// Whether there is a checksum of the whole.
    pub(super) fn has_content_sum(&self) -> bool {
        self.blocks.info.content_sum
    }

    /// Verifies that checksum, from the start.
    ///
    /// # Errors
    /// As [`Frame::open`].
    pub(super) fn verify(mut self) -> Result<()> {
        let mut hash = XxHash32::with_seed(0);
        let (mut left, mut block) = (u64::from(self.blocks.unit.size), Vec::new());
        while left > 0 && self.blocks.next(&mut block)? {
            hash.write(&block);
            left = left.saturating_sub(block.len() as u64);
            block.clear();
        }
        // The hash has 32 bits.
        self.blocks.check_end(Some(hash.finish() as u32))
    }

    /// See [`crate::layer::Layer::decompress_pieces`].
    ///
    /// # Errors
    /// As [`Frame::open`], and what `keep` says.
    pub(super) fn pieces(
        mut self,
        after: Option<(u32, &Piece)>,
        last: u32,
        keep: &mut dyn FnMut(u32, Piece) -> Result<()>,
    ) -> Result<()> {
        let mut number = 0;
        if let Some((before, piece)) = after
            && let Some(next) = piece.next
        {
            number = before + 1;
            self.blocks.at = next;
            self.blocks.remember(&piece.bytes);
        }
        let size = u64::from(self.blocks.unit.size);
        let mut done = u64::from(number) * u64::from(PIECE);
        let (mut piece, mut block) = (Vec::new(), Vec::new());
        while done < size && number <= last {
            block.clear();
            if !self.blocks.next(&mut block)? {
                return Err(cut(self.blocks.at, "compressed data is damaged: the frame is short"));
            }
            if block.len() as u64 > size - done - piece.len() as u64 {
                return Err(corrupt(
                    self.blocks.at,
                    "compressed data is damaged: the frame is long",
                ));
            }
            let ends = done + (piece.len() + block.len()) as u64 == size;
            if ends {
                self.blocks.check_end(None)?;
            }
            let mut rest = block.as_slice();
            while !rest.is_empty() {
                // Of the right length from the start: it may stay for long.
                piece.reserve_exact((PIECE as usize).min((size - done) as usize) - piece.len());
                let (now, after) = rest.split_at(rest.len().min(PIECE as usize - piece.len()));
                piece.extend_from_slice(now);
                rest = after;
                if piece.len() == PIECE as usize || (ends && rest.is_empty()) {
                    done += piece.len() as u64;
                    let next = rest.is_empty().then_some(self.blocks.at);
                    let bytes = std::mem::take(&mut piece).into_boxed_slice();
                    keep(number, Piece { bytes, next })?;
                    number += 1;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use lz4_flex::frame::{BlockMode, BlockSize, FrameEncoder, FrameInfo};

    use super::*;
    use crate::storage::MemStorage;

    const SIZE: usize = 3 * (1 << 20) + 777;

    fn content() -> Vec<u8> {
        // Compressible, and each block refers far back.
        (0..SIZE).map(|i| ((i * i) >> 9) as u8 ^ (i % 251) as u8).collect()
    }

    fn packed(info: FrameInfo) -> (MemStorage, Unit) {
        let mut encoder = FrameEncoder::with_frame_info(info, Vec::new());
        encoder.write_all(&content()).unwrap();
        let mut bytes = vec![0xaa; 100];
        let frame = encoder.finish().unwrap();
        let unit = Unit { host: 100, len: frame.len() as u32, size: SIZE as u32 };
        bytes.extend(frame);
        bytes.extend([0xbb; 100]);
        (MemStorage::new("m", bytes), unit)
    }

    fn infos() -> Vec<FrameInfo> {
        let mut all = Vec::new();
        for mode in [BlockMode::Linked, BlockMode::Independent] {
            for size in [BlockSize::Max64KB, BlockSize::Max256KB, BlockSize::Max4MB] {
                for sums in [false, true] {
                    let info = FrameInfo::new().block_mode(mode).block_size(size);
                    all.push(info.block_checksums(sums).content_checksum(sums));
                }
            }
        }
        all
    }

    #[test]
    fn each_piece_is_right_from_the_start_and_after_any_other() {
        let want = content();
        for info in infos() {
            let (storage, unit) = packed(info);
            let mut kept: Vec<Piece> = Vec::new();
            let open = || Frame::open(&storage, unit).unwrap();
            let mut all = |n: u32, p: Piece| {
                assert_eq!(n as usize, kept.len());
                kept.push(p);
                Ok(())
            };
            open().pieces(None, u32::MAX, &mut all).unwrap();
            let joined: Vec<u8> = kept.iter().flat_map(|p| p.bytes.iter().copied()).collect();
            assert!(joined == want);
            for (n, piece) in kept.iter().enumerate().filter(|(_, p)| p.next.is_some()) {
                let mut keep = |m: u32, p: Piece| {
                    assert_eq!(p, kept[m as usize], "piece {m} after {n}");
                    Ok(())
                };
                open().pieces(Some((n as u32, piece)), u32::MAX, &mut keep).unwrap();
            }
            open().verify().unwrap();
        }
    }

    #[test]
    fn no_more_room_is_taken_than_is_said() {
        for info in infos() {
            let (storage, unit) = packed(info);
            let mut frame = Frame::open(&storage, unit).unwrap();
            let room = frame.working_memory();
            let mut block = Vec::new();
            while frame.blocks.next(&mut block).unwrap() {
                let taken = block.capacity() + frame.blocks.packed.capacity();
                let taken = taken + frame.blocks.window.capacity() + PIECE as usize;
                assert!(taken as u64 <= room, "{taken} of {room}");
                block.clear();
            }
        }
    }

    #[test]
    fn a_small_read_stops_early() {
        let (storage, unit) = packed(FrameInfo::new().block_size(BlockSize::Max64KB));
        let mut count = 0;
        let mut keep = |_, _| {
            count += 1;
            Ok(())
        };
        // What follows may be lost.
        let storage = crate::storage::FaultyStorage::new(storage, 1 << 20..1 << 30);
        Frame::open(&storage, unit).unwrap().pieces(None, 1, &mut keep).unwrap();
        assert_eq!(count, 2);
    }

    #[test]
    fn no_flipped_byte_goes_unnoticed_where_there_are_checksums() {
        let info = FrameInfo::new().block_checksums(true).content_checksum(true);
        let (storage, unit) = packed(info);
        for at in (0..unit.len).step_by(4099).chain(unit.len - 8..unit.len) {
            let mut bytes = vec![0; storage.len() as usize];
            storage.read_exact_at(&mut bytes, 0).unwrap();
            bytes[100 + at as usize] ^= 0x10;
            let bad = MemStorage::new("m", bytes);
            let result = Frame::open(&bad, unit).and_then(Frame::verify);
            assert!(result.is_err(), "{at}");
        }
    }
}
