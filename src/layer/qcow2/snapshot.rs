//! The internal snapshot table of a qcow2 image.

use super::header::{Header, TableRef};
use crate::error::{Error, Kind, Result};
use crate::layer::SnapshotInfo;
use crate::storage::ReadAt;

/// Fixed part of a snapshot table entry.
const ENTRY_LEN: u64 = 40;
/// QEMU's limit for the extra data of one entry.
const MAX_EXTRA: u64 = 1024;

/// One internal snapshot: what to show and where its L1 table is.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// What to show.
    pub info: SnapshotInfo,
    /// Its L1 table; checked only when the snapshot is opened.
    pub l1: TableRef,
    /// Offset in the file where its table entry ends, without padding.
    pub end: u64,
}

/// Reads the snapshot table.
///
/// # Errors
/// `Corrupt` or `Truncated` with the offset of the entry to blame.
pub fn read_table(storage: &dyn ReadAt, header: &Header) -> Result<Vec<Snapshot>> {
    let mut found = Vec::new();
    let mut at = header.snapshots_offset;
    for _ in 0..header.nb_snapshots {
        let (snapshot, next) = read_entry(storage, header, at)?;
        found.push(snapshot);
        at = next;
    }
    Ok(found)
}

fn read_entry(storage: &dyn ReadAt, header: &Header, at: u64) -> Result<(Snapshot, u64)> {
    let fixed = read(storage, at, ENTRY_LEN)?;
    let u16_at = |o: usize| u64::from(u16::from_be_bytes([fixed[o], fixed[o + 1]]));
    let u32_at = |o: usize| u32::from_be_bytes(fixed[o..o + 4].try_into().expect("four bytes"));
    let extra_len = u64::from(u32_at(36));
    if extra_len > MAX_EXTRA {
        return Err(Error::new(Kind::Corrupt, "a snapshot's extra data is too long")
            .at_path(storage.name())
            .at_offset(at + 36));
    }
    let (id_len, name_len) = (u16_at(12), u16_at(14));
    let rest = read(storage, at + ENTRY_LEN, extra_len + id_len + name_len)?;
    let (extra, names) = rest.split_at(extra_len as usize);
    let virtual_size = match extra.get(8..16) {
        Some(b) => u64::from_be_bytes(b.try_into().expect("eight bytes")),
        None => header.size,
    };
    let (id, name) = names.split_at(id_len as usize);
    let info = SnapshotInfo {
        id: String::from_utf8_lossy(id).into_owned(),
        name: String::from_utf8_lossy(name).into_owned(),
        time: u64::from(u32_at(16)),
        virtual_size,
    };
    let offset = u64::from_be_bytes(fixed[0..8].try_into().expect("eight bytes"));
    let l1 = TableRef { offset, entries: u32_at(8) };
    let end = at + ENTRY_LEN + extra_len + id_len + name_len;
    // Entries are aligned to 8 bytes, and so is the table.
    Ok((Snapshot { info, l1, end }, end.next_multiple_of(8)))
}

fn read(storage: &dyn ReadAt, at: u64, len: u64) -> Result<Vec<u8>> {
    if at.checked_add(len).is_none_or(|end| end > storage.len()) {
        return Err(Error::new(Kind::Truncated, "the snapshot table is cut off")
            .at_path(storage.name())
            .at_offset(at));
    }
    let mut buf = vec![0; len as usize];
    storage.read_exact_at(&mut buf, at)?;
    Ok(buf)
}
