//! Records of the master file table and the attributes in them.

use std::sync::Arc;

use super::super::bytes::{byte, le16, le32, le64, part};

/// Types of attributes.
pub(super) mod kind {
    pub(in super::super) const STANDARD: u32 = 0x10;
    pub(in super::super) const LIST: u32 = 0x20;
    pub(in super::super) const FILE_NAME: u32 = 0x30;
    pub(in super::super) const VOLUME_NAME: u32 = 0x60;
    pub(in super::super) const VOLUME_INFO: u32 = 0x70;
    pub(in super::super) const DATA: u32 = 0x80;
    pub(in super::super) const INDEX_ROOT: u32 = 0x90;
    pub(in super::super) const INDEX_ALLOCATION: u32 = 0xa0;
    pub(in super::super) const BITMAP: u32 = 0xb0;
    pub(in super::super) const REPARSE: u32 = 0xc0;
    pub(in super::super) const EA: u32 = 0xe0;
    pub(in super::super) const END: u32 = 0xffff_ffff;
}

/// Flags of an attribute.
pub(super) const COMPRESSED: u16 = 0x00ff;
pub(super) const ENCRYPTED: u16 = 0x4000;
pub(super) const SPARSE: u16 = 0x8000;

/// Bytes of an attribute's header, resident or not.
const RESIDENT: usize = 0x18;
const NON_RESIDENT: usize = 0x40;
/// Bytes of a record's header, before its number.
const HEAD: usize = 0x2a;
/// Where records of NTFS 3.1 have their array of fixups: behind their number.
const NUMBERED: u16 = 0x30;

/// Of a reference, the record's number; above it is the sequence number.
pub(super) const NUMBER: u64 = (1 << 48) - 1;

/// A record as it is after its fixups.
#[derive(Clone)]
pub(super) struct Record {
    /// Its number.
    pub number: u64,
    bytes: Arc<[u8]>,
}

impl Record {
    pub(super) fn new(number: u64, bytes: Arc<[u8]>) -> Record {
        Record { number, bytes }
    }

    /// How often its number was used.
    pub(super) fn sequence(&self) -> u16 {
        le16(&self.bytes, 0x10)
    }

    /// How a file is referred to.
    pub(super) fn reference(&self) -> u64 {
        self.number | u64::from(self.sequence()) << 48
    }

    /// Names in folders, short ones counted as well.
    pub(super) fn links(&self) -> u16 {
        le16(&self.bytes, 0x12)
    }

    pub(super) fn is_used(&self) -> bool {
        le16(&self.bytes, 0x16) & 1 != 0
    }

    pub(super) fn is_folder(&self) -> bool {
        le16(&self.bytes, 0x16) & 2 != 0
    }

    /// Whose record it is, if it is only the continuation of one; else 0.
    pub(super) fn base(&self) -> u64 {
        le64(&self.bytes, 0x20)
    }

    /// Its attributes.
    pub(super) fn attributes(&self) -> impl Iterator<Item = Attribute<'_>> {
        let (bytes, mut at) = (&self.bytes, usize::from(le16(&self.bytes, 0x14)));
        std::iter::from_fn(move || {
            let len = le32(bytes, at + 4) as usize;
            if le32(bytes, at) == kind::END || len < RESIDENT {
                return None;
            }
            let found = Attribute { raw: part(bytes, at, len) };
            at = at.saturating_add(len);
            Some(found)
        })
    }
}

/// Checks a record that is in use: after this, all its attributes are inside of it. In words, what is wrong.
///
/// # Errors
/// Where something reaches out of it.
pub(super) fn check(bytes: &[u8], number: u64) -> Result<(), &'static str> {
    let used = le32(bytes, 0x18) as usize;
    let mut at = usize::from(le16(bytes, 0x14));
    if used > bytes.len() || at < HEAD || at >= used {
        return Err("has an invalid header");
    }
    if le16(bytes, 4) >= NUMBERED && u64::from(le32(bytes, 0x2c)) != number & 0xffff_ffff {
        return Err("has the number of another one in it");
    }
    // Each step is longer than nothing.
    while at + 4 <= used {
        if le32(bytes, at) == kind::END {
            return Ok(());
        }
        let attribute = Attribute { raw: part(bytes, at, le32(bytes, at + 4) as usize) };
        let len = le32(bytes, at + 4) as usize;
        if len < RESIDENT || !len.is_multiple_of(8) || at + len > used || !attribute.is_right() {
            return Err("has an invalid attribute");
        }
        at += len;
    }
    Err("has a list of attributes without an end")
}

/// One attribute.
#[derive(Clone, Copy)]
pub(super) struct Attribute<'a> {
    raw: &'a [u8],
}

impl<'a> Attribute<'a> {
    fn is_right(&self) -> bool {
        let raw = self.raw;
        let name = usize::from(le16(raw, 0xa)) + 2 * usize::from(byte(raw, 9));
        let inside = match byte(raw, 8) {
            0 => usize::from(le16(raw, 0x14)).checked_add(le32(raw, 0x10) as usize),
            1 if raw.len() < NON_RESIDENT => None,
            1 => Some(usize::from(le16(raw, 0x20)).max(NON_RESIDENT)),
            _ => None,
        };
        (byte(raw, 9) == 0 || name <= raw.len()) && inside.is_some_and(|end| end <= raw.len())
    }

    pub(super) fn kind(&self) -> u32 {
        le32(self.raw, 0)
    }

    /// Its name in UTF-16, as it is on disk.
    pub(super) fn name(&self) -> &'a [u8] {
        part(self.raw, usize::from(le16(self.raw, 0xa)), 2 * usize::from(byte(self.raw, 9)))
    }

    /// Its number in its file.
    pub(super) fn id(&self) -> u16 {
        le16(self.raw, 0xe)
    }

    pub(super) fn flags(&self) -> u16 {
        le16(self.raw, 0xc)
    }

    /// Its value, if it is in the record.
    pub(super) fn resident(&self) -> Option<&'a [u8]> {
        let at = usize::from(le16(self.raw, 0x14));
        (byte(self.raw, 8) == 0).then(|| part(self.raw, at, le32(self.raw, 0x10) as usize))
    }

    /// The first and the last cluster that this record has the runs of.
    pub(super) fn span(&self) -> (u64, u64) {
        match self.resident() {
            Some(_) => (0, 0),
            None => (le64(self.raw, 0x10), le64(self.raw, 0x18)),
        }
    }

    /// The runs of one that is not resident.
    pub(super) fn mapping(&self) -> &'a [u8] {
        let at = usize::from(le16(self.raw, 0x20));
        self.raw.get(at..).unwrap_or_default()
    }

    /// The power of two of the clusters that are compressed together; 0 if they are not.
    pub(super) fn unit(&self) -> u8 {
        byte(self.raw, 0x22)
    }

    /// Length in bytes.
    pub(super) fn size(&self) -> u64 {
        match self.resident() {
            Some(value) => value.len() as u64,
            None => le64(self.raw, 0x30),
        }
    }

    /// Up to where it was written; zeros are behind.
    pub(super) fn initialized(&self) -> u64 {
        match self.resident() {
            Some(value) => value.len() as u64,
            None => le64(self.raw, 0x38),
        }
    }

    /// Bytes that it takes on disk beside its record.
    pub(super) fn allocated(&self) -> u64 {
        let thin = self.flags() & (COMPRESSED | SPARSE) != 0 && self.raw.len() >= 0x48;
        match self.resident() {
            Some(_) => 0,
            None if thin && self.unit() > 0 => le64(self.raw, 0x40),
            None => le64(self.raw, 0x28),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A record in use with these attributes.
    fn record(number: u32, attributes: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = vec![0; 1024];
        bytes[4..6].copy_from_slice(&0x30u16.to_le_bytes());
        bytes[0x10] = 1;
        bytes[0x14] = 0x38;
        bytes[0x16] = 1;
        bytes[0x2c..0x30].copy_from_slice(&number.to_le_bytes());
        let mut at = 0x38;
        for a in attributes {
            bytes[at..at + a.len()].copy_from_slice(a);
            at += a.len();
        }
        bytes[at..at + 4].copy_from_slice(&kind::END.to_le_bytes());
        bytes[0x18..0x1c].copy_from_slice(&(at as u32 + 8).to_le_bytes());
        bytes
    }

    /// A resident attribute.
    fn resident(kind: u32, name: &str, value: &[u8]) -> Vec<u8> {
        let name: Vec<u8> = name.encode_utf16().flat_map(u16::to_le_bytes).collect();
        let value_at = (RESIDENT + name.len()).next_multiple_of(8);
        let mut raw = vec![0; (value_at + value.len()).next_multiple_of(8)];
        let len = raw.len() as u32;
        raw[..4].copy_from_slice(&kind.to_le_bytes());
        raw[4..8].copy_from_slice(&len.to_le_bytes());
        raw[9] = (name.len() / 2) as u8;
        raw[10] = RESIDENT as u8;
        raw[0x10..0x14].copy_from_slice(&(value.len() as u32).to_le_bytes());
        raw[0x14..0x16].copy_from_slice(&(value_at as u16).to_le_bytes());
        raw[RESIDENT..RESIDENT + name.len()].copy_from_slice(&name);
        raw[value_at..value_at + value.len()].copy_from_slice(value);
        raw
    }

    #[test]
    fn attributes_are_found_one_after_the_other() {
        let bytes = record(
            70_000,
            &[resident(kind::STANDARD, "", &[1; 48]), resident(kind::DATA, "ab", b"value")],
        );
        check(&bytes, 70_000).unwrap();
        check(&bytes, 7 << 32 | 70_000).unwrap();
        assert!(check(&bytes, 70_001).is_err());
        let record = Record::new(70_000, Arc::from(bytes));
        let found: Vec<_> = record.attributes().collect();
        assert_eq!(found.len(), 2);
        assert_eq!((found[1].kind(), found[1].name()), (kind::DATA, b"a\0b\0".as_slice()));
        assert_eq!((found[1].resident(), found[1].size()), (Some(b"value".as_slice()), 5));
        assert_eq!(record.reference(), 1 << 48 | 70_000);
    }

    #[test]
    fn what_reaches_out_is_refused() {
        let good = record(1, &[resident(kind::DATA, "n", b"value")]);
        let broken = |at: usize, value: u8| {
            let mut bytes = good.clone();
            bytes[at] = value;
            check(&bytes, 1).is_err()
        };
        assert!(!broken(0x38 + 0x10, 4));
        let attribute = 0x38;
        // Its length, its name, its value, whether it is resident; the record's own numbers.
        for (at, value) in [
            (attribute + 4, 0),
            (attribute + 5, 255),
            (attribute + 4, 0x1c),
            (attribute + 9, 200),
            (attribute + 0x12, 1),
            (attribute + 8, 1),
            (attribute + 8, 2),
            (0x14, 0),
            (0x19, 9),
            (0x18, 0x39),
        ] {
            assert!(broken(at, value), "{at:#x}");
        }
    }
}
