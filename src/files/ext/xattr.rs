//! Extended attributes: in the inode behind its fields, in a block of their own, or in inodes of their own; and
//! the data of small files, which is kept like one.

use super::super::bytes::{byte, le16, le32, part};
use super::super::crc::crc32c;
use super::super::tree::Xattr;
use super::super::xattrs::Xattrs;
use super::inode::{BLOCK_LEN, Inode, flags};
use super::read::read_blocks;
use super::superblock::wrong;
use super::volume::Volume;
use crate::error::Result;

const MAGIC: u32 = 0xea02_0000;
/// Bytes before the first entry in an inode, and in a block.
const INODE_HEAD: usize = 4;
const BLOCK_HEAD: usize = 32;
/// Bytes of an entry before its name.
const ENTRY: usize = 16;
/// The largest value that Linux has.
const MAX_VALUE: usize = 65536;
/// `system.`, and of it the one that has the data of small files.
const SYSTEM: u8 = 7;
const DATA: &[u8] = b"data";

/// Prefixes by their number; 9 is what encryption needs to know.
fn prefix(index: u8) -> Option<&'static str> {
    Some(match index {
        0 => "",
        1 => "user.",
        2 => "system.posix_acl_access",
        3 => "system.posix_acl_default",
        4 => "trusted.",
        6 => "security.",
        SYSTEM => "system.",
        8 => "system.richacl",
        _ => return None,
    })
}

/// An entry of a list.
struct Stored<'a> {
    index: u8,
    name: &'a [u8],
    /// Where in the list its value is, and its length; or which inode has it.
    offset: usize,
    size: usize,
    inode: u32,
}

/// A list of attributes: entries from `first` on, and values whose offsets count from `base`.
struct List<'a> {
    bytes: &'a [u8],
    first: usize,
    base: usize,
}

impl<'a> List<'a> {
    fn entries(&self) -> impl Iterator<Item = Stored<'a>> {
        let (bytes, mut at) = (self.bytes, self.first);
        std::iter::from_fn(move || {
            // Four zeros end the list; so does its room.
            if at + ENTRY > bytes.len() || le32(bytes, at) == 0 {
                return None;
            }
            let len = usize::from(byte(bytes, at));
            let stored = Stored {
                index: byte(bytes, at + 1),
                name: part(bytes, at + ENTRY, len),
                offset: usize::from(le16(bytes, at + 2)),
                size: le32(bytes, at + 8) as usize,
                inode: le32(bytes, at + 4),
            };
            at += (ENTRY + len).next_multiple_of(4);
            Some(stored)
        })
    }

    /// The value of an entry that has it here.
    fn value(&self, stored: &Stored<'a>) -> Option<&'a [u8]> {
        let value = part(self.bytes, self.base + stored.offset, stored.size);
        (value.len() == stored.size).then_some(value)
    }
}

/// The attributes in the inode itself.
fn in_inode(inode: &Inode) -> Option<List<'_>> {
    let bytes = inode.attribute_bytes();
    (le32(bytes, 0) == MAGIC).then_some(List { bytes, first: INODE_HEAD, base: INODE_HEAD })
}

/// All attributes of an inode but those that the file system keeps for itself.
///
/// # Errors
/// `Unsupported` if they take more memory than there is; `Corrupt`, or what reading the point says.
pub(super) fn all(volume: &Volume, inode: &Inode) -> Result<Vec<Xattr>> {
    let whose = format!("inode {}", inode.number);
    let mut found = Xattrs::new(&volume.source, &volume.findings, whose);
    if let Some(list) = in_inode(inode) {
        add(volume, inode, &list, &mut found)?;
    }
    let at = inode.attribute_block();
    if at > 0 {
        let bytes = block(volume, inode, at)?;
        add(volume, inode, &List { bytes: &bytes, first: BLOCK_HEAD, base: 0 }, &mut found)?;
    }
    Ok(found.into_list())
}

fn block(volume: &Volume, inode: &Inode, at: u64) -> Result<Vec<u8>> {
    let bytes = volume.block(at)?;
    if le32(&bytes, 0) != MAGIC {
        return Err(volume.bad(inode, "has an invalid xattr block"));
    }
    if volume.sup.has_checksums() {
        let mut crc = crc32c(volume.sup.seed, &at.to_le_bytes());
        crc = crc32c(crc, part(&bytes, 0, 0x10));
        crc = crc32c(crc, &[0; 4]);
        if le32(&bytes, 0x10) != crc32c(crc, part(&bytes, 0x14, bytes.len())) {
            let what = format!("the xattrs of inode {}", inode.number);
            return Err(wrong(&volume.source, &what, at * volume.sup.block_size));
        }
    }
    Ok(bytes)
}

fn add(volume: &Volume, inode: &Inode, list: &List<'_>, found: &mut Xattrs<'_>) -> Result<()> {
    for stored in list.entries() {
        let Some(prefix) = prefix(stored.index) else { continue };
        if stored.index == SYSTEM && stored.name == DATA {
            continue;
        }
        let value = value(volume, inode, list, &stored)?;
        let value = match stored.index {
            2 | 3 => acl(&value).ok_or_else(|| volume.bad(inode, "has an invalid ACL"))?,
            _ => value,
        };
        found.add(prefix, stored.name, value)?;
    }
    Ok(())
}

fn value(volume: &Volume, inode: &Inode, list: &List<'_>, stored: &Stored<'_>) -> Result<Vec<u8>> {
    let bad = || volume.bad(inode, "has xattrs outside of their block");
    if stored.size > MAX_VALUE {
        return Err(bad());
    }
    if stored.inode == 0 {
        return list.value(stored).map(<[u8]>::to_vec).ok_or_else(bad);
    }
    let other = volume.any_inode(stored.inode)?;
    if !other.has(flags::EA_INODE) {
        return Err(bad());
    }
    let mut value = vec![0; stored.size];
    let read = read_blocks(volume, &other, &mut value, 0)?;
    if read == stored.size { Ok(value) } else { Err(bad()) }
}

/// What is behind the first 60 bytes of a small file or folder.
///
/// # Errors
/// `Corrupt` if it is not there.
pub(super) fn inline_data(volume: &Volume, inode: &Inode) -> Result<Vec<u8>> {
    let bad = || volume.bad(inode, "has no inline data, though its flag says so");
    let list = in_inode(inode).ok_or_else(bad)?;
    let mut entries = list.entries();
    let stored = entries.find(|e| e.index == SYSTEM && e.name == DATA).ok_or_else(bad)?;
    // Without more there is no offset either.
    match stored.size {
        0 => Ok(Vec::new()),
        _ => list.value(&stored).map(<[u8]>::to_vec).ok_or_else(bad),
    }
}

/// All data of a small file that is in its inode.
///
/// # Errors
/// `Corrupt` if it is not there.
pub(super) fn inline_file(volume: &Volume, inode: &Inode) -> Result<Vec<u8>> {
    let mut data = part(inode.block_bytes(), 0, BLOCK_LEN).to_vec();
    data.extend(inline_data(volume, inode)?);
    let size = inode.size(&volume.sup);
    match usize::try_from(size).ok().filter(|s| *s <= data.len()) {
        Some(size) => data.truncate(size),
        None => return Err(volume.bad(inode, "is longer than its inline data")),
    }
    Ok(data)
}

/// An access list as getxattr(2) gives it, from the shorter form on disk.
fn acl(stored: &[u8]) -> Option<Vec<u8>> {
    /// Tags of entries that name a user or group.
    const NAMED: [u16; 2] = [0x2, 0x8];
    /// What entries without a name have for it.
    const NOBODY: u32 = u32::MAX;
    if le32(stored, 0) != 1 {
        return None;
    }
    let mut made = 2u32.to_le_bytes().to_vec();
    let mut at = 4;
    while at + 4 <= stored.len() {
        let tag = le16(stored, at);
        made.extend_from_slice(part(stored, at, 4));
        at += 4;
        let id = match NAMED.contains(&tag) {
            true => {
                at += 4;
                le32(stored, at - 4)
            }
            false => NOBODY,
        };
        made.extend_from_slice(&id.to_le_bytes());
    }
    (at == stored.len()).then_some(made)
}
