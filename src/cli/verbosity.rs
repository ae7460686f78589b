//! How much is said, and words that several commands say.

use std::sync::atomic::{AtomicU8, Ordering};

use crate::error::{Error, Kind};

/// How often `-q` was given.
static QUIET: AtomicU8 = AtomicU8::new(0);

/// Remembers how often `-q` was given.
pub(super) fn set_quiet(times: u8) {
    QUIET.store(times, Ordering::Relaxed);
}

/// How often `-v` was given.
static VERBOSE: AtomicU8 = AtomicU8::new(0);

/// Remembers how often `-v` was given.
pub(super) fn set_verbose(times: u8) {
    VERBOSE.store(times, Ordering::Relaxed);
}

/// Whether the user wants to see more (`-v`).
pub(super) fn is_verbose() -> bool {
    VERBOSE.load(Ordering::Relaxed) > 0
}

/// Whether the user wants to see warnings and errors only (`-q`).
pub(super) fn is_quiet() -> bool {
    QUIET.load(Ordering::Relaxed) > 0
}

/// Whether the user wants to see errors only (`-qq`).
pub(super) fn is_silent() -> bool {
    QUIET.load(Ordering::Relaxed) > 1
}

/// The last line of what a dry run says.
pub(super) const UNCHANGED: &str = "dry run: nothing was changed\n";

/// A usage error.
pub(super) fn usage(message: impl Into<String>) -> Error {
    Error::new(Kind::Usage, message)
}
