//! Where the blocks of a fork are: by a list of extents in the inode, or by a tree of them.
//!
//! The level of the tree falls with each step, and each of its blocks says what it is for: so there is no way
//! round in a circle, and no block in two places.

use std::sync::Arc;

use super::super::bytes::{be16, be32, be64, part};
use super::super::runs::Run;
use super::header::MAP;
use super::inode::{Fork, Form, Inode};
use super::volume::Volume;
use crate::error::{Error, Result};

/// Blocks of a file are numbered with 54 bits.
const END: u64 = 1 << 54;
/// The deepest tree that can be is less deep.
const MAX_LEVEL: u16 = 16;
/// An extent, and a key with its pointer.
const ENTRY: usize = 16;
/// Begin of a block: with the fields of version 5.
const HEAD: usize = 24;
const WIDE_HEAD: usize = 72;
/// Begin of the root in an inode.
const ROOT_HEAD: usize = 4;

/// What is at block `block` of a fork, and the blocks after it.
///
/// # Errors
/// `Corrupt`, or what reading the point says.
pub(super) fn run(volume: &Volume, inode: &Inode, fork: &Fork<'_>, block: u64) -> Result<Run> {
    Ok(mapped(volume, inode, fork, block)?.run)
}

/// A run, and whether it reads as zeros because it was only preallocated.
pub(super) struct Mapped {
    pub run: Run,
    pub preallocated: bool,
}

impl Mapped {
    fn hole(block: u64, next: u64) -> Mapped {
        Mapped { run: Run::hole(block, next), preallocated: false }
    }
}

/// As [`run`], with more about what reads as zeros.
///
/// # Errors
/// As [`run`].
pub(super) fn mapped(
    volume: &Volume,
    inode: &Inode,
    fork: &Fork<'_>,
    block: u64,
) -> Result<Mapped> {
    if block >= END {
        return Ok(Mapped::hole(block, u64::MAX));
    }
    match fork.form {
        Form::Extents => {
            let len = usize::try_from(fork.extents).ok().and_then(|n| n.checked_mul(ENTRY));
            let len = len.filter(|n| *n <= fork.bytes.len());
            let len = len.ok_or_else(|| volume.bad(inode, "has more extents than fit into it"))?;
            let list = Extents { bytes: part(fork.bytes, 0, len), range: (0, END) };
            list.find(volume, inode, block)
        }
        Form::Tree => tree(volume, inode, fork, block),
        Form::Device | Form::Local => Err(volume.bad(inode, "has no blocks")),
    }
}

/// A list of extents, in the inode or a leaf, and the blocks of the file that it is for.
struct Extents<'a> {
    bytes: &'a [u8],
    range: (u64, u64),
}

impl Extents<'_> {
    fn len(&self) -> usize {
        self.bytes.len() / ENTRY
    }

    /// The file's block with which an extent begins; the end of the list's range for the one after the last.
    fn begin(&self, index: usize) -> u64 {
        match index < self.len() {
            true => be64(self.bytes, index * ENTRY) << 1 >> 10,
            false => self.range.1,
        }
    }

    fn find(&self, volume: &Volume, inode: &Inode, block: u64) -> Result<Mapped> {
        let found = entry_for(self.len(), block, |i| self.begin(i));
        let (found, next) = found.map_err(|()| inconsistent(volume, inode))?;
        let Some(index) = found else { return Ok(Mapped::hole(block, next)) };
        let (high, low) =
            (be64(self.bytes, index * ENTRY), be64(self.bytes, index * ENTRY + ENTRY / 2));
        // 21 bits of length, 52 of place, 54 of begin, and one for what is preallocated.
        let (begin, count) = (self.begin(index), low & 0x1f_ffff);
        let end = begin + count;
        if begin < self.range.0 || count == 0 || end > next {
            return Err(inconsistent(volume, inode));
        }
        if block >= end {
            return Ok(Mapped::hole(block, next));
        }
        let place = volume.sup.place((high & 0x1ff) << 43 | low >> 21, count);
        let place = place.ok_or_else(|| volume.bad(inode, "has blocks beyond the end"))?;
        let written = high >> 63 == 0;
        let run = Run { count: end - block, at: written.then(|| place + (block - begin)) };
        Ok(Mapped { run, preallocated: !written })
    }
}

/// The entry of `count` that is for `block`: the last that does not begin after it, `None` if all do; and where the
/// next one begins. Fails unless they are in order, for then the answer would depend on the way of searching.
fn entry_for(
    count: usize,
    block: u64,
    begin: impl Fn(usize) -> u64,
) -> std::result::Result<(Option<usize>, u64), ()> {
    if !(0..count).all(|i| begin(i) < begin(i + 1)) {
        return Err(());
    }
    let (mut low, mut high) = (0, count);
    while low < high {
        let middle = low + (high - low) / 2;
        match begin(middle) <= block {
            true => low = middle + 1,
            false => high = middle,
        }
    }
    Ok((low.checked_sub(1), begin(low)))
}

fn inconsistent(volume: &Volume, inode: &Inode) -> Error {
    volume.bad(inode, "has an inconsistent extent tree")
}

/// A block of the tree, or its root: keys, and behind the room for all of them the pointers.
struct Node<'a> {
    bytes: &'a [u8],
    head: usize,
    count: usize,
    range: (u64, u64),
}

impl Node<'_> {
    fn begin(&self, index: usize) -> u64 {
        match index < self.count {
            true => be64(self.bytes, self.head + 8 * index),
            false => self.range.1,
        }
    }

    /// What is below the entry for `block`: its range and its place; or the hole before the first.
    fn below(&self, volume: &Volume, inode: &Inode, block: u64) -> Result<Below> {
        let found = entry_for(self.count, block, |i| self.begin(i));
        let (found, next) = found.map_err(|()| inconsistent(volume, inode))?;
        let Some(index) = found else { return Ok(Below::Hole(Run::hole(block, next))) };
        let begin = self.begin(index);
        if begin < self.range.0 {
            return Err(inconsistent(volume, inode));
        }
        let all = (self.bytes.len() - self.head) / ENTRY;
        let pointer = be64(self.bytes, self.head + 8 * (all + index));
        let place = volume.sup.place(pointer, 1);
        let place = place.ok_or_else(|| volume.bad(inode, "has an extent tree beyond the end"))?;
        Ok(Below::Block(place, (begin, next)))
    }
}

enum Below {
    Hole(Run),
    Block(u64, (u64, u64)),
}

fn tree(volume: &Volume, inode: &Inode, fork: &Fork<'_>, block: u64) -> Result<Mapped> {
    let (mut level, count) = (be16(fork.bytes, 0), usize::from(be16(fork.bytes, 2)));
    if level == 0 || level > MAX_LEVEL || count == 0 || !fits(fork.bytes, ROOT_HEAD, count) {
        return Err(volume.bad(inode, "has an invalid extent tree"));
    }
    let root = Node { bytes: fork.bytes, head: ROOT_HEAD, count, range: (0, END) };
    let mut below = root.below(volume, inode, block)?;
    loop {
        let (place, range) = match below {
            Below::Hole(run) => return Ok(Mapped { run, preallocated: false }),
            Below::Block(place, range) => (place, range),
        };
        let (bytes, head) = child(volume, inode, place, level - 1)?;
        let count = usize::from(be16(&bytes, 6));
        level -= 1;
        if level == 0 {
            let list = Extents { bytes: part(&bytes, head, count * ENTRY), range };
            return list.find(volume, inode, block);
        }
        let node = Node { bytes: &bytes, head, count, range };
        below = node.below(volume, inode, block)?;
    }
}

/// Whether so many entries fit behind the head.
fn fits(bytes: &[u8], head: usize, count: usize) -> bool {
    count <= bytes.len().saturating_sub(head) / ENTRY
}

/// A block of the tree that has to be of this level, and where its entries begin.
fn child(volume: &Volume, inode: &Inode, place: u64, level: u16) -> Result<(Arc<[u8]>, usize)> {
    let bytes = volume.map_block(MAP, place, inode)?;
    let (magic, head) = match volume.sup.v5 {
        true => (*b"BMA3", WIDE_HEAD),
        false => (*b"BMAP", HEAD),
    };
    let count = usize::from(be16(&bytes, 6));
    let is_its = !volume.sup.v5 || be64(&bytes, 56) == inode.number;
    let is_right = be32(&bytes, 0) == u32::from_be_bytes(magic) && be16(&bytes, 4) == level;
    if !is_its || !is_right || count == 0 || !fits(&bytes, head, count) {
        let what = format!("inode {}: invalid block in its extent tree", inode.number);
        let at = place << volume.sup.block_log;
        return Err(volume.source.error(crate::error::Kind::Corrupt, what, at));
    }
    Ok((bytes, head))
}

#[cfg(test)]
mod tests {
    use super::super::made::{FILE, Made, Parts, extent, inode};
    use super::*;

    fn look(volume: &Volume, inode: &Inode, block: u64) -> Result<Run> {
        run(volume, inode, &inode.data().unwrap(), block)
    }

    fn with(v5: bool, list: &[[u8; 16]], count: u16) -> Inode {
        inode(v5, Parts { data: &list.concat(), extents: [count, 0], ..FILE })
    }

    #[test]
    fn lists_have_data_holes_and_what_is_preallocated() {
        for v5 in [false, true] {
            let volume = Made::new(v5).volume();
            // The second group begins at block 128 of all, and at fsblock 1 << 7.
            let list = [extent(2, 20, 3, true), extent(5, 30, 4, false), extent(20, 129, 70, true)];
            let file = with(v5, &list, 3);
            let at = |block| look(&volume, &file, block).unwrap();
            assert_eq!(at(0), Run { count: 2, at: None });
            assert_eq!(at(2), Run { count: 3, at: Some(20) });
            assert_eq!(at(4), Run { count: 1, at: Some(22) });
            assert_eq!(at(6), Run { count: 3, at: None });
            assert_eq!(at(9), Run { count: 11, at: None });
            assert_eq!(at(25), Run { count: 65, at: Some(134) });
            assert_eq!(at(90), Run { count: END - 90, at: None });
            assert!(at(END).at.is_none() && at(u64::MAX).count >= 1);
        }
    }

    #[test]
    fn lists_that_lie_are_errors() {
        let volume = Made::new(true).volume();
        let bad = |list: &[[u8; 16]], count, block| {
            look(&volume, &with(true, list, count), block).unwrap_err().message().to_string()
        };
        // More than fit, none where one is said to be, over each other, not in order.
        assert!(bad(&[], 40, 0).contains("more extents than fit"));
        assert!(bad(&[], 1, 0).contains("inconsistent"));
        assert!(
            bad(&[extent(2, 20, 3, true), extent(4, 30, 1, true)], 2, 2).contains("inconsistent")
        );
        assert!(
            bad(&[extent(9, 20, 1, true), extent(4, 30, 1, true)], 2, 9).contains("inconsistent")
        );
        // Outside of their group: at its begin, over its end, in none; also if they were not written.
        for place in [0, 128, 127, 199, 200, 128 + 71, 2 << 7, (1 << 52) - 1] {
            for written in [true, false] {
                assert!(
                    bad(&[extent(0, place, 2, written)], 1, 0).contains("beyond the end"),
                    "{place}"
                );
            }
        }
    }

    /// A root of this level with keys and places.
    fn root(level: u16, entries: &[(u64, u64)]) -> Vec<u8> {
        let mut bytes = vec![0; 336];
        bytes[..2].copy_from_slice(&level.to_be_bytes());
        bytes[2..4].copy_from_slice(&(entries.len() as u16).to_be_bytes());
        fill(&mut bytes, 4, entries);
        bytes
    }

    fn fill(bytes: &mut [u8], head: usize, entries: &[(u64, u64)]) {
        let all = (bytes.len() - head) / 16;
        for (i, (key, place)) in entries.iter().enumerate() {
            bytes[head + 8 * i..][..8].copy_from_slice(&key.to_be_bytes());
            bytes[head + 8 * (all + i)..][..8].copy_from_slice(&place.to_be_bytes());
        }
    }

    fn block(v5: bool, level: u16, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; 1024];
        bytes[..4].copy_from_slice(if v5 { b"BMA3" } else { b"BMAP" });
        bytes[4..6].copy_from_slice(&level.to_be_bytes());
        bytes[6..8].copy_from_slice(&(count as u16).to_be_bytes());
        bytes
    }

    fn leaf(v5: bool, list: &[[u8; 16]]) -> Vec<u8> {
        let mut bytes = block(v5, 0, list.len());
        let head = if v5 { WIDE_HEAD } else { HEAD };
        bytes[head..head + 16 * list.len()].copy_from_slice(&list.concat());
        bytes
    }

    fn node(v5: bool, level: u16, entries: &[(u64, u64)]) -> Vec<u8> {
        let mut bytes = block(v5, level, entries.len());
        fill(&mut bytes, if v5 { WIDE_HEAD } else { HEAD }, entries);
        bytes
    }

    fn tree_of(v5: bool, root: &[u8]) -> Inode {
        // As many bytes as the fork of this version has.
        inode(v5, Parts { forms: [3, 2], data: root, ..FILE })
    }

    /// A root as long as the fork is.
    fn root_of(v5: bool, level: u16, entries: &[(u64, u64)]) -> Vec<u8> {
        let len = if v5 { 336 } else { 412 };
        let mut bytes = root(level, &[]);
        bytes.resize(len, 0);
        bytes[2..4].copy_from_slice(&(entries.len() as u16).to_be_bytes());
        fill(&mut bytes, 4, entries);
        bytes
    }

    #[test]
    fn trees_lead_to_leaves() {
        for v5 in [false, true] {
            let mut made = Made::new(v5);
            made.block(40, MAP, node(v5, 1, &[(0, 41), (10, 42)]));
            made.block(41, MAP, leaf(v5, &[extent(0, 50, 2, true), extent(4, 60, 2, true)]));
            made.block(42, MAP, leaf(v5, &[extent(10, 70, 5, true)]));
            made.block(43, MAP, leaf(v5, &[extent(100, 80, 1, true)]));
            made.block(44, MAP, node(v5, 1, &[(100, 43)]));
            let volume = made.volume();
            let file = tree_of(v5, &root_of(v5, 2, &[(0, 40), (100, 44)]));
            let at = |block| look(&volume, &file, block).unwrap();
            for _ in 0..2 {
                assert_eq!(at(1), Run { count: 1, at: Some(51) });
                assert_eq!(at(2), Run { count: 2, at: None });
                assert_eq!(at(6), Run { count: 4, at: None });
                assert_eq!(at(14), Run { count: 1, at: Some(74) });
                assert_eq!(at(15), Run { count: 85, at: None });
                assert_eq!(at(100), Run { count: 1, at: Some(80) });
            }
        }
    }

    #[test]
    fn trees_that_lie_are_errors() {
        let mut made = Made::new(true);
        made.block(40, MAP, node(true, 1, &[(0, 40)]));
        made.block(41, MAP, leaf(true, &[extent(3, 50, 9, true)]));
        made.block(42, MAP, leaf(true, &[]));
        made.block(43, MAP, block(true, 0, 61));
        let mut other = leaf(true, &[extent(0, 50, 1, true)]);
        MAP.seal(&mut other, &super::super::made::UUID, 44 << 10, 7);
        made.put(44 << 10, &other);
        let volume = made.volume();
        let bad = |level, entries: &[(u64, u64)], block| {
            let file = tree_of(true, &root_of(true, level, entries));
            look(&volume, &file, block).unwrap_err().message().to_string()
        };
        // Round in a circle, levels that do not fall, none and too many entries, another file's.
        assert!(bad(2, &[(0, 40)], 0).contains("invalid block in its extent tree"));
        assert!(bad(3, &[(0, 40)], 0).contains("invalid block in its extent tree"));
        assert!(bad(1, &[(0, 42)], 0).contains("invalid block in its extent tree"));
        assert!(bad(1, &[(0, 43)], 0).contains("invalid block in its extent tree"));
        assert!(bad(1, &[(0, 44)], 0).contains("wrong owner"));
        // A leaf that has what is another's, before and behind.
        assert!(bad(1, &[(5, 41)], 6).contains("inconsistent"));
        assert!(bad(1, &[(0, 41), (8, 41)], 4).contains("inconsistent"));
        assert!(bad(1, &[(0, 1 << 40)], 0).contains("beyond the end"));
        // Roots that cannot be.
        assert!(bad(0, &[(0, 41)], 0).contains("invalid extent tree"));
        assert!(bad(17, &[(0, 41)], 0).contains("invalid extent tree"));
        assert!(bad(1, &[], 0).contains("invalid extent tree"));
        let mut many = root_of(true, 1, &[(0, 41)]);
        many[2..4].fill(0xff);
        assert!(look(&volume, &tree_of(true, &many), 0).is_err());
    }
}
