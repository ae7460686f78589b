//! `backup` of real guests: every bus, lockstep writers, overlays, quiesce.

mod backup;
#[path = "common/guest.rs"]
mod guest;
mod mounted;
mod qemu;

use std::path::{Path, PathBuf};

use backup::{Caller, bitmaps, leftovers, newest, ours_in_qemu, same};
use guest::{Disk, Guest, has_qemu};
use mounted::Mount;
use qemu::{have, run};

const TOOLS: &[&str] = &["qemu-img", "/dev/fuse"];

fn image(dir: &Path, name: &str, format: &str, options: &str) -> PathBuf {
    let path = dir.join(format!("{name}.img"));
    let p = path.to_str().unwrap();
    let mut args = vec!["create", "-q", "-f", format];
    if !options.is_empty() {
        args.extend(["-o", options]);
    }
    args.extend([p, "64M"]);
    run("qemu-img", &args);
    path
}

/// The highest counter that the lockstep writer has left.
fn counter(bytes: &[u8]) -> u64 {
    bytes[..256 * 4096]
        .chunks(4096)
        .map(|b| u64::from_le_bytes(b[..8].try_into().unwrap()))
        .max()
        .unwrap()
}

#[test]
fn every_bus_under_load_at_one_moment() {
    let name = "every_bus_under_load_at_one_moment";
    if !have(name, TOOLS) || !has_qemu(name) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let base = image(dir.path(), "base", "qcow2", "");
    let overlay = dir.path().join("o.img");
    run(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-F",
            "qcow2",
            "-b",
            base.to_str().unwrap(),
            overlay.to_str().unwrap(),
        ],
    );
    let disks = [
        Disk::new("a", image(dir.path(), "a", "qcow2", "")).on("virtio-blk-iothread"),
        Disk::new("b", image(dir.path(), "b", "raw", "")).format("raw").on("virtio-scsi"),
        Disk::new("c", image(dir.path(), "c", "qcow2", "cluster_size=2M")).on("ahci"),
        Disk::new("d", image(dir.path(), "d", "qcow2", "extended_l2=on")).on("nvme"),
        Disk::new("", image(dir.path(), "e", "qcow2", "")),
        Disk::new("o", overlay),
    ];
    let writers = [
        "lockstep /dev/disk/a /dev/disk/b",
        "churn /dev/disk/a 1 4194304 50331648",
        "churn /dev/disk/b 2 4194304 50331648",
        "churn /dev/disk/c 3",
        "churn /dev/disk/d 4",
        "churn /dev/disk/disk5 5",
        "churn /dev/disk/o 6",
    ];
    let guest = Guest::start(name, &disks, &writers).expect("QEMU is there");
    let caller = Caller::guest(&guest);
    let mut points = Vec::new();
    for level in ["full", "inc", "diff", "inc", "inc"] {
        let (said, views) = caller.held(level);
        assert!(said.contains("the guest was stopped for"), "{said}");
        println!("{level}: {}", said.lines().find(|l| l.contains("stopped for")).unwrap());
        // The root disk is a seventh.
        assert_eq!(views.len(), 7, "{said}");
        for (disk, view) in views {
            points.push((level, newest(&caller.target, &disk), disk, view));
        }
    }
    let mount = Mount::new(&caller.target);
    for (_, image, disk, view) in &points {
        same(&mount, disk, image, view);
    }
    for round in points.chunks(7) {
        let of = |d: &str| counter(&round.iter().find(|p| p.2 == d).unwrap().3);
        let (a, b) = (of("a.img"), of("b.img"));
        assert!(b <= a && a - b <= 1, "{}: lockstep disks at {a} and {b}", round[0].0);
    }
    let mut qmp = guest.qmp();
    assert_eq!(ours_in_qemu(&mut qmp), Vec::<String>::new());
    assert_eq!(bitmaps(&mut qmp).len(), 2 * 7);
    assert_eq!(leftovers(dir.path()), Vec::<PathBuf>::new());
    assert_eq!(leftovers(guest.path("").as_path()), Vec::<PathBuf>::new());
    assert_eq!(qmp.execute("query-status", serde_json::json!({}))["status"], "running");
}
