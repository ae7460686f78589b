//! What is left of a backup that could not end in order, and who may touch it: recovery of targets
//! that are not there, of guests that somebody else holds, beside other programs and by other
//! sockets of the same QEMU.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Output;

use crate::support::backup::{self, Caller, PausedBackup, leftovers, ours_in_qemu};
use crate::support::qemu::storage_daemon::Daemon;
use crate::support::qemu::two_disks::Machine;
use crate::support::refusing;
use crate::support::tools::{self, have, run};
use fleecefs::backup::state::journal;
use fleecefs::backup::state::journal::{Journal, Record};
use fleecefs::lock::Locks;
use fleecefs::qmp::{Address, Client};
use serde_json::{Value, json};

const TOOLS: &[&str] = &["qemu-storage-daemon", "qemu-img", "qemu-io"];

fn daemon() -> Daemon {
    let dir = tempfile::tempdir().unwrap();
    for (name, format) in [("a", "qcow2"), ("b", "raw")] {
        let path = dir.path().join(format!("{name}.img"));
        run("qemu-img", &["create", "-q", "-f", format, path.to_str().unwrap(), "8M"]);
    }
    let d = Daemon::start(dir, &[("a", "driver=qcow2"), ("b", "driver=raw")]);
    for name in ["a", "b"] {
        d.io(name, &["write -P 1 0 4M"]);
    }
    d
}

fn recover(caller: &Caller, more: &[&str]) -> Output {
    caller.recovery(more).output().unwrap()
}

fn clean(d: &Daemon) {
    assert_eq!(ours_in_qemu(&mut d.qmp()), Vec::<String>::new());
    assert_eq!(leftovers(d.dir.path()), Vec::<PathBuf>::new());
    let locks: Vec<_> = std::fs::read_dir(d.path("state"))
        .unwrap()
        .flatten()
        .map(|e| e.file_name().into_string().unwrap())
        .filter(|n| n.starts_with("run-") || n.starts_with("qemu-"))
        .collect();
    assert_eq!(locks, Vec::<String>::new());
}

#[test]
fn a_second_socket_does_not_let_a_second_run_in() {
    if !have("a_second_socket_does_not_let_a_second_run_in", TOOLS) {
        return;
    }
    let d = daemon();
    let first = Caller::of(&d);
    let mut second = first.clone();
    second.qmp = d.path("qmp2.sock");
    first.must("full");
    let held = PausedBackup::start(&first, "inc");
    let before = ours_in_qemu(&mut d.qmp());
    for out in [second.run("inc"), recover(&second, &[])] {
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(!out.status.success() && said.contains("another QMP socket"), "{said}");
    }
    assert_eq!(ours_in_qemu(&mut d.qmp()), before);
    let (code, said) = held.end();
    assert_eq!(code, Some(0), "{said}");
    second.must("inc");
    clean(&d);
}

/// A backup of a daemon, killed at its freeze point.
fn killed(caller: &Caller) {
    let (code, said) = PausedBackup::start(caller, "auto").signalled(libc::SIGKILL);
    assert_eq!(code, None, "{said}");
}

#[test]
fn a_target_that_is_away_waits_and_blocks_nobody() {
    if !have("a_target_that_is_away_waits_and_blocks_nobody", TOOLS) {
        return;
    }
    let d = daemon();
    let old = Caller::of(&d);
    let mut new = old.clone();
    new.target = d.path("T2");
    old.must("full");
    killed(&old);
    let away = d.path("away");
    std::fs::rename(&old.target, &away).unwrap();
    let said = new.must("full");
    assert!(said.contains("postponed"), "{said}");
    let said = new.must("inc");
    assert!(said.contains("postponed"), "{said}");
    assert_eq!(ours_in_qemu(&mut d.qmp()), Vec::<String>::new());
    let out = recover(&old, &[]);
    assert_eq!(out.status.code(), Some(3), "{}", String::from_utf8_lossy(&out.stderr));

    // It is there again: the run is settled, and the chain goes on.
    std::fs::rename(&away, &old.target).unwrap();
    assert!(!leftovers(&old.target).is_empty());
    let said = old.must("auto");
    assert!(said.contains("was not complete: removed"), "{said}");
    assert!(!said.contains("taking a FULL:"), "{said}");
    clean(&d);

    // Or it never comes back.
    killed(&old);
    std::fs::remove_dir_all(&old.target).unwrap();
    assert!(!recover(&old, &[]).status.success());
    let said = old.must_recover(&["--forget"]);
    assert!(said.contains("given up"), "{said}");
    clean(&d);
}

#[test]
fn recovery_waits_for_whoever_works_in_the_target() {
    if !have("recovery_waits_for_whoever_works_in_the_target", TOOLS) {
        return;
    }
    let d = daemon();
    let caller = Caller::of(&d);
    caller.must("full");
    killed(&caller);
    let before = leftovers(&caller.target);
    assert!(!before.is_empty());
    let prune = Locks::take(&caller.target.canonicalize().unwrap()).unwrap();
    let out = recover(&caller, &[]);
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(!out.status.success() && said.contains("another command is writing"), "{said}");
    assert_eq!(leftovers(&caller.target), before);
    drop(prune);
    caller.must_recover(&[]);
    clean(&d);
}

#[test]
fn a_run_ends_in_order_when_qemu_took_its_linked_socket_away() {
    if !have("a_run_ends_in_order_when_qemu_took_its_linked_socket_away", TOOLS) {
        return;
    }
    let mut d = daemon();
    let link = d.path("link");
    std::os::unix::fs::symlink(d.dir.path(), &link).unwrap();
    let mut caller = Caller::of(&d);
    caller.must("full");
    caller.qmp = link.join("qmp.sock");
    let held = PausedBackup::start(&caller, "inc");
    d.stop();
    let _ = std::fs::remove_file(d.path("qmp.sock"));
    let (code, said) = held.end();
    assert!(code.is_some_and(|c| c != 0), "{said}");
    // The link leads back into the folder.
    std::fs::remove_file(&link).unwrap();
    assert_eq!(leftovers(d.dir.path()), Vec::<PathBuf>::new(), "{said}");
    d.respawn();
    caller.qmp = d.path("qmp.sock");
    caller.must("auto");
    clean(&d);
}

/// Writes the journal of a run that has only done this.
fn journalled(caller: &Caller, agent: Option<&Path>, qemu: Option<&str>, record: Record) {
    let vm = Address::Unix(caller.qmp.clone());
    let begin = Record::Begin {
        run: "0123456789ab".into(),
        target: caller.target.clone(),
        agent: agent.map(|a| a.display().to_string()),
        qemu: qemu.map(str::to_string),
    };
    let mut j = Journal::begin(&caller.state, &vm, &begin).unwrap();
    j.write(&record).unwrap();
}

/// A folder with a qemu-img that is this shell script.
fn false_qemu_img(script: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    // It runs as a user who owns nothing.
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let path = dir.path().join("qemu-img");
    tools::write_script(&path, script);
    dir
}

#[test]
fn an_image_that_could_not_be_checked_is_not_removed() {
    if !have("an_image_that_could_not_be_checked_is_not_removed", TOOLS) {
        return;
    }
    let d = daemon();
    let caller = Caller::of(&d);
    caller.must("full");
    // Killed when the image is complete and closed.
    let steps = d.path("steps");
    let mut run = caller.command("inc");
    run.env("FLEECEFS_HANG_AT", "checked").env("FLEECEFS_STEPS", &steps);
    let mut run = run.spawn().unwrap();
    while !std::fs::read_to_string(&steps).is_ok_and(|s| s.contains(" checked\n")) {
        assert!(run.try_wait().unwrap().is_none(), "it ended before");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    run.kill().unwrap();
    run.wait().unwrap();
    let before = leftovers(&caller.target);
    assert!(!before.is_empty());
    // It may be killed (a Ctrl-C reaches it, too), or fail.
    let busy = "echo 'Failed to get \"write\" lock' >&2; exit 1";
    let scripts = [false_qemu_img("kill -KILL $$"), false_qemu_img(busy)];
    for (i, path) in scripts.iter().enumerate() {
        let mut c = caller.recovery(&[]);
        let out = c.env("PATH", path.path()).output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(!out.status.success() && !said.contains("removed"), "{i}: {said}");
        assert_eq!(leftovers(&caller.target), before, "{i}: {said}");
    }
    // Where there is none, our own check does.
    let nothing = tempfile::tempdir().unwrap();
    let out = caller.recovery(&[]).env("PATH", nothing.path()).output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success() && said.contains("was complete: published"), "{said}");
    assert!(said.contains("not checked with qemu-img"), "{said}");
    clean(&d);
}

/// What failed was a last step, and failed once: the image is a point, and no failure.
#[test]
fn a_disk_that_failed_after_its_image_was_complete_is_told_as_a_point() {
    let test = "a_disk_that_failed_after_its_image_was_complete_is_told_as_a_point";
    if !have(test, TOOLS) {
        return;
    }
    let d = daemon();
    let caller = Caller::of(&d);
    caller.must("full");
    // The sync after the image got its name.
    let has_new = |folder: &Path| {
        let mut names = backup::images(folder).into_iter();
        let is_new = |name: &str| name.starts_with("INC-") && name.ends_with(".img");
        names.any(|i| is_new(i.file_name().unwrap().to_str().unwrap()))
    };
    let refusing = refusing::Refusing {
        folder_sync: Some(libc::EIO),
        once: Some(has_new),
        ..refusing::Refusing::NOTHING
    };
    let out = refusing.run(&mut caller.command("inc"));
    let said = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
    assert!(said.contains("cannot sync the folder"), "it failed: {said}");
    assert_eq!(said.matches("the image was complete and is kept as a point").count(), 1, "{said}");
    assert_eq!(out.status.code(), Some(0), "{said}");
    for disk in ["a.img", "b.img"] {
        let image = backup::newest(&caller.target, disk);
        assert_eq!(backup::level(&caller, disk), "INC", "{said}");
        assert!(backup::manifest_of(&image)["failed"].is_null(), "{said}");
    }
    clean(&d);
    caller.must("inc");
}

/// The agent of a frozen guest, until nobody asks any more; whether it was told to thaw.
fn thaws(stream: UnixStream) -> bool {
    let mut thawed = false;
    let mut answers = stream.try_clone().unwrap();
    for line in BufReader::new(stream).split(b'\n') {
        let line = line.unwrap();
        // 0xff makes an agent forget what it has read so far.
        let Some(from) = line.iter().position(|b| *b == b'{') else { continue };
        let asked: Value = serde_json::from_slice(&line[from..]).unwrap();
        let answer = match asked["execute"].as_str().unwrap() {
            "guest-fsfreeze-status" => if thawed { "thawed" } else { "frozen" }.into(),
            "guest-fsfreeze-thaw" => {
                thawed = true;
                1.into()
            }
            "guest-sync-delimited" => {
                answers.write_all(b"\xff").unwrap();
                asked["arguments"]["id"].clone()
            }
            other => panic!("{other} is not expected"),
        };
        writeln!(answers, "{}", json!({ "return": answer })).unwrap();
    }
    thawed
}

#[test]
fn a_guest_that_may_be_frozen_is_not_forgotten() {
    if !have("a_guest_that_may_be_frozen_is_not_forgotten", TOOLS) {
        return;
    }
    let d = daemon();
    let caller = Caller::of(&d);
    let pending = || journal::pending(&caller.state, &Address::Unix(caller.qmp.clone())).unwrap();
    let nobody = d.path("agent.sock");
    journalled(&caller, Some(&nobody), None, Record::Freeze);
    let out = recover(&caller, &[]);
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(!out.status.success() && said.contains("may still be frozen"), "{said}");
    assert!(pending().unwrap().frozen);
    // The watchdog has thawed it.
    let note = Record::Thawed("0123456789ab".into());
    let path = journal::path(&caller.state, &Address::Unix(caller.qmp.clone()));
    journal::note(&path, "0123456789ab", &note).unwrap();
    caller.must_recover(&[]);
    assert_eq!(pending(), None);
    // Its agent has another socket now.
    journalled(&caller, Some(&nobody), None, Record::Freeze);
    let elsewhere = d.path("other.sock");
    let agent = UnixListener::bind(&elsewhere).unwrap();
    let thawing = std::thread::spawn(move || thaws(agent.accept().unwrap().0));
    let said = caller.must_recover(&["--agent", elsewhere.to_str().unwrap()]);
    assert!(said.contains("still frozen: thawed"), "{said}");
    assert!(thawing.join().unwrap());
    assert_eq!(pending(), None);
    // Nobody will ever answer.
    journalled(&caller, Some(&nobody), None, Record::Freeze);
    let said = caller.must_recover(&["--forget"]);
    assert!(said.contains("may still be frozen"), "{said}");
    assert_eq!(pending(), None);
    // It was another QEMU's guest.
    journalled(&caller, Some(&nobody), Some("boot-1-2"), Record::Freeze);
    let said = caller.must_recover(&[]);
    assert!(said.contains("started again"), "{said}");
    assert_eq!(pending(), None);
}

/// A killed run had stopped the guest, and QEMU's socket has lost its name since.
#[test]
fn a_qemu_that_cannot_be_reached_is_not_taken_for_gone() {
    let name = "a_qemu_that_cannot_be_reached_is_not_taken_for_gone";
    if !have(name, &["qemu-system-x86_64", "qemu-img", "qemu-io"]) {
        return;
    }
    let mut m = Machine::begin();
    let caller = m.caller();
    let vm = Address::Unix(caller.qmp.clone());
    let pending = || journal::pending(&caller.state, &vm).unwrap();
    let qemu = Client::connect(&vm).unwrap().process().expect("a process");
    let (away, told) = (m.path("away.sock"), m.text("qmp.sock"));
    m.do_it("stop", json!({}));
    journalled(&caller, None, Some(&qemu), Record::Stop);
    std::fs::rename(&caller.qmp, &away).unwrap();
    let out = recover(&caller, &[]);
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(!out.status.success() && said.contains("still runs"), "{said}");
    assert!(said.contains(&told) && said.contains("may still be stopped"), "{said}");
    assert!(pending().unwrap().stopped);
    // It cannot be told.
    journalled(&caller, None, None, Record::Stop);
    let out = recover(&caller, &[]);
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(!out.status.success() && said.contains("it is not known whether QEMU runs"), "{said}");
    assert!(pending().unwrap().stopped);
    // Another QEMU has taken its place.
    let other = Machine::begin();
    std::os::unix::fs::symlink(other.path("qmp.sock"), &caller.qmp).unwrap();
    let mut there = caller.clone();
    there.qmp = other.path("qmp.sock");
    journalled(&there, None, Some(&qemu), Record::Stop);
    let out = recover(&there, &[]);
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(!out.status.success() && said.contains("another QEMU answers there"), "{said}");
    std::fs::remove_file(&caller.qmp).unwrap();

    journalled(&caller, None, Some(&qemu), Record::Stop);
    std::fs::rename(&away, &caller.qmp).unwrap();
    let said = caller.must_recover(&[]);
    assert!(said.contains("it runs again"), "{said}");
    assert_eq!(m.do_it("query-status", json!({}))["status"], "running");
    assert_eq!(pending(), None);
    // By hand, at the user's word.
    journalled(&caller, None, Some(&qemu), Record::Stop);
    std::fs::rename(&caller.qmp, &away).unwrap();
    caller.must_recover(&["--forget"]);
    assert_eq!(pending(), None);
}

#[test]
fn another_programs_nbd_server_is_left_alone() {
    if !have("another_programs_nbd_server_is_left_alone", TOOLS) {
        return;
    }
    let d = daemon();
    let caller = Caller::of(&d);
    journalled(&caller, None, None, Record::NbdStart);
    caller.must_recover(&[]);
    UnixStream::connect(d.path("nbd.sock")).expect("the server of the daemon runs on");
    clean(&d);
}

#[test]
fn only_qmpbackups_own_nodes_are_taken_for_its_leftovers() {
    if !have("only_qmpbackups_own_nodes_are_taken_for_its_leftovers", TOOLS) {
        return;
    }
    let d = daemon();
    let caller = Caller::of(&d);
    caller.must("full");
    let mut qmp = d.qmp();
    // Two sets of the same nodes, one by each program.
    for prefix in ["qmpbackup-a", "theirs"] {
        let fleece = d.path(&format!("{prefix}.raw"));
        std::fs::File::create(&fleece).unwrap().set_len(8 << 20).unwrap();
        let node = |role: &str| format!("{prefix}-{role}");
        qmp.execute(
            "blockdev-add",
            json!({"driver": "raw", "node-name": node("fleece"),
                "file": {"driver": "file", "filename": fleece}}),
        );
        qmp.execute(
            "blockdev-add",
            json!({"driver": "null-co", "node-name": format!("disk-{prefix}"), "size": 8 << 20}),
        );
        qmp.execute(
            "blockdev-add",
            json!({"driver": "copy-before-write", "node-name": node("cbw"),
                "file": format!("disk-{prefix}"),
                "target": node("fleece")}),
        );
        qmp.execute(
            "blockdev-add",
            json!({"driver": "snapshot-access", "node-name": node("snap"), "file": node("cbw")}),
        );
    }
    drop(qmp);
    caller.must_recover(&["--foreign"]);
    let nodes = d.qmp().execute("query-named-block-nodes", json!({}));
    let names: Vec<&str> =
        nodes.as_array().unwrap().iter().filter_map(|n| n["node-name"].as_str()).collect();
    assert!(!names.iter().any(|n| n.starts_with("qmpbackup")), "{names:?}");
    for role in ["fleece", "cbw", "snap"] {
        assert!(names.contains(&format!("theirs-{role}").as_str()), "{names:?}");
    }
}

#[test]
fn what_qemu_refuses_for_one_disk_does_not_keep_the_other() {
    if !have("what_qemu_refuses_for_one_disk_does_not_keep_the_other", TOOLS) {
        return;
    }
    let d = daemon();
    let caller = Caller::of(&d);
    caller.must("full");
    let held = PausedBackup::start(&caller, "inc");
    let view = ours_in_qemu(&mut d.qmp())
        .iter()
        .find_map(|n| Some(n.split(": ").nth(1).filter(|n| n.ends_with("-s0"))?.to_string()))
        .expect("there is a frozen view");
    d.qmp().execute(
        "blockdev-add",
        json!({"driver": "raw", "node-name": "theirs", "file": view, "read-only": true}),
    );
    let (code, said) = held.signalled(libc::SIGHUP);
    assert_eq!(code, Some(130), "a lost terminal ends it in order: {said}");
    let left = ours_in_qemu(&mut d.qmp());
    assert!(!left.is_empty() && left.iter().all(|n| n.ends_with('0')), "{left:?}: {said}");
    let settled = |disk: &&str| leftovers(&caller.target.join(disk)).is_empty();
    assert_eq!(["a.img", "b.img"].iter().filter(|d| settled(d)).count(), 1, "{said}");
    d.qmp().execute("blockdev-del", json!({"node-name": "theirs"}));
    caller.must_recover(&[]);
    clean(&d);
    let said = caller.must("auto");
    assert!(!said.contains("taking a FULL:"), "{said}");
}

#[test]
fn the_announcement_says_what_the_freeze_point_achieved() {
    if !have("the_announcement_says_what_the_freeze_point_achieved", TOOLS) {
        return;
    }
    let d = daemon();
    let caller = Caller::of(&d);
    let held = PausedBackup::start(&caller, "full");
    let folder = caller.target.join("a.img/.fleecefs");
    let file = std::fs::read_dir(&folder)
        .unwrap()
        .flatten()
        .map(|e| e.path())
        .find(|p| p.to_string_lossy().ends_with(".partial.json"))
        .expect("it was announced");
    let m: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    let reason = m["consistency"]["reason"].as_str().unwrap();
    assert!(reason.contains("has no guest"), "{m}");
    let (code, said) = held.end();
    assert_eq!(code, Some(0), "{said}");
}

#[test]
fn a_guest_is_never_held_without_a_limit() {
    let dir = tempfile::tempdir().unwrap();
    let caller = Caller {
        qmp: dir.path().join("q"),
        state: dir.path().join("state"),
        target: dir.path().join("T"),
        more: Vec::new(),
    };
    let huge = u64::MAX.to_string();
    for (option, value) in [
        ("--cbw-timeout", "0"),
        ("--hold-limit", "0"),
        ("--hold-limit", &huge),
        ("--agent-timeout", &huge),
    ] {
        let out = caller.with(&[option, value]).run("full");
        assert_eq!(out.status.code(), Some(2), "{option} {value}: {out:?}");
    }
}
