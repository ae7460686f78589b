//! Partition tables: GPT (with its backup), MBR with logical partitions, or none.
//!
//! What a table says that cannot be is a finding: partitions that begin outside of the disk are left out, those
//! that end outside are cut there, as Linux does; those that overlap are served, each for itself.

mod gpt;
mod mbr;
mod table;

use super::bytes::le16;
use super::probe::{Content, probe};
use super::source::Source;
use crate::error::{Kind, Result};
use table::{Found, SECTORS};
pub use table::{Partition, Table, TableKind};

/// Reads the partition table of a disk.
///
/// # Errors
/// What reading the point says. What is wrong with a table is a finding.
pub fn partitions(disk: &Source) -> Result<Table> {
    let none =
        Table { kind: TableKind::None, sector: 512, partitions: Vec::new(), findings: Vec::new() };
    if disk.size() < 1024 {
        return Ok(none);
    }
    let first = disk.meta(0, 512)?;
    let signed = le16(&first, 510) == 0xaa55;
    let protective = signed && mbr::is_protective(&first);
    if protective || !signed {
        let mut found = Found::default();
        if let Some((sector, entries)) = gpt::read(disk, protective, &mut found)? {
            if !signed {
                let what = "the protective MBR is missing";
                found.warn(disk, Kind::Corrupt, what);
            }
            return Ok(found.finish(disk, TableKind::Gpt, sector, entries));
        }
        if protective {
            found.warn(disk, Kind::Corrupt, "both copies of the GPT are damaged");
            return Ok(Table { findings: found.findings, ..none });
        }
    }
    // A file system that begins with a boot sector has such a signature, too.
    let whole =
        matches!(probe(disk)?, Content::Ntfs | Content::Other { name: "fat" | "exfat", .. });
    if !signed || whole || !mbr::is_table(&first) {
        return Ok(none);
    }
    best(disk, &first)
}

/// The table in the first sector, with sectors of the size that makes more of it.
fn best(disk: &Source, first: &[u8]) -> Result<Table> {
    let mut best: Option<(usize, Table)> = None;
    for sector in SECTORS {
        let mut found = Found::default();
        let entries = mbr::read(disk, first, sector, &mut found)?;
        let table = found.finish(disk, TableKind::Mbr, sector, entries);
        let mut known = 0;
        for p in &table.partitions {
            let part = disk.part(p.start, p.len, "")?;
            known += usize::from(probe(&part)? != Content::Unknown);
        }
        if best.as_ref().is_none_or(|(before, _)| known > *before) {
            best = Some((known, table));
        }
    }
    let none =
        Table { kind: TableKind::Mbr, sector: 512, partitions: Vec::new(), findings: Vec::new() };
    Ok(best.map_or(none, |(_, table)| table))
}
