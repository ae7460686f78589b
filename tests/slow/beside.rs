//! Other programs at work in the same QEMU: whatever they begin, before a backup or while it copies
//! or at any step of it, the guest's disk holds what the guest wrote, the point is right or absent,
//! the other's result is right, and once it has ended nothing of ours is left.
//!
//! `FLEECEFS_BESIDE=all` begins each operation at each step of a run, `all/3` at every third (`Mirror/3+100`
//! from the hundredth on),
//! `Mirror,Commit` those two; else some begin at some steps.
//! With `-- --nocapture` the table is shown.

use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

use crate::support::backup::{Caller, bitmaps, leftovers, ours_in_qemu};
use crate::support::points::{finish, points, recover, right};
use crate::support::qemu::other_program::Op::*;
use crate::support::qemu::other_program::{ALL, Begun, Op};
use crate::support::qemu::two_disks::{self, Machine};
use crate::support::tools::have;
use serde_json::json;

/// The folder of `v0` after the operation, if it is there.
fn disk_after(m: &mut Machine) -> Option<String> {
    let inserted = m.inserted(0)?;
    let file = inserted["file"].as_str().unwrap();
    Some(Path::new(file).file_name().unwrap().to_str().unwrap().to_string())
}

/// The other has ended: nothing of ours is left, the next backup is right, and so is the disk.
fn afterwards(mut m: Machine, caller: &Caller, begun: Option<Begun>, what: &str) {
    m.hurry();
    if let Some(b) = &begun {
        b.end(&mut m);
    }
    let (code, said) = recover(caller);
    assert_eq!(code, Some(0), "{what}: recover: {said}");
    assert_eq!(ours_in_qemu(&mut m.qmp), Vec::<String>::new(), "{what}: {said}");
    assert_eq!(leftovers(m.folder()), Vec::<PathBuf>::new(), "{what}: {said}");
    let gone = m.inserted(0).is_none();
    m.write(1, 5 << 20, 65536);
    if !gone {
        m.write(0, 5 << 20, 65536);
    }
    caller.must("auto");
    if let Some(disk) = disk_after(&mut m) {
        right(caller, &disk, &[&m.expect[0]], what);
    }
    right(caller, "o.qcow2", &[&m.expect[1]], what);
    let unplugged = gone.then_some(match begun.map(|b| b.op) {
        Some(SnapshotByDevice | SnapshotByNode) => "ov.qcow2",
        _ => "a.qcow2",
    });
    m.end(unplugged);
}

#[test]
fn what_another_program_does_already() {
    let name = "what_another_program_does_already";
    for &op in ALL {
        let Some(mut m) = Machine::start(name) else { return };
        let caller = m.caller();
        let begun = op.begin(&mut m);
        assert_eq!(begun.is_none(), op == Iothread, "{op:?}");
        let gone = m.inserted(0).is_none();
        let pauses = op == Stream && may_not_be_paused(&mut m);
        let out = match pauses {
            true => caller.with(&["--no-stop"]).run("full"),
            false => caller.run("full"),
        };
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        let refused = match op {
            Mirror | NamedMirror | DriveMirror | DriveBackup | NodeBackup | Commit | Stream => {
                assert!(said.contains("job other ("), "{op:?}: {said}");
                true
            }
            WritableExport => {
                let why = "dr0: export theirs (nbd) may write to node a";
                assert!(said.contains(why), "{op:?}: {said}");
                true
            }
            TheirFilter => true,
            _ => false,
        };
        // (A job may have ended by now.)
        if matches!(op, WritableExport | TheirFilter) {
            let alone = caller.with(&["--include", "dr0"]).run("full");
            assert_eq!(alone.status.code(), Some(6), "{op:?}");
        }
        assert_eq!(out.status.code(), Some(if refused { 16 } else { 0 }), "{op:?}: {said}");
        right(&caller, "o.qcow2", &[&m.expect[1]], &said);
        match (refused, disk_after(&mut m)) {
            (true, _) => assert!(points(&caller, "a.qcow2").is_empty(), "{op:?}: {said}"),
            (false, Some(disk)) => right(&caller, &disk, &[&m.expect[0]], &said),
            (false, None) => assert!(gone),
        }
        println!("{op:?}: before: {}", if refused { "refused" } else { "a point" });
        assert_eq!(ours_in_qemu(&mut m.qmp), Vec::<String>::new(), "{op:?}: {said}");
        if !gone {
            m.scribble();
        }
        afterwards(m, &caller, begun, &format!("{op:?}"));
    }
}

/// Whether this QEMU ends when its guest is paused while a stream works on any disk.
fn may_not_be_paused(m: &mut Machine) -> bool {
    let major = m.do_it("query-version", json!({}))["qemu"]["major"].as_u64().unwrap();
    major < 10
}

#[test]
fn a_guest_that_must_not_be_paused_beside_a_stream_is_not() {
    let name = "a_guest_that_must_not_be_paused_beside_a_stream_is_not";
    let Some(mut m) = Machine::start(name) else { return };
    if !may_not_be_paused(&mut m) {
        return;
    }
    let caller = m.caller();
    // Whatever drains the disk has a slow job go on: this one stands still.
    let begin = |m: &mut Machine| {
        m.do_it("block-stream", json!({"job-id": "other", "device": "a", "speed": 1}));
        m.do_it("job-pause", json!({"id": "other"}));
    };
    let end = |m: &mut Machine| {
        m.do_it("job-resume", json!({"id": "other"}));
        m.do_it("job-cancel", json!({"id": "other"}));
        m.wait_job("other", |j| j.is_null());
    };
    begin(&mut m);
    let refused = |code: Option<i32>, said: &str| {
        assert_eq!(code, Some(6), "{said}");
        assert!(said.contains("job other (stream)") && said.contains("--no-stop"), "{said}");
    };
    let out = caller.with(&["--include", "o"]).run("full");
    refused(out.status.code(), &String::from_utf8_lossy(&out.stderr));
    end(&mut m);
    afterwards(m, &caller, None, name);
    // One that begins when planning is over.
    let mut m = Machine::begin();
    let caller = m.caller();
    let run = Stopped::start(&m, "full", "files created");
    begin(&mut m);
    let (code, said) = run.end();
    refused(code, &said);
    end(&mut m);
    assert!(points(&caller, "o.qcow2").is_empty());
    afterwards(m, &caller, None, name);
}

#[test]
fn what_another_program_begins_while_we_copy() {
    let name = "what_another_program_begins_while_we_copy";
    for &op in ALL {
        let Some(mut m) = Machine::start(name) else { return };
        let caller = m.caller();
        let frozen = m.expect.clone();
        let slow = caller.with(&["--speed-limit", "1M"]);
        let err = m.path("stderr");
        let mut child =
            slow.command("full").stderr(std::fs::File::create(&err).unwrap()).spawn().unwrap();
        assert!(m.wait_copying(&mut child), "{}", std::fs::read_to_string(&err).unwrap());
        let begun = op.begin(&mut m);
        if m.inserted(0).is_some() {
            m.scribble();
        }
        // One look at least, then to the end.
        std::thread::sleep(Duration::from_millis(300));
        m.hurry();
        let status = finish(&mut child);
        let said = std::fs::read_to_string(&err).unwrap();
        let absent = match op {
            DriveBackup | Stream | SnapshotByDevice | SnapshotByNode | TheirFilter => true,
            // QEMU refuses these while our filter stands.
            Mirror | NamedMirror | DriveMirror | Commit | InternalSnapshot | Grow | Shrink
            | WritableExport | Iothread => {
                assert!(begun.is_none(), "{op:?}");
                false
            }
            NodeBackup | Unplug | Export | Reset => false,
        };
        println!(
            "{op:?}: while copying: {:?} {status}: {}",
            begun.is_some(),
            if absent { "absent" } else { "right" }
        );
        right(&caller, "o.qcow2", &[&frozen[1]], &said);
        if absent {
            assert_ne!(status.code(), Some(0), "{op:?}: {said}");
            assert!(points(&caller, "a.qcow2").is_empty(), "{op:?}: {said}");
        } else {
            assert_eq!(status.code(), Some(0), "{op:?}: {said}");
            right(&caller, "a.qcow2", &[&frozen[0]], &said);
        }
        afterwards(m, &caller, begun, &format!("{op:?}"));
    }
}

/// Whether a process is stopped; `None` if it has ended.
fn is_stopped(child: &mut Child) -> Option<bool> {
    if child.try_wait().unwrap().is_some() {
        return None;
    }
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap_or_default();
    Some(stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('T')))
}

/// Begins `op` when an INC is at step `n`; false if it has fewer steps.
fn at_step(op: Op, n: usize) -> bool {
    let Some(mut m) = Machine::start("at_step") else { return false };
    let caller = m.caller();
    caller.must("full");
    let [old, others] = ["a.qcow2", "o.qcow2"].map(|disk| points(&caller, disk));
    m.scribble();
    let before = m.expect.clone();
    let (err, steps) = (m.path("stderr"), m.path("steps"));
    let mut child = caller
        .command("auto")
        .env("FLEECEFS_HANG_AT", n.to_string())
        .env("FLEECEFS_STEPS", &steps)
        // Between two questions another program may change what they are about.
        .env("FLEECEFS_STEPS_ALL", "1")
        .stderr(std::fs::File::create(&err).unwrap())
        .spawn()
        .unwrap();
    loop {
        match is_stopped(&mut child) {
            None => return false,
            Some(true) => break,
            Some(false) => std::thread::sleep(Duration::from_millis(1)),
        }
    }
    let step = std::fs::read_to_string(&steps).unwrap();
    let step = step.lines().last().unwrap_or_default().to_string();
    let begun = op.begin(&mut m);
    if m.inserted(0).is_some() {
        m.scribble();
    }
    // SAFETY: a signal to our own child.
    unsafe { libc::kill(child.id() as i32, libc::SIGCONT) };
    let status = finish(&mut child);
    let said = std::fs::read_to_string(&err).unwrap();
    let what = format!("{op:?} at {step}: {said}");
    let new = points(&caller, "a.qcow2").len() > old.len();
    if new {
        right(&caller, "a.qcow2", &[&before[0], &m.expect[0]], &what);
    }
    // A job that cannot be attributed fails all disks.
    if points(&caller, "o.qcow2").len() > others.len() {
        right(&caller, "o.qcow2", &[&before[1], &m.expect[1]], &what);
    } else {
        assert_ne!(status.code(), Some(0), "{what}");
    }
    println!(
        "{op:?} | {step} | {} | exit {:?}, {}",
        if begun.is_some() { "begun" } else { "refused by QEMU" },
        status.code(),
        if new { "right" } else { "absent" }
    );
    assert!(
        new || status.code() != Some(0) || disk_after(&mut m).as_deref() != Some("a.qcow2"),
        "{what}"
    );
    afterwards(m, &caller, begun, &what);
    true
}

/// The operations that the environment asks for, at every how many steps they begin, and with which first.
fn wanted() -> (Vec<Op>, usize, Option<usize>) {
    let asked = std::env::var("FLEECEFS_BESIDE").unwrap_or_default();
    let (names, every) = asked.split_once('/').unwrap_or((&asked, "1"));
    let (every, first) = match every.split_once('+') {
        Some((every, first)) => (every, Some(first.parse().expect("a step"))),
        None => (every, None),
    };
    let named = |op: &&Op| names == "all" || names.split(',').any(|n| n == format!("{op:?}"));
    let ops = ALL.iter().filter(named).copied().collect();
    (ops, every.parse().expect("a number of steps"), first)
}

#[test]
fn what_another_program_begins_at_a_step() {
    let name = "what_another_program_begins_at_a_step";
    if !have(name, two_disks::TOOLS) {
        return;
    }
    let (ops, every, first) = wanted();
    for (i, op) in ops.iter().enumerate() {
        let from = first.unwrap_or(1 + i % every);
        let steps = (from..).step_by(every).take_while(|n| at_step(*op, *n)).count();
        assert!(steps * every + from > 60, "{op:?}");
    }
    if !ops.is_empty() {
        return;
    }
    let some = [Mirror, DriveBackup, SnapshotByDevice, NodeBackup, Shrink];
    for (i, op) in some.into_iter().enumerate() {
        let steps = (3 + 17 * i..).step_by(67).take_while(|n| at_step(op, *n)).count();
        assert!(steps > 2, "{op:?}");
    }
}

/// A run that is stopped when it has come to a step, and each time that it comes there again.
struct Stopped {
    child: Child,
    err: PathBuf,
}

impl Stopped {
    /// One that copies its first disk.
    fn copying(m: &Machine) -> Stopped {
        Self::start(m, "full", "answer blockdev-backup")
    }

    fn start(m: &Machine, level: &str, step: &str) -> Stopped {
        let err = m.path("stderr");
        let mut c = m.caller().command(level);
        c.env("FLEECEFS_HANG_AT", step);
        let child = c.stderr(std::fs::File::create(&err).unwrap()).spawn().unwrap();
        let mut stopped = Stopped { child, err };
        while !is_stopped(&mut stopped.child).expect("it comes so far") {
            std::thread::sleep(Duration::from_millis(1));
        }
        stopped
    }

    fn end(mut self) -> (Option<i32>, String) {
        while let Some(stopped) = is_stopped(&mut self.child) {
            if stopped {
                // SAFETY: a signal to our own child.
                unsafe { libc::kill(self.child.id() as i32, libc::SIGCONT) };
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        let code = finish(&mut self.child).code();
        (code, std::fs::read_to_string(&self.err).unwrap())
    }
}

#[test]
fn a_job_that_begins_and_ends_between_two_looks_fails_all_disks() {
    let name = "a_job_that_begins_and_ends_between_two_looks_fails_all_disks";
    let Some(mut m) = Machine::start(name) else { return };
    let caller = m.caller();
    let run = Stopped::copying(&m);
    let begun = DriveBackup.begin(&mut m).unwrap();
    begun.end(&mut m);
    let (code, said) = run.end();
    assert!(code != Some(0) && said.contains("the disks it used are not known"), "{said}");
    assert!(points(&caller, "a.qcow2").is_empty() && points(&caller, "o.qcow2").is_empty());
    afterwards(m, &caller, None, name);
}

#[test]
fn a_job_that_only_makes_an_image_is_none_of_ours() {
    let name = "a_job_that_only_makes_an_image_is_none_of_ours";
    let Some(mut m) = Machine::start(name) else { return };
    let (caller, frozen) = (m.caller(), m.expect.clone());
    let run = Stopped::copying(&m);
    let options = json!({"driver": "file", "filename": m.path("new.img"), "size": 1 << 20});
    m.do_it("blockdev-create", json!({"job-id": "make", "options": options}));
    m.wait_job("make", |j| j["status"] == "concluded");
    m.do_it("job-dismiss", json!({"id": "make"}));
    let (code, said) = run.end();
    assert_eq!(code, Some(0), "{said}");
    right(&caller, "a.qcow2", &[&frozen[0]], &said);
    afterwards(m, &caller, None, name);
}

/// What was written since it was disabled has no bit.
#[test]
fn a_bitmap_that_another_program_disables_makes_no_inc() {
    let name = "a_bitmap_that_another_program_disables_makes_no_inc";
    for command in ["block-dirty-bitmap-disable", "block-dirty-bitmap-remove"] {
        let Some(mut m) = Machine::start(name) else { return };
        let caller = m.caller();
        caller.must("full");
        let recording = bitmaps(&mut m.qmp).pop().unwrap();
        let on = if recording.ends_with("-0") { ("a", "dr0", 0) } else { ("o", "o", 1) };
        m.scribble();
        let run = Stopped::start(&m, "inc", "files created");
        m.do_it(command, json!({"node": on.0, "name": recording}));
        m.scribble();
        let frozen = m.expect.clone();
        let (code, said) = run.end();
        assert_eq!(code, Some(16), "{said}");
        let why = match command {
            "block-dirty-bitmap-disable" => "another program has disabled or removed bitmap",
            // QEMU has none to merge.
            _ => "not found",
        };
        assert!(said.contains(&format!("warning: {}: ", on.1)) && said.contains(why), "{said}");
        let disks = ["a.qcow2", "o.qcow2"];
        assert_eq!(points(&caller, disks[on.2]).len(), 1, "{said}");
        right(&caller, disks[1 - on.2], &[&frozen[1 - on.2]], &said);
        m.scribble();
        let said = caller.must("auto");
        assert!(said.contains(": taking a FULL: bitmap "), "{said}");
        right(&caller, disks[on.2], &[&m.expect[on.2]], &said);
        afterwards(m, &caller, None, name);
    }
}

#[test]
fn a_job_on_one_disk_leaves_the_other_its_point() {
    let name = "a_job_on_one_disk_leaves_the_other_its_point";
    let Some(mut m) = Machine::start(name) else { return };
    let caller = m.caller();
    let copy =
        json!({"job-id": "other", "device": "o", "target": "b", "sync": "full", "speed": 1 << 18});
    m.do_it("blockdev-backup", copy);
    let out = caller.with(&["--include", "dr0"]).run("full");
    assert_eq!(out.status.code(), Some(0), "{}", String::from_utf8_lossy(&out.stderr));
    let out = caller.run("auto");
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.code() == Some(16) && said.contains("o: job other (backup)"), "{said}");
    right(&caller, "a.qcow2", &[&m.expect[0]], &said);
    m.do_it("job-cancel", json!({"id": "other"}));
    m.wait_job("other", serde_json::Value::is_null);
    afterwards(m, &caller, None, name);
}

#[test]
fn a_backup_waits_for_others_as_long_as_it_may() {
    let name = "a_backup_waits_for_others_as_long_as_it_may";
    let Some(mut m) = Machine::start(name) else { return };
    let caller = m.caller();
    let begun = Mirror.begin(&mut m).unwrap();
    let out = caller.with(&["--wait", "1s"]).run("full");
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(
        out.status.code() == Some(16) && said.contains("waiting: dr0: job other (mirror)"),
        "{said}"
    );
    let patient = caller.with(&["--wait", "5m"]);
    let started = |m: &Machine, level: &str| {
        let err = m.path("stderr");
        let mut c = patient.command(level);
        let child = c.stderr(std::fs::File::create(&err).unwrap()).spawn().unwrap();
        let end = Instant::now() + Duration::from_secs(60);
        while !std::fs::read_to_string(&err).unwrap().contains("waiting: ") {
            assert!(Instant::now() < end, "it does not wait");
            std::thread::sleep(Duration::from_millis(10));
        }
        child
    };
    let mut child = started(&m, "full");
    m.scribble();
    begun.end(&mut m);
    assert_eq!(finish(&mut child).code(), Some(0));
    right(&caller, "b.qcow2", &[&m.expect[0]], name);
    // What could not be undone: their filter is above ours.
    let slow = caller.with(&["--speed-limit", "1M"]);
    let mut child = slow.command("full").spawn().unwrap();
    assert!(m.wait_copying(&mut child));
    let begun = TheirFilter.begin(&mut m).unwrap();
    assert_ne!(finish(&mut child).code(), Some(0));
    let (code, said) = recover(&caller);
    assert!(code == Some(6) && said.contains("node tc is above it"), "{said}");
    let (code, said) = recover(&caller);
    assert!(code == Some(6) && said.contains("node tc is above it"), "{said}");
    let mut child = started(&m, "auto");
    m.scribble();
    begun.end(&mut m);
    assert_eq!(finish(&mut child).code(), Some(0));
    right(&caller, "b.qcow2", &[&m.expect[0]], name);
    afterwards(m, &caller, None, name);
}

#[test]
fn a_job_that_nobody_saw_end_makes_no_point() {
    let name = "a_job_that_nobody_saw_end_makes_no_point";
    let Some(mut m) = Machine::start(name) else { return };
    let caller = m.caller();
    let mut run = Stopped::copying(&m);
    run.child.kill().unwrap();
    run.child.wait().unwrap();
    let ended = |j: &serde_json::Value| j["status"] == "concluded";
    let id = m.jobs()[0]["id"].as_str().unwrap().to_string();
    m.wait_job(&id, ended);
    let (code, said) = recover(&caller);
    assert!(code == Some(0) && !said.contains("published"), "{said}");
    assert!(points(&caller, "a.qcow2").is_empty(), "{said}");
    afterwards(m, &caller, None, name);
}
