//! The boot region: sizes, flags, and its checksum.

use super::super::bytes::{byte, le16, le32, le64, part};
use super::super::clusters::Clusters;
use super::super::findings::Findings;
use super::super::source::Source;
use crate::error::{Kind, Result};

const NAME: &[u8] = b"EXFAT   ";
/// Bytes of the boot sector that are looked at.
const LEN: usize = 512;
/// Sectors of a boot region that its checksum is over; the one behind them has it.
const CHECKED: u64 = 11;
const REGION: u64 = 12;
/// Sectors are from 512 bytes to 4 KiB, clusters at most 32 MiB.
const SECTOR_SHIFTS: std::ops::RangeInclusive<u8> = 9..=12;
const MAX_CLUSTER_SHIFT: u8 = 25;
/// The most clusters that there can be.
const MAX_CLUSTERS: u32 = 0xffff_fff5;

const FSCK: &str = "run fsck.exfat in the guest, or on a restored copy";

const SECOND_TABLE: u16 = 1;
const DIRTY: u16 = 2;
const MEDIA_FAILURE: u16 = 4;

/// What is needed of it.
pub(super) struct Boot {
    pub cluster_size: u64,
    pub count: u32,
    pub table_at: u64,
    pub heap_at: u64,
    /// The root folder's first cluster.
    pub root: u32,
    /// Bytes in all.
    pub total: u64,
    pub serial: String,
    flags: u16,
}

impl Boot {
    /// Reads and checks it: the first copy, or the second one where that is better.
    ///
    /// # Errors
    /// `Corrupt` if a number is none that can be; what reading the point says.
    pub(super) fn read(source: &Source, findings: &Findings) -> Result<Boot> {
        let first = source.meta(0, LEN)?;
        if is_right(source, &first, 0)? {
            return Boot::new(source, &first);
        }
        if let Some((at, second)) = copy(source) {
            findings.copy_used(source, "the boot region is damaged (bad checksum)", at, FSCK);
            return Boot::new(source, &second);
        }
        let mut others = copies(source);
        if !others.any(|(_, other)| sizes(&other) == sizes(&first)) {
            let what = "the boot region and its backup are damaged (bad checksums)";
            return Err(source.error(Kind::Corrupt, what, 0).remedy(FSCK));
        }
        let what =
            "bad checksum of the boot region, and of its backup: they agree on all that is needed";
        findings.warn(source, Kind::Corrupt, what, Some(FSCK));
        Boot::new(source, &first)
    }

    fn new(source: &Source, raw: &[u8]) -> Result<Boot> {
        let bad = |what: &str| {
            source.error(Kind::Corrupt, format!("invalid exFAT boot sector: {what}"), 0)
        };
        let (sector, per) = (byte(raw, 108), byte(raw, 109));
        if !SECTOR_SHIFTS.contains(&sector) {
            return Err(bad("invalid sector size"));
        }
        if per > MAX_CLUSTER_SHIFT - sector {
            return Err(bad("invalid cluster size"));
        }
        let (table, table_len) = (u64::from(le32(raw, 80)), u64::from(le32(raw, 84)));
        let (heap, count, sectors) = (u64::from(le32(raw, 88)), le32(raw, 92), le64(raw, 72));
        let (tables, flags) = (u64::from(byte(raw, 110)), le16(raw, 106));
        let needed = ((u64::from(count) + 2) * 4).div_ceil(1 << sector);
        let end = heap.saturating_add(u64::from(count) << per);
        if count == 0 || count > MAX_CLUSTERS || end > sectors || table < 2 * REGION {
            return Err(bad("invalid number of clusters"));
        }
        if !(1..=2).contains(&tables) || table_len < needed || heap < table + tables * table_len {
            return Err(bad("invalid file allocation table"));
        }
        let second = u64::from(flags & SECOND_TABLE > 0 && tables == 2);
        let number = le32(raw, 100);
        Ok(Boot {
            cluster_size: 1 << (sector + per),
            count,
            table_at: (table + second * table_len) << sector,
            heap_at: heap << sector,
            root: le32(raw, 96),
            total: sectors.checked_mul(1 << sector).ok_or_else(|| bad("invalid length"))?,
            serial: format!("{:04X}-{:04X}", number >> 16, number & 0xffff),
            flags,
        })
    }

    /// Says what is odd about the file system as a whole.
    pub(super) fn look(&self, clusters: &Clusters) {
        let source = &clusters.source;
        let warn = |kind, what, remedy| clusters.findings.warn(source, kind, what, remedy);
        if self.total > source.size() {
            let what = "the file system is larger than the disk or partition that it is in";
            warn(Kind::Truncated, what, None);
        }
        let fsck = Some("run fsck.exfat (in Windows: chkdsk) in the guest, or on a restored copy");
        if self.flags & DIRTY > 0 {
            let what = "the file system was in use and not unmounted: what the guest wrote last may be missing";
            warn(Kind::Corrupt, what, fsck);
        }
        if self.flags & MEDIA_FAILURE > 0 {
            warn(Kind::Corrupt, "the guest noted disk errors in this file system", fsck);
        }
    }
}

/// What is said of sizes and places, which both copies have alike.
fn sizes(raw: &[u8]) -> [&[u8]; 3] {
    [part(raw, 64, 40), part(raw, 108, 3), part(raw, 3, NAME.len())]
}

/// What may be the backup of the boot region, by each sector size that there can be, and where.
fn copies(source: &Source) -> impl Iterator<Item = (u64, Vec<u8>)> {
    SECTOR_SHIFTS.filter_map(|shift| {
        let at = REGION << shift;
        source.check(at, LEN as u64).ok()?;
        let raw = source.meta(at, LEN).ok()?;
        (byte(&raw, 108) == shift).then_some((at, raw))
    })
}

/// The backup of the boot region, if it is right.
pub(super) fn copy(source: &Source) -> Option<(u64, Vec<u8>)> {
    copies(source).find(|(at, raw)| is_right(source, raw, *at).unwrap_or(false))
}

/// Whether a boot region that begins at `at` with these bytes has the checksum that it says.
fn is_right(source: &Source, raw: &[u8], at: u64) -> Result<bool> {
    let shift = byte(raw, 108);
    if part(raw, 3, NAME.len()) != NAME || !SECTOR_SHIFTS.contains(&shift) {
        return Ok(false);
    }
    let sector = 1u64 << shift;
    let len = (REGION * sector) as usize;
    if source.check(at, len as u64).is_err() {
        return Ok(false);
    }
    let region = source.meta(at, len)?;
    let (checked, sums) = region.split_at((CHECKED * sector) as usize);
    let sum = checksum(checked);
    Ok(sums.chunks(4).all(|s| le32(s, 0) == sum))
}

/// Over all but what changes while it is in use: the flags, and how much is in use.
fn checksum(bytes: &[u8]) -> u32 {
    const CHANGING: [usize; 3] = [106, 107, 112];
    let kept = bytes.iter().enumerate().filter(|(i, _)| !CHANGING.contains(i));
    kept.fold(0u32, |sum, (_, b)| sum.rotate_right(1).wrapping_add(u32::from(*b)))
}
