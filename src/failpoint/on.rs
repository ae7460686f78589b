//! The hooks. Without their variables a step costs an atomic add.

use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rustix::process::{Signal, getpid, kill_process};

const CRASH_AT: &str = "FLEECEFS_CRASH_AT";
const HANG_AT: &str = "FLEECEFS_HANG_AT";
const STEPS: &str = "FLEECEFS_STEPS";
const STEPS_ALL: &str = "FLEECEFS_STEPS_ALL";
const ANSWER_TIMEOUT: &str = "FLEECEFS_ANSWER_TIMEOUT";
const HOLD: &str = "FLEECEFS_HOLD";
const WALK: &str = "FLEECEFS_WALK";
const HIDES_STATUS: &str = "FLEECEFS_HIDES_STATUS";
const BARRIER: &str = "FLEECEFS_BARRIER";
const JOURNAL: &str = "FLEECEFS_JOURNAL";

struct Hook {
    crash_at: Option<String>,
    hang_at: Option<String>,
    trace: Option<OsString>,
    all: bool,
    answer_timeout: Option<Duration>,
}

static COUNT: AtomicU64 = AtomicU64::new(0);
/// Whether the last step was about a command that only asks.
static ASKING: AtomicBool = AtomicBool::new(false);
static HOOK: OnceLock<Hook> = OnceLock::new();

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().and_then(|v| v.parse().ok())
}

fn hook() -> &'static Hook {
    HOOK.get_or_init(|| Hook {
        crash_at: std::env::var(CRASH_AT).ok(),
        hang_at: std::env::var(HANG_AT).ok(),
        trace: std::env::var_os(STEPS),
        all: std::env::var_os(STEPS_ALL).is_some(),
        answer_timeout: number(ANSWER_TIMEOUT).map(Duration::from_secs),
    })
}

/// Counts a step; the process ends here, or stops, if this is the one chosen.
pub(crate) fn step(name: &str) {
    ASKING.store(false, Ordering::SeqCst);
    count(name);
}

fn count(name: &str) {
    let n = COUNT.fetch_add(1, Ordering::SeqCst) + 1;
    let hook = hook();
    if let Some(path) = &hook.trace {
        trace(path, n, name);
    }
    let is_here =
        |at: &Option<String>| at.as_deref().is_some_and(|at| at == name || at.parse() == Ok(n));
    if is_here(&hook.crash_at) {
        send(Signal::KILL);
    }
    if is_here(&hook.hang_at) {
        send(Signal::STOP);
    }
}

/// A step that is named by what is done with a command. Of several that only ask, one after the other, the first
/// counts: whoever dies at another of them leaves the same behind.
pub(crate) fn step_of(what: &str, command: &str) {
    let name = format!("{what} {command}");
    if !only_asks(command) {
        return step(&name);
    }
    if !ASKING.swap(true, Ordering::SeqCst) || hook().all {
        count(&name);
    } else if hook().hang_at.as_deref() == Some(&*name) {
        send(Signal::STOP);
    }
}

/// Whether a command changes nothing, neither in QEMU nor in its guest. One that is not known is taken for one
/// that does.
fn only_asks(command: &str) -> bool {
    let begins = ["query-", "qom-list", "guest-get-"];
    let named = ["qom-get", "x-debug-query-block-graph", "guest-fsfreeze-status", "guest-info"];
    begins.iter().any(|b| command.starts_with(b)) || named.contains(&command)
}

fn send(signal: Signal) {
    // Every process may signal itself.
    let _ = kill_process(getpid(), signal);
}

// A test's own file.
#[allow(clippy::disallowed_methods)]
fn trace(path: &OsStr, n: u64, name: &str) {
    let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
    if let Ok(mut f) = file {
        // A trace that cannot be written shows in the test that reads it.
        let _ = writeln!(f, "{n} {name}");
    }
}

/// Keeps steps from a program that is about to be started: they are this process's.
pub(crate) fn keep_from(command: &mut Command) {
    for name in [CRASH_AT, HANG_AT, STEPS, STEPS_ALL] {
        command.env_remove(name);
    }
}

/// How long QEMU may take for one answer: `usual`, or less.
pub(crate) fn answer_timeout(usual: Duration) -> Duration {
    hook().answer_timeout.map_or(usual, |wanted| wanted.min(usual))
}

/// The folder in which a run says that it is held, and is let go.
pub(crate) fn hold() -> Option<PathBuf> {
    std::env::var_os(HOLD).map(PathBuf::from)
}

/// Whether the whole disk is looked through for what was missed.
pub(crate) fn walks_all() -> bool {
    std::env::var_os(WALK).is_some()
}

/// Whether frozen views count as those of a QEMU that needs care.
pub(crate) fn hides_status() -> bool {
    std::env::var_os(HIDES_STATUS).is_some()
}

/// The socket that stands for the system's journal.
pub(crate) fn journal_socket() -> Option<PathBuf> {
    std::env::var_os(JOURNAL).map(PathBuf::from)
}

/// Bytes from one barrier to the next.
pub(crate) fn barrier() -> Option<u64> {
    number(BARRIER)
}
