//! Progress of long work as a trait: the library reports, the front end decides what to show.

use std::time::Duration;

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
