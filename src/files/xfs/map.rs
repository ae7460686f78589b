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
    if block >= END {
        return Ok(Run::hole(block, u64::MAX));
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

    fn find(&self, volume: &Volume, inode: &Inode, block: u64) -> Result<Run> {
        let found = last_not_after(self.len(), block, |i| self.begin(i));
        let next = self.begin(found.map_or(0, |i| i + 1));
        if next <= block || next > self.range.1 {
            return Err(inconsistent(volume, inode));
        }
        let Some(index) = found else { return Ok(Run::hole(block, next)) };
        let (high, low) =
            (be64(self.bytes, index * ENTRY), be64(self.bytes, index * ENTRY + ENTRY / 2));
        // 21 bits of length, 52 of place, 54 of begin, and one for what is preallocated.
        let (begin, count) = (self.begin(index), low & 0x1f_ffff);
        let end = begin + count;
        if begin < self.range.0 || count == 0 || end > next {
            return Err(inconsistent(volume, inode));
        }
        if block >= end {
            return Ok(Run::hole(block, next));
        }
        let place = volume.sup.place((high & 0x1ff) << 43 | low >> 21, count);
        let place = place.ok_or_else(|| volume.bad(inode, "has blocks beyond the end"))?;
        let written = high >> 63 == 0;
        Ok(Run { count: end - block, at: written.then(|| place + (block - begin)) })
    }
}

/// The last of `count` entries that begins at or before `block`.
fn last_not_after(count: usize, block: u64, begin: impl Fn(usize) -> u64) -> Option<usize> {
    let (mut low, mut high) = (0, count);
    while low < high {
        let middle = low + (high - low) / 2;
        match begin(middle) <= block {
            true => low = middle + 1,
            false => high = middle,
        }
    }
    low.checked_sub(1)
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
        let found = last_not_after(self.count, block, |i| self.begin(i));
        let next = self.begin(found.map_or(0, |i| i + 1));
        if next <= block || next > self.range.1 {
            return Err(inconsistent(volume, inode));
        }
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

fn tree(volume: &Volume, inode: &Inode, fork: &Fork<'_>, block: u64) -> Result<Run> {
    let (mut level, count) = (be16(fork.bytes, 0), usize::from(be16(fork.bytes, 2)));
    if level == 0 || level > MAX_LEVEL || count == 0 || !fits(fork.bytes, ROOT_HEAD, count) {
        return Err(volume.bad(inode, "has an invalid extent tree"));
    }
    let root = Node { bytes: fork.bytes, head: ROOT_HEAD, count, range: (0, END) };
    let mut below = root.below(volume, inode, block)?;
    loop {
        let (place, range) = match below {
            Below::Hole(run) => return Ok(run),
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
