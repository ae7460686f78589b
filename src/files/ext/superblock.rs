//! The superblock: sizes, features, and the checks without which nothing else can be read.

use super::super::bytes::{byte, le16, le32, part, until_nul, uuid};
use super::super::crc::crc32c;
use super::super::source::Source;
use crate::error::{Error, Kind, Result};

/// Where it is, whatever the block size.
pub(super) const AT: u64 = 1024;
pub(super) const LEN: usize = 1024;
pub(super) const MAGIC: u16 = 0xef53;
/// Blocks are from 1 KiB to 64 KiB.
pub(super) const MAX_LOG_BLOCK: u32 = 6;

/// Incompatible features.
pub(super) mod incompat {
    pub(in super::super) const FILETYPE: u32 = 0x2;
    pub(in super::super) const RECOVER: u32 = 0x4;
    pub(in super::super) const META_BG: u32 = 0x10;
    pub(in super::super) const BIT64: u32 = 0x80;
    pub(in super::super) const CSUM_SEED: u32 = 0x2000;
    pub(in super::super) const LARGEDIR: u32 = 0x4000;
}

/// Features that only matter for writing, but for these.
pub(super) mod ro_compat {
    pub(in super::super) const SPARSE_SUPER: u32 = 0x1;
    pub(in super::super) const HUGE_FILE: u32 = 0x8;
    pub(in super::super) const GDT_CSUM: u32 = 0x10;
    pub(in super::super) const METADATA_CSUM: u32 = 0x400;
}

const HAS_JOURNAL: u32 = 0x4;
const SPARSE_SUPER2: u32 = 0x200;

/// Incompatible features by bit, as `dumpe2fs` calls them, and whether they can be read.
const INCOMPAT: [(u32, &str, bool); 18] = [
    (0x1, "compression", false),
    (0x2, "filetype", true),
    (0x4, "needs_recovery", true),
    (0x8, "journal_dev", false),
    (0x10, "meta_bg", true),
    (0x40, "extent", true),
    (0x80, "64bit", true),
    (0x100, "mmp", true),
    (0x200, "flex_bg", true),
    (0x400, "ea_inode", true),
    (0x1000, "dirdata", true),
    (0x2000, "metadata_csum_seed", true),
    (0x4000, "large_dir", true),
    (0x8000, "inline_data", true),
    (0x1_0000, "encrypt", true),
    (0x2_0000, "casefold", true),
    (0x20, "FEATURE_I5", false),
    (0x800, "FEATURE_I11", false),
];

const COMPAT: [(u32, &str); 8] = [
    (0x4, "has_journal"),
    (0x8, "ext_attr"),
    (0x10, "resize_inode"),
    (0x20, "dir_index"),
    (0x200, "sparse_super2"),
    (0x400, "fast_commit"),
    (0x800, "stable_inodes"),
    (0x1000, "orphan_file"),
];

const RO_COMPAT: [(u32, &str); 14] = [
    (0x1, "sparse_super"),
    (0x2, "large_file"),
    (0x8, "huge_file"),
    (0x10, "uninit_bg"),
    (0x20, "dir_nlink"),
    (0x40, "extra_isize"),
    (0x100, "quota"),
    (0x200, "bigalloc"),
    (0x400, "metadata_csum"),
    (0x1000, "read-only"),
    (0x2000, "project"),
    (0x4000, "shared_blocks"),
    (0x8000, "verity"),
    (0x1_0000, "orphan_present"),
];

/// What is needed of it.
#[derive(Debug, Clone)]
pub(super) struct Super {
    pub block_size: u64,
    pub blocks: u64,
    pub free_blocks: u64,
    pub inodes: u32,
    pub free_inodes: u32,
    /// The block in which group 0 begins.
    pub first_block: u64,
    pub blocks_per_group: u64,
    pub inodes_per_group: u32,
    pub inode_size: usize,
    /// The first inode that is not the file system's own.
    pub first_inode: u32,
    pub descriptor_size: usize,
    pub first_meta_group: u64,
    pub compat: u32,
    pub incompat: u32,
    pub ro_compat: u32,
    /// With which all checksums begin.
    pub seed: u32,
    pub uuid: String,
    pub label: String,
    pub journal_inode: u32,
    /// Whether the kernel found errors in it.
    pub has_errors: bool,
    backups: [u32; 2],
}

impl Super {
    /// Reads and checks the one at byte `at`.
    ///
    /// # Errors
    /// `Unsupported` for an unknown incompatible feature; `Corrupt`, or what reading the point says.
    pub(super) fn at(source: &Source, at: u64) -> Result<Super> {
        let raw = source.meta(at, LEN)?;
        let bad = |what: &str| source.error(Kind::Corrupt, what, at);
        if le16(&raw, 0x38) != MAGIC {
            return Err(bad("no ext superblock"));
        }
        let found = Super::parse(&raw);
        if found.has_checksums() && le32(&raw, 0x3fc) != crc32c(!0, part(&raw, 0, 0x3fc)) {
            return Err(bad("bad checksum of the superblock"));
        }
        if le32(&raw, 0x18) > MAX_LOG_BLOCK {
            return Err(bad("invalid block size in the superblock"));
        }
        found.check_features(source)?;
        found.check_sizes().map_err(bad)?;
        Ok(found)
    }

    fn parse(raw: &[u8]) -> Super {
        let incompat = le32(raw, 0x60);
        let wide = incompat & incompat::BIT64 != 0;
        let both = |low, high| {
            let high = if wide { u64::from(le32(raw, high)) << 32 } else { 0 };
            u64::from(le32(raw, low)) | high
        };
        // Revision 0 has no such fields.
        let old = le32(raw, 0x4c) == 0;
        let id = part(raw, 0x68, 16);
        Super {
            block_size: 1024 << le32(raw, 0x18).min(MAX_LOG_BLOCK),
            blocks: both(0x4, 0x150),
            free_blocks: both(0xc, 0x158),
            inodes: le32(raw, 0),
            free_inodes: le32(raw, 0x10),
            first_block: u64::from(le32(raw, 0x14)),
            blocks_per_group: u64::from(le32(raw, 0x20)),
            inodes_per_group: le32(raw, 0x28),
            inode_size: if old { 128 } else { usize::from(le16(raw, 0x58)) },
            first_inode: if old { 11 } else { le32(raw, 0x54) },
            descriptor_size: if wide { usize::from(le16(raw, 0xfe)) } else { 32 },
            first_meta_group: u64::from(le32(raw, 0x104)),
            compat: le32(raw, 0x5c),
            incompat,
            ro_compat: le32(raw, 0x64),
            seed: match incompat & incompat::CSUM_SEED {
                0 => crc32c(!0, id),
                _ => le32(raw, 0x270),
            },
            uuid: uuid(id),
            label: String::from_utf8_lossy(until_nul(part(raw, 0x78, 16))).into_owned(),
            journal_inode: le32(raw, 0xe0),
            has_errors: le16(raw, 0x3a) & 2 != 0,
            backups: [le32(raw, 0x24c), le32(raw, 0x250)],
        }
    }

    fn check_features(&self, source: &Source) -> Result<()> {
        let known = INCOMPAT.iter().filter(|f| f.2).fold(0, |all, f| all | f.0);
        let unknown = self.incompat & !known;
        if unknown == 0 {
            return Ok(());
        }
        let name = INCOMPAT.iter().find(|f| f.0 & unknown != 0);
        let name = name.map_or_else(|| format!("{unknown:#x}"), |f| f.1.to_string());
        let what = format!("unsupported file system feature {name}");
        let error = source.error(Kind::Unsupported, what, AT + 0x60);
        Err(error.remedy("mount it through a loop device with a kernel that supports it"))
    }

    fn check_sizes(&self) -> Result<(), &'static str> {
        let bits = self.block_size * 8;
        let inode = self.inode_size;
        let in_group = u64::from(self.inodes_per_group);
        // Groups of clusters (bigalloc) are larger.
        match () {
            () if !(128..=self.block_size as usize).contains(&inode)
                || !inode.is_power_of_two() =>
            {
                Err("invalid inode size in the superblock")
            }
            () if in_group == 0 || in_group > bits => {
                Err("invalid number of inodes per group in the superblock")
            }
            () if self.blocks_per_group == 0 || self.blocks <= self.first_block => {
                Err("invalid number of blocks in the superblock")
            }
            () if !(32..=1024).contains(&self.descriptor_size)
                || !self.descriptor_size.is_power_of_two() =>
            {
                Err("invalid group descriptor size in the superblock")
            }
            () if u64::from(self.inodes) > self.groups().saturating_mul(in_group) => {
                Err("the superblock has more inodes than its groups hold")
            }
            () => Ok(()),
        }
    }

    /// Whether all that never changes, and by which everything is found, is the same in another.
    pub(super) fn is_like(&self, other: &Super) -> bool {
        const FIXED: u32 = incompat::FILETYPE | incompat::BIT64 | incompat::META_BG;
        let key = |s: &Super| {
            let groups = (s.first_block, s.blocks_per_group, s.inodes_per_group);
            (s.block_size, groups, s.inode_size, s.descriptor_size, s.incompat & FIXED)
        };
        key(self) == key(other)
    }

    /// Number of groups.
    pub(super) fn groups(&self) -> u64 {
        (self.blocks - self.first_block.min(self.blocks)).div_ceil(self.blocks_per_group.max(1))
    }

    /// Whether all metadata has checksums.
    pub(super) fn has_checksums(&self) -> bool {
        self.ro_compat & ro_compat::METADATA_CSUM != 0
    }

    /// Whether group descriptors may say that a group has no inodes yet.
    pub(super) fn has_group_flags(&self) -> bool {
        self.ro_compat & (ro_compat::METADATA_CSUM | ro_compat::GDT_CSUM) != 0
    }

    /// Whether something may be in the journal only.
    pub(super) fn needs_recovery(&self) -> bool {
        self.incompat & incompat::RECOVER != 0 && self.compat & HAS_JOURNAL != 0
    }

    /// Where the descriptor of a group is, in bytes.
    pub(super) fn descriptor_at(&self, group: u64) -> Option<u64> {
        let per_block = self.block_size / self.descriptor_size as u64;
        let table = group / per_block;
        let meta = self.incompat & incompat::META_BG != 0 && table >= self.first_meta_group;
        let block = match meta {
            false => 1024 / self.block_size + 1 + table,
            true => {
                let first = table.checked_mul(per_block)?;
                let mut before = u64::from(self.has_backup(first));
                // Group 0 has the boot block before its superblock here.
                before += u64::from(self.block_size == 1024 && table == 0 && self.first_block == 0);
                first.checked_mul(self.blocks_per_group)?.checked_add(self.first_block + before)?
            }
        };
        let inside = (group % per_block) * self.descriptor_size as u64;
        block.checked_mul(self.block_size)?.checked_add(inside)
    }

    /// Whether a group has a copy of the superblock.
    fn has_backup(&self, group: u64) -> bool {
        let power = |base: u64| {
            let mut n = base;
            while n < group {
                n = n.saturating_mul(base);
            }
            n == group
        };
        match () {
            () if group == 0 => true,
            () if self.compat & SPARSE_SUPER2 != 0 => {
                self.backups.iter().any(|b| u64::from(*b) == group)
            }
            () if self.ro_compat & ro_compat::SPARSE_SUPER == 0 => true,
            () => group == 1 || [3, 5, 7].into_iter().any(power),
        }
    }

    /// What to call it.
    pub(super) fn kind(&self) -> &'static str {
        /// What ext3 has.
        const OLD: (u32, u32) = (0x2 | 0x4 | 0x10, 0x1 | 0x2 | 0x4);
        match () {
            () if self.incompat & !OLD.0 != 0 || self.ro_compat & !OLD.1 != 0 => "ext4",
            () if self.compat & HAS_JOURNAL != 0 => "ext3",
            () => "ext2",
        }
    }

    /// The names of its features.
    pub(super) fn features(&self) -> Vec<String> {
        let compat = COMPAT.iter().filter(|f| self.compat & f.0 != 0).map(|f| f.1);
        let incompat = INCOMPAT.iter().filter(|f| self.incompat & f.0 != 0).map(|f| f.1);
        let ro = RO_COMPAT.iter().filter(|f| self.ro_compat & f.0 != 0).map(|f| f.1);
        compat.chain(incompat).chain(ro).map(str::to_string).collect()
    }
}

/// The descriptor of a group, as far as it is needed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Group {
    /// The block in which its inodes begin.
    pub inodes_at: u64,
    /// Whether it has none yet.
    pub has_none: bool,
}

impl Group {
    /// Reads and checks the descriptor of `group`.
    pub(super) fn read(source: &Source, sup: &Super, group: u64) -> Result<Group> {
        let beyond = || source.error(Kind::Corrupt, "invalid block group", AT);
        let at = sup.descriptor_at(group).ok_or_else(beyond)?;
        let raw = source.meta(at, sup.descriptor_size)?;
        if sup.has_checksums() && le16(&raw, 0x1e) != Self::checksum(sup, group, &raw) {
            return Err(wrong(source, &format!("the descriptor of group {group}"), at));
        }
        let high = if sup.descriptor_size >= 64 { u64::from(le32(&raw, 0x28)) << 32 } else { 0 };
        Ok(Group {
            inodes_at: u64::from(le32(&raw, 0x8)) | high,
            has_none: sup.has_group_flags() && byte(&raw, 0x12) & 1 != 0,
        })
    }

    fn checksum(sup: &Super, group: u64, raw: &[u8]) -> u16 {
        let mut crc = crc32c(sup.seed, &(group as u32).to_le_bytes());
        crc = crc32c(crc, part(raw, 0, 0x1e));
        crc = crc32c(crc, &[0, 0]);
        crc32c(crc, part(raw, 0x20, raw.len())) as u16
    }
}

/// That a checksum does not fit.
pub(super) fn wrong(source: &Source, what: &str, at: u64) -> Error {
    source.error(Kind::Corrupt, format!("bad checksum of {what}"), at)
}
