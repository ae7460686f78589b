//! Inodes, and the trees of files that they are in.

use super::super::bytes::{byte, le32, le64};
use super::super::tree::{Attributes, Device, Flags, MAX_SIZE, NodeId, NodeKind, Time};
use super::node::{Key, is_files};
use super::superblock::{MAX_LEVEL, Root};
use super::volume::Volume;
use super::walk::{Walk, find};
use crate::error::{Error, Kind, Result};

/// Kinds of items.
pub(super) mod kind {
    pub(in super::super) const INODE: u8 = 1;
    pub(in super::super) const INODE_REF: u8 = 12;
    pub(in super::super) const XATTR: u8 = 24;
    pub(in super::super) const DIR_ITEM: u8 = 84;
    pub(in super::super) const DIR_INDEX: u8 = 96;
    pub(in super::super) const EXTENT: u8 = 108;
    pub(in super::super) const SUMS: u8 = 128;
    pub(in super::super) const ROOT: u8 = 132;
    pub(in super::super) const ROOT_BACKREF: u8 = 144;
    pub(in super::super) const ROOT_REF: u8 = 156;
    pub(in super::super) const CHUNK: u8 = 228;
}

/// Set in the number of a folder that stands where a snapshot has no subvolume: the kernel shows it empty.
pub(super) const EMPTY: u64 = 1 << 63;

const INODE_LEN: usize = 160;
const NODATASUM: u64 = 0x1;
const IMMUTABLE: u64 = 0x40;
const APPEND: u64 = 0x80;
const COMPRESS: u64 = 0x800;
const VERITY: u64 = 1 << 32;

/// The root of the tree with this number.
///
/// # Errors
/// `NotFound` if there is none; `Corrupt`, or what reading the point says.
pub(super) fn root(volume: &Volume, id: u64) -> Result<(Root, u64)> {
    /// Bytes of the item up to the level, and the mark of a subvolume that is being deleted.
    const LEN: usize = 239;
    const DEAD: u64 = 1 << 48;
    let missing = || Error::new(Kind::NotFound, format!("no subvolume {id}"));
    let key = Key { object: id, kind: kind::ROOT, offset: 0 };
    let mut walk = Walk::from(volume, volume.sup.root, key)?;
    let item = walk.next_of(id, kind::ROOT)?.ok_or_else(missing)?;
    let data = item.data();
    let is_gone = le32(data, 216) == 0 || le64(data, 208) & DEAD > 0;
    if is_files(id) && is_gone {
        return Err(missing());
    }
    let level = byte(data, 238);
    if data.len() < LEN || level >= MAX_LEVEL {
        let what = format!("the root item of tree {id} is invalid");
        return Err(volume.source.error(Kind::Corrupt, what, 0));
    }
    Ok((Root { id, at: le64(data, 176), level, generation: le64(data, 160) }, le64(data, 168)))
}

/// An inode.
pub(super) struct Inode {
    pub root: Root,
    pub number: u64,
    raw: Vec<u8>,
}

impl Inode {
    /// The inode of a node.
    ///
    /// # Errors
    /// `NotFound` if there is none; `Corrupt`, or what reading the point says.
    pub(super) fn read(volume: &Volume, node: NodeId) -> Result<Inode> {
        let missing = || {
            Error::new(
                Kind::NotFound,
                format!("no inode {} in subvolume {}", node.number, node.tree),
            )
        };
        if !is_files(node.tree) {
            return Err(missing());
        }
        let (root, _) = root(volume, node.tree)?;
        let key = Key { object: node.number, kind: kind::INODE, offset: 0 };
        let item = find(volume, root, key)?.ok_or_else(missing)?;
        let inode = Inode { root, number: node.number, raw: item.data().to_vec() };
        if inode.raw.len() < INODE_LEN {
            return Err(volume.bad_inode(node.tree, node.number, "is cut short"));
        }
        // One without a name is waiting to be deleted.
        if le32(&inode.raw, 40) == 0 {
            return Err(missing());
        }
        if inode.kind().is_none() {
            return Err(volume.bad_inode(node.tree, node.number, "has an invalid file type"));
        }
        if inode.size() > MAX_SIZE {
            return Err(volume.bad_inode(node.tree, node.number, "has an invalid size"));
        }
        Ok(inode)
    }

    /// The same of one that has to be of this kind.
    ///
    /// # Errors
    /// `Usage` if it is not; as [`Inode::read`].
    pub(super) fn of_kind(volume: &Volume, node: NodeId, kind: NodeKind) -> Result<Inode> {
        let inode = Inode::read(volume, node)?;
        kind.only(inode.kind(), format_args!("inode {}", node.number))?;
        Ok(inode)
    }

    fn mode(&self) -> u32 {
        le32(&self.raw, 52)
    }

    pub(super) fn kind(&self) -> Option<NodeKind> {
        NodeKind::of_mode(self.mode())
    }

    /// Length in bytes.
    pub(super) fn size(&self) -> u64 {
        le64(&self.raw, 16)
    }

    fn has(&self, flag: u64) -> bool {
        le64(&self.raw, 64) & flag > 0
    }

    /// Whether its data has checksums.
    pub(super) fn has_sums(&self) -> bool {
        !self.has(NODATASUM)
    }

    fn time(&self, at: usize) -> Time {
        Time {
            seconds: le64(&self.raw, at) as i64,
            nanos: le32(&self.raw, at + 8).min(999_999_999),
        }
    }

    pub(super) fn attributes(&self) -> Attributes {
        let kind = self.kind().unwrap_or(NodeKind::File);
        let device = le64(&self.raw, 56);
        let is_device = matches!(kind, NodeKind::CharDevice | NodeKind::BlockDevice);
        let made = self.time(148);
        Attributes {
            kind,
            size: self.size(),
            allocated: le64(&self.raw, 24),
            mode: self.mode() & 0o7777,
            uid: le32(&self.raw, 44),
            gid: le32(&self.raw, 48),
            links: u64::from(le32(&self.raw, 40)),
            atime: self.time(112),
            mtime: self.time(136),
            ctime: self.time(124),
            crtime: (made != Time::default()).then_some(made),
            // As Linux has it in memory: twelve bits, and twenty.
            device: is_device.then_some(Device {
                major: (device >> 20) as u32 & 0xfff,
                minor: device as u32 & 0xf_ffff,
            }),
            flags: Flags {
                compressed: self.has(COMPRESS),
                immutable: self.has(IMMUTABLE),
                append_only: self.has(APPEND),
                verity: self.has(VERITY),
                ..Flags::default()
            },
        }
    }
}

/// What is known of a folder in place of a subvolume that is not there.
pub(super) fn empty() -> Attributes {
    Attributes {
        kind: NodeKind::Folder,
        size: 0,
        allocated: 0,
        mode: 0o755,
        uid: 0,
        gid: 0,
        links: 1,
        atime: Time::default(),
        mtime: Time::default(),
        ctime: Time::default(),
        crtime: None,
        device: None,
        flags: Flags::default(),
    }
}
