//! What a partition table is, and the checks that all of them need.

use super::super::source::Source;
use crate::error::{Finding, Kind};

/// Sizes of sectors that disks have.
pub(super) const SECTORS: [u64; 2] = [512, 4096];

/// Which table a disk has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum TableKind {
    /// GUID partition table.
    Gpt,
    /// The table of DOS, in the first sector.
    Mbr,
    /// The disk is one file system, or nothing.
    None,
}

/// One partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partition {
    /// As Linux numbers it, from 1; logical ones from 5.
    pub number: u32,
    /// Where it begins, in bytes.
    pub start: u64,
    /// Its length in bytes.
    pub len: u64,
    /// Its type as the table has it: a GUID, or two hexadecimal digits.
    pub kind: String,
    /// Its name (GPT).
    pub name: String,
}

/// A disk's partitions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// Which table.
    pub kind: TableKind,
    /// Bytes of a sector.
    pub sector: u64,
    /// Those that are inside the disk, by number.
    pub partitions: Vec<Partition>,
    /// What is wrong with the others.
    pub findings: Vec<Finding>,
}

/// An entry as a table has it: in sectors.
pub(super) struct RawEntry {
    pub number: u32,
    pub first: u64,
    pub count: u64,
    pub kind: String,
    pub name: String,
}

/// What was found odd while a table was read.
#[derive(Default)]
pub(super) struct Found {
    pub findings: Vec<Finding>,
}

impl Found {
    /// That something is odd.
    pub(super) fn warn(&mut self, disk: &Source, kind: Kind, what: &str) {
        self.findings.push(Finding::warning(kind, disk.path(), what));
    }

    /// The table out of these entries.
    pub(super) fn finish(
        mut self,
        disk: &Source,
        kind: TableKind,
        sector: u64,
        entries: Vec<RawEntry>,
    ) -> Table {
        let mut partitions: Vec<Partition> =
            entries.into_iter().filter_map(|e| self.inside(disk, sector, e)).collect();
        partitions.sort_by_key(|p| p.start);
        for pair in partitions.windows(2) {
            if let [a, b] = pair
                && a.start + a.len > b.start
            {
                let what = format!("partitions {} and {} overlap", a.number, b.number);
                self.warn(disk, Kind::Corrupt, &what);
            }
        }
        partitions.sort_by_key(|p| p.number);
        Table { kind, sector, partitions, findings: self.findings }
    }

    fn inside(&mut self, disk: &Source, sector: u64, entry: RawEntry) -> Option<Partition> {
        let RawEntry { number, first, count, kind, name } = entry;
        let start = first.checked_mul(sector).filter(|s| *s > 0 && *s < disk.size());
        let Some(start) = start.filter(|_| count > 0) else {
            let what = format!("partition {number} starts beyond the end of the disk: skipped");
            self.warn(disk, Kind::Corrupt, &what);
            return None;
        };
        let (len, room) = (count.saturating_mul(sector), disk.size() - start);
        if len > room {
            let what = format!("partition {number} ends beyond the end of the disk");
            self.warn(disk, Kind::Truncated, &what);
        }
        Some(Partition { number, start, len: len.min(room), kind, name })
    }
}
