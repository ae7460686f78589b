//! What a recovery does in QEMU, and what it makes of a QEMU that does not do it.

use std::collections::BTreeSet;
use std::time::Duration;

use serde_json::Value;

use super::super::*;
use crate::backup::Quiet;
use crate::backup::names::{Role, object};
use crate::qmp::client::testing::{Answer, FakeQemu, Served, node, qemu};

const RUN: &str = "0123456789ab";
/// The bitmaps of two disks.
const BITMAPS: [&str; 2] = ["of disk 0", "of disk 1"];

/// A state folder and a target, both empty.
struct Place {
    dir: tempfile::TempDir,
    vm: Address,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["state", "target"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        let vm = Address::Unix(dir.path().join("qmp"));
        Place { dir, vm }
    }

    fn at(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().canonicalize().unwrap().join(name)
    }

    /// A disk of which nothing but a bitmap is there.
    fn disk(&self, index: usize) -> DiskRecord {
        DiskRecord {
            index,
            dir: self.at("target"),
            image: format!("FULL-1-d{index}"),
            fleece: Default::default(),
            node: "disks".into(),
            top: "disks".into(),
            bitmap: Some(BITMAPS[index].into()),
            image_id: None,
            fleece_id: None,
        }
    }

    fn pending(&self) -> Pending {
        let disks = vec![self.disk(0), self.disk(1)];
        Pending { run: RUN.into(), target: self.at("target"), disks, ..Default::default() }
    }

    fn by_command<T>(&self, does: impl FnOnce(RecoverContext<'_>) -> T) -> T {
        let state = self.at("state");
        let (vm, cause) = (&self.vm, RecoverCause::Command);
        does(RecoverContext { state: &state, vm, cause, agent: None })
    }

    fn undone(&self, s: &mut Served, pending: &Pending) -> Result<Vec<DeferredDisk>> {
        self.by_command(|place| undo(&mut s.client, pending, place, &Quiet))
    }
}

/// With both disks' bitmaps, and a guest.
fn machine(decide: impl FnMut(&str, &Value) -> Answer + Send + 'static) -> FakeQemu {
    let mut q = qemu(vec![node("disks", "qcow2", &BITMAPS)], decide);
    q.commands.extend(["query-status", "query-migrate"]);
    q
}

/// Refuses one command.
fn refusing(command: &'static str) -> impl FnMut(&str, &Value) -> Answer + Send {
    move |c, _| if c == command { Answer::Refused("no") } else { Answer::Done }
}

#[test]
fn a_disk_that_needs_nothing_more_is_left_alone() {
    let place = Place::new();
    let pending = Pending { settled: vec![0], ..place.pending() };
    let mut s = machine(|_, _| Answer::Done).start();
    assert!(place.undone(&mut s, &pending).unwrap().is_empty());
    assert_eq!(s.now().bitmaps(), [BITMAPS[0]]);

    let partial =
        |i: usize| place.at("target").join(publish::partial_name(&pending.disks[i].image));
    (0..2).for_each(|i| std::fs::write(partial(i), "somebody's").unwrap());
    let left = place.by_command(|at| undo_offline(&pending, at, &Quiet)).unwrap();
    assert!(left.is_empty() && partial(0).exists() && !partial(1).exists());
}

/// All else is undone, and who asked for it is told.
#[test]
fn a_guest_that_qemu_does_not_let_run_is_an_error() {
    let place = Place::new();
    let pending = Pending { stopped: true, ..place.pending() };
    let mut q = machine(refusing("cont"));
    q.state = "paused";
    let mut s = q.start();
    let e = place.undone(&mut s, &pending).unwrap_err();
    assert!(e.kind() == Kind::Peer && e.report().contains("cont"), "{}", e.report());
    assert!(s.now().bitmaps().is_empty());
}

/// A target that is away can wait; QEMU is there.
#[test]
fn what_qemu_refuses_is_not_left_for_later() {
    let place = Place::new();
    let mut s = machine(refusing("block-dirty-bitmap-remove")).start();
    let e = place.undone(&mut s, &place.pending()).unwrap_err();
    assert!(e.kind() == Kind::Peer && e.report().contains("bitmap"), "{}", e.report());
}

#[test]
fn the_bitmaps_of_a_guest_that_has_left_are_anothers() {
    for (state, left) in [("postmigrate", &BITMAPS[..]), ("running", &BITMAPS[1..])] {
        let place = Place::new();
        let deferred = DeferredDisk { disk: place.disk(0), finished: false };
        journal::keep(&place.at("state"), &place.vm, &[deferred]).unwrap();
        let mut q = machine(|_, _| Answer::Done);
        (q.state, q.migration) = (state, "completed");
        let mut s = q.start();
        let done = place.by_command(|at| recover(&mut s.client, at, &Quiet)).unwrap();
        assert_eq!((done.done, done.left), (1, 0));
        assert_eq!(s.now().bitmaps(), left, "{state}");
    }
}

#[test]
fn of_runs_that_do_not_go_in_time_no_more_than_some_are_waited_for() {
    let place = Place::new();
    let runs: Vec<String> = (1..=5).map(|i| format!("{i}{RUN}")[..RUN.len()].to_string()).collect();
    let scratch = |run: &String| node(&object(run, Role::Scratch, 0), "raw", &[]);
    let mut s = qemu(runs.iter().map(scratch).collect(), |_, _| Answer::Silence).start();
    s.patience(Duration::from_secs(2));
    let e = place.by_command(|at| recover(&mut s.client, at, &Quiet)).unwrap_err();
    assert_eq!(e.kind(), Kind::Timeout);
    let asked: BTreeSet<String> = s.now().said.iter().map(|(_, a)| a.to_string()).collect();
    assert_eq!(asked.len() as u32, MOST_LATE);
}
