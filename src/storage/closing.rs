//! Descriptors that nobody needs any more and that are not closed yet. To close a file may take as long as its storage
//! does, and is done without any lock; until then its descriptor counts, or those that others open would be too many.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long is waited for others to close their files: far longer than it takes, unless their storage does not answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// How many descriptors are about to be closed.
pub(super) struct Closing {
    count: Mutex<usize>,
    fewer: Condvar,
}

/// Those of the process.
pub(super) static CLOSING: Closing = Closing::new();

impl Closing {
    const fn new() -> Self {
        Closing { count: Mutex::new(0), fewer: Condvar::new() }
    }

    fn count(&self) -> MutexGuard<'_, usize> {
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `is_enough` is true of their number, and not for ever; whether it is.
    pub(super) fn wait(&self, is_enough: impl Fn(usize) -> bool) -> bool {
        let waited = self.fewer.wait_timeout_while(self.count(), PATIENCE, |n| !is_enough(*n));
        let (count, _) = waited.unwrap_or_else(PoisonError::into_inner);
        is_enough(*count)
    }

    /// Waits until one of them is closed; `false` if there is none, or it takes too long.
    pub(super) fn wait_for_one(&self) -> bool {
        let before = *self.count();
        before > 0 && self.wait(|n| n < before)
    }
}

/// Files that are out of their slots. They are closed where this is dropped, which may take as long as their storage
/// does.
pub(crate) struct Closed<T> {
    files: Vec<T>,
    of: &'static Closing,
}

impl<T> Default for Closed<T> {
    fn default() -> Self {
        Closed { files: Vec::new(), of: &CLOSING }
    }
}

impl<T> Closed<T> {
    /// Takes in an open file.
    pub(super) fn push(&mut self, file: T) {
        self.files.push(file);
        *self.of.count() += 1;
    }

    /// All of both.
    pub(crate) fn append(&mut self, mut other: Self) {
        self.files.append(&mut other.files);
    }

    /// Whether there are none.
    pub(super) fn is_empty(&self) -> bool {
        self.files.is_empty()
    }
}

impl<T> Drop for Closed<T> {
    fn drop(&mut self) {
        let closed = self.files.len();
        if closed > 0 {
            self.files.clear();
            *self.of.count() -= closed;
            self.of.fewer.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn who_waits_goes_on_when_the_files_are_closed() {
        let of: &'static Closing = Box::leak(Box::new(Closing::new()));
        let mut closed = Closed { files: Vec::new(), of };
        closed.push("one");
        let mut more = Closed { files: Vec::new(), of };
        more.push("another");
        closed.append(more);
        assert_eq!((closed.files.len(), *of.count()), (2, 2));

        let (asked, was_asked) = channel();
        static DONE: AtomicBool = AtomicBool::new(false);
        let closes = std::thread::spawn(move || {
            was_asked.recv().unwrap();
            DONE.store(true, Ordering::SeqCst);
            drop(closed);
        });
        let first = Cell::new(true);
        let enough = |n| {
            if first.replace(false) {
                asked.send(()).unwrap();
            }
            n == 0
        };
        assert!(of.wait(enough) && DONE.load(Ordering::SeqCst));
        closes.join().unwrap();
        assert!(!of.wait_for_one(), "there is nothing to wait for");
    }
}
