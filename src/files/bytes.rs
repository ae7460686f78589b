//! Numbers as they are on disk. What is outside of the slice reads as zero: whoever needs to know checks the
//! slice's length first, and nobody panics who forgot.

macro_rules! number {
    ($name:ident, $type:ty, $from:ident, $doc:literal) => {
        #[doc = $doc]
        pub(super) fn $name(bytes: &[u8], at: usize) -> $type {
            const LEN: usize = size_of::<$type>();
            let end = at.saturating_add(LEN);
            let found = bytes.get(at..end).and_then(|b| <[u8; LEN]>::try_from(b).ok());
            found.map_or(0, <$type>::$from)
        }
    };
}

number!(le16, u16, from_le_bytes, "Two bytes, the lowest first.");
number!(le32, u32, from_le_bytes, "Four bytes, the lowest first.");
number!(le64, u64, from_le_bytes, "Eight bytes, the lowest first.");
number!(be16, u16, from_be_bytes, "Two bytes, the highest first.");
number!(be32, u32, from_be_bytes, "Four bytes, the highest first.");
number!(be64, u64, from_be_bytes, "Eight bytes, the highest first.");

/// One byte.
pub(super) fn byte(bytes: &[u8], at: usize) -> u8 {
    bytes.get(at).copied().unwrap_or(0)
}

/// `len` bytes from `at` on, as far as they are there.
pub(super) fn part(bytes: &[u8], at: usize, len: usize) -> &[u8] {
    let start = at.min(bytes.len());
    let end = at.saturating_add(len).min(bytes.len());
    bytes.get(start..end).unwrap_or_default()
}

/// A text of fixed length, up to its first NUL.
pub(super) fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|b| *b == 0).next().unwrap_or_default()
}

/// A UUID as it is written, from bytes in that order.
pub(super) fn uuid(bytes: &[u8]) -> String {
    let mut text = String::new();
    for (i, b) in bytes.iter().take(16).enumerate() {
        if [4, 6, 8, 10].contains(&i) {
            text.push('-');
        }
        text.push_str(&format!("{b:02x}"));
    }
    text
}

/// A UUID whose first three parts are numbers with the lowest byte first, as in GPT.
pub(super) fn guid(bytes: &[u8]) -> String {
    let order = [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15];
    uuid(&order.map(|i| byte(bytes, i)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_outside_is_zero() {
        let bytes = [1, 2, 3, 4, 5];
        assert_eq!((le16(&bytes, 0), be16(&bytes, 3), le32(&bytes, 2)), (0x201, 0x405, 0));
        assert_eq!((be64(&bytes, usize::MAX), byte(&bytes, 5)), (0, 0));
        assert_eq!((part(&bytes, 3, 9), part(&bytes, 9, 1)), (&bytes[3..], &bytes[5..]));
        assert_eq!(until_nul(b"ab\0c"), b"ab");
    }

    #[test]
    fn ids_read_as_people_write_them() {
        let bytes: Vec<u8> = (0..16).collect();
        assert_eq!(uuid(&bytes), "00010203-0405-0607-0809-0a0b0c0d0e0f");
        assert_eq!(guid(&bytes), "03020100-0504-0706-0809-0a0b0c0d0e0f");
    }
}
