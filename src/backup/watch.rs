//! What a run tells while it is at work, and what time it is.

use std::sync::Arc;
use std::time::Duration;

use crate::error::{Error, Kind, Result};
use crate::progress::Progress;

/// Receives what a run has to tell; the front end decides how it looks.
pub trait Watch: Send + Sync {
    /// A receiver for the progress of one disk.
    fn disk(&self, name: &str) -> Arc<dyn Progress>;
    /// A line for the user.
    fn say(&self, line: &str);
    /// A line that the user must not miss.
    fn warn(&self, line: &str);
    /// A line about one disk, by its name.
    fn say_of(&self, _disk: &str, line: &str) {
        self.say(line);
    }
    /// As [`Watch::say_of`], which the user must not miss.
    fn warn_of(&self, _disk: &str, line: &str) {
        self.warn(line);
    }
    /// Which run of which VM it is, as soon as that is known.
    fn run_is(&self, _run: &str, _vm: &str) {}
    /// Fails if long work that can be done later is to be given up.
    ///
    /// # Errors
    /// `Interrupted`.
    fn check_stop(&self) -> Result<()> {
        Ok(())
    }
}

/// Another one, with the flag that a signal sets.
pub(crate) struct Stopping<'a> {
    /// Receives the lines.
    pub watch: &'a dyn Watch,
    /// Set by a signal or by `cancel`.
    pub flag: &'a std::sync::atomic::AtomicBool,
}

impl Watch for Stopping<'_> {
    fn disk(&self, name: &str) -> Arc<dyn Progress> {
        self.watch.disk(name)
    }
    fn say(&self, line: &str) {
        self.watch.say(line);
    }
    fn warn(&self, line: &str) {
        self.watch.warn(line);
    }
    fn say_of(&self, disk: &str, line: &str) {
        self.watch.say_of(disk, line);
    }
    fn warn_of(&self, disk: &str, line: &str) {
        self.watch.warn_of(disk, line);
    }
    fn run_is(&self, run: &str, vm: &str) {
        self.watch.run_is(run, vm);
    }
    fn check_stop(&self) -> Result<()> {
        match self.flag.load(std::sync::atomic::Ordering::SeqCst) {
            true => Err(Error::new(Kind::Interrupted, "interrupted")),
            false => Ok(()),
        }
    }
}

/// Tells nothing, but logs.
#[derive(Debug, Clone, Copy, Default)]
pub struct Quiet;

impl Watch for Quiet {
    fn disk(&self, _name: &str) -> Arc<dyn Progress> {
        Arc::new(())
    }
    fn say(&self, line: &str) {
        log::info!("{line}");
    }
    fn warn(&self, line: &str) {
        log::warn!("{line}");
    }
}

/// Seconds since the epoch.
pub fn now() -> i64 {
    now_exactly().0
}

/// The same, and nanoseconds.
pub(in crate::backup) fn now_exactly() -> (i64, u32) {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let exact = |d: Duration| (i64::try_from(d.as_secs()).unwrap_or(i64::MAX), d.subsec_nanos());
    since.map_or((0, 0), exact)
}
