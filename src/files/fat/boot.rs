//! The boot sector (BPB): sizes, and which of the three file systems this is.

use super::super::bytes::{byte, le16, le32, part};
use super::super::clusters::{SLOT, Slots, Width};
use super::super::findings::Findings;
use super::super::probe::is_fat;
use super::super::source::Source;
use super::folder::{LABEL, is_long};
use super::name;
use crate::error::{Kind, Result};

/// Bytes that are looked at: the smallest sector.
const LEN: usize = 512;
/// Fewer clusters than this are FAT12, fewer than that FAT16.
const MAX_FAT12: u64 = 4085;
const MAX_FAT16: u64 = 65_525;
/// The most clusters that 28 bits have numbers for.
const MAX_FAT32: u64 = 0x0fff_fff5;
/// Bytes of the tables that are compared with each other: one block of the cache.
const COMPARED: u64 = 16 << 10;

/// The sector of the backup, as a rule, and the last that is looked at.
const BACKUP: u64 = 6;
const MAX_BACKUP: u64 = 64;
/// What helps where something is damaged.
pub(super) const FSCK: &str =
    "run fsck.fat (in Windows: chkdsk) in the guest, or on a restored copy";

/// Where the root folder is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Root {
    /// Before the first cluster.
    Fixed { at: u64, len: u64 },
    /// In clusters from this one on.
    Cluster(u32),
}

/// What is needed of it.
#[derive(Debug)]
pub(super) struct Boot {
    pub width: Width,
    pub cluster_size: u64,
    pub count: u32,
    pub table_at: u64,
    pub heap_at: u64,
    pub root: Root,
    /// Bytes in all.
    pub total: u64,
    pub serial: String,
    /// What the file system noted of its free clusters.
    pub noted_free: Option<u32>,
    label: Vec<u8>,
    /// Flags of the boot sector: not unmounted, errors.
    flags: u8,
    /// Where the other copy of the table is, if both are kept alike.
    other_table: Option<u64>,
}

impl Boot {
    /// Reads and checks it; its backup, which only FAT32 has, where it is damaged.
    ///
    /// # Errors
    /// `Corrupt` if a number is none that can be, or the backup has others; what reading the point says.
    pub(super) fn read(source: &Source, findings: &Findings) -> Result<Boot> {
        let first = match Boot::at(source, 0) {
            Err(e) if !e.kind().is_lasting() => return Err(e),
            other => other,
        };
        match (first, Boot::copy(source)) {
            // Nothing tells which is right.
            (Ok(first), Some((at, copy))) if !first.is_like(&copy) => {
                let what =
                    format!("the boot sector and its backup at {at:#x} contradict each other");
                Err(source.error(Kind::Corrupt, what, 0).remedy(FSCK))
            }
            (Err(e), Some((at, copy))) => {
                let why = format!("the boot sector is damaged ({})", e.message());
                findings.copy_used(source, &why, at, FSCK);
                Ok(copy)
            }
            (first, _) => first,
        }
    }

    /// The backup of the boot sector of FAT32, if there is one that can be, and where it is.
    pub(super) fn copy(source: &Source) -> Option<(u64, Boot)> {
        let first = source.meta(0, LEN).ok()?;
        // Where mkfs and Windows put it, unless the first one says something else.
        let noted = Some(u64::from(le16(&first, 50))).filter(|n| (1..=MAX_BACKUP).contains(n));
        let numbers = [noted, Some(BACKUP)].into_iter().flatten();
        let places =
            numbers.flat_map(|n| [512, 1024, 2048, 4096].map(|sector| (sector, n * sector)));
        places.into_iter().find_map(|(sector, at)| {
            source.check(at, LEN as u64).ok()?;
            let raw = source.meta(at, LEN).ok()?;
            let reserved = u64::from(le16(&raw, 14)) * sector;
            let is_one = is_fat(&raw) && u64::from(le16(&raw, 11)) == sector && reserved > at;
            let copy = Boot::at(source, at).ok().filter(|c| is_one && c.width == Width::Fat32)?;
            Some((at, copy))
        })
    }

    /// Whether all by which files are found is the same in another.
    fn is_like(&self, other: &Boot) -> bool {
        let key = |b: &Boot| (b.width, b.cluster_size, b.heap_at, b.root);
        key(self) == key(other)
    }

    /// Reads and checks the one at byte `place`.
    fn at(source: &Source, place: u64) -> Result<Boot> {
        let raw = source.meta(place, LEN)?;
        let bad = |what: &str| {
            source.error(Kind::Corrupt, format!("invalid FAT boot sector: {what}"), place)
        };
        let (sector, per) = (u64::from(le16(&raw, 11)), u64::from(byte(&raw, 13)));
        if !sector.is_power_of_two() || !(512..=4096).contains(&sector) {
            return Err(bad("invalid sector size"));
        }
        if !per.is_power_of_two() {
            return Err(bad("invalid cluster size"));
        }
        let (reserved, tables) = (u64::from(le16(&raw, 14)), u64::from(byte(&raw, 16)));
        let either =
            |short: u16, long: u32| if short > 0 { u64::from(short) } else { u64::from(long) };
        let small_table = le16(&raw, 22);
        let table_len = either(small_table, le32(&raw, 36));
        let total = either(le16(&raw, 19), le32(&raw, 32));
        let root_len = u64::from(le16(&raw, 17)) * SLOT;
        if reserved == 0 || tables == 0 || table_len == 0 {
            return Err(bad("no file allocation table"));
        }
        let root_at = reserved + tables * table_len;
        let heap = root_at + root_len.div_ceil(sector);
        let clusters = total.checked_sub(heap).map_or(0, |data| data / per);
        // Small FAT32 volumes exist: what FAT12 and FAT16 always have is the short length of the table.
        let width = match (small_table, clusters) {
            (0, _) => Width::Fat32,
            (_, ..MAX_FAT12) => Width::Fat12,
            (_, ..MAX_FAT16) => Width::Fat16,
            _ => return Err(bad("too many clusters for FAT16")),
        };
        let in_table = (table_len * sector * 8 / width.bits()).saturating_sub(2);
        let count = clusters.min(in_table).min(MAX_FAT32) as u32;
        if count == 0 {
            return Err(bad("no clusters"));
        }
        let is32 = width == Width::Fat32;
        let (active, mirrored) =
            active_table(&raw, is32, tables).ok_or_else(|| bad("no such active table"))?;
        let table = |i: u64| (reserved + i * table_len) * sector;
        let root = match is32 {
            true => Root::Cluster(le32(&raw, 44)),
            false => Root::Fixed { at: root_at * sector, len: root_len },
        };
        let extended = if is32 { 64 } else { 36 };
        Ok(Boot {
            width,
            cluster_size: per * sector,
            count,
            table_at: table(active),
            heap_at: heap * sector,
            root,
            total: total * sector,
            serial: serial(&raw, extended),
            noted_free: if is32 { noted_free(source, &raw, sector, count) } else { None },
            label: label(&raw, extended),
            flags: byte(&raw, extended + 1),
            other_table: (mirrored && tables > 1).then(|| table(1)),
        })
    }

    /// As people call it.
    pub(super) fn kind(&self) -> &'static str {
        match self.width {
            Width::Fat12 => "fat12",
            Width::Fat16 => "fat16",
            Width::Fat32 | Width::Exfat => "fat32",
        }
    }

    /// Whether it was not unmounted, and whether errors were noted.
    ///
    /// # Errors
    /// What reading the point says.
    pub(super) fn marks(&self, source: &Source) -> Result<[bool; 2]> {
        // Of the second entry of the table two bits are set while all is well.
        let (clean, sound) = match self.width {
            Width::Fat16 => (1 << 15, 1 << 14),
            Width::Fat32 => (1 << 27, 1 << 26),
            Width::Fat12 | Width::Exfat => (0, 0),
        };
        let entries = source.meta(self.table_at, 8)?;
        let entry = match self.width {
            Width::Fat16 => u32::from(le16(&entries, 2)),
            _ => le32(&entries, 4),
        };
        Ok([
            entry & clean != clean || self.flags & 1 > 0,
            entry & sound != sound || self.flags & 2 > 0,
        ])
    }

    /// Whether the beginnings of the two tables differ. No more is read of them than one block.
    ///
    /// # Errors
    /// What reading the point says.
    pub(super) fn copies_differ(&self, source: &Source) -> Result<bool> {
        let Some(other) = self.other_table else { return Ok(false) };
        let len = COMPARED.min(other.saturating_sub(self.table_at)) as usize;
        Ok(source.meta(self.table_at, len)? != source.meta(other, len)?)
    }

    /// The volume's name: the root folder's entry for it, else that of the boot sector.
    pub(super) fn label(&self, root: Option<Slots<'_>>) -> String {
        let (mut offset, mut slots) = (0, root);
        while let Some(Ok(Some((_, slot)))) = slots.as_mut().map(|s| s.get(offset)) {
            if byte(slot, 0) == 0 {
                break;
            }
            if byte(slot, 11) & LABEL > 0 && !is_long(slot) && byte(slot, 0) != name::DELETED {
                return name::label(part(slot, 0, 11));
            }
            offset += SLOT;
        }
        name::label(&self.label)
    }
}

/// Which table is in use, and whether the others are kept like it.
fn active_table(raw: &[u8], is32: bool, tables: u64) -> Option<(u64, bool)> {
    const NOT_MIRRORED: u16 = 0x80;
    let flags = le16(raw, 40);
    if !is32 || flags & NOT_MIRRORED == 0 {
        return Some((0, true));
    }
    let active = u64::from(flags & 0xf);
    (active < tables).then_some((active, false))
}

/// What the sector for that says of free clusters, if it can be.
fn noted_free(source: &Source, raw: &[u8], sector: u64, count: u32) -> Option<u32> {
    let at = u64::from(le16(raw, 48)) * sector;
    let info = source.meta(at, LEN).ok()?;
    let is_one = le32(&info, 0) == 0x4161_5252 && le32(&info, 484) == 0x6141_7272;
    Some(le32(&info, 488)).filter(|free| is_one && *free <= count)
}

fn has_more(raw: &[u8], extended: usize) -> bool {
    byte(raw, extended + 2) == 0x29
}

fn serial(raw: &[u8], extended: usize) -> String {
    let is_there = has_more(raw, extended) || byte(raw, extended + 2) == 0x28;
    let number = le32(raw, extended + 3);
    if is_there { format!("{:04X}-{:04X}", number >> 16, number & 0xffff) } else { String::new() }
}

fn label(raw: &[u8], extended: usize) -> Vec<u8> {
    let text = if has_more(raw, extended) { part(raw, extended + 7, 11) } else { &[] };
    if text == b"NO NAME    " { Vec::new() } else { text.to_vec() }
}
