//! Hooks for tests: a run can be counted step by step, killed or stopped at a step, held, and made to take
//! paths that few runs take.
//!
//! They are in the program only with the cargo feature `failpoint`, which tests have (by way of the package's
//! dev-dependency on itself) and users' builds have not; there, nothing is left of them (`off`). With it (`on`)
//! the environment says what to do:
//!
//! - `FLEECEFS_CRASH_AT=N`: SIGKILL when step N is reached; with a name, at the first of that name. A step is a
//!   command about to be sent, its answer, an awaited event, or a change on disk; commands that only ask, one
//!   after the other, are one step together. The crash matrix (tests/slow/crash.rs) walks through all of them
//! - `FLEECEFS_HANG_AT=NAME`: SIGSTOP at the steps of that name; with a number, at that step
//! - `FLEECEFS_STEPS=FILE`: appends a line per step to that file
//! - `FLEECEFS_STEPS_ALL=1`: each command is a step of its own, and so is each answer
//! - `FLEECEFS_ANSWER_TIMEOUT=SECONDS`: nothing waits longer for an answer of QEMU than that
//! - `FLEECEFS_HOLD=FOLDER`: while the frozen views stand and before anything is copied, they are exported over
//!   NBD, the file `ready` in it says where, and the run waits for a file `go`
//! - `FLEECEFS_WALK=1`: what is copied besides the dirty bits is also looked for in the whole disk, and a
//!   backup that has missed something fails
//! - `FLEECEFS_HIDES_STATUS=1`: every QEMU's frozen view counts as one that cannot be read across clusters
//! - `FLEECEFS_BARRIER=BYTES`: how much an image grows from one barrier to the next; a single processor is
//!   enough then
//! - `FLEECEFS_JOURNAL=SOCKET`: messages for the system log go to that socket

#[cfg(not(feature = "failpoint"))]
mod off;
#[cfg(feature = "failpoint")]
mod on;

#[cfg(not(feature = "failpoint"))]
pub(crate) use off::{
    answer_timeout, barrier, hides_status, hold, journal_socket, keep_from, step, step_of,
    walks_all,
};
#[cfg(feature = "failpoint")]
pub(crate) use on::{
    answer_timeout, barrier, hides_status, hold, journal_socket, keep_from, step, step_of,
    walks_all,
};

/// How unit tests try properties: in so many cases, and first in those that have failed once, which are kept below
/// `tests/`.
#[cfg(test)]
pub(crate) fn properties(cases: u32) -> proptest::test_runner::Config {
    use proptest::test_runner::{Config, FileFailurePersistence};
    let failed = FileFailurePersistence::SourceParallel("tests/proptest-regressions");
    Config { cases, failure_persistence: Some(Box::new(failed)), ..Config::default() }
}
