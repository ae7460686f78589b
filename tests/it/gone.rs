//! Disks that their VM has no more: their points may be the only copy of what was on them.

use std::process::Command;

use serde_json::Value;

use crate::support::backup::{Caller, images};
use crate::support::qemu::two_disks::{Machine, TOOLS};
use crate::support::tools::have;

/// A command on the backups of `caller`, with its JSON.
fn asked(caller: &Caller, command: &str, more: &[&str]) -> Value {
    let mut c = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
    c.args([command, "--json", "--state-dir"]).arg(&caller.state).arg(&caller.target).args(more);
    let out = c.output().unwrap();
    serde_json::from_slice(&out.stdout)
        .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&out.stderr)))
}

/// What `prune` says of a disk, and how many points it would keep.
fn plan(caller: &Caller, disk: &str, more: &[&str]) -> (Value, usize) {
    let all = asked(caller, "prune", &[&["-n", "--keep-last=1"], more].concat());
    let mut disks = all["disks"].as_array().unwrap().iter();
    let disk = disks.find(|d| d["disk"] == disk).unwrap_or_else(|| panic!("no {disk}: {all:#}"));
    let points = disk["points"].as_array().unwrap().iter();
    let kept = points.filter(|p| !p["keep"].as_array().unwrap().is_empty()).count();
    (disk["gone"]["what"].clone(), kept)
}

#[test]
fn a_disk_that_its_vm_lost_is_told_and_has_a_rule_of_its_own() {
    let test = "a_disk_that_its_vm_lost_is_told_and_has_a_rule_of_its_own";
    if !have(test, TOOLS) {
        return;
    }
    let mut m = Machine::launch(&["-name", "web"]);
    let caller = m.caller();
    caller.must("full");
    caller.must("full");
    // Left out is not gone; the last run with all disks stays.
    caller.with(&["--exclude", "o"]).must("full");
    assert_eq!(plan(&caller, "o.qcow2", &["--keep-gone=1"]), (Value::Null, 1));
    m.off();
    m.on_with(false);
    caller.must("full");
    caller.must("full");
    let (disk, here) = ("o.qcow2", "a.qcow2");
    assert_eq!(plan(&caller, disk, &[]), ("disk".into(), 2));
    assert_eq!(plan(&caller, disk, &["--keep-gone=90d"]), ("disk".into(), 2));
    assert_eq!(plan(&caller, disk, &["--keep-gone=1"]), ("disk".into(), 1));
    // It is gone for two runs, each of which has a later second in its name.
    assert_eq!(plan(&caller, disk, &["--keep-gone=1s"]), ("disk".into(), 1));
    assert_eq!(plan(&caller, here, &[]), (Value::Null, 1));
    // Its age is no trouble, and it is shown.
    let health = asked(&caller, "health", &["--max-age=0s"]);
    let disks = health["directories"][0]["disks"].as_array().unwrap();
    let lost = disks.iter().find(|d| d["disk"] == disk).unwrap();
    assert_eq!(
        (&lost["gone"]["what"], &lost["status"]),
        (&"disk".into(), &"ok".into()),
        "{lost:#}"
    );
    assert!(disks.iter().find(|d| d["disk"] == here).unwrap()["gone"].is_null());
    let mut shown = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
    shown.args(["health", "--state-dir"]).arg(&caller.state).arg(&caller.target);
    let shown = String::from_utf8(shown.output().unwrap().stdout).unwrap();
    assert!(shown.contains("newest backup knows nothing of this disk"), "{shown}");
    // What is planned is done.
    let mut prune = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
    prune.args(["prune", "--keep-last=1", "--state-dir"]).arg(&caller.state).arg(&caller.target);
    let out = prune.output().unwrap();
    let said = String::from_utf8(out.stdout).unwrap();
    assert!(out.status.success() && said.contains("gone   o.qcow2"), "{said}");
    let left = |disk: &str| images(&caller.target.join(disk)).len();
    assert_eq!((left(disk), left(here)), (2, 1), "{said}");
    // A rule for what is gone alone is a mistake, not the end of all else.
    let mut alone = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
    alone.args(["prune", "--keep-gone=1"]).arg(&caller.target);
    assert_eq!(alone.output().unwrap().status.code(), Some(2));
}
