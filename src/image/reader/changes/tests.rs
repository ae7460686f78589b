use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::super::tests::{image, qcow2};
use super::*;

const CLUSTER: u64 = 512;
const CLUSTERS: usize = 64;
const SIZE: u64 = CLUSTERS as u64 * CLUSTER;

/// An image that has data, all of it in one place of its file: what is a hole there reads as zeros.
fn written(size: u64, l1: &[u64], l2: &[u64]) -> tempfile::NamedTempFile {
    let file = qcow2(9, size, l1, l2);
    file.as_file().write_all_at(&[7; CLUSTER as usize], 0x30000).unwrap();
    file
}

/// A chain of points: cluster `i` is in each layer `n` for which bit `n` of `all[i]` is set.
fn chain(all: &[u8], depth: usize) -> (Vec<tempfile::NamedTempFile>, Vec<Arc<Image>>) {
    let (mut files, mut points) = (Vec::new(), Vec::<Arc<Image>>::new());
    for n in 0..depth {
        let l2: Vec<u64> =
            all.iter().map(|bits| if bits >> n & 1 == 1 { 0x30000 } else { 0 }).collect();
        let file = written(SIZE, &[0x20000], &l2);
        points.push(image(file.path(), Format::Qcow2, SIZE, points.last().cloned()));
        files.push(file);
    }
    (files, points)
}

/// The clusters that may differ.
fn changed(from: &Image, to: &Image, range: Range<u64>) -> Vec<bool> {
    let mut found = vec![false; CLUSTERS];
    let mut end = 0;
    from.for_each_change(to, range, |c| {
        assert!(c.length > 0 && (end == 0 || c.start >= end), "in order");
        end = c.end();
        (c.start / CLUSTER..c.end() / CLUSTER).for_each(|i| found[i as usize] = true);
        true
    })
    .unwrap();
    found
}

#[test]
fn what_no_layer_between_two_points_has_is_the_same_and_all_else_may_differ() {
    let bits: Vec<u8> = (0..CLUSTERS).map(|i| (i * 37 % 16) as u8).collect();
    let (_files, points) = chain(&bits, 4);
    let top =
        |cluster: usize, point: usize| (0..=point).rev().find(|n| bits[cluster] >> n & 1 == 1);
    for (a, from) in points.iter().enumerate() {
        for (b, to) in points.iter().enumerate() {
            let want: Vec<bool> = (0..CLUSTERS).map(|i| top(i, a) != top(i, b)).collect();
            assert_eq!(changed(from, to, 0..SIZE), want, "{a} {b}");
        }
    }
    assert_eq!(points[3].own_data_bytes().unwrap(), {
        bits.iter().filter(|b| *b >> 3 & 1 == 1).count() as u64 * CLUSTER
    });
    let part = changed(&points[0], &points[3], 10 * CLUSTER..20 * CLUSTER);
    assert!(part.iter().enumerate().all(|(i, c)| !c || (10..20).contains(&i)));
    assert!(part.contains(&true) && !points[1].may_differ(&points[1], 0..SIZE).unwrap());
}

#[test]
fn two_openings_of_one_file_are_the_same_and_copies_of_it_may_differ() {
    let l2 = vec![0x30000; CLUSTERS];
    let (one, other) = (written(SIZE, &[0x20000], &l2), written(SIZE, &[0x20000], &l2));
    let open = |f: &tempfile::NamedTempFile| image(f.path(), Format::Qcow2, SIZE, None);
    assert!(!open(&one).may_differ(&open(&one), 0..SIZE).unwrap());
    assert!(open(&one).may_differ(&open(&other), 0..SIZE).unwrap());
    let mut differ = 0;
    open(&one)
        .for_each_difference(&open(&other), 0..SIZE, |_| {
            differ += 1;
            true
        })
        .unwrap();
    assert_eq!(differ, 0, "their bytes are the same");
}

#[test]
fn a_disk_that_grew_has_zeros_before_and_huge_ones_end_at_once() {
    let (_files, points) = chain(&[1; CLUSTERS], 1);
    let huge = 1u64 << 60;
    let top = qcow2(21, huge, &[0; 1 << 21], &[]);
    let grown = image(top.path(), Format::Qcow2, huge, Some(points[0].clone()));
    assert!(!points[0].may_differ(&grown, 0..huge).unwrap());
    let file = written(2 * SIZE, &[0, 0x20000], &[0x30000]);
    let data = image(file.path(), Format::Qcow2, 2 * SIZE, Some(points[0].clone()));
    let mut all = Vec::new();
    points[0]
        .for_each_change(&data, 0..2 * SIZE, |c| {
            all.push(c);
            true
        })
        .unwrap();
    let (from, to) = (RangeContent::Zero, RangeContent::Data);
    assert_eq!(all, [Change { start: SIZE, length: CLUSTER, from, to }]);
}
