//! The map of a kept overlay on disk.
//!
//! For each level, the root's first, one record after the other, each level from a page's beginning; what was never
//! written is a hole. Each block's bits stand for themselves, and are written after the block's data is on disk: so
//! it does not matter where writing them was broken off.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use super::holes;
use super::map::{DirtyMap, LEVELS, Record, span};
use crate::error::{Error, Result};

/// Each level begins at a multiple of this.
const PAGE: u64 = 4096;
/// Bytes that are read at a time; a multiple of each record's.
const STEP: u64 = 256 << 10;

/// The file, and where each level begins.
#[derive(Debug)]
pub(super) struct MapFile {
    file: File,
    path: PathBuf,
    /// By level: where its records are, and the bytes of each.
    levels: Vec<(Range<u64>, u64)>,
    /// Pages that are sure to have room.
    reserved: Mutex<HashSet<u64>>,
}

impl MapFile {
    /// The file for a map of this shape.
    pub(super) fn new(file: File, path: PathBuf, map: &DirtyMap) -> Self {
        let mut at = 0_u64;
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
        MapFile { file, path, levels, reserved: Mutex::default() }
    }

    /// Has room on disk for the records of `blocks`, whatever others write there later. With `ends_only` of the
    /// lowest level only those of the first and the last block.
    ///
    /// # Errors
    /// There is no room. (Where the file system cannot reserve any, nothing is said.)
    pub(super) fn reserve(&self, blocks: Range<u64>, ends_only: bool) -> Result<()> {
        let Some(last) = blocks.end.checked_sub(1) else { return Ok(()) };
        let mut reserved = self.reserved.lock().unwrap_or_else(PoisonError::into_inner);
        for (level, (records, len)) in (0..).zip(&self.levels) {
            let page = |block: u64| (records.start + block / span(level) * len) / PAGE;
            let end = |block: u64| (records.start + (block / span(level) + 1) * len - 1) / PAGE;
            let stretches = match level == 0 && ends_only {
                true => [page(blocks.start)..end(blocks.start) + 1, page(last)..end(last) + 1],
                false => [page(blocks.start)..end(last) + 1, 0..0],
            };
            for page in stretches.into_iter().flatten() {
                if reserved.contains(&page) {
                    continue;
                }
                holes::reserve(&self.file, page * PAGE..(page + 1) * PAGE)
                    .map_err(|e| self.failed(e, "no room for the map of an overlay"))?;
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
        self.file.sync_data().map_err(|e| self.failed(e, "cannot write the map of an overlay"))
    }

    /// Reads all records into an empty map: those that are no holes.
    ///
    /// # Errors
    /// What the operating system said.
    pub(super) fn load(&self, map: &DirtyMap) -> Result<()> {
        let load = || -> io::Result<()> {
            for (level, (records, len)) in (0..).zip(&self.levels) {
                self.load_level(map, level, records.clone(), *len)?;
            }
            Ok(())
        };
        load().map_err(|e| self.failed(e, "cannot read the map of an overlay"))
    }

    fn load_level(
        &self,
        map: &DirtyMap,
        level: u32,
        records: Range<u64>,
        len: u64,
    ) -> io::Result<()> {
        let mut at = records.start;
        while let Some(data) = holes::next_data(&self.file, at..records.end)? {
            // Whole records: a file system's holes may begin anywhere.
            let number = (data.start - records.start) / len;
            let start = records.start + number * len;
            let whole = (data.end - start).next_multiple_of(len);
            let bytes = self.read(start, whole.min(STEP.next_multiple_of(len)))?;
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
    fn read(&self, at: u64, len: u64) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        let mut done = 0;
        while done < bytes.len() {
            match self.file.read_at(&mut bytes[done..], at + done as u64) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(bytes)
    }

    fn failed(&self, e: io::Error, what: &str) -> Error {
        Error::io(e, what).at_path(&self.path)
    }
}
