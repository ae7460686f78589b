//! Recovery of a run whose target hangs, as an NFS mount does whose server is gone; and whose run it is.

use std::io::Write;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use crate::support::backup::{self, Caller, leftovers};
use crate::support::guard::{Guard, UNMOUNT, tied};
use crate::support::guest::Qmp;
use crate::support::qemu::one_disk::{Vm, image};
use crate::support::shut_off::*;
use crate::support::tools::{have, is_root, run};
use serde_json::json;

const TOOLS: &[&str] = &["qemu-system-x86_64", "qemu-storage-daemon", "qemu-img", "qemu-io"];

/// A file system at a target's path whose server has stopped. The target is beside it.
struct Hung {
    server: Child,
    _unmount: Guard,
}

impl Hung {
    fn at(target: &Path) -> Self {
        std::fs::rename(target, target.with_extension("away")).unwrap();
        let empty = target.with_extension("empty");
        std::fs::create_dir_all(&empty).unwrap();
        std::fs::create_dir(target).unwrap();
        let mut c = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
        c.args(["mount", "--foreground"]).arg(&empty).arg(target).stdin(Stdio::null());
        let unmount = Guard::of(UNMOUNT, &[target]);
        let server = tied(&mut c).spawn().unwrap();
        let end = Instant::now() + Duration::from_secs(60);
        while !target.join(".fleecefs/status.json").exists() {
            assert!(Instant::now() < end, "it is not mounted");
            std::thread::sleep(Duration::from_millis(20));
        }
        // The process that serves it for root is a child of the one that was started.
        let pid = server.id();
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        for child in children.split_whitespace() {
            // SAFETY: a signal to a process that its parent, our child, waits for.
            unsafe { libc::kill(child.parse().unwrap(), libc::SIGSTOP) };
        }
        assert!(!children.trim().is_empty(), "nobody serves it");
        Hung { server, _unmount: unmount }
    }

    /// The target is back.
    fn end(mut self, target: &Path) {
        run("umount", &["-l", s(target)]);
        self.server.kill().unwrap();
        self.server.wait().unwrap();
        std::fs::remove_dir(target).unwrap();
        std::fs::rename(target.with_extension("away"), target).unwrap();
    }
}

/// Runs `fleecefs`, which has to end.
fn ends(caller: &Caller, words: &[&str]) -> Output {
    let mut c = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
    c.args(words).arg("--state-dir").arg(&caller.state).env_remove("FLEECEFS_STATE_DIR");
    c.env("FLEECEFS_ANSWER_TIMEOUT", "2").stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = c.spawn().unwrap();
    let end = Instant::now() + Duration::from_secs(120);
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > end {
            child.kill().unwrap();
            panic!("{words:?} hangs");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    child.wait_with_output().unwrap()
}

#[test]
fn the_guest_is_helped_first_and_a_target_that_hangs_is_left_for_later() {
    let name = "the_guest_is_helped_first_and_a_target_that_hangs_is_left_for_later";
    if !have(name, &[TOOLS, &["/dev/fuse"]].concat()) || !is_root(name) {
        return;
    }
    let d = tempfile::tempdir().unwrap();
    let file = image(&d.path().join("vm/data.qcow2"));
    let vm = Vm::start(d.path(), &file, &UUID);
    let caller = vm.caller.clone();
    caller.must("full");
    kill(caller.command("inc"), &caller.target);
    // As if it had died in its moment, and its watchdog too.
    let ask = |command: &str| Qmp::connect(&caller.qmp).execute(command, json!({}));
    ask("stop");
    let journals = std::fs::read_dir(&caller.state).unwrap().map(|e| e.unwrap().path());
    let mut journals = journals.filter(|p| p.extension().is_some_and(|e| e == "journal"));
    let journal = journals.next().unwrap();
    let mut journal = std::fs::File::options().append(true).open(journal).unwrap();
    writeln!(journal, "\"stop\"").unwrap();

    let hung = Hung::at(&caller.target);
    let recover = ["recover", "--qmp", s(&caller.qmp)];
    refused(&ends(&caller, &recover), 3, "the guest was still stopped: it runs again");
    assert_eq!(ask("query-status")["status"], "running");
    refused(&ends(&caller, &recover), 3, "postponed: ");
    refused(&ends(&caller, &recover), 3, "its file system does not answer within 2 s");
    for words in [&["recover"][..], &["info", "status"], &["cancel"]] {
        let words = [words, &["--target", s(&caller.target)]].concat();
        refused(&ends(&caller, &words), 1, "its file system does not answer within 2 s");
    }
    hung.end(&caller.target);
    let said = says(&caller, &recover);
    assert!(said.contains("was not complete: removed"), "{said}");
    caller.must("inc");
    assert_eq!(backup::level(&caller, "data.qcow2"), "INC");
    vm.quit();
    verified(&caller.target);
    assert!(leftovers(d.path()).is_empty());
}

#[test]
fn a_target_that_hangs_fails_its_vm_and_no_other_of_a_night() {
    let name = "a_target_that_hangs_fails_its_vm_and_no_other_of_a_night";
    if !have(name, &[TOOLS, &["/dev/fuse"]].concat()) || !is_root(name) {
        return;
    }
    let d = tempfile::tempdir().unwrap();
    let file = image(&d.path().join("vm/data.qcow2"));
    let vm = Vm::start(d.path(), &file, &UUID);
    let caller = vm.caller.clone();
    let (dead, good) = (d.path().join("dead"), d.path().join("good"));
    std::fs::create_dir(&dead).unwrap();
    let config = d.path().join("fleecefs.toml");
    // The one that hangs is the first of them.
    let text = format!(
        "[vms.a]\nqmp = \"{}/a.sock\"\ntarget = \"{}/t\"\nkeep_last = 1\n[vms.b]\nqmp = \"{}\"\ntarget = \"{}\"\n",
        s(d.path()),
        s(&dead),
        s(&caller.qmp),
        s(&good)
    );
    std::fs::write(&config, text).unwrap();
    let hung = Hung::at(&dead);
    for more in [&["--dry-run"][..], &["--parallel", "1"], &[]] {
        let words = [&["backup", "--all", "--json", "--config-file", s(&config)], more].concat();
        let out = ends(&caller, &words);
        refused(&out, 16, "failed: 1 of 2 VMs: a");
        let printed: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
        let (a, b) = (&printed["vms"][0], &printed["vms"][1]);
        let why = a["failures"][0]["message"].as_str().unwrap();
        assert!(why.contains("its file system does not answer within 2 s"), "{why}");
        assert!(!why.contains("recover"), "{why}");
        assert_eq!((&b["result"], b["points"].as_array().unwrap().len()), (&json!("ok"), 1), "{b}");
    }
    assert_eq!(backup::images(&good.join("data.qcow2")).len(), 2);
    hung.end(&dead);
    vm.quit();
}

/// Images and target are another user's.
#[test]
fn a_run_as_owner_is_shown_and_recovered_as_owner() {
    const OWNER: u32 = 4_000_000;
    let name = "a_run_as_owner_is_shown_and_recovered_as_owner";
    if !have(name, TOOLS) || !is_root(name) {
        return;
    }
    let d = tempfile::tempdir().unwrap();
    std::fs::set_permissions(d.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let home = d.path().join("home");
    let file = image(&home.join("data.qcow2"));
    let mut caller = caller(d.path());
    caller.target = home.join("T");
    std::fs::create_dir(&caller.target).unwrap();
    for path in [&home, &file, &caller.target] {
        chown(path, Some(OWNER), Some(OWNER)).unwrap();
    }
    let as_owner = ["--as-owner"];
    let must = |level: &str| {
        let out = offline(&caller, level, &[s(&file)], &as_owner);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    };
    must("full");
    let target = ["--as-owner", "--target", s(&caller.target)];
    let status = [&["info", "status"][..], &target].concat();
    assert!(says(&caller, &status).contains("no backup --offline"));
    kill(command(&caller, "inc", &[s(&file)], &as_owner), &caller.target);
    let said = says(&caller, &status);
    let remedy = format!("'fleecefs --as-owner recover --target {}", s(&caller.target));
    assert!(said.contains("was interrupted") && said.contains(&remedy), "{said}");
    // Who wants to end it is told as much.
    let cancelled = ends(&caller, &[&["cancel"][..], &target].concat());
    refused(&cancelled, 3, "no backup is running; backup ");
    refused(&cancelled, 3, &remedy);
    let said = says(&caller, &[&["recover"][..], &target].concat());
    assert!(said.contains("was not complete: removed"), "{said}");
    assert!(says(&caller, &status).contains("no backup --offline"));
    refused(&ends(&caller, &[&["cancel"][..], &target].concat()), 3, "no backup --offline");
    must("inc");
    assert_eq!(backup::level(&caller, "data.qcow2"), "INC");
}
