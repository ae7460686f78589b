//! Folders: an index of names, a B-tree whose nodes are the root in the record and blocks of equal size.
//!
//! A listing does not go through the tree but takes the root and then all blocks that the index's bitmap has in
//! use, in their order on disk: each block comes up once, whatever the tree says. Only [`lookup`] descends.

use std::cmp::Ordering;
use std::collections::HashSet;
use std::ffi::OsStr;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;

use super::super::bytes::{byte, le16, le32, le64, part};
use super::super::tree::{Entry, NodeId, is_name};
use super::super::utf16;
use super::boot::is_block;
use super::fixup;
use super::names::{on_disk, to_bytes};
use super::node::Node;
use super::record::{NUMBER, kind};
use super::stream::Stream;
use super::volume::{Volume, number};
use crate::error::{Error, Kind, Result};
use crate::text::path_text;

/// Bits of a cursor for the place inside the root or a block: one more than 64 KiB have.
const INSIDE: u32 = 17;
/// Blocks beyond these have no cursor.
const MOST_BLOCKS: u64 = 1 << 45;
/// Bytes of an entry before its key, and of a key before its name.
const ENTRY: usize = 0x10;
const KEY: usize = 0x42;
/// Where the list of entries is described in the root, and in a block.
const ROOT_LIST: usize = 0x10;
const BLOCK_LIST: usize = 0x18;
/// Bytes of a bitmap that are read at once.
const BITS: u64 = 512;
/// The short name of a file that has another one.
const DOS: u8 = 2;

type Each<'a> = dyn FnMut(Entry) -> bool + 'a;

/// The index of a folder.
struct Index<'a> {
    volume: &'a Volume,
    node: &'a Node,
    root: Vec<u8>,
    block: usize,
    blocks: Option<Stream>,
    bitmap: Option<Stream>,
}

/// An entry of the index.
struct Item<'a> {
    raw: &'a [u8],
    /// Where it ends in its list.
    end: usize,
}

impl<'a> Item<'a> {
    fn has_child(&self) -> bool {
        le16(self.raw, 0xc) & 1 != 0
    }

    fn is_last(&self) -> bool {
        le16(self.raw, 0xc) & 2 != 0
    }

    /// Where the node with what comes before it is.
    fn child(&self) -> Option<u64> {
        let at = self.raw.len().checked_sub(8)?;
        self.has_child().then(|| le64(self.raw, at))
    }

    fn key(&self) -> &'a [u8] {
        part(self.raw, ENTRY, usize::from(le16(self.raw, 0xa)))
    }

    /// Its name in UTF-16; `None` if it is not all there.
    fn name(&self) -> Option<&'a [u8]> {
        let len = 2 * usize::from(byte(self.key(), 0x40));
        Some(part(self.key(), KEY, len)).filter(|n| n.len() == len && len > 0)
    }

    fn node(&self) -> NodeId {
        let reference = le64(self.raw, 0);
        NodeId { tree: reference >> 48, number: reference & NUMBER }
    }
}

/// The entries of a list that is described at `head`, up to the last, or to one that is invalid.
fn items(bytes: &[u8], head: usize) -> impl Iterator<Item = Option<Item<'_>>> {
    let end = head.saturating_add(le32(bytes, head + 4) as usize);
    let mut at = head.saturating_add(le32(bytes, head) as usize);
    let (mut over, fits) = (false, end <= bytes.len());
    std::iter::from_fn(move || {
        if over {
            return None;
        }
        let len = usize::from(le16(bytes, at.saturating_add(8)));
        let right = fits && len >= ENTRY && len.is_multiple_of(8) && at.saturating_add(len) <= end;
        if !right {
            over = true;
            return Some(None);
        }
        let item = Item { raw: part(bytes, at, len), end: at + len };
        over = item.is_last();
        at += len;
        Some(Some(item))
    })
}

impl<'a> Index<'a> {
    fn open(volume: &'a Volume, node: &'a Node) -> Result<Index<'a>> {
        let name = on_disk("$I30");
        let open = |kind| Stream::open(&volume.table, node, kind, &name);
        let root = open(kind::INDEX_ROOT)?;
        let root = root.ok_or_else(|| volume.bad(node, "is a directory without an index"))?;
        let root = root.read_all(1 << 16)?;
        let block = le32(&root, 8);
        if le32(&root, 0) != kind::FILE_NAME || !is_block(u64::from(block)) {
            return Err(volume.bad(node, "is a directory with an invalid index"));
        }
        let is_large = byte(&root, ROOT_LIST + 0xc) & 1 != 0;
        let (blocks, bitmap) = match is_large {
            true => (open(kind::INDEX_ALLOCATION)?, open(kind::BITMAP)?),
            false => (None, None),
        };
        if is_large && (blocks.is_none() || bitmap.is_none()) {
            return Err(volume.bad(node, "is a directory whose index has no blocks"));
        }
        Ok(Index { volume, node, root, block: block as usize, blocks, bitmap })
    }

    /// Bytes that a block's number counts in.
    fn unit(&self) -> u64 {
        let (cluster, block) = (self.volume.table.boot.cluster, self.block as u64);
        if cluster <= block { cluster } else { 512 }
    }

    /// A block at byte `at` of the index.
    fn block(&self, blocks: &Stream, at: u64) -> Result<Vec<u8>> {
        let mut bytes = vec![0; self.block];
        blocks.fill(&mut bytes, at)?;
        let bad = |what: &str| {
            self.volume.bad(self.node, &format!("is a directory with an index block that {what}"))
        };
        fixup::apply(&mut bytes, b"INDX").map_err(bad)?;
        match le64(&bytes, 0x10).checked_mul(self.unit()) == Some(at) {
            true => Ok(bytes),
            false => Err(bad("belongs elsewhere")),
        }
    }
}

/// Gives the entries of a folder from `from` on: see [`super::super::Tree::read_folder`]. A block that is wrong
/// does not hide those behind it: it is told at the end.
///
/// # Errors
/// `Corrupt`, or what reading the point says.
pub(super) fn read(volume: &Volume, node: &Node, from: u64, each: &mut Each<'_>) -> Result<()> {
    let index = Index::open(volume, node)?;
    let mut reading = Reading { index: &index, from, each, error: None };
    reading.all()?;
    reading.error.map_or(Ok(()), Err)
}

/// Where the blocks of a folder's index are: see [`super::super::Tree::folder_places`].
///
/// # Errors
/// `Corrupt`, or what reading the point says.
pub(super) fn places(volume: &Volume, node: &Node) -> Result<Vec<Range<u64>>> {
    let blocks = Index::open(volume, node)?.blocks;
    Ok(blocks.map(|stream| stream.places()).unwrap_or_default())
}

struct Reading<'a, 'b> {
    index: &'a Index<'a>,
    from: u64,
    each: &'a mut Each<'b>,
    /// The first error of a block.
    error: Option<Error>,
}

impl Reading<'_, '_> {
    fn all(&mut self) -> Result<()> {
        let index = self.index;
        let begin = self.from >> INSIDE;
        if begin == 0 && !self.list(&index.root, ROOT_LIST, 0) {
            return Ok(());
        }
        let (Some(blocks), Some(bitmap)) = (&index.blocks, &index.bitmap) else { return Ok(()) };
        let size = index.block as u64;
        let (mut number, mut bits) = (begin.saturating_sub(1), Vec::new());
        // More blocks than there is space for are the same ones again.
        let mut left = index.volume.source().size() / size + 1;
        while let Some(end) = number.checked_add(1).and_then(|n| n.checked_mul(size)) {
            // What the bitmap does not reach is not in use.
            if end > blocks.size || number / 8 >= bitmap.size {
                break;
            }
            let at = number * size;
            let (next, is_hole) = match blocks.stretch(at)? {
                Some(s) if s.hole && s.end >= end => (s.end / size, true),
                _ => (number + 1, false),
            };
            if is_hole {
                let what = "is a directory whose index lacks some of its blocks";
                self.skip(index.volume.bad(index.node, what))?;
            } else if self.is_used(bitmap, number, &mut bits)? {
                left = left.saturating_sub(1);
                if left == 0 || number >= MOST_BLOCKS {
                    return Err(index
                        .volume
                        .bad(index.node, "is a directory with too many index blocks"));
                }
                match index.block(blocks, at) {
                    Ok(bytes) if !self.list(&bytes, BLOCK_LIST, number + 1) => return Ok(()),
                    Ok(_) => {}
                    Err(e) => self.skip(e)?,
                }
            }
            number = next;
        }
        Ok(())
    }

    /// Whether a block is in use. `bits` has a part of the bitmap, and where that begins.
    fn is_used(
        &self,
        bitmap: &Stream,
        number: u64,
        bits: &mut Vec<(u64, Vec<u8>)>,
    ) -> Result<bool> {
        let (at, inside) = (number / 8 / BITS * BITS, (number / 8 % BITS) as usize);
        if bits.last().is_none_or(|(begin, _)| *begin != at) {
            let mut bytes = vec![0; BITS.min(bitmap.size - at) as usize];
            bitmap.fill(&mut bytes, at)?;
            *bits = vec![(at, bytes)];
        }
        let found = bits.last().map_or(0, |(_, bytes)| byte(bytes, inside));
        Ok(found >> (number % 8) & 1 != 0)
    }

    fn skip(&mut self, error: Error) -> Result<()> {
        if !error.kind().is_lasting() {
            return Err(error);
        }
        self.error.get_or_insert(error);
        Ok(())
    }

    /// Gives what is in a list of entries; `number` is 0 for the root, and one more than a block's own. Whether more
    /// is wanted.
    fn list(&mut self, bytes: &[u8], head: usize, number: u64) -> bool {
        for item in items(bytes, head) {
            let Some(item) = item else {
                let what = "is a directory with invalid entries";
                self.error.get_or_insert(self.index.volume.bad(self.index.node, what));
                break;
            };
            let next = number << INSIDE | item.end as u64;
            if next > self.from && !item.is_last() && !self.entry(&item, next) {
                return false;
            }
        }
        true
    }

    /// Gives one entry, if it is one that is shown. Whether more is wanted.
    fn entry(&mut self, item: &Item<'_>, next: u64) -> bool {
        let (volume, node) = (self.index.volume, self.index.node);
        let in_root = node.record.number == number::ROOT;
        // Its own files are in the root, and that itself.
        if is_dos(item) || in_root && item.node().number < number::FIRST {
            return true;
        }
        let name = item.name().map(to_bytes).unwrap_or_default();
        if !is_name(&name) {
            let shown = path_text(OsStr::from_bytes(&name));
            let what = format!("is a directory with an invalid entry, which is skipped: '{shown}'");
            volume.odd(Kind::Corrupt, node, &what, None);
            return true;
        }
        (self.each)(Entry { name, node: item.node(), kind: None, next })
    }
}

fn is_dos(item: &Item<'_>) -> bool {
    byte(item.key(), 0x41) == DOS
}

/// The node that a folder has under a name: by its very letters, or else in another case.
///
/// # Errors
/// `Corrupt`, or what reading the point says.
pub(super) fn lookup(volume: &Volume, node: &Node, name: &[u16]) -> Result<Option<NodeId>> {
    let index = Index::open(volume, node)?;
    let mut search = Search { index: &index, name, similar: None, todo: Vec::new(), error: None };
    if let Some(found) = search.list(&index.root, ROOT_LIST) {
        return Ok(Some(found));
    }
    let mut seen = HashSet::new();
    while let Some(child) = search.todo.pop() {
        let (Some(blocks), true) = (&index.blocks, seen.insert(child)) else { continue };
        let at = child.saturating_mul(index.unit());
        match index.block(blocks, at) {
            Ok(bytes) => {
                if let Some(found) = search.list(&bytes, BLOCK_LIST) {
                    return Ok(Some(found));
                }
            }
            Err(e) => search.error = Some(e),
        }
    }
    match (search.similar, search.error) {
        (None, Some(error)) => Err(error),
        (found, _) => Ok(found),
    }
}

struct Search<'a> {
    index: &'a Index<'a>,
    name: &'a [u16],
    /// What has the name in another case.
    similar: Option<NodeId>,
    /// Blocks that may have it.
    todo: Vec<u64>,
    error: Option<Error>,
}

impl Search<'_> {
    /// Looks through a list, and notes the blocks below that may have the name.
    fn list(&mut self, bytes: &[u8], head: usize) -> Option<NodeId> {
        // Whether what is before the next entry may have the name.
        let mut before = true;
        for item in items(bytes, head) {
            let Some(item) = item else {
                let what = "is a directory with invalid entries";
                self.error = Some(self.index.volume.bad(self.index.node, what));
                return None;
            };
            let key = item.name().unwrap_or_default();
            let order = match item.is_last() {
                true => Ordering::Greater,
                false => self.index.volume.upcase.compare(key, self.name),
            };
            if before && order != Ordering::Less {
                self.todo.extend(item.child());
            }
            if order == Ordering::Equal && !is_dos(&item) {
                if utf16::units(key).eq(self.name.iter().copied()) {
                    return Some(item.node());
                }
                self.similar.get_or_insert(item.node());
            }
            before = order != Ordering::Greater;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A list with these lengths of entries; the last is marked as such.
    fn list(lens: &[u16]) -> Vec<u8> {
        let mut bytes = vec![0; 16];
        for (i, len) in lens.iter().enumerate() {
            let mut entry = vec![0; usize::from(*len).max(16)];
            entry[8..10].copy_from_slice(&len.to_le_bytes());
            entry[12] = if i + 1 == lens.len() { 2 } else { 0 };
            bytes.extend(entry);
        }
        let len = bytes.len() as u32;
        bytes[0] = 16;
        bytes[4..8].copy_from_slice(&len.to_le_bytes());
        bytes
    }

    fn ends(bytes: &[u8]) -> Vec<Option<usize>> {
        items(bytes, 0).map(|i| i.map(|i| i.end)).collect()
    }

    #[test]
    fn lists_end_with_their_last_entry_or_the_first_invalid_one() {
        assert_eq!(ends(&list(&[24, 96, 16])), [Some(40), Some(136), Some(152)]);
        assert_eq!(ends(&list(&[24, 0, 16])), [Some(40), None]);
        assert_eq!(ends(&list(&[24, 20, 16])), [Some(40), None]);
        let mut long = list(&[24, 16]);
        long[4] = 200;
        assert_eq!(ends(&long), [None]);
        let mut short = list(&[24, 16]);
        short[4] = 45;
        assert_eq!(ends(&short), [Some(40), None]);
        assert_eq!(ends(&[]), [None]);
        assert_eq!(ends(&[0xff; 64]), [None]);
    }
}
