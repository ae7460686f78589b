//! Threads for what may take minutes, apart from those that serve requests.
//!
//! State: the jobs that nobody has taken yet, and how many threads there are and wait for one. A
//! thread is started when none is free, up to a bound, and ends when it had nothing to do for a
//! while: usually there is none at all.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

/// A job for a thread of the pool. It must not panic.
pub(crate) type Job = Box<dyn FnOnce() + Send>;

/// More than this wait their turn; each may unpack an archive of its own.
const MAX_THREADS: usize = 64;
/// How long a thread without work stays.
const REST: Duration = Duration::from_secs(10);

/// Runs jobs that may take long.
#[derive(Default)]
pub struct SlowPool {
    state: Mutex<State>,
    work: Condvar,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
}

impl SlowPool {
    /// What its threads are called.
    pub const THREAD: &str = "slow";

    /// Has `job` done by another thread; by this one only if there is no other and none can be
    /// started.
    pub fn run(self: &Arc<Self>, job: Job) {
        let mut state = self.state();
        state.jobs.push_back(job);
        if state.idle >= state.jobs.len() || state.threads >= MAX_THREADS {
            self.work.notify_one();
            return;
        }
        let slow_pool = self.clone();
        let started = std::thread::Builder::new()
            .name(SlowPool::THREAD.into())
            .spawn(move || slow_pool.serve());
        match started {
            Ok(_) => state.threads += 1,
            Err(e) => {
                log::error!("cannot start a thread: {e}");
                let own = if state.threads == 0 { state.jobs.pop_back() } else { None };
                drop(state);
                own.into_iter().for_each(|job| job());
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn serve(&self) {
        let mut state = self.state();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                job();
                state = self.state();
                continue;
            }
            state.idle += 1;
            let waited = self.work.wait_timeout(state, REST);
            let (woken, timeout) = waited.unwrap_or_else(|e| e.into_inner());
            state = woken;
            state.idle -= 1;
            if timeout.timed_out() && state.jobs.is_empty() {
                state.threads -= 1;
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn one_that_waits_keeps_nobody_else_waiting() {
        let slow_pool = Arc::new(SlowPool::default());
        let (release, released) = channel::<()>();
        let (send, receive) = channel();
        let first = send.clone();
        slow_pool.run(Box::new(move || {
            let _ = released.recv();
            let _ = first.send(0);
        }));
        // None of these could be done by the thread that waits.
        for i in 1..=3 {
            let send = send.clone();
            slow_pool.run(Box::new(move || send.send(i).unwrap_or(())));
        }
        let mut done: Vec<i32> = (0..3).map(|_| receive.recv().unwrap()).collect();
        done.sort();
        assert_eq!(done, [1, 2, 3]);
        release.send(()).unwrap();
        assert_eq!(receive.recv(), Ok(0));
    }

    #[test]
    fn all_jobs_are_done_even_if_they_are_more_than_threads() {
        let slow_pool = Arc::new(SlowPool::default());
        let (send, receive) = channel();
        for i in 0..500 {
            let send = send.clone();
            slow_pool.run(Box::new(move || send.send(i).unwrap_or(())));
        }
        let mut done: Vec<i32> = (0..500).map(|_| receive.recv().unwrap()).collect();
        done.sort();
        assert!(done.into_iter().eq(0..500));
    }
}
