//! `backup` against qemu-storage-daemon: what is in a point is what the disk was at its freeze point.

use std::path::PathBuf;

use crate::support::backup::{Caller, bitmaps, images, leftovers, newest, ours_in_qemu, same};
use crate::support::mount::Mount;
use crate::support::qemu::storage_daemon::Daemon;
use crate::support::tools::{have, run};
use fleecefs::manifest;

const TOOLS: &[&str] = &["qemu-storage-daemon", "qemu-img", "qemu-io", "/dev/fuse"];
const SIZE: u64 = 32 << 20;

/// A daemon with disks of these formats: name, `qemu-img create -o` options ("raw" for raw).
fn daemon(disks: &[(&str, &str)]) -> Daemon {
    let dir = tempfile::tempdir().unwrap();
    let mut list = Vec::new();
    for (name, options) in disks {
        let path = dir.path().join(format!("{name}.img"));
        let p = path.to_str().unwrap();
        let size = SIZE.to_string();
        if *options == "raw" {
            run("qemu-img", &["create", "-q", "-f", "raw", p, &size]);
            list.push((*name, "driver=raw"));
        } else {
            run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, p, &size]);
            list.push((*name, "driver=qcow2"));
        }
    }
    Daemon::start(dir, &list)
}

/// The rounds that must hold: full, incs and diffs under continuous writes, each equal to its view.
fn rounds(disks: &[(&str, &str)], more: &[&str]) {
    let d = daemon(disks);
    let caller = Caller::of(&d).with(more);
    let churns: Vec<_> =
        disks.iter().enumerate().map(|(i, (n, _))| d.churn(n, SIZE, i as u64 + 1)).collect();
    let mut points: Vec<(String, PathBuf, Vec<u8>)> = Vec::new();
    for level in [
        "full", "inc", "inc", "diff", "inc", "inc", "inc", "diff", "inc", "inc", "inc", "inc",
        "inc",
    ] {
        let (_, views) = caller.held(level);
        assert_eq!(views.len(), disks.len());
        for (disk, view) in views {
            let image = newest(&caller.target, &disk);
            assert!(
                image.file_name().unwrap().to_str().unwrap().starts_with(&level.to_uppercase())
            );
            points.push((disk, image, view));
        }
    }
    drop(churns);
    let mount = Mount::new(&caller.target);
    for (disk, image, view) in &points {
        same(&mount, disk, image, view);
    }
    let mut qmp = d.qmp();
    assert_eq!(ours_in_qemu(&mut qmp), Vec::<String>::new());
    assert_eq!(leftovers(d.dir.path()), Vec::<PathBuf>::new());
    // The FULL's and the last INC's, and no other.
    assert_eq!(bitmaps(&mut qmp).len(), 2 * disks.len());
}

#[test]
fn qcow2_with_64k_clusters() {
    if have("qcow2_with_64k_clusters", TOOLS) {
        rounds(&[("a", "cluster_size=65536")], &[]);
    }
}

#[test]
fn qcow2_with_2m_clusters_and_compression() {
    if have("qcow2_with_2m_clusters_and_compression", TOOLS) {
        rounds(&[("a", "cluster_size=2M")], &["--compress=zstd"]);
    }
}

#[test]
fn extended_l2_and_raw_together() {
    if have("extended_l2_and_raw_together", TOOLS) {
        rounds(&[("a", "extended_l2=on"), ("b", "raw")], &[]);
    }
}

#[test]
fn small_clusters_and_raw_compressed() {
    if have("small_clusters_and_raw_compressed", TOOLS) {
        rounds(&[("a", "cluster_size=4096"), ("b", "raw")], &["--compress"]);
    }
}

#[test]
fn holes_are_not_counted_as_copied() {
    if !have("holes_are_not_counted_as_copied", TOOLS) {
        return;
    }
    let d = daemon(&[("a", "cluster_size=65536")]);
    let caller = Caller::of(&d);
    d.io("a", &["write -P 1 20M 4M"]);
    for (level, least) in [("full", 4 << 20), ("inc", 1 << 20)] {
        caller.must(level);
        let image = newest(&caller.target, "a.img");
        let m = manifest::read(image.parent().unwrap(), image.file_name().unwrap());
        let copied = m.unwrap().unwrap().bytes_copied;
        // The image's own tables may be counted, the disk's 28 MiB of holes not.
        assert!((least..least + (1 << 20)).contains(&copied), "{level}: {copied}");
        d.io("a", &["write -P 2 1M 1M", "write -z 8M 8M"]);
    }
}

#[test]
fn mtimes_ascend_and_names_never_collide() {
    if !have("mtimes_ascend_and_names_never_collide", TOOLS) {
        return;
    }
    let d = daemon(&[("a", "cluster_size=65536")]);
    let caller = Caller::of(&d);
    caller.must("full");
    for _ in 0..4 {
        caller.must("inc");
    }
    let list = images(&caller.target.join("a.img"));
    assert_eq!(list.len(), 5);
    let times: Vec<_> =
        list.iter().map(|p| std::fs::metadata(p).unwrap().modified().unwrap()).collect();
    assert!(times.windows(2).all(|w| w[0] < w[1]), "{times:?}");
}
