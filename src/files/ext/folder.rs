//! Folders: lists of entries, block after block. An index (htree) is made of blocks that look empty, so that all
//! are read one after the other.

use std::ffi::OsStr;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;

use super::super::bytes::{byte, le16, le32, part};
use super::super::crc::crc32c;
use super::super::runs::{self, wrong_folder};
use super::super::tree::{Entry, NodeId, NodeKind, is_name};
use super::inode::{BLOCK_LEN, Inode, flags};
use super::map::run;
use super::superblock::{incompat, wrong};
use super::volume::Volume;
use super::xattr;
use crate::error::{Error, Kind, Result};
use crate::text::path_text;

/// Number, length, length of the name, kind.
const HEAD: usize = 8;
/// An entry with the checksum of its block.
const TAIL: usize = 12;
const TAIL_KIND: u8 = 0xde;

type Each<'a> = dyn FnMut(Entry) -> bool + 'a;

/// Gives the entries of a folder from `from` on: see [`super::super::Tree::read_folder`]. A block that is wrong
/// does not hide those behind it: it is told at the end.
///
/// # Errors
/// `Encrypted`, `Corrupt`, or what reading the point says.
pub(super) fn read(volume: &Volume, inode: &Inode, from: u64, each: &mut Each<'_>) -> Result<()> {
    if inode.has(flags::ENCRYPT) {
        return Err(volume.encrypted(inode));
    }
    let mut reading = Reading { volume, inode, from, each, error: None };
    match inode.has(flags::INLINE_DATA) {
        true => reading.inside()?,
        false => reading.blocks()?,
    }
    reading.error.map_or(Ok(()), Err)
}

/// Where the entries of a folder are: see [`super::super::Tree::folder_places`].
///
/// # Errors
/// `Corrupt`, or what reading the point says.
pub(super) fn places(volume: &Volume, inode: &Inode) -> Result<Vec<Range<u64>>> {
    // A checksum is of a block and of whose it is.
    if volume.sup.has_checksums() || inode.has(flags::INLINE_DATA) {
        return Ok(Vec::new());
    }
    let block_size = volume.sup.block_size;
    let end = inode.size(&volume.sup).div_ceil(block_size);
    runs::places(end, block_size, |block| run(volume, inode, block))
}

/// Whether a folder names itself as `.` and `parent` as `..`: see [`super::super::Tree::is_parent`].
///
/// # Errors
/// `Corrupt`, or what reading the point says.
pub(super) fn is_parent(volume: &Volume, inode: &Inode, parent: u64) -> Result<bool> {
    if inode.has(flags::INLINE_DATA) {
        return Ok(u64::from(le32(inode.block_bytes(), 0)) == parent);
    }
    let Some(at) = run(volume, inode, 0)?.at else { return Ok(false) };
    let bytes = volume.block(at)?;
    let is = |at: usize, name: &[u8], number: u64| {
        usize::from(byte(&bytes, at + 6)) == name.len()
            && part(&bytes, at + HEAD, name.len()) == name
            && u64::from(le32(&bytes, at)) == number
    };
    let second = length(&bytes, 0, volume.sup.block_size as usize);
    Ok(is(0, b".", u64::from(inode.number)) && is(second, b"..", parent))
}

struct Reading<'a, 'b> {
    volume: &'a Volume,
    inode: &'a Inode,
    from: u64,
    each: &'a mut Each<'b>,
    /// The first error of a block.
    error: Option<Error>,
}

impl Reading<'_, '_> {
    /// A small folder that is in the inode: behind the number of its parent in `i_block`, and in an attribute.
    fn inside(&mut self) -> Result<()> {
        let first = part(self.inode.block_bytes(), 4, BLOCK_LEN).to_vec();
        let more = xattr::inline_data(self.volume, self.inode)?;
        let size = self.inode.size(&self.volume.sup);
        if size != (BLOCK_LEN + more.len()) as u64 && size != BLOCK_LEN as u64 {
            return Err(self.volume.bad(self.inode, "has a wrong size for its contents"));
        }
        // The second part is not there if the first is all.
        if self.list(&first, 4, self.inode.at)? && size > BLOCK_LEN as u64 {
            self.list(&more, BLOCK_LEN as u64, self.inode.at)?;
        }
        Ok(())
    }

    fn blocks(&mut self) -> Result<()> {
        let block_size = self.volume.sup.block_size;
        let end = self.inode.size(&self.volume.sup).div_ceil(block_size);
        let mut block = self.from / block_size;
        if block == 0 {
            let all = self.volume.sup.blocks;
            let wrong = wrong_folder(end, all, |block| run(self.volume, self.inode, block))?;
            if let Some(what) = wrong {
                return Err(self.volume.bad(self.inode, what));
            }
        }
        while block < end {
            let found = run(self.volume, self.inode, block)?;
            let count = found.count.min(end - block);
            match found.at {
                Some(at) => {
                    for i in 0..count {
                        if !self.block(at + i, (block + i) * block_size)? {
                            return Ok(());
                        }
                    }
                }
                None => {
                    self.skip(self.volume.bad(self.inode, "is a directory with a hole in it"))?;
                }
            }
            block = block.saturating_add(count);
        }
        Ok(())
    }

    /// The entries of the block at `at`, which is `offset` bytes inside the folder.
    fn block(&mut self, at: u64, offset: u64) -> Result<bool> {
        let place = at * self.volume.sup.block_size;
        let bytes = match self.volume.block(at) {
            Ok(bytes) => bytes,
            Err(e) => return self.skip(e),
        };
        if self.is_index(&bytes) {
            return Ok(true);
        }
        let root = offset == 0 && self.inode.has(flags::INDEX);
        let mut list = bytes.as_slice();
        if self.volume.sup.has_checksums() && !root {
            let tail = bytes.len() - TAIL;
            let is_tail = byte(&bytes, tail + 7) == TAIL_KIND && le32(&bytes, tail) == 0;
            let right = crc32c(self.inode.seed, part(&bytes, 0, tail));
            if !is_tail || le32(&bytes, tail + 8) != right {
                let what = format!("a block of directory inode {}", self.inode.number);
                return self.skip(wrong(&self.volume.source, &what, place));
            }
            list = part(&bytes, 0, tail);
        }
        self.list(list, offset, place)
    }

    /// A node of an index has one entry without a file that is as long as the block.
    fn is_index(&self, bytes: &[u8]) -> bool {
        self.inode.has(flags::INDEX)
            && le32(bytes, 0) == 0
            && length(bytes, 0, bytes.len()) == bytes.len()
    }

    fn skip(&mut self, error: Error) -> Result<bool> {
        if !error.kind().is_lasting() {
            return Err(error);
        }
        self.error.get_or_insert(error);
        Ok(true)
    }

    /// Gives what is in a list of entries, which is `offset` bytes inside the folder and `place` bytes inside the
    /// file system. Whether more is wanted.
    fn list(&mut self, bytes: &[u8], offset: u64, place: u64) -> Result<bool> {
        let mut at = 0;
        while at + HEAD <= bytes.len() {
            let len = length(bytes, at, self.volume.sup.block_size as usize);
            let name = self.name(bytes, at);
            // The last may reach over the checksum, which it did not know.
            if len < HEAD + name.len()
                || !len.is_multiple_of(4)
                || name.len() < self.name_len(bytes, at)
            {
                let text = format!("directory inode {} has invalid entries", self.inode.number);
                let error = self.volume.source.error(Kind::Corrupt, text, place + at as u64);
                return self.skip(error);
            }
            let next = offset + (at + len) as u64;
            if next > self.from && le32(bytes, at) != 0 && !self.entry(bytes, at, name, next) {
                return Ok(false);
            }
            at += len;
        }
        Ok(true)
    }

    fn name_len(&self, bytes: &[u8], at: usize) -> usize {
        match self.volume.sup.incompat & incompat::FILETYPE {
            0 => usize::from(le16(bytes, at + 6)),
            _ => usize::from(byte(bytes, at + 6)),
        }
    }

    fn name<'c>(&self, bytes: &'c [u8], at: usize) -> &'c [u8] {
        part(bytes, at + HEAD, self.name_len(bytes, at))
    }

    /// Gives one entry, if it is one. Whether more is wanted.
    fn entry(&mut self, bytes: &[u8], at: usize, name: &[u8], next: u64) -> bool {
        let number = le32(bytes, at);
        if name == b"." || name == b".." && next <= 2 * self.volume.sup.block_size {
            return true;
        }
        let sup = &self.volume.sup;
        let own = number < sup.first_inode && number != super::volume::ROOT;
        if !is_name(name) || own || number > sup.inodes {
            self.odd(name, number);
            return true;
        }
        let kind = match sup.incompat & incompat::FILETYPE {
            0 => None,
            _ => NodeKind::of_entry(byte(bytes, at + 7) & 0xf),
        };
        let node = NodeId { tree: 0, number: u64::from(number) };
        (self.each)(Entry { name: name.to_vec(), node, kind, next })
    }

    fn odd(&self, name: &[u8], number: u32) {
        let shown = path_text(OsStr::from_bytes(name));
        let what = format!(
            "directory inode {}: invalid entry skipped: '{shown}', inode {number}",
            self.inode.number
        );
        self.volume.findings.warn(&self.volume.source, Kind::Corrupt, &what, None);
    }
}

/// The length of an entry. In blocks of 64 KiB one that fills its block has no room for its own length.
fn length(bytes: &[u8], at: usize, block_size: usize) -> usize {
    match (usize::from(le16(bytes, at + 4)), block_size >= 65536) {
        (0 | 65535, true) => block_size,
        (len, true) => (len & 65532) | ((len & 3) << 16),
        (len, false) => len,
    }
}
