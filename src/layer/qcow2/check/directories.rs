//! The walk over what names further tables: internal snapshots and persistent bitmaps.

use super::walk::{OFFSET, Walker, be32, be64, read_words};
use crate::error::{Error, Finding, Kind, Result, Severity};
use crate::layer::qcow2::snapshot;

/// QEMU's limit for an L1 table, used for bitmap tables too.
const MAX_L1_BYTES: u64 = 32 << 20;
/// Bytes of bitmap tables, or of snapshots' L1 tables, that are looked at in one file. 512 MiB of them
/// describe petabytes.
const MAX_TABLES: u64 = 512 << 20;
/// QEMU's limit for the number of bitmaps.
const MAX_BITMAPS: u32 = 65_535;
/// QEMU's limit for the bitmap directory: 65,535 bitmaps of 1 KiB.
const MAX_DIRECTORY_BYTES: u64 = 64 << 20;

impl Walker<'_> {
    pub(super) fn snapshots(&mut self) -> Vec<snapshot::Snapshot> {
        if self.h.nb_snapshots == 0 {
            return Vec::new();
        }
        let table = match snapshot::read_table(self.image, self.h) {
            Ok(t) => t,
            Err(e) => {
                self.out.push(Finding::from_error(&e, self.image.name()));
                self.leave_out(self.h.snapshots_offset);
                return Vec::new();
            }
        };
        let end = table.last().map_or(self.h.snapshots_offset, |s| s.end);
        let len = end.saturating_sub(self.h.snapshots_offset);
        self.metadata(self.h.snapshots_offset, len, "the snapshot table");
        let (mut sound, mut total) = (Vec::new(), 0_u64);
        for s in table {
            let (l1, len) = (s.l1, s.l1.byte_len());
            let aligned = l1.offset & (self.h.cluster_size() - 1) == 0;
            let fits = l1.offset.checked_add(len).is_some_and(|e| e <= self.image.len());
            if !(aligned && fits && len <= MAX_L1_BYTES) {
                let name = &s.info.name;
                let text = format!("the L1 table of snapshot '{name}' has an invalid offset");
                self.error(Kind::Corrupt, l1.offset, text);
                self.leave_out(l1.offset);
                continue;
            }
            total += len;
            if total > MAX_TABLES {
                let what = "too many L1 tables of snapshots: the others are not checked";
                self.error(Kind::Unsupported, l1.offset, what);
                self.leave_out(l1.offset);
                break;
            }
            if self.metadata(l1.offset, len, "a snapshot's L1 table") {
                sound.push(s);
            } else {
                self.leave_out(l1.offset);
            }
        }
        sound
    }

    /// Persistent bitmaps: no read needs them, so trouble is a warning unless it overlaps data.
    pub(super) fn bitmaps(&mut self) {
        let Some(b) = self.h.bitmaps else { return };
        if let Err(e) = self.bitmap_directory(b.directory_offset, b.directory_size, b.count) {
            let mut finding = Finding::from_error(&e, self.image.name());
            finding.severity = Severity::Warning;
            self.out.push(finding);
            self.leave_out(b.directory_offset);
        }
    }

    fn bitmap_directory(&mut self, offset: u64, size: u64, count: u32) -> Result<()> {
        let there = offset.checked_add(size).is_some_and(|end| end <= self.image.len());
        if size > MAX_DIRECTORY_BYTES || !there || offset & (self.h.cluster_size() - 1) != 0 {
            return Err(self.bad_bitmap(offset, "the bitmap directory has an invalid offset"));
        }
        if count > MAX_BITMAPS {
            return Err(self.bad_bitmap(offset, "more bitmaps than qcow2 allows"));
        }
        self.metadata(offset, size, "the bitmap directory");
        let mut directory = vec![0; size as usize];
        self.image.read_exact_at(&mut directory, offset)?;
        let (mut at, mut total) = (0, 0_u64);
        for _ in 0..count {
            let entry = directory
                .get(at..at + 24)
                .ok_or_else(|| self.bad_bitmap(offset, "the bitmap directory is cut off"))?;
            let (table, entries) = (be64(&entry[0..8]), be32(&entry[8..12]));
            let names = u64::from(u16::from_be_bytes([entry[18], entry[19]]));
            let extra = u64::from(be32(&entry[20..24]));
            total += u64::from(entries) * 8;
            if total > MAX_TABLES {
                return Err(
                    self.bad_bitmap(table, "too many bitmap tables: the others are not checked")
                );
            }
            self.bitmap_table(table, entries)?;
            at += (24 + names + extra).next_multiple_of(8) as usize;
        }
        Ok(())
    }

    fn bitmap_table(&mut self, table: u64, entries: u32) -> Result<()> {
        let len = u64::from(entries) * 8;
        let there = table.checked_add(len).is_some_and(|end| end <= self.image.len());
        if !there || len > MAX_L1_BYTES || table & (self.h.cluster_size() - 1) != 0 {
            return Err(self.bad_bitmap(table, "a bitmap's table has an invalid offset"));
        }
        if !self.metadata(table, len, "a bitmap's table") {
            return Err(self.bad_bitmap(table, "a bitmap's table overlaps something else"));
        }
        if self.is_hole(table, len) {
            return Ok(());
        }
        for (i, entry) in (0..).zip(read_words(self.image, table, u64::from(entries))?) {
            let offset = entry & OFFSET;
            if entry & !(OFFSET | 1) != 0 || offset & (self.h.cluster_size() - 1) != 0 {
                return Err(self.bad_bitmap(table + i * 8, "a bitmap's table entry is invalid"));
            }
            if offset != 0 {
                if offset >= self.image.len() {
                    return Err(self.bad_bitmap(
                        table + i * 8,
                        "a bitmap is past the end of the \
                                                               file",
                    ));
                }
                if !self.metadata(offset, self.h.cluster_size(), "a bitmap") {
                    let what = "a bitmap overlaps something else";
                    return Err(self.bad_bitmap(table + i * 8, what));
                }
            }
        }
        Ok(())
    }

    fn bad_bitmap(&self, at: u64, what: &str) -> Error {
        Error::new(Kind::Corrupt, format!("{what}; the data is not affected"))
            .at_path(self.image.name())
            .at_offset(at)
            .remedy("remove the image's bitmaps from a copy of it")
    }
}
