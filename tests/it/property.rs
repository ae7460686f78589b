//! Whatever QEMU's tools write into a chain, the merged points equal a plain array of bytes.

use std::collections::HashSet;
use std::path::Path;

use crate::support::images::{self, Chain, first_difference};
use crate::support::tools;
use fleecefs::chain::scan::{ScanOptions, scan};
use fleecefs::image::{Cache, open_point};
use proptest::prelude::*;

/// One step inside a point, in units of 512 bytes (writes) or of clusters (zeroes, discards,
/// compressed writes), scaled into the disk.
#[derive(Debug, Clone)]
enum Step {
    Write { at: u16, len: u8, byte: u8 },
    Zero { at: u16, len: u8 },
    Discard { at: u16, len: u8 },
    Compressed { at: u16, byte: u8 },
}

/// One point: its image options, its disk size, its steps.
#[derive(Debug, Clone)]
struct PointPlan {
    options: usize,
    size_sectors: u64,
    steps: Vec<Step>,
}

/// Image options with their cluster size; all version 3, where a discard over a backing file
/// certainly reads as zeros.
const OPTIONS: [(&str, u64); 7] = [
    ("cluster_size=64k", 65536),
    ("cluster_size=512", 512),
    ("cluster_size=4k,compression_type=zstd", 4096),
    ("cluster_size=64k,extended_l2=on", 65536),
    ("cluster_size=16k,extended_l2=on,compression_type=zstd", 16384),
    ("cluster_size=256k,lazy_refcounts=on", 262144),
    ("cluster_size=64k,refcount_bits=1", 65536),
];

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (any::<u16>(), 1u8..80, 1u8..).prop_map(|(at, len, byte)| Step::Write { at, len, byte }),
        2 => (any::<u16>(), 1u8..80).prop_map(|(at, len)| Step::Zero { at, len }),
        1 => (any::<u16>(), 1u8..4).prop_map(|(at, len)| Step::Discard { at, len }),
        1 => (any::<u16>(), 1u8..).prop_map(|(at, byte)| Step::Compressed { at, byte }),
    ]
}

fn plan() -> impl Strategy<Value = Vec<PointPlan>> {
    let point = (0..OPTIONS.len(), 1u64..4000, prop::collection::vec(step(), 0..8))
        .prop_map(|(options, size_sectors, steps)| PointPlan { options, size_sectors, steps });
    prop::collection::vec(point, 1..6)
}

/// The clusters that this point has touched. QEMU cannot write a compressed cluster over one, and
/// QEMU 10.0.2 may corrupt the image when zeroes or discards hit a compressed one.
struct Written {
    cluster: u64,
    clusters: HashSet<u64>,
    compressed: HashSet<u64>,
}

impl Written {
    fn note(&mut self, at: u64, len: u64) {
        self.clusters.extend(at / self.cluster..(at + len).div_ceil(self.cluster));
    }

    fn hits_compressed(&self, at: u64, len: u64) -> bool {
        (at / self.cluster..(at + len).div_ceil(self.cluster)).any(|c| self.compressed.contains(&c))
    }
}

/// Applies a step to the model and says it in qemu-io's words.
fn apply(step: &Step, model: &mut [u8], written: &mut Written) -> Option<String> {
    let size = model.len() as u64;
    let cluster = written.cluster;
    let clusters = size / cluster;
    let fill = |model: &mut [u8], written: &mut Written, at: u64, len: u64, byte: u8| {
        written.note(at, len);
        model[at as usize..(at + len) as usize].fill(byte);
    };
    let sectors = |at: u16, len: u8| {
        let at = u64::from(at) % (size / 512) * 512;
        (at, (u64::from(len) * 512).min(size - at))
    };
    match *step {
        Step::Write { at, len, byte } => {
            let (at, len) = sectors(at, len);
            fill(model, written, at, len, byte);
            Some(format!("write -P {byte} {at} {len}"))
        }
        Step::Zero { at, len } => {
            let (at, len) = sectors(at, len);
            if written.hits_compressed(at, len) {
                return None;
            }
            fill(model, written, at, len, 0);
            Some(format!("write -z {at} {len}"))
        }
        Step::Discard { .. } | Step::Compressed { .. } if clusters == 0 => None,
        Step::Discard { at, len } => {
            let at = u64::from(at) % clusters * cluster;
            let len = (u64::from(len) * cluster).min(clusters * cluster - at);
            if written.hits_compressed(at, len) {
                return None;
            }
            fill(model, written, at, len, 0);
            Some(format!("discard {at} {len}"))
        }
        Step::Compressed { at, byte } => {
            let at = u64::from(at) % clusters * cluster;
            if written.clusters.contains(&(at / cluster)) {
                return None;
            }
            written.note(at, cluster);
            written.compressed.insert(at / cluster);
            model[at as usize..(at + cluster) as usize].fill(byte);
            Some(format!("write -c -P {byte} {at} {cluster}"))
        }
    }
}

fn build(dir: &Path, plan: &[PointPlan]) -> Vec<Vec<u8>> {
    let mut chain = Chain::new(dir, "sda");
    let mut model: Vec<u8> = Vec::new();
    let mut truth = Vec::new();
    for point in plan {
        let (options, cluster) = OPTIONS[point.options];
        model.resize(point.size_sectors as usize * 512, 0);
        let mut written = Written { cluster, clusters: HashSet::new(), compressed: HashSet::new() };
        let ops: Vec<String> =
            point.steps.iter().filter_map(|s| apply(s, &mut model, &mut written)).collect();
        chain.point(options, model.len() as u64, &ops);
        truth.push(model.clone());
    }
    chain.finish();
    truth
}

/// Reads a point in pieces of odd sizes, so that reads cross every kind of border.
fn read_all(image: &fleecefs::image::Image) -> Vec<u8> {
    let mut bytes = vec![0xaa; image.size() as usize];
    let mut at = 0;
    for len in [1usize, 511, 4097, 65536, 131071].into_iter().cycle() {
        let end = (at + len).min(bytes.len());
        image.read_at(&mut bytes[at..end], at as u64).unwrap();
        at = end;
        if at == bytes.len() {
            return bytes;
        }
    }
    unreachable!("a cycle does not end")
}

#[test]
fn merged_points_equal_the_model() {
    if !tools::have("merged_points_equal_the_model", &["qemu-img", "qemu-io"]) {
        return;
    }
    let mut config = ProptestConfig::with_cases(40);
    config.failure_persistence = None;
    proptest!(config, |(plan in plan())| {
        let dir = images::tempdir();
        let truth = build(dir.path(), &plan);
        let (catalog, _) = scan(dir.path(), &ScanOptions::default(), None).unwrap();
        prop_assert_eq!(catalog.disks.len(), 1);
        let cache = Cache::new(8 << 20);
        // Newest first, then oldest first: with and without a parent's windows in the cache.
        let order = (0..truth.len()).rev().chain(0..truth.len());
        for i in order {
            let image = open_point(&catalog.disks[0], i, &cache).unwrap();
            let difference = first_difference(&read_all(&image), &truth[i]);
            prop_assert!(difference.is_none(), "point {i}: {difference:?}");
            let mut at = 0;
            while let Some(data) = image.seek_data(at).unwrap() {
                prop_assert!(truth[i][at as usize..data as usize].iter().all(|b| *b == 0));
                at = image.seek_hole(data).unwrap();
            }
            prop_assert!(truth[i][at as usize..].iter().all(|b| *b == 0));
        }
    });
}
