//! What is in a record: operations, of which one or more make an item.

use super::super::super::bytes::{be32, byte, le16, le32, le64, part};
use super::record::{Log, Record};
use crate::error::Result;

/// Transaction, length, who wrote it, flags.
const HEAD: usize = 12;
/// Flags of an operation.
mod flags {
    pub(super) const START: u8 = 0x1;
    pub(super) const COMMIT: u8 = 0x2;
    pub(super) const UNMOUNT: u8 = 0x20;
}
/// What a transaction begins with, and its length.
const TRANSACTION: u32 = 0x5452_414e;
const TRANSACTION_LEN: usize = 16;
/// An item that has parts of a buffer of metadata; its number of operations is behind that, and where the buffer
/// is at 8. The superblock is at 0.
const BUFFER: u16 = 0x123c;

/// Whether a record has nothing but that the file system was unmounted.
pub(super) fn is_unmount(log: &Log<'_>, record: &Record) -> Result<bool> {
    let data = log.data(record)?;
    Ok(record.count == 1 && byte(&data, 9) & flags::UNMOUNT != 0)
}

/// Whether a record has nothing but changes of the superblock.
pub(super) fn is_superblock_only(log: &Log<'_>, record: &Record) -> Result<bool> {
    if !record.little_endian {
        return Ok(false);
    }
    let data = log.data(record)?;
    Ok(all_superblock(&data, record.count))
}

fn all_superblock(data: &[u8], count: u32) -> bool {
    // How many operations of an item are still to come.
    let (mut at, mut left) = (0, 0u16);
    for _ in 0..count {
        let (len, flags) = (be32(data, at + 4) as usize, byte(data, at + 9));
        let body = part(data, at + HEAD, len);
        if at + HEAD > data.len() || body.len() < len {
            return false;
        }
        at += HEAD + len;
        let is_begin = len == TRANSACTION_LEN && le32(body, 0) == TRANSACTION;
        let is_mark = len == 0 && matches!(flags, flags::START | flags::COMMIT | flags::UNMOUNT);
        match () {
            () if left == 0 && (is_mark || is_begin) => {}
            // One that goes on in another record.
            () if flags != 0 => return false,
            () if left > 0 => left -= 1,
            () if le16(body, 0) == BUFFER && len >= 16 && le64(body, 8) == 0 => {
                left = le16(body, 2).saturating_sub(1);
            }
            () => return false,
        }
    }
    left == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn operation(flags: u8, body: &[u8]) -> Vec<u8> {
        let mut all = vec![0, 0, 0, 7];
        all.extend((body.len() as u32).to_be_bytes());
        all.extend([0x69, flags, 0, 0]);
        all.extend(body);
        all
    }

    fn item(kind: u16, place: u64) -> Vec<u8> {
        let mut body = kind.to_le_bytes().to_vec();
        body.extend(2u16.to_le_bytes());
        body.extend([0; 4]);
        body.extend(place.to_le_bytes());
        operation(0, &body)
    }

    #[test]
    fn only_the_superblock_is_nothing_lost() {
        let begin = operation(0, &[0x4e, 0x41, 0x52, 0x54, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        let with = |item: Vec<u8>, data: &[u8]| {
            let all =
                [operation(1, &[]), begin.clone(), item, operation(0, data), operation(2, &[])];
            all.concat()
        };
        let idle = with(item(BUFFER, 0), &[1; 128]);
        assert!(all_superblock(&idle, 5));
        // Cut, more than there is, another buffer, another kind, one that goes on elsewhere.
        assert!(!all_superblock(&idle[..idle.len() - 1], 5));
        assert!(!all_superblock(&idle, 6));
        assert!(!all_superblock(&idle, 3));
        assert!(!all_superblock(&with(item(BUFFER, 8), &[1; 128]), 5));
        assert!(!all_superblock(&with(item(0x123b, 0), &[1; 128]), 5));
        let mut goes_on = idle.clone();
        let last = goes_on.len() - 3;
        goes_on[last] = 4;
        assert!(!all_superblock(&goes_on, 5));
        let mut long = idle;
        long[4..8].fill(0xff);
        assert!(!all_superblock(&long, 5));
    }
}
