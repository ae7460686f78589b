//! Where the blocks of a file are: by extents, or by indirect blocks.
//!
//! The depth of a tree of extents falls with each step, and each of its nodes says where it belongs: so there is
//! no way round in a circle, and no node in two places.

use super::super::bytes::{le16, le32, part};
use super::super::crc::crc32c;
use super::super::runs::Run;
use super::inode::{Inode, flags};
use super::superblock::wrong;
use super::volume::Volume;
use crate::error::Result;

/// Blocks of a file are numbered with 32 bits.
const END: u64 = 1 << 32;
/// The deepest tree of extents that can be.
const MAX_DEPTH: u16 = 5;
const EXTENT_MAGIC: u16 = 0xf30a;
/// A longer extent is preallocated, and reads as zeros.
const MAX_WRITTEN: u16 = 32768;
/// Header, and each entry.
const ENTRY: usize = 12;

/// What is at block `block` of a file, and the blocks after it.
///
/// # Errors
/// `Corrupt`, or what reading the point says.
pub(super) fn run(volume: &Volume, inode: &Inode, block: u64) -> Result<Run> {
    if block >= END {
        return Ok(Run { count: u64::MAX - block, at: None });
    }
    let run = match inode.has(flags::EXTENTS) {
        true => extent(volume, inode, block)?,
        false => indirect(volume, inode, block)?,
    };
    if let Some(at) = run.at {
        volume.place(at, run.count).map_err(|_| volume.bad(inode, "has blocks beyond the end"))?;
    }
    Ok(run)
}

/// A node of the tree: its bytes, and the blocks of the file that it is for.
struct Node {
    bytes: Vec<u8>,
    depth: u16,
    count: usize,
    from: u64,
    to: u64,
}

impl Node {
    fn new(volume: &Volume, inode: &Inode, bytes: Vec<u8>, (from, to): (u64, u64)) -> Result<Node> {
        let (count, max) = (usize::from(le16(&bytes, 2)), usize::from(le16(&bytes, 4)));
        let room = bytes.len() / ENTRY;
        if le16(&bytes, 0) != EXTENT_MAGIC || count > max || max >= room.max(1) {
            return Err(volume.bad(inode, "has an invalid extent tree"));
        }
        Ok(Node { depth: le16(&bytes, 6), count, bytes, from, to })
    }

    fn entry(&self, index: usize) -> &[u8] {
        part(&self.bytes, ENTRY * (index + 1), ENTRY)
    }

    /// The file's block with which an entry begins; the node's end for the one after the last.
    fn begin(&self, index: usize) -> u64 {
        match index < self.count {
            true => u64::from(le32(self.entry(index), 0)),
            false => self.to,
        }
    }

    /// The last entry that begins at or before `block`.
    fn find(&self, block: u64) -> Option<usize> {
        let (mut low, mut high) = (0, self.count);
        while low < high {
            let middle = low + (high - low) / 2;
            match self.begin(middle) <= block {
                true => low = middle + 1,
                false => high = middle,
            }
        }
        low.checked_sub(1)
    }
}

fn extent(volume: &Volume, inode: &Inode, block: u64) -> Result<Run> {
    let bad = || volume.bad(inode, "has an inconsistent extent tree");
    let mut node = Node::new(volume, inode, inode.block_bytes().to_vec(), (0, END))?;
    if node.depth > MAX_DEPTH {
        return Err(volume.bad(inode, "has an extent tree that is too deep"));
    }
    loop {
        let found = node.find(block);
        let next = node.begin(found.map_or(0, |i| i + 1)).min(node.to);
        let Some(index) = found else {
            // Before the first: a hole.
            return if next > block { Ok(Run::hole(block, next)) } else { Err(bad()) };
        };
        let begin = node.begin(index);
        if begin < node.from || next <= block {
            return Err(bad());
        }
        if node.depth == 0 {
            return Ok(leaf(node.entry(index), block, begin, next));
        }
        let child = child(volume, inode, node.entry(index))?;
        let depth = node.depth - 1;
        node = Node::new(volume, inode, child, (begin, next))?;
        if node.depth != depth {
            return Err(bad());
        }
    }
}

/// What an extent that begins at `begin` has at `block`; the next one begins at `next`.
fn leaf(entry: &[u8], block: u64, begin: u64, next: u64) -> Run {
    let len = le16(entry, 4);
    let (len, written) = match len > MAX_WRITTEN {
        true => (len - MAX_WRITTEN, false),
        false => (len, true),
    };
    let end = (begin + u64::from(len)).min(next);
    if block >= end {
        return Run::hole(block, next);
    }
    let start = u64::from(le32(entry, 8)) | u64::from(le16(entry, 6)) << 32;
    Run { count: end - block, at: written.then(|| start + (block - begin)) }
}

/// The node that an entry leads to.
fn child(volume: &Volume, inode: &Inode, entry: &[u8]) -> Result<Vec<u8>> {
    let at = u64::from(le32(entry, 4)) | u64::from(le16(entry, 8)) << 32;
    let bytes = volume.block(at)?;
    if volume.sup.has_checksums() {
        let tail = ENTRY * (1 + usize::from(le16(&bytes, 4)));
        if le32(&bytes, tail) != crc32c(inode.seed, part(&bytes, 0, tail)) {
            let what = format!("the extent tree of inode {}", inode.number);
            return Err(wrong(&volume.source, &what, at * volume.sup.block_size));
        }
    }
    Ok(bytes)
}

/// Blocks whose numbers are in the inode itself.
const DIRECT: u64 = 12;

fn indirect(volume: &Volume, inode: &Inode, block: u64) -> Result<Run> {
    let pointers = inode.block_bytes();
    if block < DIRECT {
        return Ok(neighbours(part(pointers, 0, 4 * DIRECT as usize), block as usize));
    }
    let per = volume.sup.block_size / 4;
    // Within what one, two or three levels of pointers reach.
    let (mut index, mut reach) = (block - DIRECT, per);
    for level in 0..3 {
        if index < reach {
            let first = le32(pointers, 4 * (DIRECT as usize + level));
            return descend(volume, u64::from(first), index, reach, per);
        }
        index -= reach;
        reach = reach.saturating_mul(per);
    }
    Ok(Run::hole(block, END))
}

/// What is at `index` of the `reach` blocks below the pointer `at`.
fn descend(volume: &Volume, mut at: u64, mut index: u64, mut reach: u64, per: u64) -> Result<Run> {
    loop {
        if at == 0 {
            return Ok(Run { count: reach - index, at: None });
        }
        let bytes = volume.block(at)?;
        reach /= per;
        if reach == 1 {
            return Ok(neighbours(&bytes, index as usize));
        }
        at = u64::from(le32(&bytes, 4 * (index / reach) as usize));
        index %= reach;
    }
}

/// The run that begins with pointer number `index`, within these pointers.
fn neighbours(pointers: &[u8], index: usize) -> Run {
    let number = |i: usize| u64::from(le32(pointers, 4 * i));
    let (first, all) = (number(index), pointers.len() / 4);
    let follows = |i: &usize| match first {
        0 => number(*i) == 0,
        _ => number(*i) == first + (*i - index) as u64,
    };
    let count = (index..all).take_while(follows).count().max(1) as u64;
    Run { count, at: (first > 0).then_some(first) }
}
