//! Workers that share a list of jobs: each takes the next one; the first error stops all.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::Work;
use crate::error::{Error, Kind, Result};

/// Runs `job(state, index)` for each index below `jobs`. Each worker makes its own `state` once.
///
/// # Errors
/// The first error of a job, or `Interrupted`.
pub(crate) fn run<S>(
    jobs: usize,
    work: &Work,
    state: impl Fn() -> S + Sync,
    job: impl Fn(&mut S, usize) -> Result<()> + Sync,
) -> Result<()> {
    let next = AtomicUsize::new(0);
    let failed = AtomicBool::new(false);
    let first = Mutex::new(None);
    let worker = || {
        let mut state = state();
        while !failed.load(Ordering::Relaxed) {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= jobs {
                return;
            }
            if let Err(e) = work.check().and_then(|()| job(&mut state, index)) {
                failed.store(true, Ordering::Relaxed);
                first.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(e);
            }
        }
    };
    let extra = work.workers.min(jobs).saturating_sub(1);
    std::thread::scope(|scope| {
        for _ in 0..extra {
            let spawned = std::thread::Builder::new().name("restore".into());
            // Too few threads only make it slower.
            if let Err(e) = spawned.spawn_scoped(scope, worker) {
                log::warn!("cannot start a worker: {e}");
            }
        }
        worker();
    });
    first.into_inner().unwrap_or_else(|e| e.into_inner()).map_or(Ok(()), Err)
}

/// The error for a range that does not fit into memory's address space.
pub(crate) fn too_large() -> Error {
    Error::new(Kind::Unsupported, "the disk is too large for this machine")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;

    #[test]
    fn every_job_runs_once_and_the_first_error_ends_it() {
        let cancel = AtomicBool::new(false);
        let work = Work { cancel: &cancel, progress: &(), workers: 4, rate: None };
        let sum = AtomicU64::new(0);
        let add = |_: &mut (), i: usize| {
            sum.fetch_add(i as u64, Ordering::Relaxed);
            Ok(())
        };
        run(100, &work, || (), add).unwrap();
        assert_eq!(sum.load(Ordering::Relaxed), 4950);
        let fails = |_: &mut (), i: usize| match i {
            7 => Err(Error::new(Kind::Io, "seven")),
            _ => Ok(()),
        };
        assert_eq!(run(1000, &work, || (), fails).unwrap_err().message(), "seven");
        cancel.store(true, Ordering::Relaxed);
        assert_eq!(run(1, &work, || (), add).unwrap_err().kind(), Kind::Interrupted);
    }
}
