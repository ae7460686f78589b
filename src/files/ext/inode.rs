//! Inodes: where they are, their checksums, and what their fields mean.

use super::super::bytes::{le16, le32, part};
use super::super::crc::crc32c;
use super::super::tree::{Attributes, Device, Flags, NodeKind, Time};
use super::superblock::{Super, incompat, ro_compat};

/// Flags of inodes.
pub(super) mod flags {
    pub(in super::super) const IMMUTABLE: u32 = 0x10;
    pub(in super::super) const APPEND: u32 = 0x20;
    pub(in super::super) const ENCRYPT: u32 = 0x800;
    pub(in super::super) const INDEX: u32 = 0x1000;
    pub(in super::super) const HUGE_FILE: u32 = 0x4_0000;
    pub(in super::super) const EXTENTS: u32 = 0x8_0000;
    pub(in super::super) const VERITY: u32 = 0x10_0000;
    pub(in super::super) const EA_INODE: u32 = 0x20_0000;
    pub(in super::super) const INLINE_DATA: u32 = 0x1000_0000;
}

/// The part of an inode that every one has.
const OLD_SIZE: usize = 128;
/// Where `i_block` is, and its length.
const BLOCK_AT: usize = 0x28;
pub(super) const BLOCK_LEN: usize = 60;

/// An inode as it is on disk.
#[derive(Debug, Clone)]
pub(super) struct Inode {
    /// Its number.
    pub number: u32,
    /// Where it is, for messages.
    pub at: u64,
    raw: Vec<u8>,
    /// With which the checksums of its blocks begin.
    pub seed: u32,
}

impl Inode {
    /// Takes its bytes, all of them.
    pub(super) fn new(sup: &Super, number: u32, at: u64, raw: Vec<u8>) -> Inode {
        let seed = crc32c(sup.seed, &number.to_le_bytes());
        let seed = crc32c(seed, part(&raw, 0x64, 4));
        Inode { number, at, raw, seed }
    }

    /// Whether its checksum is right.
    pub(super) fn is_right(&self) -> bool {
        let raw = &self.raw;
        let mut crc = crc32c(self.seed, part(raw, 0, 0x7c));
        crc = crc32c(crc, &[0, 0]);
        crc = crc32c(crc, part(raw, 0x7e, OLD_SIZE - 0x7e));
        let mut stored = u32::from(le16(raw, 0x7c));
        if raw.len() > OLD_SIZE {
            crc = crc32c(crc, part(raw, OLD_SIZE, 2));
            // The upper half is there only if the inode says that it reaches so far.
            let high = self.extra_size() >= 4;
            let zero = [0, 0];
            crc = crc32c(crc, if high { &zero } else { part(raw, 0x82, 2) });
            crc = crc32c(crc, part(raw, 0x84, raw.len()));
            if high {
                stored |= u32::from(le16(raw, 0x82)) << 16;
                return stored == crc;
            }
        }
        stored == crc & 0xffff
    }

    /// Bytes of the part behind the first 128 that have fields.
    fn extra_size(&self) -> usize {
        usize::from(le16(&self.raw, 0x80)).min(self.raw.len().saturating_sub(OLD_SIZE))
    }

    /// The whole mode.
    pub(super) fn mode(&self) -> u32 {
        u32::from(le16(&self.raw, 0))
    }

    /// What it is.
    pub(super) fn kind(&self) -> Option<NodeKind> {
        NodeKind::of_mode(self.mode())
    }

    /// How many names it has.
    pub(super) fn links(&self) -> u16 {
        le16(&self.raw, 0x1a)
    }

    /// Whether all of these flags are set.
    pub(super) fn has(&self, flag: u32) -> bool {
        le32(&self.raw, 0x20) & flag == flag
    }

    /// Length in bytes.
    pub(super) fn size(&self, sup: &Super) -> u64 {
        let large = match self.kind() {
            Some(NodeKind::File) => true,
            Some(NodeKind::Folder) => sup.incompat & incompat::LARGEDIR != 0,
            _ => false,
        };
        let high = if large { u64::from(le32(&self.raw, 0x6c)) << 32 } else { 0 };
        u64::from(le32(&self.raw, 0x4)) | high
    }

    /// Bytes that it takes on disk.
    pub(super) fn allocated(&self, sup: &Super) -> u64 {
        let huge = sup.ro_compat & ro_compat::HUGE_FILE != 0;
        let high = if huge { u64::from(le16(&self.raw, 0x74)) << 32 } else { 0 };
        let count = u64::from(le32(&self.raw, 0x1c)) | high;
        let unit = if huge && self.has(flags::HUGE_FILE) { sup.block_size } else { 512 };
        count.saturating_mul(unit)
    }

    /// The block of its attributes; 0 if it has none.
    pub(super) fn attribute_block(&self) -> u64 {
        u64::from(le32(&self.raw, 0x68)) | u64::from(le16(&self.raw, 0x76)) << 32
    }

    /// The 60 bytes that have its map, its text, or its numbers.
    pub(super) fn block_bytes(&self) -> &[u8] {
        part(&self.raw, BLOCK_AT, BLOCK_LEN)
    }

    /// The room for attributes in the inode itself, behind its fields.
    pub(super) fn attribute_bytes(&self) -> &[u8] {
        match self.raw.len() > OLD_SIZE {
            true => part(&self.raw, OLD_SIZE + self.extra_size(), self.raw.len()),
            false => &[],
        }
    }

    fn time(&self, at: usize, extra: usize) -> Time {
        let seconds = i64::from(le32(&self.raw, at).cast_signed());
        // Fields that this inode does not have are not its.
        if OLD_SIZE + self.extra_size() < extra + 4 {
            return Time { seconds, nanos: 0 };
        }
        let more = le32(&self.raw, extra);
        Time { seconds: seconds + (i64::from(more & 3) << 32), nanos: (more >> 2).min(999_999_999) }
    }

    fn device(&self) -> Device {
        let block = self.block_bytes();
        match (le32(block, 0), le32(block, 4)) {
            (0, new) => Device {
                major: (new & 0xf_ff00) >> 8,
                minor: (new & 0xff) | (new >> 12 & 0xf_ff00),
            },
            (old, _) => Device { major: old >> 8 & 0xff, minor: old & 0xff },
        }
    }

    /// All that it says; `None` if it is nothing that can be.
    pub(super) fn attributes(&self, sup: &Super) -> Option<Attributes> {
        let kind = self.kind()?;
        let id =
            |low, high| u32::from(le16(&self.raw, low)) | u32::from(le16(&self.raw, high)) << 16;
        let born = OLD_SIZE + self.extra_size() >= 0x98;
        let is_device = matches!(kind, NodeKind::CharDevice | NodeKind::BlockDevice);
        Some(Attributes {
            kind,
            size: self.size(sup),
            allocated: self.allocated(sup),
            mode: self.mode() & 0o7777,
            uid: id(0x2, 0x78),
            gid: id(0x18, 0x7a),
            links: u64::from(self.links()),
            atime: self.time(0x8, 0x8c),
            mtime: self.time(0x10, 0x88),
            ctime: self.time(0xc, 0x84),
            crtime: born.then(|| self.time(0x90, 0x94)),
            device: is_device.then(|| self.device()),
            flags: Flags {
                encrypted: self.has(flags::ENCRYPT),
                immutable: self.has(flags::IMMUTABLE),
                append_only: self.has(flags::APPEND),
                verity: self.has(flags::VERITY),
                ..Flags::default()
            },
        })
    }
}
