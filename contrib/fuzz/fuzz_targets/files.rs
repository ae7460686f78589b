//! A whole disk from hostile bytes: partition table, volumes, and every file system in them. Everything is walked
//! through and read; nothing panics, hangs or takes more memory than the cache is allowed.
//!
//! An input is how many sectors the disk has, and pieces of it: the first sector, how many, and their bytes (numbers
//! of 4, 4 and 2 bytes, the lowest first). All else is zeros, so that a small input makes a file system of any size.
//! Checksums are put right before it is read: no change would get behind them.
#![no_main]

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;

use fleecefs::error::{Error, Kind, Result};
use fleecefs::files::{At, Blocks, NodeKind, Source, Tree, Visitor, open_tree, volumes_of, walk};
use fleecefs::storage::ReadAt;

/// Memory for all readers.
const CACHE: u64 = 8 << 20;
/// Things that are looked at, and bytes read of a file from each end.
const NODES: usize = 2000;
const BYTES: u64 = 64 << 10;
const SECTOR: usize = 512;
/// Sectors of the largest disk: 1 TiB.
const MAX_SECTORS: u64 = 1 << 31;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Some(mut disk) = Disk::new(bytes) else { return };
    disk.seal();
    let blocks = Blocks::new(CACHE);
    let disk = Source::new(Arc::new(disk), "disk", &blocks);
    let Ok((volumes, _)) = volumes_of(&disk, Vec::new) else { return };
    for volume in volumes.iter().take(8) {
        let Ok(tree) = open_tree(volume) else { continue };
        let mut look = Look { tree: &*tree, left: NODES };
        let _ = walk(&*tree, tree.root(), &mut look);
        let _ = tree.statistics();
        let _ = tree.findings().list();
        assert!(blocks.used() <= CACHE);
    }
});

/// A disk that is mostly zeros.
struct Disk {
    len: u64,
    sectors: BTreeMap<u64, [u8; SECTOR]>,
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b))
}

impl Disk {
    fn new(bytes: &[u8]) -> Option<Disk> {
        let (len, mut rest) = bytes.split_at_checked(4)?;
        let len = number(len).min(MAX_SECTORS) * SECTOR as u64;
        let mut sectors = BTreeMap::new();
        while let Some((head, more)) = rest.split_at_checked(6) {
            let count = (number(&head[4..]) as usize).min(more.len() / SECTOR);
            let (data, next) = more.split_at(count * SECTOR);
            for (i, sector) in data.chunks_exact(SECTOR).enumerate() {
                sectors.insert(number(&head[..4]) + i as u64, sector.try_into().ok()?);
            }
            rest = next;
        }
        Some(Disk { len, sectors })
    }

    /// `count` sectors from `first` on.
    fn get(&self, first: u64, count: u64) -> Vec<u8> {
        let one = |i| self.sectors.get(&i).copied().unwrap_or([0; SECTOR]);
        (first..first + count).flat_map(one).collect()
    }

    fn put(&mut self, first: u64, bytes: &[u8]) {
        for (i, sector) in bytes.chunks_exact(SECTOR).enumerate() {
            self.sectors.insert(first + i as u64, sector.try_into().unwrap_or([0; SECTOR]));
        }
    }

    /// Gives what has a checksum at a known place its right one.
    fn seal(&mut self) {
        let all: Vec<u64> = self.sectors.keys().copied().collect();
        self.seal_btrfs(&all);
        for first in [0, 12] {
            self.seal_exfat_boot(first);
        }
        for at in all {
            let mut sector = self.get(at, 1);
            let is_inode = sector.starts_with(b"IN") && sector[4] == 3;
            if is_inode || sector.starts_with(b"XFSB") {
                seal_crc(&mut sector, if is_inode { 100 } else { 224 });
            }
            seal_sets(&mut sector);
            self.put(at, &sector);
        }
    }

    /// The superblock of btrfs and all nodes: of a node's size, wherever the file system's id is.
    fn seal_btrfs(&mut self, all: &[u64]) {
        const SUPER: u64 = 128;
        let mut sup = self.get(SUPER, 8);
        if &sup[0x40..0x48] != b"_BHRfS_M" || sup[0xc4..0xc6] != [0, 0] {
            return;
        }
        let node = (number(&sup[0x94..0x98]) / SECTOR as u64).clamp(1, 128);
        let id = sup[0x20..0x30].to_vec();
        let sum = crc32c(&sup[32..]).to_le_bytes();
        sup[..4].copy_from_slice(&sum);
        for at in all.iter().filter(|at| **at != SUPER) {
            if self.sectors.get(at).is_some_and(|s| s[0x20..0x30] == id) {
                let mut bytes = self.get(*at, node);
                let sum = crc32c(&bytes[32..]).to_le_bytes();
                bytes[..4].copy_from_slice(&sum);
                self.put(*at, &bytes);
            }
        }
        self.put(SUPER, &sup);
    }

    /// Eleven sectors of a boot region of exFAT, and the one with their checksum.
    fn seal_exfat_boot(&mut self, first: u64) {
        let bytes = self.get(first, 11);
        if &bytes[3..8] == b"EXFAT" {
            let kept = bytes.iter().enumerate().filter(|(i, _)| ![106, 107, 112].contains(i));
            let sum = kept.fold(0u32, |s, (_, b)| s.rotate_right(1).wrapping_add((*b).into()));
            let sums: Vec<u8> = sum.to_le_bytes().repeat(SECTOR / 4);
            self.put(first + 11, &sums);
        }
    }
}

/// CRC-32C, bit by bit.
fn crc32c(bytes: &[u8]) -> u32 {
    let step = |crc: u32| (crc >> 1) ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 };
    !bytes.iter().fold(!0, |crc, b| (0..8).fold(crc ^ u32::from(*b), |crc, _| step(crc)))
}

fn seal_crc(bytes: &mut [u8], at: usize) {
    bytes[at..at + 4].fill(0);
    let sum = crc32c(bytes).to_le_bytes();
    bytes[at..at + 4].copy_from_slice(&sum);
}

/// Entry sets of exFAT that are all in this sector.
fn seal_sets(sector: &mut [u8]) {
    for at in (0..SECTOR).step_by(32) {
        let len = 32 * (1 + usize::from(sector[at + 1]));
        let is_set = sector[at] == 0x85 && sector.get(at + 32) == Some(&0xc0);
        let Some(set) = sector.get_mut(at..at + len).filter(|_| is_set) else { continue };
        let others = set.iter().enumerate().filter(|(i, _)| !(2..4).contains(i));
        let sum = others.fold(0u16, |s, (_, b)| s.rotate_right(1).wrapping_add((*b).into()));
        set[2..4].copy_from_slice(&sum.to_le_bytes());
    }
}

impl ReadAt for Disk {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let n = (buf.len() as u64).min(self.len.saturating_sub(offset)) as usize;
        buf[..n].fill(0);
        let (first, end) = (offset / SECTOR as u64, (offset + n as u64).div_ceil(SECTOR as u64));
        for (at, sector) in self.sectors.range(first..end) {
            for (i, byte) in sector.iter().enumerate() {
                let to = (at * SECTOR as u64 + i as u64).checked_sub(offset);
                if let Some(to) = to.and_then(|to| buf[..n].get_mut(to as usize)) {
                    *to = *byte;
                }
            }
        }
        Ok(n)
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn name(&self) -> &Path {
        Path::new("disk")
    }
}

struct Look<'a> {
    tree: &'a dyn Tree,
    left: usize,
}

impl Look<'_> {
    fn count(&mut self) -> Result<()> {
        self.left = self.left.checked_sub(1).ok_or_else(|| Error::new(Kind::Interrupted, "enough"))?;
        Ok(())
    }

    fn file(&self, at: &At<'_>) -> Result<()> {
        let file = self.tree.open(at.node)?;
        let mut buf = vec![0; BYTES as usize];
        for offset in [0, file.size().saturating_sub(BYTES)] {
            let n = file.read_at(&mut buf, offset)?;
            assert!(n as u64 <= file.size() - offset);
        }
        let mut offset = 0;
        for _ in 0..256 {
            let Some(stretch) = file.stretch(offset)? else { break };
            assert!(stretch.end > offset && stretch.end <= file.size());
            offset = stretch.end;
        }
        Ok(())
    }
}

impl Visitor for Look<'_> {
    fn enter(&mut self, at: &At<'_>) -> Result<bool> {
        self.count()?;
        let _ = self.tree.xattrs(at.node);
        let _ = self.tree.lookup(at.node, b"etc");
        Ok(true)
    }

    fn node(&mut self, at: &At<'_>) -> Result<()> {
        self.count()?;
        assert!(!at.name.contains(&b'/') && !at.name.contains(&0) && at.name != b"..");
        let _ = self.tree.xattrs(at.node);
        let _ = match at.attributes.kind {
            NodeKind::File => self.file(at),
            NodeKind::Link => self.tree.read_link(at.node).map(drop),
            _ => Ok(()),
        };
        Ok(())
    }

    fn failed(&mut self, _: &[u8], _: Error) -> Result<()> {
        self.count()
    }
}
