//! [`Holds`]: what holds files open in a mount, and what lets go of them a little later. See `held_point`.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::storage::files::{self, Closed};

/// What has files that are held open.
pub(super) trait Pinned: Send + Sync {
    /// Lets go of them; called under the lock. What is to be closed is closed without it.
    fn release(&self) -> Closed;
}

/// All that is held of one mount.
#[derive(Default)]
pub struct Holds {
    state: Mutex<State>,
    pub(super) changed: Condvar,
}

#[derive(Default)]
pub(super) struct State {
    /// Open handles, whether their files are held or not.
    pub(super) handles: usize,
    /// Images of closed handles and when to let go of them, soonest first.
    pub(super) resting: VecDeque<(Instant, Arc<dyn Pinned>)>,
}

impl Holds {
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets go of what rests, for ever.
    pub fn run(&self) {
        let mut state = self.state();
        loop {
            let now = Instant::now();
            let Some((at, _)) = state.resting.front() else {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let left = at.saturating_duration_since(now);
            if !left.is_zero() {
                let waited = self.changed.wait_timeout(state, left);
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
                continue;
            }
            let done = state.let_go();
            let nothing_open = state.is_empty();
            drop(state);
            // Here the storage may take its time.
            drop(done);
            if nothing_open {
                files::close_unpinned();
            }
            state = self.state();
        }
    }
}

impl State {
    /// Lets go of one closed handle; `None` if there is none.
    pub(super) fn let_go(&mut self) -> Option<(Arc<dyn Pinned>, Closed)> {
        let (_, image) = self.resting.pop_front()?;
        let closed = image.release();
        Some((image, closed))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.handles == 0 && self.resting.is_empty()
    }
}
