//! What another program does between our last look and our command: a device is never put on a disk
//! that is not its own, QEMU does not end, and a point is right or absent.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::support::backup::{Caller, PausedBackup, images, leftovers, newest, ours_in_qemu, same};
use crate::support::guest::Qmp;
use crate::support::mount::Mount;
use crate::support::qemu::proxy::{self, Lies, refusal};
use crate::support::qemu::two_disks::Machine;
use crate::support::tools::have;
use serde_json::{Value, json};

const TOOLS: &[&str] = &["qemu-system-x86_64", "qemu-img", "qemu-io", "/dev/fuse"];

/// When another program acts: when we ask, or when QEMU has answered.
type When = fn(command: &str, arguments: &Value) -> bool;

/// A program at another of QEMU's sockets that does something once, as soon as the time has come.
struct Other {
    qmp: Mutex<Qmp>,
    steps: Mutex<Vec<Step>>,
}

struct Step {
    asked: bool,
    when: When,
    act: Box<dyn Fn(&mut Qmp) + Send>,
}

impl Other {
    fn now(&self, asked: bool, command: &str, arguments: &Value) {
        let mut steps = self.steps.lock().unwrap();
        if steps.first().is_some_and(|s| s.asked == asked && (s.when)(command, arguments)) {
            (steps.remove(0).act)(&mut self.qmp.lock().unwrap());
        }
    }
}

impl Lies for Other {
    fn asked(&self, request: &Value, _passed: &[File]) -> Option<Value> {
        self.now(true, request["execute"].as_str().unwrap(), &request["arguments"]);
        None
    }

    fn answered(&self, command: &str, _answer: &mut Value) {
        self.now(false, command, &Value::Null);
    }
}

/// What to call a backup with beside a program that does these steps.
fn beside(m: &Machine, steps: Vec<Step>) -> Caller {
    let between = m.path("between.sock");
    let qmp = Mutex::new(Qmp::connect(&m.path("other.sock")));
    proxy::listen(&between, &m.path("qmp.sock"), Other { qmp, steps: Mutex::new(steps) });
    Caller { qmp: between, ..m.caller() }
}

fn put_on(disk: usize, node: &'static str) -> Box<dyn Fn(&mut Qmp) + Send> {
    let path = format!("/machine/peripheral/v{disk}/virtio-backend");
    let set = json!({"path": path, "property": "drive", "value": node});
    Box::new(move |qmp| drop(qmp.execute("qom-set", set.clone())))
}

/// Does it when all has been taken off a disk but the filter.
fn unlocked(disk: usize, act: Box<dyn Fn(&mut Qmp) + Send>) -> Vec<Step> {
    let when: When = match disk {
        0 => |c, a| c == "blockdev-del" && a["node-name"].as_str().unwrap().ends_with("-l0"),
        _ => |c, a| c == "blockdev-del" && a["node-name"].as_str().unwrap().ends_with("-l1"),
    };
    let gone: When = |command, _| command == "blockdev-del";
    vec![Step { asked: true, when, act: Box::new(|_| ()) }, Step { asked: false, when: gone, act }]
}

fn code(caller: &Caller) -> (Option<i32>, String) {
    let out = caller.run("full");
    (out.status.code(), String::from_utf8_lossy(&out.stderr).into_owned())
}

fn nothing_of_ours(m: &mut Machine, said: &str) {
    assert_eq!(ours_in_qemu(&mut m.qmp), Vec::<String>::new(), "{said}");
    assert_eq!(leftovers(m.folder()), Vec::<PathBuf>::new(), "{said}");
}

/// Both points are there and right, whatever has become of the devices.
fn both(m: &Machine, frozen: &[Vec<u8>; 2]) {
    let target = m.caller().target;
    let mount = Mount::new(&target);
    for (disk, bytes) in ["a.qcow2", "o.qcow2"].iter().zip(frozen) {
        same(&mount, disk, &newest(&target, disk), bytes);
    }
}

#[test]
fn a_device_that_is_back_already_is_left_alone() {
    let name = "a_device_that_is_back_already_is_left_alone";
    if !have(name, TOOLS) {
        return;
    }
    for (disk, node) in [(0, "a"), (1, "o")] {
        let mut m = Machine::begin();
        let frozen = m.expect.clone();
        let caller = beside(&m, unlocked(disk, put_on(disk, node)));
        let (code, said) = code(&caller);
        assert_eq!(code, Some(0), "{said}");
        both(&m, &frozen);
        nothing_of_ours(&mut m, &said);
        m.scribble();
        m.end(None);
    }
}

#[test]
fn a_device_that_got_another_disk_keeps_it() {
    let name = "a_device_that_got_another_disk_keeps_it";
    if !have(name, TOOLS) {
        return;
    }
    for disk in [0, 1] {
        let mut m = Machine::begin();
        let frozen = m.expect.clone();
        let caller = beside(&m, unlocked(disk, put_on(disk, "b")));
        let (code, said) = code(&caller);
        assert_eq!(code, Some(0), "{said}");
        assert_eq!(m.inserted(disk).unwrap()["node-name"], "b");
        both(&m, &frozen);
        nothing_of_ours(&mut m, &said);
    }
}

#[test]
fn a_device_that_got_another_disk_before_the_filter_keeps_it() {
    let name = "a_device_that_got_another_disk_before_the_filter_keeps_it";
    if !have(name, TOOLS) {
        return;
    }
    for disk in [0, 1] {
        let mut m = Machine::begin();
        let stopped: When = |command, _| command == "stop";
        let looked: When = |command, _| command == "x-debug-query-block-graph";
        let steps = vec![
            Step { asked: false, when: stopped, act: Box::new(|_| ()) },
            Step { asked: false, when: looked, act: put_on(disk, "b") },
        ];
        let (code, said) = code(&beside(&m, steps));
        assert_eq!(code, Some(16), "{said}");
        assert!(said.contains("has changed the device"), "{said}");
        assert_eq!(m.inserted(disk).unwrap()["node-name"], "b");
        let mine = ["a.qcow2", "o.qcow2"][disk];
        assert_eq!(images(&m.caller().target.join(mine)), Vec::<PathBuf>::new());
        nothing_of_ours(&mut m, &said);
    }
}

#[test]
fn an_overlay_added_at_the_end_costs_no_finished_point() {
    let name = "an_overlay_added_at_the_end_costs_no_finished_point";
    if !have(name, TOOLS) {
        return;
    }
    let asks: When = |c, a| c == "qom-get" && a["path"].as_str().unwrap().contains("v0");
    for last in [false, true] {
        let mut m = Machine::begin();
        let frozen = m.expect.clone();
        let file = m.text("ov.qcow2");
        let act = Box::new(move |qmp: &mut Qmp| {
            qmp.execute(
                "blockdev-snapshot-sync",
                json!({"device": "dr0", "snapshot-file": file, "snapshot-node-name": "ov"}),
            );
        });
        let mut steps = unlocked(0, act);
        if last && let Some(step) = steps.last_mut() {
            // After the graph was asked for.
            (step.asked, step.when) = (true, asks);
        }
        let (code, said) = code(&beside(&m, steps));
        assert_eq!(code, Some(0), "{said}");
        assert_eq!(m.inserted(0).unwrap()["node-name"], "ov");
        both(&m, &frozen);
        nothing_of_ours(&mut m, &said);
        m.scribble();
        m.end(None);
    }
}

/// What the guest writes while the filter is away is not in the fleece.
#[test]
fn a_filter_that_was_away_before_the_view_was_there_makes_no_point() {
    let name = "a_filter_that_was_away_before_the_view_was_there_makes_no_point";
    if !have(name, TOOLS) {
        return;
    }
    let mut m = Machine::begin();
    let byte = 251;
    let back = move |qmp: &mut Qmp| {
        let path = "/machine/peripheral/v0/virtio-backend";
        let line = format!("qemu-io -d {path} \"write -P {byte} 1M 64k\"");
        qmp.execute("human-monitor-command", json!({"command-line": line}));
        let nodes = qmp.execute("query-named-block-nodes", json!({"flat": true}));
        let names = nodes.as_array().unwrap().iter().map(|n| n["node-name"].as_str().unwrap());
        let ours = |n: &&str| n.starts_with("fleecefs-") && n.ends_with("-c0");
        if let Some(filter) = names.into_iter().find(ours) {
            let set = json!({"path": path, "property": "drive", "value": filter});
            let _ = qmp.try_execute("qom-set", set);
        }
    };
    let plugged: When = |command, _| command == "qom-set";
    let goes_on: When = |command, _| command == "cont";
    let steps = vec![
        Step { asked: false, when: plugged, act: put_on(0, "a") },
        Step { asked: false, when: goes_on, act: Box::new(back) },
    ];
    let (code, said) = code(&beside(&m, steps));
    m.expect[0][1 << 20..][..65536].fill(byte);
    assert_eq!(code, Some(16), "{said}");
    assert_eq!(images(&m.caller().target.join("a.qcow2")), Vec::<PathBuf>::new());
    nothing_of_ours(&mut m, &said);
    m.scribble();
    m.end(None);
}

/// Keeps the first two scratch nodes that are to be removed.
#[derive(Default)]
struct Keeps(AtomicUsize);

impl Lies for Keeps {
    fn asked(&self, request: &Value, _passed: &[File]) -> Option<Value> {
        let node = request["arguments"]["node-name"].as_str().unwrap_or_default();
        let scratch = request["execute"] == "blockdev-del" && node.contains("-z");
        (scratch && self.0.fetch_add(1, Ordering::SeqCst) < 2).then(|| refusal("it is in use"))
    }
}

#[test]
fn a_scratch_node_that_stays_for_a_while_costs_no_point() {
    let name = "a_scratch_node_that_stays_for_a_while_costs_no_point";
    if !have(name, TOOLS) {
        return;
    }
    let mut m = Machine::begin();
    let between = m.path("between.sock");
    proxy::listen(&between, &m.path("qmp.sock"), Keeps::default());
    let (code, said) = code(&Caller { qmp: between, ..m.caller() });
    assert_eq!(code, Some(0), "{said}");
    both(&m, &m.expect);
    nothing_of_ours(&mut m, &said);
}

#[test]
fn a_filter_that_has_to_stay_copies_no_more() {
    let name = "a_filter_that_has_to_stay_copies_no_more";
    if !have(name, TOOLS) {
        return;
    }
    let mut m = Machine::begin();
    let held = PausedBackup::start(&m.caller(), "full");
    let nodes = |m: &mut Machine| {
        let list = m.do_it("query-named-block-nodes", json!({"flat": true}));
        list.as_array().unwrap().clone()
    };
    let ours = |n: &Value, end: &str| n["node-name"].as_str().unwrap().ends_with(end);
    let filter = nodes(&mut m).into_iter().find(|n| ours(n, "-c0")).unwrap()["node-name"].clone();
    m.do_it(
        "blockdev-add",
        json!({"driver": "raw", "node-name": "theirs", "file": filter, "read-only": true}),
    );
    let (code, said) = held.end();
    assert_eq!(code, Some(6), "{said}");
    assert!(said.contains("theirs") && said.contains("fleecefs recover"), "{said}");
    // The other disk's point is told of.
    assert!(said.contains("o: FULL ") && said.contains("copied in"), "{said}");
    // More than once, and where it has copied before.
    m.scribble();
    m.write(0, 0, 8 << 20);
    let left = nodes(&mut m);
    assert!(left.iter().any(|n| ours(n, "-c0")), "the filter is there");
    let fleece = left.iter().find(|n| ours(n, "-f0")).unwrap();
    assert_eq!(fleece["image"]["actual-size"].as_u64().unwrap_or(0), 0, "{fleece}");
    let out = m.caller().recovery(&[]).output().unwrap();
    assert_eq!(out.status.code(), Some(6), "{}", String::from_utf8_lossy(&out.stderr));
    m.do_it("blockdev-del", json!({"node-name": "theirs"}));
    let said = m.caller().must_recover(&[]);
    nothing_of_ours(&mut m, &said);
    m.scribble();
    m.end(None);
}
