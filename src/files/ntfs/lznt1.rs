//! LZNT1, with which NTFS compresses files: chunks of 4 KiB, each for itself ([MS-XCA], 2.5).

use super::super::bytes::{byte, le16};

/// Bytes that a chunk becomes.
const CHUNK: usize = 4096;

/// Decompresses a unit of `len` bytes; what is not there is zero. `None` if it is invalid.
pub(super) fn decompress(mut packed: &[u8], len: usize) -> Option<Vec<u8>> {
    let mut made = Vec::with_capacity(len);
    // Each chunk takes two bytes at least.
    while made.len() < len && packed.len() >= 2 {
        let head = le16(packed, 0);
        if head == 0 {
            break;
        }
        let (chunk, rest) = packed.get(2..)?.split_at_checked(usize::from(head & 0xfff) + 1)?;
        let begin = made.len();
        match head & 0x8000 {
            0 => made.extend_from_slice(chunk),
            _ => unpack(chunk, &mut made)?,
        }
        if made.len() - begin > CHUNK || made.len() > len {
            return None;
        }
        // One that is shorter ends with zeros.
        made.resize(begin + CHUNK, 0);
        packed = rest;
    }
    made.resize(len, 0);
    Some(made)
}

/// Unpacks one chunk behind what is there.
fn unpack(chunk: &[u8], made: &mut Vec<u8>) -> Option<()> {
    let begin = made.len();
    let mut at = 0;
    while at < chunk.len() {
        let flags = byte(chunk, at);
        at += 1;
        for bit in 0..8 {
            if at >= chunk.len() {
                break;
            }
            if flags >> bit & 1 == 0 {
                made.push(byte(chunk, at));
                at += 1;
                continue;
            }
            let token = usize::from(u16::from_le_bytes([*chunk.get(at)?, *chunk.get(at + 1)?]));
            at += 2;
            // The further inside the chunk, the more bits tell how far back, and the fewer how much.
            let done = made.len() - begin;
            let shift = length_bits(done);
            let (back, count) = ((token >> shift) + 1, (token & ((1 << shift) - 1)) + 3);
            let from = made.len().checked_sub(back).filter(|f| *f >= begin)?;
            if done + count > CHUNK {
                return None;
            }
            for i in from..from + count {
                made.push(byte(made, i));
            }
        }
    }
    Some(())
}

/// How many bits of a token tell its length, if `done` bytes of the chunk are there.
fn length_bits(done: usize) -> u32 {
    // Four for the distance up to 16 bytes, and one more for each doubling.
    let distance = done.saturating_sub(1).max(1).ilog2().max(3) + 1;
    16 - distance.min(12)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_of_the_specification() {
        // [MS-XCA], 3.2.
        let packed = [
            0x38, 0xb0, 0x88, 0x46, 0x23, 0x20, 0x00, 0x20, 0x47, 0x20, 0x41, 0x00, 0x10, 0xa2,
            0x47, 0x01, 0xa0, 0x45, 0x20, 0x44, 0x00, 0x08, 0x45, 0x01, 0x50, 0x79, 0x00, 0xc0,
            0x45, 0x20, 0x05, 0x24, 0x13, 0x88, 0x05, 0xb4, 0x02, 0x4a, 0x44, 0xef, 0x03, 0x58,
            0x02, 0x8c, 0x09, 0x16, 0x01, 0x48, 0x45, 0x00, 0xbe, 0x00, 0x9e, 0x00, 0x04, 0x01,
            0x18, 0x90, 0x00,
        ];
        let plain = b"F# F# G A A G F# E D D E F# F# E E F# F# G A A G F# E D D E F# E D D E E \
            F# D E F# G F# D E F# G F# E D E A F# F# G A A G F# E D D E F# E D D\0";
        let made = decompress(&packed, 4096).unwrap();
        assert_eq!(made[..plain.len()], plain[..]);
        assert!(made[plain.len()..].iter().all(|b| *b == 0));
    }

    #[test]
    fn distances_get_wider() {
        let bits = [0, 1, 16, 17, 32, 33, 64, 65, 2048, 2049, 4095].map(length_bits);
        assert_eq!(bits, [12, 12, 12, 11, 11, 10, 10, 9, 5, 4, 4]);
    }

    #[test]
    fn invalid_chunks_are_told() {
        // Longer than there is; back before the beginning; half a token; more than a chunk.
        for packed in [&[0xff, 0xbf, 0][..], &[2, 0xb0, 1, 0, 0], &[2, 0xb0, 2, b'a', 0]] {
            assert!(decompress(packed, 65536).is_none(), "{packed:?}");
        }
        let bomb = [0x06, 0xb0, 0x06, b'a', 0xff, 0x0f, 0xff, 0x0f, 0];
        assert!(decompress(&bomb, 65536).is_none());
        // Whatever the bytes are, it ends, and is as long as it should be.
        let mut seed = 1u32;
        for _ in 0..2000 {
            let noise: Vec<u8> = (0..300)
                .map(|_| {
                    seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (seed >> 24) as u8
                })
                .collect();
            let head = [&[0x20, 0xb1][..], &noise].concat();
            assert!(decompress(&head, 65536).is_none_or(|made| made.len() == 65536));
        }
    }

    #[test]
    fn stored_chunks_and_short_ones() {
        let stored = [&[0xff, 0x3f][..], &[7; 4096], &[0x02, 0x30, 1, 2, 3, 0, 0]].concat();
        let made = decompress(&stored, 65536).unwrap();
        assert_eq!((made[4095], &made[4096..4100]), (7, &[1, 2, 3, 0][..]));
        assert_eq!(made.len(), 65536);
    }
}
