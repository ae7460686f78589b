//! Compressing one cluster.

use flate2::{Compress, FlushCompress, Status};

use super::Compression;

/// QEMU inflates with a window of 4 KiB (`inflateInit2(…, -12)`), so more must not be used.
const WINDOW_BITS: u8 = 12;
/// The level of QEMU's own tools (Z_DEFAULT_COMPRESSION and ZSTD's default).
const ZLIB_LEVEL: u32 = 6;
const ZSTD_LEVEL: i32 = 3;

/// A worker's compressor.
pub(super) enum Compressor {
    /// Nothing is compressed.
    None,
    /// Raw deflate.
    Zlib(Box<Compress>),
    /// Zstandard.
    Zstd(Box<zstd::bulk::Compressor<'static>>),
}

impl Compressor {
    /// One for `kind`.
    ///
    /// # Errors
    /// A text, if zstd cannot be set up.
    pub(super) fn new(kind: Compression) -> Result<Self, String> {
        Ok(match kind {
            Compression::None => Compressor::None,
            Compression::Zlib => {
                let level = flate2::Compression::new(ZLIB_LEVEL);
                let deflate = Compress::new_with_window_bits(level, false, WINDOW_BITS);
                Compressor::Zlib(Box::new(deflate))
            }
            Compression::Zstd => {
                let zstd = zstd::bulk::Compressor::new(ZSTD_LEVEL).map_err(|e| e.to_string())?;
                Compressor::Zstd(Box::new(zstd))
            }
        })
    }

    /// Compresses `cluster` into `out`, whose length is the limit. The compressed length, or
    /// `None` if it does not fit or nothing is to be compressed.
    pub(super) fn compress(&mut self, cluster: &[u8], out: &mut [u8]) -> Option<usize> {
        match self {
            Compressor::None => None,
            Compressor::Zlib(c) => {
                c.reset();
                let status = c.compress(cluster, out, FlushCompress::Finish).ok()?;
                (status == Status::StreamEnd).then_some(c.total_out() as usize)
            }
            Compressor::Zstd(c) => c.compress_to_buffer(cluster, out).ok(),
        }
    }
}
