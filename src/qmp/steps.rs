//! A test hook: count every step of a run, and die at a chosen one.
//!
//! With `FLEECEFS_CRASH_AT=N` in the environment the process sends itself SIGKILL when step N is
//! reached, and with `FLEECEFS_STEPS=FILE` it appends a line per step to that file. A step is a
//! command about to be sent, its answer, an awaited event, or a change on disk. The crash matrix
//! (tests/crash.rs) walks through all of them. `FLEECEFS_HANG_AT=NAME` stops the process (SIGSTOP)
//! at the steps of that name, `FLEECEFS_HANG_AT=N` at step N. Without the variables this costs an atomic add.
//!
//! With `FLEECEFS_ANSWER_TIMEOUT=SECONDS` nothing waits longer for an answer of QEMU than that.

use std::io::Write;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// How long QEMU may take for one answer, or for an end that was asked for. blockdev-del flushes,
/// stop drains: on a slow disk that takes seconds, on a hung one for ever.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

struct Hook {
    crash_at: Option<u64>,
    hang_at: Option<String>,
    trace: Option<std::ffi::OsString>,
    answer_timeout: Duration,
}

static COUNT: AtomicU64 = AtomicU64::new(0);
static HOOK: OnceLock<Hook> = OnceLock::new();

fn hook() -> &'static Hook {
    HOOK.get_or_init(|| Hook {
        crash_at: std::env::var("FLEECEFS_CRASH_AT").ok().and_then(|v| v.parse().ok()),
        hang_at: std::env::var("FLEECEFS_HANG_AT").ok(),
        trace: std::env::var_os("FLEECEFS_STEPS"),
        answer_timeout: std::env::var("FLEECEFS_ANSWER_TIMEOUT")
            .ok()
            .and_then(|v| v.parse().ok())
            .map_or(ANSWER_TIMEOUT, |s| Duration::from_secs(s).min(ANSWER_TIMEOUT)),
    })
}

/// How long QEMU may take for one answer, or for an end that was asked for.
pub fn answer_timeout() -> Duration {
    hook().answer_timeout
}

/// Counts a step named `label`; the process ends here if this is the one chosen.
pub fn step(label: &str) {
    let n = COUNT.fetch_add(1, Ordering::SeqCst) + 1;
    let hook = hook();
    if let Some(path) = &hook.trace {
        trace(path, n, label);
    }
    if hook.crash_at == Some(n) {
        // SAFETY: kill and getpid have no preconditions.
        unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
    }
    if hook.hang_at.as_deref().is_some_and(|at| at == label || at == n.to_string()) {
        // SAFETY: as above.
        unsafe { libc::kill(libc::getpid(), libc::SIGSTOP) };
    }
}

// A test's own file.
#[allow(clippy::disallowed_methods)]
fn trace(path: &std::ffi::OsStr, n: u64, label: &str) {
    let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
    if let Ok(mut f) = file {
        // A trace that cannot be written shows in the test that reads it.
        let _ = writeln!(f, "{n} {label}");
    }
}
