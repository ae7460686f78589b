//! Open files and folders by number, read without a lock.
//!
//! State: slots in chunks that double in size and are never moved or freed, so that a reader only
//! follows two pointers. Opening and closing take a lock for the list of free slots; reading never
//! does.

use std::sync::{Arc, Mutex, OnceLock};

use arc_swap::{ArcSwapOption, Guard};

/// Slots in the first chunk; chunk `i` has `FIRST << i`.
const FIRST: usize = 64;
/// Chunks: together more than four thousand million slots.
const CHUNKS: usize = 27;

/// A table of handles.
pub(crate) struct Handles<T> {
    chunks: [OnceLock<Box<[ArcSwapOption<T>]>>; CHUNKS],
    free: Mutex<Free>,
}

#[derive(Default)]
struct Free {
    /// Slots that were given back.
    list: Vec<u64>,
    /// The first slot that was never used.
    next: u64,
}

impl<T> Default for Handles<T> {
    fn default() -> Self {
        Handles { chunks: std::array::from_fn(|_| OnceLock::new()), free: Mutex::default() }
    }
}

impl<T> Handles<T> {
    /// Stores `value`; the number finds it again.
    pub(crate) fn insert(&self, value: Arc<T>) -> u64 {
        let mut free = self.free.lock().unwrap_or_else(|e| e.into_inner());
        let handle = free.list.pop().unwrap_or_else(|| {
            free.next += 1;
            free.next - 1
        });
        drop(free);
        let (chunk, slot) = chunk_and_slot(handle);
        let slots = self.chunks[chunk]
            .get_or_init(|| (0..FIRST << chunk).map(|_| ArcSwapOption::empty()).collect());
        slots[slot].store(Some(value));
        handle
    }

    /// What `handle` stands for; `None` if it is not open.
    pub(crate) fn get(&self, handle: u64) -> Option<Guard<Option<Arc<T>>>> {
        let guard = self.slot(handle)?.load();
        guard.is_some().then_some(guard)
    }

    /// Takes it out; its number may be given to another from now on.
    pub(crate) fn remove(&self, handle: u64) -> Option<Arc<T>> {
        let value = self.slot(handle)?.swap(None)?;
        self.free.lock().unwrap_or_else(|e| e.into_inner()).list.push(handle);
        Some(value)
    }

    /// How many are open.
    pub(crate) fn len(&self) -> u64 {
        let free = self.free.lock().unwrap_or_else(|e| e.into_inner());
        free.next - free.list.len() as u64
    }

    /// Whether none is open.
    pub(crate) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn slot(&self, handle: u64) -> Option<&ArcSwapOption<T>> {
        let (chunk, slot) = chunk_and_slot(handle);
        self.chunks.get(chunk)?.get()?.get(slot)
    }
}

/// Chunk and slot of a handle. With `FIRST` added the handle's top bit names the chunk.
fn chunk_and_slot(handle: u64) -> (usize, usize) {
    let n = handle.saturating_add(FIRST as u64);
    let chunk = n.ilog2() - FIRST.ilog2();
    (chunk as usize, (n - ((FIRST as u64) << chunk)) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_dense_and_distinct() {
        assert_eq!(chunk_and_slot(0), (0, 0));
        assert_eq!(chunk_and_slot(63), (0, 63));
        assert_eq!(chunk_and_slot(64), (1, 0));
        assert_eq!(chunk_and_slot(191), (1, 127));
        assert_eq!(chunk_and_slot(192), (2, 0));
    }

    #[test]
    fn handles_are_found_reused_and_unknown_ones_are_not() {
        let table = Handles::default();
        let all: Vec<u64> = (0..1000).map(|i| table.insert(Arc::new(i))).collect();
        for (i, h) in all.iter().enumerate() {
            assert_eq!(table.get(*h).and_then(|g| g.as_deref().copied()), Some(i));
        }
        assert_eq!(table.remove(all[500]).as_deref(), Some(&500));
        assert!(table.get(all[500]).is_none() && table.remove(all[500]).is_none());
        assert_eq!(table.insert(Arc::new(7)), all[500]);
        assert!(table.get(5000).is_none() && table.get(u64::MAX).is_none());
        assert_eq!(table.len(), 1000);
    }
}
