//! Archives made by hand, right and wrong ones.

use std::io::Write;

use md5::{Digest, Md5};

use super::header::{BLOCK, CLUSTER};
use super::*;
use crate::layer::Mapping;
use crate::layer::testing::{pattern, read_onto};
use crate::storage::MemStorage;

const UUID: [u8; 16] = *b"0123456789abcdef";

/// What an archive is made of; the tests spoil it before it is written.
struct Made {
    devices: Vec<(u8, Vec<u8>, Vec<u8>)>,
    /// Claimed sizes, where they differ from the data's.
    sizes: Vec<u64>,
    config: Option<(u32, u32)>,
    /// Slots of each extent, with the blocks they store.
    extents: Vec<Vec<(u64, Vec<u8>)>>,
    version: u32,
}

fn slot(device: u8, cluster: u32, data: &[u8]) -> (u64, Vec<u8>) {
    let (mut mask, mut stored) = (0u64, Vec::new());
    for (bit, block) in data.chunks(BLOCK as usize).enumerate() {
        if block.iter().any(|b| *b != 0) {
            mask |= 1 << bit;
            stored.extend_from_slice(block);
            stored.resize(stored.len().next_multiple_of(BLOCK as usize), 0);
        }
    }
    (mask << 48 | u64::from(device) << 32 | u64::from(cluster), stored)
}

impl Made {
    /// Disks in order, `per_extent` clusters to an extent.
    fn new(disks: &[(u8, &str, Vec<u8>)], per_extent: usize) -> Made {
        let mut slots = Vec::new();
        for (id, _, data) in disks {
            let clusters = (0..).zip(data.chunks(CLUSTER as usize));
            slots.extend(clusters.map(|(n, cluster)| slot(*id, n, cluster)));
        }
        let named = |(id, name, data): &(u8, &str, Vec<u8>)| {
            (*id, [name.as_bytes(), b"\0"].concat(), data.clone())
        };
        Made {
            sizes: disks.iter().map(|d| d.2.len() as u64).collect(),
            devices: disks.iter().map(named).collect(),
            config: None,
            extents: slots.chunks(per_extent).map(<[_]>::to_vec).collect(),
            version: 1,
        }
    }

    fn header(&self) -> Vec<u8> {
        let mut h = vec![0; header::FIXED];
        h[..4].copy_from_slice(&header::MAGIC);
        h[4..8].copy_from_slice(&self.version.to_be_bytes());
        h[8..24].copy_from_slice(&UUID);
        h[24..32].copy_from_slice(&1_700_000_000i64.to_be_bytes());
        h[48..52].copy_from_slice(&(header::FIXED as u32).to_be_bytes());
        let mut blobs = vec![0];
        for ((id, name, _), size) in self.devices.iter().zip(&self.sizes) {
            let at = 4096 + usize::from(*id) * 32;
            h[at..at + 4].copy_from_slice(&(blobs.len() as u32).to_be_bytes());
            h[at + 8..at + 16].copy_from_slice(&size.to_be_bytes());
            blobs.extend((name.len() as u16).to_le_bytes());
            blobs.extend(name);
        }
        if let Some((name, data)) = self.config {
            h[2044..2048].copy_from_slice(&name.to_be_bytes());
            h[3068..3072].copy_from_slice(&data.to_be_bytes());
        }
        h[52..56].copy_from_slice(&(blobs.len() as u32).to_be_bytes());
        h.extend(blobs);
        h.resize(h.len().next_multiple_of(512), 0);
        let len = h.len() as u32;
        h[56..60].copy_from_slice(&len.to_be_bytes());
        seal(&mut h, 32);
        h
    }

    fn bytes(&self) -> Vec<u8> {
        let mut out = self.header();
        for slots in &self.extents {
            let blocks: usize = slots.iter().map(|s| s.1.len() / BLOCK as usize).sum();
            let mut e = vec![0; 512];
            e[..4].copy_from_slice(b"VMAE");
            e[6..8].copy_from_slice(&(blocks as u16).to_be_bytes());
            e[8..24].copy_from_slice(&UUID);
            for (i, (info, _)) in slots.iter().enumerate() {
                e[40 + i * 8..48 + i * 8].copy_from_slice(&info.to_be_bytes());
            }
            seal(&mut e, 24);
            out.extend(e);
            slots.iter().for_each(|s| out.extend(&s.1));
        }
        out
    }
}

/// Writes the MD5 sum of `block` at `at`.
fn seal(block: &mut [u8], at: usize) {
    block[at..at + 16].fill(0);
    let sum = Md5::digest(&*block);
    block[at..at + 16].copy_from_slice(&sum);
}

fn open_bytes(bytes: Vec<u8>) -> Result<Arc<Archive>> {
    Archive::open(Arc::new(MemStorage::new("a.vma", bytes))).map(Arc::new)
}

fn disk(archive: &Arc<Archive>, id: u8) -> Result<Vec<u8>> {
    read_onto(&VmaLayer::new(archive.clone(), id)?, Vec::new(), 100_000)
}

fn two_disks() -> Made {
    let (a, b) = (pattern(300_000, 2), pattern(65536 * 2 + 512, 4));
    Made::new(&[(1, "drive-scsi0", a), (7, "drive-efidisk0", b)], 3)
}

fn small() -> Made {
    let mut data = vec![0; 65536 + 4096];
    data[4096..8192].fill(5);
    data[65536..].fill(6);
    Made::new(&[(1, "drive-scsi0", data)], 1)
}

#[test]
fn disks_read_right_in_any_order_of_clusters() {
    let mut made = two_disks();
    for reversed in [false, true] {
        if reversed {
            made.extents.reverse();
            made.extents.iter_mut().for_each(|e| e.reverse());
            // An unused slot in between is skipped.
            made.extents[0].insert(1, (0, Vec::new()));
        }
        let archive = open_bytes(made.bytes()).unwrap();
        assert_eq!(archive.header.time, 1_700_000_000);
        for (id, _, data) in &made.devices {
            assert!(disk(&archive, *id).unwrap() == *data, "{id} {reversed}");
        }
        assert_eq!(disk(&archive, 2).unwrap_err().kind(), Kind::NotFound);
    }
}

#[test]
fn unstored_blocks_are_zero_and_stored_ones_are_plain_data() {
    let archive = open_bytes(small().bytes()).unwrap();
    let layer = VmaLayer::new(archive, 1).unwrap();
    use crate::layer::Mapping::{Data, Zero};
    let kinds: Vec<_> =
        layer.map(0..layer.size()).extents.as_slice().iter().map(|e| (e.len, e.content)).collect();
    let first = 12800 + 512;
    let second = first + 4096 + 512;
    assert_eq!(
        kinds,
        [
            (4096, Zero),
            (4096, Data { file: 0, host: first }),
            (65536 - 8192, Zero),
            (4096, Data { file: 0, host: second })
        ]
    );
}

/// What can be read of a device that may be cut, cluster by cluster.
fn clusters(archive: &Arc<Archive>, id: u8) -> Vec<Option<Vec<u8>>> {
    let Ok(layer) = VmaLayer::new(archive.clone(), id) else { return Vec::new() };
    let read = |start: u64| {
        let range = start..(start + CLUSTER).min(layer.size());
        let map = layer.map(range.clone());
        map.extents.check(&range).unwrap();
        let mut out = vec![0; (range.end - start) as usize];
        for e in map.extents.as_slice() {
            let at = (e.start - start) as usize;
            match e.content {
                Mapping::Data { file, host } => {
                    layer.read_data(file, host, &mut out[at..at + e.len as usize]).ok()?
                }
                Mapping::Zero => {}
                _ => {
                    assert_eq!(map.findings[0].kind, Kind::Truncated);
                    return None;
                }
            }
        }
        Some(out)
    };
    (0..layer.size()).step_by(CLUSTER as usize).map(read).collect()
}

#[test]
fn of_an_archive_cut_anywhere_whole_clusters_are_served() {
    for made in [small(), two_disks()] {
        let bytes = made.bytes();
        let mut served = 0;
        for len in (0..bytes.len()).step_by(1 + bytes.len() / 20_000) {
            let archive = open_bytes(bytes[..len].to_vec());
            assert_eq!(archive.is_err(), len < 12800, "cut at {len}");
            let Ok(archive) = archive else { continue };
            assert!(archive.index.cut().is_some());
            for (id, _, want) in &made.devices {
                let got = clusters(&archive, *id);
                let known = got.iter().zip(want.chunks(CLUSTER as usize));
                for (got, want) in known.filter_map(|(got, want)| Some((got.as_ref()?, want))) {
                    assert!(got == want, "cut at {len}");
                    served += 1;
                }
            }
        }
        assert!(served > 1_000, "{served}");
    }
    // The last extent is whole, and nothing is behind it.
    let bytes = two_disks().bytes();
    let archive = open_bytes(bytes[..bytes.len() - 1].to_vec()).unwrap();
    let count = |id| clusters(&archive, id).iter().filter(|c| c.is_some()).count();
    assert_eq!((count(1), count(7)), (5, 2));
    let mut longer = bytes.clone();
    longer.extend([0; 100]);
    assert_eq!(disk(&open_bytes(longer).unwrap(), 7).unwrap(), two_disks().devices[1].2);
}

#[test]
fn a_beginning_that_was_cut_says_so() {
    // Two extents; the first has clusters of one disk only.
    let made = two_disks();
    let bytes = made.bytes();
    let blocks: usize = made.extents[0].iter().map(|s| s.1.len()).sum();
    let (header, first) = (made.header().len(), made.header().len() + 512 + blocks);
    let look = |bytes: &[u8]| read_beginning(&MemStorage::new("a.vma", bytes.to_vec()));
    for len in [header, header + 1, header + 511] {
        assert_eq!(look(&bytes[..len]).unwrap_err().kind(), Kind::Truncated, "{len}");
    }
    for len in [header + 512, header + 513, first - 1] {
        let found = look(&bytes[..len]).unwrap();
        assert_eq!(found.cut.unwrap().kind(), Kind::Truncated, "{len}");
        let nothing = len < first - 1;
        assert_eq!(found.absent, if nothing { vec![1, 7] } else { vec![7] }, "{len}");
    }
    for len in [first, first + 1, bytes.len()] {
        let found = look(&bytes[..len]).unwrap();
        assert!(found.cut.is_none() && found.absent.is_empty(), "{len}");
    }
    // Compressed: what is not whole is nothing.
    let pack = |bytes: &[u8]| zstd::encode_all(bytes, 1).unwrap();
    for len in [header, header + 1, header + 512, first - 1] {
        assert_eq!(look(&pack(&bytes[..len])).unwrap_err().kind(), Kind::Truncated, "{len}");
    }
    assert!(look(&pack(&bytes)).is_ok() && look(&pack(&bytes[..first])).is_ok());
    let mut damaged = bytes.clone();
    damaged[header + 8] ^= 1;
    assert_eq!(look(&damaged).unwrap_err().kind(), Kind::Corrupt);
}

#[test]
fn every_flipped_bit_outside_the_data_is_noticed() {
    let bytes = small().bytes();
    let second = 12800 + 512 + 4096;
    for at in (0..12800 + 512).chain(second..second + 512) {
        let mut bad = bytes.clone();
        bad[at] ^= 1 << (at % 8);
        assert!(open_bytes(bad).is_err(), "flipped at {at}");
    }
}

/// Kind of the refusal of an archive that was spoilt, all sums being right.
fn spoilt(spoil: impl FnOnce(&mut Made)) -> Option<Kind> {
    let mut made = two_disks();
    spoil(&mut made);
    open_bytes(made.bytes()).err().map(|e| {
        assert!(e.path().is_some() && e.remedy_text().is_some() || e.kind() == Kind::Unsupported);
        e.kind()
    })
}

#[test]
fn archives_that_break_a_rule_are_refused() {
    let corrupt = Some(Kind::Corrupt);
    assert_eq!(spoilt(|_| ()), None);
    assert_eq!(spoilt(|m| m.version = 2), Some(Kind::Unsupported));
    assert_eq!(spoilt(|m| m.devices[0].1 = b"a/b\0".to_vec()), corrupt);
    assert_eq!(spoilt(|m| m.devices[0].1 = b"..\0".to_vec()), corrupt);
    assert_eq!(spoilt(|m| m.devices[1].1 = m.devices[0].1.clone()), corrupt);
    assert_eq!(spoilt(|m| m.devices[0].1 = b"scsi0".to_vec()), corrupt);
    assert_eq!(spoilt(|m| m.sizes[0] = 1 << 63), corrupt);
    assert_eq!(spoilt(|m| m.sizes[0] = 0), corrupt);
    assert_eq!(spoilt(|m| m.sizes[0] -= CLUSTER), corrupt);
    assert_eq!(spoilt(|m| m.config = Some((1, 39321))), corrupt);
    assert_eq!(spoilt(|m| m.config = Some((1, 0))), corrupt);
    // What is missing may be missing at the end: then it is cut.
    let mut made = two_disks();
    made.extents[0].remove(1);
    let found = clusters(&open_bytes(made.bytes()).unwrap(), 1);
    assert_eq!(
        found.iter().map(Option::is_some).collect::<Vec<_>>(),
        [true, false, true, true, true]
    );
    made.extents.clear();
    assert!(disk(&open_bytes(made.bytes()).unwrap(), 1).is_err());
    let twice = |m: &mut Made| {
        let again = m.extents[0][0].clone();
        m.extents[1].push(again);
    };
    assert_eq!(spoilt(twice), corrupt);
    assert_eq!(spoilt(|m| m.extents[0].push(slot(9, 0, &[1; 4096]))), corrupt);
    assert_eq!(spoilt(|m| m.extents[0].push(slot(1, 5000, &[1; 4096]))), corrupt);
    // A block behind the end, inside the last cluster of the second disk.
    let wide = |m: &mut Made| m.extents[2][1] = slot(7, 2, &[1; 8192]);
    assert_eq!(spoilt(wide), corrupt);
    // One block less than the masks say.
    assert_eq!(spoilt(|m| m.extents[0][0].1.truncate(4096)), corrupt);
}

#[test]
fn an_extent_of_another_archive_or_with_reserved_bits_is_refused() {
    for at in [4, 8] {
        let mut bytes = small().bytes();
        bytes[12800 + at] ^= 1;
        seal(&mut bytes[12800..12800 + 512], 24);
        assert_eq!(open_bytes(bytes).err().map(|e| e.kind()), Some(Kind::Corrupt));
    }
}

#[test]
fn hostile_lengths_in_the_header_are_refused() {
    // blob offset, blob size, header size
    for (at, values) in [(48, [0, 0x7fff_ffff]), (52, [65536, u32::MAX]), (56, [0, 0xffff_fe00])] {
        for value in values {
            let mut bytes = small().bytes();
            bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
            seal(&mut bytes[..12800], 32);
            assert!(open_bytes(bytes).is_err(), "{at}: {value:#x}");
        }
    }
}

#[test]
fn the_ram_state_is_not_a_disk_and_may_be_shorter_than_announced() {
    let mut made = Made::new(&[(1, "d", pattern(65536, 1)), (2, "vmstate", vec![3; 65536])], 9);
    made.sizes[1] = 1 << 24;
    let archive = open_bytes(made.bytes()).unwrap();
    assert!(disk(&archive, 1).is_ok());
    assert_eq!(disk(&archive, 2).unwrap_err().kind(), Kind::NotFound);
    made.extents[0][1].0 += 1;
    assert!(open_bytes(made.bytes()).is_err());
}

/// An lzop file with one stored block and one of LZO1X data: a match makes `repeat` copies of the
/// last byte of its four literals.
fn lzop_file(bytes: &[u8]) -> Vec<u8> {
    let mut header = vec![0x10, 0x40, 0x20, 0xa0, 0x09, 0x40, 1, 5, 0, 0, 0, 1];
    header.extend([0; 13]);
    let mut out = lzop::MAGIC.to_vec();
    out.extend(&header);
    out.extend(adler(&header).to_be_bytes());
    for block in bytes.chunks(50_000) {
        out.extend((block.len() as u32).to_be_bytes());
        let mut packed = literals(block);
        if packed.len() >= block.len() {
            packed = block.to_vec();
        }
        out.extend((packed.len() as u32).to_be_bytes());
        out.extend(adler(block).to_be_bytes());
        out.extend(packed);
    }
    out.extend([0; 4]);
    out
}

/// Packs runs of zeros: literals, then one long match at distance 1.
fn literals(block: &[u8]) -> Vec<u8> {
    let zeros = block.iter().rev().take_while(|b| **b == 0).count();
    if zeros < 1000 || block.len() - zeros < 3 {
        return block.to_vec();
    }
    let head = &block[..=block.len() - zeros];
    let mut out = vec![0];
    let long = |out: &mut Vec<u8>, mut n: usize| {
        while n > 255 {
            out.push(0);
            n -= 255;
        }
        out.push(n as u8);
    };
    long(&mut out, head.len() - 3 - 15);
    out.extend(head);
    out.push(32);
    long(&mut out, zeros - 1 - 2 - 31);
    out.extend([0, 0, 17, 0, 0]);
    out
}

fn adler(bytes: &[u8]) -> u32 {
    let (mut a, mut b) = (1u64, 0u64);
    for byte in bytes {
        a = (a + u64::from(*byte)) % 65521;
        b = (b + a) % 65521;
    }
    (b << 16 | a) as u32
}

fn packed(made: &Made) -> Vec<Vec<u8>> {
    let bytes = made.bytes();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), Default::default());
    gzip.write_all(&bytes).unwrap();
    let mut zst = zstd::Encoder::new(Vec::new(), 1).unwrap();
    zst.include_checksum(true).unwrap();
    zst.write_all(&bytes).unwrap();
    vec![gzip.finish().unwrap(), zst.finish().unwrap(), lzop_file(&bytes)]
}

#[test]
fn compressed_archives_read_like_plain_ones() {
    let made = two_disks();
    for file in packed(&made) {
        let storage = MemStorage::new("a.vma.x", file.clone());
        assert_eq!(read_beginning(&storage).unwrap().header.devices.len(), 2);
        let archive = open_bytes(file).unwrap();
        for (id, _, data) in &made.devices {
            assert!(disk(&archive, *id).unwrap() == *data);
        }
    }
}

#[test]
fn compressed_archives_that_are_damaged_never_give_other_bytes() {
    let made = small();
    let want = &made.devices[0].2;
    for file in packed(&made) {
        // Every place of a small file, and some of a large one.
        for at in (0..file.len()).step_by(1 + file.len() / 1500) {
            assert!(open_bytes(file[..at].to_vec()).is_err(), "cut at {at}");
            let mut bad = file.clone();
            bad[at] ^= 1 << (at % 8);
            // Some bits mean nothing (times, names): then the disk is what it was.
            if let Ok(archive) = open_bytes(bad) {
                assert!(disk(&archive, 1).unwrap() == *want, "flipped at {at}");
            }
        }
    }
    let not_vma = zstd::encode_all(&b"something else"[..], 1).unwrap();
    assert_eq!(open_bytes(not_vma).err().map(|e| e.kind()), Some(Kind::Corrupt));
}

#[test]
fn layers_of_one_file_share_its_index() {
    let made = two_disks();
    let f = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(f.path(), made.bytes()).unwrap();
    let file = Arc::new(SourceFile::look(f.path()).unwrap());
    let (a, b) = (open(&file, 1).unwrap(), open(&file, 7).unwrap());
    assert!(Arc::ptr_eq(&a.archive, &b.archive));
    assert!(read_onto(&b, Vec::new(), 65536).unwrap() == made.devices[1].2);
    let again = Arc::new(SourceFile::look(f.path()).unwrap());
    assert!(!Arc::ptr_eq(&open(&again, 1).unwrap().archive, &a.archive));
}

#[test]
fn a_raw_image_that_begins_like_an_archive_stays_raw() {
    let storage = MemStorage::new("FULL-1-sda", small().bytes());
    assert_eq!(crate::layer::probe(&storage).unwrap().format, crate::layer::Format::Raw);
}

#[test]
fn clusters_that_come_too_often_end_the_pass_at_once() {
    let mut made = Made::new(&[(1, "drive-a", pattern(CLUSTER as usize, 1))], 1);
    made.extents.push(vec![slot(1, 0, &[]); 59]);
    let mut bytes = made.bytes();
    // The pass would stumble over this, did it get here.
    bytes.extend([0; 512]);
    let error = open_bytes(bytes).err().unwrap();
    assert!(error.to_string().contains("twice"), "{error}");
}
