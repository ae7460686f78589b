//! Images with flipped bits: whatever stands in them, mapping and reading ends in bytes or in an
//! error, within bounds, and never in a panic.

use std::sync::Arc;

use crate::support::images::{self, Rng, qemu_io};
use crate::support::tools::{self, run};
use fleecefs::layer::qcow2::Qcow2Layer;
use fleecefs::layer::{Layer, LayerPart, Mapping, probe};
use fleecefs::storage::MemStorage;

/// Mutated copies tried per kind of image.
const ROUNDS: usize = 1500;
/// Guest bytes mapped at once.
const SPAN: u64 = 4 << 20;

fn images() -> Vec<(String, Vec<u8>)> {
    let dir = images::tempdir();
    let kinds = [
        "cluster_size=512",
        "cluster_size=4k",
        "cluster_size=64k,compression_type=zstd",
        "cluster_size=16k,extended_l2=on",
        "cluster_size=4k,compat=0.10",
    ];
    let image = |options: &&str| {
        let path = dir.path().join("image");
        let p = path.to_str().unwrap();
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, p, "1M"]);
        let ops = ["write -P 1 0 100k", "write -z 40k 8k", "write -c -P 7 512k 64k"];
        qemu_io(&path, &ops.map(String::from));
        run("qemu-img", &["snapshot", "-c", "one", p]);
        qemu_io(&path, &["write -P 9 200k 9k".into()]);
        (options.to_string(), std::fs::read(&path).unwrap())
    };
    kinds.iter().map(image).collect()
}

/// Flips a few bits, mostly where metadata is; sometimes cuts the file.
fn mutate(rng: &mut Rng, bytes: &mut Vec<u8>) {
    for _ in 0..1 + rng.below(4) {
        let reach = if rng.below(2) == 0 { 128 } else { bytes.len() as u64 };
        let at = rng.below(reach) as usize;
        match rng.below(3) {
            0 => bytes[at] ^= 1 << rng.below(8),
            1 => bytes[at] = rng.next() as u8,
            _ => bytes[at] = 0xff,
        }
    }
    if rng.below(8) == 0 {
        bytes.truncate(1 + rng.below(bytes.len() as u64 - 1) as usize);
    }
}

/// Maps and reads the start and the end of every state in the image.
fn look(bytes: Vec<u8>) {
    let storage = Arc::new(MemStorage::new("image", bytes));
    let Ok(info) = probe(&*storage) else { return };
    let parts = (0..info.snapshots.len().min(4) as u32).map(LayerPart::Snapshot);
    for part in std::iter::once(LayerPart::Whole).chain(parts) {
        let data = info.data_file.is_some().then(|| storage.clone() as _);
        let Ok(layer) = Qcow2Layer::open(storage.clone(), data, &part) else { continue };
        for start in [0, layer.size().saturating_sub(SPAN)] {
            look_at(&layer, start..layer.size().min(start.saturating_add(SPAN)));
        }
    }
}

fn look_at(layer: &Qcow2Layer, range: std::ops::Range<u64>) {
    if range.is_empty() {
        return;
    }
    assert!(layer.next_mapped(range.start) >= range.start);
    let map = layer.map(range.clone());
    map.extents.check(&range).unwrap();
    assert!(map.findings.len() <= 8, "findings are bounded");
    let mut buf = vec![0; 4096];
    for e in map.extents.as_slice().iter().take(256) {
        match e.content {
            Mapping::Data { file, host } => {
                let n = (e.len as usize).min(buf.len());
                layer.read_data(file, host, &mut buf[..n]).expect("mapped data lies in the file");
            }
            Mapping::Compressed { host, len, unit, .. } => {
                let _ = layer.decompress(host, len, &mut vec![0; unit as usize]);
            }
            Mapping::Below | Mapping::Zero | Mapping::Bad => {}
        }
    }
}

#[test]
fn flipped_bits_never_panic() {
    if !tools::have("flipped_bits_never_panic", &["qemu-img", "qemu-io"]) {
        return;
    }
    for (seed, (_options, original)) in (1..).zip(images()) {
        let mut rng = Rng(seed);
        look(original.clone());
        for _ in 0..ROUNDS {
            let mut bytes = original.clone();
            mutate(&mut rng, &mut bytes);
            look(bytes);
        }
    }
}

/// An image in memory whose reader gives up after a number of bytes: work is counted, not timed.
struct Counted {
    bytes: fleecefs::storage::MemStorage,
    left: std::sync::atomic::AtomicI64,
}

impl fleecefs::storage::ReadAt for Counted {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<usize> {
        let before = self.left.fetch_sub(buf.len() as i64, std::sync::atomic::Ordering::Relaxed);
        assert!(before > 0, "far more is read than the file has");
        self.bytes.read_at(buf, offset)
    }

    fn len(&self) -> u64 {
        self.bytes.len()
    }

    fn name(&self) -> &std::path::Path {
        self.bytes.name()
    }
}

/// A qcow2 header (version 3, 64 KiB clusters, a disk of 1 MiB) with an extension.
fn header(snapshots: (u32, u64), extension: &[u8]) -> Vec<u8> {
    let mut h = b"QFI\xfb\0\0\0\x03".to_vec();
    h.extend([0; 12]);
    h.extend(16_u32.to_be_bytes());
    h.extend((1_u64 << 20).to_be_bytes());
    h.extend(0_u32.to_be_bytes());
    // L1 table, refcount table.
    h.extend(1_u32.to_be_bytes());
    h.extend(65536_u64.to_be_bytes());
    h.extend(131_072_u64.to_be_bytes());
    h.extend(1_u32.to_be_bytes());
    h.extend(snapshots.0.to_be_bytes());
    h.extend(snapshots.1.to_be_bytes());
    h.extend([0; 16]);
    // Autoclear: the bitmaps are valid.
    h.extend(u64::from(!extension.is_empty()).to_be_bytes());
    h.extend(4_u32.to_be_bytes());
    h.extend(104_u32.to_be_bytes());
    h.extend(extension);
    h.extend([0; 8]);
    h.resize(3 << 16, 0);
    h
}

const TABLE: u64 = 8 << 20;
const TABLE_LEN: u64 = 32 << 20;

fn check(mut image: Vec<u8>, list: &[u8]) -> fleecefs::verify::Structure {
    image.extend(list);
    image.resize((TABLE + TABLE_LEN) as usize, 0);
    let size = image.len() as i64;
    let bytes = fleecefs::storage::MemStorage::new("hostile", image);
    fleecefs::verify::check_structure(&Counted { bytes, left: (4 * size).into() }, None)
}

#[test]
fn a_million_names_for_one_table_are_one_walk() {
    // Bitmaps: table, entries, flags, type, granularity, name length, extra data length.
    let mut entry = TABLE.to_be_bytes().to_vec();
    entry.extend(((TABLE_LEN / 8) as u32).to_be_bytes());
    entry.extend([0, 0, 0, 0, 1, 16, 0, 0, 0, 0, 0, 0]);
    let list = entry.repeat(65_000);
    let mut extension = 0x2385_2875_u32.to_be_bytes().to_vec();
    extension.extend(24_u32.to_be_bytes());
    extension.extend(65_000_u32.to_be_bytes());
    extension.extend(0_u32.to_be_bytes());
    extension.extend((list.len() as u64).to_be_bytes());
    extension.extend((3_u64 << 16).to_be_bytes());
    let found = check(header((0, 0), &extension), &list).findings;
    assert!(found.iter().any(|f| f.message.contains("bitmap's table")), "{found:#?}");
    // Snapshots: table, entries, id and name lengths, times, extra data of 16 bytes.
    let mut entry = TABLE.to_be_bytes().to_vec();
    entry.extend(((TABLE_LEN / 8) as u32).to_be_bytes());
    entry.resize(36, 0);
    entry.extend(16_u32.to_be_bytes());
    entry.resize(56, 0);
    let found = check(header((65_536, 3 << 16), &[]), &entry.repeat(65_536)).findings;
    assert!(found.iter().any(|f| f.message.contains("snapshot's L1 table")), "{found:#?}");
}
