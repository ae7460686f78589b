//! What FAT and exFAT have in common: clusters, a table that chains them, and times.
//!
//! - `chain`: the clusters of one file
//! - `file`: contents; `slots`: folders, in entries of 32 bytes
//! - `plain`: attributes where there are none; `time`: dates and times as DOS packed them

mod chain;
mod file;
mod plain;
mod slots;
mod time;

use super::bytes::{le16, le32};
use super::findings::Findings;
use super::source::Source;
use crate::error::{Error, Kind, Result};

pub(super) use chain::Chain;
pub(super) use file::File;
pub(super) use plain::plain;
pub(super) use slots::{SLOT, Slots};
pub(super) use time::{Stamp, time};

/// The first cluster's number: two entries of the table are something else.
pub(super) const FIRST: u32 = 2;
/// Bytes of the table that are looked at together.
const WINDOW: u64 = 4096;

/// How wide an entry of the table is, and what it means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Width {
    /// 12 bits.
    Fat12,
    /// 16 bits.
    Fat16,
    /// 32 bits, of which the upper four mean nothing.
    Fat32,
    /// 32 bits.
    Exfat,
}

impl Width {
    /// Bits that an entry takes.
    pub(super) fn bits(self) -> u64 {
        match self {
            Width::Fat12 => 12,
            Width::Fat16 => 16,
            Width::Fat32 | Width::Exfat => 32,
        }
    }

    /// The mark of a bad cluster, above which all end a chain.
    fn bad(self) -> u32 {
        match self {
            Width::Fat12 => 0xff7,
            Width::Fat16 => 0xfff7,
            Width::Fat32 => 0x0fff_fff7,
            Width::Exfat => 0xffff_fff7,
        }
    }
}

/// The clusters of a volume, and the table that chains them.
pub(super) struct Clusters {
    pub source: Source,
    pub findings: Findings,
    /// Where the table in use begins, in bytes.
    pub table_at: u64,
    pub width: Width,
    /// Bytes of a cluster, at most 32 MiB.
    pub size: u64,
    /// Where cluster 2 begins, in bytes.
    pub heap_at: u64,
    /// How many there are.
    pub count: u32,
}

/// What an entry of the table says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Link {
    /// That this one follows; in range or not.
    Next(u32),
    /// That it is the last one.
    End,
    /// That it is not in use.
    Free,
    /// That it is bad.
    Bad,
}

impl Clusters {
    /// Whether there is a cluster of this number.
    pub(super) fn has(&self, cluster: u32) -> bool {
        cluster.checked_sub(FIRST).is_some_and(|i| i < self.count)
    }

    /// Where a cluster begins, in bytes.
    pub(super) fn place(&self, cluster: u32) -> u64 {
        self.heap_at + u64::from(cluster.saturating_sub(FIRST)) * self.size
    }

    /// The cluster that a byte of the volume is in.
    pub(super) fn cluster_at(&self, place: u64) -> Option<u32> {
        let index = place.checked_sub(self.heap_at)? / self.size;
        let cluster = u32::try_from(index).ok()?.checked_add(FIRST)?;
        self.has(cluster).then_some(cluster)
    }

    /// How many clusters so many bytes take.
    pub(super) fn needed(&self, bytes: u64) -> u64 {
        bytes.div_ceil(self.size)
    }

    /// An error about the entry of a cluster in the table.
    pub(super) fn bad(&self, cluster: u32, what: impl AsRef<str>) -> Error {
        let at = self.table_at + u64::from(cluster) * self.width.bits() / 8;
        self.source.error(Kind::Corrupt, what, at)
    }

    /// Makes a finding of an error.
    pub(super) fn noted<T>(&self, result: Result<T>) -> Result<T> {
        self.findings.noted(&self.source, result)
    }

    /// A reader of the table.
    pub(super) fn links(&self) -> Links<'_> {
        Links { clusters: self, window: Vec::new(), window_at: 0 }
    }
}

/// Reads the table, a stretch of it at a time.
pub(super) struct Links<'a> {
    clusters: &'a Clusters,
    window: Vec<u8>,
    window_at: u64,
}

impl Links<'_> {
    /// What the entry of a cluster says; whoever asks has looked whether there is such a cluster.
    ///
    /// # Errors
    /// What reading the point says.
    pub(super) fn get(&mut self, cluster: u32) -> Result<Link> {
        let (width, number) = (self.clusters.width, u64::from(cluster));
        let at = self.clusters.table_at + number * width.bits() / 8;
        let entry = match width {
            Width::Fat12 => {
                let pair = le16(self.bytes(at, 2)?, 0);
                u32::from(if number % 2 == 1 { pair >> 4 } else { pair & 0xfff })
            }
            Width::Fat16 => u32::from(le16(self.bytes(at, 2)?, 0)),
            Width::Fat32 => le32(self.bytes(at, 4)?, 0) & 0x0fff_ffff,
            Width::Exfat => le32(self.bytes(at, 4)?, 0),
        };
        Ok(match entry {
            0 => Link::Free,
            e if e == width.bad() => Link::Bad,
            e if e > width.bad() => Link::End,
            e => Link::Next(e),
        })
    }

    fn bytes(&mut self, at: u64, len: usize) -> Result<&[u8]> {
        let end = self.window_at + self.window.len() as u64;
        if at < self.window_at || at + len as u64 > end {
            self.window_at = at - at % WINDOW;
            // An entry of 12 bits may begin in the last byte.
            let want = WINDOW + 8;
            let there = self.clusters.source.size().saturating_sub(self.window_at);
            self.window = self.clusters.source.meta(self.window_at, want.min(there) as usize)?;
        }
        self.clusters.source.check(at, len as u64)?;
        Ok(super::bytes::part(&self.window, (at - self.window_at) as usize, len))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::blocks::Blocks;
    use super::super::tree::{OpenFile, Stretch};
    use super::*;
    use crate::storage::MemStorage;

    /// 60 clusters of 512 bytes, each full of its number, with a table of this width.
    fn made(width: Width, links: &[(u32, u32)]) -> Arc<Clusters> {
        let mut bytes = vec![0; 1024];
        for (from, to) in links {
            match width {
                Width::Fat12 => {
                    let at = *from as usize * 3 / 2;
                    let shift = if from % 2 == 1 { 4 } else { 0 };
                    let both = le16(&bytes, at) | (*to as u16) << shift;
                    bytes[at..at + 2].copy_from_slice(&both.to_le_bytes());
                }
                Width::Fat16 => {
                    bytes[2 * *from as usize..][..2].copy_from_slice(&(*to as u16).to_le_bytes());
                }
                _ => bytes[4 * *from as usize..][..4].copy_from_slice(&to.to_le_bytes()),
            }
        }
        (0..60).for_each(|i| bytes.extend([i + 2; 512]));
        let disk = Arc::new(MemStorage::new("disk", bytes));
        Arc::new(Clusters {
            source: Source::new(disk, "disk", &Blocks::new(1 << 20)),
            findings: Findings::default(),
            table_at: 0,
            width,
            size: 512,
            heap_at: 1024,
            count: 60,
        })
    }

    fn opened(clusters: &Arc<Clusters>, chain: Chain, size: u64, valid: u64) -> File {
        File { clusters: clusters.clone(), chain, size, valid }
    }

    #[test]
    fn chains_are_followed_in_tables_of_all_widths() {
        for (width, end) in [
            (Width::Fat12, 0xfff),
            (Width::Fat16, 0xfff8),
            (Width::Fat32, 0xffff_ffff),
            (Width::Exfat, 0xffff_ffff),
        ] {
            let clusters = made(width, &[(5, 6), (6, 9), (9, 8), (8, end)]);
            let chain = Chain::of_file(&clusters, 5, 1800).unwrap();
            let file = opened(&clusters, chain, 1800, 1800);
            let mut buf = [0; 4000];
            assert_eq!(file.read_at(&mut buf, 0).unwrap(), 1800);
            assert_eq!([0, 511, 512, 1024, 1536, 1799].map(|i| buf[i]), [5, 5, 6, 9, 8, 8]);
            assert_eq!(file.read_at(&mut buf, 1799).unwrap(), 1);
            // Longer than its chain: what is there is read, then it fails.
            let file = opened(&clusters, Chain::of_file(&clusters, 5, 3000).unwrap(), 3000, 3000);
            assert_eq!(file.read_at(&mut buf, 0).unwrap(), 2048);
            assert_eq!(file.read_at(&mut buf, 2048).unwrap_err().kind(), Kind::Corrupt);
            assert!(
                Chain::of_folder(&clusters, 5, 4)
                    .unwrap()
                    .place(&clusters, 2048)
                    .unwrap()
                    .is_none()
            );
            assert!(Chain::of_folder(&clusters, 5, 3).unwrap().place(&clusters, 2048).is_err());
            let circle = made(width, &[(5, 6), (6, 9), (9, 6)]);
            assert_eq!(Chain::of_file(&circle, 5, 9000).err().unwrap().kind(), Kind::Corrupt);
            assert!(Chain::of_folder(&circle, 5, 100).is_err());
        }
    }

    #[test]
    fn what_was_not_written_reads_as_zeros() {
        let clusters = made(Width::Exfat, &[]);
        let chain = Chain::contiguous(&clusters, 7, 2000).unwrap();
        let file = opened(&clusters, chain, 2000, 600);
        let mut buf = [9; 2000];
        assert_eq!(file.read_at(&mut buf, 0).unwrap(), 2000);
        assert_eq!([511, 512, 599, 600, 1999].map(|i| buf[i]), [7, 8, 8, 0, 0]);
        assert_eq!(file.stretch(5).unwrap(), Some(Stretch { end: 600, hole: false }));
        assert_eq!(file.stretch(600).unwrap(), Some(Stretch { end: 2000, hole: true }));
        assert_eq!(file.stretch(2000).unwrap(), None);
        assert!(Chain::contiguous(&clusters, 61, 513).is_err());
        assert!(Chain::contiguous(&clusters, 0, 1).is_err());
        assert!(Chain::contiguous(&clusters, 2, u64::MAX).is_err());
    }
}
