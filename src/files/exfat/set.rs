//! Entry sets: a file's entry, its stream's, and those of its name.

use super::super::bytes::{byte, le16, le32, le64, part};
use super::super::clusters::{SLOT, Stamp, plain, time};
use super::super::tree::{Attributes, Flags, MAX_SIZE, NodeKind, Time};
use super::super::utf16;

/// Types of entries, with the bit that says that they are in use.
pub(super) mod kind {
    pub(in super::super) const BITMAP: u8 = 0x81;
    pub(in super::super) const UPCASE: u8 = 0x82;
    pub(in super::super) const LABEL: u8 = 0x83;
    pub(in super::super) const FILE: u8 = 0x85;
    pub(in super::super) const STREAM: u8 = 0xc0;
    pub(in super::super) const NAME: u8 = 0xc1;
}

/// Secondary entries: the stream, at most 17 parts of a name, and some more that vendors may add.
const SECONDARY: std::ops::RangeInclusive<u8> = 2..=250;
/// Bytes of the longest set.
pub(super) const MAX_SET: u64 = 251 * SLOT;
/// Units of a name in one entry, and in all.
const UNITS: usize = 15;
const MAX_NAME: usize = 255;

const READ_ONLY: u16 = 0x01;
const HIDDEN: u16 = 0x02;
const SYSTEM: u16 = 0x04;
const FOLDER: u16 = 0x10;
/// The stream's clusters follow each other, and are not in the table.
const NO_FAT_CHAIN: u8 = 0x02;

/// What a folder says of a file.
pub(super) struct Set {
    raw: Vec<u8>,
    pub name: Vec<u16>,
    pub first: u32,
    /// Length in bytes.
    pub size: u64,
    /// Bytes that were written.
    pub valid: u64,
    /// Whether its clusters follow each other.
    pub no_chain: bool,
}

impl Set {
    /// How many bytes the set takes that begins with these; `None` if none does.
    pub(super) fn len(bytes: &[u8]) -> Option<usize> {
        let count = byte(bytes, 1);
        let is_set = byte(bytes, 0) == kind::FILE && SECONDARY.contains(&count);
        is_set.then(|| (1 + usize::from(count)) * SLOT as usize)
    }

    /// The set in these bytes.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(super) fn new(raw: &[u8]) -> Result<Set, &'static str> {
        if Set::len(raw) != Some(raw.len()) {
            return Err("an entry set is cut short");
        }
        if le16(raw, 2) != checksum(raw) {
            return Err("bad checksum of an entry set");
        }
        let stream = part(raw, SLOT as usize, SLOT as usize);
        let len = usize::from(byte(stream, 3));
        let names: Vec<&[u8]> = raw.chunks(SLOT as usize).skip(2).collect();
        let parts = len.div_ceil(UNITS);
        let named = names.iter().take(parts).filter(|n| byte(n, 0) == kind::NAME).count();
        if byte(stream, 0) != kind::STREAM || len == 0 || len > MAX_NAME || named != parts {
            return Err("an entry set without a name");
        }
        let mut name: Vec<u16> =
            names.iter().take(parts).flat_map(|n| utf16::units(part(n, 2, 2 * UNITS))).collect();
        name.truncate(len);
        let (size, valid) = (le64(stream, 24), le64(stream, 8));
        if size > MAX_SIZE {
            return Err("an entry set with an invalid length");
        }
        if valid > size {
            return Err("an entry set with more written bytes than its length");
        }
        Ok(Set {
            name,
            first: le32(stream, 20),
            size,
            valid,
            no_chain: byte(stream, 1) & NO_FAT_CHAIN > 0,
            raw: raw.to_vec(),
        })
    }

    fn has(&self, flag: u16) -> bool {
        le16(&self.raw, 4) & flag > 0
    }

    pub(super) fn kind(&self) -> NodeKind {
        if self.has(FOLDER) { NodeKind::Folder } else { NodeKind::File }
    }

    fn time(&self, at: usize, hundredths: Option<usize>, zone: usize) -> Time {
        let stamp = le32(&self.raw, at);
        time(Stamp {
            date: (stamp >> 16) as u16,
            time: stamp as u16,
            hundredths: hundredths.map_or(0, |at| byte(&self.raw, at)),
            offset: offset(byte(&self.raw, zone)),
        })
    }

    pub(super) fn attributes(&self, allocated: u64) -> Attributes {
        let mtime = self.time(12, Some(21), 23);
        let all = plain(self.kind(), self.size, allocated);
        let read_only = self.has(READ_ONLY);
        Attributes {
            mode: if read_only && all.kind == NodeKind::File { 0o444 } else { all.mode },
            atime: self.time(16, None, 24),
            mtime,
            ctime: mtime,
            crtime: Some(self.time(8, Some(20), 22)),
            flags: Flags {
                read_only,
                hidden: self.has(HIDDEN),
                system: self.has(SYSTEM),
                ..Flags::default()
            },
            ..all
        }
    }
}

/// Seconds from UTC: in quarters of an hour, seven bits with a sign, where they are valid.
fn offset(zone: u8) -> i64 {
    const VALID: u8 = 0x80;
    let quarters = i64::from((zone << 1) as i8 / 2);
    if zone & VALID > 0 { quarters * 900 } else { 0 }
}

/// Over all bytes but its own.
fn checksum(raw: &[u8]) -> u16 {
    let others = raw.iter().enumerate().filter(|(i, _)| !(2..4).contains(i));
    others.fold(0u16, |sum, (_, b)| sum.rotate_right(1).wrapping_add(u16::from(*b)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A set with this name; `change` is applied before the checksum is made.
    fn made(name: &str, change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
        let units: Vec<u16> = name.encode_utf16().collect();
        let parts = units.len().div_ceil(UNITS);
        let mut raw = vec![0; (2 + parts) * 32];
        (raw[0], raw[1], raw[4], raw[32]) = (kind::FILE, 1 + parts as u8, 0x21, kind::STREAM);
        (raw[33], raw[35], raw[52], raw[56], raw[40]) = (3, units.len() as u8, 7, 100, 60);
        for (i, unit) in units.iter().enumerate() {
            let at = 64 + i / UNITS * 32;
            raw[at] = kind::NAME;
            raw[at + 2 + i % UNITS * 2..][..2].copy_from_slice(&unit.to_le_bytes());
        }
        change(&mut raw);
        let sum = checksum(&raw);
        raw[2..4].copy_from_slice(&sum.to_le_bytes());
        raw
    }

    #[test]
    fn sets_are_read_as_they_were_made() {
        let name = "a name that takes three entries: äöü";
        let set = Set::new(&made(name, |_| ())).unwrap();
        assert_eq!(String::from_utf16(&set.name).unwrap(), name);
        assert_eq!((set.first, set.size, set.valid, set.no_chain), (7, 100, 60, true));
        let attributes = set.attributes(4096);
        assert_eq!((attributes.kind, attributes.mode), (NodeKind::File, 0o444));
        assert!(attributes.flags.read_only && !attributes.flags.hidden);
    }

    #[test]
    fn what_contradicts_itself_is_none() {
        let fails = |raw: &[u8]| Set::new(raw).is_err();
        assert!(!fails(&made("x", |_| ())));
        let mut bad = made("x", |_| ());
        bad[66] = b'y';
        assert!(fails(&bad));
        assert!(fails(&made("x", |raw| raw[40] = 101)));
        assert!(fails(&made("x", |raw| raw[35] = 0)));
        assert!(fails(&made("x", |raw| raw[35] = 16)));
        assert!(fails(&made("x", |raw| raw[32] = kind::NAME)));
        assert!(fails(&made("x", |raw| raw[1] = 1)));
        assert!(fails(&made("x", |_| ())[..64]));
    }

    #[test]
    fn zones_are_quarters_of_an_hour() {
        let found = [0x80, 0x84, 0x88, 0xf0, 0xfc, 0x04].map(offset);
        assert_eq!(found, [0, 3600, 7200, -14400, -3600, 0]);
    }
}
