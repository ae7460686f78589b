//! Trees by the hash of a name: the index of folders, and the attributes of an inode.

use super::super::bytes::{be16, be32, part};
use super::blocks::{invalid, logical};
use super::header::INDEX;
use super::inode::{Fork, Inode};
use super::volume::Volume;
use crate::error::Result;

/// The deepest tree that can be.
const MAX_LEVEL: u16 = 5;
/// Bytes before the entries, by version.
const HEAD: usize = 16;
const WIDE_HEAD: usize = 64;
/// Hash and block of what is below.
const ENTRY: usize = 8;

/// Magic numbers, by version.
const NODE: [u16; 2] = [0xfebe, 0x3ebe];

/// What the leaves of a tree are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Leaf {
    /// Of a folder's index.
    Folder,
    /// With attributes.
    Attributes,
}

impl Leaf {
    /// Magic numbers, by version: a folder's only leaf has its own.
    fn magics(self, v5: bool) -> [u16; 2] {
        match (self, v5) {
            (Leaf::Folder, false) => [0xd2f1, 0xd2ff],
            (Leaf::Folder, true) => [0x3df1, 0x3dff],
            (Leaf::Attributes, false) => [0xfbee; 2],
            (Leaf::Attributes, true) => [0x3bee; 2],
        }
    }
}

/// What a name is found by.
pub(super) fn name_hash(name: &[u8]) -> u32 {
    name.iter().fold(0u32, |hash, byte| hash.rotate_left(7) ^ u32::from(*byte))
}

/// A block of such a tree.
pub(super) struct Block {
    pub bytes: Vec<u8>,
    /// Where it is, in bytes, for messages.
    pub at: u64,
    /// The leaf after it, as a block of the fork; 0 if it is the last.
    pub next: u32,
    pub is_leaf: bool,
    /// Entries that it says it has, where that is in all such blocks.
    pub count: usize,
    level: u16,
    head: usize,
}

impl Block {
    /// Reads `count` blocks of the fork from `block` on as one.
    ///
    /// # Errors
    /// `Corrupt` if it is none of such a tree; what reading the point says.
    pub(super) fn read(
        volume: &Volume,
        inode: &Inode,
        fork: &Fork<'_>,
        block: u64,
        count: u64,
        leaf: Leaf,
    ) -> Result<Block> {
        let (bytes, at) = logical(volume, inode, fork, block, count, INDEX)?;
        let v5 = volume.sup.v5;
        let magic = be16(&bytes, 8);
        let is_leaf = leaf.magics(v5).contains(&magic);
        if !is_leaf && magic != NODE[usize::from(v5)] {
            return Err(invalid(volume, inode, "no block of a hash tree", at));
        }
        let (head, counts) = if v5 { (WIDE_HEAD, 56) } else { (HEAD, 12) };
        let level = if is_leaf { 0 } else { be16(&bytes, counts + 2) };
        let (next, count) = (be32(&bytes, 0), usize::from(be16(&bytes, counts)));
        Ok(Block { at, next, is_leaf, count, level, head, bytes })
    }

    /// Its entries of `len` bytes, as many as fit.
    pub(super) fn entries(&self, len: usize) -> impl Iterator<Item = &[u8]> + Clone {
        let all = self.bytes.get(self.head..).unwrap_or_default();
        all.chunks_exact(len).take(self.count)
    }

    /// Of a node: the block below that has this hash first.
    fn below(&self, hash: u32) -> Option<u32> {
        let mut entries = self.entries(ENTRY);
        let last = entries.clone().last()?;
        let found = entries.find(|e| be32(e, 0) >= hash).unwrap_or(last);
        Some(be32(part(found, 4, 4), 0))
    }
}

/// The first leaf that may have names with this hash, from the root on that is at block `root.0` and takes `root.1`
/// blocks. Levels fall with each step.
///
/// # Errors
/// `Corrupt`, or what reading the point says.
pub(super) fn leaf_of(
    volume: &Volume,
    inode: &Inode,
    fork: &Fork<'_>,
    root: (u64, u64),
    hash: u32,
    leaf: Leaf,
) -> Result<Block> {
    let mut block = Block::read(volume, inode, fork, root.0, root.1, leaf)?;
    if block.level > MAX_LEVEL {
        return Err(invalid(volume, inode, "a hash tree that is too deep", block.at));
    }
    while !block.is_leaf {
        let below = block.below(hash).filter(|_| block.level > 0);
        let below = below.ok_or_else(|| invalid(volume, inode, "an empty hash tree", block.at))?;
        let next = Block::read(volume, inode, fork, u64::from(below), root.1, leaf)?;
        if next.level != block.level - 1 {
            return Err(invalid(volume, inode, "an inconsistent hash tree", next.at));
        }
        block = next;
    }
    Ok(block)
}

#[cfg(test)]
mod tests {
    use super::super::made::{FILE, Made, Parts, extent, inode};
    use super::*;

    #[test]
    fn names_have_the_hash_of_the_book() {
        // As `xfs_db -c "hash NAME"` prints it.
        assert_eq!(name_hash(b"."), 0x2e);
        assert_eq!(name_hash(b".."), 0x172e);
        assert_eq!(name_hash(b"name"), 0x0dd8_76e5);
        assert_eq!(name_hash(b"a-name-that-is-not-so-short-77"), 0x83e9_ee89);
    }

    /// A node of this level with hashes and blocks.
    fn node(v5: bool, level: u16, entries: &[(u32, u32)]) -> Vec<u8> {
        let mut bytes = vec![0; 1024];
        let (count, mut at) = if v5 { (56, 64) } else { (12, 16) };
        bytes[8..10].copy_from_slice(&NODE[usize::from(v5)].to_be_bytes());
        bytes[count..count + 2].copy_from_slice(&(entries.len() as u16).to_be_bytes());
        bytes[count + 2..count + 4].copy_from_slice(&level.to_be_bytes());
        for (hash, block) in entries {
            bytes[at..at + 4].copy_from_slice(&hash.to_be_bytes());
            bytes[at + 4..at + 8].copy_from_slice(&block.to_be_bytes());
            at += 8;
        }
        bytes
    }

    fn leaf(v5: bool) -> Vec<u8> {
        let mut bytes = node(v5, 0, &[]);
        bytes[8..10].copy_from_slice(&Leaf::Attributes.magics(v5)[0].to_be_bytes());
        bytes
    }

    #[test]
    fn levels_fall_and_hashes_lead() {
        for v5 in [true, false] {
            let mut made = Made::new(v5);
            made.block(50, INDEX, node(v5, 2, &[(10, 1), (99, 2)]));
            made.block(51, INDEX, node(v5, 1, &[(10, 3)]));
            made.block(52, INDEX, node(v5, 1, &[(50, 4), (99, 5)]));
            [53, 54, 55].iter().for_each(|b| made.block(*b, INDEX, leaf(v5)));
            // Itself, too deep, nothing, and a leaf where a node should be.
            made.block(60, INDEX, node(v5, 1, &[(9, 10)]));
            made.block(61, INDEX, node(v5, 9, &[(9, 10)]));
            made.block(62, INDEX, node(v5, 1, &[]));
            made.block(63, INDEX, node(v5, 3, &[(9, 3)]));
            made.block(64, INDEX, node(v5, 0, &[(9, 3)]));
            let volume = made.volume();
            let map = extent(0, 50, 20, true);
            let file = inode(v5, Parts { data: &map, extents: [1, 0], ..FILE });
            let fork = file.data().unwrap();
            let find =
                |root, hash| leaf_of(&volume, &file, &fork, (root, 1), hash, Leaf::Attributes);
            for (hash, block) in [(0, 53), (10, 53), (11, 54), (50, 54), (51, 55), (100, 55)] {
                assert_eq!(find(0, hash).unwrap().at, block * 1024, "{hash}");
            }
            for root in 10..=14 {
                assert!(find(root, 1).is_err(), "{root}");
            }
            let folder = Leaf::Folder;
            assert!(Block::read(&volume, &file, &fork, 3, 1, folder).is_err(), "another's leaf");
        }
    }
}
