//! Nodes of trees: keys, items, and the checks without which none is used.

use std::sync::Arc;

use super::super::bytes::{byte, le32, le64, part};
use super::superblock::{SUM_FIELD, Super};

/// Bytes of a node's header, of an item's head, and of a pointer to a child.
const HEADER: usize = 101;
const ITEM: usize = 25;
const POINTER: usize = 33;
/// The first number of a tree that users make.
const FIRST_FREE: u64 = 256;
/// The tree of files that there is from the beginning.
pub(super) const FS_TREE: u64 = 5;

/// What things are found by, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    pub object: u64,
    pub kind: u8,
    pub offset: u64,
}

impl Key {
    /// Above all others.
    pub(super) const MAX: Key = Key { object: u64::MAX, kind: u8::MAX, offset: u64::MAX };
    /// Below all others.
    pub(super) const MIN: Key = Key { object: 0, kind: 0, offset: 0 };

    fn read(bytes: &[u8]) -> Key {
        Key { object: le64(bytes, 0), kind: byte(bytes, 8), offset: le64(bytes, 9) }
    }

    /// The one in a directory entry.
    pub(super) fn of_entry(bytes: &[u8]) -> Key {
        Key::read(bytes)
    }
}

/// Whether a tree of this number is one of files.
pub(super) fn is_files(tree: u64) -> bool {
    tree == FS_TREE || (FIRST_FREE..=u64::MAX - FIRST_FREE).contains(&tree)
}

/// A node whose contents were checked. Cheap to clone.
#[derive(Clone)]
pub(super) struct Node(Arc<[u8]>);

impl Node {
    /// A node that was checked before, by its bytes.
    pub(super) fn trusted(bytes: Arc<[u8]>) -> Node {
        Node(bytes)
    }

    /// Checks what is in a node, which should be at `logical`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(super) fn check(bytes: &[u8], sup: &Super, logical: u64) -> Result<(), &'static str> {
        if !sup.checksum.is_right(part(bytes, SUM_FIELD, bytes.len()), bytes) {
            return Err("bad checksum");
        }
        if le64(bytes, 0x30) != logical || part(bytes, 0x20, 16) != sup.node_id {
            return Err("it belongs elsewhere");
        }
        let count = le32(bytes, 0x60) as usize;
        let each = if byte(bytes, 0x64) == 0 { ITEM } else { POINTER };
        if count > (bytes.len() - HEADER) / each {
            return Err("invalid number of items");
        }
        let keys = (0..count).map(|i| Key::read(part(bytes, HEADER + i * each, 17)));
        let mut before = None;
        for key in keys {
            if before.is_some_and(|b| b >= key) {
                return Err("items in a wrong order");
            }
            before = Some(key);
        }
        let heads = HEADER + count * ITEM;
        let outside = |i: usize| {
            let at = HEADER + i * ITEM;
            let from = HEADER + le32(bytes, at + 17) as usize;
            from < heads || from + le32(bytes, at + 21) as usize > bytes.len()
        };
        match each == ITEM && (0..count).any(outside) {
            true => Err("an item outside of it"),
            false => Ok(()),
        }
    }

    pub(super) fn level(&self) -> u8 {
        byte(&self.0, 0x64)
    }

    pub(super) fn generation(&self) -> u64 {
        le64(&self.0, 0x50)
    }

    /// The tree that it was made for; the trees of snapshots share nodes.
    pub(super) fn owner(&self) -> u64 {
        le64(&self.0, 0x58)
    }

    pub(super) fn count(&self) -> usize {
        le32(&self.0, 0x60) as usize
    }

    fn head(&self, index: usize) -> &[u8] {
        let each = if self.level() == 0 { ITEM } else { POINTER };
        part(&self.0, HEADER + index * each, each)
    }

    pub(super) fn key(&self, index: usize) -> Key {
        Key::read(self.head(index))
    }

    /// How many keys are at or below this one.
    pub(super) fn upper_bound(&self, key: Key) -> usize {
        let (mut low, mut high) = (0, self.count());
        while low < high {
            let middle = low + (high - low) / 2;
            match self.key(middle) <= key {
                true => low = middle + 1,
                false => high = middle,
            }
        }
        low
    }

    /// The child that a pointer leads to: its logical address, and its generation.
    pub(super) fn child(&self, index: usize) -> (u64, u64) {
        let head = self.head(index);
        (le64(head, 17), le64(head, 25))
    }

    /// The data of an item.
    pub(super) fn data(&self, index: usize) -> &[u8] {
        let head = self.head(index);
        part(&self.0, HEADER + le32(head, 17) as usize, le32(head, 21) as usize)
    }
}
