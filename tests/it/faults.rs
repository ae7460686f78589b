//! What goes wrong around a backup, and what the next `backup --level auto` makes of it: always
//! exit 0, an INC or a FULL as the rules say, and bytes that are those of the freeze point.
//!
//! `cargo test --test it faults:: -- --nocapture` prints a line per fault and outcome.

use std::path::PathBuf;
use std::process::Command;

use crate::support::backup::{
    Caller, PausedBackup, bitmaps, images, leftovers, level, manifest_of, newest, same,
};
use crate::support::checked::{clean, code, daemon, good, image_of};
use crate::support::guard::Guard;
use crate::support::guest;
use crate::support::mount::Mount;
use crate::support::qemu::storage_daemon::Daemon;
use crate::support::tools::{have, run};
use serde_json::json;

const TOOLS: &[&str] = &["qemu-storage-daemon", "qemu-img", "qemu-io", "/dev/fuse"];

/// Two disks that have a FULL; `None` if something that the test needs is missing.
fn after_a_full(test: &str) -> Option<(Daemon, Caller)> {
    if !have(test, TOOLS) {
        return None;
    }
    let d = daemon(&[]);
    let caller = Caller::of(&d);
    caller.must("full");
    Some((d, caller))
}

#[test]
fn qemu_killed_or_restarted() {
    if !have("qemu_killed_or_restarted", TOOLS) {
        return;
    }
    let mut d = daemon(&[("b", "driver=raw")]);
    let caller = Caller::of(&d);
    caller.must("full");
    d.restart();
    d.io("a", &["write -P 7 1M 1M"]);
    good("QEMU ended in order, restarted", &d, &caller, &[("a.img", "INC"), ("b.img", "FULL")]);
    d.restart_after_kill();
    d.io("a", &["write -P 8 2M 1M"]);
    let said = good("QEMU killed, restarted", &d, &caller, &[("a.img", "FULL"), ("b.img", "FULL")]);
    assert!(said.contains("inconsistent") || said.contains("is not on the disk"), "{said}");
    let list = bitmaps(&mut d.qmp());
    assert_eq!(list.len(), 2, "the inconsistent ones are gone: {list:?}");

    let held = PausedBackup::start(&caller, "inc");
    // Whatever it does next, another QEMU listens there already.
    held.signal(libc::SIGSTOP);
    d.restart_after_kill();
    held.signal(libc::SIGCONT);
    let (exit, said) = held.end();
    assert!(exit.is_some_and(|c| c != 0), "{said}");
    assert_eq!(leftovers(d.dir.path()), Vec::<PathBuf>::new(), "{said}");
    good("QEMU killed during the copy", &d, &caller, &[("a.img", "FULL"), ("b.img", "FULL")]);
}

#[test]
fn last_point_deleted_replaced_or_elsewhere() {
    let Some((d, caller)) = after_a_full("last_point_deleted_replaced_or_elsewhere") else {
        return;
    };
    d.io("a", &["write -P 9 3M 1M"]);
    caller.must("inc");
    std::fs::remove_file(newest(&caller.target, "a.img")).unwrap();
    // The FULL's own bitmap, kept for DIFFs, still records since then.
    good("the only INC deleted", &d, &caller, &[("a.img", "INC")]);
    caller.must("inc");
    std::fs::remove_file(newest(&caller.target, "a.img")).unwrap();
    let (exit, said) = code(&caller, "inc");
    assert_eq!(exit, Some(12), "{said}");
    good("last point deleted", &d, &caller, &[("a.img", "FULL")]);

    d.io("a", &["write -P 9 3M 1M"]);
    good("nothing", &d, &caller, &[("a.img", "INC")]);
    let last = newest(&caller.target, "a.img");
    let len = std::fs::metadata(&last).unwrap().len();
    std::fs::write(&last, vec![0x51; len as usize]).unwrap();
    let said = good("last point replaced", &d, &caller, &[("a.img", "FULL")]);
    assert!(said.contains("replaced"), "{said}");

    // A second target has chains and bitmaps of its own; neither disturbs the other.
    let mut other = caller.clone();
    other.target = d.path("T2");
    good("another target", &d, &other, &[("a.img", "FULL")]);
    d.io("a", &["write -P 10 4M 1M"]);
    good("two targets side by side", &d, &caller, &[("a.img", "INC")]);
    good("two targets side by side", &d, &other, &[("a.img", "INC")]);

    // A chain that upstream began has no manifest: its bitmap's start cannot be proved.
    let full = images(&caller.target.join("a.img")).pop().unwrap();
    std::fs::copy(&full, caller.target.join("a.img/FULL-9000000000-a.img")).unwrap();
    let said = good("a FULL of another program", &d, &caller, &[("a.img", "FULL")]);
    assert!(said.contains("not made by fleecefs"), "{said}");
}

#[test]
fn a_corrupt_chain_is_not_built_on() {
    let Some((d, caller)) = after_a_full("a_corrupt_chain_is_not_built_on") else { return };
    d.io("a", &["write -P 9 3M 1M"]);
    caller.must("inc");
    // The FULL's L2 table, in the middle of the file, is beyond what the fingerprint covers.
    let full = images(&caller.target.join("a.img")).remove(0);
    let mut bytes = std::fs::read(&full).unwrap();
    let at = |b: &[u8], o: usize| u64::from_be_bytes(b[o..o + 8].try_into().unwrap());
    let l1 = at(&bytes, 40) as usize;
    let l2 = (at(&bytes, l1) & 0x00ff_ffff_ffff_fe00) as usize;
    bytes[l2 + 8..l2 + 16].copy_from_slice(&0x8000_0000_0000_0100u64.to_be_bytes());
    std::fs::write(&full, bytes).unwrap();
    good("a damaged table in the FULL", &d, &caller, &[("a.img", "FULL")]);
}

#[test]
fn disk_rolled_back() {
    if !have("disk_rolled_back", TOOLS) {
        return;
    }
    let mut d = daemon(&[]);
    let caller = Caller::of(&d);
    caller.must("full");
    d.stop();
    std::fs::copy(image_of(&d, "a"), d.path("old")).unwrap();
    d.respawn();
    d.io("a", &["write -P 5 5M 1M"]);
    caller.must("inc");
    d.stop();
    std::fs::copy(d.path("old"), image_of(&d, "a")).unwrap();
    d.respawn();
    good("disk rolled back behind the last point", &d, &caller, &[("a.img", "FULL")]);
    d.stop();
    std::fs::copy(image_of(&d, "a"), d.path("old")).unwrap();
    d.respawn();
    d.io("a", &["write -P 6 5M 1M"]);
    d.stop();
    std::fs::copy(d.path("old"), image_of(&d, "a")).unwrap();
    d.respawn();
    d.io("a", &["write -P 7 6M 1M"]);
    good("disk rolled back to the last point", &d, &caller, &[("a.img", "INC")]);
}

#[test]
fn signals_and_cancel() {
    if !have("signals_and_cancel", TOOLS) {
        return;
    }
    let d = daemon(&[("b", "driver=raw")]);
    let caller = Caller::of(&d);
    caller.must("full");
    for (name, signal) in [("SIGTERM", libc::SIGTERM), ("SIGINT", libc::SIGINT)] {
        let held = PausedBackup::start(&caller, "inc");
        d.io("a", &["write -P 5 5M 1M"]);
        held.signal(signal);
        let mut child = held.child;
        assert_eq!(child.wait().unwrap().code(), Some(130), "{name}");
        clean(name, &d);
        good(name, &d, &caller, &[("a.img", "INC"), ("b.img", "INC")]);
    }
    let held = PausedBackup::start(&caller, "inc");
    let ask = |words: &[&str]| {
        let out = Command::new(env!("CARGO_BIN_EXE_fleecefs"))
            .args(words)
            .arg("--qmp")
            .arg(&caller.qmp)
            .arg("--state-dir")
            .arg(&caller.state)
            .output()
            .unwrap();
        String::from_utf8_lossy(&out.stdout).into_owned()
    };
    let status = ask(&["info", "status"]);
    assert!(status.contains("copying") && status.contains("INC"), "{status}");
    assert!(ask(&["cancel"]).contains("stopping backup"));
    let mut child = held.child;
    assert_eq!(child.wait().unwrap().code(), Some(130));
    clean("cancel", &d);
    good("cancel", &d, &caller, &[("a.img", "INC"), ("b.img", "INC")]);
    assert!(ask(&["info", "status"]).contains("no backup"));
}

fn resize(d: &mut Daemon, disk: &str, size: &str) {
    d.stop();
    let path = image_of(d, disk);
    let format = if disk == "a" { "qcow2" } else { "raw" };
    run("qemu-img", &["resize", "-q", "--shrink", "-f", format, &path, size]);
    d.respawn();
}

#[test]
fn grow_shrink_and_both() {
    if !have("grow_shrink_and_both", TOOLS) {
        return;
    }
    let mut d = daemon(&[]);
    let caller = Caller::of(&d);
    caller.must("full");
    resize(&mut d, "a", "24M");
    d.io("a", &["write -P 5 20M 1M"]);
    good("grow", &d, &caller, &[("a.img", "INC")]);
    resize(&mut d, "a", "14M");
    good("shrink", &d, &caller, &[("a.img", "FULL")]);
    d.stop();
    let path = image_of(&d, "a");
    for size in ["13M", "20M"] {
        run("qemu-img", &["resize", "-q", "--shrink", "-f", "qcow2", &path, size]);
    }
    d.respawn();
    let said = good("shrink then grow", &d, &caller, &[("a.img", "INC")]);
    assert!(said.contains("without a dirty bit"), "{said}");
    let said = good("after shrink then grow", &d, &caller, &[("a.img", "INC")]);
    assert!(!said.contains("without a dirty bit"), "{said}");
}

/// QEMU forgets the dirty bits of what it cuts off; what was in the cluster of the new end is still
/// there when the disk grows again.
#[test]
fn what_was_cut_off_inside_a_cluster_comes_back() {
    if !have("what_was_cut_off_inside_a_cluster_comes_back", TOOLS) {
        return;
    }
    for cluster in [64 << 10, 2 << 20] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.img").display().to_string();
        let options = format!("cluster_size={cluster}");
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &options, &path, "8M"]);
        let mut d = Daemon::start(dir, &[("a", "driver=qcow2")]);
        let caller = Caller::of(&d);
        d.io("a", &["write -P 1 0 8M"]);
        caller.must("full");
        let cut = ((2 << 20) + 512).to_string();
        let in_its_cluster = (2 << 20) + cluster - 4096;
        d.io("a", &[&format!("write -P 119 {in_its_cluster} 4k")]);
        resize(&mut d, "a", &cut);
        resize(&mut d, "a", "8M");
        good("shrunk and grown between two points", &d, &caller, &[("a.img", "INC")]);
        d.io("a", &[&format!("write -P 120 {in_its_cluster} 4k")]);
        resize(&mut d, "a", &cut);
        good("shrunk", &d, &caller, &[("a.img", "FULL")]);
        resize(&mut d, "a", "8M");
        good("grown after a point", &d, &caller, &[("a.img", "INC")]);
    }
}

/// A small file system; unmounted on drop. Needs root.
struct Small {
    _mount: Guard,
    dir: tempfile::TempDir,
}

impl Small {
    fn new(test: &str, size: &str) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let options = format!("-t tmpfs -o size={size}");
        if let Ok(mount) = Guard::try_mount(&options, "tmpfs".as_ref(), dir.path()) {
            return Some(Small { _mount: mount, dir });
        }
        assert!(std::env::var_os("CI").is_none(), "{test} needs root");
        println!("skipped: {test} needs root");
        None
    }

    fn grow(&self, size: &str) {
        let dir = self.dir.path().to_str().unwrap();
        run("mount", &["-o", &format!("remount,size={size}"), dir]);
    }
}

#[test]
fn no_space_for_the_image() {
    let name = "no_space_for_the_image";
    if !have(name, TOOLS) {
        return;
    }
    let Some(small) = Small::new(name, "13M") else { return };
    let d = daemon(&[]);
    let elsewhere = d.dir.path().to_str().unwrap();
    let mut caller = Caller::of(&d).with(&["--fleece-dir", elsewhere]);
    caller.target = small.dir.path().join("T");
    caller.must("full");
    d.io("a", &["write -P 5 0 8M"]);
    let (exit, said) = code(&caller, "inc");
    assert_eq!(exit, Some(7), "{said}");
    assert!(said.contains("needs about"), "seen before the start: {said}");
    let (exit, said) = code(&caller.with(&["--no-space-check"]), "inc");
    assert_eq!(exit, Some(7), "{said}");
    assert_eq!(leftovers(&caller.target), Vec::<PathBuf>::new());
    clean("target ENOSPC", &d);
    small.grow("64M");
    good("target ENOSPC", &d, &caller, &[("a.img", "INC")]);
}

#[test]
fn no_space_for_the_fleece() {
    let name = "no_space_for_the_fleece";
    if !have(name, TOOLS) {
        return;
    }
    let Some(small) = Small::new(name, "1M") else { return };
    let d = daemon(&[]);
    let caller = Caller::of(&d);
    caller.must("full");
    d.io("a", &["write -P 5 0 1M"]);
    let dir = small.dir.path().to_str().unwrap();
    let tight = caller.with(&["--no-space-check", "--fleece-dir", dir]);
    let held = PausedBackup::start(&tight, "inc");
    // The guest's own writes must go on, whatever becomes of the fleece.
    d.io("a", &["write -P 6 0 6M", "write -P 6 12M 4M"]);
    let (exit, said) = held.end();
    assert_eq!(exit, Some(7), "{said}");
    assert!(said.contains("had nearly filled its file system"), "{said}");
    assert_eq!(leftovers(small.dir.path()), Vec::<PathBuf>::new());
    clean("fleece ENOSPC", &d);
    good("fleece ENOSPC", &d, &caller, &[("a.img", "INC")]);
}

#[test]
fn target_removed_during_the_copy() {
    let Some((d, caller)) = after_a_full("target_removed_during_the_copy") else { return };
    let held = PausedBackup::start(&caller, "inc");
    std::fs::remove_dir_all(&caller.target).unwrap();
    let (exit, said) = held.end();
    assert!(exit.is_some_and(|c| c != 0), "{said}");
    clean("target removed", &d);
    // Nobody can tell it from one that is not mounted.
    assert_eq!(code(&caller, "auto").0, Some(3));
    good("target removed", &d, &caller.with(&["--init"]), &[("a.img", "FULL")]);
}

#[test]
fn one_disk_fails_and_the_other_has_its_point() {
    if !have("one_disk_fails_and_the_other_has_its_point", TOOLS) {
        return;
    }
    let bad = "driver=raw,file.driver=blkdebug,file.inject-error.0.event=none,\
               file.inject-error.0.iotype=read,file.inject-error.0.sector=4096";
    let mut d = daemon(&[("b", bad)]);
    let caller = Caller::of(&d);
    let (exit, said) = code(&caller, "full");
    assert_eq!(exit, Some(16), "{said}");
    assert!(said.contains("Input/output error"), "{said}");
    assert_eq!(images(&caller.target.join("a.img")).len(), 1);
    assert_eq!(images(&caller.target.join("b.img")).len(), 0);
    // The point that was made says that its run was partial.
    let manifest = manifest_of(&newest(&caller.target, "a.img"));
    assert_eq!(manifest["failed"].as_array().unwrap().len(), 1, "{manifest}");
    assert!(manifest["failed"][0]["reason"].as_str().unwrap().contains("Input/output error"));
    clean("a job error by blkdebug", &d);
    // Its disk is healed; the other goes on.
    d.heal("b", "driver=raw");
    good("one of two disks failed", &d, &caller, &[("a.img", "INC"), ("b.img", "FULL")]);
}

#[test]
fn disks_come_and_go() {
    let Some((d, caller)) = after_a_full("disks_come_and_go") else { return };
    let path = d.path("sub/a.img");
    std::fs::create_dir(d.path("sub")).unwrap();
    run("qemu-img", &["create", "-q", "-f", "qcow2", path.to_str().unwrap(), "16M"]);
    let mut qmp = d.qmp();
    let file = json!({"driver": "file", "filename": path, "discard": "unmap"});
    qmp.execute("blockdev-add", json!({"driver": "qcow2", "node-name": "n", "file": file}));
    let top = json!({"driver": "raw", "node-name": "n-top", "file": "n", "discard": "unmap"});
    qmp.execute("blockdev-add", top);
    let export = json!({"type": "nbd", "id": "n-e", "node-name": "n-top", "name": "n",
        "writable": true});
    qmp.execute("block-export-add", export);
    drop(qmp);
    d.io("n", &["write -P 3 1M 1M"]);
    // Its file has the name of the other disk's: it gets a folder of its own.
    let (_, views) = caller.held("auto");
    assert_eq!(views.len(), 2);
    let mount = Mount::new(&caller.target);
    let of_first = |v: &&(String, Vec<u8>)| v.1[0] == 1;
    let first = views.iter().find(of_first).unwrap();
    let second = views.iter().find(|v| !of_first(v)).unwrap();
    same(&mount, "a.img", &newest(&caller.target, "a.img"), &first.1);
    same(&mount, "a.img-2", &newest(&caller.target, "a.img-2"), &second.1);
    assert_eq!(
        (level(&caller, "a.img").as_str(), level(&caller, "a.img-2").as_str()),
        ("INC", "FULL")
    );
    println!("{:44} | new disk FULL, the other INC", "hot-plugged, of the same name");
    caller.must("inc");
    assert_eq!(level(&caller, "a.img-2"), "INC");
    let mut qmp = d.qmp();
    qmp.execute("block-export-del", json!({"id": "n-e", "mode": "hard"}));
    qmp.wait_event("BLOCK_EXPORT_DELETED");
    for n in ["n-top", "n"] {
        qmp.execute("blockdev-del", json!({"node-name": n}));
    }
    drop(qmp);
    good("unplugged", &d, &caller, &[("a.img", "INC")]);
}

#[test]
fn the_nbd_server_is_somebody_elses() {
    if !have("the_nbd_server_is_somebody_elses", TOOLS) {
        return;
    }
    let d = daemon(&[]);
    let mut caller = Caller::of(&d);
    let known = std::mem::take(&mut caller.more);
    caller.must("full");
    let foreseen = caller.with(&["-n"]).run("inc").stdout;
    let foreseen = String::from_utf8_lossy(&foreseen);
    assert!(foreseen.contains("cannot be backed up: QEMU's NBD server"), "{foreseen}");
    let (exit, said) = code(&caller, "inc");
    assert_eq!(exit, Some(12), "{said}");
    let foreseen = caller.with(&["-n", "--nbd", known[1].as_str()]).run("inc").stdout;
    assert!(String::from_utf8_lossy(&foreseen).contains("INC -> "));
    let said = caller.must("auto");
    assert!(said.contains("taking a FULL: QEMU's NBD server"), "{said}");
    caller.more = known;
    good("NBD server named with --nbd", &d, &caller, &[("a.img", "INC")]);
}

#[test]
fn sockets_that_are_no_qmp() {
    if !have("sockets_that_are_no_qmp", TOOLS) {
        return;
    }
    let d = daemon(&[]);
    let caller = Caller::of(&d);
    let _holder = guest::Qmp::connect(&caller.qmp);
    let (exit, said) = code(&caller, "full");
    assert_eq!(exit, Some(6), "{said}");
    assert!(said.contains("second one"), "{said}");
    let mut wrong = caller.clone();
    wrong.qmp = d.path("nbd.sock");
    let (exit, said) = code(&wrong, "full");
    assert_eq!(exit, Some(14), "{said}");
    assert!(said.contains("not a QMP socket"), "{said}");
    wrong.qmp = d.path("nothing");
    assert_eq!(code(&wrong, "full").0, Some(3));
}
