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

/// What an entry of a folder leads to; `None`, and a finding, if that cannot be.
fn target(volume: &Volume, folder: &Inode, entry: &Named<'_>) -> Result<Option<NodeId>> {
    let (tree, number) = (folder.root.id, entry.location.object);
    let is_inode = entry.location.kind == kind::INODE && (FIRST_INODE..EMPTY).contains(&number);
    let is_tree = entry.location.kind == kind::ROOT && is_files(number) && number < EMPTY;
    let node = match is_name(entry.name) {
        true if is_inode => Some(NodeId { tree, number }),
        true if is_tree => match subvolume(volume, folder, entry) {
            // One that cannot be read keeps its name; the others are not to suffer for it.
            Err(e) if e.kind().is_lasting() => {
                volume.findings.failed(&volume.source, e);
                Some(NodeId { tree: number, number: FIRST_INODE })
            }
            other => other?,
        },
        _ => None,
    };
    if node.is_none() {
        odd(volume, folder, entry.name);
    }
    Ok(node)
}

/// The root folder of a subvolume; `None` if it is gone. In a snapshot the entries of subvolumes lead nowhere.
fn subvolume(volume: &Volume, folder: &Inode, entry: &Named<'_>) -> Result<Option<NodeId>> {
    let (tree, number) = (folder.root.id, entry.location.object);
    if index_of(volume, folder, entry)?.is_none() {
        return Ok(Some(NodeId { tree, number: EMPTY | number }));
    }
    match root(volume, number) {
        Ok((_, number_inside)) => Ok(Some(NodeId { tree: number, number: number_inside })),
        Err(e) if e.kind() == Kind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

/// Which entry of its folder has this name, by what an inode or subvolume has noted of its names.
fn index_of(volume: &Volume, folder: &Inode, entry: &Named<'_>) -> Result<Option<u64>> {
    let number = entry.location.object;
    if entry.location.kind == kind::INODE {
        let key = Key { object: number, kind: kind::INODE_REF, offset: folder.number };
        let found = find(volume, folder.root, key)?;
        return Ok(found.and_then(|item| noted_index(item.data(), entry.name)));
    }
    let key = Key { object: folder.root.id, kind: kind::ROOT_REF, offset: number };
    Ok(find(volume, volume.sup.root, key)?.and_then(|item| {
        let data = item.data();
        let name = part(data, 18, usize::from(le16(data, 16)));
        (le64(data, 0) == folder.number && name == entry.name).then(|| le64(data, 8))
    }))
}

/// Whether a folder, or the subvolume whose root it is, has noted one place, which is in `parent`: see
/// [`super::super::Tree::is_parent`].
///
/// # Errors
/// `Corrupt`, or what reading the point says.
pub(super) fn is_parent(volume: &Volume, folder: NodeId, parent: NodeId) -> Result<bool> {
    if folder.number & EMPTY > 0 {
        return Ok(folder.tree == parent.tree);
    }
    let one = |root, object: u64, kind: u8, parent: u64, of_parent: &dyn Fn(&[u8]) -> bool| {
        let mut walk = Walk::from(volume, root, Key { object, kind, offset: 0 })?;
        let Some(item) = walk.next_of(object, kind)? else { return Ok(false) };
        let is_it = item.key.offset == parent && of_parent(item.data());
        Ok(is_it && walk.next_of(object, kind)?.is_none())
    };
    if folder.tree != parent.tree {
        let is_in = |data: &[u8]| le64(data, 0) == parent.number;
        return one(volume.sup.root, folder.tree, kind::ROOT_BACKREF, parent.tree, &is_in);
    }
    let (root, _) = root(volume, folder.tree)?;
    one(root, folder.number, kind::INODE_REF, parent.number, &|_| true)
}

/// The index of a name in a list of those that an inode has in one folder.
fn noted_index(mut rest: &[u8], name: &[u8]) -> Option<u64> {
    /// Index, and length of the name.
    const HEAD: usize = 10;
    while rest.len() >= HEAD {
        let len = usize::from(le16(rest, 8));
        if part(rest, HEAD, len) == name {
            return Some(le64(rest, 0));
        }
        rest = rest.get(HEAD + len..).unwrap_or_default();
    }
    None
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
        let Some(node) = target(volume, folder, &entry)? else { continue };
        let (name, next) = (entry.name.to_vec(), item.key.offset);
        if !each(Entry { name, node, kind: kind_of(entry.kind), next }) {
            break;
        }
    }
    Ok(())
}

/// The node that a folder has under this name: what the list of its entries says, which is where a listing comes from.
///
/// # Errors
/// As [`read`].
pub(super) fn lookup(volume: &Volume, folder: &Inode, name: &[u8]) -> Result<Option<NodeId>> {
    match hashed(volume, folder, name) {
        Ok(Some(found)) => return Ok(Some(found)),
        Err(e) if !e.kind().is_lasting() => return Err(e),
        // What is wrong with the names by hash, or not in them, is no reason not to look.
        Ok(None) | Err(_) => {}
    }
    let mut found = None;
    let listed = read(volume, folder, 0, &mut |entry| {
        if entry.name == name {
            found = Some(entry.node);
        }
        found.is_none()
    });
    match found {
        Some(node) => Ok(Some(node)),
        None => listed.map(|()| None),
    }
}

/// The node of a name by its hash, if the list of entries says the same.
fn hashed(volume: &Volume, folder: &Inode, name: &[u8]) -> Result<Option<NodeId>> {
    let key = Key { object: folder.number, kind: kind::DIR_ITEM, offset: hash(name) };
    let Some(item) = find(volume, folder.root, key)? else { return Ok(None) };
    let mut same = entries(item.data()).flatten().filter(|e| e.name == name);
    let (Some(entry), None) = (same.next(), same.next()) else { return Ok(None) };
    let Some(offset) = index_of(volume, folder, &entry)? else { return Ok(None) };
    let key = Key { object: folder.number, kind: kind::DIR_INDEX, offset };
    let Some(item) = find(volume, folder.root, key)? else { return Ok(None) };
    let listed = entries(item.data()).next().flatten();
    match listed.filter(|e| e.name == name && e.location == entry.location) {
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
