//! XPRESS with Huffman codes ([MS-XCA], 2.1 and 2.2), in chunks that are one block each.

use super::bits::{Bits, Code, copy};

/// 512 code lengths of four bits.
const TABLE: usize = 256;
/// Symbols below are bytes.
const MATCH: usize = 256;
/// Lengths from here on follow in bytes of their own; all are so much more than they say.
const LONG: usize = 15;
const SHORTEST: usize = 3;

/// Decompresses a chunk that has `len` bytes; `None` if it is invalid.
pub(super) fn decompress(packed: &[u8], len: usize) -> Option<Vec<u8>> {
    let (table, stream) = packed.split_at_checked(TABLE)?;
    let lengths: Vec<u8> = table.iter().flat_map(|b| [b & 15, b >> 4]).collect();
    let code = Code::new(&lengths)?;
    let (mut bits, mut made) = (Bits::new(stream), Vec::with_capacity(len));
    while made.len() < len {
        let symbol = bits.symbol(&code)?;
        if symbol < MATCH {
            made.push(symbol as u8);
            continue;
        }
        let mut count = symbol % 16;
        if count == LONG {
            count += match bits.byte() {
                255 => {
                    let low = bits.byte();
                    (low | bits.byte() << 8).checked_sub(LONG)?
                }
                more => more,
            };
        }
        let width = ((symbol - MATCH) / 16) as u32;
        let back = (1 << width) + bits.take(width) as usize;
        copy(&mut made, back, count + SHORTEST, len)?;
        if bits.is_over() {
            return None;
        }
    }
    (!bits.is_over()).then_some(made)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table of the second example of [MS-XCA], 3.1: `abc` a hundred times.
    fn example() -> Vec<u8> {
        let mut packed = vec![0; 256];
        packed[48] = 0x30;
        packed[49] = 0x23;
        packed[128] = 0x02;
        packed[143] = 0x20;
        packed.extend([0xa8, 0xdc, 0x00, 0x00, 0xff, 0x26, 0x01]);
        packed
    }

    #[test]
    fn the_example_of_the_specification() {
        let made = decompress(&example(), 300).unwrap();
        assert_eq!(made, b"abc".repeat(100));
    }

    #[test]
    fn invalid_chunks_are_told() {
        assert!(decompress(&[], 10).is_none() && decompress(&[0; 300], 10).is_none());
        assert!(decompress(&example()[..258], 300).is_none());
        // Longer than it should be.
        assert!(decompress(&example(), 299).is_none());
    }
}
