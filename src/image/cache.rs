//! One bounded cache for folded windows and decompressed units.
//!
//! Windows are read without a lock: each image keeps them in atomically swapped slots, and a read
//! only sets the window's `touched` flag. This cache decides what stays: a least-recently-used
//! list, in which a window that was touched since it was last looked at gets a second chance.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use arc_swap::ArcSwapOption;
use lru::LruCache;

use super::hold::Holds;
use super::window::Window;

/// Roughly what the list itself takes for an entry.
const ENTRY_OVERHEAD: usize = 128;

/// Where a window can be found without a lock.
pub type Slot = ArcSwapOption<Window>;

/// The slots of 64 neighbouring windows.
#[derive(Debug)]
pub struct SlotGroup {
    /// One per window.
    pub slots: [Slot; SlotGroup::LEN],
}

impl Default for SlotGroup {
    fn default() -> Self {
        SlotGroup { slots: std::array::from_fn(|_| Slot::empty()) }
    }
}

impl SlotGroup {
    /// Windows in a group.
    pub const LEN: usize = 64;
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Key {
    Window { image: u64, index: u64 },
    Unit { layer: u64, host: u64 },
}

enum Entry {
    Window { window: Arc<Window>, group: Weak<SlotGroup>, slot: usize },
    Unit(Arc<[u8]>),
}

impl Entry {
    fn bytes(&self) -> u64 {
        match self {
            Entry::Window { window, .. } => (window.bytes() + ENTRY_OVERHEAD) as u64,
            Entry::Unit(data) => (data.len() + ENTRY_OVERHEAD) as u64,
        }
    }

    /// Whether it was used since the last time this was asked.
    fn take_touched(&self) -> bool {
        match self {
            Entry::Window { window, .. } => window.take_touched(),
            Entry::Unit(_) => false,
        }
    }

    /// Takes a window out of its slot, so that its memory is freed.
    fn clear_slot(&self) {
        if let Entry::Window { window, group, slot } = self
            && let Some(group) = group.upgrade()
        {
            group.slots[*slot].compare_and_swap(window, None);
        }
    }
}

struct Inner {
    list: LruCache<Key, Entry>,
    used: u64,
    evictions: u64,
}

/// What the cache holds, for status.json.
#[derive(Debug, Clone, Copy, serde::Serialize)]
pub struct CacheFigures {
    /// The bound in bytes.
    pub limit: u64,
    /// Bytes in use.
    pub used: u64,
    /// Windows and units in use.
    pub entries: u64,
    /// How many were dropped to stay below the bound.
    pub evictions: u64,
    /// How many windows were folded.
    pub folds: u64,
    /// How many units were decompressed.
    pub decompressions: u64,
}

/// The cache; shared by all images of a mount.
pub struct Cache {
    limit: u64,
    inner: Mutex<Inner>,
    folds: AtomicU64,
    decompressions: AtomicU64,
    next_id: AtomicU64,
    holds: Holds,
}

impl Cache {
    /// A cache that holds at most `limit` bytes.
    pub fn new(limit: u64) -> Arc<Self> {
        Arc::new(Cache {
            limit,
            inner: Mutex::new(Inner { list: LruCache::unbounded(), used: 0, evictions: 0 }),
            folds: AtomicU64::new(0),
            decompressions: AtomicU64::new(0),
            next_id: AtomicU64::new(1),
            holds: Holds::default(),
        })
    }

    /// What it holds now.
    pub fn figures(&self) -> CacheFigures {
        let inner = self.lock();
        CacheFigures {
            limit: self.limit,
            used: inner.used,
            entries: inner.list.len() as u64,
            evictions: inner.evictions,
            folds: self.folds.load(Ordering::Relaxed),
            decompressions: self.decompressions.load(Ordering::Relaxed),
        }
    }

    /// What is held open of the images that use this cache.
    pub fn holds(&self) -> &Holds {
        &self.holds
    }

    /// A number that tells one image or layer from all others.
    pub(super) fn new_id(&self) -> u64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    /// Puts a freshly folded window into its slot and into the list.
    pub(super) fn insert_window(
        &self,
        image: u64,
        index: u64,
        window: &Arc<Window>,
        group: &Arc<SlotGroup>,
    ) {
        self.folds.fetch_add(1, Ordering::Relaxed);
        let slot = index as usize % SlotGroup::LEN;
        let entry = Entry::Window { window: window.clone(), group: Arc::downgrade(group), slot };
        if entry.bytes() > self.limit {
            return;
        }
        let mut inner = self.lock();
        group.slots[slot].store(Some(window.clone()));
        self.insert(&mut inner, Key::Window { image, index }, entry);
    }

    /// Forgets a window of an image that goes away.
    pub(super) fn remove_window(&self, image: u64, index: u64) {
        let mut inner = self.lock();
        if let Some(entry) = inner.list.pop(&Key::Window { image, index }) {
            inner.used -= entry.bytes();
        }
    }

    /// The decompressed unit at `host` of a layer; `make` decompresses it if it is not here.
    ///
    /// # Errors
    /// Whatever `make` says; nothing is remembered then.
    pub(super) fn unit<E>(
        &self,
        layer: u64,
        host: u64,
        make: impl FnOnce() -> Result<Arc<[u8]>, E>,
    ) -> Result<Arc<[u8]>, E> {
        let key = Key::Unit { layer, host };
        if let Some(Entry::Unit(data)) = self.lock().list.get(&key) {
            return Ok(data.clone());
        }
        let data = make()?;
        self.decompressions.fetch_add(1, Ordering::Relaxed);
        let entry = Entry::Unit(data.clone());
        if entry.bytes() <= self.limit {
            self.insert(&mut self.lock(), key, entry);
        }
        Ok(data)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing in here panics between two consistent states; a poisoned lock is as good.
        self.inner.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn insert(&self, inner: &mut Inner, key: Key, entry: Entry) {
        inner.used += entry.bytes();
        if let Some(old) = inner.list.put(key, entry) {
            inner.used -= old.bytes();
        }
        // Each entry gets at most one second chance per call, so this ends.
        let mut chances = inner.list.len();
        while inner.used > self.limit
            && let Some((key, entry)) = inner.list.pop_lru()
        {
            if chances > 0 && entry.take_touched() {
                chances -= 1;
                inner.list.put(key, entry);
                continue;
            }
            inner.used -= entry.bytes();
            inner.evictions += 1;
            entry.clear_slot();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::extent::Extent;
    use crate::image::map::Source;

    fn window(n: usize) -> Arc<Window> {
        let e = |i| Extent { start: i as u64, len: 1, content: Source::Unallocated };
        Arc::new(Window::new((0..n).map(e).collect()))
    }

    #[test]
    fn memory_stays_below_the_bound_and_touched_windows_survive() {
        let cache = Cache::new(100_000);
        let group = Arc::new(SlotGroup::default());
        for i in 0..64 {
            cache.insert_window(1, i, &window(100), &group);
            // The first window is used all the time.
            if let Some(w) = &*group.slots[0].load() {
                w.touch();
            }
            assert!(cache.figures().used <= 100_000);
        }
        let held = group.slots.iter().filter(|s| s.load().is_some()).count();
        assert_eq!(held as u64, cache.figures().entries);
        assert!(held < 64 && group.slots[0].load().is_some());
        assert!(cache.figures().evictions > 0);
    }

    #[test]
    fn a_window_larger_than_the_cache_is_not_kept() {
        let cache = Cache::new(1000);
        let group = Arc::new(SlotGroup::default());
        cache.insert_window(1, 0, &window(1000), &group);
        assert_eq!(cache.figures().used, 0);
    }

    #[test]
    fn units_are_made_once_and_failures_are_not_remembered() {
        let cache = Cache::new(1 << 20);
        let made = |r: Result<u8, ()>| cache.unit(1, 7, || r.map(|b| Arc::from([b; 10])));
        assert!(made(Err(())).is_err());
        assert_eq!(made(Ok(1)).unwrap()[0], 1);
        assert_eq!(made(Ok(2)).unwrap()[0], 1);
    }
}
