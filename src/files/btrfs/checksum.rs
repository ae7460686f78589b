//! The four checksums that btrfs can have.

use blake2::digest::consts::U32;
use blake2::{Blake2b, Digest};
use sha2::Sha256;

use super::super::crc::crc32c;

/// Which one a file system has, by the number in its superblock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Checksum {
    /// 0
    Crc32c,
    /// 1
    Xxhash64,
    /// 2
    Sha256,
    /// 3: BLAKE2b with 256 bits
    Blake2b,
}

impl Checksum {
    /// The one with this number.
    pub(super) fn of(number: u16) -> Option<Checksum> {
        Some(match number {
            0 => Checksum::Crc32c,
            1 => Checksum::Xxhash64,
            2 => Checksum::Sha256,
            3 => Checksum::Blake2b,
            _ => return None,
        })
    }

    /// Its name, as mkfs.btrfs takes it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Checksum::Crc32c => "crc32c",
            Checksum::Xxhash64 => "xxhash64",
            Checksum::Sha256 => "sha256",
            Checksum::Blake2b => "blake2b",
        }
    }

    /// Bytes that it takes.
    pub(super) fn len(self) -> usize {
        match self {
            Checksum::Crc32c => 4,
            Checksum::Xxhash64 => 8,
            Checksum::Sha256 | Checksum::Blake2b => 32,
        }
    }

    /// Whether `sum` begins with the checksum of `bytes`.
    pub(super) fn is_right(self, bytes: &[u8], sum: &[u8]) -> bool {
        sum.get(..self.len()) == Some(&self.sum(bytes))
    }

    /// The checksum of `bytes`.
    pub(super) fn sum(self, bytes: &[u8]) -> Vec<u8> {
        match self {
            Checksum::Crc32c => (!crc32c(!0, bytes)).to_le_bytes().into(),
            Checksum::Xxhash64 => twox_hash::XxHash64::oneshot(0, bytes).to_le_bytes().into(),
            Checksum::Sha256 => Sha256::digest(bytes).to_vec(),
            Checksum::Blake2b => Blake2b::<U32>::digest(bytes).to_vec(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_are_the_usual_ones() {
        let hex = |text: &str| -> Vec<u8> {
            (0..text.len() / 2)
                .map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap())
                .collect()
        };
        let abc = [
            (0, "b73f4b36"),
            (1, "990977adf52cbc44"),
            (2, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
            (3, "bddd813c634239723171ef3fee98579b94964e3bb1cb3e427262c8c068d52319"),
        ];
        for (number, sum) in abc {
            let kind = Checksum::of(number).unwrap();
            assert!(kind.is_right(b"abc", &hex(sum)), "{}", kind.name());
            assert!(!kind.is_right(b"abd", &hex(sum)) && !kind.is_right(b"abc", &[]));
        }
        assert_eq!(Checksum::of(4), None);
    }
}
