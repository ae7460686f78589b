//! [`Window`]: the merged extents of one stretch of a point, and how a read finds its first one.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use super::map::MergedExtent;
use crate::extent::{self, Extent};

/// The merged extents of one window.
///
/// A read of 4 KiB begins with a search among up to a thousand extents and more. A binary search
/// jumps through all of their memory, which is rarely in the processor's cache; so the window is
/// divided into about as many equal steps as it has extents, and `first` says where each begins.
#[derive(Debug)]
pub(super) struct Window {
    /// Ascending, contiguous, coalesced.
    extents: Box<[MergedExtent]>,
    /// Where the first one begins. Asking that one would be one more look into their memory for each read.
    start: u64,
    /// For each step, the first extent that ends after its first byte.
    first: Box<[u32]>,
    /// A step has 2 to the power of this many bytes.
    shift: u32,
    touched: AtomicBool,
}

/// More steps than this gain nothing: what is left of the search stays small.
const MAX_STEPS: u64 = 1 << 16;

impl Window {
    /// A window that nobody has read yet.
    pub(super) fn new(extents: Box<[MergedExtent]>) -> Self {
        let (start, end) = match &*extents {
            [] => (0, 0),
            [first, ..] => (first.start, extents.last().map_or(0, Extent::end)),
        };
        let steps = (extents.len() as u64).next_power_of_two().min(MAX_STEPS);
        let shift = (end - start).div_ceil(steps).max(1).next_power_of_two().trailing_zeros();
        let mut first = Vec::new();
        let mut at = 0;
        for step in 0..(end - start).div_ceil(1 << shift) {
            while extents[at].end() <= start + (step << shift) {
                at += 1;
            }
            first.push(u32::try_from(at).unwrap_or(u32::MAX));
        }
        Window { extents, start, first: first.into(), shift, touched: AtomicBool::new(false) }
    }

    /// All extents.
    pub(super) fn extents(&self) -> &[MergedExtent] {
        &self.extents
    }

    /// The extents that overlap `range`, which begins inside the window, clipped to it.
    pub(super) fn clipped(&self, range: Range<u64>) -> impl Iterator<Item = MergedExtent> + '_ {
        let step = (range.start.saturating_sub(self.start) >> self.shift) as usize;
        let from = self.first.get(step).map_or(self.extents.len(), |i| *i as usize);
        let to = self.first.get(step + 1).map_or(self.extents.len(), |i| *i as usize);
        let among = &self.extents[from..to.max(from)];
        let from = from + among.partition_point(|e| e.end() <= range.start);
        extent::clipped_from(&self.extents[from..], range)
    }

    /// Remembers that it was used. Writes only if it has to: the flag is shared by all threads.
    pub(super) fn touch(&self) {
        if !self.touched.load(Ordering::Relaxed) {
            self.touched.store(true, Ordering::Relaxed);
        }
    }

    /// Whether it was used since the last time this was asked.
    pub(super) fn take_touched(&self) -> bool {
        self.touched.swap(false, Ordering::Relaxed)
    }

    /// Bytes of memory that it takes.
    pub(super) fn bytes(&self) -> usize {
        size_of::<Window>() + size_of_val(&*self.extents) + size_of_val(&*self.first)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::image::map::Source;

    fn window(start: u64, lengths: &[u64]) -> Window {
        let mut at = start;
        let extents = lengths.iter().enumerate().map(|(i, &len)| {
            let e = Extent { start: at, len, content: Source::Zero { layer: i as u16 } };
            at += len;
            e
        });
        Window::new(extents.collect())
    }

    proptest! {
        #[test]
        fn every_range_is_found_as_by_a_search_of_all(
            start in prop_oneof![Just(0), Just(64 << 20), Just(1u64 << 62)],
            lengths in prop::collection::vec(prop_oneof![1u64..5, 500u64..70_000, Just(1 << 26)], 0..200),
            ranges in prop::collection::vec((0.0..1.1f64, 1u64..1_000_000), 50),
        ) {
            let w = window(start, &lengths);
            let size: u64 = lengths.iter().sum();
            for (at, len) in ranges {
                let from = start + (at * size as f64) as u64;
                let found: Vec<_> = w.clipped(from..from + len).collect();
                let all: Vec<_> = extent::clipped(&w.extents, from..from + len).collect();
                prop_assert_eq!(found, all);
            }
        }
    }

    #[test]
    fn both_ends_of_each_extent_are_found() {
        let w = window(1 << 20, &[1, 7, 65536, 512, 1 << 30, 3]);
        for e in w.extents() {
            for at in [e.start, e.end() - 1] {
                assert_eq!(w.clipped(at..at + 1).next().unwrap().content, e.content);
            }
        }
        let end = w.extents().last().unwrap().end();
        assert_eq!(w.clipped(end..end + 1).count(), 0);
        // One giant extent and an empty window.
        assert_eq!(window(0, &[1 << 62]).clipped(1 << 61..(1 << 61) + 5).count(), 1);
        assert_eq!(window(0, &[]).clipped(0..5).count(), 0);
    }
}
