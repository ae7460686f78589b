//! [`Overlay`]: what was written over one point.
//!
//! State: a sparse file, or a stretch of one, that has each block at its own offset, the map of which blocks those are,
//! and the locks of writers. A reader takes no lock and allocates nothing: it asks the map, and reads each stretch from the file or from
//! the point. A block's bytes are in the file before the map says so, and a block that was only partly written is filled
//! up from the point first: so a reader sees each block before or after a write.
//!
//! [`Overlay::sync`] writes the file to disk and then, of a kept overlay, those records of the map that were taken
//! before. After a failure there it is never said again that anything is on disk ([`super::file`]).

use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use super::budget::{Budget, Cost, Full};
use super::file::ScratchFile;
use super::holes;
use super::map::{BLOCK, Change, DirtyMap, State};
use super::map_file::MapFile;
use super::stripes::Stripes;
use crate::error::{Error, Kind, Result};
use crate::failpoint;
use crate::image::Image;
use crate::units::human_bytes;

/// Records of a map that are held in memory while the data before them is written to disk: 4 MiB at most.
const BATCH: usize = 4096;
/// Runs of the map that are looked at before a range is made zeros that may be so already.
const MOST_RUNS: usize = 64;

/// What reads the point below: fills a buffer from an offset.
pub(crate) trait Below: Fn(&mut [u8], u64) -> Result<()> {}
impl<F: Fn(&mut [u8], u64) -> Result<()>> Below for F {}

/// The writes over one point.
#[derive(Debug)]
pub(crate) struct Overlay {
    size: u64,
    map: DirtyMap,
    file: Arc<ScratchFile>,
    /// Where its own stretch of the file begins.
    base: u64,
    stripes: Stripes,
    budget: Arc<Budget>,
    /// Bytes that it takes of the budget, on disk and in memory.
    taken: AtomicU64,
    memory: AtomicU64,
    /// Blocks that have data.
    data: AtomicU64,
    /// Where the map is kept, if it is.
    map_file: Option<MapFile>,
    syncing: Mutex<()>,
    /// When it was last written to, in seconds since the epoch.
    modified: AtomicI64,
}

/// Where an overlay is: its file, from which offset on, and that of its map if it is kept.
pub(super) struct Files {
    pub data: Arc<ScratchFile>,
    pub base: u64,
    pub map: Option<ScratchFile>,
}

impl Overlay {
    /// An empty one, over a point of `size` bytes.
    ///
    /// # Errors
    /// `NoSpace` if there is no room for it; what the operating system said.
    pub(super) fn new(size: u64, files: Files, budget: &Arc<Budget>) -> Result<Self> {
        let overlay = Self::over(size, files, budget);
        overlay.take(DirtyMap::WEIGHT)?;
        overlay.map_file.as_ref().map_or(Ok(()), MapFile::begin)?;
        Ok(overlay)
    }

    /// One that was kept: reads its map.
    ///
    /// # Errors
    /// `Corrupt` or `Truncated` if that is not the whole map of this disk; what the operating system said.
    pub(super) fn resumed(size: u64, files: Files, budget: &Arc<Budget>) -> Result<Self> {
        let overlay = Self::over(size, files, budget);
        if let Some(map_file) = &overlay.map_file {
            map_file.load(&overlay.map)?;
        }
        overlay.drop_unmapped()?;
        let (data, weight) = overlay.map.weigh();
        let taken = Cost::of_data(data * BLOCK) + weight;
        budget.take_anyway(taken);
        overlay.add(taken);
        overlay.data.store(data, Ordering::SeqCst);
        let meta = overlay.file.with(|f| f.metadata());
        let meta = meta.map_err(|e| overlay.error(e, "cannot check"))?;
        let time = meta.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok());
        overlay.touch_at(time.map_or(0, |t| t.as_secs()));
        Ok(overlay)
    }

    fn over(size: u64, files: Files, budget: &Arc<Budget>) -> Self {
        let map = DirtyMap::new(size.div_ceil(BLOCK), files.map.is_some());
        let map_file = files.map.map(|file| MapFile::new(file, size, &map));
        Overlay {
            size,
            map,
            file: files.data,
            base: files.base,
            stripes: Stripes::default(),
            budget: budget.clone(),
            taken: AtomicU64::new(0),
            memory: AtomicU64::new(0),
            data: AtomicU64::new(0),
            map_file,
            syncing: Mutex::default(),
            modified: AtomicI64::new(0),
        }
    }

    /// Bytes that were written and are held here; a multiple of the block's size.
    pub(crate) fn data_bytes(&self) -> u64 {
        self.data.load(Ordering::SeqCst) * BLOCK
    }

    /// Whether nothing was ever written.
    pub(crate) fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// When it was last written to, in seconds since the epoch; `None` if it never was.
    pub(crate) fn modified(&self) -> Option<i64> {
        Some(self.modified.load(Ordering::Relaxed)).filter(|t| *t > 0)
    }

    /// Where its data is, for messages.
    pub(crate) fn path(&self) -> &Path {
        self.file.path()
    }

    /// Says that nobody needs what was written any more.
    pub(super) fn give_up(&self) {
        self.file.give_up();
        self.map_file.iter().for_each(MapFile::give_up);
    }

    /// The state of the byte at `at`, which is before `end`, and before which offset it is the same for certain.
    pub(crate) fn run(&self, at: u64, end: u64) -> (State, u64) {
        let (state, stop) = self.map.run(at / BLOCK, end.div_ceil(BLOCK));
        (state, stop.saturating_mul(BLOCK).min(end))
    }

    /// Fills `buf` with the bytes at `offset`, which are inside the disk; where nothing was written, by `below`.
    ///
    /// # Errors
    /// Those of `below`; the overlay cannot be read.
    pub(crate) fn read_at(&self, below: impl Below, buf: &mut [u8], offset: u64) -> Result<()> {
        let end = offset + buf.len() as u64;
        let (mut rest, mut at) = (buf, offset);
        while at < end {
            let (state, mut stop) = self.run(at, end);
            // Stretches are also cut where parts of the map meet.
            while stop < end
                && let (next, further) = self.run(stop, end)
                && next == state
            {
                stop = further;
            }
            let (part, tail) = rest.split_at_mut((stop - at) as usize);
            match state {
                State::Untouched => below(part, at)?,
                State::Zero => part.fill(0),
                State::Data => self.read_own(part, at)?,
            }
            (rest, at) = (tail, stop);
        }
        Ok(())
    }

    fn read_own(&self, part: &mut [u8], at: u64) -> Result<()> {
        // What is data was written: a file that ends before it was cut, which is an error.
        let read = self.file.read_exact_at(part, self.base + at);
        read.map_err(|e| self.error(e, "cannot read").at_offset(at))
    }

    /// Writes `data` at `offset`, inside the disk. Blocks that are written in part and are not here yet are
    /// filled up by `below`.
    ///
    /// # Errors
    /// `NoSpace` where the limit is reached, or the file system is full; those of `below`. Each block is as before
    /// then, or as it was to be.
    pub(crate) fn write(&self, below: impl Below, data: &[u8], offset: u64) -> Result<()> {
        let blocks = self.blocks(offset, data.len() as u64)?;
        if blocks.is_empty() {
            return Ok(());
        }
        let _held = self.stripes.lock(&blocks);
        self.write_held(&below, data, offset, blocks)
    }

    fn write_held(
        &self,
        below: &impl Below,
        data: &[u8],
        offset: u64,
        blocks: Range<u64>,
    ) -> Result<()> {
        let cost = self.map.cost_of_data(blocks.clone());
        self.take(cost)?;
        let room = self.map_file.as_ref().map_or(Ok(()), |m| m.reserve(blocks.clone(), false));
        if let Err(e) = room.and_then(|()| self.put(below, data, offset, &blocks)) {
            self.give(cost);
            return Err(e);
        }
        failpoint::step("overlay data");
        let change = self.map.set_data(blocks);
        self.data.fetch_add(change.added, Ordering::SeqCst);
        // Another writer may have made the same parts of the map.
        self.give(cost.less(Cost::of_data(change.added * BLOCK) + change.grown));
        self.touch();
        Ok(())
    }

    /// Writes to the file: whole blocks, or parts of blocks that it has.
    fn put(&self, below: &impl Below, data: &[u8], at: u64, blocks: &Range<u64>) -> Result<()> {
        let whole = blocks.start * BLOCK..(blocks.end * BLOCK).min(self.size);
        let end = at + data.len() as u64;
        let lacks = |block: u64| self.map.run(block, block + 1).0 != State::Data;
        let head = at > whole.start && lacks(blocks.start);
        let tail = end < whole.end && lacks(blocks.end - 1);
        if !head && !tail {
            return self.put_all(data, at);
        }
        let (from, to) = (if head { whole.start } else { at }, if tail { whole.end } else { end });
        let mut filled = vec![0; (to - from) as usize];
        if head {
            self.read_at(below, &mut filled[..(at - from) as usize], from)?;
        }
        if tail {
            self.read_at(below, &mut filled[(end - from) as usize..], end)?;
        }
        filled[(at - from) as usize..(end - from) as usize].copy_from_slice(data);
        self.put_all(&filled, from)
    }

    fn put_all(&self, data: &[u8], at: u64) -> Result<()> {
        failpoint::step("overlay write");
        let written = self.file.write_all_at(data, self.base + at);
        written.map_err(|e| self.error(e, "cannot write").at_offset(at))
    }

    /// As [`Overlay::zero`] over `image`. Where all of it is zeros already nothing is written down: or whoever discards
    /// what nobody uses would have the map grow.
    ///
    /// # Errors
    /// As [`Overlay::zero`].
    pub(crate) fn zero_over(&self, image: &Image, offset: u64, len: u64) -> Result<()> {
        let blocks = self.blocks(offset, len)?;
        // Whoever writes there meanwhile comes after this, block by block.
        if !blocks.is_empty() && self.is_zero(image, offset..offset + len) {
            self.touch();
            return Ok(());
        }
        self.zero(|buf, at| image.read_at(buf, at), offset, len)
    }

    /// Whether a range reads as zeros, as far as the map and that of the point say so without much ado.
    fn is_zero(&self, image: &Image, range: Range<u64>) -> bool {
        let mut at = range.start;
        for _ in 0..MOST_RUNS {
            let (state, end) = self.run(at, range.end);
            let is_zero = match state {
                State::Zero => true,
                State::Data => false,
                // What cannot be told is none: it can be made zeros all the same.
                State::Untouched => image.is_hole(at..end).unwrap_or(false),
            };
            if !is_zero || end >= range.end {
                return is_zero;
            }
            at = end;
        }
        false
    }

    /// Makes `len` bytes at `offset`, inside the disk, zeros, and gives their space back.
    ///
    /// # Errors
    /// As [`Overlay::write`]; but then nothing has changed, unless the file system takes what it had room for and does
    /// not write it.
    pub(crate) fn zero(&self, below: impl Below, offset: u64, len: u64) -> Result<()> {
        let touched = self.blocks(offset, len)?;
        if touched.is_empty() {
            return Ok(());
        }
        let _held = self.stripes.lock(&touched);
        let end = offset + len;
        let first = offset.div_ceil(BLOCK);
        let last = if end == self.size { touched.end } else { end / BLOCK };
        // Within one block, or over the border of two, there are no whole ones.
        let whole = first..last.max(first);
        let edges = self.edges(&below, offset..end, &whole)?;
        // All that may fail for want of room comes before the first change.
        let cost = self.map.cost_of_zero(whole.clone());
        let cost = edges.iter().fold(cost, |cost, edge| cost + self.map.cost_of_data(edge.block()));
        self.take(cost)?;
        let done = self.room_for_zeros(&edges, &whole).and_then(|()| self.put_edges(&edges));
        done.inspect_err(|_| self.give(cost))?;
        failpoint::step("overlay edges");
        let mut change = Change::default();
        edges.iter().for_each(|edge| change.add(self.map.set_data(edge.block())));
        change.add(self.map.set_zero(whole.clone()));
        self.data.fetch_add(change.added, Ordering::SeqCst);
        self.data.fetch_sub(change.removed, Ordering::SeqCst);
        // Another writer may have made the same parts of the map.
        self.give(cost.less(Cost::of_data(change.added * BLOCK) + change.grown));
        failpoint::step("overlay zero");
        self.touch();
        self.give_back(whole, change.removed);
        Ok(())
    }

    /// What has to be written to make the parts of blocks zeros that are in `range` and outside of the blocks `whole`.
    fn edges(
        &self,
        below: &impl Below,
        range: Range<u64>,
        whole: &Range<u64>,
    ) -> Result<Vec<Edge>> {
        let mut edges = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let block = at / BLOCK;
            if whole.contains(&block) {
                at = whole.end.saturating_mul(BLOCK).min(range.end);
                continue;
            }
            let end = range.end.min((block + 1) * BLOCK);
            match self.map.run(block, block + 1).0 {
                State::Zero => {}
                State::Data => edges.push(Edge { at, bytes: vec![0; (end - at) as usize] }),
                State::Untouched => {
                    let start = block * BLOCK;
                    let full = (start + BLOCK).min(self.size) - start;
                    let mut bytes = vec![0; full as usize];
                    self.read_at(below, &mut bytes[..(at - start) as usize], start)?;
                    self.read_at(below, &mut bytes[(end - start) as usize..], end)?;
                    edges.push(Edge { at: start, bytes });
                }
            }
            at = end;
        }
        Ok(edges)
    }

    fn room_for_zeros(&self, edges: &[Edge], whole: &Range<u64>) -> Result<()> {
        if let Some(map_file) = &self.map_file {
            edges.iter().try_for_each(|edge| map_file.reserve(edge.block(), false))?;
            map_file.reserve(whole.clone(), true)?;
        }
        edges.iter().try_for_each(|edge| {
            let bytes = self.base + edge.at..self.base + edge.at + edge.bytes.len() as u64;
            let room = self.file.change(|file| holes::reserve(file, bytes));
            room.map_err(|e| self.error(e, "no room in").at_offset(edge.at))
        })
    }

    fn put_edges(&self, edges: &[Edge]) -> Result<()> {
        edges.iter().try_for_each(|edge| self.put_all(&edge.bytes, edge.at))
    }

    /// Gives the space of blocks that are zeros now back, of which so many had data.
    fn give_back(&self, blocks: Range<u64>, had_data: u64) {
        if had_data == 0 {
            return;
        }
        // Of the last block all, though the disk may end in it: a file system gives back whole ones.
        let bytes = self.base + blocks.start * BLOCK..self.base + blocks.end * BLOCK;
        match self.file.change(|file| holes::punch(file, bytes)) {
            Ok(true) => self.give(Cost::of_data(had_data * BLOCK)),
            // They read as zeros all the same; their space is not had back.
            Ok(false) => {}
            Err(e) => log::debug!("{}", self.error(e, "cannot give space back to").report()),
        }
    }

    /// Has all that was written before survive a power cut, as far as the overlay itself does.
    ///
    /// # Errors
    /// Writing failed, now or at an earlier time: what is on disk is not known since.
    pub(crate) fn sync(&self) -> Result<()> {
        let _one = self.syncing.lock().unwrap_or_else(PoisonError::into_inner);
        let map = self.map_file.as_ref().map_or(Ok(()), MapFile::check);
        self.file.check().map_err(|e| self.error(e, "cannot write to disk")).and(map)?;
        while self.sync_batch()? == BATCH {}
        Ok(())
    }

    /// Writes the data to disk, and then some of the map; how many records.
    fn sync_batch(&self) -> Result<usize> {
        // As they are now: what is written to the file from here on may not be on disk when these are.
        let records = self.map.take_changed(BATCH);
        failpoint::step("overlay sync");
        self.file.sync(false).map_err(|e| self.error(e, "cannot write to disk"))?;
        failpoint::step("overlay synced");
        let Some(map_file) = self.map_file.as_ref().filter(|_| !records.is_empty()) else {
            return Ok(0);
        };
        for (i, record) in records.iter().enumerate() {
            if let Err(e) = map_file.write(record) {
                // No space, say: the next attempt may have more luck.
                records[i..].iter().for_each(|r| self.map.put_back(r));
                return Err(e);
            }
            failpoint::step("overlay map");
        }
        map_file.sync()?;
        failpoint::step("overlay map synced");
        Ok(records.len())
    }

    /// Gives back the space of what was written and, when the server ended, not in the map on disk yet.
    fn drop_unmapped(&self) -> Result<()> {
        let failed = |e| self.error(e, "cannot look for leftovers");
        let mut at = 0;
        let next = |at| self.file.with(|file| holes::next_data(file, at..self.size));
        while let Some(data) = next(at).map_err(failed)? {
            at = data.start;
            while at < data.end {
                let (state, end) = self.run(at, data.end);
                let whole = at.next_multiple_of(BLOCK)..end;
                if state != State::Data && !whole.is_empty() {
                    self.file.change(|file| holes::punch(file, whole)).map_err(failed)?;
                }
                at = end;
            }
        }
        Ok(())
    }

    /// The blocks that a stretch touches.
    fn blocks(&self, offset: u64, len: u64) -> Result<Range<u64>> {
        match offset.checked_add(len).filter(|end| *end <= self.size) {
            Some(end) if len > 0 => Ok(offset / BLOCK..end.div_ceil(BLOCK)),
            Some(_) => Ok(0..0),
            None => Err(Error::new(Kind::Usage, "writing past the end of the disk")),
        }
    }

    fn take(&self, cost: Cost) -> Result<()> {
        self.budget.take(cost).map_err(|full| self.refused(full))?;
        self.add(cost);
        Ok(())
    }

    fn add(&self, cost: Cost) {
        self.taken.fetch_add(cost.disk, Ordering::SeqCst);
        self.memory.fetch_add(cost.memory, Ordering::SeqCst);
    }

    fn give(&self, cost: Cost) {
        self.taken.fetch_sub(cost.disk, Ordering::SeqCst);
        self.memory.fetch_sub(cost.memory, Ordering::SeqCst);
        self.budget.give(cost);
    }

    fn refused(&self, full: Full) -> Error {
        let no_space = |most: u64, of: &str| {
            let most = human_bytes(most);
            let text = format!("no space left: all overlays together may take {most}{of}");
            Error::new(Kind::NoSpace, text).at_path(self.path())
        };
        if full == Full::Disk {
            return no_space(self.budget.limit(), "").remedy("raise --scratch-size");
        }
        let (most, _) = self.budget.memory();
        let error = no_space(most, " of memory for their maps").remedy(
            "what was written to already can be written again; where all of a large disk is to be, restore it instead",
        );
        // No limit that the user has set, and who writes sees no more than ENOSPC.
        if self.budget.tells_first() {
            log::warn!("{}", error.report());
        }
        error
    }

    fn touch(&self) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        self.touch_at(now.map_or(0, |t| t.as_secs()));
    }

    fn touch_at(&self, seconds: u64) {
        self.modified.store(i64::try_from(seconds).unwrap_or(0), Ordering::Relaxed);
    }

    fn error(&self, e: io::Error, what: &str) -> Error {
        Error::io(e, format!("{what} the overlay")).at_path(self.path())
    }

    /// Whether the space that it takes is had back when it goes: that of a stretch of a file is only where the file
    /// system can.
    fn goes_by_itself(&self) -> bool {
        let bytes = self.base..self.base + self.size.next_multiple_of(BLOCK);
        if self.map_file.is_some() || Arc::strong_count(&self.file) == 1 || bytes.is_empty() {
            return true;
        }
        matches!(self.file.change(|file| holes::punch(file, bytes)), Ok(true))
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        let disk = if self.goes_by_itself() { self.taken.load(Ordering::SeqCst) } else { 0 };
        self.budget.give(Cost { disk, memory: self.memory.load(Ordering::SeqCst) });
    }
}

/// A part of a block that is written to make it zeros: with the rest of the block, if that is not here yet.
struct Edge {
    at: u64,
    bytes: Vec<u8>,
}

impl Edge {
    fn block(&self) -> Range<u64> {
        let block = self.at / BLOCK;
        block..block + 1
    }
}

#[cfg(test)]
mod tests;
