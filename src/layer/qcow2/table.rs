//! L1 and L2 tables: from table entries to [`Mapping`]s.
//!
//! Entry types with their reserved-bit and alignment checks come from qcow2-rs; what an entry
//! means for subclusters, external data files and truncated files is decided here, after
//! `docs/interop/qcow2.rst`.

use std::ops::Range;
use std::sync::OnceLock;

use qcow2_rs::dev::{Qcow2DevParams, Qcow2Info};
use qcow2_rs::meta::{L1Entry, L2Entry, Qcow2Header, TableEntry};

use super::check::{ClusterSet, DATA_FILE};
use super::header::{Header, TableRef};
use crate::error::{Error, Kind, Result};
use crate::extent::ExtentList;
use crate::layer::raw::push_raw;
use crate::layer::{Kinds, KnownTables, LayerMap, Mapping};
use crate::storage::ReadAt;

/// Subclusters in a cluster of an image with extended L2 entries.
const SUBCLUSTERS: u32 = 32;
/// L1 entries read at a time when looking for the next mapped range.
const L1_CHUNK: u64 = 512;
/// Bytes of L2 tables read for one outline.
const MOST_TABLES: u64 = 4 << 20;
/// Tables of which a search remembers what is in them: some MiB.
const MOST_KNOWN: usize = 1 << 16;
/// L1 entries read at a time when mapping: 512 KiB of them.
const MAP_CHUNK: u64 = 1 << 16;

/// One L1 table of an image together with what is needed to walk it.
pub(super) struct Tables<'a> {
    pub header: &'a Header,
    pub l1: TableRef,
    /// Size in bytes of the virtual disk that the table maps.
    pub size: u64,
    pub image: &'a dyn ReadAt,
    /// Where plain clusters are: the image itself or its external data file.
    pub data: &'a dyn ReadAt,
    /// The file number of `data` in [`Mapping::Data`].
    pub data_ix: u8,
    /// Whether to ask the file system for holes inside plain clusters.
    pub look_for_holes: bool,
    /// Clusters that are not read, as two references claim them.
    pub twice: Option<&'a ClusterSet>,
}

impl Tables<'_> {
    /// Maps `range`, which lies inside the virtual disk.
    pub(super) fn map(&self, range: Range<u64>) -> LayerMap {
        let mut map = LayerMap::new(range.start);
        let span = self.header.l2_span();
        let end = range.end.div_ceil(span);
        let mut at = range.start / span;
        while at < end {
            let n = MAP_CHUNK.min(end - at);
            let part = range.start.max(at * span)..range.end.min((at + n).saturating_mul(span));
            if let Err(e) = self.map_l1_chunk(&mut map, at, n, part) {
                map.push_bad(range.end - map.extents.end(), &e, self.image.name());
                return map;
            }
            at += n;
        }
        map
    }

    /// Maps `range`, for which `count` L1 entries from `first` on stand.
    fn map_l1_chunk(
        &self,
        map: &mut LayerMap,
        first: u64,
        count: u64,
        range: Range<u64>,
    ) -> Result<()> {
        let span = self.header.l2_span();
        // Nothing but a hostile image has many entries for one table: it is not read each time.
        let mut nothing_in = None;
        for (i, raw) in (first..).zip(self.read_l1(first, count)?) {
            map.check_room(self.image.name())?;
            let part = range.start.max(i * span)..range.end.min((i + 1).saturating_mul(span));
            if nothing_in == Some(raw) && part.end - part.start == span {
                map.extents.push(span, Mapping::Below);
                continue;
            }
            let before = map.extents.as_slice().len();
            if let Err(e) = self.map_l1_entry(map, raw, i, part.clone()) {
                map.push_bad(part.end - map.extents.end(), &e, self.image.name());
            }
            let after = map.extents.as_slice();
            let below = after.last().is_some_and(|e| e.content == Mapping::Below);
            let one = after.len() == before || after.last().is_some_and(|e| e.start == part.start);
            nothing_in = (below && one && part.end - part.start == span).then_some(raw);
        }
        Ok(())
    }

    /// First guest offset at or after `from` that an L2 table may map.
    pub(super) fn next_mapped(&self, from: u64) -> u64 {
        let span = self.header.l2_span();
        let end = self.header.l1_entries_for(self.size);
        let mut at = from / span;
        while at < end {
            let n = L1_CHUNK.min(end - at);
            let Ok(entries) = self.read_l1(at, n) else { return from.max(at * span) };
            if let Some(i) = entries.iter().position(|e| *e != 0) {
                return from.max((at + i as u64) * span);
            }
            at += n;
        }
        self.size.max(from)
    }

    /// See [`crate::layer::Layer::outline`]. Reads an L2 table only if none of the same place is
    /// `known`: a small image can lead to one table from millions of places.
    pub(super) fn outline(&self, from: u64, known: &mut KnownTables) -> ExtentList<Kinds> {
        let span = self.header.l2_span();
        let first = from / span;
        let count = L1_CHUNK.min(self.header.l1_entries_for(self.size) - first);
        let mut list = ExtentList::new(from);
        let Ok(entries) = self.read_l1(first, count) else {
            list.push((first + 1).saturating_mul(span).min(self.size) - from, Kinds::ANY);
            return list;
        };
        let mut read = 0;
        for (i, raw) in (first..).zip(entries) {
            let part = i * span..(i + 1).saturating_mul(span).min(self.size);
            let whole = part.end - part.start == span;
            let kinds = match known.get(&raw).filter(|_| whole) {
                _ if raw == 0 => Kinds::BELOW,
                Some(kinds) => *kinds,
                None if read >= MOST_TABLES => break,
                None => {
                    read += self.header.cluster_size();
                    self.kinds_in_table(raw, i, part.clone())
                }
            };
            if whole && raw != 0 {
                if known.len() >= MOST_KNOWN {
                    known.clear();
                }
                known.insert(raw, kinds);
            }
            list.push(part.end - list.end(), kinds);
        }
        list
    }

    /// What occurs in `part`, which L1 entry number `i` is for.
    fn kinds_in_table(&self, raw: u64, i: u64, part: Range<u64>) -> Kinds {
        let mut map = LayerMap::new(part.start);
        match self.map_l1_entry(&mut map, raw, i, part) {
            Ok(()) => Kinds::of(&map),
            Err(e) if matches!(e.kind(), Kind::Corrupt | Kind::Truncated) => {
                // The rest cannot be read.
                Kinds::of(&map).with(Kinds::DATA)
            }
            Err(_) => Kinds::ANY,
        }
    }

    fn read_l1(&self, first: u64, count: u64) -> Result<Vec<u64>> {
        read_be64(self.image, self.l1.offset + first * 8, count)
    }

    fn map_l1_entry(&self, map: &mut LayerMap, raw: u64, i: u64, part: Range<u64>) -> Result<()> {
        match self.l2_table(raw, i)? {
            Some(table) => self.map_l2_table(map, table, part),
            None => {
                map.extents.push(part.end - part.start, Mapping::Below);
                Ok(())
            }
        }
    }

    /// Where the table of L1 entry number `i` is, if it has one.
    fn l2_table(&self, raw: u64, i: u64) -> Result<Option<u64>> {
        let at = self.l1.offset + i * 8;
        let entry = L1Entry::try_from_plain(raw, entry_rules(self.header.cluster_bits))
            .map_err(|e| self.corrupt(at, e.to_string()))?;
        if entry.is_zero() {
            return Ok(None);
        }
        self.check_place(entry.l2_offset(), at)?;
        if entry.l2_offset() >= self.image.len() {
            return Err(self.cut(at, "an L2 table is past the end of the file"));
        }
        Ok(Some(entry.l2_offset()))
    }

    /// See [`crate::layer::Layer::check_top`].
    pub(super) fn check_l1(&self) -> Result<()> {
        let end = self.header.l1_entries_for(self.size);
        let mut at = 0;
        while at < end {
            let n = MAP_CHUNK.min(end - at);
            let entries = self.read_l1(at, n)?;
            (at..).zip(entries).try_for_each(|(i, raw)| self.l2_table(raw, i).map(drop))?;
            at += n;
        }
        Ok(())
    }

    /// Nothing may be in the image's header or in the L1 table that leads to it. (Refcount tables
    /// are not looked at: reading does not depend on them, so their damage must not matter.)
    fn check_place(&self, host: u64, at: u64) -> Result<()> {
        let used = self.header.l1_entries_for(self.size) * 8;
        let l1 = self.l1.offset..self.l1.offset.saturating_add(used);
        if host < self.header.cluster_size() || l1.contains(&host) {
            return Err(self.corrupt(at, "a table entry points into the image's own metadata"));
        }
        self.check_claim(host >> self.header.cluster_bits, at)
    }

    fn check_claim(&self, cluster: u64, at: u64) -> Result<()> {
        if self.twice.is_some_and(|t| t.contains(cluster)) {
            let what = "the image is marked as corrupt, and something else uses the same cluster";
            return Err(self.corrupt(at, what));
        }
        Ok(())
    }

    fn map_l2_table(&self, map: &mut LayerMap, table: u64, part: Range<u64>) -> Result<()> {
        let bits = self.header.cluster_bits;
        let words = if self.header.extended_l2() { 2 } else { 1 };
        let per_table = (self.header.l2_span() >> bits) - 1;
        let first = (part.start >> bits) & per_table;
        let count = part.end.div_ceil(1 << bits) - (part.start >> bits);
        let at = table + first * words * 8;
        let there = self.image.len().saturating_sub(at) / (words * 8);
        if there == 0 {
            return Err(self.cut(at, "the file ends before this L2 table"));
        }
        let entries = read_be64(self.image, at, count.min(there) * words)?;
        let cluster = |n: u64| {
            let at = ((part.start >> bits) + n) << bits;
            at.clamp(part.start, part.end)
        };
        let mut n = 0;
        while let Some(rest) = entries.get((n * words) as usize..).filter(|r| !r.is_empty()) {
            // Most tables of an increment are nearly empty: runs of nothing are taken at once.
            let empty = rest.iter().position(|w| *w != 0).unwrap_or(rest.len()) as u64 / words;
            map.extents.push(cluster(n + empty) - cluster(n), Mapping::Below);
            n += empty;
            let Some(entry) = entries.get((n * words) as usize..((n + 1) * words) as usize) else {
                break;
            };
            map.check_room(self.image.name())?;
            let range = cluster(n)..cluster(n + 1);
            if let Err(e) = self.map_cluster(map, entry, at + n * words * 8, range.clone()) {
                map.push_bad(range.end - map.extents.end(), &e, self.image.name());
            }
            n += 1;
        }
        if there < count {
            return Err(self.cut(at + there * words * 8, "the file ends inside this L2 table"));
        }
        Ok(())
    }

    fn map_cluster(
        &self,
        map: &mut LayerMap,
        words: &[u64],
        at: u64,
        part: Range<u64>,
    ) -> Result<()> {
        let bits = self.header.cluster_bits;
        let entry = L2Entry::try_from_plain(words[0], entry_rules(bits))
            .map_err(|e| self.corrupt(at, e.to_string()))?;
        if entry.is_compressed() {
            return self.map_compressed(map, entry, at, part);
        }
        if let [_, bitmap] = *words {
            return self.map_subclusters(map, entry, bitmap, at, part);
        }
        let len = part.end - part.start;
        if entry.is_zero() {
            if self.header.version < 3 {
                return Err(self.corrupt(at, "a version 2 image cannot have zero clusters"));
            }
            map.extents.push(len, Mapping::Zero);
            return Ok(());
        }
        if self.is_unallocated(entry) {
            map.extents.push(len, Mapping::Below);
            return Ok(());
        }
        let skip = part.start & (self.header.cluster_size() - 1);
        self.check_data_place(entry.cluster_offset(), at)?;
        self.push_plain(map, entry.cluster_offset() + skip, len, at)
    }

    fn check_data_place(&self, host: u64, at: u64) -> Result<()> {
        match self.header.has_data_file() {
            true => self.check_claim(host >> self.header.cluster_bits | DATA_FILE, at),
            false => self.check_place(host, at),
        }
    }

    /// Offset 0 means "nothing here", but in an external data file 0 is a good place.
    fn is_unallocated(&self, entry: L2Entry) -> bool {
        entry.cluster_offset() == 0 && !(self.header.has_data_file() && entry.is_copied())
    }

    fn map_subclusters(
        &self,
        map: &mut LayerMap,
        entry: L2Entry,
        bitmap: u64,
        at: u64,
        part: Range<u64>,
    ) -> Result<()> {
        if entry.is_zero() {
            return Err(self.corrupt(at, "reserved bit 0 of an extended L2 entry is set"));
        }
        let size = self.header.cluster_size() / u64::from(SUBCLUSTERS);
        let base = part.start & !(self.header.cluster_size() - 1);
        let (mut start, end) = (part.start, part.end);
        while start < end {
            let i = (start - base) / size;
            let stop = (base + (i + 1) * size).min(end);
            let allocated = bitmap >> i & 1 != 0;
            let zero = bitmap >> (i + 32) & 1 != 0;
            match (allocated, zero) {
                (true, true) => {
                    return Err(self.corrupt(
                        at,
                        "a subcluster is marked as data and \
                                                             as zero",
                    ));
                }
                (false, true) => map.extents.push(stop - start, Mapping::Zero),
                (false, false) => map.extents.push(stop - start, Mapping::Below),
                (true, false) if self.is_unallocated(entry) => {
                    return Err(self.corrupt(at, "an allocated subcluster without a host offset"));
                }
                (true, false) => {
                    self.check_data_place(entry.cluster_offset(), at)?;
                    let host = entry.cluster_offset() + (start - base);
                    self.push_plain(map, host, stop - start, at)?;
                }
            }
            start = stop;
        }
        Ok(())
    }

    fn map_compressed(
        &self,
        map: &mut LayerMap,
        entry: L2Entry,
        at: u64,
        part: Range<u64>,
    ) -> Result<()> {
        if self.header.has_data_file() {
            return Err(self.corrupt(
                at,
                "a compressed cluster in an image with an external data \
                                         file",
            ));
        }
        let bits = self.header.cluster_bits;
        let (host, len) = entry
            .compressed_range(bits)
            .ok_or_else(|| self.corrupt(at, "not a compressed cluster"))?;
        self.check_place(host, at)?;
        // The length counts whole sectors, the last of which the file need not have in full.
        let len = (len as u64).min(self.image.len().saturating_sub(host));
        if len == 0 {
            return Err(self.cut(at, "a compressed cluster is past the end of the file"));
        }
        let skip = (part.start & ((1 << bits) - 1)) as u32;
        self.check_claim((host + len - 1) >> bits, at)?;
        let mapping = Mapping::Compressed { host, len: len as u32, unit: 1 << bits, skip };
        map.extents.push(part.end - part.start, mapping);
        Ok(())
    }

    /// Plain bytes at `host`; what lies past the end of the file is bad, not zero.
    fn push_plain(&self, map: &mut LayerMap, host: u64, len: u64, at: u64) -> Result<()> {
        let there = self.data.len().saturating_sub(host).min(len);
        if self.look_for_holes {
            push_raw(map, self.data, self.data_ix, host, there)?;
        } else {
            map.extents.push(there, Mapping::Data { file: self.data_ix, host });
        }
        if there < len {
            return Err(self.cut(at, "a data cluster is past the end of the file"));
        }
        Ok(())
    }

    fn corrupt(&self, at: u64, what: impl Into<String>) -> Error {
        Error::new(Kind::Corrupt, what)
            .at_path(self.image.name())
            .at_offset(at)
            .remedy("restore this file from another copy of the backup")
    }

    fn cut(&self, at: u64, what: &str) -> Error {
        Error::new(Kind::Truncated, what)
            .at_path(self.image.name())
            .at_offset(at)
            .remedy("restore this file from another copy of the backup")
    }
}

fn read_be64(storage: &dyn ReadAt, offset: u64, count: u64) -> Result<Vec<u64>> {
    let mut bytes = vec![0; count as usize * 8];
    storage.read_exact_at(&mut bytes, offset)?;
    let word = |b: &[u8]| u64::from_be_bytes(b.try_into().expect("eight bytes"));
    Ok(bytes.chunks_exact(8).map(word).collect())
}

/// What qcow2-rs needs to check a table entry: nothing of it but the cluster size matters, so one
/// per cluster size is made from a minimal header.
fn entry_rules(cluster_bits: u32) -> &'static Qcow2Info {
    static RULES: [OnceLock<Qcow2Info>; 22] = [const { OnceLock::new() }; 22];
    RULES[cluster_bits as usize].get_or_init(|| {
        // Magic, version, cluster_bits, size 0, header_length 104, and an end-of-extensions mark.
        let mut buf = [0u8; 512];
        buf[0..4].copy_from_slice(&Qcow2Header::QCOW2_MAGIC.to_be_bytes());
        buf[7] = 3;
        buf[23] = cluster_bits as u8;
        buf[99] = 4;
        buf[103] = 104;
        let header = Qcow2Header::from_buf(&buf).expect("a minimal header is valid");
        // Cache geometry: the smallest slices that every cluster size allows (512 bytes, two).
        let params = Qcow2DevParams::new(9, Some((9, 1024)), Some((9, 1024)), true, false);
        Qcow2Info::new(&header, &params).expect("a minimal header is valid")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cluster_size_has_its_rules() {
        for bits in 9..=21 {
            let rules = entry_rules(bits);
            assert_eq!(rules.cluster_size(), 1 << bits);
            assert!(L1Entry::try_from_plain(1 << bits, rules).is_ok());
            assert!(L1Entry::try_from_plain((1 << bits) | 2, rules).is_err());
        }
        assert!(L2Entry::try_from_plain(0x8000_0000_0001_0200, entry_rules(16)).is_err());
    }
}
