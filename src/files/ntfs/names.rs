//! Names: UTF-16 on disk, bytes for the rest of the program; and which letters are the same in another case.

use std::cmp::Ordering;

use super::super::bytes::le16;

/// UTF-16 as it is on disk, as UTF-8; half surrogates as the three bytes that UTF-8 would give them.
pub(super) fn to_bytes(name: &[u8]) -> Vec<u8> {
    let mut made = Vec::with_capacity(name.len());
    for c in char::decode_utf16(units(name)) {
        match c {
            Ok(c) => made.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
            Err(half) => {
                let n = half.unpaired_surrogate();
                let low = |shift: u16| 0x80 | (n >> shift & 0x3f) as u8;
                made.extend_from_slice(&[0xe0 | (n >> 12) as u8, low(6), low(0)]);
            }
        }
    }
    made
}

/// The units of a name on disk.
pub(super) fn units(name: &[u8]) -> impl Iterator<Item = u16> {
    name.chunks_exact(2).map(|c| le16(c, 0))
}

/// The opposite of [`to_bytes`]; `None` if no name on disk could be so.
pub(super) fn from_bytes(mut name: &[u8]) -> Option<Vec<u16>> {
    let mut made = Vec::with_capacity(name.len());
    loop {
        let error = match std::str::from_utf8(name) {
            Ok(text) => {
                made.extend(text.encode_utf16());
                return Some(made);
            }
            Err(error) => error,
        };
        let (valid, rest) = name.split_at(error.valid_up_to());
        made.extend(std::str::from_utf8(valid).ok()?.encode_utf16());
        let (half, rest) = rest.split_first_chunk::<3>()?;
        match half {
            [0xed, b @ 0xa0..=0xbf, c @ 0x80..=0xbf] => {
                made.push(0xd000 | u16::from(b & 0x3f) << 6 | u16::from(c & 0x3f));
            }
            _ => return None,
        }
        name = rest;
    }
}

/// What letters are in upper case, as the volume says ($UpCase).
pub(super) struct Upcase(Vec<u16>);

impl Upcase {
    /// From the table on disk.
    pub(super) fn new(table: &[u8]) -> Upcase {
        Upcase(units(table).collect())
    }

    /// Where the volume's table is damaged: Unicode's.
    pub(super) fn usual() -> Upcase {
        let upper = |n: u16| {
            let upper = char::from_u32(u32::from(n)).map(|c| c.to_uppercase());
            // Of several letters: none.
            let one = upper.filter(|u| u.len() == 1).and_then(|mut u| u.next());
            one.and_then(|c| u16::try_from(u32::from(c)).ok()).unwrap_or(n)
        };
        Upcase((0..=u16::MAX).map(upper).collect())
    }

    fn fold(&self, unit: u16) -> u16 {
        self.0.get(usize::from(unit)).copied().unwrap_or(unit)
    }

    /// The order of names in a folder, whatever their case.
    pub(super) fn compare(&self, name: &[u8], other: &[u16]) -> Ordering {
        let name = units(name).map(|u| self.fold(u));
        name.cmp(other.iter().map(|u| self.fold(*u)))
    }
}

/// A name as it is on disk.
pub(super) fn on_disk(name: &str) -> Vec<u8> {
    name.encode_utf16().flat_map(u16::to_le_bytes).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn back(name: &[u8]) -> Option<Vec<u8>> {
        let units = from_bytes(name)?;
        Some(to_bytes(&units.into_iter().flat_map(u16::to_le_bytes).collect::<Vec<_>>()))
    }

    #[test]
    fn names_go_there_and_back() {
        for name in ["", "plain", "Grüße", "日本語", "a😀b"] {
            assert_eq!(to_bytes(&on_disk(name)), name.as_bytes());
            assert_eq!(back(name.as_bytes()).unwrap(), name.as_bytes());
        }
        // Half surrogates, each for itself and at the ends.
        let halves = [0x3d, 0xd8, b'a', 0, 0x00, 0xde];
        let bytes = to_bytes(&halves);
        assert_eq!(bytes, b"\xed\xa0\xbda\xed\xb8\x80");
        assert_eq!(back(&bytes).unwrap(), bytes);
        assert_eq!(from_bytes(&bytes).unwrap(), [0xd83d, 0x61, 0xde00]);
        for wrong in [&b"\xff"[..], b"a\xed\xa0", b"\xc0\x80", b"\xed\x9f"] {
            assert!(from_bytes(wrong).is_none(), "{wrong:?}");
        }
    }

    #[test]
    fn case_is_as_the_table_says() {
        let usual = Upcase::usual();
        let compare =
            |a: &str, b: &str| usual.compare(&on_disk(a), &b.encode_utf16().collect::<Vec<_>>());
        assert_eq!(compare("Grüße.TXT", "GRÜßE.txt"), Ordering::Equal);
        assert_eq!(compare("a", "B"), Ordering::Less);
        assert_eq!(compare("ab", "A"), Ordering::Greater);
        let none = Upcase::new(&[]);
        assert_eq!(none.compare(&on_disk("a"), &[0x61]), Ordering::Equal);
        assert_eq!(none.compare(&on_disk("a"), &[0x41]), Ordering::Greater);
    }
}
