//! Blocks of entries, and what an entry has to be.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use super::super::super::bytes::{be16, be32, be64, byte, part};
use super::super::super::tree::{Entry, NodeId, NodeKind, is_name};
use super::super::blocks::invalid;
use super::super::header::{ENTRIES, Header};
use super::super::inode::Inode;
use super::super::volume::Volume;
use crate::error::{Kind, Result};
use crate::text::path_text;

/// Who gets entries, and says whether more is wanted.
pub(super) type Each<'a> = dyn FnMut(Entry) -> bool + 'a;

/// What a block of entries begins with in version 5.
pub(super) const HEADER: Header = ENTRIES;
/// Bytes before the first entry, by version.
const HEAD: usize = 16;
const WIDE_HEAD: usize = 64;
/// What an entry has for its number where nothing is.
const FREE: u16 = 0xffff;
/// Number and length of the name, before that; and what is behind it: the entry's own place.
const ENTRY_HEAD: usize = 9;
const TAG: usize = 2;
/// Behind a folder of one block: its index, and how long that is.
const INDEX_ENTRY: usize = 8;
const TAIL: usize = 8;

/// Where a block is, and from where on it is wanted.
pub(super) struct Listed {
    /// Where it begins in the folder, in bytes.
    pub offset: u64,
    /// Where it is in the file system, in bytes.
    pub at: u64,
    /// Entries that end at or before this are known.
    pub from: u64,
}

/// Which bytes of a block are entries; `None` if it is no block of entries.
fn range(volume: &Volume, bytes: &[u8], is_first: bool) -> Option<(usize, usize)> {
    let (head, data, whole) = match volume.sup.v5 {
        true => (WIDE_HEAD, b"XDD3", b"XDB3"),
        false => (HEAD, b"XD2D", b"XD2B"),
    };
    let magic = part(bytes, 0, 4);
    if magic == data {
        return Some((head, bytes.len()));
    }
    // The only block of a folder has its index, too.
    let end = bytes.len().checked_sub(TAIL).filter(|_| magic == whole && is_first)?;
    let index = (be32(bytes, end) as usize).checked_mul(INDEX_ENTRY)?;
    Some((head, end.checked_sub(index).filter(|end| *end >= head)?))
}

/// An entry as it is stored.
struct Named<'a> {
    number: u64,
    name: &'a [u8],
    kind: Option<NodeKind>,
}

/// What is at `at` of a block of entries that end at `end`: its length, and the entry, if it is one; `None` if it is
/// nothing that can be.
fn stored<'a>(
    volume: &Volume,
    bytes: &'a [u8],
    at: usize,
    end: usize,
) -> Option<(usize, Option<Named<'a>>)> {
    let inside = |len: usize| len > 0 && len.is_multiple_of(8) && at + len <= end;
    if be16(bytes, at) == FREE {
        let len = usize::from(be16(bytes, at + 2));
        return inside(len).then_some((len, None));
    }
    let name = part(bytes, at + ENTRY_HEAD, usize::from(byte(bytes, at + 8)));
    let more = usize::from(volume.sup.has_ftype);
    let len = (ENTRY_HEAD + name.len() + more + TAG).next_multiple_of(8);
    if name.is_empty() || !inside(len) || usize::from(be16(bytes, at + len - TAG)) != at {
        return None;
    }
    let kind = NodeKind::of_entry(byte(bytes, at + ENTRY_HEAD + name.len()));
    let kind = kind.filter(|_| volume.sup.has_ftype);
    Some((len, Some(Named { number: be64(bytes, at), name, kind })))
}

/// What the first block of a folder has as `.` and `..`.
pub(super) fn dots(volume: &Volume, bytes: &[u8]) -> Option<(u64, u64)> {
    let (at, end) = range(volume, bytes, true)?;
    let (len, own) = stored(volume, bytes, at, end)?;
    let (_, parent) = stored(volume, bytes, at + len, end)?;
    let number =
        |entry: Option<Named<'_>>, name: &[u8]| entry.filter(|e| e.name == name).map(|e| e.number);
    number(own, b".").zip(number(parent, b".."))
}

/// Gives the entries of a block. Whether more is wanted.
///
/// # Errors
/// `Corrupt`; what was right before that has been given.
pub(super) fn list(
    volume: &Volume,
    inode: &Inode,
    bytes: &[u8],
    listed: Listed,
    each: &mut Each<'_>,
) -> Result<bool> {
    let range = range(volume, bytes, listed.offset == 0);
    let (mut at, end) =
        range.ok_or_else(|| invalid(volume, inode, "no block of a directory", listed.at))?;
    while at < end {
        let found = stored(volume, bytes, at, end);
        let (len, entry) = found.ok_or_else(|| {
            invalid(volume, inode, "invalid directory entry", listed.at + at as u64)
        })?;
        at += len;
        let next = listed.offset + at as u64;
        if let Some(entry) = entry
            && next > listed.from
            && let Some(entry) = given(volume, inode, entry.name, entry.number, entry.kind, next)
            && !each(entry)
        {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The node of an entry at byte `at` of its block, if it has this name.
pub(super) fn named(volume: &Volume, bytes: &[u8], at: usize, name: &[u8]) -> Option<u64> {
    let (head, end) = range(volume, bytes, false)?;
    let found = stored(volume, bytes, at, end).filter(|_| at >= head)?.1?;
    (found.name == name).then_some(found.number)
}

/// Whether an entry may lead to this inode.
pub(super) fn leads(volume: &Volume, number: u64) -> bool {
    volume.sup.inode_place(number).is_some() && !volume.sup.is_own(number)
}

/// An entry as callers get it; `None`, and a finding, if it is none that can be.
pub(super) fn given(
    volume: &Volume,
    inode: &Inode,
    name: &[u8],
    number: u64,
    kind: Option<NodeKind>,
    next: u64,
) -> Option<Entry> {
    if name == b"." || name == b".." {
        return None;
    }
    if !is_name(name) || !leads(volume, number) {
        let shown = path_text(OsStr::from_bytes(name));
        let folder = inode.number;
        let what =
            format!("directory inode {folder}: invalid entry skipped: '{shown}', inode {number}");
        volume.findings.warn(&volume.source, Kind::Corrupt, &what, None);
        return None;
    }
    Some(Entry { name: name.to_vec(), node: NodeId { tree: 0, number }, kind, next })
}
