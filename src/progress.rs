//! Progress of long work as a trait: the library reports, the front end decides what to show.

use std::time::Duration;

/// How far a job is that also passes over what needs no copying, such as the holes of a disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Position {
    /// Bytes that are behind it, copied or not.
    pub at: u64,
    /// Bytes that it has to pass in all.
    pub of: u64,
    /// Holes take as long as data (QEMU limits the speed of both), or what is copied cannot be
    /// told beforehand: the time left follows from the position.
    pub paced: bool,
}

/// Receives progress. All methods have an empty default, so `()` is a quiet receiver.
pub trait Progress: Send + Sync {
    /// Work named `what` of `total` bytes begins.
    fn begin(&self, what: &str, total: u64) {
        let _ = (what, total);
    }
    /// `bytes` more are done.
    fn advance(&self, bytes: u64) {
        let _ = bytes;
    }
    /// Where the job is; only for those in which this differs from what is done.
    fn position(&self, position: Position) {
        let _ = position;
    }
    /// A line worth showing beside the bar.
    fn note(&self, text: &str) {
        let _ = text;
    }
    /// The work is over.
    fn end(&self, took: Duration) {
        let _ = took;
    }
}

impl Progress for () {}
