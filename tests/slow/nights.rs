//! Backups that nobody watches: what went wrong is told and is an exit code; what went well is silent
//! and 0.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::backup::{self, Caller, images};
use crate::support::checked::{code, daemon, good};
use crate::support::images;
use crate::support::qemu::two_disks::Machine;
use crate::support::tools::have;
use serde_json::json;

const TOOLS: &[&str] = &["qemu-storage-daemon", "qemu-img", "qemu-io", "/dev/fuse"];
const QEMU: &[&str] = &["qemu-system-x86_64", "qemu-img", "qemu-io"];

/// Exit code, and what was said on either output.
fn fleecefs(args: &[&str], dir: &Path) -> (Option<i32>, String) {
    let out = Command::new(env!("CARGO_BIN_EXE_fleecefs")).args(args).arg(dir).output().unwrap();
    let text = [out.stdout, out.stderr].concat();
    (out.status.code(), String::from_utf8_lossy(&text).into_owned())
}

fn entries(dir: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect()
}

#[test]
fn a_backup_disk_that_is_not_mounted_gets_no_backup() {
    if !have("a_backup_disk_that_is_not_mounted_gets_no_backup", TOOLS) {
        return;
    }
    let d = daemon(&[]);
    let mut caller = Caller::of(&d);
    let place = d.path("disks/usb");
    caller.target = place.join("T");
    let (exit, said) = code(&caller, "full");
    assert_eq!((exit, d.path("disks").exists()), (Some(3), false), "{said}");
    assert!(said.contains("that its file system is mounted"), "{said}");

    std::fs::create_dir_all(&place).unwrap();
    caller.must("full");
    let copies = Caller { target: place.join("copies"), ..caller.clone() };
    copies.must("copy");
    // The disk goes, and what was its mount point is an empty folder, or has another one in it.
    let away = d.path("away");
    std::fs::rename(&place, &away).unwrap();
    for (name, below) in [("no mount point", false), ("a mount point", true)] {
        if below {
            std::fs::create_dir_all(&caller.target).unwrap();
        }
        for level in ["inc", "auto", "full", "copy"] {
            let (exit, said) = code(&caller.with(&["-q"]), level);
            assert_eq!(exit, Some(3), "{name}, {level}: {said}");
            assert!(said.contains("gone") && said.contains("--init"), "{name}: {said}");
            assert!(code(&caller.with(&["--dry-run"]), level).0 == Some(3), "{name}, {level}");
        }
        assert_eq!(code(&copies, "copy").0, Some(3), "{name}");
        // Nor by another socket of the same QEMU, which makes another VM of it.
        let other = Caller { qmp: d.path("qmp2.sock"), ..caller.clone() };
        assert_eq!(code(&other, "full").0, Some(3), "{name}");
        assert!(!below || entries(&caller.target).is_empty(), "{name}");
    }
    std::fs::remove_dir_all(&place).unwrap();
    std::fs::rename(&away, &place).unwrap();
    good("the disk is there again", &d, &caller, &[("a.img", "INC")]);

    // By a link that leads to it, the same.
    let link = d.path("link");
    std::os::unix::fs::symlink(&caller.target, &link).unwrap();
    let linked = Caller { target: link, ..caller.clone() };
    good("by a link", &d, &linked, &[("a.img", "INC")]);
    std::fs::rename(&place, &away).unwrap();
    for level in ["auto", "full", "copy"] {
        let (exit, said) = code(&linked.with(&["-q"]), level);
        assert_eq!(exit, Some(3), "{level}: {said}");
        assert!(said.contains("symbolic link") && said.contains("mounted"), "{level}: {said}");
    }
    std::fs::rename(&away, &place).unwrap();

    // Another disk in its place is a backup directory if it says so, or if the user does.
    std::fs::rename(&place, &away).unwrap();
    good("a new disk", &d, &caller.with(&["--init"]), &[("a.img", "FULL")]);
    good("and again", &d, &caller, &[("a.img", "INC")]);
    let second = d.path("second");
    std::fs::rename(&place, &second).unwrap();
    std::fs::rename(&away, &place).unwrap();
    good("the first again", &d, &caller, &[("a.img", "INC")]);
}

#[test]
fn a_folder_of_other_files_becomes_a_target_with_init_alone() {
    if !have("a_folder_of_other_files_becomes_a_target_with_init_alone", TOOLS) {
        return;
    }
    let d = daemon(&[]);
    let caller = Caller { target: d.path("Documents"), ..Caller::of(&d) };
    std::fs::create_dir_all(caller.target.join("Photos")).unwrap();
    std::fs::write(caller.target.join("Photos/1.jpg"), "x").unwrap();
    for level in ["full", "copy"] {
        for more in [&["-n"][..], &[]] {
            let (exit, said) = code(&caller.with(more), level);
            assert_eq!(exit, Some(4), "{said}");
            assert!(said.contains("Photos") && said.contains("--init"), "{said}");
        }
    }
    assert_eq!(entries(&caller.target).len(), 1);
    good("with --init", &d, &caller.with(&["--init"]), &[("a.img", "FULL")]);
    good("and again", &d, &caller, &[("a.img", "INC")]);
    assert!(caller.target.join("Photos/1.jpg").exists());

    // One that has nothing but copies is known by what is in it, whoever asks.
    let copies = Caller { target: d.path("copies"), ..Caller::of(&d) }.with(&["--monthly"]);
    for _ in 0..2 {
        let (exit, said) = code(&copies, "copy");
        assert_eq!(exit, Some(0), "{said}");
        std::fs::remove_dir_all(&copies.state).unwrap();
    }
    // A folder with the name of an id is none.
    std::fs::create_dir_all(d.path("other/a/uuid")).unwrap();
    let other = Caller { target: d.path("other"), ..Caller::of(&d) };
    assert_eq!(code(&other, "copy").0, Some(4));
}

#[test]
fn warnings_are_heard_and_count() {
    if !have("warnings_are_heard_and_count", QEMU) {
        return;
    }
    let mut m = Machine::begin();
    let caller = m.caller();
    let (exit, said) = code(&caller.with(&["--strict"]), "auto");
    assert_eq!(exit, Some(0), "{said}");
    assert!(!said.contains("warning"), "the first backup is a FULL, of course: {said}");
    assert!(said.contains("first backup"), "{said}");

    // What the user does not want is not missing.
    for wish in [["--exclude", "v1"], ["--include", "v0"]] {
        let (exit, said) = code(&caller.with(&["--strict"]).with(&wish), "auto");
        assert_eq!(exit, Some(0), "{said}");
    }

    // A name that is none leaves nothing out.
    let typo = caller.with(&["--exclude", "vl"]);
    let (exit, said) = code(&typo.with(&["-q"]), "auto");
    assert_eq!(exit, Some(0), "{said}");
    assert!(said.contains("--exclude vl: there is no such disk"), "{said}");
    let plan = typo.with(&["-n"]).run("auto").stdout;
    assert!(String::from_utf8_lossy(&plan).contains("no such disk"));
    assert_eq!(code(&typo.with(&["--strict"]), "auto").0, Some(17));

    // Nor is a FULL that is due an alarm.
    let due = caller.with(&["--strict", "-q", "--full-every", "1"]);
    assert_eq!(code(&due, "auto"), (Some(0), String::new()));

    let agent = m.text("no-agent");
    let frozen = caller.with(&["--quiesce", "--agent", &agent]);
    let (exit, said) = code(&frozen.with(&["-q"]), "auto");
    assert_eq!(exit, Some(0), "{said}");
    assert!(said.starts_with("warning: ") && said.lines().count() == 1, "{said:?}");
    assert_eq!(code(&frozen.with(&["-qq"]), "auto"), (Some(0), String::new()));
    assert_eq!(code(&caller.with(&["-q"]), "auto"), (Some(0), String::new()));
    let folder = caller.target.join("a.qcow2");
    let before = images(&folder).len();
    let (exit, said) = code(&frozen.with(&["-q", "--strict"]), "auto");
    assert_eq!(exit, Some(17), "{said}");
    assert_eq!(images(&folder).len(), before + 1);
    // A chain that had to begin anew: no wrong backup, but one that somebody should look at.
    for name in backup::bitmaps(&mut m.qmp) {
        for node in ["a", "o"] {
            let _ =
                m.qmp.try_execute("block-dirty-bitmap-remove", json!({"node": node, "name": name}));
        }
    }
    let (exit, said) = code(&caller.with(&["--strict"]), "auto");
    assert!(exit == Some(17) && said.contains("warning"), "{exit:?} {said}");
}

#[test]
fn copies_of_configuration_go_with_their_points() {
    if !have("copies_of_configuration_go_with_their_points", TOOLS) {
        return;
    }
    let d = daemon(&[]);
    let long = format!("{}-vm.json", "x".repeat(240));
    let config = d.path(&long);
    std::fs::write(&config, "secret").unwrap();
    let caller = Caller::of(&d).with(&["--config", config.to_str().unwrap()]);
    let side = caller.target.join("a.img/.fleecefs");
    let copies = || {
        let mut list = entries(&side);
        list.retain(|p| p.file_name().unwrap().to_string_lossy().contains("-0-xxx"));
        list.sort();
        list
    };
    caller.must("full");
    let first = copies();
    caller.must("inc");
    caller.must("full");
    let all = copies();
    assert_eq!((first.len(), all.len()), (1, 3));
    // An image that is called as the copies are.
    let odd = "config-0123456789ab-0-x";
    std::fs::write(side.parent().unwrap().join(odd), vec![0; 512]).unwrap();
    std::fs::write(side.join(format!("{odd}.json")), "{}").unwrap();
    let (exit, said) = fleecefs(&["prune", "--keep-last", "1"], &caller.target);
    assert!(exit.is_some_and(|c| [0, 16].contains(&c)), "{said}");
    assert_eq!(copies(), all, "while there is a manifest that nobody can read: {said}");
    std::fs::remove_file(side.parent().unwrap().join(odd)).unwrap();
    std::fs::remove_file(side.join(format!("{odd}.json"))).unwrap();

    caller.must("full");
    let newest: Vec<_> = copies().into_iter().filter(|c| !all.contains(c)).collect();
    let (exit, said) = fleecefs(&["prune", "--keep-last", "1"], &caller.target);
    assert_eq!(exit, Some(0), "{said}");
    assert_eq!(copies(), newest);
    assert_eq!(std::fs::read(&newest[0]).unwrap(), b"secret");
    assert_eq!(fleecefs(&["verify"], &caller.target).0, Some(0));
}

#[test]
fn what_shows_nothing_is_no_success() {
    let dir = images::tempdir();
    let (empty, state) = (dir.path().join("empty"), dir.path().join("state"));
    std::fs::create_dir(&empty).unwrap();
    assert_eq!(fleecefs(&["list"], &empty).0, Some(0));
    let (exit, said) = fleecefs(&["prune", "--keep-last", "1"], &empty);
    assert!(exit == Some(3) && said.contains("no backup"), "{exit:?} {said}");
    assert_eq!(entries(&empty).len(), 0, "not even a lock");
    let (exit, said) = fleecefs(&["list", "--strict"], &empty);
    assert!(exit == Some(12) && said.contains("no backup"), "{exit:?} {said}");
    for more in [&[][..], &["--json"]] {
        let args: Vec<&str> = ["info", "status", "--qmp", "/nowhere/qmp"].into_iter().collect();
        let args = [&args[..], more, &["--state-dir"]].concat();
        let (exit, said) = fleecefs(&args, &state);
        assert!(exit == Some(3) && said.contains("no such socket"), "{exit:?} {said}");
    }
    // Without manifests nothing proves the newest point.
    let sda = empty.join("sda");
    std::fs::create_dir(&sda).unwrap();
    for time in [1_700_000_000, 1_700_000_100] {
        let path = sda.join(format!("FULL-{time}-sda.raw"));
        std::fs::write(path, vec![1; 4096]).unwrap();
    }
    for more in [&[][..], &["--dry-run"]] {
        let args = [&["prune", "--keep-last", "1"], more].concat();
        let (exit, said) = fleecefs(&args, &empty);
        assert!(exit == Some(19) && said.contains("--force"), "{exit:?} {said}");
    }
    assert_eq!(entries(&sda).len(), 2);
    assert_eq!(fleecefs(&["prune", "--keep-last", "2"], &empty).0, Some(0), "nothing is to go");
    let quiet = fleecefs(&["prune", "-q", "--keep-last", "1", "--force"], &empty);
    assert_eq!(quiet, (Some(0), String::new()));
    assert_eq!(images(&sda).len(), 1);
}
