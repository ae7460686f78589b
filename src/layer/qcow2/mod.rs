//! qcow2 versions 2 and 3: what an image maps and the bytes it holds.
//!
//! Its modules: `header` (fixed fields, extensions, limits), `snapshot` (internal snapshots),
//! `table` (L1/L2 entries to mappings), `compress` (one cluster's decompression), `check` (whether
//! all parts of a file agree), `plain` (where its plain clusters are), `create` and `backing` (empty images, and the backing file's name). Of
//! an image that is read nothing is kept in memory but its header: L1 and L2 entries are read when
//! a window is merged.

pub mod backing;
pub(crate) mod check;
pub(crate) mod compress;
pub mod create;
pub mod header;
pub(crate) mod plain;
pub(crate) mod snapshot;
mod table;

use std::cell::RefCell;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use super::{Format, ImageInfo, Kinds, KnownTables, Layer, LayerMap, LayerPart};
use crate::error::{Error, Finding, Kind, Result};
use crate::extent::ExtentList;
use crate::storage::ReadAt;
use check::ClusterSet;
use header::{Header, TableRef};
use table::Tables;

/// "QFI\xfb".
const MAGIC: [u8; 4] = *b"QFI\xfb";

/// Whether the file starts with qcow2's magic bytes.
pub(super) fn has_magic(storage: &dyn ReadAt) -> Result<bool> {
    if storage.len() < 4 {
        return Ok(false);
    }
    let mut magic = [0; 4];
    storage.read_exact_at(&mut magic, 0)?;
    Ok(magic == MAGIC)
}

/// See [`super::is_damaged_qcow2`].
pub(super) fn is_damaged(storage: &dyn ReadAt) -> Result<bool> {
    let mut start = [0; 104];
    let len = storage.len().min(104) as usize;
    storage.read_exact_at(&mut start[..len], 0)?;
    Ok(match len {
        0..4 => MAGIC.starts_with(&start[..len]),
        4..104 => false,
        _ => header::looks_like_one(&start),
    })
}

/// See [`super::probe`].
pub(super) fn probe(storage: &dyn ReadAt) -> Result<ImageInfo> {
    let header = Header::read(storage)?;
    let mut findings = header.oddities(storage.name());
    let snapshots = snapshot::read_table(storage, &header).unwrap_or_else(|e| {
        // The active state does not depend on the snapshot table.
        findings.push(Finding::from_error(&e, storage.name()));
        Vec::new()
    });
    Ok(ImageInfo {
        format: Format::Qcow2,
        virtual_size: header.size,
        data_file: header.has_data_file().then(|| header.data_file.clone().unwrap_or_default()),
        snapshots: snapshots.into_iter().map(|s| s.info).collect(),
        cluster_size: header.cluster_size() as u32,
        version: header.version,
        marked_corrupt: header.is_marked_corrupt(),
        backing_file: header.backing_file,
        backing_format: header.backing_format,
        findings,
    })
}

/// One state (the active one or an internal snapshot) of a qcow2 image.
pub struct Qcow2Layer {
    image: Arc<dyn ReadAt>,
    data: Option<Arc<dyn ReadAt>>,
    header: Header,
    l1: TableRef,
    size: u64,
    look_for_holes: bool,
    /// Of an image that QEMU marked as corrupt, what is not read.
    twice: Option<ClusterSet>,
    /// Start and end of a stretch without tables that was found last. Whoever walks over a sparse
    /// disk asks for its end again and again, and the L1 table may have millions of entries.
    without_tables: Mutex<(u64, u64)>,
}

impl Qcow2Layer {
    /// Opens `part` of the image; `data` is its external data file, if it has one.
    ///
    /// # Errors
    /// See [`super::open`].
    pub fn open(
        image: Arc<dyn ReadAt>,
        data: Option<Arc<dyn ReadAt>>,
        part: &LayerPart,
    ) -> Result<Self> {
        let header = Header::read(&*image)?;
        if header.has_data_file() && data.is_none() {
            return Err(Error::new(Kind::Incomplete, "the external data file is missing")
                .at_path(image.name()));
        }
        let (l1, size) = match part {
            LayerPart::Whole => (header.l1, header.size),
            LayerPart::Snapshot(index) => find_snapshot(&*image, &header, *index)?,
            LayerPart::Device(_) => {
                return Err(Error::new(Kind::NotFound, "a qcow2 image has no devices")
                    .at_path(image.name()));
            }
        };
        let look_for_holes = has_holes_in_clusters(data.as_deref().unwrap_or(&*image), &header);
        let without_tables = Mutex::default();
        let data_len = data.as_ref().map(|d| d.len());
        let twice = match header.is_marked_corrupt() {
            true => Some(check::claimed_twice(&*image, &header, data_len)?),
            false => None,
        };
        Ok(Qcow2Layer { image, data, header, l1, size, look_for_holes, twice, without_tables })
    }

    fn tables(&self) -> Tables<'_> {
        Tables {
            header: &self.header,
            l1: self.l1,
            size: self.size,
            image: &*self.image,
            data: self.data.as_deref().unwrap_or(&*self.image),
            data_ix: u8::from(self.data.is_some()),
            look_for_holes: self.look_for_holes,
            twice: self.twice.as_ref(),
        }
    }
}

/// Whether plain clusters are likely to be in holes of the file, as in a preallocated image.
/// Asking the file system at every extent costs more than mapping it, so an image that is allocated
/// nearly as far as it is long is not asked. (The bound is the one that QEMU draws, so that maps
/// agree: a tenth of the clusters, and two at least.)
fn has_holes_in_clusters(data: &dyn ReadAt, header: &Header) -> bool {
    let total = data.len().div_ceil(header.cluster_size());
    let real = data.len().saturating_sub(data.unallocated()) / header.cluster_size();
    total >= (real + real / 9).max(real + 2)
}

fn find_snapshot(image: &dyn ReadAt, header: &Header, index: u32) -> Result<(TableRef, u64)> {
    let found = snapshot::read_one(image, header, index)?;
    header::check_snapshot_l1(image, header, found.l1, found.info.virtual_size)?;
    Ok((found.l1, found.info.virtual_size))
}

thread_local! {
    /// Compressed bytes on their way to the decompressor; at most 2 MiB plus a sector.
    static INPUT: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

impl Layer for Qcow2Layer {
    fn size(&self) -> u64 {
        self.size
    }

    fn map(&self, range: Range<u64>) -> LayerMap {
        self.tables().map(range)
    }

    fn check_top(&self) -> Result<()> {
        // It can be read, but is nothing to build on.
        if self.header.is_marked_corrupt() {
            return Err(self.header.corrupt_mark(self.image.name()));
        }
        self.tables().check_l1()
    }

    fn next_mapped(&self, from: u64) -> u64 {
        let known = || self.without_tables.lock().unwrap_or_else(PoisonError::into_inner);
        let (start, end) = *known();
        if (start..end).contains(&from) {
            return end;
        }
        let next = self.tables().next_mapped(from);
        if next > from {
            *known() = (from, next);
        }
        next
    }

    fn outline(&self, from: u64, known: &mut KnownTables) -> ExtentList<Kinds> {
        self.tables().outline(from, known)
    }

    fn decompress(&self, host: u64, len: u32, out: &mut [u8]) -> Result<()> {
        INPUT.with_borrow_mut(|input| {
            input.resize(len as usize, 0);
            self.image.read_exact_at(input, host)?;
            compress::decompress(self.header.compression, input, out).map_err(|e| {
                Error::new(Kind::Corrupt, format!("a compressed cluster is damaged: {e}"))
                    .at_path(self.image.name())
                    .at_offset(host)
                    .remedy("restore this file from another copy of the backup")
            })
        })
    }

    fn storage(&self, file: u8) -> &dyn ReadAt {
        match (file, &self.data) {
            (1, Some(data)) => &**data,
            _ => &*self.image,
        }
    }

    fn check_unchanged(&self) -> Result<()> {
        self.image.check_unchanged()?;
        self.data.as_ref().map_or(Ok(()), |d| d.check_unchanged())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;
    use crate::storage::MemStorage;

    /// Counts reads.
    struct Counted(MemStorage, AtomicU64);

    impl ReadAt for Counted {
        fn read_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<usize> {
            self.1.fetch_add(1, Ordering::Relaxed);
            self.0.read_at(buf, offset)
        }

        fn len(&self) -> u64 {
            self.0.len()
        }

        fn name(&self) -> &Path {
            self.0.name()
        }
    }

    /// 512-byte clusters, and an L1 table that leads nowhere or, with `full`, to one empty L2 table.
    fn image(entries: u64, full: bool) -> Arc<Counted> {
        let l2 = (512 + entries * 8).next_multiple_of(512);
        let mut bytes = b"QFI\xfb\0\0\0\x02".to_vec();
        bytes.resize(512, 0);
        bytes[23] = 9;
        bytes[24..32].copy_from_slice(&(entries * 64 * 512).to_be_bytes());
        bytes[36..40].copy_from_slice(&(entries as u32).to_be_bytes());
        bytes[40..48].copy_from_slice(&512u64.to_be_bytes());
        let entry = if full { l2 } else { 0 };
        bytes.extend((0..entries).flat_map(|_| entry.to_be_bytes()));
        bytes.resize(l2 as usize + 512, 0);
        Arc::new(Counted(MemStorage::new("m", bytes), AtomicU64::new(0)))
    }

    /// The reads that it takes to walk over all of the disk.
    fn reads(entries: u64, full: bool, step: impl Fn(&Qcow2Layer, u64) -> u64) -> u64 {
        let storage = image(entries, full);
        let layer = Qcow2Layer::open(storage.clone(), None, &LayerPart::Whole).unwrap();
        let before = storage.1.load(Ordering::Relaxed);
        let mut at = 0;
        while at < layer.size() {
            at = step(&layer, at);
        }
        storage.1.load(Ordering::Relaxed) - before
    }

    #[test]
    fn asking_again_and_again_for_the_next_table_reads_the_l1_table_once() {
        let ask = |layer: &Qcow2Layer, at: u64| {
            assert_eq!(layer.next_mapped(at), layer.size());
            at + 64 * 512
        };
        let (few, many) = (reads(5_120, false, ask), reads(51_200, false, ask));
        assert_eq!((few, many), (10, 100));
    }

    #[test]
    fn a_table_that_many_entries_lead_to_is_read_once() {
        let known = std::cell::RefCell::new(KnownTables::new());
        let look = |layer: &Qcow2Layer, at: u64| {
            let list = layer.outline(at, &mut known.borrow_mut());
            assert!(list.as_slice().iter().all(|e| e.content == super::super::Kinds::BELOW));
            list.end()
        };
        // The L1 table in pieces of 512 entries, and the L2 table.
        assert_eq!(reads(5_120, true, look), 11);
        known.borrow_mut().clear();
        assert_eq!(reads(51_200, true, look), 101);
    }
}
