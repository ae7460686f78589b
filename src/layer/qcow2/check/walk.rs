//! The walk itself: from the header to each cluster.

use std::ops::Range;

use super::clusters::ClusterSet;
use super::findings::{ClusterUse, FindingList, REMEDY};
use crate::error::{Error, Finding, Kind, Result, Severity};
use crate::layer::qcow2::header::{Header, TableRef};
use crate::storage::ReadAt;

/// Bits 9 to 55: where a table or cluster is.
pub(super) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// The refcount is exactly 1.
const COPIED: u64 = 1 << 63;

/// The cluster is compressed.
const COMPRESSED: u64 = 1 << 62;

/// The cluster reads as zeros.
const ZERO: u64 = 1;

/// L1 entries read at a time.
const L1_CHUNK: u64 = 4096;

/// Marks a cluster number as one of the external data file; clusters have less than 56 bits.
pub(in crate::layer::qcow2) const DATA_FILE: u64 = 1 << 60;

pub(super) struct Walker<'a> {
    pub(super) image: &'a dyn ReadAt,
    pub(super) h: &'a Header,
    /// Length of the external data file, if there is one.
    data_len: Option<u64>,
    pub(super) used: ClusterUse,
    /// Data and L2 clusters that the L1 table at hand refers to.
    seen: ClusterSet,
    /// The refcount blocks' offsets, in table order.
    pub(super) blocks: Vec<u64>,
    pub(super) blocks_readable: bool,
    pub(super) compressed: bool,
    /// Clusters that two references claim.
    pub(super) twice: ClusterSet,
    /// Bytes that the sets of clusters may take.
    pub(super) most: u64,
    /// The first thing that may claim clusters and was not looked into.
    pub(super) left_out: Option<Error>,
    pub(super) out: FindingList,
}

/// One standard cluster's entry.
struct Plain {
    offset: u64,
    /// Guest bytes that are read out of it.
    needed: u64,
    at: u64,
}

impl<'a> Walker<'a> {
    pub(super) fn new(image: &'a dyn ReadAt, h: &'a Header, data_len: Option<u64>) -> Self {
        Walker {
            image,
            h,
            data_len,
            used: ClusterUse::default(),
            seen: ClusterSet::default(),
            blocks: Vec::new(),
            blocks_readable: true,
            compressed: false,
            twice: ClusterSet::default(),
            most: u64::MAX,
            left_out: None,
            out: FindingList::default(),
        }
    }

    pub(super) fn walk(&mut self) -> Result<()> {
        // Metadata first: it is what others run into.
        self.used.meta.insert(0);
        self.refcount_table();
        self.metadata(self.h.l1.offset, self.needed_l1(), "the L1 table");
        let snapshots = self.snapshots();
        self.bitmaps();
        self.bounded()?;
        self.l1_table(self.h.l1, self.h.size)?;
        for s in snapshots {
            self.seen = ClusterSet::default();
            self.l1_table(s.l1, s.info.virtual_size)?;
        }
        Ok(())
    }

    /// Bytes of the L1 table: those that the size needs, and what the file has of the rest.
    fn needed_l1(&self) -> u64 {
        let all = self.h.l1.byte_len();
        let there = self.image.len().saturating_sub(self.h.l1.offset);
        all.min(there).max(self.h.l1_entries_for(self.h.size) * 8)
    }

    pub(super) fn error(&mut self, kind: Kind, at: u64, what: impl Into<String>) {
        self.note(Severity::Error, kind, at, what);
    }

    fn note(&mut self, severity: Severity, kind: Kind, at: u64, what: impl Into<String>) {
        let error = Error::new(kind, what).at_path(self.image.name()).at_offset(at).remedy(REMEDY);
        let mut finding = Finding::from_error(&error, self.image.name());
        finding.severity = severity;
        self.out.push(finding);
    }

    /// Remembers that something was not looked into which may claim clusters.
    pub(super) fn leave_out(&mut self, at: u64) {
        let error = || {
            let what = "QEMU marked the image as corrupt, and a table is damaged: clusters in use \
                        twice cannot be found";
            Error::new(Kind::Corrupt, what).at_path(self.image.name()).at_offset(at).remedy(REMEDY)
        };
        if self.left_out.is_none() {
            self.left_out = Some(error());
        }
    }

    /// Whether all that counts is which clusters are claimed.
    fn claims_only(&self) -> bool {
        self.most != u64::MAX
    }

    /// Fails if the sets of clusters have become larger than they may.
    fn bounded(&self) -> Result<()> {
        let u = &self.used;
        let sets = [&u.meta, &u.l2, &u.data, &u.packed, &self.seen, &self.twice];
        if sets.iter().map(|s| s.bytes()).sum::<u64>() <= self.most {
            return Ok(());
        }
        let what = "QEMU marked the image as corrupt, and its clusters are too far apart to find \
                    those in use twice";
        Err(Error::new(Kind::Unsupported, what).at_path(self.image.name()).remedy(REMEDY))
    }

    /// Marks clusters that must be used for nothing else; false if one is used already. The rest is
    /// omitted then: a hostile file may name one large table a million times.
    pub(super) fn metadata(&mut self, offset: u64, len: u64, what: &str) -> bool {
        let range = clusters(offset..offset.saturating_add(len), self.h.cluster_bits);
        for cluster in range.clone() {
            if self.bounded().is_err() {
                return false;
            }
            let free = self.is_free(cluster);
            if !self.used.meta.insert(cluster) || !free {
                let at = cluster << self.h.cluster_bits;
                let text = format!("{what} and something else use the same cluster");
                self.twice.insert(cluster);
                self.error(Kind::Corrupt, at, text);
                if cluster + 1 < range.end {
                    self.leave_out(at);
                }
                return false;
            }
        }
        true
    }

    /// Whether the file system knows that there are only zeros: a sparse file may claim exabytes of
    /// tables.
    pub(super) fn is_hole(&self, offset: u64, len: u64) -> bool {
        let end = offset.saturating_add(len);
        self.image.seek_data(offset).is_ok_and(|at| at.is_none_or(|at| at >= end))
    }

    fn is_free(&self, cluster: u64) -> bool {
        let used = &self.used;
        let sets = [&used.meta, &used.l2, &used.data, &used.packed];
        sets.iter().all(|s| !s.contains(cluster))
    }

    fn refcount_table(&mut self) {
        let (offset, bits) = (self.h.reftable_offset, self.h.cluster_bits);
        let len = u64::from(self.h.reftable_clusters) << bits;
        if offset.checked_add(len).is_none_or(|end| end > self.image.len()) {
            self.leave_out(offset);
            return self.refcounts_unreadable(
                offset,
                "the refcount table is past the end of the \
                                                      file",
            );
        }
        self.metadata(offset, len, "the refcount table");
        let entries = match read_words(self.image, offset, len / 8) {
            Ok(e) => e,
            Err(e) => {
                self.leave_out(offset);
                return self.out.push(Finding::from_error(&e, self.image.name()));
            }
        };
        for (i, &entry) in (0..).zip(&entries) {
            let block = entry & !0x1ff;
            if entry & 0x1ff != 0 || block & (self.h.cluster_size() - 1) != 0 {
                self.refcounts_unreadable(offset + i * 8, "a refcount table entry is not aligned");
            } else if block.saturating_add(self.h.cluster_size()) > self.image.len() {
                // The last block may end the file short of a whole cluster.
                if block >= self.image.len() {
                    self.refcounts_unreadable(offset + i * 8, "a refcount block is past the end");
                }
            }
            // One that something else uses is no reason to leave out the others: each is one cluster.
            if block != 0 && block < self.image.len() {
                self.metadata(block, self.h.cluster_size(), "a refcount block");
            }
        }
        self.blocks = entries.iter().map(|e| e & !0x1ff).collect();
    }

    /// Reading does not need the refcounts: worth a warning.
    fn refcounts_unreadable(&mut self, at: u64, what: &str) {
        self.blocks_readable = false;
        let text = format!("{what}; the data can be read, but do not write to this image");
        self.note(Severity::Warning, Kind::Corrupt, at, text);
    }

    fn l1_table(&mut self, l1: TableRef, size: u64) -> Result<()> {
        let there = self.image.len().saturating_sub(l1.offset) / 8;
        let count = u64::from(l1.entries).min(there);
        if count < self.h.l1_entries_for(size) {
            self.leave_out(l1.offset);
        }
        let mut first = 0;
        while first < count {
            let n = L1_CHUNK.min(count - first);
            if self.is_hole(l1.offset + first * 8, n * 8) {
                first += n;
                continue;
            }
            let entries = read_words(self.image, l1.offset + first * 8, n)?;
            for (i, entry) in (first..).zip(entries).filter(|(_, e)| *e != 0) {
                self.l1_entry(entry, l1.offset + i * 8, i, size)?;
            }
            first += n;
        }
        Ok(())
    }

    fn l1_entry(&mut self, entry: u64, at: u64, index: u64, size: u64) -> Result<()> {
        let table = entry & OFFSET;
        if entry & !(OFFSET | COPIED) != 0 {
            self.leave_out(at);
            self.error(Kind::Corrupt, at, "reserved bits of an L1 entry are set");
            return Ok(());
        }
        if table & (self.h.cluster_size() - 1) != 0 {
            self.leave_out(at);
            self.error(Kind::Corrupt, at, "an L2 table is not aligned");
            return Ok(());
        }
        if table == 0 {
            self.note(Severity::Warning, Kind::Corrupt, at, "an L1 entry has a flag and no table");
            return Ok(());
        }
        if !self.take_l2(table, at) {
            return Ok(());
        }
        self.l2_table(table, at, index.saturating_mul(self.h.l2_span()), size)
    }

    /// Marks an L2 table; false if there is no need to look into it.
    fn take_l2(&mut self, table: u64, at: u64) -> bool {
        let cluster = table >> self.h.cluster_bits;
        if table >= self.image.len() {
            self.leave_out(at);
            self.error(Kind::Truncated, at, "an L2 table is past the end of the file");
            return false;
        }
        let used = &self.used;
        let taken = [&used.meta, &used.data, &used.packed].iter().any(|s| s.contains(cluster));
        if taken || !self.seen.insert(cluster) {
            self.twice.insert(cluster);
            self.error(Kind::Corrupt, at, "an L2 table and something else use the same cluster");
            // Whatever is in it claims clusters too.
            return taken && self.claims_only() && self.used.l2.insert(cluster);
        }
        // Known already: another snapshot's, and looked into then.
        self.used.l2.insert(cluster)
    }

    fn l2_table(&mut self, table: u64, from: u64, guest: u64, size: u64) -> Result<()> {
        let words: u64 = if self.h.extended_l2() { 2 } else { 1 };
        let count = self.h.l2_span() >> self.h.cluster_bits;
        let there = (self.image.len() - table) / (words * 8);
        let needed = size.saturating_sub(guest).div_ceil(self.h.cluster_size()).min(count);
        if there < needed {
            self.leave_out(from);
            self.error(Kind::Truncated, from, "the file ends inside an L2 table");
        }
        if self.is_hole(table, count.min(there) * words * 8) {
            return Ok(());
        }
        let entries = read_words(self.image, table, count.min(there) * words)?;
        let (mut at, mut guest) = (table, guest);
        for entry in entries.chunks_exact(words as usize) {
            if entry.iter().any(|w| *w != 0) {
                self.bounded()?;
                let needed = size.saturating_sub(guest).min(self.h.cluster_size());
                self.l2_entry(entry[0], entry.get(1).copied(), needed, at);
            }
            at += words * 8;
            guest = guest.saturating_add(self.h.cluster_size());
        }
        Ok(())
    }

    fn l2_entry(&mut self, entry: u64, subclusters: Option<u64>, mut needed: u64, at: u64) {
        if entry & COMPRESSED != 0 {
            return self.packed_cluster(entry, subclusters, at);
        }
        if entry & !(OFFSET | COPIED | ZERO) != 0 {
            return self.error(Kind::Corrupt, at, "reserved bits of an L2 entry are set");
        }
        let offset = entry & OFFSET;
        if let Some(map) = subclusters {
            if let Some(what) = self.bad_subclusters(entry, offset, map) {
                return self.error(Kind::Corrupt, at, what);
            }
            // Up to the last subcluster that has data: the file may end behind that.
            let last = u64::from(32 - (map as u32).leading_zeros());
            needed = needed.min(last * (self.h.cluster_size() / 32));
        } else if entry & ZERO != 0 {
            if self.h.version < 3 {
                let what = "a version 2 image cannot have zero clusters";
                return self.error(Kind::Corrupt, at, what);
            }
            needed = 0;
        }
        if offset & (self.h.cluster_size() - 1) != 0 {
            return self.error(Kind::Corrupt, at, "a data cluster is not aligned");
        }
        let in_data_file = self.data_len.is_some();
        if offset == 0 && !(in_data_file && entry & COPIED != 0) {
            if entry & COPIED != 0 {
                let what = "an L2 entry has a flag and no cluster";
                self.note(Severity::Warning, Kind::Corrupt, at, what);
            }
            return;
        }
        self.data_cluster(&Plain { offset, needed, at });
    }

    /// What contradicts itself in a subcluster bitmap: lower half allocated, upper half zero.
    fn bad_subclusters(&self, entry: u64, offset: u64, map: u64) -> Option<&'static str> {
        if entry & ZERO != 0 {
            return Some("reserved bit 0 of an extended L2 entry is set");
        }
        if map as u32 & (map >> 32) as u32 != 0 {
            return Some("a subcluster is marked as data and as zero");
        }
        let nowhere = offset == 0 && !(self.data_len.is_some() && entry & COPIED != 0);
        (nowhere && map as u32 != 0).then_some("an allocated subcluster without a host offset")
    }

    fn data_cluster(&mut self, p: &Plain) {
        let len = self.data_len.unwrap_or(self.image.len());
        if p.needed > 0 && p.offset.checked_add(p.needed).is_none_or(|end| end > len) {
            self.error(Kind::Truncated, p.at, "a data cluster is past the end of the file");
            // What is there of it is claimed.
            if p.offset >= len {
                return;
            }
        }
        let cluster = p.offset >> self.h.cluster_bits;
        if self.data_len.is_some() {
            // The other file's clusters, apart from this one's L2 tables.
            if !self.seen.insert(cluster | DATA_FILE) {
                self.twice.insert(cluster | DATA_FILE);
                self.error(Kind::Corrupt, p.at, "two guest clusters use the same host cluster");
            }
            return;
        }
        if self.used.meta.contains(cluster) || self.used.l2.contains(cluster) {
            self.twice.insert(cluster);
            return self.error(Kind::Corrupt, p.at, "a data cluster overlaps metadata");
        }
        if self.used.packed.contains(cluster) || !self.seen.insert(cluster) {
            self.twice.insert(cluster);
            return self.error(Kind::Corrupt, p.at, "two guest clusters use the same host cluster");
        }
        self.used.data.insert(cluster);
    }

    fn packed_cluster(&mut self, entry: u64, subclusters: Option<u64>, at: u64) {
        if self.data_len.is_some() {
            let what = "a compressed cluster in an image with an external data file";
            return self.error(Kind::Corrupt, at, what);
        }
        if entry & COPIED != 0 || subclusters.is_some_and(|m| m != 0) {
            let what = "a compressed cluster has an invalid flag";
            self.note(Severity::Warning, Kind::Corrupt, at, what);
        }
        let range = packed_range(entry, self.h.cluster_bits);
        if range.start >= self.image.len() {
            let what = "a compressed cluster is past the end of the file";
            return self.error(Kind::Truncated, at, what);
        }
        self.compressed = true;
        let mut taken = false;
        for cluster in clusters(range, self.h.cluster_bits) {
            let used = &self.used;
            if [&used.meta, &used.l2, &used.data].iter().any(|s| s.contains(cluster)) {
                self.twice.insert(cluster);
                taken = true;
            } else {
                self.used.packed.insert(cluster);
            }
        }
        if taken {
            let what = "a compressed cluster and something else use the same cluster";
            self.error(Kind::Corrupt, at, what);
        }
    }
}

/// Bytes that the sets of [`claimed_twice`] may take: an image of 15 TiB with clusters of 64 KiB, all
/// of them used, takes as many.
pub(super) const MAX_CLAIMS: u64 = 64 << 20;

/// Host bytes of a compressed cluster: whole sectors, the last of which may be cut by the file's
/// end.
fn packed_range(entry: u64, cluster_bits: u32) -> Range<u64> {
    let shift = 62 - (cluster_bits - 8);
    let host = entry & ((1 << shift) - 1);
    let sectors = (entry & (COMPRESSED - 1)) >> shift;
    host..(host & !511) + (sectors + 1) * 512
}

fn clusters(bytes: Range<u64>, bits: u32) -> Range<u64> {
    if bytes.is_empty() { 0..0 } else { bytes.start >> bits..((bytes.end - 1) >> bits) + 1 }
}

/// `count` big-endian 64-bit words at `offset`.
pub(super) fn read_words(storage: &dyn ReadAt, offset: u64, count: u64) -> Result<Vec<u64>> {
    let mut bytes = vec![0; (count * 8) as usize];
    storage.read_exact_at(&mut bytes, offset)?;
    Ok(bytes.chunks_exact(8).map(be64).collect())
}

pub(super) fn be64(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |v, b| v << 8 | u64::from(*b))
}

pub(super) fn be32(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0, |v, b| v << 8 | u32::from(*b))
}
