//! An overlay as a qcow2 image over its point.
//!
//! Clusters of 128 KiB with subclusters of 4 KiB, as large as the overlay's blocks: what was written is data, what was
//! discarded reads as zeros, and all else is asked of the backing file. It is written from the beginning to the end,
//! one L2 table after the other; the header, without which it is nothing, comes last.
//!
//! Format: docs/interop/qcow2.rst of QEMU, "Extended L2 entries".

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::{Temp, target_error};
use crate::error::{Error, Kind, Result};
use crate::layer::qcow2::create::{self, NewImage};
use crate::layer::qcow2::header::Compression;
use crate::overlay::{BLOCK, Overlay, State};

/// Subclusters of a cluster.
const PARTS: u64 = 32;
/// Bytes of a cluster.
const CLUSTER: u64 = PARTS * BLOCK;
/// Entries of an L2 table: each has 16 bytes.
const ENTRIES: u64 = CLUSTER / 16;
/// Blocks that an L2 table is for.
const SPAN: u64 = ENTRIES * PARTS;
/// QCOW_OFLAG_COPIED: exactly one reference, so the guest may write in place.
const COPIED: u64 = 1 << 63;
/// The largest L1 table that QEMU opens, in entries (32 MiB).
const MAX_L1: u64 = 4 << 20;
/// Bytes that are copied at a time.
const BUFFER: usize = 1 << 20;

/// How much was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exported {
    /// Bytes of data.
    pub data: u64,
    /// Bytes that were made zeros.
    pub zeros: u64,
}

/// Writes `overlay`, of a disk of `size` bytes, to the new file `target`, over the raw image `backing`.
///
/// # Errors
/// `Exists` if there is a target and `force` is not set; `Unsupported` for more than qcow2 has; the overlay cannot be
/// read; what the operating system said.
pub(crate) fn export(
    overlay: &Overlay,
    size: u64,
    backing: &str,
    target: &Path,
    force: bool,
) -> Result<Exported> {
    let l1_entries = size.div_ceil(SPAN * BLOCK).max(1);
    if l1_entries > MAX_L1 {
        return Err(Error::new(Kind::Unsupported, "the disk is too large for such an image"));
    }
    let temp = Temp::create(target, force)?;
    let mut writer = Writer {
        overlay,
        size,
        out: temp.file(),
        path: temp.path(),
        next: CLUSTER,
        l1: vec![0; l1_entries as usize],
        done: Exported { data: 0, zeros: 0 },
        buf: vec![0; BUFFER],
    };
    writer.tables()?;
    writer.finish(backing)?;
    let done = writer.done;
    drop(writer);
    temp.publish()?;
    Ok(done)
}

struct Writer<'a> {
    overlay: &'a Overlay,
    size: u64,
    out: &'a File,
    path: &'a Path,
    /// Where the next cluster is.
    next: u64,
    l1: Vec<u64>,
    done: Exported,
    buf: Vec<u8>,
}

/// The two words of an L2 entry.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Entry {
    host: u64,
    data: u32,
    zero: u32,
}

impl Writer<'_> {
    /// Writes an L2 table for each stretch in which something was written.
    fn tables(&mut self) -> Result<()> {
        let mut at = 0;
        while at < self.size {
            match self.overlay.run(at, self.size) {
                (State::Untouched, next) => at = next,
                _ => {
                    let number = at / (SPAN * BLOCK);
                    self.table(number)?;
                    at = (number + 1) * SPAN * BLOCK;
                }
            }
        }
        Ok(())
    }

    fn table(&mut self, number: u64) -> Result<()> {
        let start = number * SPAN * BLOCK;
        let end = (start + SPAN * BLOCK).min(self.size);
        let mut entries = vec![Entry::default(); ENTRIES as usize];
        let mut at = start;
        while at < end {
            let (state, stop) = self.overlay.run(at, end);
            match state {
                State::Untouched => {}
                State::Zero => self.mark(&mut entries, start, at..stop),
                State::Data => self.copy(&mut entries, start, at..stop)?,
            }
            at = stop;
        }
        let place = self.take(1)?;
        let words = entries.iter().flat_map(|e| {
            let host = if e.host == 0 { 0 } else { e.host | COPIED };
            [host, u64::from(e.zero) << 32 | u64::from(e.data)]
        });
        let bytes: Vec<u8> = words.flat_map(u64::to_be_bytes).collect();
        self.put(&bytes, place)?;
        self.l1[number as usize] = place | COPIED;
        Ok(())
    }

    /// Enters what reads as zeros.
    fn mark(&mut self, entries: &mut [Entry], start: u64, range: Range<u64>) {
        self.done.zeros += range.end - range.start;
        for (cluster, parts) in clusters(start, &range) {
            entries[cluster].zero |= bits(parts);
        }
    }

    /// Copies and enters data.
    fn copy(&mut self, entries: &mut [Entry], start: u64, range: Range<u64>) -> Result<()> {
        self.done.data += range.end - range.start;
        for (cluster, parts) in clusters(start, &range) {
            if entries[cluster].host == 0 {
                entries[cluster].host = self.take(1)?;
            }
            entries[cluster].data |= bits(parts.clone());
            let guest = start + cluster as u64 * CLUSTER;
            let from = guest + parts.start * BLOCK;
            let len = (parts.end - parts.start) * BLOCK;
            let len = len.min(range.end - from) as usize;
            let mut buf = std::mem::take(&mut self.buf);
            let nothing = |_: &mut [u8], _: u64| Err(Error::new(Kind::Io, "the overlay changes"));
            let read = self.overlay.read_at(nothing, &mut buf[..len], from);
            let host = entries[cluster].host + parts.start * BLOCK;
            let done = read.and_then(|()| self.put(&buf[..len], host));
            self.buf = buf;
            done?;
        }
        Ok(())
    }

    /// Writes L1 table, refcounts and header, and gives the file its length.
    fn finish(&mut self, backing: &str) -> Result<()> {
        let l1: Vec<u8> = self.l1.iter().flat_map(|e| e.to_be_bytes()).collect();
        let l1_offset = self.take((l1.len() as u64).div_ceil(CLUSTER))?;
        self.put(&l1, l1_offset)?;
        let used = self.next / CLUSTER;
        let (blocks, table) = create::refcount_clusters(used, CLUSTER);
        let (blocks_at, table_at) = (self.take(blocks)?, self.take(table)?);
        let all = self.next / CLUSTER;
        // Each cluster is used once; the blocks are in a row, so they are filled as one.
        let counts = vec![1_u16.to_be_bytes(); 64 << 10];
        for first in (0..all).step_by(counts.len()) {
            let n = (all - first).min(counts.len() as u64) as usize;
            self.put(counts[..n].as_flattened(), blocks_at + first * 2)?;
        }
        let pointers = (0..blocks).map(|b| blocks_at + b * CLUSTER);
        let bytes: Vec<u8> = pointers.flat_map(u64::to_be_bytes).collect();
        self.put(&bytes, table_at)?;
        let sized = self.out.set_len(self.next);
        sized.map_err(|e| target_error(e, "cannot set the size", self.path))?;
        let image = NewImage {
            size: self.size,
            cluster_size: CLUSTER,
            extended_l2: true,
            lazy_refcounts: false,
            compression: Compression::Zlib,
        };
        let tables = create::Tables {
            l1_offset,
            l1_entries: self.l1.len() as u32,
            reftable_offset: table_at,
            reftable_clusters: table as u32,
        };
        self.put(&image.header_over(&tables, backing)?, 0)
    }

    /// Host clusters in a row: the offset of the first.
    fn take(&mut self, count: u64) -> Result<u64> {
        /// The largest refcount table that QEMU opens has 8 MiB: one for so many bytes of these clusters.
        const MOST: u64 = (8 << 20) / 8 * (CLUSTER / 2) * CLUSTER;
        let at = self.next;
        self.next += count * CLUSTER;
        match self.next <= MOST {
            true => Ok(at),
            false => Err(Error::new(Kind::Unsupported, "the file gets larger than QEMU opens")
                .at_path(self.path)),
        }
    }

    fn put(&self, bytes: &[u8], at: u64) -> Result<()> {
        let written = self.out.write_all_at(bytes, at);
        written.map_err(|e| target_error(e, "writing failed", self.path).at_offset(at))
    }
}

/// The clusters of a table that begins at `start`, and which of their subclusters `range` touches.
fn clusters(start: u64, range: &Range<u64>) -> impl Iterator<Item = (usize, Range<u64>)> + use<> {
    let blocks = (range.start - start) / BLOCK..(range.end - start).div_ceil(BLOCK);
    let all = blocks.start / PARTS..blocks.end.div_ceil(PARTS);
    all.map(move |cluster| {
        let first = cluster * PARTS;
        (cluster as usize, blocks.start.max(first) - first..blocks.end.min(first + PARTS) - first)
    })
}

fn bits(parts: Range<u64>) -> u32 {
    parts.fold(0, |bits, part| bits | 1 << part)
}
