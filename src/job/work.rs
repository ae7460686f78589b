//! What every long job needs: a way to stop, progress, a number of workers, a rate limit.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::error::{Error, Kind, Result};
use crate::progress::Progress;

/// The surroundings of a job.
pub struct Work<'a> {
    /// Set by a signal: stop as soon as possible.
    pub cancel: &'a AtomicBool,
    /// Receives progress.
    pub progress: &'a dyn Progress,
    /// Threads to use, at least 1.
    pub workers: usize,
    /// Bytes per second, if limited.
    pub rate: Option<RateLimit>,
}

impl Work<'_> {
    /// Fails with `Interrupted` if the job was told to stop.
    ///
    /// # Errors
    /// `Interrupted`.
    pub fn check(&self) -> Result<()> {
        if self.cancel.load(Ordering::Relaxed) {
            return Err(Error::new(Kind::Interrupted, "interrupted"));
        }
        Ok(())
    }

    /// Reports `bytes` as done and waits if that was too fast.
    ///
    /// # Errors
    /// `Interrupted`.
    pub fn did(&self, bytes: u64) -> Result<()> {
        self.progress.advance(bytes);
        if let Some(rate) = &self.rate {
            rate.wait(bytes, self)?;
        }
        self.check()
    }
}

/// Longest sleep before a look at the stop flag.
const NAP: Duration = Duration::from_millis(100);

/// A limit on bytes per second, shared by all workers.
#[derive(Debug)]
pub struct RateLimit {
    per_second: u64,
    /// When the bytes let through so far are paid for.
    free_at: Mutex<Option<Instant>>,
}

impl RateLimit {
    /// At most `per_second` bytes each second, on average; 0 means no limit.
    pub fn new(per_second: u64) -> Option<Self> {
        (per_second > 0).then(|| RateLimit { per_second, free_at: Mutex::new(None) })
    }

    /// The limit in bytes per second.
    pub fn per_second(&self) -> u64 {
        self.per_second
    }

    fn wait(&self, bytes: u64, work: &Work) -> Result<()> {
        let until = {
            let mut free_at = self.free_at.lock().unwrap_or_else(|e| e.into_inner());
            let now = Instant::now();
            let cost = Duration::from_secs_f64(bytes as f64 / self.per_second as f64);
            let until = free_at.map_or(now, |t| t.max(now)) + cost;
            *free_at = Some(until);
            until
        };
        loop {
            work.check()?;
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(NAP));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_kept_and_a_stop_ends_the_wait() {
        let cancel = AtomicBool::new(false);
        let rate = RateLimit::new(1 << 20);
        let work = Work { cancel: &cancel, progress: &(), workers: 1, rate };
        let start = Instant::now();
        work.did(1 << 18).unwrap();
        assert!(start.elapsed() >= Duration::from_millis(240));
        cancel.store(true, Ordering::Relaxed);
        assert_eq!(work.did(1 << 30).unwrap_err().kind(), Kind::Interrupted);
        assert!(RateLimit::new(0).is_none());
    }
}
