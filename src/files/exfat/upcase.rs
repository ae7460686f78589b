//! The table by which names are compared: the upper case of each UTF-16 unit.

use super::super::bytes::le16;
use super::super::utf16;

/// The table; without one, Unicode's upper case.
#[derive(Default)]
pub(super) struct Upper(Vec<u16>);

impl Upper {
    /// Bytes of the longest table, on disk and here.
    pub(super) const MAX_BYTES: u64 = 128 << 10;
    /// In a table that is compressed: so many units stand for themselves.
    const SAME: u16 = 0xffff;

    /// The table in these bytes.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(super) fn new(bytes: &[u8], sum: u32) -> Result<Upper, &'static str> {
        let right =
            bytes.iter().fold(0u32, |sum, b| sum.rotate_right(1).wrapping_add(u32::from(*b)));
        if right != sum {
            return Err("bad checksum");
        }
        let mut table: Vec<u16> = Vec::new();
        let mut at = 0;
        while at + 1 < bytes.len() && table.len() < 65536 {
            let unit = le16(bytes, at);
            at += 2;
            if unit == Upper::SAME && at + 1 < bytes.len() {
                let from = table.len();
                let end = (from + usize::from(le16(bytes, at))).min(65536);
                table.extend((from..end).map(|u| u as u16));
                at += 2;
            } else {
                table.push(unit);
            }
        }
        Ok(Upper(table))
    }

    /// A name as it is compared.
    pub(super) fn of(&self, name: &[u16]) -> Vec<u16> {
        let upper = |u: &u16| match self.0.is_empty() {
            true => utf16::upper(*u),
            false => self.0.get(usize::from(*u)).copied().unwrap_or(*u),
        };
        name.iter().map(upper).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_compressed_table_is_spread() {
        let units = [0xffff, 0x61, 0x41, 0x42, 0xffff, 0xffff];
        let bytes: Vec<u8> = units.iter().flat_map(|u: &u16| u.to_le_bytes()).collect();
        let sum = bytes.iter().fold(0u32, |s, b| s.rotate_right(1).wrapping_add(u32::from(*b)));
        let table = Upper::new(&bytes, sum).unwrap();
        assert_eq!(table.of(&[0x60, 0x61, 0x62, 0x63, 0xfffe]), [0x60, 0x41, 0x42, 0x63, 0xfffe]);
        assert!(Upper::new(&bytes, sum ^ 1).is_err());
        assert_eq!(Upper::default().of(&[0x61, 0xe4]), [0x41, 0xc4]);
    }
}
