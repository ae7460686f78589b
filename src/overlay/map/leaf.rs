//! The lowest level: two bits for each block.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use super::super::budget::Cost;
use super::part::{ALLOCATED, Change, Changed, Log, OnRecord, Part, State, masks};

/// Blocks of a leaf: 16 MiB of a disk.
const BLOCKS: u64 = 4096;
const WORDS: usize = (BLOCKS / 64) as usize;

/// The blocks of 16 MiB. One with both bits has data: so a block becomes data in one step, after its bytes are there.
#[derive(Debug)]
pub(in crate::overlay) struct Leaf {
    changed: Changed,
    data: [AtomicU64; WORDS],
    zero: [AtomicU64; WORDS],
}

impl Leaf {
    /// The states of a word's blocks: which have data, and which are zeros.
    fn word(&self, word: usize) -> (u64, u64) {
        // In this order: whoever discards a block sets the one bit before clearing the other.
        let data = self.data[word].load(Ordering::Acquire);
        let zero = self.zero[word].load(Ordering::Acquire);
        (data, zero & !data)
    }
}

fn state((data, zero): (u64, u64), bit: u64) -> State {
    match (data >> bit & 1, zero >> bit & 1) {
        (1, _) => State::Data,
        (_, 1) => State::Zero,
        _ => State::Untouched,
    }
}

/// The bits of a word that have this state.
fn with_state((data, zero): (u64, u64), state: State) -> u64 {
    match state {
        State::Data => data,
        State::Zero => zero,
        State::Untouched => !(data | zero),
    }
}

impl Part for Leaf {
    const LEVEL: u32 = 0;
    const SPAN: u64 = BLOCKS;
    // A page of the file on disk at most.
    const WEIGHT: Cost = Cost { disk: 4096, memory: size_of::<Leaf>() as u64 + ALLOCATED };

    fn empty() -> Self {
        let words = || [const { AtomicU64::new(0) }; WORDS];
        Leaf { changed: Changed::default(), data: words(), zero: words() }
    }

    fn run(&self, at: u64, end: u64) -> (State, u64) {
        let (mut word, bit) = (at / 64, at % 64);
        let mut bits = self.word(word as usize);
        let state = state(bits, bit);
        // What is below the first bit counts as the same.
        let mut same = with_state(bits, state) | ((1 << bit) - 1);
        while same == u64::MAX {
            word += 1;
            if word * 64 >= end {
                return (state, end);
            }
            bits = self.word(word as usize);
            same = with_state(bits, state);
        }
        (state, (word * 64 + u64::from((!same).trailing_zeros())).min(end))
    }

    fn set_data(&self, blocks: Range<u64>, first: u64, log: &Log) -> Change {
        let mut added = 0;
        for (word, mask) in masks(blocks) {
            let before = self.data[word].fetch_or(mask, Ordering::SeqCst);
            added += u64::from((mask & !before).count_ones());
        }
        if added > 0 {
            log.note(&self.changed, (Self::LEVEL, first / BLOCKS));
        }
        Change { added, ..Change::default() }
    }

    fn set_zero(&self, blocks: Range<u64>, first: u64, log: &Log) -> Change {
        let mut removed = 0;
        for (word, mask) in masks(blocks) {
            self.zero[word].fetch_or(mask, Ordering::SeqCst);
            let before = self.data[word].fetch_and(!mask, Ordering::SeqCst);
            removed += u64::from((mask & before).count_ones());
        }
        log.note(&self.changed, (Self::LEVEL, first / BLOCKS));
        Change { removed, ..Change::default() }
    }

    fn clear_data(&self, first: u64, log: &Log) -> u64 {
        // A block that was data is zeros then, whatever is said above.
        self.set_zero(0..BLOCKS, first, log).removed
    }

    fn cost_of_data(part: Option<&Self>, blocks: Range<u64>, block: u64) -> Cost {
        let have = |leaf: &Leaf| -> u64 {
            let words = masks(blocks.clone());
            words.map(|(w, m)| u64::from((leaf.word(w).0 & m).count_ones())).sum()
        };
        Cost::of_data((blocks.end - blocks.start - part.map_or(0, have)) * block)
    }

    fn cost_of_zero(_part: Option<&Self>, _blocks: Range<u64>) -> Cost {
        Cost::default()
    }

    fn record(&self, _level: u32, _at: u64, _make: bool, on: OnRecord<'_>) {
        on(&self.changed, &[&self.data, &self.zero]);
    }

    fn weigh(&self) -> (u64, Cost) {
        let data = (0..WORDS).map(|w| u64::from(self.word(w).0.count_ones())).sum();
        (data, Self::WEIGHT)
    }
}
