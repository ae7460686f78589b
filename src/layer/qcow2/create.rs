//! Making an empty image, version 3, as `qemu-img create` would.
//!
//! Layout, in clusters: the header, the refcount table, the refcount blocks, the L1 table.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::header::Compression;
use crate::error::{Error, Kind, Result};

/// A disk is a whole number of sectors.
const SECTOR: u64 = 512;
/// The largest L1 table that QEMU opens, in entries (32 MiB).
const MAX_L1: u64 = 4 << 20;
/// Extended L2 entries need clusters of this size at least.
const MIN_EXTENDED: u64 = 16 << 10;
/// The largest clusters.
const MAX_CLUSTER: u64 = 2 << 20;
/// Refcounts have 16 bits, as QEMU makes them.
const REFCOUNT_BYTES: u64 = 2;

/// The shape of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NewImage {
    /// Bytes of its disk; rounded up to whole sectors.
    pub size: u64,
    /// Bytes per cluster: a power of two from 512 to 2 MiB.
    pub cluster_size: u64,
    /// Whether clusters have subclusters.
    pub extended_l2: bool,
    /// Whether writers may leave the refcounts for later.
    pub lazy_refcounts: bool,
    /// How clusters will be compressed, where they are.
    pub compression: Compression,
}

/// Where the tables of an image are. Offsets in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tables {
    /// Offset of the L1 table.
    pub l1_offset: u64,
    /// Its entries.
    pub l1_entries: u32,
    /// Offset of the refcount table.
    pub reftable_offset: u64,
    /// Its clusters.
    pub reftable_clusters: u32,
}

impl NewImage {
    /// A plain one, for tests.
    #[cfg(test)]
    pub(crate) fn plain(size: u64, cluster_size: u64) -> Self {
        NewImage {
            size,
            cluster_size,
            extended_l2: false,
            lazy_refcounts: false,
            compression: Compression::Zlib,
        }
    }

    /// The same with clusters that are large enough for a disk of its size, if there are such.
    pub fn fitting(mut self) -> Self {
        while self.cluster_size < MAX_CLUSTER && self.l1_entries().is_err() {
            self.cluster_size = self.cluster_size.saturating_mul(2).max(512);
        }
        self
    }

    /// Writes the empty image into the empty file `to`, called `path` in errors; the header last. It
    /// is not synced.
    ///
    /// # Errors
    /// `Usage` if QEMU would not take an image of this shape; writing failed.
    pub fn write(&self, to: &File, path: &Path) -> Result<()> {
        self.write_with(to, path, |tables| Ok(self.header(tables)))
    }

    /// As [`NewImage::write`], with the raw image `backing` as backing file, which is not looked at.
    ///
    /// # Errors
    /// As [`NewImage::write`] and [`NewImage::header_over`].
    pub fn write_over(&self, to: &File, path: &Path, backing: &str) -> Result<()> {
        self.write_with(to, path, |tables| self.header_over(tables, backing))
    }

    fn write_with(
        &self,
        to: &File,
        path: &Path,
        header: impl FnOnce(&Tables) -> Result<Vec<u8>>,
    ) -> Result<()> {
        let l1_entries = self.l1_entries()?;
        let cluster = self.cluster_size;
        let l1_clusters = (l1_entries * 8).div_ceil(cluster);
        let (blocks, table) = refcount_clusters(1 + l1_clusters, cluster);
        let used = 1 + table + blocks + l1_clusters;
        let (blocks_at, l1_at) = (1 + table, 1 + table + blocks);
        let put = |bytes: &[u8], at: u64| {
            to.write_all_at(bytes, at)
                .map_err(|e| Error::io(e, "writing failed").at_path(path).at_offset(at))
        };
        let sized = to.set_len(used * cluster);
        sized.map_err(|e| Error::io(e, "cannot set the size").at_path(path))?;
        let offsets: Vec<u8> =
            (0..blocks).flat_map(|b| ((blocks_at + b) * cluster).to_be_bytes()).collect();
        put(&offsets, cluster)?;
        // Each cluster is used once; the blocks are in a row, so they are filled as one.
        let counts: Vec<u8> = (0..used).flat_map(|_| 1_u16.to_be_bytes()).collect();
        put(&counts, blocks_at * cluster)?;
        // The L1 table is all zeros, and so is a file where nothing was written.
        let tables = Tables {
            l1_offset: l1_at * cluster,
            l1_entries: l1_entries as u32,
            reftable_offset: cluster,
            reftable_clusters: table as u32,
        };
        put(&header(&tables)?, 0)
    }

    /// Fails for what the format does not have; one entry at least, so that the table has a place.
    fn l1_entries(&self) -> Result<u64> {
        let usage = |text: &str| Err(Error::new(Kind::Usage, text));
        let cluster = self.cluster_size;
        if !cluster.is_power_of_two() || !(512..=MAX_CLUSTER).contains(&cluster) {
            return usage("the cluster size must be a power of two from 512 to 2M");
        }
        if self.extended_l2 && cluster < MIN_EXTENDED {
            return usage("extended L2 entries need clusters of 16 KiB or more");
        }
        let entry = if self.extended_l2 { 16 } else { 8 };
        let coverage = cluster * (cluster / entry);
        match self.size.div_ceil(coverage).max(1) {
            entries if entries <= MAX_L1 && self.size <= i64::MAX as u64 - SECTOR => Ok(entries),
            _ => usage("the cluster size is too small for a disk of this size; use a larger one"),
        }
    }

    /// As [`NewImage::header`], with the raw image `backing` as backing file.
    ///
    /// # Errors
    /// `Usage` if the name is longer than the format takes.
    pub fn header_over(&self, tables: &Tables, backing: &str) -> Result<Vec<u8>> {
        /// The longest name of a backing file.
        const MAX_NAME: usize = 1023;
        /// The extension that has the format of the backing file.
        const FORMAT: u32 = 0xe279_2aca;
        if backing.is_empty() || backing.len() > MAX_NAME {
            return Err(Error::new(Kind::Usage, "a backing file's name has 1 to 1023 bytes"));
        }
        let mut h = self.header(tables);
        // Before the end of the extensions.
        h.truncate(h.len() - 8);
        h.extend(FORMAT.to_be_bytes());
        h.extend(3_u32.to_be_bytes());
        h.extend(b"raw\0\0\0\0\0");
        h.extend([0; 8]);
        let at = h.len() as u64;
        h.extend(backing.as_bytes());
        h[8..16].copy_from_slice(&at.to_be_bytes());
        h[16..20].copy_from_slice(&(backing.len() as u32).to_be_bytes());
        Ok(h)
    }

    /// The header of an image of this shape whose tables are where `tables` says: no backing file, no
    /// snapshots, no extensions.
    pub fn header(&self, tables: &Tables) -> Vec<u8> {
        let zstd = self.compression == Compression::Zstd;
        let incompatible = u64::from(zstd) << 3 | u64::from(self.extended_l2) << 4;
        let mut h = Vec::with_capacity(128);
        h.extend(b"QFI\xfb");
        h.extend(3_u32.to_be_bytes());
        // No backing file: offset and length.
        h.extend(0_u64.to_be_bytes());
        h.extend(0_u32.to_be_bytes());
        h.extend(self.cluster_size.trailing_zeros().to_be_bytes());
        h.extend(self.size.next_multiple_of(SECTOR).to_be_bytes());
        // No encryption.
        h.extend(0_u32.to_be_bytes());
        h.extend(tables.l1_entries.to_be_bytes());
        h.extend(tables.l1_offset.to_be_bytes());
        h.extend(tables.reftable_offset.to_be_bytes());
        h.extend(tables.reftable_clusters.to_be_bytes());
        // No snapshots: count and offset.
        h.extend(0_u32.to_be_bytes());
        h.extend(0_u64.to_be_bytes());
        h.extend(incompatible.to_be_bytes());
        h.extend(u64::from(self.lazy_refcounts).to_be_bytes());
        // No autoclear features.
        h.extend(0_u64.to_be_bytes());
        // Refcount order 4: 16 bits.
        h.extend(4_u32.to_be_bytes());
        // The compression type and its padding are part of the header.
        h.extend(112_u32.to_be_bytes());
        h.extend([u8::from(zstd), 0, 0, 0, 0, 0, 0, 0]);
        // The end of the header extensions.
        h.extend([0; 8]);
        h
    }
}

/// Clusters of refcount blocks and of their table for `used` other clusters: they count themselves
/// too.
pub fn refcount_clusters(used: u64, cluster: u64) -> (u64, u64) {
    let (mut blocks, mut table) = (0, 0);
    loop {
        let wanted = (used + blocks + table).div_ceil(cluster / REFCOUNT_BYTES);
        let wanted_table = (wanted * 8).div_ceil(cluster);
        if (wanted, wanted_table) == (blocks, table) {
            return (blocks, table);
        }
        (blocks, table) = (wanted, wanted_table);
    }
}
