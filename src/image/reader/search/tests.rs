use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;

use super::super::WINDOW;
use super::super::tests::{image, qcow2};
use super::*;
use crate::image::Cache;
use crate::layer::{Format, LayerPart, LayerSpec};
use crate::storage::SourceFile;

/// Clusters of 512 bytes, so an L2 table of one cluster maps 64 of them.
const CLUSTER: u64 = 512;
const SPAN: u64 = 64 * CLUSTER;
/// What file systems allocate at once.
const BLOCK: u64 = 4096;

/// What a cluster of an image is.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Cluster {
    Below,
    Zero,
    Data,
    Bad,
}

/// One layer of a point.
#[derive(Debug, Clone)]
enum Plan {
    /// Tables, and for each L1 entry which of them it leads to, if any.
    Qcow2 { tables: Vec<Vec<Cluster>>, l1: Vec<Option<usize>>, cut: u64 },
    /// Whether each block of a raw file has data.
    Raw(Vec<bool>),
}

impl Plan {
    fn size(&self) -> u64 {
        match self {
            Plan::Qcow2 { l1, cut, .. } => l1.len() as u64 * SPAN - cut * CLUSTER,
            Plan::Raw(blocks) => blocks.len() as u64 * BLOCK,
        }
    }

    fn cluster(&self, at: u64) -> Cluster {
        match self {
            Plan::Qcow2 { tables, l1, .. } => match l1[(at / SPAN) as usize] {
                Some(table) => tables[table][(at % SPAN / CLUSTER) as usize],
                None => Cluster::Below,
            },
            Plan::Raw(blocks) => match blocks[(at / BLOCK) as usize] {
                true => Cluster::Data,
                false => Cluster::Zero,
            },
        }
    }

    fn format(&self) -> Format {
        match self {
            Plan::Qcow2 { .. } => Format::Qcow2,
            Plan::Raw(_) => Format::Raw,
        }
    }

    fn write(&self, path: &Path) {
        let mut file = std::fs::File::create(path).unwrap();
        match self {
            Plan::Qcow2 { tables, l1, .. } => {
                file.write_all(&qcow2_bytes(tables, l1, self.size())).unwrap();
            }
            Plan::Raw(blocks) => {
                use std::os::unix::fs::FileExt;
                file.set_len(self.size()).unwrap();
                for (i, _) in blocks.iter().enumerate().filter(|(_, b)| **b) {
                    file.write_all_at(&[7; BLOCK as usize], i as u64 * BLOCK).unwrap();
                }
            }
        }
    }
}

/// A qcow2 of version 3: header, L1 table at 0x1000, tables from 0x10000 on, a cluster of data.
fn qcow2_bytes(tables: &[Vec<Cluster>], l1: &[Option<usize>], size: u64) -> Vec<u8> {
    let place = |table: usize| 0x10000 + table as u64 * CLUSTER;
    let data = place(tables.len());
    let entry = |cluster: &Cluster| match cluster {
        Cluster::Below => 0,
        Cluster::Zero => 1,
        Cluster::Data => data,
        // Not at the beginning of a cluster.
        Cluster::Bad => data + 8,
    };
    let mut bytes = b"QFI\xfb\0\0\0\x03".to_vec();
    bytes.resize(0x1000, 0);
    bytes[23] = 9;
    bytes[24..32].copy_from_slice(&size.to_be_bytes());
    bytes[36..40].copy_from_slice(&(l1.len() as u32).to_be_bytes());
    bytes[40..48].copy_from_slice(&0x1000u64.to_be_bytes());
    bytes[99] = 4;
    bytes[103] = 104;
    for table in l1 {
        bytes.extend(table.map_or(0, place).to_be_bytes());
    }
    bytes.resize(0x10000, 0);
    for cluster in tables.iter().flatten() {
        bytes.extend(entry(cluster).to_be_bytes());
    }
    bytes.extend([7; CLUSTER as usize]);
    bytes
}

fn table() -> impl Strategy<Value = Vec<Cluster>> {
    use Cluster::{Bad, Below, Data, Zero};
    let one = |c| Just(vec![c; 64]);
    let two = |a, b| prop::collection::vec(prop_oneof![Just(a), Just(b)], 64);
    prop_oneof![
        one(Below),
        one(Zero),
        one(Data),
        one(Bad),
        two(Below, Zero),
        two(Below, Data),
        two(Zero, Data),
        two(Data, Bad),
        prop::collection::vec(
            prop_oneof![20 => Just(Below), 20 => Just(Zero), 20 => Just(Data), 1 => Just(Bad)],
            64
        ),
    ]
}

fn layer() -> impl Strategy<Value = Plan> {
    (prop::collection::vec(table(), 1..4), 1usize..24, 0u64..64)
        .prop_flat_map(|(tables, spans, cut)| {
            // Long runs of one table, as hostile and as sparse images have them.
            let runs = prop::collection::vec(
                (prop::option::weighted(0.7, 0..tables.len()), 1usize..8),
                spans,
            );
            (Just(tables), runs, Just(spans), Just(cut))
        })
        .prop_map(|(tables, runs, spans, cut)| {
            let l1 = runs.into_iter().flat_map(|(table, n)| vec![table; n]);
            Plan::Qcow2 { tables, l1: l1.take(spans).collect(), cut }
        })
}

fn chain() -> impl Strategy<Value = Vec<Plan>> {
    let raw = prop::collection::vec(any::<bool>(), 1..200).prop_map(Plan::Raw);
    let bottom = prop_oneof![3 => layer(), 1 => raw];
    (bottom, prop::collection::vec(layer(), 0..3))
        .prop_map(|(bottom, above)| std::iter::once(bottom).chain(above).collect())
}

/// What is a hole, cluster by cluster.
fn holes(chain: &[Plan]) -> Vec<bool> {
    let size = chain.last().unwrap().size();
    let is_hole = |at| {
        for plan in chain.iter().rev() {
            if at >= plan.size() {
                return true;
            }
            match plan.cluster(at) {
                Cluster::Below => {}
                Cluster::Zero => return true,
                Cluster::Data | Cluster::Bad => return false,
            }
        }
        true
    };
    (0..size / CLUSTER).map(|i| is_hole(i * CLUSTER)).collect()
}

fn expected(holes: &[bool], from: u64, wanted: RangeKind) -> SearchResult {
    let is_wanted = |i: &u64| holes[*i as usize] == (wanted == RangeKind::Hole);
    let found = (from / CLUSTER..holes.len() as u64).find(is_wanted);
    found.map_or(SearchResult::Nothing, |i| SearchResult::At(from.max(i * CLUSTER)))
}

/// The chain's newest point, with windows of `window` bytes.
fn open(dir: &Path, chain: &[Plan], window: u64) -> Arc<Image> {
    let cache = Cache::new(1 << 24);
    let mut below = None;
    for (i, plan) in chain.iter().enumerate() {
        let path = dir.join(i.to_string());
        plan.write(&path);
        let file = Arc::new(SourceFile::look(&path).unwrap());
        let format = plan.format();
        let spec = LayerSpec { file, format, part: LayerPart::Whole, data_file: None };
        let mut image = Image::new(plan.size(), &[spec], below, &cache).unwrap();
        Arc::get_mut(&mut image).unwrap().window_size = window;
        below = Some(image);
    }
    below.unwrap()
}

proptest! {
    #![proptest_config(crate::failpoint::properties(128))]
    #[test]
    fn data_and_holes_are_found_as_by_asking_cluster_by_cluster(
        chain in chain(),
        window in prop_oneof![Just(4 * CLUSTER), Just(SPAN), Just(3 * SPAN)],
        near in 0u32..4,
        places in prop::collection::vec(0.0..1.0f64, 8),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let holes = holes(&chain);
        let size = chain.last().unwrap().size();
        // With none of them cached, with some, and with all.
        for fresh in [true, false] {
            let mut image = open(dir.path(), &chain, window);
            for place in places.iter().copied().chain([0.0]) {
                let from = (place * size as f64) as u64;
                for wanted in [RangeKind::Data, RangeKind::Hole] {
                    let limits = Limits { near, merges: u32::MAX };
                    let found = image.search(from, wanted, limits).unwrap();
                    prop_assert_eq!(found, expected(&holes, from, wanted));
                    let far = SearchResult::At(image.size());
                    let near = image.seek_near(from, wanted).unwrap().map(SearchResult::At);
                    let right = match expected(&holes, from, wanted) {
                        SearchResult::Nothing => far,
                        other => other,
                    };
                    prop_assert!(near.is_none_or(|n| n == right));
                    if fresh {
                        image = open(dir.path(), &chain, window);
                    }
                }
            }
        }
    }
}

#[test]
fn a_search_gives_up_in_tables_that_say_nothing() {
    let f = qcow2(16, 1 << 30, &[0x20000, 0x20000], &[]);
    let image = image(f.path(), Format::Qcow2, 1 << 30, None);
    let limits = Limits { near: 2, merges: 2 };
    let found = image.search(0, RangeKind::Data, limits).unwrap();
    assert_eq!(found, SearchResult::GaveUp(2 * WINDOW));
    assert_eq!(image.seek_near(0, RangeKind::Data).unwrap(), None);
    assert_eq!(image.seek_near(0, RangeKind::Hole).unwrap(), Some(0));
    assert_eq!(image.seek_data(0).unwrap(), None);
}

#[test]
fn a_far_search_merges_no_more_windows_over_a_larger_disk() {
    use Cluster::{Below, Data, Zero};
    let dir = tempfile::tempdir().unwrap();
    let merges = |spans: usize, layers: &[Option<Cluster>], wanted| {
        let plan = |c: &Option<Cluster>| {
            let table = c.map(|_| 0);
            let tables = vec![vec![c.unwrap_or(Below); 64]];
            Plan::Qcow2 { tables, l1: vec![table; spans], cut: 0 }
        };
        let chain: Vec<Plan> = layers.iter().map(plan).collect();
        let image = open(dir.path(), &chain, SPAN);
        let limits = Limits { near: NEAR, merges: u32::MAX };
        assert_eq!(image.search(0, wanted, limits).unwrap(), SearchResult::Nothing);
        image.cache.figures().merges
    };
    for (layers, wanted) in [
        (&[Some(Data)][..], RangeKind::Hole),
        (&[Some(Zero)], RangeKind::Data),
        (&[Some(Below)], RangeKind::Data),
        (&[Some(Data), None], RangeKind::Hole),
        (&[Some(Zero), None], RangeKind::Data),
        (&[Some(Data), Some(Zero)], RangeKind::Data),
        (&[Some(Data), Some(Below), None, Some(Below)], RangeKind::Hole),
    ] {
        for spans in [700, 7000] {
            assert_eq!(merges(spans, layers, wanted), u64::from(NEAR), "{layers:?} {spans}");
        }
    }
}
