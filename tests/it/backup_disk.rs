//! What the disk below the target does to a backup: writes that are lost after they were accepted
//! never become a point.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::support::backup::{
    self, Caller, bitmaps, images, leftovers, newest, ours_in_qemu, same,
};
use crate::support::guard::Guard;
use crate::support::mount::Mount;
use crate::support::qemu::storage_daemon::Daemon;
use crate::support::tools::{have, run};
use fleecefs::backup::fleece;
use fleecefs::error::Kind;
use fleecefs::qmp::nbd::Nbd;
use fleecefs::qmp::{Address, Client};
use serde_json::json;

const TOOLS: &[&str] = &["qemu-storage-daemon", "qemu-img", "qemu-io", "/dev/fuse"];

fn daemon(size: &str) -> Daemon {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.img");
    run("qemu-img", &["create", "-q", "-f", "qcow2", path.to_str().unwrap(), size]);
    Daemon::start(dir, &[("a", "driver=qcow2")])
}

/// Tables that QEMU cannot write when it closes an image: `blockdev-del` says nothing of it.
#[test]
fn an_image_whose_tables_cannot_be_written_is_not_closed() {
    if !have("an_image_whose_tables_cannot_be_written_is_not_closed", TOOLS) {
        return;
    }
    let d = daemon("1M");
    let path = d.path("t.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", path.to_str().unwrap(), "8M"]);
    // The table is there before: it is the change of one of its entries that stays in memory.
    run("qemu-io", &["-f", "qcow2", "-c", "write 4M 64k", path.to_str().unwrap()]);
    let mut client = Client::connect(&Address::Unix(d.path("qmp.sock"))).unwrap();
    let mut open = |event: &str| {
        let fault = json!({"event": event, "errno": libc::ENOSPC, "once": false});
        let file = json!({"driver": "blkdebug", "inject-error": [fault],
            "image": {"driver": "file", "filename": path}});
        let node = json!({"driver": "qcow2", "node-name": "t", "discard": "unmap",
            "cache": {"no-flush": true}, "file": file});
        client.execute("blockdev-add", node).unwrap();
        let export = json!({"type": "nbd", "id": "e", "node-name": "t", "writable": true});
        client.execute("block-export-add", export).unwrap();
        let nbd = Address::Unix(d.path("nbd.sock"));
        let mut n = Nbd::connect(&nbd, "t", false, Duration::from_secs(10)).unwrap();
        n.write_zeroes(std::slice::from_ref(&(0..1 << 20))).unwrap();
        drop(n);
        client.execute("block-export-del", json!({"id": "e", "mode": "hard"})).unwrap();
        while !client
            .query::<Vec<serde_json::Value>>("query-block-exports", json!({}))
            .unwrap()
            .iter()
            .all(|e| e["id"] != "e")
        {
            std::thread::sleep(Duration::from_millis(5));
        }
        let closed = fleece::close_image(&mut client, "t");
        if closed.is_err() {
            client.execute("blockdev-del", json!({"node-name": "t"})).unwrap();
        }
        closed
    };
    assert_eq!(open("l2_update").unwrap_err().kind(), Kind::NoSpace);
    // Nothing of that kind happens.
    open("vmstate_save").unwrap();
}

/// A file system whose disk takes less than it claims: a loop device over a file in a small tmpfs.
/// Everything is taken down on drop. Needs root.
struct Lying {
    // In the order in which they go.
    _guards: Vec<Guard>,
    dir: tempfile::TempDir,
}

impl Lying {
    fn new(test: &str) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let (store, mount) = (dir.path().join("store"), dir.path().join("mnt"));
        std::fs::create_dir_all(&store).unwrap();
        std::fs::create_dir_all(&mount).unwrap();
        match Self::make(&store, &mount) {
            Some(guards) => Some(Lying { _guards: guards, dir }),
            None => {
                assert!(std::env::var_os("CI").is_none(), "{test} needs root, loop and ext4");
                println!("skipped: {test} needs root, loop devices and mkfs.ext4");
                None
            }
        }
    }

    fn make(store: &Path, mount: &Path) -> Option<Vec<Guard>> {
        let size = Guard::try_mount("-t tmpfs -o size=8M", Path::new("tmpfs"), store).ok()?;
        let disk = store.join("disk");
        std::fs::File::create(&disk).unwrap().set_len(64 << 20).unwrap();
        let mut mkfs = Command::new("mkfs.ext4");
        mkfs.args(["-q", "-b", "4096", "-O", "^has_journal"]).arg(&disk);
        mkfs.output().ok().filter(|o| o.status.success())?;
        let device = Guard::try_attach("", &disk).ok()?;
        let mounted = Guard::try_mount("-o errors=continue", device.made(), mount).ok()?;
        Some(vec![mounted, device, size])
    }

    fn target(&self) -> PathBuf {
        self.dir.path().join("mnt/T")
    }

    /// From now on its disk takes what it claims.
    fn heal(&self) {
        let store = self.dir.path().join("store");
        run("mount", &["-o", "remount,size=128M", store.to_str().unwrap()]);
    }
}

#[test]
fn lost_writes_do_not_become_a_point() {
    let name = "lost_writes_do_not_become_a_point";
    if !have(name, TOOLS) {
        return;
    }
    let Some(disk) = Lying::new(name) else { return };
    let d = daemon("32M");
    let mut caller = Caller::of(&d);
    d.io("a", &["write -P 3 0 1M"]);
    caller.target = disk.target();
    caller.must("full");
    d.io("a", &["write -P 5 0 24M"]);
    let before = bitmaps(&mut d.qmp());
    let out = caller.run("inc");
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(!out.status.success(), "{said}");
    assert!(said.contains("could not be written") || said.contains("No space"), "{said}");
    assert_eq!(images(&caller.target.join("a.img")).len(), 1);
    assert_eq!(leftovers(&caller.target), Vec::<PathBuf>::new());
    assert_eq!(ours_in_qemu(&mut d.qmp()), Vec::<String>::new());
    assert_eq!(bitmaps(&mut d.qmp()), before, "the old bitmap still records");
    disk.heal();
    let (_, views) = caller.held("inc");
    let mount = Mount::new(&caller.target);
    same(&mount, "a.img", &newest(&caller.target, "a.img"), &views[0].1);
}

/// QEMU would sync in its main loop, where the guest waits for it; and an error that it is told of
/// nobody is told again.
#[test]
fn our_images_are_never_synced_by_qemu() {
    if !have("our_images_are_never_synced_by_qemu", TOOLS) {
        return;
    }
    let d = daemon("1M");
    let caller = Caller::of(&d);
    for more in [&[][..], &["--direct"][..]] {
        let hold = tempfile::tempdir().unwrap();
        let mut child =
            caller.with(more).command("full").env("FLEECEFS_HOLD", hold.path()).spawn().unwrap();
        backup::read_views(&mut child, hold.path());
        let nodes = d.qmp().execute("query-named-block-nodes", json!({}));
        std::fs::write(hold.path().join("go"), "").unwrap();
        assert!(child.wait().unwrap().success());
        let ours = |n: &&serde_json::Value| {
            let file = n["file"].as_str().unwrap();
            n["drv"] != "copy-before-write"
                && n["drv"] != "snapshot-access"
                && (file.ends_with(".partial") || file.ends_with(".fleece.raw"))
        };
        let list: Vec<_> = nodes.as_array().unwrap().iter().filter(ours).collect();
        assert_eq!(list.len(), 4, "{list:?}");
        assert!(list.iter().all(|n| n["cache"]["no-flush"] == true), "{list:?}");
    }
}

/// No disk's filter and fleece stay for the time that another's image is checked and hashed.
#[test]
fn the_guest_is_let_go_of_before_any_image_is_checked() {
    if !have("the_guest_is_let_go_of_before_any_image_is_checked", TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for name in ["a", "b"] {
        let path = dir.path().join(format!("{name}.img"));
        run("qemu-img", &["create", "-q", "-f", "qcow2", path.to_str().unwrap(), "1M"]);
    }
    let d = Daemon::start(dir, &[("a", "driver=qcow2"), ("b", "driver=qcow2")]);
    let caller = Caller::of(&d);
    let trace = d.path("steps");
    let status = caller.command("full").env("FLEECEFS_STEPS", &trace).status().unwrap();
    assert!(status.success());
    let steps = std::fs::read_to_string(&trace).unwrap();
    let steps: Vec<&str> = steps.lines().collect();
    let checked = steps.iter().position(|s| s.contains("checked")).unwrap();
    let closed = steps.iter().rposition(|s| s.contains("blockdev-del")).unwrap();
    assert!(closed < checked, "{steps:?}");
}

#[test]
fn a_config_file_that_is_not_there_is_said_before_anything_is_begun() {
    if !have("a_config_file_that_is_not_there_is_said_before_anything_is_begun", TOOLS) {
        return;
    }
    let d = daemon("1M");
    let caller = Caller::of(&d);
    let out = caller.with(&["--config", "/no/such/file"]).run("full");
    assert_eq!(out.status.code(), Some(3));
    assert!(!caller.target.exists());
    assert!(bitmaps(&mut d.qmp()).is_empty());
}
