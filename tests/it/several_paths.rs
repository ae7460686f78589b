//! `backup` of disks that are written by more ways than one: a filter in one of them would be passed by
//! what comes by the other. They are refused by name, and the others backed up.

use std::ffi::OsString;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::support::backup::{Caller, PausedBackup, images, leftovers, level, ours_in_qemu};
use crate::support::mount::Mount;
use crate::support::qemu::any_devices::{self, Bare, node};
use crate::support::storage::Loop;
use crate::support::tools::{have, is_root, run};
use serde_json::json;

/// A raw image of 16 MiB.
fn image(path: &Path) -> PathBuf {
    std::fs::File::create(path).unwrap().set_len(16 << 20).unwrap();
    path.to_path_buf()
}

/// A node over `file`, whose driver takes no locks, below a device: options.
fn unlocked(name: &str, driver: &str, more: &str, file: &Path) -> Vec<OsString> {
    let text = format!(
        "driver={driver},node-name={name},discard=unmap{more},file.locking=off,file.driver={},file.filename={}",
        if file.starts_with("/dev") { "host_device" } else { "file" },
        file.display()
    );
    ["-blockdev".into(), text.into()].to_vec()
}

fn device(name: &str) -> [OsString; 2] {
    ["-device".into(), format!("scsi-hd,id=p-{name},bus=s.0,drive={name},share-rw=on").into()]
}

/// A machine with a disk `one` beside these.
fn machine(dir: &Path, more: Vec<OsString>) -> Bare {
    let one = dir.join("one.qcow2");
    if !one.exists() {
        run("qemu-img", &["create", "-q", "-f", "qcow2", one.to_str().unwrap(), "16M"]);
    }
    let mut args: Vec<OsString> = ["-device", "virtio-scsi-pci,id=s"].map(Into::into).to_vec();
    args.extend(node("one", "qcow2", &one));
    args.extend(device("one"));
    args.extend(more);
    Bare::start(dir, &args)
}

/// The run says this of a disk that it refuses, has `one`, and leaves nothing.
fn refused(bare: &Bare, dir: &Path, words: &[&str]) {
    let caller = bare.caller("T");
    let out = caller.run("auto");
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(16), "{said}");
    assert!(words.iter().all(|w| said.contains(w)), "{words:?}: {said}");
    let folders = std::fs::read_dir(&caller.target).unwrap().flatten();
    let disks: Vec<_> = folders.map(|e| e.file_name()).filter(|n| n != ".fleecefs").collect();
    assert!(
        disks.iter().all(|n| n.to_str().unwrap().starts_with("one.qcow2") || n == "uuid"),
        "{disks:?}"
    );
    assert!(!images(&caller.target.join("one.qcow2")).is_empty());
    clean(bare, dir);
}

fn clean(bare: &Bare, dir: &Path) {
    assert_eq!(ours_in_qemu(&mut bare.qmp()), Vec::<String>::new());
    assert_eq!(leftovers(dir), Vec::<PathBuf>::new());
}

#[test]
fn a_disk_with_two_paths_is_refused_and_the_others_are_backed_up() {
    let name = "a_disk_with_two_paths_is_refused_and_the_others_are_backed_up";
    if !have(name, any_devices::TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let two = dir.path().join("two.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", two.to_str().unwrap(), "16M"]);
    let mut args: Vec<OsString> = node("two", "qcow2", &two).to_vec();
    for path in ["p0", "p1"] {
        let text = format!("scsi-hd,id={path},bus=s.0,drive=two,share-rw=on");
        args.extend(["-device".into(), text.into()]);
    }
    let bare = machine(dir.path(), args);
    refused(&bare, dir.path(), &["two: it has 2 paths (p0, p1)"]);
    let caller = bare.caller("T");
    for other in ["p0", "p1", "two", "two.qcow2"] {
        let said = caller.with(&["--exclude", other]).must("auto");
        assert_eq!(level(&caller, "one.qcow2"), "INC", "{said}");
    }
    assert_eq!(caller.with(&["--include", "p1"]).run("auto").status.code(), Some(6));
    // One path that is left is as good as any.
    bare.qmp().execute("device_del", json!({"id": "p1"}));
    wait_until_gone(&bare, "p1");
    caller.must("auto");
    assert_eq!(level(&caller, "two.qcow2"), "FULL");
    // No second one comes while it is copied.
    let held = PausedBackup::start(&caller, "auto");
    let second =
        json!({"driver": "scsi-hd", "id": "p1", "bus": "s.0", "drive": "two", "share-rw": true});
    let added = bare.qmp().try_execute("device_add", second);
    assert!(added.is_err_and(|e| e.contains("two")), "{}", held.said());
    let (code, said) = held.end();
    assert_eq!(code, Some(0), "{said}");
    clean(&bare, dir.path());
}

/// QEMU lets go of a device's disk some time after it is gone.
fn wait_until_gone(bare: &Bare, device: &str) {
    let end = std::time::Instant::now() + std::time::Duration::from_secs(60);
    let mut qmp = bare.qmp();
    while qmp.execute("x-debug-query-block-graph", json!({})).to_string().contains(device) {
        assert!(std::time::Instant::now() < end, "{device} stays");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

/// Each path has a node of its own, as with passthrough: QEMU's locks are off, or it could not be.
#[test]
fn two_nodes_on_one_file_are_two_paths() {
    let name = "two_nodes_on_one_file_are_two_paths";
    if !have(name, any_devices::TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let disk = image(&dir.path().join("disk"));
    let (second, link) = (dir.path().join("second"), dir.path().join("link"));
    std::fs::hard_link(&disk, &second).unwrap();
    std::os::unix::fs::symlink(&disk, &link).unwrap();
    for other in [&disk, &second, &link] {
        let mut args = Vec::new();
        for (name, file) in [("a", &disk), ("b", other)] {
            args.extend(unlocked(name, "raw", "", file));
            args.extend(device(name));
        }
        let bare = machine(dir.path(), args);
        refused(&bare, dir.path(), &["a: it has 2 paths to ", "/disk (p-a, p-b)"]);
        let caller = bare.caller("T");
        assert_eq!(caller.with(&["--include", "b"]).run("auto").status.code(), Some(6));
        caller.with(&["--exclude", "p-b"]).must("auto");
    }
    // An overlay of what another device writes to.
    let over = dir.path().join("over");
    let create = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b", disk.to_str().unwrap()];
    run("qemu-img", &[create.as_slice(), &[over.to_str().unwrap()]].concat());
    let backing = format!(
        ",backing.driver=raw,backing.file.driver=file,backing.file.locking=off,backing.file.filename={}",
        disk.display()
    );
    let mut args = unlocked("a", "qcow2", &backing, &over);
    args.extend(device("a"));
    args.extend(unlocked("b", "raw", "", &disk));
    args.extend(device("b"));
    let bare = machine(dir.path(), args);
    refused(&bare, dir.path(), &["a: it has 2 paths to ", "(p-a, p-b)"]);
}

#[test]
fn two_nodes_on_one_device_are_two_paths() {
    let name = "two_nodes_on_one_device_are_two_paths";
    if !have(name, any_devices::TOOLS)
        || !have(name, &["losetup", "/dev/loop-control"])
        || !is_root(name)
    {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let looped = Loop::new(&image(&dir.path().join("disk")));
    let second = dir.path().join("second");
    run("cp", &["-a", looped.path().to_str().unwrap(), second.to_str().unwrap()]);
    let mut args = unlocked("a", "raw", "", looped.path());
    args.extend(device("a"));
    let text = format!(
        "driver=raw,node-name=b,file.locking=off,file.driver=host_device,file.filename={}",
        second.display()
    );
    args.extend(["-blockdev".into(), text.into()]);
    args.extend(device("b"));
    let bare = machine(dir.path(), args);
    refused(&bare, dir.path(), &["a: it has 2 paths to ", "(p-a, p-b)"]);
}

/// The second path belongs to no guest.
#[test]
fn an_export_of_a_second_node_is_a_second_path() {
    let name = "an_export_of_a_second_node_is_a_second_path";
    if !have(name, any_devices::TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let disk = image(&dir.path().join("disk"));
    let mut args = unlocked("a", "raw", "", &disk);
    args.extend(device("a"));
    args.extend(unlocked("b", "raw", "", &disk));
    let bare = machine(dir.path(), args);
    // Nobody uses it.
    bare.caller("first").must("auto");
    let mut qmp = bare.qmp();
    let address = json!({"type": "unix", "data": {"path": dir.path().join("their-nbd.sock")}});
    qmp.execute("nbd-server-start", json!({"addr": address}));
    let export = json!({"type": "nbd", "id": "theirs", "node-name": "b", "writable": true});
    qmp.execute("block-export-add", export);
    drop(qmp);
    refused(&bare, dir.path(), &["/disk has a second path ("]);
}

#[test]
fn parts_of_one_file_that_do_not_meet_are_disks() {
    let name = "parts_of_one_file_that_do_not_meet_are_disks";
    if !have(name, any_devices::TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let disk = image(&dir.path().join("disk"));
    let machine_of = |begin: u64| {
        let mut args = unlocked("a", "raw", ",size=8388608", &disk);
        args.extend(device("a"));
        args.extend(unlocked("b", "raw", &format!(",offset={}", begin << 20), &disk));
        args.extend(device("b"));
        machine(dir.path(), args)
    };
    let bare = machine_of(8);
    let caller = bare.caller("U");
    for byte in [1, 4] {
        for (disk, byte) in [("a", byte), ("b", byte + 1)] {
            bare.io(&format!("/machine/peripheral/p-{disk}"), &format!("write -P {byte} 4M 64k"));
        }
        caller.must("auto");
    }
    let mount = Mount::new(&caller.target);
    let folders = std::fs::read_dir(mount.path()).unwrap().flatten().map(|e| e.path());
    let latest: Vec<_> = folders.map(|f| f.join("latest.raw")).filter(|p| p.exists()).collect();
    let byte_of = |p: &PathBuf| {
        let mut byte = [0];
        std::fs::File::open(p).unwrap().read_exact_at(&mut byte, 4 << 20).unwrap();
        byte[0]
    };
    let mut bytes: Vec<u8> = latest.iter().map(byte_of).collect();
    bytes.sort_unstable();
    assert_eq!(bytes, [0, 4, 5], "one.qcow2, a, b");
    drop(mount);
    drop(bare);
    refused(&machine_of(7), dir.path(), &["a: it has 2 paths to ", "/disk (p-a, p-b)"]);
}

#[test]
fn a_backing_file_that_nobody_writes_to_may_be_shared() {
    let name = "a_backing_file_that_nobody_writes_to_may_be_shared";
    if !have(name, any_devices::TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let base = image(&dir.path().join("base"));
    let mut args = Vec::new();
    for name in ["a", "b"] {
        let path = dir.path().join(name);
        let create = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b", base.to_str().unwrap()];
        run("qemu-img", &[create.as_slice(), &[path.to_str().unwrap()]].concat());
        args.extend(node(name, "qcow2", &path));
        args.extend(device(name));
    }
    let bare = machine(dir.path(), args);
    let caller: Caller = bare.caller("T");
    caller.must("auto");
    for disk in ["a", "b", "one.qcow2"] {
        assert_eq!(level(&caller, disk), "FULL");
    }
    clean(&bare, dir.path());
}
