//! The process behind a mount, and waiting for it.

use std::path::Path;
use std::process::Output;
use std::time::{Duration, Instant};

/// Nothing here takes long; this only ends a test that would hang.
const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until `done`; the mount learns of changes within a moment, not at once.
pub fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "still not: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

pub fn stderr(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned()
}

pub fn is_mounted(path: &Path) -> bool {
    let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    text.lines().any(|l| l.split(' ').nth(4) == path.to_str())
}

/// What the mount at `at` says of itself.
pub fn status(at: &Path) -> serde_json::Value {
    let text = std::fs::read(at.join(".fleecefs/status.json")).unwrap();
    serde_json::from_slice(&text).unwrap()
}

pub fn server_pid(at: &Path) -> i32 {
    i32::try_from(status(at)["pid"].as_i64().unwrap()).unwrap()
}

pub fn signal(pid: i32, signal: i32) {
    // SAFETY: no pointers; the process was started by this test.
    assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
}

/// Whether the process has ended, even if nobody has asked for its exit code yet.
pub fn is_gone(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_none_or(|(_, state)| state.starts_with('Z'))
}
