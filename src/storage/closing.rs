//! Descriptors that nobody needs any more and that are not closed yet. To close a file may take as long as its storage
//! does, and is done without any lock; until then its descriptor counts, or those that others open would be too many.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long is waited for others to close their files: far longer than it takes, unless their storage does not answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// How many descriptors are about to be closed.
pub(super) struct Closing {
    state: Mutex<State>,
    fewer: Condvar,
}

struct State {
    open: usize,
    /// How often some were closed.
    closed: u64,
}

/// Those of the process.
pub(super) static CLOSING: Closing = Closing::new();

impl Closing {
    const fn new() -> Self {
        Closing { state: Mutex::new(State { open: 0, closed: 0 }), fewer: Condvar::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `is_enough` is true of their number, and not for ever; whether it is.
    pub(super) fn wait(&self, is_enough: impl Fn(usize) -> bool) -> bool {
        self.wait_while(self.state(), |s| !is_enough(s.open))
    }

    /// Waits as long as `goes_on`, and not for ever; whether that is over.
    fn wait_while(
        &self,
        state: MutexGuard<'_, State>,
        mut goes_on: impl FnMut(&State) -> bool,
    ) -> bool {
        let waited = self.fewer.wait_timeout_while(state, PATIENCE, |s| goes_on(s));
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        !goes_on(&state)
    }

    /// Waits until one of them is closed; `false` if there is none, or it takes too long.
    pub(super) fn wait_for_one(&self) -> bool {
        let state = self.state();
        let seen = state.closed;
        // Not their number: others may take in as many as are closed.
        state.open > 0 && self.wait_while(state, |s| s.closed == seen)
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
        self.of.state().open += 1;
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
            let _counted = Counted { closed, of: self.of };
            self.files.clear();
        }
    }
}

/// Takes them off the count, also where closing one panics.
struct Counted {
    closed: usize,
    of: &'static Closing,
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut state = self.of.state();
        state.open -= self.closed;
        state.closed += 1;
        drop(state);
        self.of.fewer.notify_all();
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
        assert_eq!((closed.files.len(), of.state().open), (2, 2));

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

        // As many come as go: one was closed all the same.
        let mut first = Closed { files: Vec::new(), of };
        first.push("one");
        let waits = std::thread::scope(|s| {
            let waits = s.spawn(|| of.wait_for_one());
            while !waits.is_finished() {
                let mut next = Closed { files: Vec::new(), of };
                next.push("another");
                drop(std::mem::replace(&mut first, next));
            }
            waits.join().unwrap()
        });
        assert!(waits);
    }
}
