//! One bounded cache for all readers of files: blocks of points as they are, and what readers made of them.
//!
//! State: a least-recently-used list under one lock, and how many bytes readers hold beside it. Nothing is read
//! under the lock; two who miss the same block both read it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lru::LruCache;

use crate::error::{Error, Kind, Result};

/// Roughly what the list itself takes for an entry.
const ENTRY_OVERHEAD: u64 = 128;

/// What an entry is: of which source, which of the reader's own kinds (0: the source's blocks), which number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub source: u64,
    pub space: u8,
    pub number: u64,
}

struct Inner {
    list: LruCache<Key, Arc<[u8]>>,
    used: u64,
}

/// The cache; shared by all that reads files.
pub struct Blocks {
    limit: u64,
    inner: Mutex<Inner>,
    /// Bytes that readers hold: they leave the list so much less.
    held: AtomicU64,
    next_id: AtomicU64,
}

impl Blocks {
    /// A cache that takes at most `limit` bytes, with what readers hold.
    pub fn new(limit: u64) -> Arc<Self> {
        let inner = Mutex::new(Inner { list: LruCache::unbounded(), used: 0 });
        Arc::new(Blocks { limit, inner, held: AtomicU64::new(0), next_id: AtomicU64::new(1) })
    }

    /// Counts `bytes` that a reader keeps in memory as long as the answer lives: a journal's map, a table of
    /// clusters.
    ///
    /// # Errors
    /// `Unsupported` if readers would hold more than three quarters of the cache.
    pub fn hold(self: &Arc<Self>, bytes: u64) -> Result<Holding> {
        let holding = Holding { blocks: self.clone(), bytes };
        let before = self.held.fetch_add(bytes, Ordering::Relaxed);
        if before.saturating_add(bytes) > self.limit - self.limit / 4 {
            let what = "this file system's tables need more memory than --cache-size allows";
            return Err(Error::new(Kind::Unsupported, what).remedy("give a larger --cache-size"));
        }
        self.evict(&mut self.lock());
        Ok(holding)
    }

    /// Bytes in use, with what readers hold.
    pub fn used(&self) -> u64 {
        self.lock().used + self.held.load(Ordering::Relaxed)
    }

    /// Whether readers hold so much that another may find too little: whoever keeps file systems open should close
    /// some.
    pub fn is_tight(&self) -> bool {
        self.held.load(Ordering::Relaxed) > self.limit / 4
    }

    /// A number that tells one source from all others.
    pub(super) fn new_id(&self) -> u64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    pub(super) fn get(&self, key: Key) -> Option<Arc<[u8]>> {
        self.lock().list.get(&key).cloned()
    }

    pub(super) fn put(&self, key: Key, bytes: &Arc<[u8]>) {
        let size = bytes.len() as u64 + ENTRY_OVERHEAD;
        if size > self.free_bytes() {
            return;
        }
        let mut inner = self.lock();
        inner.used += size;
        if let Some(old) = inner.list.put(key, bytes.clone()) {
            inner.used -= old.len() as u64 + ENTRY_OVERHEAD;
        }
        self.evict(&mut inner);
    }

    fn free_bytes(&self) -> u64 {
        self.limit.saturating_sub(self.held.load(Ordering::Relaxed))
    }

    fn evict(&self, inner: &mut Inner) {
        let room = self.free_bytes();
        while inner.used > room
            && let Some((_, old)) = inner.list.pop_lru()
        {
            inner.used -= old.len() as u64 + ENTRY_OVERHEAD;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Memory that a reader holds; given back when it is dropped.
pub struct Holding {
    blocks: Arc<Blocks>,
    bytes: u64,
}

impl Drop for Holding {
    fn drop(&mut self) {
        self.blocks.held.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_leaves_less_for_blocks_and_all_stays_within_the_bound() {
        let blocks = Blocks::new(100_000);
        let fill = || {
            (0..100).for_each(|number| {
                blocks.put(Key { source: 1, space: 0, number }, &Arc::from(vec![7; 4096]));
                assert!(blocks.used() <= 100_000);
            });
        };
        fill();
        assert!(blocks.get(Key { source: 1, space: 0, number: 99 }).is_some());
        assert!(blocks.get(Key { source: 1, space: 0, number: 1 }).is_none());
        let held = blocks.hold(60_000).unwrap();
        assert!(blocks.used() <= 100_000);
        fill();
        assert_eq!(blocks.hold(60_000).err().unwrap().kind(), Kind::Unsupported);
        drop(held);
        assert!(blocks.hold(60_000).is_ok());
    }
}
