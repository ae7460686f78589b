//! Threads that are not needed now.
//!
//! State: how many threads are idle, and how many of those have been woken; for how many requests in a row
//! there were more than enough threads without them.

use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A thread goes idle if so many are free, itself among them. One reader is served fastest by three threads, which
/// are left then, also where the kernel makes four requests of each of its reads.
const ENOUGH: usize = 4;
/// And were for so many requests in a row: waking a thread takes longer than a read.
const IN_A_ROW: u32 = 64;
/// A thread is idle no longer than this, so that it notices when the file system is unmounted.
const LONGEST: Duration = Duration::from_millis(200);

/// Serving threads that are idle: they take no requests.
#[derive(Default)]
pub(super) struct IdleThreads {
    idle: AtomicUsize,
    in_a_row: AtomicU32,
    to_wake: Mutex<usize>,
    wake: Condvar,
}

impl IdleThreads {
    /// How many are idle.
    pub(super) fn idle(&self) -> usize {
        self.idle.load(Ordering::SeqCst)
    }

    /// Wakes one idle thread, if there is one. A thread that has become busy calls this afterwards, and a
    /// thread that goes idle looks afterwards how many are free: one of the two sees the other.
    pub(super) fn end_one(&self) {
        if self.idle() == 0 {
            return;
        }
        let mut to_wake = self.to_wake();
        if self.less() {
            *to_wake += 1;
            self.wake.notify_one();
        }
    }

    /// Lets this thread go idle for a while if more than enough are free. `free` counts the threads that
    /// are neither idle nor busy.
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
        self.idle.fetch_add(1, Ordering::SeqCst);
        if free() == 0 {
            self.end_one();
        }
        self.wait();
    }

    fn wait(&self) {
        let end = Instant::now() + LONGEST;
        let mut to_wake = self.to_wake();
        while *to_wake == 0 {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                self.less();
                return;
            }
            let woken = self.wake.wait_timeout(to_wake, left);
            to_wake = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
        *to_wake -= 1;
    }

    /// Counts one less, if there is one.
    fn less(&self) -> bool {
        let less = |n: usize| n.checked_sub(1);
        self.idle.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less).is_ok()
    }

    fn to_wake(&self) -> MutexGuard<'_, usize> {
        self.to_wake.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether a thread rests, one of so many free ones: only then it looks again who is free.
    fn is_idle(threads: &IdleThreads, free: usize) -> bool {
        let looks = AtomicU32::new(0);
        threads.if_not_needed(|| {
            looks.fetch_add(1, Ordering::SeqCst);
            free
        });
        looks.into_inner() > 1
    }

    #[test]
    fn a_thread_idles_only_after_many_requests_that_did_not_need_it() {
        let threads = IdleThreads::default();
        assert!((0..IN_A_ROW).all(|_| !is_idle(&threads, ENOUGH)));
        assert!((0..IN_A_ROW).all(|_| !is_idle(&threads, ENOUGH - 1)));
        // What was too few once has to be enough for as long again.
        assert!((0..IN_A_ROW).all(|_| !is_idle(&threads, ENOUGH)));
        let begin = Instant::now();
        assert!(is_idle(&threads, ENOUGH));
        assert!(begin.elapsed() >= LONGEST);
        assert_eq!((threads.idle(), *threads.to_wake()), (0, 0));
    }

    #[test]
    fn taking_the_last_free_thread_wakes_an_idle_one() {
        let threads = IdleThreads::default();
        std::thread::scope(|s| {
            let idle = s.spawn(|| (0..1000).for_each(|_| while !is_idle(&threads, ENOUGH) {}));
            while !idle.is_finished() {
                threads.end_one();
            }
        });
        threads.end_one();
        assert_eq!((threads.idle(), *threads.to_wake()), (0, 0));
    }

    #[test]
    fn the_last_free_thread_does_not_idle() {
        let threads = IdleThreads::default();
        threads.in_a_row.store(IN_A_ROW, Ordering::SeqCst);
        let begun = AtomicU32::new(0);
        // All others became busy before this one went idle.
        threads.if_not_needed(|| {
            let first = begun.fetch_add(1, Ordering::SeqCst) == 0;
            if first { ENOUGH } else { 0 }
        });
        assert_eq!((threads.idle(), *threads.to_wake()), (0, 0));
        assert_eq!(begun.into_inner(), 2);
    }
}
