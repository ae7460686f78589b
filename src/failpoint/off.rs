//! What is left of the hooks in the program that users have: nothing.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

/// Does nothing.
#[inline(always)]
pub(crate) fn step(_name: &str) {}

/// Does nothing.
#[inline(always)]
pub(crate) fn step_of(_what: &str, _command: &str) {}

/// Nothing: the program that is started has no hooks either.
#[inline(always)]
pub(crate) fn keep_from(_command: &mut Command) {}

/// Returns what it got.
#[inline(always)]
pub(crate) fn answer_timeout(usual: Duration) -> Duration {
    usual
}

/// Never.
#[inline(always)]
pub(crate) fn hold() -> Option<PathBuf> {
    None
}

/// Never.
#[inline(always)]
pub(crate) fn walks_all() -> bool {
    false
}

/// Never.
#[inline(always)]
pub(crate) fn hides_status() -> bool {
    false
}

/// Never.
#[inline(always)]
pub(crate) fn journal_socket() -> Option<PathBuf> {
    None
}

/// Never.
#[inline(always)]
pub(crate) fn barrier() -> Option<u64> {
    None
}
