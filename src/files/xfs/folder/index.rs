//! The hash index of a folder: from a name to the entries that may have it. What it says is verified by the
//! name; what it does not say proves nothing.

use super::super::super::bytes::be32;
use super::super::super::tree::NodeId;
use super::super::blocks::logical;
use super::super::hashed::{Block, Leaf, leaf_of, name_hash};
use super::super::inode::{Fork, Inode};
use super::super::volume::Volume;
use super::entries::{HEADER, leads, named};
use crate::error::Result;

/// Where in a folder's bytes its entries end and its index begins.
pub(super) const INDEX_AT: u64 = 32 << 30;
/// Hash and place of an entry.
const ENTRY: usize = 8;
/// Leaves that have names of the same hash: more are searched entry by entry.
const MAX_LEAVES: usize = 8;
/// Entries with the same hash that are looked at.
const MAX_SAME: usize = 256;

/// The node of a name; `None` if the index does not lead to it.
///
/// # Errors
/// As reading the folder.
pub(super) fn find(
    volume: &Volume,
    inode: &Inode,
    fork: &Fork<'_>,
    name: &[u8],
) -> Result<Option<NodeId>> {
    let hash = name_hash(name);
    let count = 1 << volume.sup.dir_log;
    let root = INDEX_AT >> volume.sup.block_log;
    let mut leaf = leaf_of(volume, inode, fork, (root, count), hash, Leaf::Folder)?;
    let mut places = Vec::new();
    for _ in 0..MAX_LEAVES {
        let goes_on = collect(&leaf, hash, &mut places);
        if !goes_on || leaf.next == 0 || places.len() > MAX_SAME {
            break;
        }
        leaf = Block::read(volume, inode, fork, u64::from(leaf.next), count, Leaf::Folder)?;
        if !leaf.is_leaf {
            break;
        }
    }
    // The first of several comes first in the list of names, too.
    places.sort_unstable();
    for place in places.into_iter().take(MAX_SAME) {
        if let Some(number) = entry(volume, inode, fork, u64::from(place) * 8, name)? {
            return Ok(Some(NodeId { tree: 0, number }));
        }
    }
    Ok(None)
}

/// Adds the places of all entries with this hash; whether the next leaf may have more.
fn collect(leaf: &Block, hash: u32, places: &mut Vec<u32>) -> bool {
    let all = leaf.entries(ENTRY);
    let same = all.clone().filter(|e| be32(e, 0) == hash).map(|e| be32(e, 4));
    // A place of 0 was freed.
    places.extend(same.filter(|place| *place != 0).take(MAX_SAME));
    all.last().is_none_or(|last| be32(last, 0) == hash)
}

/// The number of the entry at this byte of the folder, if it has the name.
fn entry(
    volume: &Volume,
    inode: &Inode,
    fork: &Fork<'_>,
    offset: u64,
    name: &[u8],
) -> Result<Option<u64>> {
    let (log, step) = (volume.sup.block_log, 1 << volume.sup.dir_log);
    let block = (offset >> log) / step * step;
    let (bytes, _) = logical(volume, inode, fork, block, step, HEADER)?;
    let inside = (offset - (block << log)) as usize;
    let found = named(volume, &bytes, inside, name);
    Ok(found.filter(|number| leads(volume, *number)))
}
