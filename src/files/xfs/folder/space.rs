//! Which blocks of entries a folder has, by what is noted of the free space in each: one that lost its last entry is
//! given back, and leaves a hole. Any other hole is damage.

use std::ops::Range;

use super::super::super::bytes::{be16, be32, part};
use super::super::blocks::logical;
use super::super::header::INDEX;
use super::super::inode::{Fork, Inode};
use super::super::volume::Volume;
use super::entries::HEADER;
use super::index::INDEX_AT;
use crate::error::Result;

/// Where in a folder's bytes the list of free space begins, where it is not in the only leaf of the index.
const FREE_AT: u64 = 64 << 30;
/// The only leaf of an index, by version; the free space is noted at its end.
const ONLY_LEAF: [u16; 2] = [0xd2f1, 0x3df1];
/// How many blocks the leaf has noted.
const TAIL: usize = 4;
/// Bytes before the first note in a block of the list, by version.
const HEAD: [usize; 2] = [16, 64];
/// What is noted of a block that was given back.
const GIVEN_BACK: u16 = 0xffff;
/// Bytes of a note.
const NOTE: usize = 2;

/// Whether all of these blocks of a folder were given back.
///
/// # Errors
/// `Corrupt` if that is not noted anywhere, or what reading the point says.
pub(super) fn are_given_back(
    volume: &Volume,
    inode: &Inode,
    fork: &Fork<'_>,
    blocks: Range<u64>,
) -> Result<bool> {
    let (log, count) = (volume.sup.block_log, 1 << volume.sup.dir_log);
    let version = usize::from(volume.sup.v5);
    let (leaf, _) = logical(volume, inode, fork, INDEX_AT >> log, count, INDEX)?;
    if Some(&be16(&leaf, 8)) == ONLY_LEAF.get(version) {
        let end = leaf.len().saturating_sub(TAIL);
        let noted = (be32(&leaf, end) as usize).min(end / NOTE);
        return Ok(all(part(&leaf, end - noted * NOTE, noted * NOTE), blocks));
    }
    let head = HEAD.get(version).copied().unwrap_or_default();
    let per = ((leaf.len() - head) / NOTE) as u64;
    let mut at = blocks.start;
    // Each step needs a block that is there.
    while at < blocks.end {
        let number = at / per;
        let (notes, _) =
            logical(volume, inode, fork, (FREE_AT >> log) + number * count, count, HEADER)?;
        let end = (number + 1).saturating_mul(per).min(blocks.end);
        if !all(part(&notes, head, notes.len()), at - number * per..end - number * per) {
            return Ok(false);
        }
        at = end;
    }
    Ok(true)
}

/// Whether all these numbers are noted as given back.
fn all(notes: &[u8], mut blocks: Range<u64>) -> bool {
    blocks.all(|i| {
        let note = usize::try_from(i).ok().and_then(|i| notes.get(i * NOTE..(i + 1) * NOTE));
        note.is_some_and(|note| be16(note, 0) == GIVEN_BACK)
    })
}
