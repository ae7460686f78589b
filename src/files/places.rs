//! [`Places`]: the bytes of a file system that some folders are in. Folders that share some are not two, and a walk that
//! goes into both has no end in sight.

use std::collections::BTreeMap;
use std::ops::Range;

/// Stretches of a file system: begins and ends in bytes, neighbours as one.
#[derive(Debug, Default)]
pub struct Places(BTreeMap<u64, u64>);

impl Places {
    /// How many stretches are remembered.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// Takes all of `places`, unless some of them are taken: then nothing is changed.
    pub fn take(&mut self, places: Vec<Range<u64>>) -> bool {
        if places.iter().any(|p| self.is_taken(p)) {
            return false;
        }
        places.into_iter().for_each(|p| self.add(p));
        true
    }

    fn is_taken(&self, place: &Range<u64>) -> bool {
        let before = self.0.range(..place.end).next_back();
        before.is_some_and(|(_, end)| *end > place.start)
    }

    fn add(&mut self, Range { mut start, mut end }: Range<u64>) {
        let before = self.0.range(..start).next_back().map(|(begin, end)| (*begin, *end));
        if let Some((begin, _)) = before.filter(|(_, end)| *end == start) {
            start = begin;
        }
        if let Some(further) = self.0.remove(&end) {
            end = further;
        }
        self.0.insert(start, end);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(start: u64, end: u64) -> Vec<Range<u64>> {
        std::iter::once(start..end).collect()
    }

    #[test]
    fn places_that_touch_are_one_and_none_is_taken_twice() {
        let mut places = Places::default();
        for (start, end) in [(10, 20), (30, 40), (20, 30), (50, 60), (0, 10)] {
            assert!(places.take(one(start, end)), "{start}");
        }
        let two = || Places([(0, 40), (50, 60)].into());
        assert_eq!(places.0, two().0);
        for (start, end) in [(39, 41), (45, 51), (55, 56), (0, 100), (59, 70)] {
            assert!(!places.take(vec![70..80, start..end]), "{start}");
            assert_eq!(places.0, two().0);
        }
        for (start, end) in [(40, 50), (60, 70)] {
            assert!(two().take(one(start, end)), "{start}");
        }
    }
}
