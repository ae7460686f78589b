//! A backup and a migration never run beside each other: QEMU itself refuses a migration while a backup
//! runs, a backup is refused where the disks are another QEMU's, and where a migration cannot be kept
//! off it makes the backup fail. Nothing of ours stays, and the guest's disk is what the guest wrote.

use std::fs::File;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::support::backup::{
    Caller, PausedBackup, bitmaps, images, leftovers, newest, ours_in_qemu, same,
};
use crate::support::guest::Qmp;
use crate::support::mount::Mount;
use crate::support::qemu::proxy::{self, Lies, refusal};
use crate::support::qemu::two_disks::Machine;
use crate::support::tools::have;
use serde_json::{Value, json};

const TOOLS: &[&str] = &["qemu-system-x86_64", "qemu-img", "qemu-io"];
const DISKS: [&str; 2] = ["a.qcow2", "o.qcow2"];

/// QEMU with these options, and a guest that has written.
fn machine(test: &str, more: &[&str]) -> Option<Machine> {
    if !have(test, TOOLS) {
        return None;
    }
    let mut m = Machine::launch(more);
    m.fill();
    Some(m)
}

/// The newest point of each disk holds these bytes.
fn points(m: &Machine, bytes: &[Vec<u8>; 2]) {
    let target = m.caller().target;
    let mount = Mount::new(&target);
    for (disk, bytes) in DISKS.iter().zip(bytes) {
        same(&mount, disk, &newest(&target, disk), bytes);
    }
}

fn no_points(m: &Machine) {
    for disk in DISKS {
        assert_eq!(images(&m.caller().target.join(disk)), Vec::<PathBuf>::new());
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
    assert_eq!(leftovers(m.folder()), Vec::<PathBuf>::new());
}

#[test]
fn qemu_refuses_a_migration_while_a_backup_runs() {
    let name = "qemu_refuses_a_migration_while_a_backup_runs";
    let Some(mut m) = machine(name, &[]) else { return };
    let frozen = m.expect.clone();
    let held = PausedBackup::start(&m.caller(), "auto");
    m.scribble();
    let why = migrate(&mut m.qmp, false).unwrap_err();
    assert!(why.contains("does not support live migration"), "{why}");
    let (code, said) = held.end();
    assert_eq!(code, Some(0), "{said}");
    points(&m, &frozen);
    nothing_of_ours(&mut m);
    // Only while it ran.
    migrate(&mut m.qmp, false).unwrap();
    wait_for(&mut m.qmp, "query-migrate", "completed");
    m.end(None);
}

#[test]
fn without_what_refuses_it_a_migration_makes_the_backup_fail() {
    let name = "without_what_refuses_it_a_migration_makes_the_backup_fail";
    let Some(mut m) = machine(name, &["-only-migratable"]) else { return };
    let held = PausedBackup::start(&m.caller(), "auto");
    m.scribble();
    migrate(&mut m.qmp, true).unwrap();
    wait_for(&mut m.qmp, "query-migrate", "active");
    let (code, said) = held.end();
    assert_eq!(code, Some(6), "{said}");
    assert!(said.contains("cannot be kept from migrating"), "{said}");
    assert!(said.contains("is being migrated (active)"), "{said}");
    nothing_of_ours(&mut m);
    assert_eq!(bitmaps(&mut m.qmp), Vec::<String>::new());
    no_points(&m);
    // And none begins beside one that runs.
    let (code, said) = self::code(&m.caller());
    assert!(code == Some(6) && said.contains("is being migrated (active)"), "{said}");
    m.qmp.execute("migrate_cancel", json!({}));
    wait_for(&mut m.qmp, "query-migrate", "cancelled");
    let said = m.caller().must("auto");
    assert!(said.contains("cannot be kept from migrating"), "{said}");
    points(&m, &m.expect);
    m.end(None);
}

#[test]
fn a_migration_that_has_come_and_gone_is_noticed() {
    let name = "a_migration_that_has_come_and_gone_is_noticed";
    let Some(mut m) = machine(name, &["-only-migratable"]) else { return };
    let held = PausedBackup::start(&m.caller(), "auto");
    migrate(&mut m.qmp, true).unwrap();
    wait_for(&mut m.qmp, "query-migrate", "active");
    m.qmp.execute("migrate_cancel", json!({}));
    wait_for(&mut m.qmp, "query-migrate", "cancelled");
    let (code, said) = held.end();
    assert!(code == Some(6) && said.contains("was migrated meanwhile"), "{said}");
    nothing_of_ours(&mut m);
    no_points(&m);
    m.end(None);
}

#[test]
fn a_guest_that_has_left_is_not_backed_up_here() {
    let name = "a_guest_that_has_left_is_not_backed_up_here";
    let Some(mut m) = machine(name, &[]) else { return };
    m.caller().must("auto");
    let before = bitmaps(&mut m.qmp);
    migrate(&mut m.qmp, false).unwrap();
    wait_for(&mut m.qmp, "query-status", "postmigrate");
    for more in [&[][..], &["--dry-run"], &["--wait", "1h"]] {
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
    m.scribble();
    m.caller().must("inc");
    points(&m, &m.expect);
    m.end(None);
}

#[test]
fn a_guest_that_has_not_arrived_is_not_touched() {
    let name = "a_guest_that_has_not_arrived_is_not_touched";
    if !have(name, TOOLS) {
        return;
    }
    // Nobody may write to its disks yet.
    let mut m = Machine::launch(&["-incoming", "defer"]);
    let (code, said) = code(&m.caller());
    assert!(code == Some(6) && said.contains("waits for an incoming migration"), "{said}");
    let out = m.caller().recovery(&[]).output().unwrap();
    assert_eq!(out.status.code(), Some(6), "{}", String::from_utf8_lossy(&out.stderr));
    nothing_of_ours(&mut m);
}

/// What QEMU keeps of ours keeps it from migrating: a filter of ours would be on one side only.
#[test]
fn while_something_of_ours_cannot_be_removed_no_migration_begins() {
    let name = "while_something_of_ours_cannot_be_removed_no_migration_begins";
    let Some(mut m) = machine(name, &[]) else { return };
    let held = PausedBackup::start(&m.caller(), "auto");
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
    m.caller().must_recover(&[]);
    nothing_of_ours(&mut m);
    migrate(&mut m.qmp, false).unwrap();
    // QEMU may die if it is ended while a migration is.
    wait_for(&mut m.qmp, "query-migrate", "completed");
    m.end(None);
}

/// `cpr-reboot` saves the guest to be started again by another QEMU on this host; a node that
/// cannot migrate does not stop it.
#[test]
fn a_guest_saved_for_another_qemu_on_this_host_makes_the_backup_fail() {
    let name = "a_guest_saved_for_another_qemu_on_this_host_makes_the_backup_fail";
    let Some(mut m) = machine(name, &[]) else { return };
    if m.qmp.try_execute("migrate-set-parameters", json!({"mode": "cpr-reboot"})).is_err() {
        return println!("skipped: {name}: this QEMU has no mode cpr-reboot");
    }
    let held = PausedBackup::start(&m.caller(), "auto");
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
    no_points(&m);
    assert_eq!(leftovers(m.folder()), Vec::<PathBuf>::new());
    m.end(None);
}

/// What is asked of QEMU, with some of it answered otherwise.
#[derive(Default)]
struct Between {
    /// Commands that are no questions, with their arguments.
    asked: Mutex<Vec<(String, Value)>>,
    /// The arguments of an `add-fd` that is refused contain this.
    refused: Option<&'static str>,
    /// The guest is being handed over once it goes on.
    hands_over: AtomicBool,
    handed: AtomicBool,
}

impl Lies for Arc<Between> {
    fn asked(&self, request: &Value, _passed: &[File]) -> Option<Value> {
        let command = request["execute"].as_str().unwrap().to_string();
        let arguments = request["arguments"].clone();
        let refuse = command == "add-fd"
            && self.refused.is_some_and(|r| arguments["opaque"].as_str().unwrap().contains(r));
        if command.starts_with("query-") {
            return None;
        }
        self.asked.lock().unwrap().push((command, arguments));
        refuse.then(|| refusal("no more descriptors"))
    }

    fn answered(&self, command: &str, answer: &mut Value) {
        let handed = self.handed.load(Ordering::SeqCst);
        match command {
            "cont" if self.hands_over.swap(false, Ordering::SeqCst) => {
                self.handed.store(true, Ordering::SeqCst);
                self.asked.lock().unwrap().clear();
            }
            "query-status" if handed => {
                answer["return"] = json!({"status": "finish-migrate", "running": false});
            }
            "query-migrate" if handed => answer["return"] = json!({"status": "postcopy-active"}),
            _ => {}
        }
    }
}

impl Between {
    /// From now on it is in front of QEMU.
    fn listen(self, m: &Machine) -> Arc<Between> {
        let (socket, real) = (m.path("qmp.sock"), m.path("real.sock"));
        std::fs::rename(&socket, &real).unwrap();
        let between = Arc::new(self);
        proxy::listen(&socket, &real, between.clone());
        between
    }
}

/// Whatever is begun on a disk that is being handed over makes QEMU take it back, and write its tables
/// at its end.
#[test]
fn a_disk_that_is_being_handed_over_is_left_alone() {
    let name = "a_disk_that_is_being_handed_over_is_left_alone";
    let Some(mut m) = machine(name, &[]) else { return };
    m.caller().must("full");
    let before = bitmaps(&mut m.qmp);
    m.scribble();
    let lies = Between { hands_over: true.into(), ..Default::default() };
    let between = lies.listen(&m);
    let caller = m.caller();
    let out = caller.run("inc");
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(6), "{said}");
    let last = said.lines().last().unwrap();
    assert!(last.contains("SIGKILL") && last.contains("is being migrated"), "{said}");
    let mut asked: Vec<String> =
        between.asked.lock().unwrap().drain(..).map(|(command, _)| command).collect();
    asked.retain(|c| !["qmp_capabilities", "x-debug-query-block-graph"].contains(&c.as_str()));
    assert_eq!(asked, Vec::<String>::new());
    assert_eq!(leftovers(&caller.target), Vec::<PathBuf>::new());
    let out = caller.recovery(&[]).output().unwrap();
    assert_eq!(out.status.code(), Some(6), "{}", String::from_utf8_lossy(&out.stderr));
    // The migration fails, and the guest stays.
    between.handed.store(false, Ordering::SeqCst);
    caller.must_recover(&[]);
    nothing_of_ours(&mut m);
    assert_eq!(bitmaps(&mut m.qmp), before);
    // No INC: the one in between listens, and by it nobody knows what QEMU has open.
    caller.must("full");
    points(&m, &m.expect);
    m.end(None);
}

/// The view is there before the guest goes on: QEMU gives up a migration that it finds there at its end.
#[test]
fn no_migration_ends_while_a_frozen_view_stands() {
    let name = "no_migration_ends_while_a_frozen_view_stands";
    let Some(mut m) = machine(name, &["-only-migratable"]) else { return };
    let err = m.path("stderr");
    let mut child = m.caller().stopped_at("full", "answer cont", &err);
    migrate(&mut m.qmp, false).unwrap();
    wait_for(&mut m.qmp, "query-migrate", "failed");
    assert_eq!(m.qmp.execute("query-status", json!({}))["status"], "running");
    // SAFETY: a signal to our own child.
    unsafe { libc::kill(child.id() as i32, libc::SIGCONT) };
    let status = child.wait().unwrap();
    let said = std::fs::read_to_string(err).unwrap();
    assert_eq!(status.code(), Some(6), "{said}");
    assert!(said.contains("was migrated meanwhile"), "{said}");
    no_points(&m);
    nothing_of_ours(&mut m);
    m.scribble();
    m.end(None);
}

#[test]
fn two_failed_migrations_are_told_apart() {
    let name = "two_failed_migrations_are_told_apart";
    let Some(mut m) = machine(name, &["-only-migratable"]) else { return };
    let fail = |m: &mut Machine| {
        m.qmp.execute("migrate", json!({"uri": "exec:exit 1"}));
        wait_for(&mut m.qmp, "query-migrate", "failed");
    };
    fail(&mut m);
    m.caller().must("full");
    let held = PausedBackup::start(&m.caller(), "auto");
    fail(&mut m);
    let (code, said) = held.end();
    assert!(code == Some(6) && said.contains("was migrated meanwhile"), "{said}");
    nothing_of_ours(&mut m);
    let list = m.qmp.execute("query-migrate-capabilities", json!({}));
    let events = list.as_array().unwrap().iter().find(|c| c["capability"] == "events").unwrap();
    assert_eq!(events["state"], false);
    m.end(None);
}

/// Until then what is on the disks is not what another QEMU should get.
#[test]
fn what_keeps_the_guest_here_goes_last() {
    let name = "what_keeps_the_guest_here_goes_last";
    let Some(mut m) = machine(name, &[]) else { return };
    let (code, said) = PausedBackup::start(&m.caller(), "full").signalled(libc::SIGKILL);
    assert_eq!(code, None, "{said}");
    let between = Between::default().listen(&m);
    m.caller().must_recover(&[]);
    let asked = between.asked.lock().unwrap();
    let last = |command: &str, node: &str| {
        let is = |(c, a): &(String, Value)| {
            let name = ["node-name", "name"].iter().find_map(|k| a[*k].as_str());
            c == command && name.unwrap_or_default().contains(node)
        };
        asked.iter().rposition(is).unwrap_or_else(|| panic!("no {command} {node}: {asked:?}"))
    };
    assert!(last("block-dirty-bitmap-remove", "fleecefs-") < last("blockdev-del", "-m0"));
    drop(asked);
    nothing_of_ours(&mut m);
    m.end(None);
}

#[test]
fn a_blocker_that_cannot_be_handed_over_costs_no_backup() {
    let name = "a_blocker_that_cannot_be_handed_over_costs_no_backup";
    let Some(mut m) = machine(name, &[]) else { return };
    Between { refused: Some("-m0"), ..Default::default() }.listen(&m);
    let said = m.caller().must("full");
    assert!(said.contains("cannot be kept from migrating"), "{said}");
    points(&m, &m.expect);
    nothing_of_ours(&mut m);
    m.end(None);
}
