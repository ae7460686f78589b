//! Which VM is backed up when: several side by side, but never two to one file system.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::folder;
use crate::text::path_text;

/// At most so many by default: each reads a disk of the host and writes another.
pub(super) const USUAL: usize = 4;

/// How long file systems are asked which they are, all together. One that wakes up later is no reason to wait here: its
/// VM waits for it.
const PATIENCE: Duration = Duration::from_secs(5);

/// What is waiting to be done, and what nobody may do now.
struct Queue<J> {
    waiting: Vec<(usize, Option<String>, J)>,
    busy: HashSet<String>,
}

/// Does all jobs in their order, with at most `workers` at the same time, and never two at the same time that have the
/// same key. The results are in the order of the jobs.
pub(super) fn side_by_side<J: Send, R: Send>(
    jobs: Vec<(Option<String>, J)>,
    workers: usize,
    run: impl Fn(J) -> R + Sync,
) -> Vec<R> {
    let count = jobs.len();
    let waiting = jobs.into_iter().enumerate().map(|(n, (key, job))| (n, key, job)).collect();
    let queue = Mutex::new(Queue { waiting, busy: HashSet::new() });
    let (freed, results) = (Condvar::new(), Mutex::new(Vec::with_capacity(count)));
    let work = || {
        while let Some((n, key, job)) = next(&queue, &freed) {
            let result = run(job);
            held(&results).push((n, result));
            if let Some(key) = key {
                held(&queue).busy.remove(&key);
            }
            freed.notify_all();
        }
    };
    std::thread::scope(|scope| {
        // This thread is one of them, so that it is done also where no thread can be made.
        for _ in 1..workers.clamp(1, count.max(1)) {
            if let Err(e) = std::thread::Builder::new().spawn_scoped(scope, work) {
                log::warn!("fewer VMs are backed up at the same time: {e}");
            }
        }
        work();
    });
    let mut results = results.into_inner().unwrap_or_else(|e| e.into_inner());
    results.sort_by_key(|(n, _)| *n);
    results.into_iter().map(|(_, result)| result).collect()
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// The next job whose key is free; `None` if no job is left.
fn next<J>(queue: &Mutex<Queue<J>>, freed: &Condvar) -> Option<(usize, Option<String>, J)> {
    let mut now = held(queue);
    loop {
        if now.waiting.is_empty() {
            return None;
        }
        let is_free = |key: &Option<String>| key.as_ref().is_none_or(|k| !now.busy.contains(k));
        if let Some(at) = now.waiting.iter().position(|(_, key, _)| is_free(key)) {
            let job = now.waiting.remove(at);
            now.busy.extend(job.1.clone());
            return Some(job);
        }
        now = freed.wait(now).unwrap_or_else(|e| e.into_inner());
    }
}

/// What tells the file systems of targets apart, in the order of the targets. They are asked side by side, each in a
/// thread of its own: one whose server is gone answers never, and is told apart from all others.
pub(super) fn file_systems(targets: &[Option<PathBuf>]) -> Vec<Option<String>> {
    told_within(targets, PATIENCE, file_system)
}

fn told_within(
    targets: &[Option<PathBuf>],
    patience: Duration,
    ask: fn(&Path) -> Option<String>,
) -> Vec<Option<String>> {
    let silent = |t: &Option<PathBuf>| t.as_ref().map(|t| format!("silent {}", path_text(t)));
    let mut keys: Vec<Option<String>> = targets.iter().map(silent).collect();
    let (send, receive) = channel();
    for (n, target) in targets.iter().enumerate() {
        let Some(target) = target.clone() else { continue };
        let send = send.clone();
        let asked = std::thread::Builder::new().spawn(move || send.send((n, ask(&target))));
        if let Err(e) = asked {
            log::warn!("it is not known which file system a target is on: {e}");
        }
    }
    drop(send);
    let until = Instant::now() + patience;
    while let Ok((n, key)) = receive.recv_timeout(until.saturating_duration_since(Instant::now())) {
        if let Some(told) = keys.get_mut(n) {
            *told = key;
        }
    }
    keys
}

/// What tells file systems apart: the mount that the folder is in, or is made in. `None` where that is not known.
fn file_system(target: &Path) -> Option<String> {
    let real = folder::resolve_path(target).unwrap_or_else(|_| target.to_path_buf());
    real.ancestors().find_map(|folder| folder::mount_number(folder).ok())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn results_are_in_order_and_no_two_of_one_file_system_run_together() {
        let key = |n: usize| Some(["a", "b"][n % 2].to_string());
        let jobs: Vec<_> = (0..40).map(|n| (key(n), n)).collect();
        let running = [AtomicUsize::new(0), AtomicUsize::new(0)];
        let done = side_by_side(jobs, 8, |n| {
            assert_eq!(running[n % 2].fetch_add(1, Ordering::SeqCst), 0);
            std::thread::yield_now();
            running[n % 2].fetch_sub(1, Ordering::SeqCst);
            n
        });
        assert_eq!(done, (0..40).collect::<Vec<_>>());
    }

    #[test]
    fn others_go_on_beside_one_that_waits() {
        // The first ends only after the second has run.
        let (send, receive) = channel();
        let (send, receive) = (Mutex::new(send), Mutex::new(receive));
        let jobs = vec![(Some("a".to_string()), 0), (Some("b".to_string()), 1)];
        let done = side_by_side(jobs, 2, |n| match n {
            0 => receive.lock().unwrap().recv().unwrap(),
            n => send.lock().unwrap().send(n).map(|()| n).unwrap(),
        });
        assert_eq!(done, [1, 1]);
        assert_eq!(side_by_side(vec![(None, 7)], 0, |n| n), [7]);
        assert!(side_by_side(Vec::<(Option<String>, ())>::new(), 4, |()| ()).is_empty());
    }

    #[test]
    fn one_that_does_not_answer_holds_up_no_other() {
        let targets = ["/silent", "/proc", "/"].map(|t| Some(PathBuf::from(t)));
        let all = [targets.as_slice(), &[None]].concat();
        // The others are told long before this is over.
        let keys = told_within(&all, Duration::from_secs(2), |target| {
            while target == Path::new("/silent") {
                std::thread::park();
            }
            file_system(target)
        });
        assert_eq!(keys[0].as_deref(), Some("silent /silent"));
        assert!(keys[1].is_some() && keys[2].is_some() && keys[1] != keys[2], "{keys:?}");
        assert_eq!(keys[3], None);
    }

    #[test]
    fn a_target_that_is_not_made_yet_is_on_the_file_system_above() {
        let dir = tempfile::tempdir().unwrap();
        let there = file_system(dir.path());
        assert!(there.is_some());
        assert_eq!(file_system(&dir.path().join("not/yet")), there);
        assert_ne!(file_system(Path::new("/proc")), there);
    }
}
