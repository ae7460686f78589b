//! What `df` says: what the backups take, and what is free on the backups' own file system.
//!
//! State: the free space as it was last seen. Somebody else fills that file system without telling us,
//! and its storage may not answer: so it is asked by a thread that may be kept waiting, and for a
//! moment only is its answer waited for.

use std::io;
use std::path::Path;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::StatVfs;

use super::slow_pool::SlowPool;
use crate::folder::Folder;

/// Bytes that nobody uses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DiskSpace {
    /// All of them.
    pub free: u64,
    /// Those that users other than root may take.
    pub available: u64,
}

/// How long what was seen is good enough.
const FRESH: Duration = Duration::from_secs(1);
/// How long storage gets to answer before what was seen last is told instead.
const PATIENCE: Duration = Duration::from_millis(200);

/// The free space of one file system.
#[derive(Debug, Default)]
pub(crate) struct Free {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    room: DiskSpace,
    seen: Option<Instant>,
    /// Whether somebody is asking.
    asking: bool,
}

impl Free {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Free space on the file system that `look` looks at, by a thread of `slow_pool`.
    pub(crate) fn room(
        self: &Arc<Self>,
        look: impl FnOnce() -> io::Result<StatVfs> + Send + 'static,
        slow_pool: &Arc<SlowPool>,
    ) -> DiskSpace {
        let mut state = self.state();
        let fresh = state.seen.is_some_and(|at| at.elapsed() < FRESH);
        if fresh || state.asking {
            return state.room;
        }
        state.asking = true;
        drop(state);
        let (send, receive) = channel();
        let this = self.clone();
        slow_pool.run(Box::new(move || {
            this.ask(look);
            let _ = send.send(());
        }));
        let _ = receive.recv_timeout(PATIENCE);
        self.state().room
    }

    /// Asks now, for as long as it takes.
    pub(crate) fn ask(&self, look: impl FnOnce() -> io::Result<StatVfs>) {
        let found = look();
        let mut state = self.state();
        state.asking = false;
        state.seen = Some(Instant::now());
        if let Ok(s) = found {
            let bytes = |blocks: u64| blocks.saturating_mul(s.f_frsize);
            state.room = DiskSpace { free: bytes(s.f_bfree), available: bytes(s.f_bavail) };
        }
    }
}

/// Looks at the file system of the folder at `path`.
///
/// # Errors
/// What the operating system said.
pub(crate) fn of_folder(path: &Path) -> io::Result<StatVfs> {
    Folder::open(path)?.space()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_is_gone_leaves_what_was_seen() {
        let dir = tempfile::tempdir().unwrap();
        let (free, slow_pool) = (Arc::new(Free::default()), Arc::new(SlowPool::default()));
        free.ask(|| of_folder(dir.path()));
        let room = free.state().room;
        assert!(room.free >= room.available && room.free > 0);
        free.ask(|| of_folder(&dir.path().join("gone")));
        assert_eq!(free.room(|| Err(io::ErrorKind::NotFound.into()), &slow_pool), room);
    }

    #[test]
    fn storage_that_does_not_answer_keeps_nobody_waiting() {
        let (free, slow_pool) = (Arc::new(Free::default()), Arc::new(SlowPool::default()));
        free.state().asking = true;
        assert_eq!(free.room(|| of_folder(Path::new("/")), &slow_pool), DiskSpace::default());
    }
}
