//! One bounded cache for merged windows and decompressed units.
//!
//! Windows are read without a lock: each image keeps them in atomically swapped slots, and a read
//! only sets the window's `touched` flag. This cache decides what stays: a least-recently-used
//! list, in which a window that was touched since it was last looked at gets a second chance.
//!
//! A unit is decompressed by one thread while others wait for it. What is being decompressed counts
//! as used: as many units are at a time as the bound has room for, but always one.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};

use arc_swap::ArcSwapOption;
use lru::LruCache;

use super::holds::Holds;
use super::window::Window;
use crate::layer::Piece;

/// Roughly what the list itself takes for an entry.
const ENTRY_OVERHEAD: usize = 128;

/// Where a window can be found without a lock.
pub(super) type Slot = ArcSwapOption<Window>;

/// The slots of 64 neighbouring windows.
#[derive(Debug)]
pub(super) struct SlotGroup {
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
    pub(super) const LEN: usize = 64;
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Key {
    Window { image: u64, index: u64 },
    Piece { layer: u64, host: u64, number: u32 },
}

enum Entry {
    Window { window: Arc<Window>, group: Weak<SlotGroup>, slot: usize },
    Piece(Arc<Piece>),
}

impl Entry {
    fn bytes(&self) -> u64 {
        match self {
            Entry::Window { window, .. } => (window.bytes() + ENTRY_OVERHEAD) as u64,
            Entry::Piece(piece) => (piece.bytes.len() + ENTRY_OVERHEAD) as u64,
        }
    }

    /// Whether it was used since the last time this was asked.
    fn take_touched(&self) -> bool {
        match self {
            Entry::Window { window, .. } => window.take_touched(),
            Entry::Piece(_) => false,
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

impl Default for Inner {
    fn default() -> Self {
        Inner {
            list: LruCache::unbounded(),
            making: HashSet::new(),
            used: 0,
            reserved: 0,
            evictions: 0,
        }
    }
}

/// A unit that one thread decompresses while others wait for it. Its bytes count as used.
struct Making<'a> {
    cache: &'a Cache,
    unit: (u64, u64),
    bytes: u64,
}

impl Drop for Making<'_> {
    fn drop(&mut self) {
        let mut inner = self.cache.lock();
        inner.making.remove(&self.unit);
        inner.used -= self.bytes;
        inner.reserved -= self.bytes;
        drop(inner);
        self.cache.made.notify_all();
    }
}

struct Inner {
    list: LruCache<Key, Entry>,
    /// Units that are being decompressed, by layer and place.
    making: HashSet<(u64, u64)>,
    /// Bytes of the list, and of what is being decompressed.
    used: u64,
    /// Those of what is being decompressed.
    reserved: u64,
    evictions: u64,
}

impl Inner {
    fn piece(&mut self, layer: u64, host: u64, number: u32) -> Option<Arc<Piece>> {
        match self.list.get(&Key::Piece { layer, host, number }) {
            Some(Entry::Piece(piece)) => Some(piece.clone()),
            _ => None,
        }
    }
}

/// What the cache holds, for status.json.
#[derive(Debug, Clone, Copy, serde::Serialize)]
pub struct CacheFigures {
    /// The bound in bytes.
    pub limit: u64,
    /// Bytes in use.
    pub used: u64,
    /// Windows and pieces of units in use.
    pub entries: u64,
    /// How many were dropped to stay below the bound.
    pub evictions: u64,
    /// How many windows were merged.
    pub merges: u64,
    /// How many units were decompressed.
    pub decompressions: u64,
}

/// Takes in the pieces of a unit that is being decompressed.
pub(super) struct Pieces<'a> {
    cache: &'a Cache,
    layer: u64,
    host: u64,
    wanted: u32,
    found: Option<Arc<Piece>>,
}

impl Pieces<'_> {
    /// Keeps a piece, which is right.
    pub(super) fn keep(&mut self, number: u32, piece: Piece) {
        let piece = Arc::new(piece);
        if number == self.wanted {
            self.found = Some(piece.clone());
        }
        let key = Key::Piece { layer: self.layer, host: self.host, number };
        self.cache.keep(key, Entry::Piece(piece));
    }
}

/// The cache; shared by all images of a mount.
pub struct Cache {
    limit: u64,
    inner: Mutex<Inner>,
    /// Told whenever a unit has been decompressed.
    made: Condvar,
    merges: AtomicU64,
    decompressions: AtomicU64,
    next_id: AtomicU64,
    holds: Holds,
}

impl Cache {
    /// A cache that holds at most `limit` bytes.
    pub fn new(limit: u64) -> Arc<Self> {
        Arc::new(Cache {
            limit,
            inner: Mutex::new(Inner::default()),
            made: Condvar::new(),
            merges: AtomicU64::new(0),
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
            merges: self.merges.load(Ordering::Relaxed),
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

    /// Puts a freshly merged window into its slot and into the list.
    pub(super) fn insert_window(
        &self,
        image: u64,
        index: u64,
        window: &Arc<Window>,
        group: &Arc<SlotGroup>,
    ) {
        self.merges.fetch_add(1, Ordering::Relaxed);
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

    /// Piece number `number` of the unit at `host` of a layer. If it is not here, `make` decompresses it
    /// and what it must before that: from the nearest piece on that is here and can be gone on from.
    /// It gives the pieces to [`Pieces::keep`], and takes as many bytes as `room` says meanwhile.
    ///
    /// # Errors
    /// Whatever `room` and `make` say.
    pub(super) fn piece<E>(
        &self,
        layer: u64,
        host: u64,
        number: u32,
        room: impl FnOnce() -> Result<u64, E>,
        make: impl FnOnce(&mut Pieces, Option<(u32, Arc<Piece>)>) -> Result<(), E>,
    ) -> Result<Option<Arc<Piece>>, E> {
        let here = |inner: &mut Inner| inner.piece(layer, host, number);
        if let Some(piece) = here(&mut self.lock()) {
            return Ok(Some(piece));
        }
        let making = match self.begin((layer, host), room()?, here) {
            Ok(piece) => return Ok(Some(piece)),
            Err(making) => making,
        };
        let before = self.before(layer, host, number);
        let mut pieces = Pieces { cache: self, layer, host, wanted: number, found: None };
        make(&mut pieces, before)?;
        drop(making);
        Ok(pieces.found)
    }

    /// The nearest piece before `number` after which decompression can go on.
    fn before(&self, layer: u64, host: u64, number: u32) -> Option<(u32, Arc<Piece>)> {
        let mut inner = self.lock();
        let mut known = (0..number).rev().filter_map(|n| Some((n, inner.piece(layer, host, n)?)));
        known.find(|(_, piece)| piece.next.is_some())
    }

    /// What is `here` by now, or the right to decompress a unit, with room for it.
    fn begin<T>(
        &self,
        unit: (u64, u64),
        bytes: u64,
        here: impl Fn(&mut Inner) -> Option<T>,
    ) -> Result<T, Making<'_>> {
        let mut inner = self.lock();
        loop {
            if let Some(found) = here(&mut inner) {
                return Ok(found);
            }
            let others: u64 = inner.reserved;
            let room = others == 0 || others.saturating_add(bytes) <= self.limit;
            if room && inner.making.insert(unit) {
                break;
            }
            inner = self.made.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
        inner.used += bytes;
        inner.reserved += bytes;
        self.evict(&mut inner);
        drop(inner);
        self.decompressions.fetch_add(1, Ordering::Relaxed);
        Err(Making { cache: self, unit, bytes })
    }

    fn keep(&self, key: Key, entry: Entry) {
        if entry.bytes() <= self.limit {
            self.insert(&mut self.lock(), key, entry);
        }
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
        self.evict(inner);
    }

    fn evict(&self, inner: &mut Inner) {
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

    /// The first byte of unit `host`, made of `room` bytes that `make` gives.
    fn unit<E>(
        cache: &Cache,
        host: u64,
        room: u64,
        make: impl FnOnce() -> Result<Box<[u8]>, E>,
    ) -> Result<u8, E> {
        let keep = |pieces: &mut Pieces, bytes| pieces.keep(0, Piece { bytes, next: None });
        let made = cache.piece(1, host, 0, || Ok(room), |p, _| make().map(|b| keep(p, b)));
        made.map(|piece| piece.unwrap().bytes[0])
    }

    #[test]
    fn units_are_made_once_and_failures_are_not_remembered() {
        let cache = Cache::new(1 << 20);
        let made = |r: Result<u8, ()>| unit(&cache, 7, 10, || r.map(|b| Box::from([b; 10])));
        assert!(made(Err(())).is_err());
        assert_eq!(made(Ok(1)), Ok(1));
        assert_eq!(made(Ok(2)), Ok(1));
    }

    #[test]
    fn what_making_a_piece_takes_counts_as_used_until_it_is_made() {
        let cache = Cache::new(100_000);
        let room = || Ok::<u64, ()>(60_000);
        let piece = cache.piece(1, 7, 0, room, |pieces, before| {
            assert!(before.is_none() && cache.figures().used == 60_000);
            pieces.keep(0, Piece { bytes: Box::from([3; 10]), next: None });
            Ok(())
        });
        assert_eq!(piece.unwrap().unwrap().bytes[9], 3);
        assert!(cache.figures().used < 1000);
        // What is here is found without asking how much it would take.
        let again = cache.piece(1, 7, 0, || Err(()), |_, _| Err(()));
        assert!(again.unwrap().is_some());
    }

    #[test]
    fn one_decompresses_while_others_wait_and_all_stay_within_the_bound() {
        let cache = Cache::new(100_000);
        let running = AtomicU64::new(0);
        let made = AtomicU64::new(0);
        let make = |byte: u8| {
            let now = running.fetch_add(1, Ordering::SeqCst) + 1;
            // Two and a half would fit.
            assert!(now <= 2, "{now} at a time");
            assert!(cache.figures().used <= 100_000);
            made.fetch_add(1, Ordering::SeqCst);
            std::thread::sleep(std::time::Duration::from_millis(5));
            running.fetch_sub(1, Ordering::SeqCst);
            Ok::<_, ()>(Box::from(vec![byte; 40_000]))
        };
        std::thread::scope(|s| {
            for _ in 0..4 {
                s.spawn(|| assert_eq!(unit(&cache, 1, 40_000, || make(1)), Ok(1)));
            }
        });
        assert_eq!(made.load(Ordering::SeqCst), 1);
        std::thread::scope(|s| {
            for i in 0..8u8 {
                let (cache, make) = (&cache, &make);
                let host = u64::from(i) + 10;
                s.spawn(move || {
                    assert_eq!(unit(cache, host, 40_000, || make(i)), Ok(i));
                });
            }
        });
        // One that is larger than everything is made all the same, and not kept.
        let large = unit(&cache, 99, 1 << 20, || Ok::<_, ()>(Box::from(vec![7; 1 << 20])));
        assert_eq!(large, Ok(7));
        assert!(cache.figures().used <= 100_000);
    }

    #[test]
    fn what_is_used_is_what_is_there() {
        let cache = Cache::new(1 << 20);
        let group = Arc::new(SlotGroup::default());
        for entries in [1, 1, 2] {
            cache.insert_window(1, entries, &window(100), &group);
            assert_eq!(cache.figures().entries, entries);
        }
        let both = cache.figures().used;
        cache.insert_window(1, 2, &window(100), &group);
        assert_eq!(cache.figures().used, both, "one took the place of another");
        cache.remove_window(1, 1);
        cache.remove_window(1, 2);
        assert_eq!((cache.figures().used, cache.figures().entries), (0, 0));
    }

    #[test]
    fn making_pieces_pushes_out_what_is_there_and_a_window_loses_its_slot() {
        let cache = Cache::new(100_000);
        let group = Arc::new(SlotGroup::default());
        for i in 0..10 {
            cache.insert_window(1, i, &window(100), &group);
        }
        let full = cache.figures();
        let making = cache.piece(
            1,
            7,
            0,
            || Ok::<_, ()>(100_000),
            |pieces, _| {
                let now = cache.figures();
                assert_eq!((now.used, now.entries, now.evictions), (100_000, 0, full.entries));
                assert!(group.slots.iter().all(|s| s.load().is_none()));
                pieces.keep(0, Piece { bytes: Box::from([3; 200_000]), next: None });
                Ok(())
            },
        );
        assert_eq!(making.unwrap().unwrap().bytes.len(), 200_000);
        // It is larger than all there is room for.
        assert_eq!((cache.figures().used, cache.figures().entries), (0, 0));
    }

    /// Exactly as much as is allowed is not too much.
    #[test]
    fn the_bound_itself_is_allowed() {
        let group = Arc::new(SlotGroup::default());
        let one = Cache::new(1 << 20);
        one.insert_window(1, 0, &window(100), &group);
        let cache = Cache::new(2 * one.figures().used);
        for i in 0..2 {
            cache.insert_window(1, i, &window(100), &group);
        }
        assert_eq!((cache.figures().entries, cache.figures().evictions), (2, 0));
    }
}
