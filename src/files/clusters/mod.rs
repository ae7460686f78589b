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
        result.map_err(|e| self.findings.failed(&self.source, e))
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
