//! The superblock and its copies.

use super::super::bytes::{byte, le16, le32, le64, part, until_nul, uuid};
use super::super::findings::Findings;
use super::super::source::Source;
use super::checksum::Checksum;
use crate::error::{Error, Kind, Result};

/// Where it is, and its copies, as far as the device goes.
pub(super) const PLACES: [u64; 3] = [64 << 10, 64 << 20, 256 << 30];
pub(super) const LEN: usize = 4096;
const MAGIC: &[u8] = b"_BHRfS_M";
/// The chunks that are needed to read the tree of chunks.
const SYSTEM_CHUNKS: (usize, usize) = (0x32b, 2048);
/// Bytes of a checksum's field, whatever the checksum.
pub(super) const SUM_FIELD: usize = 32;
/// Trees are at most that high.
pub(super) const MAX_LEVEL: u8 = 8;

pub(super) const METADATA_UUID: u64 = 0x400;

/// Incompatible features by bit, as the kernel calls them, and whether they can be read.
const INCOMPAT: [(u64, &str, bool); 16] = [
    (0x1, "mixed_backref", true),
    (0x2, "default_subvol", true),
    (0x4, "mixed_groups", true),
    (0x8, "compress_lzo", true),
    (0x10, "compress_zstd", true),
    (0x20, "big_metadata", true),
    (0x40, "extended_iref", true),
    (0x80, "raid56", true),
    (0x100, "skinny_metadata", true),
    (0x200, "no_holes", true),
    (METADATA_UUID, "metadata_uuid", true),
    (0x800, "raid1c34", true),
    (0x1000, "zoned", false),
    (0x2000, "extent_tree_v2", false),
    (0x4000, "raid_stripe_tree", false),
    (0x1_0000, "simple_quota", true),
];

/// The root of a tree: where it is, and what it has to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Root {
    /// The number of the tree.
    pub id: u64,
    /// Its logical address.
    pub at: u64,
    pub level: u8,
    pub generation: u64,
}

/// What is needed of it.
#[derive(Debug, Clone)]
pub(super) struct Super {
    pub checksum: Checksum,
    /// The file system's id that its nodes carry.
    pub node_id: Vec<u8>,
    pub uuid: String,
    pub label: String,
    pub root: Root,
    pub chunk_root: Root,
    /// Whether there is a tree of what was synced last.
    pub has_log: bool,
    pub total: u64,
    pub used: u64,
    pub devices: u64,
    /// This device, and its bytes.
    pub device: u64,
    pub device_size: u64,
    pub sector: u64,
    pub node: u64,
    pub system_chunks: Vec<u8>,
    incompat: u64,
}

/// Numbers of trees.
pub(super) mod tree {
    pub(in super::super) const ROOT: u64 = 1;
    pub(in super::super) const CHUNK: u64 = 3;
    pub(in super::super) const CSUM: u64 = 7;
}

impl Super {
    /// Reads and checks it; where the first one is bad, its newest copy.
    ///
    /// # Errors
    /// `Unsupported` for an unknown incompatible feature; `Corrupt`, or what reading the point says.
    pub(super) fn read(source: &Source, findings: &Findings) -> Result<Super> {
        let sup = match Super::at(source, PLACES[0]) {
            Ok(sup) => sup,
            Err(e) if !e.kind().is_lasting() => return Err(e),
            Err(e) => {
                let Some((at, copy)) = Super::copy(source) else { return Err(e) };
                let why = format!("the superblock is damaged ({})", e.message());
                let remedy = "run 'btrfs rescue super-recover' in the guest, or on a restored copy";
                findings.copy_used(source, &why, at, remedy);
                copy
            }
        };
        sup.check_features(source)?;
        Ok(sup)
    }

    /// The newest copy that is right, and where it is.
    pub(super) fn copy(source: &Source) -> Option<(u64, Super)> {
        let copies = PLACES.iter().skip(1).filter(|at| source.check(**at, LEN as u64).is_ok());
        let copies = copies.filter_map(|at| Some((*at, Super::at(source, *at).ok()?)));
        copies.max_by_key(|(_, s)| s.root.generation)
    }

    pub(super) fn at(source: &Source, at: u64) -> Result<Super> {
        let raw = source.meta(at, LEN)?;
        let bad =
            |what: &str| source.error(Kind::Corrupt, format!("invalid superblock: {what}"), at);
        if part(&raw, 0x40, 8) != MAGIC || le64(&raw, 0x30) != at {
            return Err(bad("not one of btrfs"));
        }
        let number = le16(&raw, 0xc4);
        let checksum = Checksum::of(number).ok_or_else(|| unknown_checksum(source, number))?;
        if !checksum.is_right(part(&raw, SUM_FIELD, LEN), &raw) {
            return Err(bad("bad checksum"));
        }
        let sup = Super::parse(&raw, checksum);
        let is_size = |size: u64| size.is_power_of_two() && (4096..=65536).contains(&size);
        if !is_size(sup.sector) || !is_size(sup.node) || sup.node < sup.sector {
            return Err(bad("invalid sector size or node size"));
        }
        if sup.root.level >= MAX_LEVEL || sup.chunk_root.level >= MAX_LEVEL {
            return Err(bad("invalid level of a tree"));
        }
        let chunks = le32(&raw, 0xa0) as usize;
        if chunks > SYSTEM_CHUNKS.1 {
            return Err(bad("invalid list of system chunks"));
        }
        let system_chunks = part(&raw, SYSTEM_CHUNKS.0, chunks).to_vec();
        Ok(Super { system_chunks, ..sup })
    }

    fn parse(raw: &[u8], checksum: Checksum) -> Super {
        let incompat = le64(raw, 0xbc);
        let id = if incompat & METADATA_UUID > 0 { 0x23b } else { 0x20 };
        let (generation, chunk_generation) = (le64(raw, 0x48), le64(raw, 0xa4));
        let root = |id, at, level, generation| Root {
            id,
            at: le64(raw, at),
            level: byte(raw, level),
            generation,
        };
        Super {
            checksum,
            node_id: part(raw, id, 16).to_vec(),
            uuid: uuid(part(raw, 0x20, 16)),
            label: String::from_utf8_lossy(until_nul(part(raw, 0x12b, 256))).into_owned(),
            root: root(tree::ROOT, 0x50, 0xc6, generation),
            chunk_root: root(tree::CHUNK, 0x58, 0xc7, chunk_generation),
            has_log: le64(raw, 0x60) > 0,
            total: le64(raw, 0x70),
            used: le64(raw, 0x78),
            devices: le64(raw, 0x88),
            device: le64(raw, 0xc9),
            device_size: le64(raw, 0xd1),
            sector: u64::from(le32(raw, 0x90)),
            node: u64::from(le32(raw, 0x94)),
            system_chunks: Vec::new(),
            incompat,
        }
    }

    fn check_features(&self, source: &Source) -> Result<()> {
        let known: u64 = INCOMPAT.iter().filter(|f| f.2).map(|f| f.0).sum();
        let unknown = self.incompat & !known;
        if unknown == 0 {
            return Ok(());
        }
        let name = INCOMPAT.iter().find(|f| f.0 & unknown > 0).map(|f| f.1.to_string());
        let name = name.unwrap_or_else(|| format!("FEATURE_{unknown:#x}"));
        let what = format!("unsupported btrfs feature: {name}");
        Err(source.error(Kind::Unsupported, what, PLACES[0]).remedy(MOUNT))
    }

    /// The names of its features.
    pub(super) fn features(&self) -> Vec<String> {
        let set = INCOMPAT.iter().filter(|f| self.incompat & f.0 > 0).map(|f| f.1);
        set.chain([self.checksum.name()]).map(str::to_string).collect()
    }
}

/// What to do about what is not read here.
pub(super) const MOUNT: &str = "mount the backups; 'losetup -r -P -f --show POINT.raw' makes a device of the point; \
    then mount -o ro,rescue=nologreplay /dev/loopNpM";
/// The same where there are more disks.
pub(super) const MOUNT_ALL: &str = "mount the backups; 'losetup -r -P -f --show POINT.raw' for the points of all its \
    disks; 'btrfs device scan'; then mount -o ro,rescue=nologreplay one of them";

fn unknown_checksum(source: &Source, number: u16) -> Error {
    let what = format!("unsupported btrfs checksum: type {number}");
    source.error(Kind::Unsupported, what, PLACES[0]).remedy(MOUNT)
}
