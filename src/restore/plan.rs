//! The plan: what a point consists of and which parts of the disk have to be written.
//!
//! A list of all extents of a large disk would take gigabytes, so the plan keeps a figure per
//! chunk; the extents themselves are in the image's cached windows and are asked for again when
//! the chunk is executed.

use std::sync::Mutex;

use crate::error::{Error, Finding, Kind, Result};
use crate::extent::ExtentList;
use crate::image::{Image, MergedExtent, Source};
use crate::job::{Work, pool};

/// Bytes of the disk that one job deals with; the same as a window of the image.
pub(crate) const CHUNK: u64 = 64 << 20;
/// The largest disk that is gone through whole, holes and all: no device is larger, and a list of its
/// chunks still fits into memory.
pub(crate) const MAX_WHOLE: u64 = 1 << 50;

/// A part of the disk that holds something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub(crate) struct Chunk {
    /// First guest byte.
    pub start: u64,
    /// Length in bytes, never 0.
    pub len: u64,
    /// Bytes in it that are not holes.
    pub data: u64,
}

impl Chunk {
    /// The guest bytes it covers.
    pub(crate) fn range(&self) -> std::ops::Range<u64> {
        self.start..self.start + self.len
    }
}

/// What the disk consists of, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub(crate) struct Totals {
    /// Plain, compressed and bad together: what is not a hole.
    pub data: u64,
    /// Of these, what has to be decompressed.
    pub compressed: u64,
    /// Of these, what cannot be read.
    pub bad: u64,
    /// What reads as zeros because nobody has anything there.
    pub holes: u64,
    /// How many extents there are.
    pub extents: u64,
}

impl Totals {
    fn count(&mut self, e: &MergedExtent) {
        self.extents += 1;
        match e.content {
            Source::Unallocated | Source::Zero { .. } => self.holes += e.len,
            Source::Data { .. } => self.data += e.len,
            Source::Compressed { .. } => {
                self.data += e.len;
                self.compressed += e.len;
            }
            Source::Bad { .. } => {
                self.data += e.len;
                self.bad += e.len;
            }
        }
    }

    fn add(&mut self, other: &Totals) {
        self.data += other.data;
        self.compressed += other.compressed;
        self.bad += other.bad;
        self.holes += other.holes;
        self.extents += other.extents;
    }
}

/// What a restore is going to do.
#[derive(Debug, Clone, serde::Serialize)]
pub(crate) struct Plan {
    /// Size in bytes of the virtual disk.
    pub size: u64,
    /// Number of layers that are read.
    pub depth: usize,
    /// The figures.
    pub totals: Totals,
    /// The chunks that hold data, ascending.
    pub chunks: Vec<Chunk>,
    /// What is wrong with the files, as far as their tables show it.
    pub findings: Vec<Finding>,
}

impl Plan {
    /// Folds the whole disk and says what there is to do.
    ///
    /// # Errors
    /// A layer cannot be opened or changed meanwhile; `Interrupted`. A bad range is no error here:
    /// see [`Plan::check_readable`].
    pub(crate) fn new(image: &Image, work: &Work) -> Result<Self> {
        let starts = starts(image.size(), work, |at| image.next_data(at))?;
        let found = Mutex::new((Totals::default(), Vec::new()));
        pool::run(
            starts.len(),
            work,
            || (),
            |(), i| {
                let start = starts[i];
                let len = CHUNK.min(image.size() - start);
                let extents = extents(image, start..start + len)?;
                let mut totals = Totals::default();
                extents.as_slice().iter().for_each(|e| totals.count(e));
                let mut found = found.lock().unwrap_or_else(|e| e.into_inner());
                found.0.add(&totals);
                if totals.data > 0 {
                    found.1.push(Chunk { start, len, data: totals.data });
                }
                Ok(())
            },
        )?;
        let (mut totals, mut chunks) = found.into_inner().unwrap_or_else(|e| e.into_inner());
        // With what was skipped over.
        totals.holes = image.size() - totals.data;
        chunks.sort_unstable_by_key(|c| c.start);
        let depth = image.depth();
        Ok(Plan { size: image.size(), depth, totals, chunks, findings: image.findings() })
    }

    /// All chunks of the disk, also those that hold nothing: for targets whose every byte has to be
    /// gone through, which therefore are not larger than a device can be.
    ///
    /// # Errors
    /// `Unsupported` for a disk of more than 1 PiB.
    pub(crate) fn all_chunks(&self) -> Result<Vec<Chunk>> {
        if self.size > MAX_WHOLE {
            return Err(pool::too_large());
        }
        Ok((0..self.size.div_ceil(CHUNK)).map(|i| self.chunk_at(i * CHUNK)).collect())
    }

    /// The chunk at `start`, a multiple of [`CHUNK`], which may hold nothing.
    fn chunk_at(&self, start: u64) -> Chunk {
        match self.chunks.binary_search_by_key(&start, |c: &Chunk| c.start) {
            Ok(i) => self.chunks[i],
            Err(_) => Chunk { start, len: CHUNK.min(self.size - start), data: 0 },
        }
    }

    /// The chunks that hold data here or in `other`, ascending.
    ///
    /// # Errors
    /// What `other` says when asked where its next data is.
    pub(crate) fn chunks_with(
        &self,
        work: &Work,
        other: impl Fn(u64) -> Result<u64>,
    ) -> Result<Vec<Chunk>> {
        let mut starts = starts(self.size, work, other)?;
        starts.extend(self.chunks.iter().map(|c| c.start));
        starts.sort_unstable();
        starts.dedup();
        Ok(starts.into_iter().map(|s| self.chunk_at(s)).collect())
    }

    /// Fails if parts of the disk cannot be read and that was not allowed.
    ///
    /// # Errors
    /// The first finding, as an error.
    pub(crate) fn check_readable(&self, salvage: bool) -> Result<()> {
        if salvage || self.totals.bad == 0 {
            return Ok(());
        }
        let text = format!("{} bytes of this point cannot be read", self.totals.bad);
        let mut error = Error::new(Kind::Corrupt, text);
        if let Some(f) = self.findings.first() {
            let text = format!("{}: {}", error.message(), f.message);
            error = Error::new(f.kind, text).at_path(&f.path);
            if let Some(o) = f.offset {
                error = error.at_offset(o);
            }
        }
        Err(error.remedy(
            "restore an older point, or use --salvage: it writes zeros where nothing can be read",
        ))
    }
}

/// The starts of the chunks that may hold something; `next` says where the next data may be.
fn starts(size: u64, work: &Work, next: impl Fn(u64) -> Result<u64>) -> Result<Vec<u64>> {
    let mut starts = Vec::new();
    let mut at = next(0)?;
    while at < size {
        work.check()?;
        let start = at - at % CHUNK;
        starts.push(start);
        let Some(end) = start.checked_add(CHUNK).filter(|e| *e < size) else { break };
        at = next(end)?.max(end);
    }
    Ok(starts)
}

/// The extents of `range`, joined across window borders.
///
/// # Errors
/// A layer cannot be opened or changed.
pub(crate) fn extents(image: &Image, range: std::ops::Range<u64>) -> Result<ExtentList<Source>> {
    let mut list = ExtentList::new(range.start);
    image.for_each_extent(range, |e| {
        list.push(e.len, e.content);
        true
    })?;
    Ok(list)
}
