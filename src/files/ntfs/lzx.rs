//! LZX in chunks of 32 KiB, as WIM images and Windows' own compressed files have it ([MS-PATCH], 2, with blocks
//! whose default size is that of the chunk, and calls of x86 always translated).

use super::super::bytes::{le32, part};
use super::bits::{Bits, Code, copy};

/// Bytes of a whole chunk, which are also those of a block that does not say.
pub(super) const CHUNK: usize = 32 << 10;
/// What calls are translated by: no file of Windows is that large.
const CALLS: i32 = 12_000_000;
/// Symbols: bytes; and for each of thirty slots of distances, eight of lengths.
const BYTES: usize = 256;
const SLOTS: usize = 30;
const MAIN: usize = BYTES + 8 * SLOTS;
/// Symbols for longer lengths; and of the codes that the lengths of codes are written in.
const LENGTHS: usize = 249;
const PRE: usize = 20;
/// Lengths of codes count round in a circle.
const CIRCLE: usize = 17;

/// Decompresses a chunk that has `len` bytes; `None` if it is invalid.
pub(super) fn decompress(packed: &[u8], len: usize) -> Option<Vec<u8>> {
    let mut chunk = Chunk {
        bits: Bits::new(packed),
        made: Vec::with_capacity(len),
        len,
        recent: [1; 3],
        main: [0; MAIN],
        lengths: [0; LENGTHS],
    };
    while chunk.made.len() < len {
        chunk.block()?;
        if chunk.bits.is_over() {
            return None;
        }
    }
    translate(&mut chunk.made);
    Some(chunk.made)
}

struct Chunk<'a> {
    bits: Bits<'a>,
    made: Vec<u8>,
    len: usize,
    /// The last three distances.
    recent: [usize; 3],
    /// Lengths of codes, which the next block changes.
    main: [u8; MAIN],
    lengths: [u8; LENGTHS],
}

impl Chunk<'_> {
    fn block(&mut self) -> Option<()> {
        let kind = self.bits.take(3);
        let size = match self.bits.take(1) {
            1 => CHUNK,
            _ => self.bits.take(16) as usize,
        };
        let end = self.made.len().checked_add(size).filter(|_| size > 0)?.min(self.len);
        match kind {
            1 => self.packed(end, None),
            2 => {
                let mut lengths = [0; 8];
                lengths.iter_mut().for_each(|l| *l = self.bits.take(3) as u8);
                self.packed(end, Some(Code::new(&lengths)?))
            }
            3 => self.stored(end),
            _ => None,
        }
    }

    /// Bytes as they are, behind three distances.
    fn stored(&mut self, end: usize) -> Option<()> {
        let rest = self.bits.rest();
        let size = end - self.made.len();
        let bytes = part(rest, 12, size);
        if bytes.len() < size {
            return None;
        }
        self.made.extend_from_slice(bytes);
        for (i, recent) in self.recent.iter_mut().enumerate() {
            *recent = le32(rest, 4 * i) as usize;
        }
        self.bits = Bits::new(rest.get(12 + size.next_multiple_of(2)..).unwrap_or_default());
        Some(())
    }

    fn packed(&mut self, end: usize, aligned: Option<Code>) -> Option<()> {
        let (low, high) = self.main.split_at_mut(BYTES);
        read_lengths(&mut self.bits, low)?;
        read_lengths(&mut self.bits, high)?;
        read_lengths(&mut self.bits, &mut self.lengths)?;
        let (main, lengths) = (Code::new(&self.main)?, Code::new(&self.lengths)?);
        while self.made.len() < end {
            let symbol = self.bits.symbol(&main)?;
            let Some(symbol) = symbol.checked_sub(BYTES) else {
                self.made.push(symbol as u8);
                continue;
            };
            let count = match symbol % 8 {
                7 => 9 + self.bits.symbol(&lengths)?,
                short => 2 + short,
            };
            let back = self.distance(symbol / 8, aligned.as_ref())?;
            copy(&mut self.made, back, count, end)?;
            if self.bits.is_over() {
                return None;
            }
        }
        Some(())
    }

    /// The distance of a slot: one of the last three, or a new one.
    fn distance(&mut self, slot: usize, aligned: Option<&Code>) -> Option<usize> {
        if slot < 3 {
            self.recent.swap(0, slot);
            return self.recent.first().copied();
        }
        let width = (slot / 2).saturating_sub(1) as u32;
        // 3, 4, 6, 8, 12, 16 and so on.
        let base = if slot < 4 { slot } else { (2 + slot % 2) << width };
        let more = match aligned {
            Some(code) if width >= 3 => {
                (self.bits.take(width - 3) << 3) as usize + self.bits.symbol(code)?
            }
            _ => self.bits.take(width) as usize,
        };
        let back = base + more - 2;
        self.recent = [back, self.recent[0], self.recent[1]];
        Some(back)
    }
}

/// Changes lengths of codes by what the stream says.
fn read_lengths(bits: &mut Bits<'_>, lengths: &mut [u8]) -> Option<()> {
    let mut pre = [0; PRE];
    pre.iter_mut().for_each(|l| *l = bits.take(4) as u8);
    let code = Code::new(&pre)?;
    let changed = |before: u8, by: usize| {
        Some(((usize::from(before) + CIRCLE).checked_sub(by)? % CIRCLE) as u8)
    };
    let mut at = 0;
    while at < lengths.len() {
        let before = *lengths.get(at)?;
        let (count, value) = match bits.symbol(&code)? {
            17 => (4 + bits.take(4), 0),
            18 => (20 + bits.take(5), 0),
            19 => {
                let count = 4 + bits.take(1);
                (count, changed(before, bits.symbol(&code)?)?)
            }
            by => (1, changed(before, by)?),
        };
        let end = (at + count as usize).min(lengths.len());
        lengths.get_mut(at..end)?.fill(value);
        at = end;
    }
    Some(())
}

/// Turns the targets of calls back into distances from the call.
fn translate(made: &mut [u8]) {
    /// The last bytes of a chunk are left as they are.
    const TAIL: usize = 10;
    let mut at = 0;
    while at + TAIL < made.len() {
        let Some([0xe8, target @ ..]) = made.get_mut(at..at + 5) else {
            at += 1;
            continue;
        };
        let (to, here) = (le32(target, 0).cast_signed(), at as i32);
        let back = match to {
            0.. if to < CALLS => to.wrapping_sub(here),
            ..0 if to >= -here => to.wrapping_add(CALLS),
            _ => to,
        };
        target.copy_from_slice(&back.to_le_bytes());
        at += 5;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stored_blocks_come_back() {
        // Type 3, not of the default size, 21 bytes; padding; three distances; bytes.
        let head = 0b011u32 << 29 | 21 << 12;
        let words = [(head >> 16) as u16, head as u16];
        let mut packed: Vec<u8> = words.into_iter().flat_map(u16::to_le_bytes).collect();
        packed.extend([1u32, 1, 1].into_iter().flat_map(u32::to_le_bytes));
        let mut plain = *b"0123\xe8\x10\0\0\0........xyz!";
        packed.extend(plain);
        let made = decompress(&packed, 21).unwrap();
        // The call at 4 goes to 0x10.
        plain[5] = 0x0c;
        assert_eq!(made, plain);
        assert!(decompress(&packed[..30], 21).is_none());
    }

    #[test]
    fn noise_ends() {
        let mut seed = 7u32;
        for _ in 0..3000 {
            let noise: Vec<u8> = (0..200)
                .map(|_| {
                    seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (seed >> 24) as u8
                })
                .collect();
            assert!(decompress(&noise, CHUNK).is_none_or(|made| made.len() == CHUNK));
        }
        assert!(decompress(&[], 1).is_none());
    }
}
