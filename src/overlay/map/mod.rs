//! Which blocks of a disk an overlay has: a map by levels.
//!
//! The lowest level has two bits for each block of 4 KiB: it has data, or it reads as zeros. Each level above has,
//! for each of its parts, a bit that all of it reads as zeros (but for what has data below), and parts only where
//! something was written. So a disk of any size costs what was written to it, and a discard of a whole disk costs some
//! bits. Parts are made once and never go, so that readers follow pointers and take no lock.
//!
//! Writers of one block exclude each other ([`super::stripes`]); readers see a block before or after a change.
//!
//! What is written to disk are the records of the parts: those that changed since, see [`DirtyMap::take_changed`].

mod leaf;
mod node;
mod part;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use super::budget::Cost;
use leaf::Leaf;
use node::Node;
pub(crate) use part::{Change, State};
use part::{Log, Part, Place};

/// Bytes of a block: what QEMU, file systems and page caches write at least, as a rule. What is shorter is filled up
/// with what the point has.
pub(crate) const BLOCK: u64 = 4096;

type Root = Node<Node<Node<Node<Leaf>>>>;

/// Levels, the root's with them.
pub(super) const LEVELS: u32 = Root::LEVEL + 1;

/// The map of one disk.
#[derive(Debug)]
pub(crate) struct DirtyMap {
    blocks: u64,
    root: Root,
    log: Log,
}

/// A part's record, as it is on disk.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Record {
    /// Its level, and its number there.
    pub place: Place,
    /// Its words, little-endian.
    pub bytes: Vec<u8>,
}

/// Blocks of a part of this level.
pub(super) fn span(level: u32) -> u64 {
    const FAN: u32 = (<Node<Leaf> as Part>::SPAN / Leaf::SPAN).ilog2();
    Leaf::SPAN << (FAN * level)
}

impl DirtyMap {
    /// What a map counts as that says nothing.
    pub(super) const WEIGHT: Cost = Root::WEIGHT;

    /// Of a disk of so many blocks. With `logged` it remembers which records have changed.
    pub(super) fn new(blocks: u64, logged: bool) -> Self {
        let parts = blocks.div_ceil(span(Root::LEVEL - 1)).max(1);
        DirtyMap { blocks, root: Root::with_parts(parts), log: Log::new(logged) }
    }

    /// The state of block `at`, which is before `end`, and before which block it is the same for certain.
    pub(crate) fn run(&self, at: u64, end: u64) -> (State, u64) {
        self.root.run(at, end)
    }

    /// Says that these blocks have data, after their bytes were written.
    pub(super) fn set_data(&self, blocks: Range<u64>) -> Change {
        self.root.set_data(blocks, 0, &self.log)
    }

    /// Says that these blocks are zeros.
    pub(super) fn set_zero(&self, blocks: Range<u64>) -> Change {
        self.root.set_zero(blocks, 0, &self.log)
    }

    /// What data in these blocks takes at most, with what the map grows by.
    pub(super) fn cost_of_data(&self, blocks: Range<u64>) -> Cost {
        Root::cost_of_data(Some(&self.root), blocks, BLOCK)
    }

    /// What the map grows by at most if these blocks become zeros.
    pub(super) fn cost_of_zero(&self, blocks: Range<u64>) -> Cost {
        Root::cost_of_zero(Some(&self.root), blocks)
    }

    /// Blocks with data, and what the map counts as.
    pub(super) fn weigh(&self) -> (u64, Cost) {
        self.root.weigh()
    }

    /// Whether nothing was ever written.
    pub(super) fn is_empty(&self) -> bool {
        let mut at = 0;
        while at < self.blocks {
            match self.run(at, self.blocks) {
                (State::Untouched, next) => at = next,
                _ => return false,
            }
        }
        true
    }

    /// At most so many records that have changed since they were taken last, as they are now.
    pub(super) fn take_changed(&self, most: usize) -> Vec<Record> {
        let record = |place: Place| {
            let mut bytes = Vec::new();
            self.root.record(place.0, place.1 * span(place.0), false, &mut |changed, words| {
                changed.look();
                let words = words.iter().flat_map(|w| w.iter());
                bytes.extend(words.flat_map(|w| w.load(Ordering::SeqCst).to_le_bytes()));
            });
            Record { place, bytes }
        };
        self.log.take(most).into_iter().map(record).collect()
    }

    /// Has a record that was taken, and could not be written, taken again.
    pub(super) fn put_back(&self, record: &Record) {
        let (level, number) = record.place;
        let note = &mut |changed: &part::Changed, _: &[&[AtomicU64]]| {
            self.log.note(changed, record.place);
        };
        self.root.record(level, number * span(level), false, note);
    }

    /// Enters a record that was read from disk.
    pub(super) fn put(&self, place: Place, bytes: &[u8]) {
        self.root.record(place.0, place.1 * span(place.0), true, &mut |_, words| {
            let words = words.iter().flat_map(|w| w.iter());
            for (word, bytes) in words.zip(bytes.as_chunks::<8>().0) {
                word.store(u64::from_le_bytes(*bytes), Ordering::SeqCst);
            }
        });
    }

    /// Records of a level, and the bytes of each.
    pub(super) fn records(&self, level: u32) -> (u64, u64) {
        let words = |w: &[&[AtomicU64]]| w.iter().map(|w| w.len() as u64).sum::<u64>();
        let node = <Node<Leaf> as Part>::SPAN / Leaf::SPAN / 64;
        let mut len = if level == 0 { 2 * Leaf::SPAN / 64 } else { node };
        if level == Root::LEVEL {
            self.root.record(level, 0, false, &mut |_, w| len = words(w));
        }
        (self.blocks.div_ceil(span(level)), len * 8)
    }
}
