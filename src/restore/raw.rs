//! Raw targets: a sparse file, or a block device.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use super::clone::Cloner;
use super::device::{Device, STEP};
use super::plan::{Chunk, Plan, extents};
use super::source::Reader;
use super::{Options, Reflink, Summary, Temp, readback, target_error};
use crate::error::{Error, Kind, Result};
use crate::image::{MergedExtent, Source};
use crate::job::{Work, pool};
use crate::storage::ReadAt;
use crate::text::path_text;
use crate::units::{counted, human_bytes};

/// Bytes that are read and written at once. What was read is still in the processor's own cache
/// when it is written: 1 MiB took a quarter more time.
const BUFFER: usize = 256 << 10;
/// Data is looked through for zeros in blocks of this size; a block of zeros is not written.
const ZERO_BLOCK: usize = 64 << 10;

/// Restores to a new raw file.
///
/// # Errors
/// See [`super::restore`].
pub(super) fn to_file(
    reader: &Reader,
    plan: &Plan,
    path: &Path,
    options: &Options,
    work: &Work,
) -> Result<Summary> {
    let temp = Temp::create(path, options.force)?;
    note_leftover(&temp, work);
    let out = temp.file();
    out.set_len(plan.size).map_err(|e| target_error(e, "cannot set the size", temp.path()))?;
    let cloner = Cloner::new(out, options.reflink);
    let copier = Copier::new(reader, out, temp.path(), cloner, Holes::AreZero, work);
    let mut summary = copier.run(&plan.chunks)?;
    check_length(out, plan.size, temp.path())?;
    if options.verify {
        readback::file(reader, plan, out, temp.path(), work)?;
        summary.verified = true;
    }
    temp.publish()?;
    Ok(summary)
}

/// Tells that files of killed runs were found.
pub(super) fn note_leftover(temp: &Temp, work: &Work) {
    let left = temp.leftover;
    if left.bytes > 0 {
        let (folder, files) = (path_text(temp.folder().path()), counted(left.files as u64, "file"));
        let bytes = human_bytes(left.bytes);
        work.progress.note(&format!(
            "{folder}: {files} ({bytes}) left by an earlier run that was killed; removed"
        ));
    }
}

fn check_length(file: &File, size: u64, path: &Path) -> Result<()> {
    let len = file.metadata().map_err(|e| target_error(e, "cannot check the file", path))?.len();
    if len == size {
        return Ok(());
    }
    let text = format!("the result has {len} bytes instead of {size}");
    Err(Error::new(Kind::Io, text).at_path(path))
}

/// Restores to an existing block device.
///
/// # Errors
/// See [`super::restore`].
pub(super) fn to_device(
    reader: &Reader,
    plan: &Plan,
    path: &Path,
    options: &Options,
    work: &Work,
) -> Result<Summary> {
    if options.reflink == Reflink::Always {
        return Err(Error::new(Kind::Usage, "nothing can be cloned to a block device"));
    }
    let device = Device::open(path)?;
    device.check_size(plan.size)?;
    let zeroed = options.discard && discard_all(&device, work)?;
    let holes = match zeroed {
        true => Holes::AreZero,
        false => Holes::ToZero { device: &device, discard: options.discard },
    };
    let cloner = Cloner::new(device.file(), Reflink::Never);
    let copier = Copier::new(reader, device.file(), path, cloner, holes, work);
    let chunks = if zeroed { plan.chunks.clone() } else { plan.all_chunks()? };
    let mut summary = copier.run(&chunks)?;
    device.file().sync_all().map_err(|e| target_error(e, "cannot write to disk", path))?;
    if options.verify {
        readback::file(reader, plan, device.file(), path, work)?;
        summary.verified = true;
    }
    Ok(summary)
}

/// Discards the whole device; whether it certainly reads as zeros then.
fn discard_all(device: &Device, work: &Work) -> Result<bool> {
    let mut zeroed = true;
    let mut at = 0;
    while at < device.size() {
        work.check()?;
        let len = STEP.min(device.size() - at);
        zeroed &= device.discard(at, len);
        at += len;
    }
    Ok(zeroed)
}

/// What has to be done where the point has a hole.
enum Holes<'a> {
    /// Nothing: the target reads as zeros there.
    AreZero,
    /// Old bytes have to go.
    ToZero { device: &'a Device, discard: bool },
}

struct Copier<'a> {
    reader: &'a Reader<'a>,
    out: &'a File,
    path: &'a Path,
    cloner: Cloner,
    holes: Holes<'a>,
    work: &'a Work<'a>,
    copied: AtomicU64,
    cloned: AtomicU64,
}

impl<'a> Copier<'a> {
    fn new(
        reader: &'a Reader<'a>,
        out: &'a File,
        path: &'a Path,
        cloner: Cloner,
        holes: Holes<'a>,
        work: &'a Work<'a>,
    ) -> Self {
        let [copied, cloned] = Default::default();
        Copier { reader, out, path, cloner, holes, work, copied, cloned }
    }

    fn run(&self, chunks: &[Chunk]) -> Result<Summary> {
        let size = self.reader.image.size();
        let buffer = || vec![0; BUFFER];
        pool::run(chunks.len(), self.work, buffer, |buf, i| self.chunk(&chunks[i], buf))?;
        let (copied, cloned) =
            (self.copied.load(Ordering::Relaxed), self.cloned.load(Ordering::Relaxed));
        self.cloner.check_wanted(copied)?;
        let holes = size.saturating_sub(copied).saturating_sub(cloned);
        Ok(Summary { copied, cloned, holes, ..Summary::default() })
    }

    /// Writes one chunk: clones what can be cloned, and copies the rest in runs that are as long
    /// as possible, whatever files they come from.
    fn chunk(&self, chunk: &Chunk, buf: &mut [u8]) -> Result<()> {
        let list = extents(self.reader.image, chunk.range())?;
        let mut run = chunk.start..chunk.start;
        for e in list.as_slice() {
            match e.content {
                Source::Unallocated | Source::Zero { .. } => {
                    self.copy(run, buf)?;
                    self.hole(e)?;
                    run = e.end()..e.end();
                }
                Source::Bad { .. } if self.reader.gives_up(e) => {
                    self.copy(run, buf)?;
                    self.hole(e)?;
                    self.work.did(e.len)?;
                    run = e.end()..e.end();
                }
                Source::Data { layer, file, host } => {
                    let Some(part) = self.cloner.part(host, e.start, e.len) else {
                        run.end = e.end();
                        continue;
                    };
                    let (from, to) = (e.start + part.start, e.start + part.end);
                    if self.clone_range(layer, file, host + part.start, from, to - from)? {
                        self.copy(run.start..from, buf)?;
                        run = to..e.end();
                    } else {
                        run.end = e.end();
                    }
                }
                Source::Compressed { .. } | Source::Bad { .. } => run.end = e.end(),
            }
        }
        self.copy(run, buf)?;
        start_writeback(self.out, chunk.range());
        Ok(())
    }

    fn hole(&self, e: &MergedExtent) -> Result<()> {
        let Holes::ToZero { device, discard } = self.holes else { return Ok(()) };
        let mut at = e.start;
        while at < e.end() {
            self.work.check()?;
            let len = STEP.min(e.end() - at);
            device.zero(at, len, discard)?;
            at += len;
        }
        Ok(())
    }

    fn clone_range(&self, layer: u16, file: u8, from: u64, to: u64, len: u64) -> Result<bool> {
        let Some(source) = self.reader.image.source_file(layer, file)? else { return Ok(false) };
        let done = self
            .cloner
            .clone(&*source.file()?, from, self.out, to, len)
            .map_err(|e| e.at_path(self.path).at_offset(to))?;
        if done {
            source.check_unchanged()?;
            self.cloned.fetch_add(len, Ordering::Relaxed);
            self.work.did(len)?;
        }
        Ok(done)
    }

    fn copy(&self, range: std::ops::Range<u64>, buf: &mut [u8]) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            let n = (buf.len() as u64).min(range.end - at) as usize;
            self.reader.read(&mut buf[..n], at)?;
            self.write(&buf[..n], at)?;
            self.work.did(n as u64)?;
            at += n as u64;
        }
        Ok(())
    }

    fn write(&self, bytes: &[u8], at: u64) -> Result<()> {
        let put = |part: std::ops::Range<usize>| {
            let to = at + part.start as u64;
            self.copied.fetch_add(part.len() as u64, Ordering::Relaxed);
            self.out
                .write_all_at(&bytes[part], to)
                .map_err(|e| target_error(e, "writing failed", self.path).at_offset(to))
        };
        if matches!(self.holes, Holes::ToZero { .. }) {
            return put(0..bytes.len());
        }
        for run in data_runs(bytes, at) {
            put(run)?;
        }
        Ok(())
    }
}

/// Lets the disk begin with what was written, while the rest is still being read; else the sync at
/// the end has gigabytes to wait for. Its errors are told by that sync.
fn start_writeback(file: &File, range: std::ops::Range<u64>) {
    let (start, len) = (range.start as libc::off64_t, (range.end - range.start) as libc::off64_t);
    // SAFETY: a plain call on an open descriptor; a file that cannot do it says so and nothing happens.
    unsafe { libc::sync_file_range(file.as_raw_fd(), start, len, libc::SYNC_FILE_RANGE_WRITE) };
}

/// The runs of `bytes` (which belong at offset `at`) that are not blocks of zeros. Blocks are
/// aligned in the target, so that what is omitted is a hole there.
fn data_runs(bytes: &[u8], at: u64) -> impl Iterator<Item = std::ops::Range<usize>> + '_ {
    let block_end = move |from: usize| {
        let into = ((at + from as u64) % ZERO_BLOCK as u64) as usize;
        (from + ZERO_BLOCK - into).min(bytes.len())
    };
    let mut from = 0;
    std::iter::from_fn(move || {
        while from < bytes.len() && is_zero(&bytes[from..block_end(from)]) {
            from = block_end(from);
        }
        let start = from;
        while from < bytes.len() && !is_zero(&bytes[from..block_end(from)]) {
            from = block_end(from);
        }
        (start < from).then_some(start..from)
    })
}

/// Whether all bytes are zero; looks at a vector's worth at a time, and stops at the first that
/// is not.
pub(super) fn is_zero(bytes: &[u8]) -> bool {
    let mut lines = bytes.chunks_exact(64);
    let zero = |line: &[u8]| line.iter().fold(0, |a, b| a | b) == 0;
    lines.all(zero) && zero(lines.remainder())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_of_zeros_are_left_out() {
        let mut bytes = vec![0; 4 * ZERO_BLOCK];
        bytes[ZERO_BLOCK + 5] = 1;
        bytes[4 * ZERO_BLOCK - 1] = 1;
        let runs: Vec<_> = data_runs(&bytes, 0).collect();
        assert_eq!(runs, [ZERO_BLOCK..2 * ZERO_BLOCK, 3 * ZERO_BLOCK..4 * ZERO_BLOCK]);
        let runs: Vec<_> = data_runs(&bytes[ZERO_BLOCK..ZERO_BLOCK + 10], 512).collect();
        assert!(runs.len() == 1 && runs[0] == (0..10));
        assert_eq!(data_runs(&bytes[..100], 0).count(), 0);
        assert_eq!(data_runs(&[], 0).count(), 0);
    }

    #[test]
    fn zeros_are_told_from_data_at_every_place() {
        for i in 0..200 {
            let mut b = vec![0; 200];
            assert!(is_zero(&b[..i]));
            b[i] = 1;
            assert!(!is_zero(&b) && is_zero(&b[..i]));
        }
    }
}
