//! The map of a kept overlay on disk.
//!
//! A page that says what it is, and then for each level, the root's first, one record after the other, each level from
//! a page's beginning; what was never written is a hole. Each block's bits stand for themselves, and are written after
//! the block's data is on disk: so it does not matter where writing them was interrupted. The file has its length from
//! the beginning: one that was cut short is told from one to which little was written.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError};

use super::file::ScratchFile;
use super::holes;
use super::map::{DirtyMap, LEVELS, Record, span};
use crate::error::{Error, Kind, Result};

/// Each level begins at a multiple of this.
const PAGE: u64 = 4096;
/// What the file begins with.
const MAGIC: &[u8; 16] = b"fleecefs overlay";
/// The version of the file.
const VERSION: u32 = 2;
/// Of the first page: magic, version (4 bytes), zeros (4), bytes of the disk (8), of this file (8), and BLAKE3 (32)
/// over all that. Numbers are little-endian.
const HEAD: usize = 72;
/// The longest that the file is made: some file systems have none that are longer. It is that of a disk of 32 PiB.
const MOST_LENGTH: u64 = 2 << 40;
/// Pages that are remembered to have room: each of them is for 64 MiB of a disk. Others are asked for again, which changes
/// nothing where there is room already.
const MOST_RESERVED: usize = 4096;
/// Bytes that are read at a time; a multiple of each record's.
const STEP: u64 = 256 << 10;

/// The file, and where each level begins.
#[derive(Debug)]
pub(super) struct MapFile {
    file: ScratchFile,
    /// Bytes of the disk, and of this file.
    size: u64,
    length: u64,
    /// By level: where its records are, and the bytes of each.
    levels: Vec<(Range<u64>, u64)>,
    /// Some of the pages that are sure to have room.
    reserved: Mutex<HashSet<u64>>,
}

impl MapFile {
    /// The file for a map of this shape, of a disk of `size` bytes.
    pub(super) fn new(file: ScratchFile, size: u64, map: &DirtyMap) -> Self {
        let mut at = PAGE;
        let mut levels: Vec<_> = (0..LEVELS)
            .rev()
            .map(|level| {
                let (count, len) = map.records(level);
                let records = at..at + count * len;
                at = records.end.next_multiple_of(PAGE);
                (records, len)
            })
            .collect();
        levels.reverse();
        MapFile { file, size, length: at.min(MOST_LENGTH), levels, reserved: Mutex::default() }
    }

    /// Pages that are remembered to have room.
    #[cfg(test)]
    pub(super) fn remembered(&self) -> usize {
        self.reserved.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// As the list of open files does to make room.
    #[cfg(test)]
    pub(super) fn close(&self) {
        self.file.close();
    }

    /// The beginning of a new file, which survives a power cut.
    ///
    /// # Errors
    /// What the operating system said.
    pub(super) fn begin(&self) -> Result<()> {
        let made = self.file.change(|file| {
            file.set_len(self.length)?;
            file.write_all_at(&self.head(), 0)
        });
        let made = made.and_then(|()| self.file.sync(true));
        made.map_err(|e| self.failed(e, "cannot write the map of an overlay"))
    }

    fn head(&self) -> [u8; HEAD] {
        let mut head = [0; HEAD];
        head[..16].copy_from_slice(MAGIC);
        head[16..20].copy_from_slice(&VERSION.to_le_bytes());
        head[24..32].copy_from_slice(&self.size.to_le_bytes());
        head[32..40].copy_from_slice(&self.length.to_le_bytes());
        let sum = *blake3::hash(&head[..40]).as_bytes();
        head[40..].copy_from_slice(&sum);
        head
    }

    /// Whether this is the whole file of a map of this disk.
    fn check_head(&self) -> Result<()> {
        let failed = |e| self.failed(e, "cannot read the map of an overlay");
        let length = self.file.with(|file| Ok(file.metadata()?.len())).map_err(failed)?;
        let damaged = |kind, text| {
            let text = format!("{text}: it is not known what was written to the point");
            let remedy = "put both files of the overlay back from a copy of the scratch folder, or have the overlay \
                          dropped: 'fleecefs scratch drop'";
            Error::new(kind, text).at_path(self.file.path()).remedy(remedy)
        };
        if length < self.length {
            return Err(damaged(Kind::Truncated, "the map of an overlay was cut short"));
        }
        let mut head = [0; HEAD];
        self.file.read_exact_at(&mut head, 0).map_err(failed)?;
        match head == self.head() {
            true => Ok(()),
            false => {
                Err(damaged(Kind::Corrupt, "the map of an overlay is damaged, or of another disk"))
            }
        }
    }

    /// Has room on disk for the records of `blocks`, whatever others write there later. With `ends_only` only for those
    /// of the first and the last block: what is between is said by a bit of these.
    ///
    /// # Errors
    /// There is no room. (Where the file system cannot reserve any, nothing is said.)
    pub(super) fn reserve(&self, blocks: Range<u64>, ends_only: bool) -> Result<()> {
        let Some(last) = blocks.end.checked_sub(1) else { return Ok(()) };
        let mut reserved = self.reserved.lock().unwrap_or_else(PoisonError::into_inner);
        for (level, (records, len)) in (0..).zip(&self.levels) {
            let page = |block: u64| (records.start + block / span(level) * len) / PAGE;
            let end = |block: u64| (records.start + (block / span(level) + 1) * len - 1) / PAGE;
            let stretches = match ends_only {
                true => [page(blocks.start)..end(blocks.start) + 1, page(last)..end(last) + 1],
                false => [page(blocks.start)..end(last) + 1, 0..0],
            };
            for page in stretches.into_iter().flatten() {
                if reserved.contains(&page) {
                    continue;
                }
                let bytes = page * PAGE..(page + 1) * PAGE;
                self.file
                    .change(|file| holes::reserve(file, bytes))
                    .map_err(|e| self.failed(e, "no room for the map of an overlay"))?;
                if reserved.len() >= MOST_RESERVED {
                    reserved.clear();
                }
                reserved.insert(page);
            }
        }
        Ok(())
    }

    /// Writes a record.
    ///
    /// # Errors
    /// What the operating system said.
    pub(super) fn write(&self, record: &Record) -> Result<()> {
        let (level, number) = record.place;
        let (records, len) = &self.levels[level as usize];
        self.file
            .write_all_at(&record.bytes, records.start + number * len)
            .map_err(|e| self.failed(e, "cannot write the map of an overlay"))
    }

    /// Has what was written survive a power cut.
    ///
    /// # Errors
    /// What the operating system said.
    pub(super) fn sync(&self) -> Result<()> {
        self.file.sync(false).map_err(|e| self.failed(e, "cannot write the map of an overlay"))
    }

    /// Whether all that was said to be on disk is.
    ///
    /// # Errors
    /// An earlier write failed.
    pub(super) fn check(&self) -> Result<()> {
        self.file.check().map_err(|e| self.failed(e, "cannot write the map of an overlay"))
    }

    /// Says that nobody needs it any more.
    pub(super) fn give_up(&self) {
        self.file.give_up();
    }

    /// Reads all records into an empty map: those that are no holes.
    ///
    /// # Errors
    /// `Truncated` or `Corrupt` if it is not the whole map of this disk; what the operating system said.
    pub(super) fn load(&self, map: &DirtyMap) -> Result<()> {
        self.check_head()?;
        let load = |file: &File| -> io::Result<()> {
            for (level, (records, len)) in (0..).zip(&self.levels) {
                load_level(file, map, (level, *len), records.clone())?;
            }
            Ok(())
        };
        self.file.with(load).map_err(|e| self.failed(e, "cannot read the map of an overlay"))
    }

    fn failed(&self, e: io::Error, what: &str) -> Error {
        Error::io(e, what).at_path(self.file.path())
    }
}

/// Reads the records of a level, which have `len` bytes each.
fn load_level(
    file: &File,
    map: &DirtyMap,
    (level, len): (u32, u64),
    records: Range<u64>,
) -> io::Result<()> {
    let mut at = records.start;
    while let Some(data) = holes::next_data(file, at..records.end)? {
        // Whole records: a file system's holes may begin anywhere.
        let number = (data.start - records.start) / len;
        let start = records.start + number * len;
        let whole = (data.end - start).next_multiple_of(len);
        let bytes = read(file, start, whole.min(STEP.next_multiple_of(len)))?;
        for (i, record) in (number..).zip(bytes.chunks_exact(len as usize)) {
            if record.iter().any(|b| *b != 0) {
                map.put((level, i), record);
            }
        }
        at = start + bytes.len() as u64;
    }
    Ok(())
}

/// So many bytes; what is beyond the end is zeros.
fn read(file: &File, at: u64, len: u64) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    let mut done = 0;
    while done < bytes.len() {
        match file.read_at(&mut bytes[done..], at + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(bytes)
}
