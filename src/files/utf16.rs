//! Names in UTF-16, and the bytes that stand for them: UTF-8, with three bytes for half a surrogate pair.

use super::bytes::le16;

/// The bytes of a name.
pub(super) fn to_bytes(units: impl IntoIterator<Item = u16>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for found in char::decode_utf16(units) {
        match found {
            Ok(c) => bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
            Err(half) => {
                let unit = half.unpaired_surrogate();
                let last = |bits: u16| 0x80 | (bits & 0x3f) as u8;
                bytes.extend([0xe0 | (unit >> 12) as u8, last(unit >> 6), last(unit)]);
            }
        }
    }
    bytes
}

/// The other way; `None` if no name has these bytes.
pub(super) fn from_bytes(bytes: &[u8]) -> Option<Vec<u16>> {
    let (mut units, mut rest) = (Vec::with_capacity(bytes.len()), bytes);
    while !rest.is_empty() {
        let valid = match std::str::from_utf8(rest) {
            Ok(text) => text.len(),
            Err(e) => e.valid_up_to(),
        };
        let (text, after) = rest.split_at_checked(valid)?;
        units.extend(std::str::from_utf8(text).ok()?.encode_utf16());
        rest = match after {
            [] => after,
            [0xed, b @ 0xa0..=0xbf, c @ 0x80..=0xbf, more @ ..] => {
                units.push(0xd000 | u16::from(b & 0x3f) << 6 | u16::from(c & 0x3f));
                more
            }
            _ => return None,
        };
    }
    Some(units)
}

/// The upper case of a unit where that is one unit as well.
pub(super) fn upper(unit: u16) -> u16 {
    let Some(c) = char::from_u32(u32::from(unit)) else { return unit };
    let mut upper = c.to_uppercase();
    match (upper.next().map(u32::from), upper.next()) {
        (Some(one), None) => u16::try_from(one).unwrap_or(unit),
        _ => unit,
    }
}

/// Numbers as they are on disk, the lowest byte first.
pub(super) fn units(bytes: &[u8]) -> impl Iterator<Item = u16> {
    bytes.chunks_exact(2).map(|unit| le16(unit, 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_back() {
        let names: [&[u16]; 4] =
            [&[], &[0x61, 0xe4, 0x20ac], &[0xd83d, 0xde00], &[0x61, 0xd83d, 0x62, 0xde00]];
        for name in names {
            assert_eq!(from_bytes(&to_bytes(name.iter().copied())).as_deref(), Some(name));
        }
        assert_eq!(to_bytes([0xd83d, 0xde00]), "\u{1f600}".as_bytes());
        assert_eq!(to_bytes([0xd83d]), [0xed, 0xa0, 0xbd]);
        for bad in [&b"\xff"[..], b"a\xed", b"a\xed\xa0", b"\xc0\x80", b"\xed\x9f", b"\xc3"] {
            assert_eq!(from_bytes(bad), None);
        }
    }

    #[test]
    fn upper_case_is_one_unit_or_the_same() {
        let uppers = "aZ\u{e4}\u{df}\u{3b1}\u{ff}".encode_utf16().map(upper);
        assert_eq!(
            String::from_utf16_lossy(&uppers.collect::<Vec<_>>()),
            "AZ\u{c4}\u{df}\u{391}\u{178}"
        );
        assert_eq!(upper(0xd83d), 0xd83d);
        assert!(units(&[1, 2, 3, 4, 5]).eq([0x201, 0x403]));
    }
}
