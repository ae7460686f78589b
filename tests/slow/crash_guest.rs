//! The crash matrix with a guest: kill -9 while the guest's file systems are frozen and it is paused, then one
//! `backup --level auto`.
//!
//! After it, as in `crash`: exit 0, all points right, nothing of ours left. Before it the guest ran and was thawed.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::backup::Caller;
use crate::support::guest::{Disk, Guest, has_qemu};
use crate::support::killed::Matrix;
use crate::support::tools::{have, run};

#[test]
fn killed_at_every_kind_of_step_with_a_real_guest() {
    let name = "killed_at_every_kind_of_step_with_a_real_guest";
    if !have(name, &["qemu-img", "/dev/fuse"]) || !has_qemu(name) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let disks: Vec<Disk> = [("a", "qcow2"), ("b", "raw")]
        .into_iter()
        .map(|(n, format)| {
            let path = dir.path().join(format!("{n}.img"));
            run("qemu-img", &["create", "-q", "-f", format, path.to_str().unwrap(), "8M"]);
            Disk::new(n, path).format(format)
        })
        .collect();
    let writers = ["churn /dev/disk/a 1", "churn /dev/disk/b 2"];
    let guest = Guest::start(name, &disks, &writers).expect("QEMU is there");
    let agent = guest.agent_socket().display().to_string();
    let caller = Caller::guest(&guest).with(&[
        "--include",
        "a,b",
        "--quiesce",
        "--agent",
        &agent,
        "--hold-limit",
        "20",
        "--guest-before",
        "echo before >>/tmp/log",
        "--guest-after",
        "echo after >>/tmp/log",
    ]);
    let mut m = Matrix::new(caller, &["a.img", "b.img"]);
    let (said, views) = m.caller.held("full");
    assert!(said.contains("froze"), "{said}");
    m.learn(&Vec::new(), &views);
    for n in chosen(&mut m) {
        let (Some(step), views) = m.caller.crash("auto", n) else { break };
        let freed = guest_is_free(&guest, &step);
        let (said, after) = m.caller.held("auto");
        let adopted = m.learn(&views, &after);
        assert!(!said.contains("taking a FULL:"), "{step}: {said}");
        m.note(
            &step,
            "kill -9",
            &format!(
                "guest free after {} ms, then exit 0, INC, {adopted} finished points kept",
                freed.as_millis()
            ),
        );
        undone_in_guest(&guest, &step);
        m.check_clean(&mut guest.qmp(), &[dir.path(), &guest.path("")], &step);
        m.renew();
    }
    m.check_points();
    assert!(m.table.len() > 80, "only {} steps", m.table.len());
}

/// The numbers of the steps of an INC at which it is killed: all between the freeze and the thaw, and of the others
/// the first of each that follow each other. (A second disk's are like the first one's, and `crash` has them all.)
/// All with `FLEECEFS_STEPS_ALL=1`.
fn chosen(m: &mut Matrix) -> Vec<usize> {
    let dir = tempfile::tempdir().unwrap();
    let trace = dir.path().join("steps");
    let mut c = m.caller.command("inc");
    assert!(c.env("FLEECEFS_STEPS", &trace).output().unwrap().status.success());
    m.ignore_new();
    let steps = std::fs::read_to_string(trace).unwrap();
    let steps: Vec<&str> = steps.lines().map(|l| l.split_once(' ').expect("a number").1).collect();
    let at = |name: &str| steps.iter().position(|s| *s == name).expect("a guest that is frozen");
    let frozen = at("agent guest-fsfreeze-freeze")..=at("agent answered guest-fsfreeze-thaw");
    let all = std::env::var_os("FLEECEFS_STEPS_ALL").is_some();
    let mut seen = BTreeSet::new();
    let mut is_new = |i: usize| seen.insert(&steps[i.saturating_sub(1)..=i]);
    (0..steps.len()).filter(|i| is_new(*i) || all || frozen.contains(i)).map(|i| i + 1).collect()
}

/// Whatever was begun in the guest before a freeze point was ended after it, by whom ever.
fn undone_in_guest(guest: &Guest, step: &str) {
    let log = guest.shell("cat /tmp/log");
    let count = |line: &str| log.lines().filter(|l| *l == line).count();
    assert!(count("before") <= count("after"), "{step}: {log}");
    assert_eq!(log.lines().last(), Some("after"), "{step}: {log}");
}

/// Waits until the watchdog has let the guest go: it runs and is thawed.
fn guest_is_free(guest: &Guest, step: &str) -> Duration {
    let began = Instant::now();
    loop {
        let status = guest.qmp().execute("query-status", json!({}))["status"].clone();
        if status == "running" {
            break;
        }
        assert!(began.elapsed() < Duration::from_secs(20), "{step}: the guest is {status}");
        std::thread::sleep(Duration::from_millis(20));
    }
    while guest.agent("guest-fsfreeze-status") != "thawed" {
        assert!(began.elapsed() < Duration::from_secs(20), "{step}: the guest is frozen");
        std::thread::sleep(Duration::from_millis(50));
    }
    began.elapsed()
}
