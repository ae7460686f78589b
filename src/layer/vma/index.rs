//! Where the clusters of an archive are.
//!
//! Extents follow each other without an index, so one pass over their headers (512 bytes for up to
//! 3.7 MiB of data) finds them. What is kept is small: the place of each extent, and for each
//! device runs of clusters that are neighbours in one extent, sorted. Masks are read again when a
//! window is merged. Clusters that a running guest writes during the backup come out of order and
//! cost a run (12 bytes) each; the rest costs about 20 bytes per extent, 6 MB per TB.
//!
//! The pass is strict, as `vma extract` is: every cluster of every device occurs once, every header
//! has the right sum and identity, block counts agree with masks. An archive that breaks a rule is
//! refused as a whole, because it is not what its writer made. One that only ends too early is what
//! its writer made as far as it goes: clusters that are there whole are served, the others are bad.

use std::io;
use std::io::Read;
use std::ops::Range;

use super::header::{BLOCK, CLUSTER};
use super::header::{Device, Header, array, check_sum, corrupt, cut, reading};
use crate::error::{Error, Result};
use crate::layer::{LayerMap, Mapping};
use crate::storage::ReadAt;

/// Length of an extent's header.
const EXTENT_HEADER: u64 = 512;
/// Clusters described by one extent.
const SLOTS: usize = 59;

const CUT_IN_HEADER: &str = "the archive ends inside an extent's header";
const CUT_IN_DATA: &str = "the archive ends inside the data of an extent";

/// One checked extent header.
pub(super) struct Extent {
    /// Where its data begins in the archive.
    data: u64,
    blocks: u16,
    slots: [u64; SLOTS],
}

/// What one slot of an extent says.
#[derive(Clone, Copy)]
struct Slot(u64);

impl Slot {
    fn mask(self) -> u16 {
        (self.0 >> 48) as u16
    }
    /// Device number; 0 for an unused slot.
    fn device(self) -> u8 {
        (self.0 >> 32) as u8
    }
    fn cluster(self) -> u32 {
        self.0 as u32
    }
}

impl Extent {
    /// Reads and checks the extent header at `at`.
    pub(super) fn read(storage: &dyn ReadAt, header: &Header, at: u64) -> Result<Extent> {
        if storage.len().saturating_sub(at) < EXTENT_HEADER {
            return Err(cut(at, CUT_IN_HEADER));
        }
        let mut bytes = [0; EXTENT_HEADER as usize];
        storage.read_exact_at(&mut bytes, at)?;
        Extent::parse(bytes, header, at)
    }

    /// Checks the bytes of the extent header at `at`.
    fn parse(mut bytes: [u8; EXTENT_HEADER as usize], header: &Header, at: u64) -> Result<Extent> {
        if bytes[..4] != *b"VMAE" {
            return Err(corrupt(at, "there is no extent where one has to be"));
        }
        check_sum(&mut bytes, 24, at)?;
        if array::<16>(&bytes, 8) != header.uuid {
            return Err(corrupt(at + 8, "this extent belongs to another archive"));
        }
        if bytes[4..6] != [0, 0] {
            return Err(corrupt(at + 4, "a reserved field of an extent is not 0"));
        }
        let mut slots = [0; SLOTS];
        for (i, slot) in slots.iter_mut().enumerate() {
            *slot = u64::from_be_bytes(array(&bytes, 40 + i * 8));
        }
        let blocks = u16::from_be_bytes(array(&bytes, 6));
        Ok(Extent { data: at + EXTENT_HEADER, blocks, slots })
    }

    /// The used slots with their positions, and where the data of each begins.
    fn used(&self) -> impl Iterator<Item = (usize, Slot, u64)> + '_ {
        let mut at = self.data;
        let slots = self.slots.iter().map(|raw| Slot(*raw)).enumerate();
        slots.filter(|(_, slot)| slot.device() != 0).map(move |(i, slot)| {
            let here = at;
            at += u64::from(slot.mask().count_ones()) * BLOCK;
            (i, slot, here)
        })
    }
}

/// That the archive ends inside its first extent, if it does.
///
/// # Errors
/// `Truncated` if there is no extent; it is damaged, or cannot be read.
pub(super) fn first_cut(storage: &dyn ReadAt, header: &Header) -> Result<Option<Error>> {
    let extent = Extent::read(storage, header, header.len)?;
    let end = extent.data + u64::from(extent.blocks) * BLOCK;
    Ok((end > storage.len()).then(|| cut(storage.len(), CUT_IN_DATA)))
}

/// Reads the first extent, behind the header.
///
/// # Errors
/// `Truncated` if it is not there whole; it is damaged, or cannot be read.
pub(super) fn skip_first(from: &mut dyn Read, header: &Header) -> Result<()> {
    let at = header.len;
    let mut bytes = [0; EXTENT_HEADER as usize];
    from.read_exact(&mut bytes).map_err(|e| ended(e, at, CUT_IN_HEADER))?;
    let extent = Extent::parse(bytes, header, at)?;
    // More than its slots have is told when it is read.
    let blocks = extent.blocks.min(SLOTS as u16 * 16);
    let len = u64::from(blocks) * BLOCK;
    let read = io::copy(&mut from.take(len), &mut io::sink());
    let read = read.map_err(|e| ended(e, extent.data, CUT_IN_DATA))?;
    if read < len { Err(cut(extent.data + read, CUT_IN_DATA)) } else { Ok(()) }
}

/// Why what a compressed archive unpacks to ends.
fn ended(e: io::Error, at: u64, what: &'static str) -> Error {
    match e.kind() {
        io::ErrorKind::UnexpectedEof => cut(at, what),
        _ => reading(e),
    }
}

/// Neighbouring clusters in neighbouring slots of one extent.
#[derive(Debug, Clone, Copy)]
struct Run {
    cluster: u32,
    extent: u32,
    slot: u8,
    count: u8,
}

impl Run {
    fn end(&self) -> u64 {
        u64::from(self.cluster) + u64::from(self.count)
    }
}

/// The places of all clusters.
pub(super) struct Index {
    /// Where each extent's header is.
    extents: Vec<u64>,
    /// For each device, in the header's order, its runs, ascending.
    runs: Vec<Vec<Run>>,
    /// Where the archive ends too early, and in what.
    cut: Option<(u64, &'static str)>,
}

impl Index {
    /// Reads all extent headers.
    ///
    /// # Errors
    /// The archive breaks a rule of the format, or cannot be read; without the file's name.
    pub(super) fn build(storage: &dyn ReadAt, header: &Header) -> Result<Index> {
        let runs = vec![Vec::new(); header.devices.len()];
        let mut index = Index { extents: Vec::new(), runs, cut: None };
        let mut used = vec![0; header.devices.len()];
        let (mut at, end) = (header.len, storage.len());
        while at < end {
            if end - at < EXTENT_HEADER {
                index.cut = Some((at, CUT_IN_HEADER));
                break;
            }
            let extent = Extent::read(storage, header, at)?;
            index.add(header, &extent, at, end, &mut used)?;
            at = extent.data + u64::from(extent.blocks) * BLOCK;
            if at > end {
                index.cut = Some((end, CUT_IN_DATA));
            }
        }
        for (device, runs) in header.devices.iter().zip(&mut index.runs) {
            if !check_unique(device, runs)? {
                index.cut.get_or_insert((end, "the archive ends before its last extent"));
            }
            runs.shrink_to_fit();
        }
        index.extents.shrink_to_fit();
        Ok(index)
    }

    /// Takes one extent in; `used` counts the clusters of each device so far. More than a device
    /// has cannot all be different: seen at once, or a hostile archive would fill the memory.
    /// What lies past `end`, that of the archive, is not there.
    fn add(
        &mut self,
        header: &Header,
        extent: &Extent,
        at: u64,
        end: u64,
        used: &mut [u64],
    ) -> Result<()> {
        let number = u32::try_from(self.extents.len())
            .map_err(|_| corrupt(at, "an archive cannot have so many extents"))?;
        self.extents.push(at);
        let mut blocks = 0;
        for (i, slot, data) in extent.used() {
            let stored = slot.mask().count_ones();
            blocks += stored;
            let Ok(d) = header.devices.binary_search_by_key(&slot.device(), |d| d.id) else {
                let what = format!("a cluster of device {}, which does not exist", slot.device());
                return Err(corrupt(at, what));
            };
            let device = &header.devices[d];
            check_slot(device, slot, at)?;
            used[d] += 1;
            if used[d] > device.clusters() {
                return Err(corrupt(
                    at,
                    format!("a cluster of {} is in the archive twice", device.name),
                ));
            }
            if stored > 0 && data + u64::from(stored) * BLOCK > end {
                continue;
            }
            let run = Run { cluster: slot.cluster(), extent: number, slot: i as u8, count: 1 };
            match self.runs[d].last_mut() {
                Some(last) if continues(last, &run) => last.count += 1,
                _ => self.runs[d].push(run),
            }
        }
        if blocks != u32::from(extent.blocks) {
            let what = format!("an extent has {} blocks, its masks {blocks}", extent.blocks);
            return Err(corrupt(at + 6, what));
        }
        Ok(())
    }

    /// Why there are clusters that are not there, if there are.
    pub(super) fn cut(&self) -> Option<Error> {
        self.cut.map(|(at, what)| cut(at, what))
    }

    /// Whether any cluster is there of the device at `position` in the header.
    pub(super) fn has_any(&self, position: usize) -> bool {
        !self.runs[position].is_empty()
    }

    /// Appends what the archive says about `range` of the device at `position` in the header.
    ///
    /// # Errors
    /// An extent header cannot be read any more; what was appended so far stays.
    pub(super) fn map(
        &self,
        storage: &dyn ReadAt,
        header: &Header,
        position: usize,
        range: Range<u64>,
        map: &mut LayerMap,
    ) -> Result<()> {
        let runs = &self.runs[position];
        let first = runs.partition_point(|r| r.end() <= range.start / CLUSTER);
        let mut held: Option<(u32, Extent)> = None;
        for run in &runs[first..] {
            if u64::from(run.cluster) * CLUSTER >= range.end {
                break;
            }
            map.check_room(storage.name())?;
            let extent = match &held {
                Some((number, extent)) if *number == run.extent => extent,
                _ => {
                    let at = self.extents[run.extent as usize];
                    &held.insert((run.extent, Extent::read(storage, header, at)?)).1
                }
            };
            let from = (u64::from(run.cluster) * CLUSTER).max(range.start);
            self.push_gap(map, from, storage);
            push_run(map, extent, run, &range);
        }
        self.push_gap(map, range.end, storage);
        Ok(())
    }
}

impl Index {
    /// Appends what is not there before `to`.
    fn push_gap(&self, map: &mut LayerMap, to: u64, storage: &dyn ReadAt) {
        let len = to.saturating_sub(map.extents.end());
        if let Some(error) = self.cut().filter(|_| len > 0) {
            map.push_bad(len, &error, storage.name());
        }
    }
}

fn check_slot(device: &Device, slot: Slot, at: u64) -> Result<()> {
    let start = u64::from(slot.cluster()) * CLUSTER;
    // The last block stored may reach past the end, but it must not begin there.
    let blocks = u64::from(u16::BITS - slot.mask().leading_zeros());
    let last = start + blocks.saturating_sub(1) * BLOCK;
    if start >= device.size || last >= device.size {
        let what = format!("cluster {} is past the end of {}", slot.cluster(), device.name);
        return Err(corrupt(at, what));
    }
    Ok(())
}

fn continues(last: &Run, next: &Run) -> bool {
    last.extent == next.extent
        && last.end() == u64::from(next.cluster)
        && last.slot + last.count == next.slot
}

/// No cluster twice; of a RAM state they are in order. Whether all are there; of a RAM state a
/// beginning will do.
fn check_unique(device: &Device, runs: &mut [Run]) -> Result<bool> {
    if !device.is_state() {
        runs.sort_unstable_by_key(|r| r.cluster);
    }
    let (mut next, mut complete) = (0, true);
    for run in &*runs {
        let cluster = u64::from(run.cluster);
        if cluster < next {
            return Err(corrupt(
                0,
                format!("cluster {cluster} of {} is in the archive twice", device.name),
            ));
        }
        if cluster > next && device.is_state() {
            return Err(cut(0, format!("cluster {next} of {} is missing", device.name)));
        }
        complete &= cluster == next;
        next = run.end();
    }
    Ok(device.is_state() || complete && next >= device.clusters())
}

/// Appends the part of `run` that is in `range`.
fn push_run(map: &mut LayerMap, extent: &Extent, run: &Run, range: &Range<u64>) {
    let slots = usize::from(run.slot)..usize::from(run.slot) + usize::from(run.count);
    for (_, slot, data) in extent.used().filter(|(i, ..)| slots.contains(i)) {
        let start = u64::from(slot.cluster()) * CLUSTER;
        let part = range.start.max(start)..range.end.min(start + CLUSTER);
        if part.start < part.end {
            push_cluster(map, slot.mask(), start, data, part);
        }
    }
}

fn push_cluster(map: &mut LayerMap, mask: u16, start: u64, data: u64, part: Range<u64>) {
    if mask == 0 {
        map.extents.push(part.end - part.start, Mapping::Zero);
        return;
    }
    let mut at = part.start;
    while at < part.end {
        let block = (at - start) / BLOCK;
        let stop = part.end.min(start + (block + 1) * BLOCK);
        let stored_before = u64::from((mask & ((1u16 << block) - 1)).count_ones());
        let content = if mask >> block & 1 == 0 {
            Mapping::Zero
        } else {
            let skip = (at - start) % BLOCK;
            Mapping::Data { file: 0, host: data + stored_before * BLOCK + skip }
        };
        map.extents.push(stop - at, content);
        at = stop;
    }
}
