//! The internal snapshot table of a qcow2 image.

use super::header::{Header, TableRef, check_snapshot_l1};
use crate::error::{Error, Finding, Kind, Result};
use crate::layer::SnapshotInfo;
use crate::storage::ReadAt;

/// Fixed part of a snapshot table entry.
const ENTRY_LEN: u64 = 40;
/// QEMU's limit for the extra data of one entry.
const MAX_EXTRA: u64 = 1024;
/// QEMU's limit for the whole table.
const MAX_TABLE: u64 = 64 << 20;
/// Bytes of an id or a name that are kept: more than QEMU allows of an id, and than a file name
/// could show.
const MAX_TEXT: usize = 255;

/// One internal snapshot: what to show and where its L1 table is.
#[derive(Debug, Clone)]
pub(crate) struct Snapshot {
    /// What to show.
    pub info: SnapshotInfo,
    /// Its L1 table; where that cannot be right, `info` says so.
    pub l1: TableRef,
    /// Offset in the file where its table entry ends, without padding.
    pub end: u64,
}

/// Reads the snapshot table.
///
/// # Errors
/// `Corrupt` or `Truncated` with the offset of the entry to blame.
pub(crate) fn read_table(storage: &dyn ReadAt, header: &Header) -> Result<Vec<Snapshot>> {
    (0..header.nb_snapshots).zip(entries(storage, header)).map(|(_, entry)| entry).collect()
}

/// Reads entry `index` of the snapshot table.
///
/// # Errors
/// As [`read_table`], and `NotFound`.
pub(crate) fn read_one(storage: &dyn ReadAt, header: &Header, index: u32) -> Result<Snapshot> {
    let found = (0..header.nb_snapshots).zip(entries(storage, header)).find_map(|(i, entry)| {
        // One that cannot be read hides all that follow.
        (i == index || entry.is_err()).then_some(entry)
    });
    found.unwrap_or_else(|| {
        let what = format!("there is no internal snapshot number {index}");
        Err(Error::new(Kind::NotFound, what).at_path(storage.name()))
    })
}

/// The entries one after another; the caller knows how many there are.
fn entries<'a>(
    storage: &'a dyn ReadAt,
    header: &'a Header,
) -> impl Iterator<Item = Result<Snapshot>> + 'a {
    let mut at = header.snapshots_offset;
    std::iter::from_fn(move || {
        if at.saturating_sub(header.snapshots_offset) > MAX_TABLE {
            let error = Error::new(Kind::Corrupt, "the snapshot table is too long");
            return Some(Err(error.at_path(storage.name()).at_offset(at)));
        }
        Some(read_entry(storage, header, at).map(|(snapshot, next)| {
            at = next;
            snapshot
        }))
    })
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
    let offset = u64::from_be_bytes(fixed[0..8].try_into().expect("eight bytes"));
    let l1 = TableRef { offset, entries: u32_at(8) };
    let checked = check_snapshot_l1(storage, header, l1, virtual_size);
    let text = |b: &[u8]| String::from_utf8_lossy(&b[..b.len().min(MAX_TEXT)]).into_owned();
    let info = SnapshotInfo {
        id: text(id),
        name: text(name),
        time: u64::from(u32_at(16)),
        virtual_size,
        unusable: checked.err().map(|e| Finding::from_error(&e, storage.name())),
    };
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
