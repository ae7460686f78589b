//! What each run did is kept, whatever became of it, and whatever happens while it is written down.

use std::os::unix::net::UnixDatagram;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

use crate::support::backup::Caller;
use crate::support::checked::{code, daemon};
use crate::support::guard::Guard;
use crate::support::images::Chain;
use crate::support::qemu::two_disks;
use crate::support::tools::{have, is_root};

const TOOLS: &[&str] = &["qemu-img", "qemu-io"];
const DAEMON: &[&str] = &["qemu-storage-daemon", "qemu-img", "qemu-io"];

/// A backup directory with one disk of three points, and a state folder.
struct Setup {
    _dir: tempfile::TempDir,
    backups: PathBuf,
    state: PathBuf,
}

impl Setup {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().canonicalize().unwrap();
        let mut chain = Chain::new(&top.join("vm1"), "sda");
        for i in 1..4 {
            chain.point("", 1 << 20, &[format!("write -P {i} {} 64k", i * 65536)]);
        }
        chain.finish();
        Setup { _dir: dir, backups: top.join("vm1"), state: top.join("state") }
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
        command.args(words).env("FLEECEFS_STATE_DIR", &self.state);
        command
    }

    fn run(&self, words: &[&str]) -> Output {
        self.command(words).output().unwrap()
    }

    fn dir(&self) -> &str {
        self.backups.to_str().unwrap()
    }
}

/// What `history --json` prints: the runs, and how many lines cannot be read.
fn history(state: &Path, words: &[&str]) -> (Vec<Value>, u64) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
    command.args(["history", "--json", "--state-dir"]).arg(state).args(words);
    let out = command.output().unwrap();
    assert!(out.status.success(), "{out:?}");
    let all: Value = serde_json::from_slice(&out.stdout).unwrap();
    (all["runs"].as_array().unwrap().clone(), all["unreadable"].as_u64().unwrap())
}

/// Command and exit code of each.
fn codes(runs: &[Value]) -> Vec<(String, u64)> {
    let one = |r: &Value| (r["command"].as_str().unwrap().into(), r["exit_code"].as_u64().unwrap());
    runs.iter().map(one).collect()
}

#[test]
fn each_run_leaves_a_line_and_a_dry_run_none() {
    if !have("each_run_leaves_a_line_and_a_dry_run_none", TOOLS) {
        return;
    }
    let s = Setup::new();
    let dir = s.dir();
    let out = s.state.with_file_name("out.raw");
    let out = out.to_str().unwrap();
    for dry in [
        &["restore", "-n", dir, "sda/latest", out][..],
        &["prune", "-n", dir, "--keep-last", "1"],
        &["list", dir],
        &["history"],
    ] {
        assert!(s.run(dry).status.success(), "{dry:?}");
    }
    assert_eq!(history(&s.state, &[]), (vec![], 0));
    assert_eq!(s.run(&["verify", dir]).status.code(), Some(19));
    assert_eq!(s.run(&["verify", "--create", dir]).status.code(), Some(0));
    assert_eq!(s.run(&["restore", dir, "sda/latest", out]).status.code(), Some(0));
    assert_eq!(s.run(&["restore", dir, "sda/latest", out]).status.code(), Some(4));
    let until = ["consolidate", dir, "sda", "--until", "latest"];
    assert_eq!(s.run(&until).status.code(), Some(0));
    assert_eq!(s.run(&["prune", dir, "--keep-last", "1"]).status.code(), Some(0));
    assert_eq!(s.run(&["verify", "/nowhere"]).status.code(), Some(3));
    let (runs, _) = history(&s.state, &[]);
    let want = [
        ("verify", 19),
        ("verify", 0),
        ("restore", 0),
        ("restore", 4),
        ("consolidate", 0),
        ("prune", 0),
        ("verify", 3),
    ];
    let want = want.map(|(command, code)| (command.to_string(), code));
    assert_eq!(codes(&runs), want);
    // What it says of each.
    assert!(runs[..6].iter().all(|r| r["directory"] == dir), "{runs:#?}");
    assert_eq!(runs[0]["result"], "unproven");
    assert_eq!(runs[0]["disks"].as_array().unwrap().len(), 3);
    assert_eq!(runs[2]["disks"][0]["disk"], "sda");
    assert!(runs[3]["disks"][0]["error"].as_str().is_some_and(|e| e.contains("out.raw")));
    assert!(runs[3]["message"].as_str().unwrap().contains("out.raw"), "{:#}", runs[3]);
    assert!(runs.iter().all(|r| r["time"].as_str().unwrap().ends_with('Z')));
    // What is asked for.
    assert_eq!(history(&s.state, &["-n", "2"]).0, runs[5..]);
    assert_eq!(history(&s.state, &["--failed"]).0.len(), 3);
    assert_eq!(history(&s.state, &[dir]).0, runs[..6]);
    assert!(history(&s.state, &[&format!("{dir}/sda")]).0.is_empty());
    assert_eq!(history(&s.state, &["--since", "1d"]).0, runs);
    assert!(history(&s.state, &["--since", "2099-01-01"]).0.is_empty());
    // For people: a line each, and why it failed.
    let table = s.run(&["history", "--failed"]).stdout;
    let table = String::from_utf8(table).unwrap();
    assert!(table.contains("unproven (19)") && table.contains("not-found (3)"), "{table}");
    assert!(table.contains("/nowhere: cannot read the backup directory"), "{table}");
}

#[test]
fn a_backup_tells_what_it_copied_and_what_failed() {
    let test = "a_backup_tells_what_it_copied_and_what_failed";
    if !have(test, DAEMON) || !is_root(test) {
        return;
    }
    let small = tempfile::tempdir().unwrap();
    let _mount = Guard::tmpfs("13M", small.path());
    let d = daemon(&[]);
    let elsewhere = d.dir.path().to_str().unwrap();
    let mut caller = Caller::of(&d).with(&["--fleece-dir", elsewhere]);
    caller.target = small.path().canonicalize().unwrap().join("T");
    caller.must("full");
    d.io("a", &["write -P 5 0 64k"]);
    caller.must("inc");
    d.io("a", &["write -P 6 0 8M"]);
    let (exit, said) = code(&caller, "inc");
    assert_eq!(exit, Some(7), "{said}");
    let (runs, unreadable) = history(&caller.state, &[]);
    let want = [0, 0, 7].map(|code| ("backup".to_string(), code));
    assert_eq!((codes(&runs).as_slice(), unreadable), (want.as_slice(), 0), "{runs:#?}");
    let target = caller.target.to_str().unwrap();
    assert!(runs.iter().all(|r| r["directory"] == target), "{runs:#?}");
    let qmp = format!("unix:{}", caller.qmp.canonicalize().unwrap().display());
    assert!(runs.iter().all(|r| r["qmp"] == *qmp), "{qmp}: {runs:#?}");
    let ids: Vec<_> = runs.iter().filter_map(|r| r["run"].as_str()).collect();
    assert!(ids.len() >= 2 && ids[0] != ids[1], "{ids:?}");
    let inc = &runs[1]["disks"][0];
    assert!(inc["level"] == "inc" && inc["point"].as_str().unwrap().starts_with("INC-"), "{inc:#}");
    assert!(inc["dirty"].as_u64().unwrap() >= 65536, "{inc:#}");
    assert!(inc["copied"].as_u64().unwrap() >= 65536, "{inc:#}");
    assert!(inc["read"].as_u64().unwrap() >= 65536, "{inc:#}");
    assert_eq!(inc["consistency"], "crash");
    assert_eq!((&runs[2]["result"], &runs[2]["exit_code"]), (&"no-space".into(), &7.into()));
    let why = runs[2]["disks"][0]["error"].as_str().unwrap();
    assert!(why.contains("needs about"), "{:#}", runs[2]);
}

/// A limit on the size of files ends a process in the middle of its write: half of the line is there.
#[test]
fn a_run_that_is_killed_while_it_appends_takes_no_other_line_with_it() {
    if !have("a_run_that_is_killed_while_it_appends_takes_no_other_line_with_it", TOOLS) {
        return;
    }
    let s = Setup::new();
    let dir = s.dir();
    let restore = |to: &str| {
        let to = s.state.with_file_name(to);
        assert!(s.run(&["restore", dir, "sda/latest", to.to_str().unwrap()]).status.success());
    };
    for i in 0..8 {
        restore(&format!("out-{i}.qcow2"));
    }
    let file = s.state.join("history/runs.jsonl");
    let len = std::fs::metadata(&file).unwrap().len();
    for part in [1, 100, 200] {
        let before = history(&s.state, &[]);
        let limit = std::fs::metadata(&file).unwrap().len() + part;
        let limit = libc::rlimit { rlim_cur: limit, rlim_max: limit };
        let mut command = s.command(&["verify", "--quick", dir]);
        // SAFETY: a system call between fork and exec, with a value of its own.
        unsafe {
            command.pre_exec(move || match libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            });
        }
        let out = command.output().unwrap();
        assert_eq!(out.status.signal(), Some(libc::SIGXFSZ), "{out:?}");
        assert_eq!(std::fs::metadata(&file).unwrap().len(), limit.rlim_max);
        let torn = history(&s.state, &[]);
        assert_eq!((&torn.0, torn.1), (&before.0, before.1 + 1));
        restore(&format!("after-{part}.qcow2"));
        let after = history(&s.state, &[]);
        assert_eq!((after.0.len(), after.1), (before.0.len() + 1, before.1 + 1));
        assert_eq!(after.0[..before.0.len()], before.0);
    }
    assert!(len > 1000, "more than what else is written: {len}");
}

/// A history that cannot be written is a warning, and the backup is made.
#[test]
fn a_backup_whose_line_cannot_be_written_is_made() {
    let test = "a_backup_whose_line_cannot_be_written_is_made";
    if !have(test, DAEMON) {
        return;
    }
    let d = daemon(&[]);
    let caller = Caller::of(&d);
    std::fs::create_dir_all(&caller.state).unwrap();
    std::fs::set_permissions(&caller.state, std::os::unix::fs::PermissionsExt::from_mode(0o700))
        .unwrap();
    std::fs::write(caller.state.join("history"), "").unwrap();
    let said = caller.must("full");
    assert!(said.contains("warning: this run was not recorded in the history"), "{said}");
    assert!(!crate::support::backup::images(&caller.target.join("a.img")).is_empty());
}

/// The fields of a message of the journal.
fn fields(message: &[u8]) -> Vec<(String, String)> {
    let text = std::str::from_utf8(message).unwrap();
    let pairs = text.lines().map(|l| l.split_once('=').unwrap_or_else(|| panic!("{text:?}")));
    pairs.map(|(key, value)| (key.to_string(), value.to_string())).collect()
}

#[test]
fn the_journal_gets_vm_run_disk_and_point_as_fields() {
    let test = "the_journal_gets_vm_run_disk_and_point_as_fields";
    if !have(test, two_disks::TOOLS) {
        return;
    }
    let m = two_disks::Machine::launch(&["-name", "vm one"]);
    let caller = m.caller().with(&["--syslog"]);
    let socket = m.path("journal");
    let journal = UnixDatagram::bind(&socket).unwrap();
    let out = caller.command("full").env("FLEECEFS_JOURNAL", &socket).output().unwrap();
    assert!(out.status.success(), "{out:?}");
    journal.set_nonblocking(true).unwrap();
    let mut messages = Vec::new();
    let mut bytes = [0; 65536];
    while let Ok(len) = journal.recv(&mut bytes) {
        messages.push(fields(&bytes[..len]));
    }
    let of = |message: &[(String, String)], key: &str| {
        message.iter().find(|(k, _)| k == key).map(|(_, value)| value.clone())
    };
    let points: Vec<_> = messages.iter().filter(|m| of(m, "POINT").is_some()).collect();
    assert_eq!(points.len(), 2, "{messages:#?}");
    let run = history(&caller.state, &[]).0[0]["run"].as_str().unwrap().to_string();
    for point in points {
        assert_eq!((of(point, "VM"), of(point, "RUN")), (Some("vm one".into()), Some(run.clone())));
        assert!(of(point, "DISK").is_some() && of(point, "POINT").unwrap().starts_with("FULL-"));
        assert_eq!(of(point, "PRIORITY").unwrap(), libc::LOG_INFO.to_string());
        assert!(of(point, "MESSAGE").unwrap().contains(&of(point, "POINT").unwrap()), "{point:?}");
    }
    // What is said of a disk before it is copied is its, too.
    let planned = messages.iter().filter(|m| of(m, "DISK").is_some() && of(m, "POINT").is_none());
    assert!(planned.count() >= 2, "{messages:#?}");
}
