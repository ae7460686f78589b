//! The crash matrix: kill -9 at every step of a backup, then one `backup --level auto`.
//!
//! After it: exit 0, all points right, the guest running and thawed, nothing of ours left in QEMU
//! or on disk but the bitmaps that the points name. `cargo test --test slow crash:: -- --nocapture` shows
//! the table of step, fault and outcome.
//!
//! A step is a command before it is sent and after its answer, or a change on disk. Commands that only ask, one
//! after the other, are one step: a kill at any of them leaves QEMU, guest and disk the same. With
//! `FLEECEFS_STEPS_ALL=1` each is two, for the complete walk.

use crate::support::backup::Caller;
use crate::support::killed::Matrix;
use crate::support::qemu::storage_daemon::Daemon;
use crate::support::tools::{have, run};

const TOOLS: &[&str] = &["qemu-storage-daemon", "qemu-img", "qemu-io", "/dev/fuse"];

fn small_daemon() -> Daemon {
    let dir = tempfile::tempdir().unwrap();
    for (name, format) in [("a", "qcow2"), ("b", "raw")] {
        let path = dir.path().join(format!("{name}.img"));
        run("qemu-img", &["create", "-q", "-f", format, path.to_str().unwrap(), "4M"]);
    }
    Daemon::start(dir, &[("a", "driver=qcow2"), ("b", "driver=raw")])
}

fn scribble(d: &Daemon, n: usize) {
    let byte = 1 + n % 250;
    for (i, disk) in ["a", "b"].iter().enumerate() {
        let at = ((n * 7 + i * 3) % 64) * 65536;
        let write = format!("write -P {byte} {at} 64k");
        let zero = format!("write -z {} 64k", ((n * 5 + i) % 64) * 65536);
        let drop = format!("discard {} 64k", ((n * 11 + i) % 64) * 65536);
        d.io(disk, &[&write, &zero, &drop]);
    }
}

/// What happens between the crash and the next backup, in turn.
enum Between {
    Nothing,
    Recover,
    JournalLost,
}

fn daemon_matrix(level: &str) {
    let d = small_daemon();
    let mut m = Matrix::new(Caller::of(&d), &["a.img", "b.img"]);
    scribble(&d, 0);
    let (_, views) = m.caller.held("full");
    m.learn(&Vec::new(), &views);
    for n in 1.. {
        scribble(&d, 2 * n);
        let (Some(step), views) = m.caller.crash(level, n) else { break };
        scribble(&d, 2 * n + 1);
        let between = match n % 3 {
            0 => Between::Nothing,
            1 => Between::Recover,
            _ => Between::JournalLost,
        };
        let how = match between {
            Between::Nothing => "then",
            Between::Recover => {
                m.caller.must_recover(&[]);
                "recover, then"
            }
            Between::JournalLost => {
                std::fs::remove_dir_all(&m.caller.state).unwrap();
                "journal lost, then"
            }
        };
        let (said, after) = m.caller.held("auto");
        let adopted = m.learn(&views, &after);
        let took = if said.contains("taking a FULL:") { "FULL" } else { "INC" };
        assert!(took == "INC", "{step}: {said}");
        m.note(&step, "kill -9", &format!("{how} exit 0, {took}, {adopted} finished points kept"));
        m.check_clean(&mut d.qmp(), &[d.dir.path()], &step);
        m.renew();
    }
    m.check_points();
    assert!(m.table.len() > 80, "only {} steps", m.table.len());
}

#[test]
fn killed_at_every_step_of_an_inc() {
    if have("killed_at_every_step_of_an_inc", TOOLS) {
        daemon_matrix("auto");
    }
}

#[test]
fn killed_at_every_step_of_a_full() {
    if have("killed_at_every_step_of_a_full", TOOLS) {
        daemon_matrix("full");
    }
}

/// The number of the last step of this name in a run that is not killed.
fn step_number(m: &mut Matrix, d: &Daemon, name: &str) -> usize {
    let hold = tempfile::tempdir().unwrap();
    let trace = hold.path().join("steps");
    scribble(d, 1);
    let out = m.caller.command("inc").env("FLEECEFS_STEPS", &trace).output().unwrap();
    assert!(out.status.success());
    m.ignore_new();
    let steps = std::fs::read_to_string(trace).unwrap();
    let line = steps.lines().rfind(|l| l.ends_with(name)).expect("there is such a step");
    line.split(' ').next().unwrap().parse().unwrap()
}

#[test]
fn killed_at_every_step_of_the_recovery() {
    let name = "killed_at_every_step_of_the_recovery";
    if !have(name, TOOLS) {
        return;
    }
    let d = small_daemon();
    let mut m = Matrix::new(Caller::of(&d), &["a.img", "b.img"]);
    scribble(&d, 0);
    let (_, views) = m.caller.held("full");
    m.learn(&Vec::new(), &views);
    for step in ["answer blockdev-reopen", "answer blockdev-backup"] {
        let crash_at = step_number(&mut m, &d, step);
        for n in 1.. {
            scribble(&d, 2 * n);
            let (killed, views) = m.caller.crash("inc", crash_at);
            assert!(killed.is_some(), "it dies there");
            let out =
                m.caller.recovery(&[]).env("FLEECEFS_CRASH_AT", n.to_string()).output().unwrap();
            let whole = out.status.success();
            assert!(whole || out.status.code().is_none(), "{out:?}");
            scribble(&d, 2 * n + 1);
            let (said, after) = m.caller.held("auto");
            assert!(!said.contains("taking a FULL:"), "{step}, {n}: {said}");
            let adopted = m.learn(&views, &after);
            m.note(
                &format!("{step}, then recover's {n}"),
                "kill -9",
                &format!("then exit 0, INC, {adopted} finished points kept"),
            );
            m.check_clean(&mut d.qmp(), &[d.dir.path()], step);
            if whole {
                break;
            }
        }
    }
    m.check_points();
}

/// The commands that a run sends, from its own log.
fn sent(said: &str) -> Vec<String> {
    let requests = said.lines().filter_map(|l| l.split_once("QMP > "));
    let name = |request: &str| {
        let request: serde_json::Value = serde_json::from_str(request).expect("a whole line");
        request["execute"].as_str().expect("a command").to_string()
    };
    requests.map(|(_, request)| name(request)).collect()
}

#[test]
fn what_changes_something_has_a_step_before_it_and_one_after() {
    let name = "what_changes_something_has_a_step_before_it_and_one_after";
    if !have(name, TOOLS) {
        return;
    }
    let d = small_daemon();
    let caller = Caller::of(&d);
    let trace = d.path("steps");
    let steps = |level: &str, more: &[(&str, &str)]| {
        scribble(&d, 1);
        let mut c = caller.command(level);
        c.env("FLEECEFS_LOG", "debug");
        let out = c.env("FLEECEFS_STEPS", &trace).envs(more.iter().copied()).output().unwrap();
        let said = String::from_utf8(out.stderr).unwrap();
        assert!(out.status.success(), "{said}");
        let steps = std::fs::read_to_string(&trace).unwrap();
        std::fs::remove_file(&trace).unwrap();
        let names = steps.lines().map(|l| l.split_once(' ').expect("a number").1.to_string());
        (names.collect::<Vec<String>>(), sent(&said))
    };
    for level in ["full", "inc"] {
        let (steps, sent) = steps(level, &[]);
        let asks = |c: &str| c.contains("query") || c == "qom-get" || c == "qom-list";
        let changes: Vec<&String> = sent.iter().filter(|c| !asks(c)).collect();
        let mut rest = steps.iter().filter(|s| s.starts_with("send ") || s.starts_with("answer "));
        for command in &changes {
            // One that follows right after its answer is met there.
            let mut next = || rest.find(|s| !asks(s)).map(String::as_str);
            assert_eq!(next(), Some(&*format!("send {command}")), "{steps:#?}");
            assert_eq!(next(), Some(&*format!("answer {command}")), "{steps:#?}");
        }
        assert_eq!(rest.find(|s| !asks(s)), None, "{steps:#?}");
        for command in
            ["blockdev-add", "blockdev-reopen", "blockdev-backup", "transaction", "job-dismiss"]
        {
            assert!(changes.iter().any(|c| *c == command), "{command}: {changes:?}");
        }
        // Of those that ask there is the first of each run of them, and no other.
        let run = steps.windows(2).find(|w| asks(&w[0]) && asks(&w[1]));
        assert_eq!(run, None, "{steps:#?}");
        assert!(steps.iter().any(|s| asks(s)), "{steps:#?}");
        println!("{level}: {} steps, {} commands", steps.len(), sent.len());
    }
    let (steps, sent) = steps("inc", &[("FLEECEFS_STEPS_ALL", "1")]);
    let of = |what: &str| steps.iter().filter(|s| s.starts_with(what)).count();
    println!("all: {} steps, {} commands", steps.len(), sent.len());
    assert!(of("send ") > 2 * of("send blockdev"), "{steps:#?}");
    assert_eq!(of("send "), of("answer "), "{steps:#?}");
}
