//! Backups that another user pulls: what a backup makes has the mode and the group that were asked for,
//! and what is made of that later follows it.

use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::backup::{Caller, images, newest};
use crate::support::checked::{code, daemon};
use crate::support::tools::{have, is_root};

const TOOLS: &[&str] = &["qemu-storage-daemon", "qemu-img", "qemu-io", "/dev/fuse", "cat"];
/// Nobody has this number.
const GROUP: u32 = 4_000_123;

/// All that is below a folder, with its mode and group; the lock and journals are nobody's to read.
fn all(dir: &Path) -> Vec<(PathBuf, u32, u32)> {
    let mut found = Vec::new();
    let mut todo = vec![dir.to_path_buf()];
    while let Some(path) = todo.pop() {
        let meta = std::fs::symlink_metadata(&path).unwrap();
        if path.is_dir() {
            todo.extend(std::fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
        }
        let name = path.file_name().unwrap().to_str().unwrap();
        let locks = path.parent() == Some(&dir.join(".fleecefs")) || path == dir.join(".fleecefs");
        if !locks && !name.ends_with("lock") && !name.ends_with("journal") {
            found.push((path, meta.mode() & 0o7777, meta.gid()));
        }
    }
    found
}

/// Somebody of the group reads all of it.
fn pulled(dir: &Path, what: &str) {
    for (path, mode, group) in all(dir) {
        let wanted = if path.is_dir() { 0o750 } else { 0o640 };
        assert_eq!((mode, group), (wanted, GROUP), "{what}: {} {mode:o}", path.display());
        let read = if path.is_dir() { "ls" } else { "cat" };
        let out = Command::new(read).arg(&path).uid(4_000_001).gid(GROUP).output().unwrap();
        assert!(out.status.success(), "{what}: {}", String::from_utf8_lossy(&out.stderr));
    }
}

fn fleecefs(args: &[&str]) {
    let out = Command::new(env!("CARGO_BIN_EXE_fleecefs")).args(args).output().unwrap();
    let said = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
    assert!(matches!(out.status.code(), Some(0 | 19)), "{args:?}: {said}");
}

#[test]
fn what_is_made_has_the_mode_and_group_that_were_asked_for() {
    let name = "what_is_made_has_the_mode_and_group_that_were_asked_for";
    if !have(name, TOOLS) || !is_root(name) {
        return;
    }
    let d = daemon(&[]);
    std::fs::set_permissions(d.dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))
        .unwrap();
    let config = d.path("vm.json");
    std::fs::write(&config, "secret").unwrap();
    let plain = Caller::of(&d).with(&["--config", config.to_str().unwrap()]);
    let group = GROUP.to_string();
    let caller = plain.with(&["--mode", "0640", "--group", &group]);
    for level in ["full", "inc", "inc"] {
        caller.must(level);
        pulled(&caller.target, level);
    }
    // Or who lists there misses what belongs to the whole.
    let side = std::fs::metadata(caller.target.join(".fleecefs")).unwrap();
    assert_eq!((side.mode() & 0o7777, side.gid()), (0o750, GROUP));
    let target = caller.target.to_str().unwrap();
    let disk = caller.target.join("a.img");
    // A manifest that is made anew.
    let image = newest(&caller.target, "a.img");
    let image = image.file_name().unwrap().to_str().unwrap();
    std::fs::remove_file(disk.join(format!(".fleecefs/{image}.json"))).unwrap();
    fleecefs(&["verify", "--create", "--format", "qcow2", target]);
    assert!(disk.join(format!(".fleecefs/{image}.json")).exists());
    pulled(&caller.target, "verify --create");
    let second = images(&disk)[1].file_name().unwrap().to_str().unwrap().to_string();
    fleecefs(&["consolidate", target, "a.img", "--until", &second]);
    pulled(&caller.target, "consolidate");
    fleecefs(&["commit", disk.to_str().unwrap()]);
    pulled(&caller.target, "commit");
    // Nor does a backup: it goes on as it was told once.
    plain.must("auto");
    pulled(&caller.target, "no --mode");
    plain.with(&["--mode", "0640"]).must("full");
    pulled(&caller.target, "no --group");
    // As ever where nothing was asked for.
    let own = Caller { target: d.path("own"), ..plain.clone() };
    own.must("full");
    for (path, mode, _) in all(&own.target) {
        assert_eq!(mode, if path.is_dir() { 0o700 } else { 0o600 }, "{}", path.display());
    }
    for bad in ["0666", "0662", "0750", "0440", "4640", "x"] {
        let (exit, said) = code(&plain.with(&["--mode", bad]), "full");
        assert_eq!(exit, Some(2), "{bad}: {said}");
    }
    assert_eq!(code(&plain.with(&["--group", &group]), "full").0, Some(2));
}

/// What was given for a run that made no point is not kept.
#[test]
fn a_failed_run_changes_nothing_for_the_next() {
    if !have("a_failed_run_changes_nothing_for_the_next", TOOLS) {
        return;
    }
    let d = daemon(&[]);
    let plain = Caller::of(&d);
    let open = plain.with(&["--mode", "0644"]);
    let (exit, said) = code(&open, "inc");
    assert_eq!(exit, Some(12), "{said}");
    plain.must("full");
    let mode = |image: &Path| std::fs::metadata(image).unwrap().mode() & 0o7777;
    assert_eq!(mode(&newest(&plain.target, "a.img")), 0o600);
    open.must("inc");
    plain.must("inc");
    assert_eq!(mode(&newest(&plain.target, "a.img")), 0o644);
}

/// The line that contrib/doc/security.md gives.
#[test]
fn those_who_pull_leave_out_the_lock_files() {
    let name = "those_who_pull_leave_out_the_lock_files";
    if !have(name, &[TOOLS, &["rsync"]].concat()) || !is_root(name) {
        return;
    }
    let document = include_str!("../../contrib/doc/security.md");
    let line = document.lines().find(|l| l.trim().starts_with("rsync ")).unwrap();
    let words: Vec<&str> = line.split_whitespace().collect();
    let [options @ .., _, _] = words.as_slice() else { panic!("{line}") };
    let d = daemon(&[]);
    std::fs::set_permissions(d.dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))
        .unwrap();
    let group = GROUP.to_string();
    let caller = Caller::of(&d).with(&["--mode", "0640", "--group", &group]);
    caller.must("full");
    let copy = d.path("copy");
    std::fs::create_dir(&copy).unwrap();
    std::os::unix::fs::chown(&copy, Some(4_000_001), Some(GROUP)).unwrap();
    let out = Command::new("rsync")
        .args(&options[1..])
        .arg(format!("{}/", caller.target.display()))
        .arg(&copy)
        .uid(4_000_001)
        .gid(GROUP)
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let names = |dir: &Path| -> Vec<_> {
        let all = all(dir).into_iter().map(|(p, _, _)| p.strip_prefix(dir).unwrap().to_path_buf());
        let mut all: Vec<_> = all.collect();
        all.sort();
        all
    };
    assert_eq!(names(&copy), names(&caller.target));
    fleecefs(&["verify", copy.to_str().unwrap()]);
}
