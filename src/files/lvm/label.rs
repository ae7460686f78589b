//! The label of a physical volume, and the text that its metadata area has.

use super::super::bytes::{le32, le64, part};
use super::super::crc::crc32;
use super::super::source::Source;
use crate::error::{Kind, Result};

/// With which LVM begins its checksums.
const CRC: u32 = 0xf597_a6cf;
const SECTOR: usize = 512;
/// The label is in one of the first sectors.
const SECTORS: usize = 4;
/// Bytes of the head of a metadata area; the text begins behind it, and goes round behind the end.
const HEAD: u64 = 512;
/// Text that a group may have: hundreds of volumes take some hundred KiB.
const MAX_TEXT: u64 = 8 << 20;
/// Areas that a physical volume may list.
const MAX_AREAS: usize = 16;

/// A physical volume.
pub(super) struct Physical {
    /// Its bytes.
    pub source: Source,
    /// Its id, without hyphens.
    pub id: String,
    /// The description of its group; empty if it keeps none (others do).
    pub text: Vec<u8>,
}

impl Physical {
    /// Reads label and metadata.
    ///
    /// # Errors
    /// `Corrupt` if they are wrong; what reading the point says.
    pub(super) fn read(source: &Source) -> Result<Physical> {
        let start = source.meta(0, SECTOR * SECTORS)?;
        let bad = |what: &str| source.error(Kind::Corrupt, what, 0);
        let mut sectors = start.chunks_exact(SECTOR);
        let label = sectors.find(|s| part(s, 0, 8) == b"LABELONE" && part(s, 24, 8) == b"LVM2 001");
        let label = label.ok_or_else(|| bad("no LVM label"))?;
        if le32(label, 16) != crc32(CRC, part(label, 20, SECTOR)) {
            return Err(bad("bad checksum of the LVM label"));
        }
        let head = part(label, le32(label, 20) as usize, SECTOR);
        let id = String::from_utf8_lossy(part(head, 0, 32)).into_owned();
        let text = newest_text(source, head)?;
        Ok(Physical { source: source.clone(), id, text })
    }
}

/// The text of the first metadata area that is right.
fn newest_text(source: &Source, head: &[u8]) -> Result<Vec<u8>> {
    let pair = |at: usize| (le64(head, at), le64(head, at + 8));
    let mut at = 40;
    // Data areas come first; a pair of zeros ends each list.
    let mut lists = 0;
    let mut error = None;
    for _ in 0..MAX_AREAS {
        let (offset, size) = pair(at);
        at += 16;
        match (offset, lists) {
            (0, 0) => lists = 1,
            (0, _) => break,
            (_, 0) => {}
            _ => match area(source, offset, size) {
                Ok(text) if !text.is_empty() => return Ok(text),
                Ok(_) => {}
                Err(e) => error = Some(e),
            },
        }
    }
    error.map_or(Ok(Vec::new()), Err)
}

fn area(source: &Source, offset: u64, size: u64) -> Result<Vec<u8>> {
    let bad = |what: &str| source.error(Kind::Corrupt, what, offset);
    source.check(offset, size)?;
    let head = source.meta(offset, HEAD as usize)?;
    let right = part(&head, 4, 16) == b" LVM2 x[5A%r0N*>"
        && le32(&head, 0) == crc32(CRC, part(&head, 4, HEAD as usize));
    if !right {
        return Err(bad("invalid LVM metadata header"));
    }
    let (at, len, sum) = (le64(&head, 40), le64(&head, 48), le32(&head, 56));
    if at == 0 || len == 0 {
        return Ok(Vec::new());
    }
    if len > MAX_TEXT || at < HEAD || at >= size || len > size - HEAD {
        return Err(bad("the LVM metadata has an invalid offset"));
    }
    let first = len.min(size - at);
    let mut text = source.meta(offset + at, first as usize)?;
    text.extend(source.meta(offset + HEAD, (len - first) as usize)?);
    match crc32(CRC, &text) == sum {
        true => Ok(text),
        false => Err(bad("bad checksum of the LVM metadata")),
    }
}
