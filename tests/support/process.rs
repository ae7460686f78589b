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
    // Others may mount something at the same time whose name is no text.
    let bytes = std::fs::read("/proc/self/mountinfo").unwrap();
    let text = String::from_utf8_lossy(&bytes);
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

/// A process that is stopped, until this is dropped.
pub struct Stopped(i32);

impl Stopped {
    /// Stops it. The kernel tells one of its threads, which tells the others when it gets to run: meanwhile they
    /// go on, on a busy machine for long enough to answer somebody. So this waits until none is left that does.
    pub fn new(pid: i32) -> Self {
        signal(pid, libc::SIGSTOP);
        let stopped = Stopped(pid);
        eventually("all threads are stopped", || {
            let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
            tasks.flatten().all(|t| state(&t.path()).is_none_or(|s| s == 'T'))
        });
        stopped
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // SAFETY: no pointers; the process was started by this test.
        unsafe { libc::kill(self.0, libc::SIGCONT) };
    }
}

/// The state letter of a process or thread, by its folder in `/proc`; none if it is no more.
pub fn state(proc: &Path) -> Option<char> {
    let stat = std::fs::read_to_string(proc.join("stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}

/// Whether the process has ended, even if nobody has asked for its exit code yet.
pub fn is_gone(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_none_or(|(_, state)| state.starts_with('Z'))
}
