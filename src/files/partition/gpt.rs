//! The GUID partition table, at the disk's start and, again, at its end.

use super::super::bytes::{guid, le16, le32, le64, part};
use super::super::crc::crc32;
use super::super::source::Source;
use super::table::{Found, RawEntry, SECTORS};
use crate::error::{Kind, Result};

/// A header's length; the rest of its sector is empty.
const HEADER: usize = 92;
/// Bytes that all entries may take: 128 entries of 128 bytes are usual.
const MAX_ENTRIES: u64 = 4 << 20;

/// The entries of the primary table, or of the backup where that is bad, and the size of sectors. `expected`:
/// whether there should be one.
///
/// # Errors
/// What reading the point says.
pub(super) fn read(
    disk: &Source,
    expected: bool,
    found: &mut Found,
) -> Result<Option<(u64, Vec<RawEntry>)>> {
    for sector in SECTORS {
        if let Some(entries) = at(disk, sector, sector)? {
            return Ok(Some((sector, entries)));
        }
    }
    // Nobody looks for a backup of what was never there.
    if !expected {
        return Ok(None);
    }
    for sector in SECTORS {
        let last = (disk.size() / sector).saturating_sub(1) * sector;
        if let Some(entries) = at(disk, last, sector)? {
            found.warn(disk, Kind::Corrupt, "the primary GPT is damaged: using the backup GPT");
            return Ok(Some((sector, entries)));
        }
    }
    Ok(None)
}

/// The entries of the table whose header is at `place`, if that and they are right.
fn at(disk: &Source, place: u64, sector: u64) -> Result<Option<Vec<RawEntry>>> {
    if disk.check(place, sector).is_err() {
        return Ok(None);
    }
    let header = disk.meta(place, 512)?;
    let len = le32(&header, 12) as usize;
    let right = part(&header, 0, 8) == b"EFI PART"
        && (HEADER..=512).contains(&len)
        && le64(&header, 24).checked_mul(sector) == Some(place)
        && le32(&header, 16)
            == checksum(&[part(&header, 0, 16), &[0; 4], part(&header, 20, len - 20)]);
    if !right {
        return Ok(None);
    }
    let (count, size) = (u64::from(le32(&header, 80)), u64::from(le32(&header, 84)));
    let all = count * size;
    let from = le64(&header, 72).checked_mul(sector);
    let Some(from) = from.filter(|f| (128..=4096).contains(&size) && disk.check(*f, all).is_ok())
    else {
        return Ok(None);
    };
    if all > MAX_ENTRIES {
        return Ok(None);
    }
    let entries = disk.meta(from, all as usize)?;
    if le32(&header, 88) != checksum(&[&entries]) {
        return Ok(None);
    }
    let each = entries.chunks_exact(size as usize).zip(1..);
    Ok(Some(each.filter_map(|(bytes, number)| entry(bytes, number)).collect()))
}

fn checksum(parts: &[&[u8]]) -> u32 {
    !parts.iter().fold(!0, |crc, bytes| crc32(crc, bytes))
}

fn entry(bytes: &[u8], number: u32) -> Option<RawEntry> {
    let kind = part(bytes, 0, 16);
    if kind.iter().all(|b| *b == 0) {
        return None;
    }
    let (first, last) = (le64(bytes, 32), le64(bytes, 40));
    let units: Vec<u16> = (0..36).map(|i| le16(bytes, 56 + 2 * i)).take_while(|u| *u > 0).collect();
    let count = last.checked_sub(first).map_or(0, |n| n.saturating_add(1));
    Some(RawEntry {
        number,
        first,
        count,
        kind: guid(kind),
        name: String::from_utf16_lossy(&units),
    })
}
