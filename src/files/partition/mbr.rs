//! The table of DOS: four entries in the first sector, of which one may hold a chain of logical partitions.

use std::collections::BTreeSet;

use super::super::bytes::{byte, le16, le32, part};
use super::super::source::Source;
use super::table::{Found, RawEntry};
use crate::error::{Kind, Result};

/// Logical partitions: Linux has no names for more.
const MAX_LOGICAL: u32 = 256;
/// Types of a partition that holds others.
const EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];
/// The type of the entry that protects a GPT.
const PROTECTIVE: u8 = 0xee;

struct Entry {
    active: u8,
    kind: u8,
    first: u64,
    count: u64,
}

fn entries(sector: &[u8]) -> [Entry; 4] {
    [0, 1, 2, 3].map(|i| {
        let bytes = part(sector, 446 + 16 * i, 16);
        Entry {
            active: byte(bytes, 0),
            kind: byte(bytes, 4),
            first: u64::from(le32(bytes, 8)),
            count: u64::from(le32(bytes, 12)),
        }
    })
}

/// Whether an entry protects a GPT.
pub(super) fn is_protective(sector: &[u8]) -> bool {
    entries(sector).iter().any(|e| e.kind == PROTECTIVE)
}

/// Whether a sector with a signature has a table in it, and not the code of a boot sector.
pub(super) fn is_table(sector: &[u8]) -> bool {
    let all = entries(sector);
    let used = |e: &&Entry| e.kind != 0 && e.count > 0;
    all.iter().all(|e| [0, 0x80].contains(&e.active)) && all.iter().find(used).is_some()
}

/// All partitions of the table in `sector`, the logical ones with them.
///
/// # Errors
/// What reading the point says.
pub(super) fn read(
    disk: &Source,
    sector: &[u8],
    size: u64,
    found: &mut Found,
) -> Result<Vec<RawEntry>> {
    let (mut all, mut logical) = (Vec::new(), Vec::new());
    for (entry, number) in entries(sector).into_iter().zip(1..) {
        match entry.kind {
            0 => {}
            kind if EXTENDED.contains(&kind) => {
                let begun = 5 + logical.len() as u32;
                logical.extend(chain(disk, entry.first, size, begun, found)?);
            }
            _ => all.push(raw(&entry, number, entry.first)),
        }
    }
    all.extend(logical);
    Ok(all)
}

fn raw(entry: &Entry, number: u32, first: u64) -> RawEntry {
    let kind = format!("{:02x}", entry.kind);
    RawEntry { number, first, count: entry.count, kind, name: String::new() }
}

/// The logical partitions of the extended one that begins at sector `base`: each has a table with itself and the
/// next one.
fn chain(
    disk: &Source,
    base: u64,
    size: u64,
    begun: u32,
    found: &mut Found,
) -> Result<Vec<RawEntry>> {
    let (mut all, mut at, mut seen) = (Vec::new(), base, BTreeSet::new());
    loop {
        if !seen.insert(at) {
            found.warn(disk, Kind::Corrupt, "the logical partitions form a loop");
            break;
        }
        let place = at.saturating_mul(size);
        let table = match disk.check(place, 512) {
            Ok(()) => disk.meta(place, 512)?,
            Err(_) => Vec::new(),
        };
        if le16(&table, 510) != 0xaa55 {
            found.warn(disk, Kind::Corrupt, "the chain of logical partitions is broken");
            break;
        }
        let mut next = None;
        for entry in entries(&table).into_iter().take(2).filter(|e| e.kind != 0 && e.count > 0) {
            let number = begun + all.len() as u32;
            match EXTENDED.contains(&entry.kind) {
                true => next = Some(base + entry.first),
                false if number < MAX_LOGICAL => all.push(raw(&entry, number, at + entry.first)),
                false => {}
            }
        }
        match next {
            Some(next) if seen.len() < MAX_LOGICAL as usize => at = next,
            _ => break,
        }
    }
    Ok(all)
}
