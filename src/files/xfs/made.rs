//! A small file system made by hand, for the tests of each part: blocks of 1 KiB, two allocation groups with 128 and
//! 72 of them, inodes of 512 bytes, and folders in blocks of 2 KiB.

use std::sync::Arc;

use super::super::blocks::Blocks;
use super::super::source::Source;
use super::header::{Header, le_checksum};
use super::inode::Inode;
use super::superblock::seal;
use super::volume::Volume;
use crate::error::Result;
use crate::storage::MemStorage;

/// Its UUID.
pub(super) const UUID: [u8; 16] = [0x5a; 16];
const BLOCK: usize = 1024;
/// The inode that blocks of metadata belong to.
pub(super) const OWNER: u64 = 9;

/// The bytes of one.
pub(super) struct Made {
    pub bytes: Vec<u8>,
    pub v5: bool,
}

impl Made {
    /// One without files.
    pub(super) fn new(v5: bool) -> Made {
        let mut made = Made { bytes: vec![0; 200 * BLOCK], v5 };
        made.put(0, b"XFSB");
        made.number(4, 4, BLOCK as u64);
        made.number(8, 8, 200);
        made.put(32, &UUID);
        made.number(48, 8, 100);
        made.number(56, 8, 8);
        made.number(64, 8, 20);
        made.number(84, 4, 128);
        made.number(88, 4, 2);
        made.number(96, 4, 16);
        made.number(100, 2, if v5 { 0xb4a5 } else { 0xb484 });
        made.number(102, 2, 512);
        made.number(104, 2, 512);
        made.number(106, 2, 2);
        made.put(108, b"label");
        made.put(120, &[10, 9, 9, 1, 7]);
        made.number(128, 8, 64);
        made.number(136, 8, 60);
        made.put(192, &[1]);
        made.number(200, 4, 0x8a);
        made.number(216, 4, u64::from(v5));
        made
    }

    /// Puts bytes somewhere.
    pub(super) fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Puts a number of `len` bytes somewhere.
    pub(super) fn number(&mut self, at: usize, len: usize, value: u64) {
        self.put(at, &value.to_be_bytes()[8 - len..]);
    }

    /// Puts blocks of metadata at block `block`, with the fields of version 5, if it is one.
    pub(super) fn block(&mut self, block: usize, header: Header, mut bytes: Vec<u8>) {
        let at = block * BLOCK;
        if self.v5 {
            header.seal(&mut bytes, &UUID, at as u64, OWNER);
        }
        self.put(at, &bytes);
    }

    /// The open file system.
    pub(super) fn volume(mut self) -> Volume {
        self.open().unwrap_or_else(|e| panic!("{e}"))
    }

    /// What opening it says.
    pub(super) fn open(&mut self) -> Result<Volume> {
        if self.v5 {
            seal(&mut self.bytes[..512]);
        }
        let disk = Arc::new(MemStorage::new("disk", self.bytes.clone()));
        Volume::new(Source::new(disk, "disk", &Blocks::new(1 << 20)))
    }
}

/// What an inode is made of: for each form of a fork.
#[derive(Clone, Copy)]
pub(super) struct Parts<'a> {
    pub mode: u16,
    /// `di_format`, and that of attributes.
    pub forms: [u8; 2],
    pub size: u64,
    /// How many extents each says that it has.
    pub extents: [u16; 2],
    pub data: &'a [u8],
    pub attributes: &'a [u8],
}

/// A file whose fork is a list of extents.
pub(super) const FILE: Parts<'static> = Parts {
    mode: 0o100_644,
    forms: [2, 2],
    size: 10_000,
    extents: [0, 0],
    data: &[],
    attributes: &[],
};

/// The bytes of an inode, with its checksum.
pub(super) fn raw_inode(v5: bool, number: u64, parts: Parts<'_>) -> Vec<u8> {
    let mut raw = vec![0; 512];
    let mut put = |at: usize, bytes: &[u8]| raw[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"IN");
    put(2, &parts.mode.to_be_bytes());
    put(4, &[if v5 { 3 } else { 2 }, parts.forms[0]]);
    put(19, &[1]);
    put(56, &parts.size.to_be_bytes());
    put(78, &parts.extents[0].to_be_bytes());
    put(80, &parts.extents[1].to_be_bytes());
    let begin = if v5 { 176 } else { 100 };
    put(begin, parts.data);
    if !parts.attributes.is_empty() {
        // Attributes in the last 160 bytes and a few.
        put(82, &[(336 / 8) as u8 - 22]);
        put(begin + 8 * (336 / 8 - 22), parts.attributes);
    }
    put(83, &[parts.forms[1]]);
    if v5 {
        put(152, &number.to_be_bytes());
        put(160, &UUID);
        let crc = le_checksum(&raw, 100);
        raw[100..104].copy_from_slice(&crc.to_le_bytes());
    }
    raw
}

/// An inode as it was read.
pub(super) fn inode(v5: bool, parts: Parts<'_>) -> Inode {
    Inode::new(OWNER, 4608, raw_inode(v5, OWNER, parts))
}

/// An extent: the file's block, the fsblock, how many, and whether it was written.
pub(super) fn extent(begin: u64, place: u64, count: u64, written: bool) -> [u8; 16] {
    let high = u64::from(!written) << 63 | begin << 9 | place >> 43;
    let low = place << 21 | count;
    let mut all = [0; 16];
    all[..8].copy_from_slice(&high.to_be_bytes());
    all[8..].copy_from_slice(&low.to_be_bytes());
    all
}
