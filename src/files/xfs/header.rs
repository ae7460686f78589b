//! What all metadata of version 5 has: a checksum, where it belongs and whose it is. Where the fields are differs.

use super::super::bytes::{be64, le32, part};
use super::super::crc::crc32c;

/// Where the fields are in a kind of block.
#[derive(Debug, Clone, Copy)]
pub(super) struct Header {
    crc: usize,
    /// The block's own address, in units of 512 bytes.
    place: usize,
    uuid: usize,
    /// The inode that it belongs to.
    owner: usize,
}

/// Of a block of a map's tree.
pub(super) const MAP: Header = Header { crc: 64, place: 24, uuid: 40, owner: 56 };
/// Of a block with the entries of a folder.
pub(super) const ENTRIES: Header = Header { crc: 4, place: 8, uuid: 24, owner: 40 };
/// Of a block of a hash index, or a leaf of attributes.
pub(super) const INDEX: Header = Header { crc: 12, place: 16, uuid: 32, owner: 48 };
/// Of what is outside: the text of a link, the value of an attribute.
pub(super) const OUTSIDE: Header = Header { crc: 12, place: 40, uuid: 16, owner: 32 };

impl Header {
    /// What is wrong with a block that should be at byte `at` and belong to `owner`; `None` if it is right.
    pub(super) fn wrong(
        &self,
        bytes: &[u8],
        uuid: &[u8; 16],
        at: u64,
        owner: u64,
    ) -> Option<&'static str> {
        match () {
            () if !checksum_is_right(bytes, self.crc) => Some("bad checksum"),
            () if part(bytes, self.uuid, 16) != uuid => Some("another file system's UUID"),
            () if be64(bytes, self.place) != at / 512 => Some("wrong block number"),
            () if be64(bytes, self.owner) != owner => Some("wrong owner"),
            () => None,
        }
    }

    /// Gives a block its fields: for tests.
    #[cfg(test)]
    pub(super) fn seal(&self, bytes: &mut [u8], uuid: &[u8; 16], at: u64, owner: u64) {
        bytes[self.place..self.place + 8].copy_from_slice(&(at / 512).to_be_bytes());
        bytes[self.owner..self.owner + 8].copy_from_slice(&owner.to_be_bytes());
        bytes[self.uuid..self.uuid + 16].copy_from_slice(uuid);
        let crc = le_checksum(bytes, self.crc);
        bytes[self.crc..self.crc + 4].copy_from_slice(&crc.to_le_bytes());
    }
}

/// Whether the checksum at `at` is that of all bytes, itself taken as zero.
pub(super) fn checksum_is_right(bytes: &[u8], at: usize) -> bool {
    le_checksum(bytes, at) == le32(bytes, at)
}

/// What the checksum at `at` should be. Alone among all numbers it has its lowest byte first.
pub(super) fn le_checksum(bytes: &[u8], at: usize) -> u32 {
    let crc = crc32c(!0, part(bytes, 0, at));
    let crc = crc32c(crc, &[0; 4]);
    !crc32c(crc, part(bytes, at + 4, bytes.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_field_of_each_kind_is_looked_at() {
        for header in [MAP, ENTRIES, INDEX, OUTSIDE] {
            let (mut bytes, id) = (vec![7; 512], [3; 16]);
            header.seal(&mut bytes, &id, 8192, 131);
            let wrong = |b: &[u8], id: &[u8; 16], at, owner| header.wrong(b, id, at, owner);
            assert_eq!(wrong(&bytes, &id, 8192, 131), None);
            assert_eq!(wrong(&bytes, &id, 8192, 130), Some("wrong owner"));
            assert_eq!(wrong(&bytes, &id, 4096, 131), Some("wrong block number"));
            assert_eq!(wrong(&bytes, &[4; 16], 8192, 131), Some("another file system's UUID"));
            for at in [0, 63, 100, 511] {
                let mut broken = bytes.clone();
                broken[at] ^= 1;
                assert_eq!(wrong(&broken, &id, 8192, 131), Some("bad checksum"), "{at}");
            }
        }
    }
}
