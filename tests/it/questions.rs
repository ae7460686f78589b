//! How much a backup asks of QEMU: each question is answered in the main loop that the guest's devices
//! wait for, and a run of a disk to which little was written costs little else.

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::{Arc, Mutex};

use crate::support::backup::Caller;
use crate::support::qemu::proxy::{self, Lies};
use crate::support::qemu::two_disks::Machine;
use serde_json::Value;

/// How often each command may be sent for one disk, but for the looks while something is waited for,
/// which are as many as that takes. What is not named here may be sent once. (A QEMU below 10.0 has
/// another node above the frozen view, and is asked for jobs before the guest is stopped.)
const MOST: &[(&str, usize)] = &[
    // No migration: before each change that one could make harmful, and before the point counts.
    ("query-status", 15),
    ("query-migrate", 12),
    // Before anything is inserted, at the moment, when it is over, and before the job; then for
    // planning, for taking down, and for what earlier runs have left.
    ("x-debug-query-block-graph", 11),
    ("query-jobs", 11),
    ("query-block", 4),
    ("query-named-block-nodes", 5),
    ("query-block-exports", 3),
    ("query-fdsets", 3),
    // What the VM is, for the manifest: the machine and its processor have five properties, each disk six; all
    // are asked at once. Before, to find the disks' points, the serial number of each. The others are for the filter.
    ("qom-get", 5 + 2 * 6 + 2 + 3),
    ("qom-list", 2),
    ("qom-set", 2),
    ("add-fd", 6),
    ("remove-fd", 3),
    ("blockdev-add", 8),
    ("blockdev-del", 8),
    ("transaction", 2),
    ("query-qmp-schema", 0),
    ("block-dirty-bitmap-remove", 2),
];

/// Who hears what is asked.
struct Heard(Arc<Mutex<Vec<String>>>);

impl Lies for Heard {
    fn asked(&self, request: &Value, _passed: &[File]) -> Option<Value> {
        self.0.lock().unwrap().push(request["execute"].as_str().unwrap().to_string());
        None
    }
}

/// What is sent by how often, without the looks whose number depends on time.
fn counted(heard: &[String]) -> BTreeMap<&str, usize> {
    let at = |from: usize, name: &str| {
        from + heard[from..].iter().position(|c| c == name).expect("it is sent")
    };
    let job = at(0, "blockdev-backup");
    let ended = at(job, "blockdev-del");
    let closed = at(ended, "blockdev-reopen");
    let mut counts = BTreeMap::new();
    let mut last = "";
    for (n, name) in heard.iter().enumerate() {
        // For the job, the sync of the image, and the end of an export.
        let migration = ["query-status", "query-migrate"].contains(&name.as_str());
        let waits = (job + 1..ended).contains(&n)
            || migration && (ended..closed).contains(&n)
            || name == "query-block-exports" && last == name;
        last = name;
        if !waits {
            *counts.entry(name.as_str()).or_default() += 1;
        }
    }
    counts
}

#[test]
fn a_run_asks_little_and_nothing_twice() {
    let Some(mut m) = Machine::start("a_run_asks_little_and_nothing_twice") else { return };
    let heard = Arc::default();
    let qmp = m.path("heard.sock");
    proxy::listen(&qmp, &m.path("qmp.sock"), Heard(Arc::clone(&heard)));
    let caller = Caller { qmp, ..m.caller() }.with(&["--include", "o"]);
    for level in ["full", "full", "inc"] {
        m.write(1, 1 << 20, 1 << 16);
        heard.lock().unwrap().clear();
        let out = caller.command(level).env_remove("FLEECEFS_WALK").output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        let heard = heard.lock().unwrap().clone();
        let counts = counted(&heard);
        println!("{level}: {} commands, {counts:?}", heard.len());
        for (name, count) in &counts {
            let most = MOST.iter().find(|(n, _)| n == name).map_or(1, |(_, most)| *most);
            assert!(*count <= most, "{level}: {name} is sent {count} times: {heard:?}");
        }
    }
}
