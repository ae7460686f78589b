//! What the owner of a backup directory makes huge, long or many: whoever reads or finishes it takes
//! bounded time and memory, says what is wrong, and goes on with the rest.

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::support::backup::Caller;
use crate::support::guard::Guard;
use crate::support::process;
use crate::support::qemu::storage_daemon::Daemon;
use crate::support::tools::{have, run};
use crate::support::tree::{Backups, fleecefs};
use fleecefs::backup::Watch;
use fleecefs::backup::recover::sweep;
use fleecefs::error::{Error, Kind, Result};
use fleecefs::folder::Folder;
use fleecefs::manifest;
use fleecefs::manifest::Manifest;
use fleecefs::progress::Progress;
use serde_json::json;

/// This only ends a test that would hang.
const PATIENCE: Duration = Duration::from_secs(60);

fn stderr(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned()
}

/// Announces an image `FULL-1-d` that is said to be complete, with a disk of `size`.
fn announce(dir: &Path, size: u64) {
    let text = json!({
        "format_version": 1, "run": "0", "image": "FULL-1-d.partial", "disk": {}, "level": "full",
        "time": 1, "format": "qcow2", "content": "full", "virtual_size": size, "file_size": 1,
        "fingerprint": "0",
    });
    let m: Manifest = manifest::parse(text.to_string().as_bytes()).unwrap();
    manifest::write(dir, &m).unwrap();
}

/// An unfinished image of a disk of `size`, with a hole up to `len` behind it.
fn partial(dir: &Path, size: u64, len: u64) {
    let path = dir.join("FULL-1-d.partial");
    let text = path.to_str().unwrap();
    run("qemu-img", &["create", "-q", "-f", "qcow2", text, &size.to_string()]);
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(len).unwrap();
}

/// Somebody who wants an end, and counts how often he is asked.
#[derive(Default)]
struct Impatient(AtomicUsize);

impl Watch for Impatient {
    fn disk(&self, _: &str) -> Arc<dyn Progress> {
        Arc::new(())
    }
    fn say(&self, _: &str) {}
    fn warn(&self, _: &str) {}
    fn check_stop(&self) -> Result<()> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Err(Error::new(Kind::Interrupted, "enough"))
    }
}

/// A folder with the image of a disk of `size` bytes, which has got `len` so far.
fn unfinished(size: u64, len: u64) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().canonicalize().unwrap();
    announce(&path, size);
    partial(&path, size, len);
    (dir, path)
}

#[test]
fn an_unfinished_image_that_is_far_too_long_is_not_read() {
    if !have("an_unfinished_image_that_is_far_too_long_is_not_read", &["qemu-img"]) {
        return;
    }
    let (_dir, path) = unfinished(1 << 20, 1 << 40);
    let watch = Impatient::default();
    sweep(&Folder::open(&path).unwrap(), &watch).unwrap();
    assert_eq!(watch.0.load(Ordering::SeqCst), 0, "long work was begun");
    assert!(!path.join("FULL-1-d.partial").exists() && !path.join("FULL-1-d").exists());
}

#[test]
fn the_hashing_of_an_unfinished_image_is_ended_and_nothing_is_lost() {
    if !have("the_hashing_of_an_unfinished_image_is_ended_and_nothing_is_lost", &["qemu-img"]) {
        return;
    }
    let (_dir, path) = unfinished(1 << 36, 1 << 36);
    let e = sweep(&Folder::open(&path).unwrap(), &Impatient::default()).unwrap_err();
    assert_eq!(e.kind(), Kind::Interrupted);
    assert!(path.join("FULL-1-d.partial").exists());
    assert!(path.join(".fleecefs/FULL-1-d.partial.json").exists());
}

/// The same in a backup: the signal comes when the image is about to be hashed.
#[test]
fn a_backup_is_ended_while_it_hashes_what_another_left() {
    let name = "a_backup_is_ended_while_it_hashes_what_another_left";
    if !have(name, &["qemu-storage-daemon", "qemu-img"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("d.img");
    run("qemu-img", &["create", "-q", "-f", "qcow2", disk.to_str().unwrap(), "1M"]);
    let d = Daemon::start(dir, &[("d", "driver=qcow2")]);
    let caller = Caller::of(&d);
    let folder = caller.target.join("d.img");
    std::fs::create_dir_all(&folder).unwrap();
    // Hours of zeros.
    announce(&folder, 1 << 42);
    partial(&folder, 1 << 42, 1 << 42);
    let mut command = caller.command("full");
    let err = std::fs::File::create(d.path("stderr")).unwrap();
    let mut child = command.env("FLEECEFS_HANG_AT", "synced").stderr(err).spawn().unwrap();
    let pid = i32::try_from(child.id()).unwrap();
    let mut status = 0;
    // SAFETY: our own child, and an integer for its state.
    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, libc::WUNTRACED) }, pid);
    let said = || std::fs::read_to_string(d.path("stderr")).unwrap();
    let state = std::process::ExitStatus::from_raw(status);
    assert_eq!(state.stopped_signal(), Some(libc::SIGSTOP), "{state}: {}", said());
    for signal in [libc::SIGTERM, libc::SIGCONT] {
        process::signal(pid, signal);
    }
    let end = Instant::now() + PATIENCE;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > end {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("it goes on: {}", said());
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    assert_eq!(status.code(), Some(130), "{}", said());
    assert!(folder.join("FULL-1-d.partial").exists(), "{}", said());
}

/// Peak memory of the children that have ended, in KiB.
fn peak() -> i64 {
    // SAFETY: a struct of integers.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: a valid pointer for what is filled in.
    assert_eq!(unsafe { libc::getrusage(libc::RUSAGE_CHILDREN, &raw mut usage) }, 0);
    usage.ru_maxrss
}

#[test]
fn a_journal_of_millions_is_refused_in_little_memory() {
    // As many names as fit into the longest journal that is read.
    let names = "\"a\",".repeat(8_000_000);
    for (name, text) in [
        ("removal.journal", format!("{{\"remove\":[{names}\"a\"]}}")),
        (
            "fold.json",
            format!("{{\"full\":\"f\",\"interim\":\"i\",\"increments\":[{names}\"a\"]}}"),
        ),
    ] {
        let b = Backups::new();
        b.image("sda/FULL-1700000000-sda", None);
        b.image("sdb/FULL-1700000000-sdb", None);
        b.file(&format!("sda/.fleecefs/{name}"), text.as_bytes());
        let root = b.root().to_str().unwrap();
        let out = fleecefs(&["list", root]);
        let said = String::from_utf8_lossy(&out.stdout).into_owned();
        assert!(out.status.success(), "{name}: {said}");
        assert!(said.contains("FULL-1700000000-sdb"), "{name}: {said}");
        assert!(said.contains("too many entries"), "{name}: {said}");
        let out = fleecefs(&["prune", "--keep-last", "1", root]);
        assert_eq!(out.status.code(), Some(10), "{name}: {}", stderr(&out));
        assert!(stderr(&out).contains("too many entries"), "{name}: {}", stderr(&out));
    }
    assert!(peak() < 256 << 10, "{} KiB", peak());
}

/// Names that leave no room for the ending of a manifest's, or for `.partial`.
#[test]
fn the_longest_names_stop_nobody() {
    for len in [246, 247, 250, 251, 252, 255] {
        let b = Backups::new();
        let long = |time: u64| {
            let head = format!("FULL-{time}-");
            let tail = "x".repeat(len - head.len());
            head + &tail
        };
        for time in [1_600_000_000, 1_700_000_000] {
            b.file(&format!("sda/{}", long(time)), &[7; 4096]);
            b.file(&format!("sdb/FULL-{time}-sdb"), &[7; 4096]);
        }
        let root = b.root().to_str().unwrap();
        let out = fleecefs(&["list", root]);
        let said = String::from_utf8_lossy(&out.stdout).into_owned();
        assert!(out.status.success(), "{len}: {}", stderr(&out));
        assert!(said.contains(&long(1_700_000_000)) && !said.contains("error"), "{len}: {said}");
        for args in [&["verify"][..], &["verify", "--create"], &["verify"]] {
            let out = fleecefs(&[args, &[root]].concat());
            assert!(matches!(out.status.code(), Some(0 | 19)), "{len} {args:?}: {}", stderr(&out));
        }
        assert!(b.path("sdb/.fleecefs/FULL-1700000000-sdb.json").exists(), "{len}");
        let out = fleecefs(&["prune", "--keep-last", "1", "--force", root]);
        assert!(out.status.success(), "{len}: {}", stderr(&out));
        for (disk, old, new) in [
            ("sda", long(1_600_000_000), long(1_700_000_000)),
            ("sdb", "FULL-1600000000-sdb".into(), "FULL-1700000000-sdb".into()),
        ] {
            assert!(!b.path(&format!("{disk}/{old}")).exists(), "{len} {old}");
            assert!(b.path(&format!("{disk}/{new}")).exists(), "{len} {new}");
        }
    }
}

/// A mount of ours inside a backup directory is left out; what only looks like one is not.
#[test]
fn a_folder_with_the_files_of_a_mount_is_not_hidden() {
    let name = "a_folder_with_the_files_of_a_mount_is_not_hidden";
    // SAFETY: geteuid has no preconditions.
    if unsafe { libc::geteuid() } != 0 {
        println!("skipped: {name} needs root");
        return;
    }
    let b = Backups::new();
    b.file("plain/.fleecefs/status.json", b"{}");
    b.image("plain/FULL-1700000000-a", None);
    std::fs::create_dir(b.path("mounted")).unwrap();
    let at = b.path("mounted");
    let _guard = Guard::tmpfs("50%", &at);
    b.file("mounted/.fleecefs/status.json", b"{}");
    b.image("mounted/FULL-1700000000-b", None);
    assert_eq!(b.shown().len(), 2, "{:?}", b.shown());
}
