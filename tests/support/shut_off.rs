//! Backups of shut-off VMs, as a test calls them and looks at them.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use crate::support::backup::{self, Caller};
use crate::support::qemu::one_disk::{Vm, image};
use crate::support::tools::run;

pub const UUID: [&str; 4] = ["-uuid", "11111111-2222-3333-4444-555555555555", "-name", "guest=web"];

/// The backup of shut-off images to the caller's target.
pub fn command(caller: &Caller, level: &str, files: &[&str], more: &[&str]) -> Command {
    let mut c = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
    c.args(["backup", "--level", level, "--offline"]).args(files);
    if let Some(folder) = caller.target.parent() {
        c.current_dir(folder);
    }
    c.arg("--target").arg(&caller.target).arg("--state-dir").arg(&caller.state);
    c.args(["--progress", "none"]).args(more).env_remove("FLEECEFS_STATE_DIR");
    c.env("FLEECEFS_WALK", "1");
    c
}

pub fn offline(caller: &Caller, level: &str, files: &[&str], more: &[&str]) -> Output {
    command(caller, level, files, more).output().unwrap()
}

pub fn must(caller: &Caller, level: &str, file: &Path) -> String {
    let out = offline(caller, level, &[s(file)], &[]);
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success(), "{level}: {said}");
    said
}

/// It is refused with this code and these words.
pub fn refused(out: &Output, code: i32, words: &str) {
    let said = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(code), "{words}: {said}");
    assert!(said.contains(words), "{said}");
}

pub fn s(path: &Path) -> &str {
    path.to_str().unwrap()
}

pub fn write(file: &Path, op: &str) {
    run("qemu-io", &["-f", "qcow2", "-c", op, s(file)]);
}

/// What is on a disk that nobody uses.
pub fn bytes(file: &Path, format: &str) -> Vec<u8> {
    let raw = file.with_extension("bytes");
    run("qemu-img", &["convert", "-f", format, "-O", "raw", s(file), s(&raw)]);
    let bytes = std::fs::read(&raw).unwrap();
    std::fs::remove_file(raw).unwrap();
    bytes
}

/// A caller for tests in which no VM runs.
pub fn caller(dir: &Path) -> Caller {
    Caller {
        qmp: dir.join("qmp"),
        state: dir.join("state"),
        target: dir.join("T"),
        more: Vec::new(),
    }
}

/// An image of a VM that is shut off, with a FULL.
pub fn shut_off() -> (tempfile::TempDir, std::path::PathBuf, Caller) {
    let d = tempfile::tempdir().unwrap();
    let file = image(&d.path().join("vm/data.qcow2"));
    let vm = Vm::start(d.path(), &file, &UUID);
    let caller = vm.caller.clone();
    caller.must("full");
    vm.quit();
    (d, file, caller)
}

pub fn verified(target: &Path) {
    let out =
        Command::new(env!("CARGO_BIN_EXE_fleecefs")).arg("verify").arg(target).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stdout));
}

/// The daemons that work below the folder `state`.
pub fn processes(state: &str) -> Vec<PathBuf> {
    let all = std::fs::read_dir("/proc").unwrap().map(|e| e.unwrap().path());
    let line = |p: &PathBuf| std::fs::read(p.join("cmdline")).unwrap_or_default();
    let is = |p: &PathBuf| {
        let line = String::from_utf8_lossy(&line(p)).into_owned();
        let dir = std::fs::read_link(p.join("cwd")).unwrap_or_default();
        (line.starts_with("qemu-storage-daemon") || line.contains("/qemu-storage-daemon"))
            && dir.starts_with(state)
    };
    all.filter(is).collect()
}

/// What `fleecefs` with these words says, and that it ends well.
pub fn says(caller: &Caller, words: &[&str]) -> String {
    let mut c = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
    c.args(words).arg("--state-dir").arg(&caller.state).env_remove("FLEECEFS_STATE_DIR");
    let out = c.output().unwrap();
    let said = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
    assert!(out.status.success(), "{words:?}: {said}");
    said
}

/// Unfinished images below a folder.
pub fn partials(target: &Path) -> usize {
    let left = backup::leftovers(target).into_iter();
    left.filter(|p| p.extension().is_some_and(|e| e == "partial")).count()
}

/// Kills a backup once it has made its files.
pub fn kill(command: Command, target: &Path) {
    let err = tempfile::NamedTempFile::new().unwrap();
    let mut child = backup::stopped(command, "files created", err.path());
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(partials(target), 1);
}

/// Until no daemon works below the caller's state folder.
pub fn wait_for_no_daemon(caller: &Caller) {
    let end = Instant::now() + Duration::from_secs(60);
    while !processes(s(&caller.state)).is_empty() {
        assert!(Instant::now() < end, "the daemon lives on");
        std::thread::sleep(Duration::from_millis(20));
    }
}
