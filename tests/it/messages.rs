//! What is said of bitmaps and of failures: whose they are, how they go, and each thing once.

use std::process::Command;

use crate::support::backup::{Caller, level};
use crate::support::qemu::one_disk::{Vm, image};
use crate::support::tools::{have, run};

const QEMU: &[&str] = &["qemu-system-x86_64", "qemu-img", "qemu-io"];

/// What is not mounted is empty.
#[test]
fn an_empty_directory_has_no_backup() {
    let d = tempfile::tempdir().unwrap();
    let root = d.path().to_str().unwrap();
    for args in [
        &["restore", root, "--run", "latest", "--to", "/nowhere/x"][..],
        &["restore", root, "sda/latest", "/nowhere"],
        &["restore", root, "latest", "/nowhere"],
        &["config", root, "latest"],
        &["list", root, "--disk", "sda"],
    ] {
        let mut c = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
        let out = c.args(args).output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(3), "{args:?}: {said}");
        assert!(said.contains("no backup in") && said.contains("mounted?"), "{args:?}: {said}");
        assert!(!said.contains("did you mean"), "{args:?}: {said}");
    }
}

/// Nobody had a run on a directory that is not there.
#[test]
fn a_history_of_a_directory_that_is_not_there_is_none() {
    let d = tempfile::tempdir().unwrap();
    for (dir, code) in [("none", 3), (".", 0)] {
        let mut c = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
        c.arg("history").arg(d.path().join(dir)).arg("--state-dir").arg(d.path());
        let out = c.output().unwrap();
        assert_eq!(out.status.code(), Some(code), "{out:?}");
    }
}

/// Whoever mistypes a name is told which he may have meant, whatever the command.
#[test]
fn a_mistyped_name_is_answered_with_those_that_are_alike() {
    if !have("a_mistyped_name_is_answered_with_those_that_are_alike", &["mke2fs"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (root, state) = (dir.path().to_str().unwrap(), tempfile::tempdir().unwrap());
    std::fs::create_dir(dir.path().join("vda.img")).unwrap();
    let image = dir.path().join("vda.img/FULL-1700000000-vda.img");
    run("mke2fs", &["-q", "-F", "-t", "ext4", image.to_str().unwrap(), "8M"]);
    let said = |args: &[&str]| {
        let mut c = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
        let out = c.args(args).env("FLEECEFS_STATE_DIR", state.path()).output().unwrap();
        assert_eq!(out.status.code(), Some(3), "{args:?}: {out:?}");
        String::from_utf8(out.stderr).unwrap()
    };
    let home = state.path().join("home").display().to_string();
    let (latest, full) = ("vda.img/latest", "FULL-1700000000-vda.img");
    let points =
        [("vda/lates", "vda/latest"), ("FULL-170000000-vda.img", full), ("latst", "latest")];
    for (wrong, meant) in points {
        let meant = format!("did you mean {meant}? ");
        for args in [
            &["show", root, wrong][..],
            &["map", root, wrong],
            &["verify", root, "--point", wrong],
            &["restore", root, wrong, "/nowhere"],
            &["diff", root, wrong, latest],
            &["config", root, wrong],
            &["boot", root, wrong],
            &["live-restore", root, wrong, "--to", &home],
        ] {
            assert!(said(args).contains(&meant), "{args:?}: {}", said(args));
        }
    }
    for args in [&["ls", root, "vda.img/lates"][..], &["stat", root, "vda.img/lates/etc"]] {
        let args = [&["files"], args].concat();
        assert!(said(&args).contains("(did you mean vda.img/latest?)"), "{}", said(&args));
    }
    // A path that is like no point is a path.
    assert!(!said(&["files", "ls", root, "vda.img/etc"]).contains("did you mean"));
    for (args, meant) in [
        (&["restore", root, "--run", "lates", "--to", "/nowhere/x"][..], "latest"),
        (&["restore", root, "--run", "2023-11-14T22:13:21Z", "--to", "/x"], "2023-11-14T22:13:20Z"),
        (&["list", root, "--disk", "vdb.img"], "vda.img"),
        (&["stats", root, "--disk", "vda.im"], "vda.img"),
        (&["consolidate", root, "vda.img", "--until", "lates"], "latest"),
    ] {
        assert!(said(args).contains(&format!("did you mean {meant}? ")), "{}", said(args));
    }
}

/// What is missing is named with what to do, also where nothing is alike.
#[test]
fn what_is_not_there_is_told_with_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let (state, root) = (dir.path().join("state"), dir.path().join("backups"));
    std::fs::create_dir(&root).unwrap();
    std::fs::write(root.join("notes.txt"), "not a backup").unwrap();
    let none = dir.path().join("none");
    let (root, none) = (root.to_str().unwrap(), none.to_str().unwrap());
    let said = |args: &[&str]| {
        let mut c = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
        let out = c.args(args).env("FLEECEFS_STATE_DIR", &state).output().unwrap();
        assert_eq!(out.status.code(), Some(3), "{args:?}: {out:?}");
        String::from_utf8(out.stderr).unwrap()
    };
    // A mount point has to be made, and the backups' own file system may not be mounted.
    assert!(said(&["mount", root, none]).contains(&format!("(make it first: 'mkdir -p {none}')")));
    for args in [&["list", none][..], &["verify", none], &["restore", none, "a/latest", "x"]] {
        let text = said(args);
        assert!(text.contains("mount the file system that it is on"), "{args:?}: {text}");
    }
    for args in [
        &["restore", root, "--run", "latest", "--to", none][..],
        &["live-restore", root, "--to", none],
        &["boot", root, "--print"],
        &["config", root],
        &["prune", root, "--keep-last", "1"],
        &["prune", root, "--keep-last", "1", "-n"],
        &["verify", root],
    ] {
        let text = said(args);
        let is_right =
            text.contains("is its file system mounted?") && !text.contains("did you mean");
        assert!(is_right, "{args:?}: {text}");
    }
}

/// A command about the caller's VM; it has to succeed.
fn asked(caller: &Caller, args: &[&str]) -> String {
    let mut c = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
    c.args(args).arg("--qmp").arg(&caller.qmp).arg("--state-dir").arg(&caller.state);
    let out = c.output().unwrap();
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

#[test]
fn bitmaps_of_a_target_that_is_gone_go_in_one_step() {
    if !have("bitmaps_of_a_target_that_is_gone_go_in_one_step", QEMU) {
        return;
    }
    let d = tempfile::tempdir().unwrap();
    let vm = Vm::start(d.path(), &image(&d.path().join("vm/data.qcow2")), &[]);
    let caller = vm.caller.clone();
    caller.must("full");
    std::fs::remove_dir_all(&caller.target).unwrap();
    assert!(!caller.run("auto").status.success());
    caller.with(&["--init"]).must("auto");
    let ids = |text: &str| {
        let of = |line: &str| Some(line.split("fleecefs-").nth(1)?.get(..8)?.to_string());
        text.lines().filter_map(of).collect::<std::collections::BTreeSet<String>>()
    };
    let text = asked(&caller, &["info", "bitmaps"]);
    assert_eq!(ids(&text).len(), 2, "{text}");
    // A watermark's marks are no changes.
    let (marks, others): (Vec<&str>, Vec<&str>) =
        text.lines().partition(|l| l.contains("-floor: "));
    assert!(!marks.is_empty() && marks.len() < text.lines().count(), "{text}");
    assert!(
        marks.iter().all(|l| l.contains(": watermark over ") && !l.contains("dirty")),
        "{text}"
    );
    assert!(others.iter().all(|l| l.contains(" dirty")), "{text}");
    // The node, and what the user calls the disk.
    assert!(text.lines().all(|l| l.starts_with("n (vda): bitmap ")), "{text}");
    let id_in = |target: &std::path::Path| std::fs::read_to_string(target.join("uuid")).unwrap();
    let own = id_in(&caller.target);
    let gone = ids(&text).into_iter().find(|id| !own.starts_with(id)).unwrap();
    // A second target of the VM is alive.
    let second = Caller { target: d.path().join("second"), ..caller.clone() };
    second.must("full");
    let other = id_in(&second.target);
    let keep = ["cleanup", "--keep", caller.target.to_str().unwrap()];
    let refused = |args: &[&str], words: &[&str]| {
        let mut c = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
        c.args(args).arg("--qmp").arg(&caller.qmp);
        let out = c.arg("--state-dir").arg(&caller.state).output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(2), "{said}");
        for word in words.iter().chain(&["--all-targets"]) {
            assert!(said.contains(word), "{word}: {said}");
        }
        said
    };
    let add = format!("--keep '{}'", second.target.display());
    let by_id = format!("cleanup --uuid {gone}");
    for more in [&["-n"][..], &[]] {
        refused(&[&keep[..], more].concat(), &[&add, &by_id]);
    }
    // One that is not mounted may come back, and would need a FULL then.
    let both = [&keep[..], &["--keep", second.target.to_str().unwrap()]].concat();
    let said = refused(&both, &[&by_id, "not mounted"]);
    assert!(!said.contains(&add), "{said}");
    let away = d.path().join("away");
    std::fs::rename(&second.target, &away).unwrap();
    refused(&keep, &[&format!("cleanup --uuid {}", &other[..8]), &by_id]);
    // What was moved can be named where it is.
    let moved = [&keep[..], &["--keep", away.to_str().unwrap()]].concat();
    let said = refused(&moved, &[&by_id]);
    assert!(!said.contains(&other[..8]), "{said}");
    std::fs::rename(&away, &second.target).unwrap();
    assert_eq!(ids(&asked(&caller, &["info", "bitmaps"])).len(), 3, "something went");
    let all = [&keep[..], &["--all-targets", "-n"]].concat();
    let plan = asked(&caller, &all);
    assert!(plan.contains(&other[..8]) && plan.contains(&gone), "{plan}");
    // By the id that was said.
    let plan = asked(&caller, &["cleanup", "--uuid", &gone, "-n"]);
    assert!(plan.contains("would remove") && plan.contains("n (vda)"), "{plan}");
    asked(&caller, &["cleanup", "--uuid", &gone]);
    assert!(asked(&caller, &both).contains("nothing to remove"));
    asked(&caller, &[&keep[..], &["--all-targets"]].concat());
    let left = ids(&asked(&caller, &["info", "bitmaps"]));
    assert_eq!(left.into_iter().collect::<Vec<_>>(), [own.get(..8).unwrap()]);
    caller.must("auto");
    assert_eq!(level(&caller, "data.qcow2"), "INC");
    // By the digits that are shown.
    asked(&caller, &["cleanup", "--uuid", own.get(..8).unwrap()]);
    assert!(asked(&caller, &["info", "bitmaps"]).contains("no dirty bitmaps"));
    let help = Command::new(env!("CARGO_BIN_EXE_fleecefs")).args(["cleanup", "--help"]).output();
    let help = String::from_utf8(help.unwrap().stdout).unwrap();
    assert!(help.contains("--keep DIR") && help.contains("eight"), "{help}");
    // A directory that is not mounted keeps nothing, and so is an error.
    std::fs::create_dir(d.path().join("empty")).unwrap();
    let mut c = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
    c.args(["cleanup", "--keep"]).arg(d.path().join("empty")).arg("--qmp").arg(&caller.qmp);
    let out = c.arg("--state-dir").arg(&caller.state).output().unwrap();
    assert_eq!(out.status.code(), Some(3), "{out:?}");
}

#[test]
fn why_a_disk_has_no_point_is_said_once() {
    if !have("why_a_disk_has_no_point_is_said_once", QEMU) {
        return;
    }
    let d = tempfile::tempdir().unwrap();
    let vm = Vm::start(d.path(), &image(&d.path().join("vm/data.qcow2")), &[]);
    for more in [&[][..], &["-q"], &["-qq"]] {
        let out = vm.caller.with(more).run("inc");
        let said = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(12), "{said}");
        let times = said.matches("there is no FULL in the target yet").count();
        assert_eq!(times, 1, "{more:?}: {said}");
        assert!(said.contains("backup of "), "{said}");
    }
}
