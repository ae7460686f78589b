//! No snapshot is loaded while a backup copies: all that a frozen view has of it would be gone. QEMU
//! refuses that where a disk has a bitmap, so each disk of a run has one, also those that need none to
//! record, and it goes with the run.

use std::process::Child;

use crate::support::backup::{PausedBackup, bitmaps, holds, leftovers, ours_in_qemu};
use crate::support::points::{finish, points, recover, right};
use crate::support::qemu::any_devices::Bare;
use crate::support::qemu::two_disks::{self, Machine};
use crate::support::tools::{have, run};
use serde_json::{Value, json};

/// Loads the snapshot; the job as it has ended.
fn load(m: &mut Machine, devices: &[&str]) -> Value {
    let (id, tag) = ("load", "s");
    let arguments = json!({"job-id": id, "tag": tag, "vmstate": devices[0], "devices": devices});
    m.do_it("snapshot-load", arguments);
    m.wait_job(id, |j| j["status"] == "concluded");
    let job = m.jobs().into_iter().find(|j| j["id"] == id).unwrap();
    m.do_it("job-dismiss", json!({"id": id}));
    job
}

/// A machine with a snapshot of all disks, which have changed since.
fn with_snapshot(test: &str) -> Option<Machine> {
    let mut m = Machine::start(test)?;
    let save = json!({"job-id": "save", "tag": "s", "vmstate": "a", "devices": ["a", "o"]});
    m.do_it("snapshot-save", save);
    m.wait_job("save", |j| j["status"] == "concluded");
    let job = m.jobs().into_iter().find(|j| j["id"] == "save").unwrap();
    assert!(job["error"].is_null(), "{job}");
    m.do_it("job-dismiss", json!({"id": "save"}));
    m.scribble();
    Some(m)
}

fn copying(m: &Machine, more: &[&str]) -> Child {
    let caller = m.caller().with(&[&["--speed-limit", "1M"], more].concat());
    let err = std::fs::File::create(m.path("stderr")).unwrap();
    caller.command("copy").stderr(err).spawn().unwrap()
}

#[test]
fn qemu_loads_no_snapshot_into_a_disk_that_is_copied() {
    let name = "qemu_loads_no_snapshot_into_a_disk_that_is_copied";
    let Some(mut m) = with_snapshot(name) else { return };
    let (caller, frozen) = (m.caller(), m.expect.clone());
    let mut child = copying(&m, &[]);
    assert!(m.wait_copying(&mut child));
    assert_eq!(holds(&mut m.qmp).len(), 2);
    let job = load(&mut m, &["a", "o"]);
    assert!(job["error"].as_str().is_some_and(|e| e.contains("bitmap")), "{job}");
    m.do_it("cont", json!({}));
    m.hurry();
    let status = finish(&mut child);
    let said = std::fs::read_to_string(m.path("stderr")).unwrap();
    assert_eq!(ours_in_qemu(&mut m.qmp), Vec::<String>::new(), "{said}");
    assert_eq!(bitmaps(&mut m.qmp), Vec::<String>::new(), "{said}");
    assert!(status.success(), "{said}");
    right(&caller, "a.qcow2", &[&frozen[0]], &said);
    right(&caller, "o.qcow2", &[&frozen[1]], &said);
    // Nothing is left that keeps it off.
    let job = load(&mut m, &["a", "o"]);
    assert!(job["error"].is_null(), "{job}");
}

/// Into a disk that is not in the run it can be loaded, and the guest has other memory then.
#[test]
fn a_snapshot_that_is_loaded_beside_fails_the_run() {
    let name = "a_snapshot_that_is_loaded_beside_fails_the_run";
    let Some(mut m) = Machine::start(name) else { return };
    let save = json!({"job-id": "save", "tag": "s", "vmstate": "o", "devices": ["o"]});
    m.do_it("snapshot-save", save);
    m.wait_job("save", |j| j["status"] == "concluded");
    let caller = m.caller();
    let mut child = copying(&m, &["--include", "dr0"]);
    while holds(&mut m.qmp).is_empty() || !m.jobs().iter().any(|j| j["type"] == "backup") {
        assert!(child.try_wait().unwrap().is_none());
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let arguments = json!({"job-id": "load", "tag": "s", "vmstate": "o", "devices": ["o"]});
    m.do_it("snapshot-load", arguments);
    m.wait_job("load", |j| j["status"] == "concluded");
    let status = finish(&mut child);
    let said = std::fs::read_to_string(m.path("stderr")).unwrap();
    assert!(!status.success(), "{said}");
    assert!(points(&caller, "a.qcow2").is_empty(), "{said}");
    assert_eq!(ours_in_qemu(&mut m.qmp), Vec::<String>::new(), "{said}");
}

/// Whoever dies whenever: what was there for the run alone goes with `recover`.
#[test]
fn what_a_killed_copy_has_left_on_a_disk_is_removed() {
    let name = "what_a_killed_copy_has_left_on_a_disk_is_removed";
    let Some(mut m) = Machine::start(name) else { return };
    let caller = m.caller();
    let mut left = 0;
    for n in (1..).step_by(3) {
        let status = caller
            .command("copy")
            .env("FLEECEFS_CRASH_AT", n.to_string())
            .env("FLEECEFS_STEPS", m.path("steps"))
            .stderr(std::fs::File::create(m.path("stderr")).unwrap())
            .status()
            .unwrap();
        left += holds(&mut m.qmp).len();
        if status.success() {
            break;
        }
        // By the journal, and without it.
        if n % 2 == 0 {
            std::fs::remove_dir_all(&caller.state).unwrap();
        }
        let (code, said) = recover(&caller);
        assert_eq!(code, Some(0), "step {n}: {said}");
        assert_eq!(ours_in_qemu(&mut m.qmp), Vec::<String>::new(), "step {n}: {said}");
        assert_eq!(bitmaps(&mut m.qmp), Vec::<String>::new(), "step {n}: {said}");
    }
    assert!(left > 4, "{left}");
    right(&caller, "a.qcow2", &[&m.expect[0]], name);
}

/// Firmware's variables are copied in full each time, and need no bitmap.
#[test]
fn firmware_flash_has_one_too() {
    let name = "firmware_flash_has_one_too";
    if !have(name, two_disks::TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let vars = dir.path().join("vars.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", vars.to_str().unwrap(), "1M"]);
    let drive = |unit: u8, file: &str| format!("if=pflash,unit={unit},{file}");
    let code = dir.path().join("code");
    std::fs::File::create(&code).unwrap().set_len(1 << 20).unwrap();
    let code = format!("format=raw,readonly=on,file={}", code.display());
    let vars = format!("format=qcow2,file={}", vars.display());
    let bare = Bare::start(dir.path(), &["-drive", &drive(0, &code), "-drive", &drive(1, &vars)]);
    let caller = bare.caller("T");
    let held = PausedBackup::start(&caller, "auto");
    assert_eq!(holds(&mut bare.qmp()).len(), 1, "{}", held.said());
    let (code, said) = held.end();
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(bitmaps(&mut bare.qmp()), Vec::<String>::new(), "{said}");
    assert_eq!(leftovers(dir.path()), Vec::<std::path::PathBuf>::new());
}

/// A snapshot by another program makes the disk below it read-only.
#[test]
fn it_goes_also_from_a_disk_that_has_become_read_only() {
    let name = "it_goes_also_from_a_disk_that_has_become_read_only";
    let Some(mut m) = Machine::start(name) else { return };
    let mut child = copying(&m, &[]);
    assert!(m.wait_copying(&mut child));
    let file = m.text("ov.qcow2");
    let overlay = json!({"node-name": "a", "snapshot-file": file, "snapshot-node-name": "ov"});
    m.do_it("blockdev-snapshot-sync", overlay);
    let status = finish(&mut child);
    let said = std::fs::read_to_string(m.path("stderr")).unwrap();
    assert!(!status.success(), "{said}");
    let (code, more) = recover(&m.caller());
    assert_eq!(code, Some(0), "{said}{more}");
    assert_eq!(bitmaps(&mut m.qmp), Vec::<String>::new(), "{said}{more}");
    m.end(None);
}
