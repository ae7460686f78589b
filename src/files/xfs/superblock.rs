//! The superblock: sizes and features, and the checks without which nothing else can be read.

use super::super::bytes::{be16, be32, be64, byte, part, until_nul, uuid};
use super::super::source::Source;
use super::header::checksum_is_right;
use crate::error::{Kind, Result};

/// Bytes that are read first: all its fields are in them, whatever the sector's size.
pub(super) const LEN: usize = 512;
/// Where its checksum is.
const CRC_AT: usize = 224;
/// Set while it is being made.
const IN_PROGRESS: usize = 126;
/// Sectors are from 512 bytes to 32 KiB; blocks and those of folders up to 64 KiB; inodes from 256 bytes to 2 KiB.
const SECTOR_LOG: std::ops::RangeInclusive<u8> = 9..=15;
const BLOCK_LOG: std::ops::RangeInclusive<u8> = 9..=16;
const INODE_LOG: std::ops::RangeInclusive<u8> = 8..=11;
/// An allocation group has less than 1 TiB, and at least 64 blocks.
const MAX_AG: u64 = 1 << 40;
const MIN_AG_BLOCKS: u64 = 64;

/// Flags of `sb_versionnum`, whose lowest four bits are the version itself.
mod version {
    pub(super) const NUMBER: u16 = 0xf;
    pub(super) const LOGV2: u16 = 0x400;
    pub(super) const EXTFLG: u16 = 0x1000;
    pub(super) const DIRV2: u16 = 0x2000;
    pub(super) const ASCII_CI: u16 = 0x4000;
    pub(super) const MORE: u16 = 0x8000;
    /// A shared, read-only one of IRIX.
    pub(super) const SHARED: u16 = 0x200;
}

/// `sb_features2` of version 4, and in the fields of version 5 incompatible features.
mod features2 {
    pub(super) const FTYPE: u32 = 0x200;
    pub(super) const KNOWN: u32 = 0x2 | 0x8 | 0x10 | 0x80 | FTYPE;
}

/// Incompatible features of version 5.
mod incompat {
    pub(super) const FTYPE: u32 = 0x1;
    pub(super) const META_UUID: u32 = 0x4;
    pub(super) const NEEDS_REPAIR: u32 = 0x10;
}

/// Incompatible features by bit, as `xfs_info` and `mkfs.xfs` call them, and whether they can be read.
const INCOMPAT: [(u32, &str, bool); 11] = [
    (0x1, "ftype", true),
    (0x2, "sparse", true),
    (0x4, "meta_uuid", true),
    (0x8, "bigtime", true),
    (0x10, "needsrepair", true),
    (0x20, "nrext64", true),
    (0x40, "exchange", true),
    (0x80, "parent", true),
    (0x100, "metadir", false),
    (0x200, "zoned", false),
    (0x400, "zone_gaps", false),
];
const RO_COMPAT: [(u32, &str); 4] =
    [(0x1, "finobt"), (0x2, "rmapbt"), (0x4, "reflink"), (0x8, "inobtcount")];
const FEATURES2: [(u32, &str); 4] =
    [(0x2, "lazy-count"), (0x8, "attr2"), (0x80, "projid32bit"), (features2::FTYPE, "ftype")];

/// What is needed of it.
#[derive(Debug, Clone)]
pub(super) struct Super {
    /// Whether all metadata has checksums, and says whose it is.
    pub v5: bool,
    pub block_log: u8,
    pub blocks: u64,
    pub free_blocks: u64,
    pub ag_blocks: u64,
    pub ag_log: u8,
    pub ag_count: u64,
    pub inode_log: u8,
    pub inodes: u64,
    pub free_inodes: u64,
    pub root: u64,
    /// Inodes that the file system keeps for itself: bitmaps of the realtime device, quotas.
    own: [u64; 5],
    /// Blocks of a folder's block, as a power of two.
    pub dir_log: u8,
    /// Whether entries of folders say what they lead to.
    pub has_ftype: bool,
    /// Whether names do not tell the case of ASCII letters.
    pub ignores_case: bool,
    /// In fsblocks; 0 if the log is on another device.
    pub log_start: u64,
    pub log_blocks: u64,
    pub realtime_blocks: u64,
    /// What all metadata of version 5 has.
    pub meta_uuid: [u8; 16],
    pub uuid: [u8; 16],
    pub label: String,
    sector_log: u8,
    version: u16,
    features2: u32,
    incompat: u32,
    ro_compat: u32,
}

impl Super {
    /// Reads and checks the first one.
    ///
    /// # Errors
    /// `Unsupported` for an unknown incompatible feature; `Corrupt`, or what reading the point says.
    pub(super) fn read(source: &Source) -> Result<Super> {
        let (found, raw) = Super::at(source, 0)?;
        match byte(&raw, IN_PROGRESS) {
            0 => Ok(found),
            _ => {
                let what = "mkfs.xfs or xfs_copy was interrupted: there is no whole file system";
                Err(source.error(Kind::Corrupt, what, 0))
            }
        }
    }

    /// Reads and checks the copy at byte `at`. None is marked as whole: only the first is written last.
    ///
    /// # Errors
    /// As [`Super::read`].
    pub(super) fn copy(source: &Source, at: u64) -> Result<Super> {
        Ok(Super::at(source, at)?.0)
    }

    fn at(source: &Source, at: u64) -> Result<(Super, Vec<u8>)> {
        let raw = source.meta(at, LEN)?;
        let bad = |what: &str| source.error(Kind::Corrupt, what, at);
        if part(&raw, 0, 4) != b"XFSB" {
            return Err(bad("no XFS superblock"));
        }
        let found = Super::parse(&raw);
        found.check_version(source)?;
        if !SECTOR_LOG.contains(&found.sector_log) || be16(&raw, 102) != 1 << found.sector_log {
            return Err(bad("invalid sector size in the superblock"));
        }
        if found.v5 && !Super::is_right(source, at)? {
            return Err(bad("bad checksum of the superblock").remedy(REPAIR));
        }
        found.check_features(source)?;
        found.check_sizes(&raw).map_err(bad)?;
        Ok((found, raw))
    }

    /// Whether the one at byte `at` has the checksum that it says.
    ///
    /// # Errors
    /// What reading the point says.
    pub(super) fn is_right(source: &Source, at: u64) -> Result<bool> {
        let sector = byte(&source.meta(at, LEN)?, 121);
        if !SECTOR_LOG.contains(&sector) {
            return Ok(false);
        }
        Ok(checksum_is_right(&source.meta(at, 1 << sector)?, CRC_AT))
    }

    /// Whether all that never changes, and by which everything is found, is the same in another.
    pub(super) fn is_like(&self, other: &Super) -> bool {
        let key = |s: &Super| {
            let logs = (s.block_log, s.inode_log, s.ag_log, s.dir_log);
            (s.v5, s.ag_blocks, logs, s.root, s.has_ftype)
        };
        key(self) == key(other)
    }

    fn parse(raw: &[u8]) -> Super {
        let version = be16(raw, 100);
        let v5 = version & version::NUMBER == 5;
        let has_more = version & version::MORE != 0;
        // Some kernels wrote it four bytes too far.
        let features2 = if has_more { be32(raw, 200) | be32(raw, 204) } else { 0 };
        let incompat = if v5 { be32(raw, 216) } else { 0 };
        let id = |at| <[u8; 16]>::try_from(part(raw, at, 16)).unwrap_or_default();
        let meta_at = if incompat & incompat::META_UUID != 0 { 248 } else { 32 };
        Super {
            v5,
            block_log: byte(raw, 120),
            blocks: be64(raw, 8),
            free_blocks: be64(raw, 144),
            ag_blocks: u64::from(be32(raw, 84)),
            ag_log: byte(raw, 124),
            ag_count: u64::from(be32(raw, 88)),
            inode_log: byte(raw, 122),
            inodes: be64(raw, 128),
            free_inodes: be64(raw, 136),
            root: be64(raw, 56),
            own: [64, 72, 160, 168, if v5 { 232 } else { 168 }].map(|at| be64(raw, at)),
            dir_log: byte(raw, 192),
            has_ftype: incompat & incompat::FTYPE != 0 || !v5 && features2 & features2::FTYPE != 0,
            ignores_case: version & version::ASCII_CI != 0,
            log_start: be64(raw, 48),
            log_blocks: u64::from(be32(raw, 96)),
            realtime_blocks: be64(raw, 16),
            meta_uuid: id(meta_at),
            uuid: id(32),
            label: String::from_utf8_lossy(until_nul(part(raw, 108, 12))).into_owned(),
            sector_log: byte(raw, 121),
            version,
            features2,
            incompat,
            ro_compat: if v5 { be32(raw, 212) } else { 0 },
        }
    }

    fn check_version(&self, source: &Source) -> Result<()> {
        let number = self.version & version::NUMBER;
        let needed = version::DIRV2 | version::EXTFLG;
        let what = match () {
            () if !(4..=5).contains(&number) => format!("unsupported version {number} of XFS"),
            // What IRIX had before 1998.
            () if self.version & needed != needed || self.version & version::SHARED != 0 => {
                format!("unsupported version {:#x} of XFS", self.version)
            }
            () => return Ok(()),
        };
        Err(source.error(Kind::Unsupported, what, 100))
    }

    fn check_features(&self, source: &Source) -> Result<()> {
        let refuse = |what: String, at| {
            let error = source.error(Kind::Unsupported, what, at);
            Err(error.remedy("mount it through a loop device with a kernel that supports it"))
        };
        let unknown = self.features2 & !features2::KNOWN;
        if !self.v5 && unknown != 0 {
            return refuse(
                format!("unsupported file system feature {unknown:#x} (features2)"),
                200,
            );
        }
        let read = INCOMPAT.iter().filter(|f| f.2).fold(0, |all, f| all | f.0);
        let unknown = self.incompat & !read;
        if unknown != 0 {
            let name = INCOMPAT.iter().find(|f| f.0 & unknown != 0);
            let name = name.map_or_else(|| format!("{unknown:#x}"), |f| f.1.to_string());
            return refuse(format!("unsupported file system feature {name}"), 216);
        }
        if self.incompat & incompat::NEEDS_REPAIR != 0 {
            let what = "the file system is marked as damaged (needsrepair): \
                xfs_repair or xfs_admin did not finish";
            return Err(source.error(Kind::Unsupported, what, 216).remedy(REPAIR));
        }
        Ok(())
    }

    fn check_sizes(&self, raw: &[u8]) -> Result<(), &'static str> {
        let (block, inode) = (self.block_log, self.inode_log);
        let known_inode = INODE_LOG.contains(&inode) && inode <= block;
        match () {
            () if !BLOCK_LOG.contains(&block) || be32(raw, 4) != 1 << block => {
                return Err("invalid block size in the superblock");
            }
            () if !known_inode || be16(raw, 104) != 1 << inode => {
                return Err("invalid inode size in the superblock");
            }
            () if byte(raw, 123) != block - inode => {
                return Err("invalid number of inodes per block in the superblock");
            }
            () if u32::from(block) + u32::from(self.dir_log) > u32::from(*BLOCK_LOG.end()) => {
                return Err("invalid directory block size in the superblock");
            }
            () => {}
        }
        let largest = self.ag_count.saturating_mul(self.ag_blocks);
        let ag_bits = 64 - self.ag_blocks.saturating_sub(1).leading_zeros();
        match () {
            () if self.ag_count == 0
                || self.ag_blocks < MIN_AG_BLOCKS
                || self.ag_blocks << block > MAX_AG
                || u32::from(self.ag_log) != ag_bits =>
            {
                Err("invalid size of allocation groups in the superblock")
            }
            () if self.blocks > largest || self.blocks <= largest - self.ag_blocks => {
                Err("invalid number of blocks in the superblock")
            }
            () => Ok(()),
        }
    }

    /// Bytes of a block.
    pub(super) fn block_size(&self) -> u64 {
        1 << self.block_log
    }

    /// Where `count` blocks from `fsblock` on are, in blocks from the begin of the file system; `None` if they are
    /// not all inside one allocation group. An fsblock has the group in its upper bits; the first block of
    /// each is the superblock.
    pub(super) fn place(&self, fsblock: u64, count: u64) -> Option<u64> {
        let (ag, inside) = (fsblock >> self.ag_log, fsblock & ((1 << self.ag_log) - 1));
        let begin = ag.checked_mul(self.ag_blocks).filter(|_| ag < self.ag_count)?;
        let len = self.blocks.checked_sub(begin)?.min(self.ag_blocks);
        let end = inside.checked_add(count)?;
        (inside > 0 && end <= len).then(|| begin + inside)
    }

    /// Where an inode is, in bytes: its number is its place.
    pub(super) fn inode_place(&self, number: u64) -> Option<u64> {
        let per_block = self.block_log - self.inode_log;
        let block = self.place(number >> per_block, 1)?;
        let inside = number & ((1 << per_block) - 1);
        Some((block << self.block_log) + (inside << self.inode_log))
    }

    /// Whether an inode is one that the file system keeps for itself.
    pub(super) fn is_own(&self, number: u64) -> bool {
        number != self.root && self.own.contains(&number)
    }

    /// Its UUID as people write it.
    pub(super) fn uuid_text(&self) -> String {
        uuid(&self.uuid)
    }

    /// The names of its features.
    pub(super) fn features(&self) -> Vec<String> {
        let mut names = vec![if self.v5 { "crc" } else { "v4" }];
        let incompat = INCOMPAT.iter().filter(|f| self.incompat & f.0 != 0).map(|f| f.1);
        names.extend(incompat);
        names.extend(RO_COMPAT.iter().filter(|f| self.ro_compat & f.0 != 0).map(|f| f.1));
        let old = FEATURES2.iter().filter(|f| self.features2 & f.0 != 0).map(|f| f.1);
        let old: Vec<&str> = old.filter(|name| !names.contains(name)).collect();
        names.extend(old);
        let more = [
            (self.version & version::LOGV2 != 0, "log-v2"),
            (self.ignores_case, "ascii-ci"),
            (self.realtime_blocks > 0, "realtime"),
            (self.log_start == 0, "external-log"),
        ];
        names.extend(more.iter().filter(|(is, _)| *is).map(|(_, name)| *name));
        names.into_iter().map(str::to_string).collect()
    }
}

/// What can be done about a file system that is damaged.
pub(super) const REPAIR: &str = "run xfs_repair on a restored copy of this point";

/// Gives a superblock its right checksum: for tests.
#[cfg(test)]
pub(super) fn seal(sector: &mut [u8]) {
    let crc = super::header::le_checksum(sector, CRC_AT);
    sector[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::super::made::Made;
    use super::*;

    #[test]
    fn places_are_inside_their_group() {
        let sup = Made::new(true).volume().sup;
        assert_eq!((sup.place(1, 127), sup.place(1, 128)), (Some(1), None));
        assert_eq!((sup.place(129, 71), sup.place(129, 72)), (Some(129), None));
        assert_eq!((sup.place(0, 1), sup.place(128, 1), sup.place(256, 1)), (None, None, None));
        assert_eq!(sup.place(u64::MAX, 1).or(sup.place(1, u64::MAX)), None);
        // Two inodes in a block.
        assert_eq!(
            (sup.inode_place(9), sup.inode_place(259)),
            (Some(4608), Some(129 * 1024 + 512))
        );
        assert_eq!((sup.inode_place(1), sup.inode_place(u64::MAX)), (None, None));
        assert!(sup.is_own(20) && !sup.is_own(8));
        assert_eq!((sup.label.as_str(), sup.inodes, sup.free_inodes), ("label", 64, 60));
        assert_eq!(
            sup.features(),
            ["crc", "ftype", "lazy-count", "attr2", "projid32bit", "log-v2"]
        );
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let said = |v5: bool, at: usize, bytes: &[u8]| {
            let mut made = Made::new(v5);
            made.put(at, bytes);
            let error = made.open().err().unwrap_or_else(|| panic!("{at} {bytes:?} is taken"));
            (error.kind(), error.message().to_string())
        };
        let bad: [(usize, &[u8]); 18] = [
            (0, b"XFSC"),
            (4, &[0, 0, 2, 0]),
            (8, &[0, 0, 0, 0, 0, 0, 1, 1]),
            (8, &[0, 0, 0, 0, 0, 0, 0, 128]),
            (8, &[0xff; 8]),
            (84, &[0, 0, 0, 0]),
            (84, &[0xff; 4]),
            (88, &[0, 0, 0, 0]),
            (88, &[0xff; 4]),
            (102, &[0, 0]),
            (104, &[1, 0]),
            (120, &[17]),
            (121, &[200]),
            (122, &[12]),
            (123, &[2]),
            (124, &[8]),
            (126, &[1]),
            (192, &[7]),
        ];
        for (at, bytes) in bad {
            assert_eq!(said(true, at, bytes).0, Kind::Corrupt, "{at}");
            assert_eq!(said(false, at, bytes).0, Kind::Corrupt, "{at}");
        }
        let unsupported = |v5, at, bytes: &[u8], what: &str| {
            let (kind, text) = said(v5, at, bytes);
            assert!(kind == Kind::Unsupported && text.contains(what), "{what}: {text}");
        };
        unsupported(true, 100, &[0xb4, 0xa6], "version 6");
        unsupported(false, 100, &[0x94, 0x84], "version 0x9484");
        unsupported(false, 200, &[0, 0, 4, 0], "0x400 (features2)");
        unsupported(false, 204, &[0, 0, 4, 0], "0x400 (features2)");
        unsupported(true, 216, &[0, 0, 0, 0x11], "needsrepair");
        unsupported(true, 216, &[0, 0, 2, 1], "zoned");
        unsupported(true, 216, &[0x40, 0, 0, 1], "0x40000000");
    }

    #[test]
    fn a_wrong_checksum_is_told_and_version_4_has_none() {
        let made = Made::new(true);
        // It was not sealed.
        let disk = std::sync::Arc::new(crate::storage::MemStorage::new("d", made.bytes));
        let blocks = super::super::super::blocks::Blocks::new(1 << 20);
        let error = Super::read(&Source::new(disk, "d", &blocks)).unwrap_err();
        assert!(error.message().contains("bad checksum"));
        assert!(!Made::new(false).volume().sup.v5);
    }
}
