//! The promise: however many points there are and however deep, reading them takes a bounded number
//! of descriptors, and none is kept once nothing is open.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::support::mount::Mount;
use crate::support::process::eventually;
use crate::support::tools::{have, run};
use crate::support::writable::{rw, scratch_option};

const CLUSTER: usize = 512;
const CLUSTERS: usize = 64;

/// A qcow2 of version 2 with clusters of 512 bytes, whose cluster `at` is full of `byte`.
fn layer(at: usize, byte: u8) -> Vec<u8> {
    let mut image = vec![0; 5 * CLUSTER];
    image[..8].copy_from_slice(b"QFI\xfb\0\0\0\x02");
    image[23] = 9;
    image[24..32].copy_from_slice(&((CLUSTERS * CLUSTER) as u64).to_be_bytes());
    image[39] = 1;
    image[40..48].copy_from_slice(&(CLUSTER as u64).to_be_bytes());
    let copied = 1u64 << 63;
    let word = |offset: usize| (copied | offset as u64).to_be_bytes();
    image[CLUSTER..CLUSTER + 8].copy_from_slice(&word(2 * CLUSTER));
    let entry = 2 * CLUSTER + 8 * at;
    image[entry..entry + 8].copy_from_slice(&word(4 * CLUSTER));
    image[4 * CLUSTER..].fill(byte);
    image
}

fn byte(i: usize) -> u8 {
    (i % 250 + 1) as u8
}

/// A chain of `count` points in which each writes one cluster; the bytes of each point.
fn chain(disk: &Path, count: usize) -> Vec<Vec<u8>> {
    std::fs::create_dir(disk).unwrap();
    let mut now = vec![0; CLUSTERS * CLUSTER];
    let mut all = Vec::new();
    for i in 0..count {
        let at = i % CLUSTERS;
        std::fs::write(disk.join(file(i)), layer(at, byte(i))).unwrap();
        now[at * CLUSTER..(at + 1) * CLUSTER].fill(byte(i));
        all.push(now.clone());
    }
    all
}

fn file(i: usize) -> String {
    format!("{}-{}-a", if i == 0 { "FULL" } else { "INC" }, 1000 + i)
}

fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

#[test]
fn all_points_of_deep_chains_read_in_any_order_and_leave_nothing_open() {
    let test = "all_points_of_deep_chains_read_in_any_order_and_leave_nothing_open";
    if !have(test, &["/dev/fuse"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (deep, short) = (200, 300);
    let points = chain(&dir.path().join("deep"), deep);
    for i in 0..short {
        let disk = dir.path().join(format!("vm{i}"));
        std::fs::create_dir(&disk).unwrap();
        std::fs::write(disk.join(file(0)), layer(0, byte(i))).unwrap();
    }
    let (mount, said) = Mount::limited(dir.path(), 80, "");
    assert_eq!(said.matches(": chain of 200 files").count(), 1, "{said}");
    let point = |i: usize| mount.path().join(format!("deep/{}.raw", file(i)));
    // A step that has no common factor with the count visits each once.
    for step in [1, 77, deep - 1] {
        for i in (0..deep).map(|n| (n + 1) * step % deep) {
            assert!(read(&point(i)) == points[i], "point {i}, step {step}");
        }
    }
    for i in 0..short {
        let bytes = read(&mount.path().join(format!("vm{i}/{}.raw", file(0))));
        assert!(bytes[..CLUSTER].iter().all(|b| *b == byte(i)), "vm{i}");
    }
    // Many open at once, from top to bottom.
    let open: Vec<File> = (0..deep).rev().map(|i| File::open(point(i)).unwrap()).collect();
    for (file, want) in open.iter().zip(points.iter().rev()) {
        let mut bytes = vec![0; CLUSTERS * CLUSTER];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes == *want);
    }
    assert!(mount.open_files(dir.path()) < 80);
    drop(open);
    eventually("that nothing is held", || mount.open_files(dir.path()) == 0);
    // New points are still found.
    std::fs::write(dir.path().join("deep").join(file(deep)), layer(0, 7)).unwrap();
    eventually("the new point", || point(deep).exists());
    assert_eq!(read(&point(deep))[0], 7);
}

/// Two such points take more descriptors than there are: the one that was closed has to be so before the next is
/// opened.
#[test]
fn points_of_half_of_the_descriptors_are_opened_one_after_the_other() {
    let test = "points_of_half_of_the_descriptors_are_opened_one_after_the_other";
    if !have(test, &["/dev/fuse"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let depth = 140;
    for disk in ["a", "b", "c"] {
        chain(&dir.path().join(disk), depth);
    }
    let (mount, _) = Mount::limited(dir.path(), 256, "");
    let walk = |disk: &str| {
        for i in (0..400).map(|n| 100 + n * 7 % 40) {
            let file = mount.path().join(format!("{disk}/{}.raw", file(i)));
            let mut byte_there = [0];
            let read = File::open(&file)
                .and_then(|f| f.read_exact_at(&mut byte_there, (i % CLUSTERS * CLUSTER) as u64));
            read.unwrap_or_else(|e| panic!("{}: {e}", file.display()));
            assert_eq!(byte_there[0], byte(i), "{}", file.display());
        }
    };
    walk("a");
    let walk = &walk;
    std::thread::scope(|s| {
        for disk in ["b", "c"] {
            s.spawn(move || walk(disk));
        }
    });
}

#[test]
fn what_is_held_survives_its_files_and_what_is_not_is_never_another_file() {
    let test = "what_is_held_survives_its_files_and_what_is_not_is_never_another_file";
    if !have(test, &["/dev/fuse"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (held, deep) = (20, 100);
    let points = chain(&dir.path().join("held"), held);
    chain(&dir.path().join("deep"), deep);
    let (mount, _) = Mount::limited(dir.path(), 80, "");
    let open = |disk: &str, i| File::open(mount.path().join(format!("{disk}/{}.raw", file(i))));
    let (top, middle, far) = (
        open("held", held - 1).unwrap(),
        open("held", 7).unwrap(),
        open("deep", deep - 1).unwrap(),
    );
    // Reading so many others closes what is not held.
    for i in 0..deep {
        open("deep", i).unwrap().read_exact_at(&mut [0; CLUSTER], 0).unwrap();
    }
    std::fs::remove_dir_all(dir.path().join("held")).unwrap();
    for i in 0..deep {
        let path = dir.path().join("deep").join(file(i));
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, layer(i % CLUSTERS, 0xee)).unwrap();
    }
    let mut bytes = vec![0; CLUSTERS * CLUSTER];
    for (file, i) in [(&top, held - 1), (&middle, 7)] {
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes == points[i], "point {i}");
    }
    for at in (0..CLUSTERS * CLUSTER).step_by(CLUSTER) {
        // Old bytes or an error.
        let mut one = [0; CLUSTER];
        if far.read_exact_at(&mut one, at as u64).is_ok() {
            assert_ne!(one[0], 0xee, "the new file's bytes at {at}");
        }
    }
}

/// Writes to each point a byte of its own, at a place of its own, and what there is in all of them then.
fn write_all(mount: &Mount, points: &mut [Vec<u8>], shift: usize) -> Vec<File> {
    let count = points.len();
    let open: Vec<File> =
        (0..count).map(|i| rw(&mount.path().join(format!("deep/{}.raw", file(i))))).collect();
    // A step that has no common factor with the count visits each once.
    for i in (0..count).map(|n| (n + 1) * 77 % count) {
        let at = (i + shift) % CLUSTERS * CLUSTER + i % CLUSTER;
        let data = [byte(i + shift); 700];
        let len = data.len().min(CLUSTERS * CLUSTER - at);
        open[i].write_all_at(&data[..len], at as u64).unwrap_or_else(|e| panic!("point {i}: {e}"));
        points[i][at..at + len].copy_from_slice(&data[..len]);
    }
    open
}

#[test]
fn all_points_are_written_to_with_a_bounded_number_of_descriptors() {
    let test = "all_points_are_written_to_with_a_bounded_number_of_descriptors";
    if !have(test, &["/dev/fuse"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let original = chain(&dir.path().join("deep"), 150);
    let scratch = tempfile::tempdir().unwrap();
    let kept = format!("{} --keep", scratch_option(scratch.path()));
    for options in ["--writable", &kept] {
        let mut points = original.clone();
        let (mount, _) = Mount::limited(dir.path(), 100, options);
        let check = |mount: &Mount, points: &[Vec<u8>], what: &str| {
            for (i, want) in points.iter().enumerate().rev() {
                let got = read(&mount.path().join(format!("deep/{}.raw", file(i))));
                assert!(got == *want, "{options}, {what}: point {i}");
            }
        };
        let open = write_all(&mount, &mut points, 0);
        check(&mount, &points, "written");
        open.iter().step_by(7).for_each(|f| f.sync_all().unwrap());
        let again = write_all(&mount, &mut points, 31);
        drop(open);
        check(&mount, &points, "written again");
        drop(again);
        if options == kept {
            let at = mount.path().to_path_buf();
            run(env!("CARGO_BIN_EXE_fleecefs"), &["umount", at.to_str().unwrap()]);
            drop(mount);
            let (mount, _) = Mount::limited(dir.path(), 100, options);
            check(&mount, &points, "gone on with");
            drop(write_all(&mount, &mut points, 11));
            check(&mount, &points, "and written to");
        }
    }
}
