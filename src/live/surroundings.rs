//! What all of a live restore works with.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use serde::Deserialize;

use super::storage::Storage;
use crate::backup::Watch;

/// What it works with.
pub(crate) struct Surroundings<'a> {
    /// The storage folder.
    pub storage: &'a Storage,
    /// Receives lines and progress.
    pub watch: &'a dyn Watch,
    /// Ends it; the VM runs on.
    pub cancel: &'a Arc<AtomicBool>,
    /// At most so many bytes per second and disk; 0 for no limit.
    pub rate: u64,
}

/// `query-status`.
#[derive(Debug, Deserialize)]
pub(super) struct Status {
    /// Such as `running`, `prelaunch`, `io-error`.
    pub status: String,
}
