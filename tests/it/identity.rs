//! Whose points are whose: a disk stays itself when its file moves, and two VMs are not mixed.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::support::backup::{self, Caller};
use crate::support::guest::Qmp;
use crate::support::images;
use crate::support::qemu::one_disk::{Vm, image};
use crate::support::tools::{have, run};
use fleecefs::manifest;
use inotify::{Inotify, WatchMask};
use serde_json::json;

const QEMU: &[&str] = &["qemu-system-x86_64", "qemu-img", "qemu-io"];

fn fleecefs(args: &[&str], dir: &Path) -> std::process::Output {
    Command::new(env!("CARGO_BIN_EXE_fleecefs")).args(args).arg(dir).output().unwrap()
}

/// The folders of disks, with their numbers of images.
fn folders(target: &Path) -> Vec<(String, usize)> {
    let entries = std::fs::read_dir(target).unwrap().map(|e| e.unwrap());
    let folders = entries.filter(|e| e.path().is_dir() && e.file_name() != ".fleecefs");
    let mut list: Vec<_> = folders
        .map(|e| (e.file_name().into_string().unwrap(), backup::images(&e.path()).len()))
        .collect();
    list.sort();
    list
}

fn one(name: &str, images: usize) -> Vec<(String, usize)> {
    vec![(name.to_string(), images)]
}

#[test]
fn a_disk_that_was_restored_to_another_place_stays_itself() {
    if !have("a_disk_that_was_restored_to_another_place_stays_itself", QEMU) {
        return;
    }
    for identity in [["-uuid", "11111111-2222-3333-4444-555555555555"], ["-name", "guest=web"]] {
        let d = images::tempdir();
        let vm = Vm::start(d.path(), &image(&d.path().join("a/data.qcow2")), &identity);
        let caller = vm.caller.clone();
        caller.must("auto");
        vm.quit();
        // A new file without bitmaps, under another name.
        let vm = Vm::start(d.path(), &image(&d.path().join("b/new.qcow2")), &identity);
        let said = caller.must("auto");
        assert!(said.contains("data.qcow2") && said.contains("new.qcow2 now"), "{said}");
        assert_eq!(folders(&caller.target), one("data.qcow2", 2));
        assert_eq!(backup::level(&caller, "data.qcow2"), "FULL");
        caller.must("auto");
        assert_eq!(backup::level(&caller, "data.qcow2"), "INC");
        drop(vm);
    }
}

#[test]
fn a_disk_that_was_restored_under_its_name_elsewhere_stays_itself() {
    if !have("a_disk_that_was_restored_under_its_name_elsewhere_stays_itself", QEMU) {
        return;
    }
    for more in [&[][..], &["--no-subdir"]] {
        let d = images::tempdir();
        let identity = ["-name", "guest=web"];
        let vm = Vm::start(d.path(), &image(&d.path().join("a/data.qcow2")), &identity);
        let caller = vm.caller.with(more);
        caller.must("auto");
        vm.quit();
        let vm = Vm::start(d.path(), &image(&d.path().join("b/data.qcow2")), &identity);
        let said = caller.must("auto");
        assert!(said.contains("a/data.qcow2") && said.contains("b/data.qcow2 now"), "{said}");
        caller.must("inc");
        let list = fleecefs(&["list", "--json"], &caller.target).stdout;
        let list: serde_json::Value = serde_json::from_slice(&list).unwrap();
        let disks = list["disks"].as_array().unwrap();
        assert_eq!((disks.len(), disks[0]["points"].as_array().unwrap().len()), (1, 3), "{list:#}");
        drop(vm);
    }
}

/// Folders of other disks in the target, each with `points` points, and their places for manifests.
fn other_disks(target: &Path, count: usize, points: usize) -> Vec<PathBuf> {
    let own = backup::newest(target, "data.qcow2");
    let known = manifest::read(own.parent().unwrap(), own.file_name().unwrap()).unwrap().unwrap();
    let side = |i: usize| {
        let dir = target.join(format!("d{i}.qcow2"));
        for p in 0..points {
            let image = format!("FULL-{}-d{i}.qcow2", 1_600_000_000 + p);
            std::fs::create_dir_all(&dir).unwrap();
            std::fs::write(dir.join(&image), "x").unwrap();
            let mut m = manifest::Manifest { image, ..known.clone() };
            m.disk.file = format!("/other/d{i}.qcow2");
            m.disk.qdev = format!("/machine/peripheral/d{i}");
            for b in [&mut m.bitmap, &mut m.diff_bitmap].into_iter().flatten() {
                b.name = format!("fleecefs-00000000-000000000000-{i:012x}-0");
            }
            manifest::write(&dir, &m).unwrap();
        }
        dir.join(".fleecefs")
    };
    (0..count).map(side).collect()
}

/// Runs a backup; which files in these folders were opened, and how long it took.
fn opened(caller: &Caller, folders: &[PathBuf]) -> (Vec<String>, Duration) {
    let mut watch = Inotify::init().unwrap();
    for dir in folders {
        watch.watches().add(dir, WatchMask::OPEN | WatchMask::ONLYDIR).unwrap();
    }
    let began = Instant::now();
    caller.must("auto");
    let took = began.elapsed();
    let (mut names, mut buffer) = (Vec::new(), vec![0; 1 << 20]);
    while let Ok(events) = watch.read_events(&mut buffer) {
        let files = events.filter_map(|e| Some(e.name?.to_str()?.to_owned()));
        names.extend(files.filter(|n| n.ends_with(".json")));
    }
    (names, took)
}

/// `FLEECEFS_FOLDERS=2000` measures.
#[test]
fn to_find_a_renamed_disks_folder_costs_little_and_once() {
    if !have("to_find_a_renamed_disks_folder_costs_little_and_once", QEMU) {
        return;
    }
    let count = std::env::var("FLEECEFS_FOLDERS").map_or(20, |n| n.parse().unwrap());
    let identity = ["-uuid", "11111111-2222-3333-4444-555555555555"];
    for flat in [false, true] {
        let d = tempfile::tempdir().unwrap();
        let vm = Vm::start(d.path(), &image(&d.path().join("a/data.qcow2")), &identity);
        vm.caller.must("full");
        let mut others = other_disks(&vm.caller.target, count, 5);
        let more: &[&str] = if flat { &["--no-subdir"] } else { &[] };
        let caller = match flat {
            true => {
                // As if all had been made so.
                run(
                    "sh",
                    &[
                        "-c",
                        r#"
                    cd "$1"; mkdir -p .fleecefs
                    for d in *.qcow2; do
                        mv $d/.fleecefs/*.json .fleecefs/; rm -r $d/.fleecefs; mv $d flat; mv flat/* .
                        rmdir flat
                    done"#,
                        "sh",
                        vm.caller.target.to_str().unwrap(),
                    ],
                );
                others = vec![vm.caller.target.join(".fleecefs")];
                vm.caller.with(more)
            }
            false => vm.caller.clone(),
        };
        let is_other = |n: &&String| !n.contains("-data.qcow2");
        let (names, before) = opened(&caller, &others);
        assert_eq!(names.iter().filter(is_other).count(), 0, "{names:?}");
        vm.quit();
        let vm = Vm::start(d.path(), &image(&d.path().join("b/new.qcow2")), &identity);
        let (names, first) = opened(&caller, &others);
        let old = names.iter().filter(is_other).filter(|n| !n.starts_with("FULL-1600000004-"));
        println!("flat {flat}, {count} folders: {before:?}, the first run {first:?}");
        assert_eq!(old.count(), 0, "the newest of each alone: {names:?}");
        for _ in 0..2 {
            let (names, then) = opened(&caller, &others);
            println!("flat {flat}, {count} folders: then {then:?}");
            assert_eq!(names.iter().filter(is_other).count(), 0, "{names:?}");
        }
        let folder = if flat { caller.target.clone() } else { caller.target.join("data.qcow2") };
        let own = backup::images(&folder).into_iter();
        let own = own.filter(|i| i.to_str().unwrap().ends_with("-data.qcow2"));
        assert_eq!(own.count(), 5);
        // What is remembered proves nothing: the disk is another one's by now.
        vm.quit();
        let m = manifest_of(&folder);
        manifest::write(
            &folder,
            &manifest::Manifest {
                disk: manifest::DiskIdentity {
                    file: "/elsewhere".into(),
                    qdev: "x".into(),
                    ..m.disk.clone()
                },
                vm: json!({}).into(),
                bitmap: None,
                diff_bitmap: None,
                ..m
            },
        )
        .unwrap();
        let _vm = Vm::start(d.path(), &d.path().join("b/new.qcow2"), &identity);
        caller.must("auto");
        let new = if flat { caller.target.clone() } else { caller.target.join("new.qcow2") };
        assert!(backup::images(&new).iter().any(|i| i.to_str().unwrap().ends_with("-new.qcow2")));
    }
}

/// The newest manifest of the disk `data.qcow2`.
fn manifest_of(folder: &Path) -> manifest::Manifest {
    let mut own = backup::images(folder);
    own.retain(|i| i.to_str().unwrap().ends_with("-data.qcow2"));
    manifest::read(folder, own.last().unwrap().file_name().unwrap()).unwrap().unwrap()
}

#[test]
fn a_disk_without_proof_of_who_it_is_begins_anew() {
    if !have("a_disk_without_proof_of_who_it_is_begins_anew", QEMU) {
        return;
    }
    let d = images::tempdir();
    let vm = Vm::start(d.path(), &image(&d.path().join("a/data.qcow2")), &[]);
    let caller = vm.caller.clone();
    caller.must("auto");
    vm.quit();
    let vm = Vm::start(d.path(), &image(&d.path().join("b/new.qcow2")), &[]);
    caller.must("auto");
    assert_eq!(folders(&caller.target), [("data.qcow2".into(), 1), ("new.qcow2".into(), 1)]);
    // The user says who it is.
    caller.with(&["--name", "vda=data.qcow2"]).must("auto");
    assert_eq!(folders(&caller.target), [("data.qcow2".into(), 2), ("new.qcow2".into(), 1)]);
    caller.with(&["--name", "vda=data.qcow2"]).must("inc");
    caller.with(&["--name", "n=root"]).must("auto");
    assert_eq!(folders(&caller.target)[2], ("root".into(), 1));
    for (name, code) in [("vdb=x", 3), ("vda=a/b", 2), ("vda", 2), ("vda=", 2)] {
        let out = caller.with(&["--name", name]).run("auto");
        assert_eq!(out.status.code(), Some(code), "{name}");
    }
    drop(vm);
}

#[test]
fn disks_in_one_folder_keep_their_names() {
    if !have("disks_in_one_folder_keep_their_names", QEMU) {
        return;
    }
    let d = images::tempdir();
    let identity = ["-name", "guest=web"];
    let vm = Vm::start(d.path(), &image(&d.path().join("a/data.qcow2")), &identity);
    let caller = vm.caller.with(&["--no-subdir"]);
    caller.must("auto");
    // Named once, and then forgotten.
    caller.with(&["--name", "vda=root"]).must("auto");
    caller.must("auto");
    vm.quit();
    let vm = Vm::start(d.path(), &image(&d.path().join("b/new.qcow2")), &identity);
    for _ in 0..2 {
        caller.must("auto");
    }
    drop(vm);
    let out = fleecefs(&["list", "--strict"], &caller.target);
    let said = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success() && said.contains("INC"), "{said}");
    let headings = said.lines().filter(|l| !l.starts_with(' ') && l.contains(" point"));
    let mut disks: Vec<&str> = headings.filter_map(|l| l.split(':').next()).collect();
    disks.sort();
    assert_eq!(disks, ["data.qcow2", "root"], "{said}");
}

#[test]
fn a_disk_that_moved_and_got_another_device_is_sound() {
    if !have("a_disk_that_moved_and_got_another_device_is_sound", QEMU) {
        return;
    }
    let d = images::tempdir();
    let identity = ["-name", "guest=web"];
    let file = image(&d.path().join("a/data.qcow2"));
    let vm = Vm::start(d.path(), &file, &identity);
    let caller = vm.caller.clone();
    caller.must("auto");
    vm.quit();
    let moved = d.path().join("b/data.qcow2");
    std::fs::create_dir(d.path().join("b")).unwrap();
    std::fs::rename(&file, &moved).unwrap();
    let vm = Vm::on(d.path(), &moved, ("other", "vdx"), &identity);
    caller.must("inc");
    vm.quit();
    assert_eq!(fleecefs(&["verify"], &caller.target).status.code(), Some(0));
    // Under another name its bitmap tells who it is.
    let renamed = d.path().join("b/renamed.qcow2");
    std::fs::rename(&moved, &renamed).unwrap();
    let vm = Vm::on(d.path(), &renamed, ("third", "vdy"), &identity);
    let said = caller.must("inc");
    assert_eq!(folders(&caller.target), one("data.qcow2", 3), "{said}");
    drop(vm);
    assert_eq!(fleecefs(&["verify"], &caller.target).status.code(), Some(0));
}

#[test]
fn another_disk_at_the_same_place_is_another_disk() {
    if !have("another_disk_at_the_same_place_is_another_disk", QEMU) {
        return;
    }
    let d = images::tempdir();
    let identity = ["-name", "guest=web"];
    let vm = Vm::start(d.path(), &image(&d.path().join("data.qcow2")), &identity);
    let caller = vm.caller.clone();
    caller.must("auto");
    vm.quit();
    let other = image(&d.path().join("other.qcow2"));
    run("qemu-img", &["resize", "-q", other.to_str().unwrap(), "8M"]);
    let vm = Vm::start(d.path(), &other, &identity);
    caller.must("auto");
    assert_eq!(folders(&caller.target), [("data.qcow2".into(), 1), ("other.qcow2".into(), 1)]);
    drop(vm);
}

#[test]
fn another_vm_is_not_taken_in_unless_the_user_says_so() {
    if !have("another_vm_is_not_taken_in_unless_the_user_says_so", QEMU) {
        return;
    }
    let d = images::tempdir();
    let (web, db) = (["-name", "guest=web"], ["-name", "guest=db"]);
    let vm = Vm::start(d.path(), &image(&d.path().join("web.qcow2")), &web);
    let target = vm.caller.target.clone();
    vm.caller.must("auto");
    drop(vm);
    let home = d.path().join("other");
    let vm = Vm::start(&home, &image(&home.join("db.qcow2")), &db);
    let caller = Caller { target: target.clone(), ..vm.caller.clone() };
    for _ in 0..2 {
        for more in [&[][..], &["--dry-run"]] {
            let out = caller.with(more).run("auto");
            let said = String::from_utf8_lossy(&out.stderr);
            assert_eq!(out.status.code(), Some(2), "{said}");
            assert!(said.contains("another VM (web)") && said.contains("--shared"), "{said}");
        }
        assert_eq!(folders(&target), one("web.qcow2", 1));
    }
    // Nor by a name.
    for (more, code) in [(&[][..], 2), (&["--shared"], 2)] {
        let named = caller.with(&["--name", "vda=web.qcow2"]);
        assert_eq!(named.with(more).run("auto").status.code(), Some(code));
        assert_eq!(folders(&target), one("web.qcow2", 1));
    }
    caller.with(&["--shared"]).must("auto");
    caller.must("auto");
    assert_eq!(folders(&target), [("db.qcow2".into(), 2), ("web.qcow2".into(), 1)]);
    drop(vm);
    // Each has its runs, and the latest is of each.
    let runs = fleecefs(&["list", "--runs"], &target).stdout;
    let runs = String::from_utf8(runs).unwrap();
    assert!(runs.contains(" web ") && runs.contains(" db "), "{runs}");
    let to = d.path().join("restored");
    let to = to.to_str().unwrap();
    let out = fleecefs(&["restore", "--run", "latest", "--to", to], &target);
    assert!(out.status.success() && out.stderr.is_empty(), "{out:?}");
    assert_eq!(std::fs::read_dir(to).unwrap().count(), 2);
    // The first one goes on, a disk more or less.
    let vm = Vm::start(d.path(), &image(&d.path().join("web2.qcow2")), &web);
    vm.caller.must("auto");
    drop(vm);
}

#[test]
fn a_target_whose_path_is_no_text_is_worked_on_and_remembered() {
    if !have("a_target_whose_path_is_no_text_is_worked_on_and_remembered", QEMU) {
        return;
    }
    let d = images::tempdir();
    let disk = image(&d.path().join("a/data.qcow2"));
    let vm = Vm::start(d.path(), &disk, &[]);
    let mut caller = vm.caller.clone();
    caller.target = d.path().join(OsStr::from_bytes(b"T\xff"));
    caller.state = d.path().join(OsStr::from_bytes(b"state\xfe"));
    caller.must("full");
    let write = |pattern: usize| {
        let line = format!("qemu-io n \"write -P {} 2M 64k\"", pattern % 250 + 1);
        let mut qmp = Qmp::connect(&caller.qmp);
        qmp.execute("human-monitor-command", json!({"command-line": line}));
    };
    let mut killed = 0;
    // Each step is in the matrix of kills; here it is what is written down that counts.
    for step in (1..).step_by(5) {
        write(step);
        let out =
            caller.command("inc").env("FLEECEFS_CRASH_AT", step.to_string()).output().unwrap();
        if out.status.success() {
            break;
        }
        assert_eq!(out.status.code(), None, "{out:?}");
        killed += 1;
        caller.must_recover(&[]);
        caller.must("auto");
    }
    assert!(killed > 3, "{killed}");
    vm.quit();
    let raw = |name: &str| d.path().join(name);
    let text = |path: &Path| path.to_str().unwrap().to_string();
    run("qemu-img", &["convert", "-O", "raw", &text(&disk), &text(&raw("disk.raw"))]);
    let out = Command::new(env!("CARGO_BIN_EXE_fleecefs"))
        .arg("restore")
        .arg(&caller.target)
        .args(["data.qcow2/latest", &text(&raw("restored.raw"))])
        .output()
        .unwrap();
    assert!(out.status.success(), "{out:?}");
    assert!(std::fs::read(raw("disk.raw")).unwrap() == std::fs::read(raw("restored.raw")).unwrap());
    // It is remembered by its very bytes: where it is gone, no new one is begun.
    std::fs::remove_dir_all(&caller.target).unwrap();
    let _vm = Vm::start(d.path(), &disk, &[]);
    let out = caller.run("full");
    assert_eq!(out.status.code(), Some(3), "{out:?}");
}

/// As loop devices do that get each other's number, or images that an administrator renames.
#[test]
fn disks_that_have_each_others_files_keep_their_points() {
    if !have("disks_that_have_each_others_files_keep_their_points", QEMU) {
        return;
    }
    let d = images::tempdir();
    let files = ["a", "b"].map(|n| image(&d.path().join(format!("{n}.qcow2"))));
    let start = |files: [&Path; 2]| {
        let mut args = vec!["-name".to_string(), "guest=web".into()];
        for ((file, name), serial) in files.iter().zip(["a", "b"]).zip(["SER-A", "SER-B"]) {
            let file = file.display();
            let node = format!("qcow2,node-name={name},file.driver=file,file.filename={file}");
            let device = format!("virtio-blk-pci,drive={name},id=v{name},serial={serial}");
            args.extend(["-blockdev".into(), node, "-device".into(), device]);
        }
        Vm::with(d.path(), &args.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let vm = start([&files[0], &files[1]]);
    let caller = vm.caller.clone();
    caller.must("auto");
    let serial = |disk: &str| {
        let folder = caller.target.join(disk);
        let newest = backup::newest(&caller.target, disk);
        manifest::read(&folder, newest.file_name().unwrap()).unwrap().unwrap().disk.serial
    };
    assert_eq!(["a.qcow2", "b.qcow2"].map(serial), ["SER-A", "SER-B"]);
    vm.quit();

    let aside = d.path().join("aside");
    for (from, to) in [(&files[0], &aside), (&files[1], &files[0]), (&aside, &files[1])] {
        std::fs::rename(from, to).unwrap();
    }
    let vm = start([&files[1], &files[0]]);
    let said = caller.must("auto");
    assert_eq!(said.matches("its points stay in").count(), 2, "{said}");
    for disk in ["a.qcow2", "b.qcow2"] {
        assert_eq!(backup::level(&caller, disk), "INC", "{said}");
    }
    vm.quit();
    // New files without bitmaps, exchanged once more: the serial numbers tell.
    let new = ["a", "b"].map(|n| image(&d.path().join(format!("new/{n}.qcow2"))));
    for (from, to) in new.iter().zip(&files) {
        std::fs::rename(from, to).unwrap();
    }
    let vm = start([&files[0], &files[1]]);
    caller.must("auto");
    assert_eq!(folders(&caller.target), [("a.qcow2".into(), 3), ("b.qcow2".into(), 3)]);
    assert_eq!(["a.qcow2", "b.qcow2"].map(serial), ["SER-A", "SER-B"]);
    drop(vm);
    assert_eq!(fleecefs(&["verify"], &caller.target).status.code(), Some(0));
}
