//! The levels above the leaves: a bit for each part that reads as zeros as a whole, and the parts that say more.

use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use super::super::budget::Cost;
use super::part::{ALLOCATED, Change, Changed, Log, OnRecord, Part, State, is_set};

/// Parts of a node.
const PARTS: u64 = 512;

/// A node: what is below it is made when it is first needed, and stays in its place: readers take no lock.
#[derive(Debug)]
pub(in crate::overlay) struct Node<P> {
    changed: Changed,
    /// Parts whose blocks are zeros where the part itself says nothing.
    zero: Box<[AtomicU64]>,
    parts: Box<[OnceLock<Box<P>>]>,
}

impl<P: Part> Node<P> {
    /// One with so many parts.
    pub(super) fn with_parts(parts: u64) -> Self {
        let words = (0..parts.div_ceil(64)).map(|_| AtomicU64::new(0));
        let cells = (0..parts).map(|_| OnceLock::new());
        Node { changed: Changed::default(), zero: words.collect(), parts: cells.collect() }
    }

    /// The parts that `blocks` touches: number, and the blocks in it counted from its own first one.
    fn touched(blocks: Range<u64>) -> impl Iterator<Item = (u64, Range<u64>)> {
        let parts = blocks.start / P::SPAN..blocks.end.div_ceil(P::SPAN);
        parts.map(move |part| {
            let first = part * P::SPAN;
            let start = blocks.start.saturating_sub(first);
            (part, start..(blocks.end - first).min(P::SPAN))
        })
    }

    fn get(&self, part: u64) -> Option<&P> {
        self.parts.get(part as usize)?.get().map(|p| &**p)
    }

    /// The part, made if it is not there; and what it counts as, if it was made.
    fn make(&self, part: u64) -> (&P, Cost) {
        let mut weight = Cost::default();
        let part = self.parts[part as usize].get_or_init(|| {
            weight = P::WEIGHT;
            Box::new(P::empty())
        });
        (part, weight)
    }
}

impl<P: Part> Part for Node<P> {
    const LEVEL: u32 = P::LEVEL + 1;
    const SPAN: u64 = P::SPAN * PARTS;
    // On disk it is a bit for each part; this was always counted.
    const WEIGHT: Cost = Cost {
        disk: 16 << 10,
        memory: PARTS * size_of::<OnceLock<Box<P>>>() as u64 + PARTS / 8 + 3 * ALLOCATED,
    };

    fn empty() -> Self {
        Self::with_parts(PARTS)
    }

    fn run(&self, at: u64, end: u64) -> (State, u64) {
        let part = at / P::SPAN;
        let first = part * P::SPAN;
        let end = end.min(first + P::SPAN);
        let (state, end) = match self.get(part) {
            Some(p) => {
                let (state, stop) = p.run(at - first, end - first);
                (state, stop + first)
            }
            None => (State::Untouched, end),
        };
        match state == State::Untouched && is_set(&self.zero, part) {
            true => (State::Zero, end),
            false => (state, end),
        }
    }

    fn set_data(&self, blocks: Range<u64>, first: u64, log: &Log) -> Change {
        let mut change = Change::default();
        for (part, inside) in Self::touched(blocks) {
            let (below, grown) = self.make(part);
            change.grown = change.grown + grown;
            change.add(below.set_data(inside, first + part * P::SPAN, log));
        }
        change
    }

    fn set_zero(&self, blocks: Range<u64>, first: u64, log: &Log) -> Change {
        let mut change = Change::default();
        for (part, inside) in Self::touched(blocks) {
            let begin = first + part * P::SPAN;
            if inside != (0..P::SPAN) {
                let (below, grown) = self.make(part);
                change.grown = change.grown + grown;
                change.add(below.set_zero(inside, begin, log));
                continue;
            }
            self.zero[(part / 64) as usize].fetch_or(1 << (part % 64), Ordering::SeqCst);
            log.note(&self.changed, (Self::LEVEL, first / Self::SPAN));
            change.removed += self.get(part).map_or(0, |p| p.clear_data(begin, log));
        }
        change
    }

    fn clear_data(&self, first: u64, log: &Log) -> u64 {
        let there = (0..).zip(&self.parts).filter_map(|(i, p)| Some((i, p.get()?)));
        there.map(|(i, p): (u64, _)| p.clear_data(first + i * P::SPAN, log)).sum()
    }

    fn cost_of_data(part: Option<&Self>, blocks: Range<u64>, block: u64) -> Cost {
        let cost = |(number, inside)| {
            let below = part.and_then(|p| p.get(number));
            let new = if below.is_none() { P::WEIGHT } else { Cost::default() };
            new + P::cost_of_data(below, inside, block)
        };
        Self::touched(blocks).map(cost).sum()
    }

    fn cost_of_zero(part: Option<&Self>, blocks: Range<u64>) -> Cost {
        let partly = Self::touched(blocks).filter(|(_, inside)| *inside != (0..P::SPAN));
        let cost = |(number, inside)| {
            let below = part.and_then(|p| p.get(number));
            let new = if below.is_none() { P::WEIGHT } else { Cost::default() };
            new + P::cost_of_zero(below, inside)
        };
        partly.map(cost).sum()
    }

    fn record(&self, level: u32, at: u64, make: bool, on: OnRecord<'_>) {
        if level >= Self::LEVEL {
            return on(&self.changed, &[&self.zero]);
        }
        let (part, inside) = (at / P::SPAN, at % P::SPAN);
        if make {
            self.make(part).0.record(level, inside, make, on);
        } else if let Some(below) = self.get(part) {
            below.record(level, inside, make, on);
        }
    }

    fn weigh(&self) -> (u64, Cost) {
        let there = self.parts.iter().filter_map(OnceLock::get).map(|p| p.weigh());
        there.fold((0, Self::WEIGHT), |(d, w), (data, weight)| (d + data, w + weight))
    }
}
