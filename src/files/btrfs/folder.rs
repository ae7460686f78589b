//! Folders and extended attributes: both are entries with a name.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use super::super::bytes::{byte, le16, le64, part};
use super::super::crc::crc32c;
use super::super::tree::{Entry, NodeId, NodeKind, Xattr, is_name};
use super::super::xattrs::Xattrs;
use super::inode::{EMPTY, Inode, kind, root};
use super::node::{Key, is_files};
use super::volume::Volume;
use super::walk::{Walk, find};
use crate::error::{Kind, Result};
use crate::text::path_text;

/// Bytes of an entry before its name.
const HEAD: usize = 30;
/// An entry of a file whose name is encrypted.
const ENCRYPTED: u8 = 0x80;
/// Numbers below this one are the file system's own.
const FIRST_INODE: u64 = 256;
/// The folder of the tree of roots, which has the name of the default subvolume.
const ROOT_FOLDER: u64 = 6;
/// What names are hashed from.
const HASH_SEED: u32 = 0xffff_fffe;

/// An entry.
struct Named<'a> {
    location: Key,
    kind: u8,
    name: &'a [u8],
    data: &'a [u8],
}

/// The entries of an item; `None` in the place of one that is cut short.
fn entries(mut rest: &[u8]) -> impl Iterator<Item = Option<Named<'_>>> {
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let (data_len, name_len) = (usize::from(le16(rest, 25)), usize::from(le16(rest, 27)));
        let len = HEAD + name_len + data_len;
        if rest.len() < len {
            rest = &[];
            return Some(None);
        }
        let found = Named {
            location: Key::of_entry(rest),
            kind: byte(rest, 29),
            name: part(rest, HEAD, name_len),
            data: part(rest, HEAD + name_len, data_len),
        };
        rest = rest.get(len..).unwrap_or_default();
        Some(Some(found))
    })
}

fn hash(name: &[u8]) -> u64 {
    u64::from(crc32c(HASH_SEED, name))
}

/// What an entry of a folder leads to; `None` if that cannot be.
fn target(volume: &Volume, folder: &Inode, entry: &Named<'_>) -> Result<Option<NodeId>> {
    let (tree, number) = (folder.root.id, entry.location.object);
    if entry.location.kind == kind::INODE && (FIRST_INODE..EMPTY).contains(&number) {
        return Ok(Some(NodeId { tree, number }));
    }
    if entry.location.kind != kind::ROOT || !is_files(number) || number >= EMPTY {
        return Ok(None);
    }
    // In a snapshot the entries of subvolumes lead nowhere.
    let key = Key { object: tree, kind: kind::ROOT_REF, offset: number };
    let here = find(volume, volume.sup.root, key)?.is_some_and(|item| {
        let name = part(item.data(), 18, usize::from(le16(item.data(), 16)));
        le64(item.data(), 0) == folder.number && name == entry.name
    });
    if !here {
        return Ok(Some(NodeId { tree, number: EMPTY | number }));
    }
    match root(volume, number) {
        Ok((_, number_inside)) => Ok(Some(NodeId { tree: number, number: number_inside })),
        Err(e) if e.kind() == Kind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

/// Gives the entries of a folder behind index `from`.
///
/// # Errors
/// `Corrupt`, or what reading the point says.
pub(super) fn read(
    volume: &Volume,
    folder: &Inode,
    from: u64,
    each: &mut dyn FnMut(Entry) -> bool,
) -> Result<()> {
    let Some(first) = from.checked_add(1) else { return Ok(()) };
    let key = Key { object: folder.number, kind: kind::DIR_INDEX, offset: first };
    let mut walk = Walk::from(volume, folder.root, key)?;
    while let Some(item) = walk.next_of(folder.number, kind::DIR_INDEX)? {
        let Some(Some(entry)) = entries(item.data()).next() else {
            odd(volume, folder, &[]);
            continue;
        };
        let node = target(volume, folder, &entry)?.filter(|_| is_name(entry.name));
        let Some(node) = node else {
            odd(volume, folder, entry.name);
            continue;
        };
        let (name, next) = (entry.name.to_vec(), item.key.offset);
        if !each(Entry { name, node, kind: kind_of(entry.kind), next }) {
            break;
        }
    }
    Ok(())
}

/// The node that a folder has under this name.
///
/// # Errors
/// As [`read`].
pub(super) fn lookup(volume: &Volume, folder: &Inode, name: &[u8]) -> Result<Option<NodeId>> {
    let key = Key { object: folder.number, kind: kind::DIR_ITEM, offset: hash(name) };
    let Some(item) = find(volume, folder.root, key)? else { return Ok(None) };
    match entries(item.data()).flatten().find(|e| e.name == name) {
        Some(entry) => target(volume, folder, &entry),
        None => Ok(None),
    }
}

fn odd(volume: &Volume, folder: &Inode, name: &[u8]) {
    let shown = path_text(OsStr::from_bytes(name));
    let what = format!(
        "directory inode {} of subvolume {}: invalid entry skipped: '{shown}'",
        folder.number, folder.root.id
    );
    volume.findings.warn(&volume.source, Kind::Corrupt, &what, None);
}

fn kind_of(kind: u8) -> Option<NodeKind> {
    Some(match kind & !ENCRYPTED {
        1 => NodeKind::File,
        2 => NodeKind::Folder,
        3 => NodeKind::CharDevice,
        4 => NodeKind::BlockDevice,
        5 => NodeKind::Pipe,
        6 => NodeKind::Socket,
        7 => NodeKind::Link,
        _ => return None,
    })
}

/// The extended attributes of an inode.
///
/// # Errors
/// `Unsupported` if they take more memory than there is; `Corrupt`, or what reading the point says.
pub(super) fn xattrs(volume: &Volume, inode: &Inode) -> Result<Vec<Xattr>> {
    let key = Key { object: inode.number, kind: kind::XATTR, offset: 0 };
    let whose = format!("inode {} of subvolume {}", inode.number, inode.root.id);
    let mut found = Xattrs::new(&volume.source, &volume.findings, whose);
    let mut walk = Walk::from(volume, inode.root, key)?;
    let bad = || volume.bad_inode(inode.root.id, inode.number, "has an invalid extended attribute");
    while let Some(item) = walk.next_of(inode.number, kind::XATTR)? {
        for entry in entries(item.data()) {
            let entry = entry.ok_or_else(bad)?;
            found.add("", entry.name, entry.data.to_vec())?;
        }
    }
    Ok(found.into_list())
}

/// The number of the subvolume that a mount without options shows, if one was chosen.
///
/// # Errors
/// `Corrupt`, or what reading the point says.
pub(super) fn default_subvolume(volume: &Volume) -> Result<Option<u64>> {
    let name = b"default";
    let key = Key { object: ROOT_FOLDER, kind: kind::DIR_ITEM, offset: hash(name) };
    let Some(item) = find(volume, volume.sup.root, key)? else { return Ok(None) };
    let entry = entries(item.data()).flatten().find(|e| e.name == name);
    Ok(entry.map(|e| e.location.object).filter(|id| is_files(*id)))
}
