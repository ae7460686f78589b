//! The points that a caller has made: which there are, what they hold.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use crate::support::backup::{Caller, images};
use crate::support::images::first_difference;

/// Waits for the end of a backup.
pub fn finish(child: &mut Child) -> ExitStatus {
    let end = Instant::now() + Duration::from_secs(120);
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        assert!(Instant::now() < end, "the backup hangs");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The bytes of a point.
pub fn point(caller: &Caller, disk: &str, image: &Path) -> Vec<u8> {
    let out = tempfile::tempdir().unwrap();
    let raw = out.path().join("p.raw");
    let mut c = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
    let name = format!("{disk}/{}", image.file_name().unwrap().to_str().unwrap());
    c.args(["restore", "--quiet"]).arg(&caller.target).arg(name).arg(&raw);
    let done = c.output().unwrap();
    assert!(done.status.success(), "restore: {}", String::from_utf8_lossy(&done.stderr));
    std::fs::read(raw).unwrap()
}

/// The finished points of a disk.
pub fn points(caller: &Caller, disk: &str) -> Vec<PathBuf> {
    let mut list = images(&caller.target.join(disk));
    list.retain(|p| p.extension().is_none_or(|e| e != "partial"));
    list
}

/// The newest point of a disk holds one of these.
pub fn right(caller: &Caller, disk: &str, any: &[&Vec<u8>], what: &str) {
    let newest =
        points(caller, disk).pop().unwrap_or_else(|| panic!("{what}: {disk} has no point"));
    let got = point(caller, disk, &newest);
    let differences: Vec<_> = any.iter().map(|e| first_difference(&got, e)).collect();
    assert!(differences.contains(&None), "{what}: {}: {differences:?}", newest.display());
}

/// Runs `recover`; its exit code and what it said.
pub fn recover(caller: &Caller) -> (Option<i32>, String) {
    let mut c = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
    c.args(["recover", "--qmp"]).arg(&caller.qmp).arg("--state-dir").arg(&caller.state);
    let out = c.output().unwrap();
    (out.status.code(), String::from_utf8_lossy(&out.stderr).into_owned())
}
