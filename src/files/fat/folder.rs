//! The entries of a folder.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use super::super::bytes::{byte, le16, le32, part};
use super::super::clusters::{Clusters, SLOT, Slots, Stamp, Width, plain, time};
use super::super::tree::{Attributes, Entry, Flags, NodeId, NodeKind, Time, is_name};
use super::super::utf16;
use super::name::{self, Long};
use crate::error::{Kind, Result};
use crate::text::path_text;

const READ_ONLY: u8 = 0x01;
const HIDDEN: u8 = 0x02;
const SYSTEM: u8 = 0x04;
/// The volume's name, and no file.
pub(super) const LABEL: u8 = 0x08;
const FOLDER: u8 = 0x10;
/// Two bits that no entry of a file has.
const RESERVED: u8 = 0xc0;

/// Whether an entry is a part of a long name.
pub(super) fn is_long(slot: &[u8]) -> bool {
    byte(slot, 11) & 0x3f == 0x0f
}

/// The entry of a file or folder.
pub(super) struct Item {
    slot: Vec<u8>,
    /// Its first cluster; 0 if it has none.
    pub first: u32,
    /// Length of a file in bytes.
    pub size: u64,
}

impl Item {
    /// The entry in these bytes, if it is one.
    pub(super) fn new(slot: &[u8], width: Width) -> Option<Item> {
        let (first, attributes) = (byte(slot, 0), byte(slot, 11));
        let unused = first == 0 || first == name::DELETED || first == b' ';
        if unused || attributes & (LABEL | RESERVED) > 0 || first == b'.' {
            return None;
        }
        let high = if width == Width::Fat32 { u32::from(le16(slot, 20)) << 16 } else { 0 };
        let first = high | u32::from(le16(slot, 26));
        Some(Item { slot: slot.to_vec(), first, size: u64::from(le32(slot, 28)) })
    }

    pub(super) fn kind(&self) -> NodeKind {
        if self.has(FOLDER) { NodeKind::Folder } else { NodeKind::File }
    }

    fn has(&self, flag: u8) -> bool {
        byte(&self.slot, 11) & flag > 0
    }

    fn time(&self, date: usize, of_day: Option<usize>, hundredths: Option<usize>) -> Time {
        let of_day = of_day.map_or(0, |at| le16(&self.slot, at));
        let hundredths = hundredths.map_or(0, |at| byte(&self.slot, at));
        time(Stamp { date: le16(&self.slot, date), time: of_day, hundredths, offset: 0 })
    }

    pub(super) fn attributes(&self, size: u64, allocated: u64) -> Attributes {
        let mtime = self.time(24, Some(22), None);
        let made = le16(&self.slot, 16) > 0;
        let mut all = plain(self.kind(), size, allocated);
        if self.has(READ_ONLY) && all.kind == NodeKind::File {
            all.mode = 0o444;
        }
        Attributes {
            // Only the day of it is kept.
            atime: if le16(&self.slot, 18) > 0 { self.time(18, None, None) } else { mtime },
            mtime,
            ctime: mtime,
            crtime: made.then(|| self.time(16, Some(14), Some(13))),
            flags: Flags {
                read_only: self.has(READ_ONLY),
                hidden: self.has(HIDDEN),
                system: self.has(SYSTEM),
                ..Flags::default()
            },
            ..all
        }
    }
}

/// Who gets the entries: with the long and the short name in upper case.
pub(super) type Each<'a> = dyn FnMut(Entry, &[u16], &[u16]) -> bool + 'a;

/// Goes through a folder.
pub(super) struct Reading<'a, 'b> {
    pub clusters: &'a Clusters,
    pub slots: Slots<'a>,
    pub each: &'a mut Each<'b>,
}

impl Reading<'_, '_> {
    /// Gives the entries from byte `from` of the folder on.
    ///
    /// # Errors
    /// `Corrupt`, or what reading the point says.
    pub(super) fn read(mut self, from: u64) -> Result<()> {
        let (mut offset, mut long) = (from - from % SLOT, Long::default());
        while let Some((at, slot)) = self.slots.get(offset)? {
            let slot = slot.to_vec();
            offset = offset.saturating_add(SLOT);
            match byte(&slot, 0) {
                0 => break,
                name::DELETED => long.clear(),
                _ if is_long(&slot) => long.add(&slot),
                _ => {
                    let name = long.take(&slot);
                    if !self.entry(&slot, name, at, offset) {
                        break;
                    }
                }
            }
        }
        Ok(())
    }

    /// Gives an entry, if it is one; whether more is wanted.
    fn entry(&mut self, slot: &[u8], long: Option<Vec<u16>>, at: u64, next: u64) -> bool {
        let dots = part(slot, 0, 11) == b".          " || part(slot, 0, 11) == b"..         ";
        if dots || byte(slot, 11) & LABEL > 0 {
            return true;
        }
        let short: Vec<u16> = name::short(slot).encode_utf16().collect();
        let units = long.as_deref().unwrap_or(&short);
        let bytes = utf16::to_bytes(units.iter().copied());
        let item = Item::new(slot, self.clusters.width);
        let Some(item) = item.filter(|_| is_name(&bytes)) else {
            self.odd(&bytes, at);
            return true;
        };
        let node = NodeId { tree: 0, number: at };
        let entry = Entry { name: bytes, node, kind: Some(item.kind()), next };
        (self.each)(entry, &name::upper(units), &name::upper(&short))
    }

    fn odd(&self, name: &[u8], at: u64) {
        let shown = path_text(OsStr::from_bytes(name));
        let what = format!("invalid directory entry at {at:#x} skipped: '{shown}'");
        self.clusters.findings.warn(&self.clusters.source, Kind::Corrupt, &what, None);
    }
}
