//! The data clusters.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use super::compress::Compressor;
use super::tables::{Entry, Tables};
use super::{Compression, Preallocation, Qcow2Options};
use crate::error::{Error, Kind, Result};
use crate::image::Source;
use crate::job::{Work, pool};
use crate::restore::clone::Cloner;
use crate::restore::plan::{Chunk, Plan, extents};
use crate::restore::raw::is_zero;
use crate::restore::source::Reader;
use crate::restore::{Options, Reflink, Summary, Temp, target_error};
use crate::storage::ReadAt;

/// Bytes that are read at once, and compressed bytes that are written at once (at least; a
/// cluster may be larger).
const BUFFER: u64 = 256 << 10;

/// Writes the file.
pub(super) fn write(
    reader: &Reader,
    plan: &Plan,
    temp: &Temp,
    qcow2: &Qcow2Options,
    options: &Options,
    work: &Work,
) -> Result<Summary> {
    let (out, path) = (temp.file(), temp.path());
    let prealloc = qcow2.preallocation != Preallocation::Off;
    let chunks = if prealloc { plan.all_chunks()? } else { plan.chunks.clone() };
    let can_clone = qcow2.compression == Compression::None && !prealloc;
    let reflink = if can_clone { options.reflink } else { Reflink::Never };
    let writer = Writer {
        reader,
        out,
        path,
        tables: Tables::new(out, path, qcow2, plan.size, &chunks),
        cloner: Cloner::new(out, reflink),
        cluster: u64::from(qcow2.cluster_size),
        preallocation: qcow2.preallocation,
        work,
        copied: AtomicU64::new(0),
        cloned: AtomicU64::new(0),
    };
    let state = || WorkerState::new(qcow2);
    pool::run(chunks.len(), work, state, |state, i| writer.chunk(&chunks[i], state))?;
    writer.tables.finish()?;
    if qcow2.preallocation == Preallocation::Falloc {
        reserve(out, path)?;
    }
    let (copied, cloned) =
        (writer.copied.load(Ordering::Relaxed), writer.cloned.load(Ordering::Relaxed));
    writer.cloner.check_wanted(copied)?;
    let holes = plan.size.saturating_sub(copied).saturating_sub(cloned);
    Ok(Summary { copied, cloned, holes, ..Summary::default() })
}

/// Sets disk space aside for the whole file; what was written stays.
fn reserve(out: &File, path: &Path) -> Result<()> {
    use std::os::fd::AsRawFd;
    let failed = |e| target_error(e, "cannot preallocate the file", path);
    let len = out.metadata().map_err(failed)?.len();
    let len = libc::off_t::try_from(len).map_err(|_| pool::too_large())?;
    // SAFETY: fallocate on an open descriptor with plain integers.
    match unsafe { libc::fallocate(out.as_raw_fd(), 0, 0, len) } {
        0 => Ok(()),
        _ => Err(failed(std::io::Error::last_os_error())),
    }
}

/// What one worker keeps.
struct WorkerState {
    buf: Vec<u8>,
    compressor: Result<Compressor, String>,
    /// One compressed cluster.
    packed: Vec<u8>,
    /// Compressed clusters that wait for a place: guest cluster, start, length in `slab`.
    waiting: Vec<(u64, u64, u64)>,
    slab: Vec<u8>,
    entries: Vec<Entry>,
}

impl WorkerState {
    fn new(q: &Qcow2Options) -> Self {
        let cluster = q.cluster_size as usize;
        WorkerState {
            buf: vec![0; cluster.max(BUFFER as usize)],
            compressor: Compressor::new(q.compression),
            // One byte less than a cluster, or compressing it would be of no use.
            packed: vec![0; cluster - 1],
            waiting: Vec::new(),
            slab: Vec::new(),
            entries: Vec::new(),
        }
    }
}

struct Writer<'a> {
    reader: &'a Reader<'a>,
    out: &'a File,
    path: &'a Path,
    tables: Tables<'a>,
    cloner: Cloner,
    cluster: u64,
    preallocation: Preallocation,
    work: &'a Work<'a>,
    copied: AtomicU64,
    cloned: AtomicU64,
}

impl Writer<'_> {
    fn chunk(&self, chunk: &Chunk, state: &mut WorkerState) -> Result<()> {
        state.entries.clear();
        // Guest clusters from `run.start` to `run.end` hold something and are not placed yet.
        let mut run = chunk.start / self.cluster..chunk.start / self.cluster;
        for e in extents(self.reader.image, chunk.range())?.as_slice() {
            let (first, end) = (e.start / self.cluster, e.end().div_ceil(self.cluster));
            match e.content {
                Source::Unallocated | Source::Zero { .. } => {}
                Source::Bad { .. } if self.reader.gives_up(e) => self.work.did(e.len)?,
                Source::Data { layer, file, host } => {
                    let whole = e.start.div_ceil(self.cluster)..e.end() / self.cluster;
                    let from = host + (whole.start * self.cluster).saturating_sub(e.start);
                    if self.clone_clusters(layer, file, from, &whole, state)? {
                        run = self.extend(run, first..whole.start, state)?;
                        self.copy(run, state)?;
                        run = whole.end..whole.end.max(end);
                    } else {
                        run = self.extend(run, first..end, state)?;
                    }
                }
                Source::Compressed { .. } | Source::Bad { .. } => {
                    run = self.extend(run, first..end, state)?;
                }
            }
        }
        self.copy(run, state)?;
        self.flush(state)?;
        if self.preallocation != Preallocation::Off {
            self.fill_up(chunk, state)?;
        }
        self.tables.place(chunk, &state.entries)
    }

    /// Adds clusters to the run, or begins a new one if there is a gap.
    fn extend(
        &self,
        run: std::ops::Range<u64>,
        more: std::ops::Range<u64>,
        state: &mut WorkerState,
    ) -> Result<std::ops::Range<u64>> {
        if more.start <= run.end {
            return Ok(run.start..run.end.max(more.end));
        }
        self.copy(run, state)?;
        Ok(more)
    }

    /// Clones whole clusters of one file, if they lie at block borders there. Cloned clusters are
    /// entered at once: an extent's clusters are in no run yet but for a first, partial one.
    fn clone_clusters(
        &self,
        layer: u16,
        file: u8,
        from: u64,
        clusters: &std::ops::Range<u64>,
        state: &mut WorkerState,
    ) -> Result<bool> {
        if clusters.is_empty() || !self.cloner.is_on() {
            return Ok(false);
        }
        let count = clusters.end - clusters.start;
        let len = count * self.cluster;
        // The target's clusters start at multiples of the cluster size.
        if self.cloner.part(from, 0, len) != Some(0..len) {
            return Ok(false);
        }
        let Some(source) = self.reader.image.source_file(layer, file)? else { return Ok(false) };
        let host = self.tables.allocate(count)?;
        let done = self
            .cloner
            .clone(&*source.file()?, from, self.out, host, len)
            .map_err(|e| e.at_path(self.path).at_offset(host))?;
        if !done {
            // These host clusters stay empty and unused: they only count as such.
            (0..count).for_each(|i| self.tables.share(host + i * self.cluster, 0));
            return Ok(false);
        }
        source.check_unchanged()?;
        let entry = |i| (clusters.start + i, Tables::plain(host + i * self.cluster));
        state.entries.extend((0..count).map(entry));
        self.cloned.fetch_add(len, Ordering::Relaxed);
        self.work.did(len)?;
        Ok(true)
    }

    /// Reads and places guest clusters.
    fn copy(&self, clusters: std::ops::Range<u64>, state: &mut WorkerState) -> Result<()> {
        let at_once = (state.buf.len() as u64 / self.cluster).max(1);
        let mut buf = std::mem::take(&mut state.buf);
        let mut at = clusters.start;
        let mut result = Ok(());
        while at < clusters.end && result.is_ok() {
            let count = at_once.min(clusters.end - at);
            result = self.copy_part(at, count, &mut buf, state);
            at += count;
        }
        state.buf = buf;
        result
    }

    fn copy_part(
        &self,
        first: u64,
        count: u64,
        buf: &mut [u8],
        state: &mut WorkerState,
    ) -> Result<()> {
        let start = first * self.cluster;
        let len = (count * self.cluster).min(self.reader.image.size() - start) as usize;
        let whole = (count * self.cluster) as usize;
        self.reader.read(&mut buf[..len], start)?;
        // What lies beyond the disk's end in the last cluster.
        buf[len..whole].fill(0);
        self.work.did(len as u64)?;
        let clusters: Vec<&[u8]> = buf[..whole].chunks_exact(self.cluster as usize).collect();
        let mut plain = Vec::new();
        for (index, bytes) in (first..).zip(clusters) {
            if is_zero(bytes) {
                continue;
            }
            if !self.pack(index, bytes, state)? {
                plain.push((index, bytes));
            }
        }
        self.write_plain(&plain, state)
    }

    /// Compresses a cluster and puts it into the slab; `false` if it is not to be compressed.
    fn pack(&self, index: u64, bytes: &[u8], state: &mut WorkerState) -> Result<bool> {
        let compressor = state.compressor.as_mut().map_err(|e| {
            Error::new(Kind::Io, format!("cannot set up compression: {e}")).at_path(self.path)
        })?;
        let Some(len) = compressor.compress(bytes, &mut state.packed) else { return Ok(false) };
        state.waiting.push((index, state.slab.len() as u64, len as u64));
        state.slab.extend_from_slice(&state.packed[..len]);
        if state.slab.len() as u64 >= BUFFER {
            self.flush(state)?;
        }
        Ok(true)
    }

    /// Writes the compressed clusters that wait, tightly packed.
    fn flush(&self, state: &mut WorkerState) -> Result<()> {
        if state.slab.is_empty() {
            return Ok(());
        }
        let count = (state.slab.len() as u64).div_ceil(self.cluster);
        let at = self.tables.allocate(count)?;
        self.put(&state.slab, at)?;
        let mut refcounts = vec![0_u16; count as usize];
        for &(index, start, len) in &state.waiting {
            state.entries.push((index, self.tables.compressed(at + start, len)));
            self.copied.fetch_add(self.cluster, Ordering::Relaxed);
            for c in start / self.cluster..=(start + len - 1) / self.cluster {
                // At most one cluster's worth of clusters of at least a few bytes: fits.
                let n = &mut refcounts[c as usize];
                *n = n.saturating_add(1);
            }
        }
        for (i, n) in (0..).zip(refcounts) {
            self.tables.share(at + i * self.cluster, n);
        }
        state.waiting.clear();
        state.slab.clear();
        Ok(())
    }

    /// Writes plain clusters to host clusters in a row, neighbours in one call.
    fn write_plain(&self, plain: &[(u64, &[u8])], state: &mut WorkerState) -> Result<()> {
        if plain.is_empty() {
            return Ok(());
        }
        let mut at = self.tables.allocate(plain.len() as u64)?;
        for run in plain.chunk_by(|a, b| a.0 + 1 == b.0) {
            for (i, &(index, bytes)) in (0..).zip(run) {
                state.entries.push((index, Tables::plain(at + i * self.cluster)));
                self.put(bytes, at + i * self.cluster)?;
            }
            at += run.len() as u64 * self.cluster;
        }
        self.copied.fetch_add(plain.len() as u64 * self.cluster, Ordering::Relaxed);
        Ok(())
    }

    /// Gives every cluster of the chunk that has no place yet one that reads as zeros.
    fn fill_up(&self, chunk: &Chunk, state: &mut WorkerState) -> Result<()> {
        let all = chunk.start / self.cluster..(chunk.start + chunk.len).div_ceil(self.cluster);
        let placed: std::collections::HashSet<u64> = state.entries.iter().map(|e| e.0).collect();
        let missing: Vec<u64> = all.filter(|i| !placed.contains(i)).collect();
        if missing.is_empty() {
            return Ok(());
        }
        let at = self.tables.allocate(missing.len() as u64)?;
        if self.preallocation == Preallocation::Full {
            self.write_zeros(at, missing.len() as u64 * self.cluster)?;
        }
        let entry = |(i, index)| (index, Tables::plain(at + i * self.cluster));
        state.entries.extend((0..).zip(missing).map(entry));
        Ok(())
    }

    fn write_zeros(&self, at: u64, len: u64) -> Result<()> {
        let zeros = vec![0; BUFFER as usize];
        let mut done = 0;
        while done < len {
            let n = BUFFER.min(len - done);
            self.put(&zeros[..n as usize], at + done)?;
            done += n;
            self.work.check()?;
        }
        Ok(())
    }

    fn put(&self, bytes: &[u8], at: u64) -> Result<()> {
        self.out
            .write_all_at(bytes, at)
            .map_err(|e| target_error(e, "writing failed", self.path).at_offset(at))
    }
}
