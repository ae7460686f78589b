//! What the levels of the map have in common.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use super::super::budget::Cost;

/// What is known of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// It is the point's.
    Untouched,
    /// It reads as zeros.
    Zero,
    /// The overlay has its bytes.
    Data,
}

/// What setting a range has changed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Change {
    /// Blocks that have data now and had none before.
    pub added: u64,
    /// Blocks that had data and have none now.
    pub removed: u64,
    /// What the map has grown by, as it is counted against limits.
    pub grown: Cost,
}

impl Change {
    /// Adds what another step has changed.
    pub(in crate::overlay) fn add(&mut self, other: Change) {
        self.added += other.added;
        self.removed += other.removed;
        self.grown = self.grown + other.grown;
    }
}

/// Where a record of the map is: its level and its number there.
pub(super) type Place = (u32, u64);

/// Remembers which records have changed since they were last written to disk, if anybody wants to know.
#[derive(Debug, Default)]
pub(super) struct Log {
    places: Option<Mutex<Vec<Place>>>,
}

impl Log {
    pub(super) fn new(wanted: bool) -> Self {
        Log { places: wanted.then(Mutex::default) }
    }

    /// Notes that a record has changed: once, until [`Changed::look`] is called.
    pub(super) fn note(&self, changed: &Changed, place: Place) {
        let Some(places) = &self.places else { return };
        if !changed.0.swap(true, Ordering::SeqCst) {
            places.lock().unwrap_or_else(PoisonError::into_inner).push(place);
        }
    }

    /// At most so many of what was noted; they are not noted any more.
    pub(super) fn take(&self, most: usize) -> Vec<Place> {
        let Some(places) = &self.places else { return Vec::new() };
        let mut places = places.lock().unwrap_or_else(PoisonError::into_inner);
        let rest = places.len().saturating_sub(most);
        places.split_off(rest)
    }
}

/// Whether a record has changed since somebody looked.
#[derive(Debug, Default)]
pub(super) struct Changed(AtomicBool);

impl Changed {
    /// From now on a change is noted anew. Called before the record is read, so that none is lost.
    pub(super) fn look(&self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

/// Bytes of memory that a part takes beside its own: what the allocator adds, and its place among those that changed.
pub(super) const ALLOCATED: u64 = 64;

/// What is done with the words of a record.
pub(super) type OnRecord<'a> = &'a mut dyn FnMut(&Changed, &[&[AtomicU64]]);

/// A level of the map: a leaf, or a node above others. Blocks are counted from the part's own first one;
/// `first` is the number of that.
pub(super) trait Part {
    /// 0 for leaves.
    const LEVEL: u32;
    /// Blocks that one part is for.
    const SPAN: u64;
    /// What one counts as.
    const WEIGHT: Cost;

    /// One that says nothing.
    fn empty() -> Self;

    /// The state of block `at`, and before which block, at most `end`, it is the same.
    fn run(&self, at: u64, end: u64) -> (State, u64);

    /// Says that these blocks have data.
    fn set_data(&self, blocks: Range<u64>, first: u64, log: &Log) -> Change;

    /// Says that these blocks are zeros.
    fn set_zero(&self, blocks: Range<u64>, first: u64, log: &Log) -> Change;

    /// Says that no block has data; how many had.
    fn clear_data(&self, first: u64, log: &Log) -> u64;

    /// What [`Part::set_data`] of these blocks may take at most, with the blocks themselves.
    fn cost_of_data(part: Option<&Self>, blocks: Range<u64>, block: u64) -> Cost;

    /// What [`Part::set_zero`] may take at most.
    fn cost_of_zero(part: Option<&Self>, blocks: Range<u64>) -> Cost;

    /// Calls `on` with the record of `level` that is for block `at`, made now if `make` says so; not if there is none.
    fn record(&self, level: u32, at: u64, make: bool, on: OnRecord<'_>);

    /// Blocks with data, and what the map counts as.
    fn weigh(&self) -> (u64, Cost);
}

/// The bits from `range.start` to `range.end` in words of 64 bits: each word's index and mask.
pub(super) fn masks(range: Range<u64>) -> impl Iterator<Item = (usize, u64)> {
    let words = range.start / 64..range.end.div_ceil(64).max(range.start / 64);
    words.map(move |word| {
        let low = range.start.saturating_sub(word * 64);
        let high = (range.end - word * 64).min(64);
        let all = if high == 64 { u64::MAX } else { (1 << high) - 1 };
        (word as usize, all & !((1_u64 << low) - 1))
    })
}

/// Whether bit `at` is set.
pub(super) fn is_set(words: &[AtomicU64], at: u64) -> bool {
    words[(at / 64) as usize].load(Ordering::Acquire) & (1 << (at % 64)) != 0
}
