//! Locks by which writers of one place exclude each other.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::map::BLOCK;

/// Blocks that share a lock with their neighbours: as many as the kernel sends in one request.
const BLOCKS: u64 = (1 << 20) / BLOCK;
/// Locks: more than threads that write.
const LOCKS: usize = 64;

/// The locks of an overlay.
#[derive(Debug)]
pub(super) struct Stripes([Mutex<()>; LOCKS]);

impl Default for Stripes {
    fn default() -> Self {
        Stripes([const { Mutex::new(()) }; LOCKS])
    }
}

impl Stripes {
    /// Locks these blocks until the guards go. Always in the order of the locks, so that nobody waits in a circle.
    pub(super) fn lock(&self, blocks: &Range<u64>) -> Vec<MutexGuard<'_, ()>> {
        let mut wanted = [false; LOCKS];
        let stretches = blocks.start / BLOCKS..blocks.end.div_ceil(BLOCKS);
        stretches.take(LOCKS).for_each(|s| wanted[(s % LOCKS as u64) as usize] = true);
        let locks = self.0.iter().zip(wanted).filter(|(_, wanted)| *wanted);
        locks.map(|(lock, _)| lock.lock().unwrap_or_else(PoisonError::into_inner)).collect()
    }

    /// Whether somebody has the lock of this block.
    #[cfg(test)]
    pub(super) fn is_locked(&self, block: u64) -> bool {
        self.0[(block / BLOCKS % LOCKS as u64) as usize].try_lock().is_err()
    }
}
