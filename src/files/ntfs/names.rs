//! Names as they are on disk; and which letters are the same in another case.

use std::cmp::Ordering;

use super::super::utf16;

/// A name on disk as bytes.
pub(super) fn to_bytes(name: &[u8]) -> Vec<u8> {
    utf16::to_bytes(utf16::units(name))
}

/// What letters are in upper case, as the volume says ($UpCase).
pub(super) struct Upcase(Vec<u16>);

impl Upcase {
    /// From the table on disk.
    pub(super) fn new(table: &[u8]) -> Upcase {
        Upcase(utf16::units(table).collect())
    }

    /// Where the volume's table is damaged: Unicode's.
    pub(super) fn usual() -> Upcase {
        Upcase((0..=u16::MAX).map(utf16::upper).collect())
    }

    fn fold(&self, unit: u16) -> u16 {
        self.0.get(usize::from(unit)).copied().unwrap_or(unit)
    }

    /// The order of names in a folder, whatever their case.
    pub(super) fn compare(&self, name: &[u8], other: &[u16]) -> Ordering {
        let name = utf16::units(name).map(|u| self.fold(u));
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

    #[test]
    fn names_go_there_and_back() {
        for name in ["", "plain", "Grüße", "日本語", "a😀b"] {
            assert_eq!(to_bytes(&on_disk(name)), name.as_bytes());
        }
        // Half surrogates, each for itself and at the ends.
        let bytes = to_bytes(&[0x3d, 0xd8, b'a', 0, 0x00, 0xde]);
        assert_eq!(bytes, b"\xed\xa0\xbda\xed\xb8\x80");
        assert_eq!(utf16::from_bytes(&bytes).unwrap(), [0xd83d, 0x61, 0xde00]);
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
