//! Update sequence arrays: the last two bytes of each 512 of a record are kept elsewhere in it, and have one number
//! instead. Where that number differs, a part of the record was not written: it is torn.

use super::super::bytes::{le16, part};
use super::boot::STRIDE;

/// Puts the kept bytes back.
///
/// # Errors
/// In words, what is wrong with the record.
pub(super) fn apply(bytes: &mut [u8], magic: &[u8; 4]) -> Result<(), &'static str> {
    if part(bytes, 0, 4) == b"BAAD" {
        return Err("is marked as torn by the guest (BAAD)");
    }
    if part(bytes, 0, 4) != magic {
        return Err("has a wrong magic number");
    }
    let (at, count) = (usize::from(le16(bytes, 4)), usize::from(le16(bytes, 6)));
    let strides = bytes.len() / STRIDE;
    // It is before the end of the first stride, or it would protect itself.
    if count != strides + 1 || !at.is_multiple_of(2) || at + 2 * count > STRIDE - 2 {
        return Err("has an invalid update sequence array");
    }
    let kept = part(bytes, at, 2 * count).to_vec();
    let (number, kept) = kept.split_at(2);
    for (chunk, kept) in bytes.chunks_exact_mut(STRIDE).zip(kept.chunks_exact(2)) {
        match chunk.last_chunk_mut::<2>() {
            Some(end) if end == number => end.copy_from_slice(kept),
            _ => return Err("is torn: it was only partly written (update sequence)"),
        }
    }
    Ok(())
}

/// Protects a record whose array is at `at`.
#[cfg(test)]
pub(super) fn protect(bytes: &mut [u8], magic: &[u8; 4], at: usize) {
    let strides = bytes.len() / STRIDE;
    bytes[..4].copy_from_slice(magic);
    bytes[4..6].copy_from_slice(&(at as u16).to_le_bytes());
    bytes[6..8].copy_from_slice(&(strides as u16 + 1).to_le_bytes());
    bytes[at..at + 2].copy_from_slice(&[7, 0]);
    for i in 0..strides {
        let end = (i + 1) * STRIDE - 2;
        let kept = [bytes[end], bytes[end + 1]];
        bytes[at + 2 + 2 * i..at + 4 + 2 * i].copy_from_slice(&kept);
        bytes[end..end + 2].copy_from_slice(&[7, 0]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kept_bytes_come_back_and_torn_records_are_told() {
        let plain: Vec<u8> = (0..1024u32).map(|i| (i % 251) as u8).collect();
        let mut stored = plain.clone();
        protect(&mut stored, b"FILE", 48);
        let mut read = stored.clone();
        apply(&mut read, b"FILE").unwrap();
        assert_eq!(read[100..], plain[100..]);
        assert!(apply(&mut stored.clone(), b"INDX").is_err());
        for at in [510, 1023] {
            let mut torn = stored.clone();
            torn[at] ^= 1;
            assert!(apply(&mut torn, b"FILE").unwrap_err().contains("torn"));
        }
        // An array that reaches into what it protects, or is too short.
        let mut wrong = stored.clone();
        wrong[4..6].copy_from_slice(&506u16.to_le_bytes());
        assert!(apply(&mut wrong, b"FILE").is_err());
        wrong = stored;
        wrong[6] = 2;
        assert!(apply(&mut wrong, b"FILE").is_err());
    }
}
