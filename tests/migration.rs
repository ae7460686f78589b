//! A backup and a migration never run beside each other: QEMU itself refuses a migration while a backup
//! runs, a backup is refused where the disks are another QEMU's, and where a migration cannot be kept
//! off it makes the backup fail. Nothing of ours stays, and the guest's disk is what the guest wrote.

mod backup;
#[path = "common/guest.rs"]
mod guest;
mod mounted;
mod qemu;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use backup::{Caller, Held, bitmaps, images, leftovers, newest, ours_in_qemu, same};
use guest::Qmp;
use mounted::Mount;
use qemu::{have, run};
use serde_json::json;

const TOOLS: &[&str] = &["qemu-system-x86_64", "qemu-img", "qemu-io"];
const SIZE: usize = 16 << 20;

/// QEMU with one disk, a guest without an operating system, and what the guest has written.
struct Machine {
    dir: tempfile::TempDir,
    child: Child,
    /// The test's own client: a socket serves one.
    qmp: Qmp,
    wrote: Vec<u8>,
}

impl Machine {
    fn start(test: &str, more: &[&str]) -> Option<Self> {
        if !have(test, TOOLS) {
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("d.qcow2");
        run("qemu-img", &["create", "-q", "-f", "qcow2", disk.to_str().unwrap(), "16M"]);
        let mut c = Command::new("qemu-system-x86_64");
        c.args(["-M", "q35", "-accel", "tcg", "-m", "32", "-nodefaults", "-display", "none"]);
        for socket in ["qmp.sock", "own.sock"] {
            let path = dir.path().join(socket);
            c.arg("-qmp").arg(format!("unix:{},server=on,wait=off", path.display()));
        }
        c.arg("-blockdev").arg(format!(
            "driver=qcow2,node-name=disk0,discard=unmap,file.driver=file,file.filename={}",
            disk.display()
        ));
        c.args(["-device", "virtio-blk-pci,id=vd0,drive=disk0"]).args(more).stdin(Stdio::null());
        let child = c.spawn().expect("QEMU starts");
        let own = dir.path().join("own.sock");
        let end = Instant::now() + Duration::from_secs(60);
        while std::os::unix::net::UnixStream::connect(&own).is_err() {
            assert!(Instant::now() < end, "QEMU does not come up");
            std::thread::sleep(Duration::from_millis(20));
        }
        Some(Machine { qmp: Qmp::connect(&own), dir, child, wrote: vec![0; SIZE] })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn caller(&self) -> Caller {
        let (state, target) = (self.path("state"), self.path("T"));
        Caller { qmp: self.path("qmp.sock"), state, target, more: Vec::new() }
    }

    /// Writes as the guest's device does.
    fn write(&mut self, byte: u8, at: usize, len: usize) {
        let line = format!(
            "qemu-io -d /machine/peripheral/vd0/virtio-backend \"write -P {byte} {at} {len}\""
        );
        self.qmp.execute("human-monitor-command", json!({"command-line": line}));
        self.wrote[at..at + len].fill(byte);
    }

    /// Ends QEMU, and compares its disk with what was written.
    fn check_disk(mut self) {
        let _ = self.qmp.try_execute("quit", json!({}));
        self.child.wait().unwrap();
        let (disk, raw) = (self.path("d.qcow2"), self.path("d.raw"));
        let text = |p: &Path| p.to_str().unwrap().to_string();
        run("qemu-img", &["check", "-q", &text(&disk)]);
        run("qemu-img", &["convert", "-O", "raw", &text(&disk), &text(&raw)]);
        assert!(
            std::fs::read(&raw).unwrap() == self.wrote,
            "the guest's disk is not what it wrote"
        );
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Migrates to nowhere, as fast as it goes or as slowly as it can.
fn migrate(qmp: &mut Qmp, slowly: bool) -> Result<(), String> {
    let speed = if slowly { 1000 } else { 1u64 << 40 };
    qmp.execute("migrate-set-parameters", json!({"max-bandwidth": speed}));
    qmp.try_execute("migrate", json!({"uri": "exec:cat >/dev/null"})).map(drop)
}

fn wait_for(qmp: &mut Qmp, command: &str, wanted: &str) {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        let now = qmp.execute(command, json!({}));
        if now["status"] == wanted {
            return;
        }
        assert!(Instant::now() < end, "{command}: {now}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn code(caller: &Caller) -> (Option<i32>, String) {
    let out = caller.run("auto");
    (out.status.code(), String::from_utf8_lossy(&out.stderr).into_owned())
}

fn nothing_of_ours(m: &mut Machine) {
    assert_eq!(ours_in_qemu(&mut m.qmp), Vec::<String>::new());
    assert_eq!(leftovers(m.dir.path()), Vec::<PathBuf>::new());
}

#[test]
fn qemu_refuses_a_migration_while_a_backup_runs() {
    let name = "qemu_refuses_a_migration_while_a_backup_runs";
    let Some(mut m) = Machine::start(name, &[]) else { return };
    m.write(1, 0, 8 << 20);
    let frozen = m.wrote.clone();
    let held = Held::start(&m.caller(), "auto");
    m.write(2, 4 << 20, 8 << 20);
    let why = migrate(&mut m.qmp, false).unwrap_err();
    assert!(why.contains("does not support live migration"), "{why}");
    let (code, said) = held.end();
    assert_eq!(code, Some(0), "{said}");
    let target = m.caller().target;
    same(&Mount::new(&target), "d.qcow2", &newest(&target, "d.qcow2"), &frozen);
    nothing_of_ours(&mut m);
    // Only while it ran.
    migrate(&mut m.qmp, false).unwrap();
    wait_for(&mut m.qmp, "query-migrate", "completed");
    m.check_disk();
}

#[test]
fn without_what_refuses_it_a_migration_makes_the_backup_fail() {
    let name = "without_what_refuses_it_a_migration_makes_the_backup_fail";
    let Some(mut m) = Machine::start(name, &["-only-migratable"]) else { return };
    m.write(1, 0, 8 << 20);
    let held = Held::start(&m.caller(), "auto");
    m.write(2, 4 << 20, 8 << 20);
    migrate(&mut m.qmp, true).unwrap();
    wait_for(&mut m.qmp, "query-migrate", "active");
    let (code, said) = held.end();
    assert_eq!(code, Some(6), "{said}");
    assert!(said.contains("cannot be kept from migrating"), "{said}");
    assert!(said.contains("is being migrated (active)"), "{said}");
    nothing_of_ours(&mut m);
    assert_eq!(bitmaps(&mut m.qmp), Vec::<String>::new());
    assert_eq!(images(&m.caller().target.join("d.qcow2")), Vec::<PathBuf>::new());
    // And none begins beside one that runs.
    let (code, said) = self::code(&m.caller());
    assert!(code == Some(6) && said.contains("is being migrated (active)"), "{said}");
    m.qmp.execute("migrate_cancel", json!({}));
    wait_for(&mut m.qmp, "query-migrate", "cancelled");
    let said = m.caller().must("auto");
    assert!(said.contains("cannot be kept from migrating"), "{said}");
    let target = m.caller().target;
    same(&Mount::new(&target), "d.qcow2", &newest(&target, "d.qcow2"), &m.wrote);
    m.check_disk();
}

#[test]
fn a_migration_that_has_come_and_gone_is_noticed() {
    let name = "a_migration_that_has_come_and_gone_is_noticed";
    let Some(mut m) = Machine::start(name, &["-only-migratable"]) else { return };
    m.write(1, 0, 8 << 20);
    let held = Held::start(&m.caller(), "auto");
    migrate(&mut m.qmp, true).unwrap();
    wait_for(&mut m.qmp, "query-migrate", "active");
    m.qmp.execute("migrate_cancel", json!({}));
    wait_for(&mut m.qmp, "query-migrate", "cancelled");
    let (code, said) = held.end();
    assert!(code == Some(6) && said.contains("was migrated meanwhile"), "{said}");
    nothing_of_ours(&mut m);
    assert_eq!(images(&m.caller().target.join("d.qcow2")), Vec::<PathBuf>::new());
    m.check_disk();
}

#[test]
fn a_guest_that_has_left_is_not_backed_up_here() {
    let name = "a_guest_that_has_left_is_not_backed_up_here";
    let Some(mut m) = Machine::start(name, &[]) else { return };
    m.write(1, 0, 8 << 20);
    m.caller().must("auto");
    let before = bitmaps(&mut m.qmp);
    migrate(&mut m.qmp, false).unwrap();
    wait_for(&mut m.qmp, "query-status", "postmigrate");
    for more in [&[][..], &["--dry-run"]] {
        let (code, said) = code(&m.caller().with(more));
        assert!(code == Some(6) && said.contains("has migrated to another QEMU"), "{said}");
    }
    let mut cleanup = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
    cleanup.args(["cleanup", "--all", "--qmp"]).arg(m.caller().qmp);
    let out = cleanup.arg("--state-dir").arg(m.caller().state).output().unwrap();
    assert_eq!(out.status.code(), Some(6), "{}", String::from_utf8_lossy(&out.stderr));
    // It comes back, since the other side has failed: nothing was lost meanwhile.
    m.qmp.execute("cont", json!({}));
    assert_eq!(bitmaps(&mut m.qmp), before);
    m.write(3, 1 << 20, 1 << 20);
    m.caller().must("inc");
    let target = m.caller().target;
    same(&Mount::new(&target), "d.qcow2", &newest(&target, "d.qcow2"), &m.wrote);
    m.check_disk();
}

#[test]
fn a_guest_that_has_not_arrived_is_not_touched() {
    let name = "a_guest_that_has_not_arrived_is_not_touched";
    let Some(mut m) = Machine::start(name, &["-incoming", "defer"]) else { return };
    let (code, said) = code(&m.caller());
    assert!(code == Some(6) && said.contains("waits for a migration to arrive"), "{said}");
    let mut recover = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
    recover.args(["recover", "--qmp"]).arg(m.caller().qmp);
    let out = recover.arg("--state-dir").arg(m.caller().state).output().unwrap();
    assert_eq!(out.status.code(), Some(6), "{}", String::from_utf8_lossy(&out.stderr));
    nothing_of_ours(&mut m);
}

/// What QEMU keeps of ours keeps it from migrating: a filter of ours would be on one side only.
#[test]
fn while_something_of_ours_cannot_be_removed_no_migration_begins() {
    let name = "while_something_of_ours_cannot_be_removed_no_migration_begins";
    let Some(mut m) = Machine::start(name, &[]) else { return };
    m.write(1, 0, 8 << 20);
    let held = Held::start(&m.caller(), "auto");
    let filter = ours_in_qemu(&mut m.qmp).into_iter().find_map(|n| {
        let node = n.strip_prefix("query-named-block-nodes: ")?.to_string();
        node.rsplit_once('-')?.1.starts_with('t').then_some(node)
    });
    let above =
        json!({"driver": "raw", "node-name": "theirs", "file": filter.unwrap(), "read-only": true});
    m.qmp.execute("blockdev-add", above);
    let (code, said) = held.end();
    assert_ne!(code, Some(0), "{said}");
    assert!(said.contains("fleecefs recover"), "{said}");
    let why = migrate(&mut m.qmp, false).unwrap_err();
    assert!(why.contains("does not support live migration"), "{why}");
    m.qmp.execute("blockdev-del", json!({"node-name": "theirs"}));
    let mut recover = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
    recover.args(["recover", "--qmp"]).arg(m.caller().qmp);
    let out = recover.arg("--state-dir").arg(m.caller().state).output().unwrap();
    assert_eq!(out.status.code(), Some(0), "{}", String::from_utf8_lossy(&out.stderr));
    nothing_of_ours(&mut m);
    migrate(&mut m.qmp, false).unwrap();
    // QEMU may die if it is ended while a migration is.
    wait_for(&mut m.qmp, "query-migrate", "completed");
    m.check_disk();
}

/// `cpr-reboot` saves the guest to be started again by another QEMU on this host; a node that
/// cannot migrate does not stop it.
#[test]
fn a_guest_saved_for_another_qemu_on_this_host_makes_the_backup_fail() {
    let name = "a_guest_saved_for_another_qemu_on_this_host_makes_the_backup_fail";
    let Some(mut m) = Machine::start(name, &[]) else { return };
    m.write(1, 0, 8 << 20);
    if m.qmp.try_execute("migrate-set-parameters", json!({"mode": "cpr-reboot"})).is_err() {
        return println!("skipped: {name}: this QEMU has no mode cpr-reboot");
    }
    let held = Held::start(&m.caller(), "auto");
    let file = format!("file:{}", m.path("saved").display());
    m.qmp.execute("migrate", json!({"uri": file}));
    // Over, however: with our job in between QEMU 10 gives it up at its end.
    let end = Instant::now() + Duration::from_secs(60);
    while !["completed", "failed"]
        .contains(&m.qmp.execute("query-migrate", json!({}))["status"].as_str().unwrap_or_default())
    {
        assert!(Instant::now() < end, "the guest is not saved");
        std::thread::sleep(Duration::from_millis(20));
    }
    let (code, said) = held.end();
    assert_eq!(code, Some(6), "{said}");
    let left = Vec::<PathBuf>::new();
    assert_eq!(images(&m.caller().target.join("d.qcow2")), left);
    assert_eq!(leftovers(m.dir.path()), left);
    m.check_disk();
}
