//! prune and consolidate, killed or on a full file system: no point that should stay is lost.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::chains::{Backups, TOOLS, code, copy_to, fleecefs, names, succeed};
use crate::support::guard::Guard;
use crate::support::images::{self, Rng};
use crate::support::tools;

/// A run that is killed after `delay`; whether it was still at work.
fn killed(args: &[&str], dir: &Path, delay: Duration) -> bool {
    let (verb, rest) = args.split_first().unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_fleecefs"))
        .args(["-q", verb])
        .arg(dir)
        .args(rest)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    std::thread::sleep(delay);
    let at_work = child.try_wait().unwrap().is_none();
    // It may have ended by itself.
    let _ = child.kill();
    child.wait().unwrap();
    images::wait_until_closed(dir);
    at_work
}

/// How often a run is killed or meets a full file system; more on demand.
fn rounds() -> usize {
    std::env::var("FLEECEFS_KILLS").map_or(16, |n| n.parse().unwrap())
}

/// Kills `args` at random moments spread over its duration. After each, the points in `stay` must be
/// there and right, `verify` must not find damage, and a second run must finish the work.
fn kill_at_random(b: &Backups, args: &[&str], stay: &[usize], seed: u64) {
    let probe = b.copy();
    let started = Instant::now();
    succeed(args, &probe.root);
    let took = started.elapsed();
    let end = names(&probe.root);
    let mut rng = Rng(seed);
    let mut cut_short = 0;
    for round in 0..rounds() {
        let copy = b.copy();
        let delay = took.mul_f64(rng.below(1000) as f64 / 1000.0);
        cut_short += usize::from(killed(args, &copy.root, delay));
        let what = format!("{args:?} killed after {delay:?} of {took:?}, round {round}");
        b.check(&copy.root, stay.iter().copied(), &what);
        let out = fleecefs(&["verify"], &copy.root);
        // 19: the new FULL has its name and not yet its manifest.
        assert!([0, 19].contains(&code(&out)), "{what}: {}", String::from_utf8_lossy(&out.stdout));
        succeed(args, &copy.root);
        assert_eq!(names(&copy.root), end, "{what}");
        b.check(&copy.root, stay.iter().copied(), &what);
        succeed(&["verify"], &copy.root);
    }
    println!("{cut_short} of {} runs were killed in time", rounds());
    assert!(cut_short > 0, "no run was killed in time");
}

#[test]
fn prune_survives_kill() {
    if !tools::have("prune_survives_kill", &TOOLS) {
        return;
    }
    let b = Backups::new(4, 6, "", false);
    succeed(&["verify", "--create"], b.dir.path());
    let stay: Vec<usize> = (21..28).collect();
    kill_at_random(&b, &["prune", "--keep-last", "2"], &stay, 1);
}

#[test]
fn consolidate_survives_kill() {
    if !tools::have("consolidate_survives_kill", &TOOLS) {
        return;
    }
    let b = Backups::new(1, 6, "cluster_size=4k", false);
    succeed(&["verify", "--create"], b.dir.path());
    let until = b.name(4);
    kill_at_random(&b, &["consolidate", "sda", "--until", &until], &[4, 5, 6], 2);
}

#[test]
fn consolidate_of_linked_images_survives_kill() {
    if !tools::have("consolidate_of_linked_images_survives_kill", &TOOLS) {
        return;
    }
    let b = Backups::new(1, 5, "", false);
    succeed(&["rebase"], &b.dir.path().join("sda"));
    succeed(&["verify", "--create"], b.dir.path());
    let until = b.name(3);
    kill_at_random(&b, &["consolidate", "sda", "--until", &until], &[3, 4, 5], 4);
}

/// A small file system in memory.
struct Tmpfs {
    _mount: Guard,
    dir: tempfile::TempDir,
}

impl Tmpfs {
    fn new(bytes: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        Tmpfs { _mount: Guard::tmpfs(&bytes.to_string(), dir.path()), dir }
    }
}

#[test]
fn a_full_file_system_loses_nothing() {
    let tools = ["qemu-img", "qemu-io", "cp", "mount", "umount"];
    let test = "a_full_file_system_loses_nothing";
    // SAFETY: geteuid has no preconditions.
    let root = unsafe { libc::geteuid() } == 0;
    if !tools::have(test, &tools) {
        return;
    }
    if !root {
        assert!(std::env::var_os("CI").is_none(), "{test} needs root");
        println!("skipped: {test} needs root");
        return;
    }
    let b = Backups::new(1, 6, "", false);
    succeed(&["verify", "--create"], b.dir.path());
    let used: u64 = walk(b.dir.path());
    let mut rng = Rng(3);
    let mut failed = 0;
    for round in 0..rounds() {
        let room = rng.below(12 << 20) / 4096 * 4096;
        let fs = Tmpfs::new(used + room);
        let dir = fs.dir.path().join("b");
        std::fs::create_dir(&dir).unwrap();
        copy_to(b.dir.path(), &dir);
        let verb: Vec<String> = match round % 2 {
            0 => vec!["consolidate".into(), "sda".into(), "--until".into(), b.name(4)],
            _ => ["prune", "--keep-last", "3", "--consolidate"].map(String::from).to_vec(),
        };
        let args: Vec<&str> = verb.iter().map(String::as_str).collect();
        let out = fleecefs(&args, &dir);
        let what = format!("{args:?} with {room} bytes free");
        failed += usize::from(!out.status.success());
        assert!([0, 7].contains(&code(&out)), "{what}: {out:?}");
        b.check(&dir, [4, 5, 6], &what);
        assert_eq!(code(&fleecefs(&["verify"], &dir)), 0, "{what}");
    }
    println!("{failed} of {} runs met a full file system", rounds());
    assert!(failed > 0, "the file system was never full");
}

/// Bytes that a folder takes in pages of 4 KiB, and some more for names.
fn walk(dir: &Path) -> u64 {
    let entries = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap());
    entries
        .map(|e| {
            let m = e.metadata().unwrap();
            if m.is_dir() { 4096 + walk(&e.path()) } else { m.len().next_multiple_of(4096) + 4096 }
        })
        .sum()
}
