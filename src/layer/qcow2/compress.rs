//! Decompressing one qcow2 cluster.
//!
//! The compressed length in an L2 entry counts whole sectors, so bytes of other clusters may
//! follow the stream: it ends when the output is full. Contexts are kept per thread.

use std::cell::RefCell;

use flate2::{Decompress, FlushDecompress, Status};
use zstd::stream::raw::{DParameter, Decoder, InBuffer, Operation, OutBuffer};

use super::header::Compression;

/// A frame may ask for a window of at most 8 MiB (as a power of two). A cluster has 2 MiB at most, so
/// no writer needs more, and zstd's own limit is 128 MiB for each thread.
const WINDOW_LOG_MAX: u32 = 23;

thread_local! {
    static INFLATE: RefCell<Decompress> = RefCell::new(Decompress::new(false));
    static ZSTD: RefCell<Option<Decoder<'static>>> = const { RefCell::new(None) };
}

/// Decompresses `input` until `out` is full.
///
/// # Errors
/// A text that says why the stream is not what it should be.
pub(crate) fn decompress(kind: Compression, input: &[u8], out: &mut [u8]) -> Result<(), String> {
    match kind {
        Compression::Zlib => INFLATE.with_borrow_mut(|d| inflate(d, input, out)),
        Compression::Zstd => ZSTD.with_borrow_mut(|slot| {
            let decoder = match slot {
                Some(d) => d,
                None => slot.insert(new_decoder().map_err(|e| e.to_string())?),
            };
            unzstd(decoder, input, out)
        }),
    }
}

fn new_decoder() -> std::io::Result<Decoder<'static>> {
    let mut decoder = Decoder::new()?;
    decoder.set_parameter(DParameter::WindowLogMax(WINDOW_LOG_MAX))?;
    Ok(decoder)
}

fn inflate(d: &mut Decompress, input: &[u8], out: &mut [u8]) -> Result<(), String> {
    d.reset(false);
    loop {
        let (read, written) = (d.total_in() as usize, d.total_out() as usize);
        let status = d
            .decompress(&input[read..], &mut out[written..], FlushDecompress::None)
            .map_err(|e| format!("deflate stream: {e}"))?;
        if d.total_out() as usize == out.len() {
            return Ok(());
        }
        let stuck = d.total_in() as usize == read && d.total_out() as usize == written;
        if status == Status::StreamEnd || stuck {
            return Err(short("deflate", d.total_out() as usize, out.len()));
        }
    }
}

fn unzstd(d: &mut Decoder<'static>, input: &[u8], out: &mut [u8]) -> Result<(), String> {
    d.reinit().map_err(|e| format!("zstd: {e}"))?;
    let want = out.len();
    let mut src = InBuffer::around(input);
    let mut dst = OutBuffer::around(out);
    while dst.pos() < want {
        let (read, written) = (src.pos(), dst.pos());
        // A single call may return short even though there is more to come.
        let hint = d.run(&mut src, &mut dst).map_err(|e| format!("zstd stream: {e}"))?;
        let stuck = src.pos() == read && dst.pos() == written;
        if dst.pos() < want && (hint == 0 || stuck) {
            return Err(short("zstd", dst.pos(), want));
        }
    }
    Ok(())
}

fn short(what: &str, got: usize, want: usize) -> String {
    format!("the {what} stream ends after {got} of {want} bytes")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn pattern(len: usize) -> Vec<u8> {
        (0..len).map(|i| ((i * 31) ^ (i >> 7)) as u8).collect()
    }

    #[test]
    fn a_frame_may_not_ask_for_any_amount_of_memory() {
        let data = pattern(2 << 20);
        for (log, reads) in [(21, true), (23, true), (24, false), (27, false)] {
            // Without the size in the frame, the window is what it asks for.
            let mut encoder = zstd::stream::Encoder::new(Vec::new(), 3).unwrap();
            encoder.window_log(log).unwrap();
            encoder.write_all(&data).unwrap();
            let packed = encoder.finish().unwrap();
            let mut out = vec![0; data.len()];
            let read = decompress(Compression::Zstd, &packed, &mut out);
            assert_eq!(read.is_ok(), reads, "{log}: {read:?}");
            assert!(!reads || out == data);
        }
    }

    #[test]
    fn large_clusters_come_out_whole_with_garbage_behind_the_stream() {
        for len in [512, 65536, 256 << 10, 2 << 20] {
            let data = pattern(len);
            let mut z = flate2::write::DeflateEncoder::new(Vec::new(), Default::default());
            z.write_all(&data).unwrap();
            let mut deflated = z.finish().unwrap();
            let mut zstded = zstd::stream::encode_all(&data[..], 3).unwrap();
            for (kind, bytes) in
                [(Compression::Zlib, &mut deflated), (Compression::Zstd, &mut zstded)]
            {
                bytes.extend_from_slice(&[0x5a; 300]);
                let mut out = vec![0; len];
                decompress(kind, bytes, &mut out).unwrap();
                assert!(out == data, "{kind:?} {len}");
                let mut longer = vec![0; len + 1];
                assert!(decompress(kind, bytes, &mut longer).is_err());
                assert!(decompress(kind, &bytes[..bytes.len() / 3], &mut out).is_err());
            }
        }
    }
}
