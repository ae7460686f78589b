//! The metadata of the file: where host clusters come from, L1 and L2 tables, refcounts, header.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{Compression, Qcow2Options};
use crate::error::{Error, Kind, Result};
use crate::layer::qcow2::{create, header};
use crate::restore::plan::Chunk;
use crate::restore::target_error;

/// QCOW_OFLAG_COPIED: exactly one reference, so the guest may write in place.
const COPIED: u64 = 1 << 63;
/// QCOW_OFLAG_COMPRESSED.
const COMPRESSED: u64 = 1 << 62;
/// Host offsets have 56 bits.
const MAX_OFFSET: u64 = 1 << 56;
/// Refcounts have 16 bits, as QEMU makes them.
const REFCOUNT_BYTES: u64 = 2;
/// The largest refcount table that QEMU opens, in bytes.
const MAX_REFCOUNT_TABLE: u64 = 8 << 20;

/// One cluster's place: guest cluster index and L2 entry.
pub(super) type Entry = (u64, u64);

/// An L2 table that is being filled.
struct L2 {
    entries: Box<[u64]>,
    /// Chunks that may still add to it.
    pending: u64,
}

/// All metadata.
pub(super) struct Tables<'a> {
    out: &'a File,
    path: &'a Path,
    options: &'a Qcow2Options,
    size: u64,
    next: AtomicU64,
    l1: Mutex<Vec<u64>>,
    open: Mutex<HashMap<u64, L2>>,
    /// How many chunks touch each L2 table.
    chunks: HashMap<u64, u64>,
    /// References to host clusters that are not exactly one.
    shared: Mutex<HashMap<u64, u16>>,
}

impl<'a> Tables<'a> {
    /// Metadata of a file for a disk of `size` bytes whose data is in `chunks`.
    pub(super) fn new(
        out: &'a File,
        path: &'a Path,
        options: &'a Qcow2Options,
        size: u64,
        chunks: &[Chunk],
    ) -> Self {
        let coverage = options.l2_coverage();
        let mut touched = HashMap::new();
        for c in chunks {
            let tables = c.start / coverage..(c.start + c.len).div_ceil(coverage);
            tables.for_each(|t| *touched.entry(t).or_default() += 1);
        }
        Tables {
            out,
            path,
            options,
            size,
            // Cluster 0 is the header's.
            next: AtomicU64::new(u64::from(options.cluster_size)),
            l1: Mutex::new(vec![0; options.l1_entries(size) as usize]),
            open: Mutex::default(),
            chunks: touched,
            shared: Mutex::default(),
        }
    }

    fn cluster(&self) -> u64 {
        u64::from(self.options.cluster_size)
    }

    /// Takes `count` host clusters in a row: the offset of the first.
    ///
    /// # Errors
    /// `Unsupported` beyond what the format can address.
    pub(super) fn allocate(&self, count: u64) -> Result<u64> {
        let at = self.next.fetch_add(count * self.cluster(), Ordering::Relaxed);
        if at >= MAX_OFFSET - (count * self.cluster()).min(MAX_OFFSET) {
            return Err(Error::new(Kind::Unsupported, "the file gets larger than qcow2 allows")
                .at_path(self.path));
        }
        Ok(at)
    }

    /// The L2 entry of a plain cluster.
    pub(super) fn plain(host: u64) -> u64 {
        host | COPIED
    }

    /// The L2 entry of `len` compressed bytes at `host`. The length counts the 512-byte sectors
    /// after the first that the bytes touch.
    pub(super) fn compressed(&self, host: u64, len: u64) -> u64 {
        let shift = 62 - (self.options.cluster_size.trailing_zeros() - 8);
        let sectors = (host + len - 1) / 512 - host / 512;
        COMPRESSED | sectors << shift | host
    }

    /// Remembers that the host cluster at `host` has `count` references.
    pub(super) fn share(&self, host: u64, count: u16) {
        let mut shared = self.shared.lock().unwrap_or_else(|e| e.into_inner());
        shared.insert(host / self.cluster(), count);
    }

    /// Enters what one chunk has placed, and writes the L2 tables that are complete now.
    ///
    /// # Errors
    /// Writing failed.
    pub(super) fn place(&self, chunk: &Chunk, entries: &[Entry]) -> Result<()> {
        let per_table = self.cluster() / 8;
        let coverage = self.options.l2_coverage();
        let mut complete = Vec::new();
        {
            let mut open = self.open.lock().unwrap_or_else(|e| e.into_inner());
            for &(index, entry) in entries {
                let table = index / per_table;
                let l2 = open.entry(table).or_insert_with(|| self.new_l2(table, per_table));
                l2.entries[(index % per_table) as usize] = entry;
            }
            for table in chunk.start / coverage..(chunk.start + chunk.len).div_ceil(coverage) {
                // A chunk that turned out to be zeros still counts, or its table would stay open.
                let l2 = open.entry(table).or_insert_with(|| self.new_l2(table, per_table));
                l2.pending = l2.pending.saturating_sub(1);
                if l2.pending == 0 {
                    complete.extend(open.remove(&table).map(|l2| (table, l2.entries)));
                }
            }
        }
        complete.into_iter().try_for_each(|(table, entries)| self.write_l2(table, &entries))
    }

    fn new_l2(&self, table: u64, per_table: u64) -> L2 {
        let pending = self.chunks.get(&table).copied().unwrap_or(1);
        L2 { entries: vec![0; per_table as usize].into(), pending }
    }

    fn write_l2(&self, table: u64, entries: &[u64]) -> Result<()> {
        if entries.iter().all(|e| *e == 0) {
            return Ok(());
        }
        let at = self.allocate(1)?;
        self.write(&big_endian(entries), at)?;
        let mut l1 = self.l1.lock().unwrap_or_else(|e| e.into_inner());
        l1[table as usize] = at | COPIED;
        Ok(())
    }

    fn write(&self, bytes: &[u8], at: u64) -> Result<()> {
        self.out
            .write_all_at(bytes, at)
            .map_err(|e| target_error(e, "writing failed", self.path).at_offset(at))
    }

    /// Writes L1 table, refcounts and header, and gives the file its length.
    ///
    /// # Errors
    /// Writing failed; `Unsupported` if the file got larger than QEMU opens.
    pub(super) fn finish(&self) -> Result<()> {
        let l1 = self.l1.lock().unwrap_or_else(|e| e.into_inner());
        let l1_bytes = big_endian(&l1);
        let l1_at = self.allocate((l1_bytes.len() as u64).div_ceil(self.cluster()).max(1))?;
        self.write(&l1_bytes, l1_at)?;
        let (table_at, table_clusters) = self.write_refcounts()?;
        let end = self.next.load(Ordering::Relaxed);
        self.out.set_len(end).map_err(|e| target_error(e, "cannot set the size", self.path))?;
        let tables = create::Tables {
            l1_offset: l1_at,
            l1_entries: l1.len() as u32,
            reftable_offset: table_at,
            reftable_clusters: table_clusters,
        };
        self.write(&self.header(&tables), 0)
    }

    /// Refcount blocks and their table: they count themselves too.
    fn write_refcounts(&self) -> Result<(u64, u32)> {
        let cluster = self.cluster();
        let used = self.next.load(Ordering::Relaxed) / cluster;
        let (blocks, table) = create::refcount_clusters(used, cluster);
        if table * cluster > MAX_REFCOUNT_TABLE {
            let text = "the file gets larger than QEMU opens with this cluster size";
            return Err(Error::new(Kind::Unsupported, text)
                .at_path(self.path)
                .remedy("use larger clusters"));
        }
        let blocks_at = self.allocate(blocks)?;
        let table_at = self.allocate(table)?;
        let total = used + blocks + table;
        let shared = self.shared.lock().unwrap_or_else(|e| e.into_inner());
        let mut pointers = Vec::new();
        for b in 0..blocks {
            let first = b * (cluster / REFCOUNT_BYTES);
            let counts = first..first + cluster / REFCOUNT_BYTES;
            let count = |i| if i < total { shared.get(&i).copied().unwrap_or(1) } else { 0 };
            let bytes: Vec<u8> = counts.flat_map(|i| count(i).to_be_bytes()).collect();
            self.write(&bytes, blocks_at + b * cluster)?;
            pointers.push(blocks_at + b * cluster);
        }
        let mut bytes = big_endian(&pointers);
        bytes.resize((table * cluster) as usize, 0);
        self.write(&bytes, table_at)?;
        Ok((table_at, table as u32))
    }

    fn header(&self, tables: &create::Tables) -> Vec<u8> {
        let compression = match self.options.compression {
            Compression::Zstd => header::Compression::Zstd,
            Compression::None | Compression::Zlib => header::Compression::Zlib,
        };
        let image = create::NewImage {
            size: self.size,
            cluster_size: self.cluster(),
            extended_l2: false,
            lazy_refcounts: false,
            compression,
        };
        image.header(tables)
    }
}

fn big_endian(entries: &[u64]) -> Vec<u8> {
    entries.iter().flat_map(|e| e.to_be_bytes()).collect()
}
