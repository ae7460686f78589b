//! Threads that are not needed now.
//!
//! State: how many rest, and how many of them have been told to stop; for how many requests in a row
//! there were more than enough without them.

use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A thread rests if so many are free, itself among them. One reader is served fastest by three threads, which
/// are left then, also where the kernel makes four requests of each of its reads.
const ENOUGH: usize = 4;
/// And were for so many requests in a row: waking a thread takes longer than a read.
const IN_A_ROW: u32 = 64;
/// A thread rests no longer than this, so that it notices when the file system is unmounted.
const LONGEST: Duration = Duration::from_millis(200);

/// Serving threads that rest.
#[derive(Default)]
pub(super) struct IdleThreads {
    resting: AtomicUsize,
    in_a_row: AtomicU32,
    told: Mutex<usize>,
    tell: Condvar,
}

impl IdleThreads {
    /// How many rest.
    pub(super) fn resting(&self) -> usize {
        self.resting.load(Ordering::SeqCst)
    }

    /// Ends the rest of one thread, if one rests. Whoever has made himself busy calls this afterwards, and
    /// whoever rests looks afterwards who is free: one of them sees the other.
    pub(super) fn end_one(&self) {
        if self.resting() == 0 {
            return;
        }
        let mut told = self.told();
        if self.less() {
            *told += 1;
            self.tell.notify_one();
        }
    }

    /// Lets this thread rest if there are more than enough, for a while, by what `free` says: how many
    /// neither rest nor are busy.
    pub(super) fn if_not_needed(&self, free: impl Fn() -> usize) {
        if free() < ENOUGH {
            // Reading first: the line stays shared between the threads' caches.
            if self.in_a_row.load(Ordering::Relaxed) != 0 {
                self.in_a_row.store(0, Ordering::Relaxed);
            }
            return;
        }
        if self.in_a_row.fetch_add(1, Ordering::Relaxed) < IN_A_ROW {
            return;
        }
        self.in_a_row.store(0, Ordering::Relaxed);
        self.resting.fetch_add(1, Ordering::SeqCst);
        if free() == 0 {
            self.end_one();
        }
        self.wait();
    }

    fn wait(&self) {
        let end = Instant::now() + LONGEST;
        let mut told = self.told();
        while *told == 0 {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                self.less();
                return;
            }
            let woken = self.tell.wait_timeout(told, left);
            told = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
        *told -= 1;
    }

    /// Counts one less, if there is one.
    fn less(&self) -> bool {
        let less = |n: usize| n.checked_sub(1);
        self.resting.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less).is_ok()
    }

    fn told(&self) -> MutexGuard<'_, usize> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether a thread rests, one of so many free ones: only then it looks again who is free.
    fn is_idle(rest: &IdleThreads, free: usize) -> bool {
        let looks = AtomicU32::new(0);
        rest.if_not_needed(|| {
            looks.fetch_add(1, Ordering::SeqCst);
            free
        });
        looks.into_inner() > 1
    }

    #[test]
    fn a_thread_idles_only_after_many_requests_that_did_not_need_it() {
        let rest = IdleThreads::default();
        assert!((0..IN_A_ROW).all(|_| !is_idle(&rest, ENOUGH)));
        assert!((0..IN_A_ROW).all(|_| !is_idle(&rest, ENOUGH - 1)));
        // What was too few once has to be enough for as long again.
        assert!((0..IN_A_ROW).all(|_| !is_idle(&rest, ENOUGH)));
        let begin = Instant::now();
        assert!(is_idle(&rest, ENOUGH));
        assert!(begin.elapsed() >= LONGEST);
        assert_eq!((rest.resting(), *rest.told()), (0, 0));
    }

    #[test]
    fn taking_the_last_free_thread_wakes_an_idle_one() {
        let rest = IdleThreads::default();
        std::thread::scope(|s| {
            let idle = s.spawn(|| (0..1000).for_each(|_| while !is_idle(&rest, ENOUGH) {}));
            while !idle.is_finished() {
                rest.end_one();
            }
        });
        rest.end_one();
        assert_eq!((rest.resting(), *rest.told()), (0, 0));
    }

    #[test]
    fn the_last_free_thread_does_not_idle() {
        let rest = IdleThreads::default();
        rest.in_a_row.store(IN_A_ROW, Ordering::SeqCst);
        let begun = AtomicU32::new(0);
        // All others became busy before this one rested.
        rest.if_not_needed(|| {
            let first = begun.fetch_add(1, Ordering::SeqCst) == 0;
            if first { ENOUGH } else { 0 }
        });
        assert_eq!((rest.resting(), *rest.told()), (0, 0));
        assert_eq!(begun.into_inner(), 2);
    }
}
