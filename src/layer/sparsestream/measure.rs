//! How long an lz4 frame is, where no list says so: from its descriptor and the sizes of its blocks.

use super::frame::{corrupt, cut};
use crate::error::{Kind, Result};
use crate::storage::ReadAt;

/// "lz4 frame" in little-endian.
pub(super) const MAGIC: [u8; 4] = 0x184d_2204u32.to_le_bytes();
/// Bits of a frame's descriptor: a dictionary's number, a checksum of the content, the content's
/// size, and checksums of blocks follow.
const HAS_DICTIONARY: u8 = 1;
const HAS_CHECKSUM: u8 = 1 << 2;
/// See [`HAS_DICTIONARY`].
pub(super) const HAS_SIZE: u8 = 1 << 3;
const HAS_BLOCK_CHECKSUMS: u8 = 1 << 4;
/// A block's size has this bit where it is not compressed.
const PLAIN_BLOCK: u32 = 1 << 31;
/// The format's largest block.
const MAX_BLOCK: u32 = 4 << 20;

/// An lz4 frame.
pub(super) struct Measured {
    /// Bytes that it takes.
    pub len: u64,
    /// Bytes that it holds, if it says so.
    pub content: Option<u64>,
}

/// Measures the frame at `host`.
///
/// # Errors
/// `Truncated` if the file ends in it, `Corrupt` if there is none; without the file's name.
pub(super) fn measure(storage: &dyn ReadAt, host: u64) -> Result<Measured> {
    let head: [u8; 6] = bytes(storage, host)?;
    let Some(flags) = head.strip_prefix(&MAGIC).and_then(|rest| rest.first()).copied() else {
        return Err(corrupt(host, "there is no lz4 frame where one has to be"));
    };
    let has = |bit: u8| flags & bit != 0;
    let mut at = host + 6;
    let mut content = None;
    if has(HAS_SIZE) {
        content = Some(u64::from_le_bytes(bytes(storage, at)?));
        at += 8;
    }
    // The descriptor ends with a byte of checksum.
    at += if has(HAS_DICTIONARY) { 5 } else { 1 };
    loop {
        let size = u32::from_le_bytes(bytes(storage, at)?);
        at += 4;
        let size = size & !PLAIN_BLOCK;
        if size == 0 {
            break;
        }
        if size > MAX_BLOCK {
            return Err(corrupt(at, "a block of an lz4 frame is too large"));
        }
        at += u64::from(size) + if has(HAS_BLOCK_CHECKSUMS) { 4 } else { 0 };
    }
    at += if has(HAS_CHECKSUM) { 4 } else { 0 };
    if at > storage.len() {
        return Err(cut(host, "the stream ends inside an lz4 frame"));
    }
    Ok(Measured { len: at - host, content })
}

fn bytes<const N: usize>(storage: &dyn ReadAt, at: u64) -> Result<[u8; N]> {
    let mut out = [0; N];
    if storage.len().saturating_sub(at) < N as u64 {
        return Err(cut(at, "the stream ends inside an lz4 frame"));
    }
    storage.read_exact_at(&mut out, at).map_err(|e| match e.kind() {
        Kind::Truncated => cut(at, "the stream ends inside an lz4 frame"),
        _ => e,
    })?;
    Ok(out)
}
