//! Decompressing extents: zlib, LZO and zstd. None has more than 128 KiB.

use std::io::Read;

use super::super::bytes::{le32, part};
use crate::layer::vma::lzo1x::decompress_some;

/// The most bytes that an extent has, compressed and not.
pub(super) const MAX: u64 = 128 << 10;
/// The largest window that a kernel writes or reads, as a power of two.
const ZSTD_WINDOW: u32 = 17;

/// How an extent is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Packing {
    Zlib,
    Lzo,
    Zstd,
}

impl Packing {
    /// The one with this number.
    pub(super) fn of(number: u8) -> Option<Packing> {
        Some(match number {
            1 => Packing::Zlib,
            2 => Packing::Lzo,
            3 => Packing::Zstd,
            _ => return None,
        })
    }

    /// Decompresses an extent of at most `len` bytes, at most [`MAX`]; what is missing at its end is zeros.
    ///
    /// # Errors
    /// Why it cannot be decompressed.
    pub(super) fn unpack(self, packed: &[u8], len: u64, sector: u64) -> Result<Vec<u8>, String> {
        let len = len.min(MAX) as usize;
        let mut out = match self {
            Packing::Zlib => all(flate2::bufread::ZlibDecoder::new(packed), len, "zlib")?,
            Packing::Zstd => {
                let decoder = zstd::stream::read::Decoder::with_buffer(packed);
                let mut decoder = decoder.map_err(|e| format!("zstd: {e}"))?.single_frame();
                decoder.window_log_max(ZSTD_WINDOW).map_err(|e| format!("zstd: {e}"))?;
                all(decoder, len, "zstd")?
            }
            Packing::Lzo => lzo(packed, len, sector as usize).map_err(|e| format!("lzo: {e}"))?,
        };
        out.resize(len, 0);
        Ok(out)
    }
}

fn all(decoder: impl Read, len: usize, name: &str) -> Result<Vec<u8>, String> {
    let mut out = Vec::new();
    let read = decoder.take(len as u64).read_to_end(&mut out);
    read.map(|_| out).map_err(|e| format!("{name}: {e}"))
}

/// A length in all, then blocks with their lengths, each of which makes a sector. No length reaches over the end of
/// a sector.
fn lzo(packed: &[u8], len: usize, sector: usize) -> Result<Vec<u8>, &'static str> {
    const LENGTH: usize = 4;
    let total = le32(packed, 0) as usize;
    if total < LENGTH || total > packed.len() {
        return Err("invalid length");
    }
    let (mut at, mut out, mut done) = (LENGTH, vec![0; len], 0);
    while at < total && done < len {
        let left = sector - at % sector;
        if left < LENGTH {
            at += left;
        }
        let block = le32(packed, at) as usize;
        let end = at + LENGTH + block;
        if end > total || block == 0 {
            return Err("invalid length of a block");
        }
        let to = (done + sector).min(len);
        let part = part(packed, at + LENGTH, block);
        done += decompress_some(part, out.get_mut(done..to).unwrap_or_default())?;
        at = end;
    }
    out.truncate(done);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn what_was_compressed_comes_back_and_not_more() {
        let data: Vec<u8> = (0..100_000u32).map(|i| (i / 7 % 251) as u8).collect();
        let mut zlib = flate2::write::ZlibEncoder::new(Vec::new(), Default::default());
        zlib.write_all(&data).unwrap();
        let mut zlib = zlib.finish().unwrap();
        let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 3).unwrap();
        encoder.window_log(ZSTD_WINDOW).unwrap();
        encoder.write_all(&data).unwrap();
        let mut packed = encoder.finish().unwrap();
        // Zeros follow up to the end of a sector.
        zlib.extend([0; 100]);
        packed.extend([0; 100]);
        for (kind, packed) in [(Packing::Zlib, zlib), (Packing::Zstd, packed)] {
            let found = kind.unpack(&packed, 102_400, 4096).unwrap();
            assert!(found[..100_000] == data && found[100_000..].iter().all(|b| *b == 0));
            assert!(kind.unpack(&packed, 5000, 4096).unwrap() == data[..5000]);
            assert!(kind.unpack(&packed[..packed.len() / 2], 102_400, 4096).is_err(), "{kind:?}");
        }
    }

    #[test]
    fn blocks_of_lzo_begin_anew_in_a_sector() {
        // A block: "abcd", then its end.
        let block = [21, b'a', b'b', b'c', b'd', 17, 0, 0];
        let packed = |total: u32| {
            [&total.to_le_bytes()[..], &8u32.to_le_bytes(), &block, &8u32.to_le_bytes(), &block]
                .concat()
        };
        let found = Packing::Lzo.unpack(&packed(28), 16, 4).unwrap();
        assert_eq!(found, b"abcdabcd\0\0\0\0\0\0\0\0");
        for bad in [packed(3), packed(29), packed(27), vec![]] {
            assert!(Packing::Lzo.unpack(&bad, 16, 4).is_err());
        }
    }
}
