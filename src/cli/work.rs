//! What the long commands share: how many threads, how fast, how they are stopped.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::Args;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::error::{Error, Result};
use crate::job::{RateLimit, Work};
use crate::progress::Progress;

/// Options of long work.
#[derive(Debug, Args)]
pub(super) struct WorkArgs {
    /// Number of threads that read and write [default: one per processor, 4 to 8]
    #[arg(long, alias = "jobs", value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    workers: Option<u16>,
    /// At most this many bytes per second (K, M, G); 0: no limit
    #[arg(long, alias = "speed-limit", value_name = "BYTES", default_value = "0", value_parser = crate::units::parse_bytes)]
    pub rate_limit: u64,
}

/// Some wait for the disk while others copy.
const LEAST_WORKERS: usize = 4;
/// More threads than this only help where each waits for a network.
const MOST_WORKERS: usize = 8;

impl WorkArgs {
    /// The surroundings of a job that `cancel` stops.
    pub(super) fn work<'a>(&self, cancel: &'a AtomicBool, progress: &'a dyn Progress) -> Work<'a> {
        let processors = std::thread::available_parallelism().map_or(1, |n| n.get());
        let workers = processors.clamp(LEAST_WORKERS, MOST_WORKERS);
        let workers = self.workers.map_or(workers, usize::from);
        Work { cancel, progress, workers, rate: RateLimit::new(self.rate_limit) }
    }
}

const SIGNALS: [i32; 3] = [SIGINT, SIGTERM, SIGHUP];

/// A flag that SIGINT, SIGTERM and SIGHUP (a lost terminal) set. The second signal ends the process at once:
/// what is written has a temporary name, or a journal.
///
/// # Errors
/// `Io` if the system refuses the handlers.
pub(super) fn cancel_flag() -> Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    for signal in SIGNALS {
        let status = 128 + signal;
        signal_hook::flag::register_conditional_shutdown(signal, status, flag.clone())
            .map_err(no_handler)?;
        signal_hook::flag::register(signal, flag.clone()).map_err(no_handler)?;
    }
    Ok(flag)
}

/// The same for a backup, which a second signal does not end either: what it did to the guest has to be undone.
///
/// # Errors
/// `Io` if the system refuses the handlers.
pub(super) fn undo_flag() -> Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    for signal in SIGNALS {
        signal_hook::flag::register(signal, flag.clone()).map_err(no_handler)?;
    }
    Ok(flag)
}

fn no_handler(e: std::io::Error) -> Error {
    Error::io(e, "cannot set up signal handling")
}
