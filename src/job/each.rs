//! The same for each of many things that take little time, by a few threads: what they wait for, a
//! disk or a share, they wait for together.

use std::panic::resume_unwind;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, ScopedJoinHandle};

/// Threads, the calling one among them. More would be of use on slow storage alone.
const THREADS: usize = 4;
/// For fewer things than this a thread is not worth its start; it takes as many at a time.
const AT_ONCE: usize = 8;

/// What `job` makes of each of `items`, in their order.
pub(crate) fn each<T: Sync, R: Send>(items: &[T], job: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::new();
        loop {
            let first = next.fetch_add(AT_ONCE, Ordering::Relaxed);
            let Some(rest) = items.get(first..).filter(|rest| !rest.is_empty()) else {
                return done;
            };
            done.extend((first..).zip(rest.iter().take(AT_ONCE).map(&job)));
        }
    };
    let helpers = (items.len() / AT_ONCE).min(THREADS - 1);
    let mut done = thread::scope(|scope| {
        // Where no thread can be had, this one does it all.
        let spawn = |_| thread::Builder::new().name("each".into()).spawn_scoped(scope, work).ok();
        let helpers: Vec<_> = (0..helpers).map_while(spawn).collect();
        let mut done = work();
        helpers.into_iter().for_each(|helper| done.extend(joined(helper)));
        done
    });
    done.sort_unstable_by_key(|(index, _)| *index);
    done.into_iter().map(|(_, result)| result).collect()
}

fn joined<R>(helper: ScopedJoinHandle<'_, R>) -> R {
    helper.join().unwrap_or_else(|panic| resume_unwind(panic))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_done_once_and_the_results_are_in_order() {
        for n in [0, 1, AT_ONCE - 1, AT_ONCE, AT_ONCE + 1, 1000] {
            let items: Vec<usize> = (0..n).collect();
            let calls = AtomicUsize::new(0);
            let twice = each(&items, |i| {
                calls.fetch_add(1, Ordering::Relaxed);
                i * 2
            });
            assert!(twice.into_iter().eq((0..n).map(|i| i * 2)));
            assert_eq!(calls.into_inner(), n);
        }
    }

    #[test]
    fn what_one_waits_for_keeps_the_others_going() {
        // Who does the first is kept until somebody else has done the last.
        let (tell, told) = std::sync::mpsc::channel();
        let told = std::sync::Mutex::new(told);
        let items: Vec<usize> = (0..THREADS * AT_ONCE).collect();
        let done = each(&items, |i| match i {
            0 => drop(told.lock().unwrap().recv().unwrap()),
            i if i + 1 == items.len() => tell.send(*i).unwrap(),
            _ => {}
        });
        assert_eq!(done.len(), items.len());
    }
}
