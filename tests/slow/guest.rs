//! The test guest itself: what the tests of backups rely on.

use std::path::Path;
use std::process::Command;

use crate::support::guest::{self, Disk, Guest, must};
use serde_json::json;

fn image(guest_dir: &Path, name: &str, format: &str) -> std::path::PathBuf {
    let path = guest_dir.join(name);
    must(Command::new("qemu-img").args(["create", "-q", "-f", format]).arg(&path).arg("64M"));
    path
}

#[test]
fn every_bus_serves_and_the_agent_freezes() {
    let name = "every_bus_serves_and_the_agent_freezes";
    let dir = tempfile::tempdir().expect("a temporary directory");
    if !guest::has_qemu(name) {
        return;
    }
    let disks = [
        Disk::new("a", image(dir.path(), "a", "qcow2")).on("virtio-blk-iothread"),
        Disk::new("b", image(dir.path(), "b", "raw")).format("raw").on("virtio-scsi"),
        Disk::new("c", image(dir.path(), "c", "qcow2")).on("ahci"),
        Disk::new("d", image(dir.path(), "d", "qcow2")).on("nvme"),
        Disk::new("", image(dir.path(), "e", "qcow2")),
    ];
    let run = ["lockstep /dev/disk/a /dev/disk/b", "churn /dev/disk/c 7"];
    let guest = Guest::start(name, &disks, &run).expect("QEMU is there");

    let links = guest.shell("ls /dev/disk");
    for disk in ["a", "b", "c", "d", "disk5", "root"] {
        assert!(links.lines().any(|l| l == disk), "no {disk} in {links}");
    }
    for disk in ["a", "b", "c", "d", "disk5"] {
        guest.shell(&format!("writer fill /dev/disk/{disk} 3 33554432 1048576"));
    }
    let mut qmp = guest.qmp();
    assert_eq!(qmp.execute("query-status", json!({}))["status"], "running");
    qmp.execute("stop", json!({}));
    qmp.wait_event("STOP");
    qmp.execute("cont", json!({}));

    assert!(guest.agent("guest-fsfreeze-freeze").as_i64() > Some(0));
    assert_eq!(guest.agent("guest-fsfreeze-status"), "frozen");
    guest.agent("guest-fsfreeze-thaw");
    assert_eq!(guest.agent("guest-fsfreeze-status"), "thawed");

    // The same noise is on all of them once QEMU is gone.
    guest.kill();
    let noise = |disk: &Disk| {
        let raw = dir.path().join("raw");
        let convert = ["convert", "-U", "-f", disk.format, "-O", "raw"];
        must(Command::new("qemu-img").args(convert).arg(&disk.path).arg(&raw));
        std::fs::read(raw).expect("an image")[32 << 20..33 << 20].to_vec()
    };
    let expected = noise(&disks[0]);
    assert!(expected.iter().any(|&b| b != 0));
    for disk in disks.iter().filter(|d| d.name != "c") {
        assert!(noise(disk) == expected, "{disk:?} differs");
    }
}
