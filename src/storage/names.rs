//! [`Names`]: whether a file's change time moved only because it got or lost a name.

use std::io;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use super::identity::Identity;

/// Change time and link count as they were last seen with the same bytes. Adding or removing a name
/// moves both; from then on the new pair is what the file is compared with.
#[derive(Debug)]
pub(super) struct Names {
    /// Nanoseconds since the epoch: enough until 2262.
    ctime: AtomicI64,
    nlink: AtomicU64,
    /// Whether the name's end has explained a new ctime: it does so once. Held while the pair is
    /// replaced; a reader that sees half of a new pair asks again under it.
    name_went: Mutex<bool>,
}

/// What else has to be asked of a file whose change time moved.
pub(super) struct Ask<'a> {
    /// What it looks like now; `None` if it is not the same file, or its bytes are not.
    pub(super) now: &'a dyn Fn() -> io::Result<Option<Identity>>,
    /// Whether nothing has its name any more.
    pub(super) is_gone: &'a dyn Fn() -> bool,
    /// Whether nothing was written to it; `None` if nobody knows.
    pub(super) unwritten: &'a dyn Fn() -> Option<bool>,
}

impl Names {
    pub(super) fn of(identity: &Identity) -> Self {
        Names {
            ctime: AtomicI64::new(identity.ctime as i64),
            nlink: AtomicU64::new(identity.nlink),
            name_went: Mutex::new(false),
        }
    }

    /// Whether ctime and link count are what they were, or moved together; or whether the one name that
    /// is known is gone while another one came (link-disk, a rename): that moves ctime and leaves the count
    /// as it was. Either can hide a write, and so counts only where nothing was written.
    ///
    /// # Errors
    /// It cannot be looked at again.
    pub(super) fn allow(&self, seen: &Identity, ask: &Ask<'_>) -> io::Result<bool> {
        if self.compare(seen) == (true, true) {
            return Ok(true);
        }
        let mut name_went = self.name_went.lock().unwrap_or_else(PoisonError::into_inner);
        // What was seen may be older than what another thread has seen since.
        let Some(now) = (ask.now)()? else { return Ok(false) };
        let (same_ctime, same_nlink) = self.compare(&now);
        // Clocks tick coarsely: a name can come within the tick of the last change.
        if !same_ctime {
            let gone = (ask.is_gone)();
            let renamed = same_nlink && gone && !*name_went;
            // Where nobody knows of writes, a new count has to do.
            let explained = match (ask.unwritten)() {
                Some(unwritten) => unwritten && (renamed || !same_nlink),
                None => !same_nlink,
            };
            if !explained {
                return Ok(false);
            }
            // Whichever of both it was that moved ctime: it will not go a second time.
            *name_went = *name_went || gone;
        }
        self.nlink.store(now.nlink, Ordering::Release);
        self.ctime.store(now.ctime as i64, Ordering::Release);
        Ok(true)
    }

    fn compare(&self, now: &Identity) -> (bool, bool) {
        let old = (self.ctime.load(Ordering::Acquire), self.nlink.load(Ordering::Acquire));
        (old.0 == now.ctime as i64, old.1 == now.nlink)
    }
}
