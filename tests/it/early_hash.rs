//! The hash of an image that is hashed while QEMU writes it: it is that of the finished file, whoever
//! pauses or ends the job meanwhile, and nothing is left of a run that dies beside its paused job.

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use crate::support::backup::{Caller, leftovers, manifest_of, newest, ours_in_qemu};
use crate::support::guest;
use crate::support::qemu::storage_daemon::Daemon;
use crate::support::tools::{have, run};
use serde_json::json;

const TOOLS: &[&str] = &["qemu-storage-daemon", "qemu-img", "qemu-io"];

/// Disks of so many bytes.
const SIZE: u64 = 64 << 20;

/// Two disks; most of each is data.
fn daemon() -> Daemon {
    let dir = tempfile::tempdir().unwrap();
    for (name, format) in [("a", "qcow2"), ("b", "raw")] {
        let path = dir.path().join(format!("{name}.img"));
        run("qemu-img", &["create", "-q", "-f", format, path.to_str().unwrap(), &SIZE.to_string()]);
    }
    let d = Daemon::start(dir, &[("a", "driver=qcow2"), ("b", "driver=raw")]);
    for name in ["a", "b"] {
        d.io(name, &["write -P 1 0 20M", "write -P 2 21M 40M", "write -P 3 63M 1M"]);
    }
    d
}

/// One that copies 16 MiB a second, with a barrier every 2 MiB where it may, and says much.
fn caller(d: &Daemon, more: &[&str]) -> Caller {
    Caller::of(d).with(&["-vv", "--speed-limit", "16M"]).with(more)
}

fn command(caller: &Caller, trace: &Path) -> Command {
    let mut c = caller.command("full");
    c.env("FLEECEFS_BARRIER", (2 << 20).to_string()).env("FLEECEFS_STEPS", trace);
    c
}

/// Runs to a good end; gives what it said, and how often each step was taken.
fn backed_up(caller: &Caller, d: &Daemon) -> (String, impl Fn(&str) -> usize) {
    let trace = d.path("steps");
    let out = command(caller, &trace).output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success(), "{said}");
    let steps = std::fs::read_to_string(&trace).unwrap();
    std::fs::remove_file(&trace).unwrap();
    (said, move |step: &str| steps.lines().filter(|l| l.ends_with(step)).count())
}

fn check_hash(caller: &Caller, disk: &str) {
    let image = newest(&caller.target, disk);
    let hash = blake3::hash(&std::fs::read(&image).unwrap()).to_hex().to_string();
    assert_eq!(manifest_of(&image)["blake3"], json!(hash), "{}", image.display());
}

/// How many units held, for each image of a run.
fn held(said: &str) -> Vec<u64> {
    let lines = said.lines().filter(|l| l.contains("hashed ahead") && l.ends_with(" hold"));
    lines.map(|l| l.rsplit(' ').nth(1).unwrap().parse().unwrap()).collect()
}

fn clean(d: &Daemon) {
    assert_eq!(ours_in_qemu(&mut d.qmp()), Vec::<String>::new());
    assert_eq!(leftovers(d.dir.path()), Vec::<PathBuf>::new());
}

#[test]
fn an_image_that_is_hashed_while_it_is_written_has_the_right_hash() {
    if !have("an_image_that_is_hashed_while_it_is_written_has_the_right_hash", TOOLS) {
        return;
    }
    let d = daemon();
    let caller = caller(&d, &[]);
    let (said, steps) = {
        let _writers = [d.churn("a", SIZE, 1), d.churn("b", SIZE, 2)];
        backed_up(&caller, &d)
    };
    for disk in ["a.img", "b.img"] {
        check_hash(&caller, disk);
    }
    // Two at least of each, and all but the tables hashed ahead.
    assert!(steps("answer job-resume") >= 4, "{said}");
    // A job that ends right then refuses to pause.
    let refused = steps("answer job-pause") - steps("answer job-resume");
    assert!((0..=2).contains(&refused), "{refused}: {said}");
    let held = held(&said);
    assert!(held.len() == 2 && held.iter().all(|n| *n > 40), "{held:?} {said}");
    clean(&d);
}

#[test]
fn what_cannot_be_hashed_ahead_is_hashed_at_the_end() {
    if !have("what_cannot_be_hashed_ahead_is_hashed_at_the_end", TOOLS) {
        return;
    }
    let d = daemon();
    for more in [&["--compress"][..], &["--no-hash"], &["--direct"]] {
        let mut caller = caller(&d, &[&["--include", "a"], more].concat());
        caller.target = d.path(more[0]);
        let (said, steps) = backed_up(&caller, &d);
        assert_eq!(steps("send job-pause"), 0, "{more:?}: {said}");
        match more {
            ["--no-hash"] => {
                assert!(manifest_of(&newest(&caller.target, "a.img"))["blake3"].is_null());
            }
            _ => check_hash(&caller, "a.img"),
        }
    }
    clean(&d);
}

/// A backup that has stopped itself at a step, and goes on when it is told to.
struct Stopped {
    child: Child,
    trace: PathBuf,
}

impl Stopped {
    fn at(step: &str, caller: &Caller, d: &Daemon) -> Self {
        let trace = d.path("steps");
        let _ = std::fs::remove_file(&trace);
        let mut c = command(caller, &trace);
        c.env("FLEECEFS_HANG_AT", step).stderr(std::fs::File::create(d.path("said")).unwrap());
        let child = c.spawn().unwrap();
        let mut s = Stopped { child, trace };
        s.wait_stopped();
        s
    }

    fn wait_stopped(&mut self) {
        let stat = format!("/proc/{}/stat", self.child.id());
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            let stat = std::fs::read_to_string(&stat).unwrap_or_default();
            if stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('T')) {
                return;
            }
            assert!(self.child.try_wait().unwrap().is_none(), "it does not come so far");
            assert!(Instant::now() < end, "it does not come so far");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn signal(&self, signal: i32) {
        // SAFETY: a signal to our own child.
        unsafe { libc::kill(self.child.id() as i32, signal) };
    }

    fn steps(&self, step: &str) -> usize {
        let steps = std::fs::read_to_string(&self.trace).unwrap();
        steps.lines().filter(|l| l.ends_with(step)).count()
    }

    /// Goes on, however often it stops, until it has ended.
    fn goes_on(mut self, d: &Daemon) {
        let end = Instant::now() + Duration::from_secs(120);
        let status = loop {
            if let Some(s) = self.child.try_wait().unwrap() {
                break s;
            }
            assert!(Instant::now() < end, "it does not end");
            self.signal(libc::SIGCONT);
            std::thread::sleep(Duration::from_millis(5));
        };
        assert!(status.success(), "{}", std::fs::read_to_string(d.path("said")).unwrap());
    }

    fn killed(mut self) {
        self.signal(libc::SIGKILL);
        self.child.wait().unwrap();
    }
}

fn our_job(qmp: &mut guest::Qmp) -> (String, String) {
    let jobs = qmp.execute("query-jobs", json!({}));
    let job = jobs.as_array().unwrap().iter().find(|j| j["type"] == "backup").unwrap();
    (job["id"].as_str().unwrap().into(), job["status"].as_str().unwrap().into())
}

#[test]
fn a_job_that_another_program_paused_is_not_resumed() {
    if !have("a_job_that_another_program_paused_is_not_resumed", TOOLS) {
        return;
    }
    let d = daemon();
    let caller = caller(&d, &["--include", "a"]);
    let mut other = d.qmp();
    let mut stopped = Stopped::at("send job-pause", &caller, &d);
    let (id, _) = our_job(&mut other);
    other.execute("job-pause", json!({"id": id}));
    stopped.signal(libc::SIGCONT);
    while stopped.steps("answer job-pause") == 0 {
        std::thread::sleep(Duration::from_millis(5));
    }
    // It looks at the job several times.
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(our_job(&mut other).1, "paused");
    assert_eq!((stopped.steps("send job-pause"), stopped.steps("send job-resume")), (1, 0));
    other.execute("job-resume", json!({"id": id}));
    // The next barrier is one again.
    stopped.wait_stopped();
    assert_eq!(our_job(&mut other).1, "running");
    stopped.goes_on(&d);
    check_hash(&caller, "a.img");

    // Resumed by the other one before we looked.
    let stopped = Stopped::at("answer job-pause", &caller, &d);
    let (id, _) = our_job(&mut other);
    other.execute("job-resume", json!({"id": id}));
    stopped.goes_on(&d);
    check_hash(&caller, "a.img");
    drop(other);
    clean(&d);
}

#[test]
fn a_run_that_dies_beside_its_paused_job_leaves_nothing() {
    if !have("a_run_that_dies_beside_its_paused_job_leaves_nothing", TOOLS) {
        return;
    }
    let d = daemon();
    let caller = caller(&d, &["--include", "a"]);
    for step in ["job-pause", "query-blockstats", "job-resume"] {
        for side in ["send", "answer"] {
            let stopped = Stopped::at(&format!("{side} {step}"), &caller, &d);
            stopped.killed();
            let status = our_job(&mut d.qmp()).1;
            let paused = [
                "answer job-pause",
                "send query-blockstats",
                "answer query-blockstats",
                "send job-resume",
            ];
            let said = format!("{side} {step}");
            assert_eq!(status == "paused", paused.contains(&said.as_str()), "{said}: {status}");
            caller.must_recover(&[]);
            clean(&d);
        }
    }
    let (said, _) = backed_up(&caller, &d);
    check_hash(&caller, "a.img");
    assert!(held(&said).iter().all(|n| *n > 40), "{said}");
}

/// An end that the user asks for while the job is paused.
#[test]
fn a_run_that_is_interrupted_beside_its_paused_job_leaves_nothing() {
    if !have("a_run_that_is_interrupted_beside_its_paused_job_leaves_nothing", TOOLS) {
        return;
    }
    let d = daemon();
    let mut stopped = Stopped::at("answer job-pause", &caller(&d, &[]), &d);
    stopped.signal(libc::SIGTERM);
    stopped.signal(libc::SIGCONT);
    assert!(!stopped.child.wait().unwrap().success());
    clean(&d);
}
