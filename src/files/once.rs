//! [`Once`]: whether a walk was in a folder before. A folder has one name: with several, or with the contents of
//! another, a walk would have no end in sight.

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;

use super::tree::{NodeId, Tree};
use crate::error::{Error, Kind, Result};

/// Places that are remembered: more are forgotten together, and a loop is found one round later.
const MAX_PLACES: usize = 1 << 18;

/// The folders that a walk was in.
#[derive(Default)]
pub(super) struct Once {
    seen: HashSet<NodeId>,
    /// Where they have their entries: begins and ends in bytes, neighbours as one.
    places: BTreeMap<u64, u64>,
}

impl Once {
    /// Notes a folder that is about to be read.
    ///
    /// # Errors
    /// `Corrupt` if that was done before, or another one has the same contents.
    pub(super) fn enter(&mut self, tree: &dyn Tree, folder: NodeId) -> Result<()> {
        if !self.seen.insert(folder) {
            let what = "directory loop: already visited under another name";
            return Err(Error::new(Kind::Corrupt, what));
        }
        // What is wrong with its places is told when it is read.
        let places = tree.folder_places(folder).unwrap_or_default();
        if places.iter().any(|p| self.is_taken(p)) {
            let what = "directory loop: its contents are also those of another directory";
            return Err(Error::new(Kind::Corrupt, what));
        }
        if self.places.len() > MAX_PLACES {
            self.places.clear();
        }
        places.into_iter().for_each(|p| self.take(p));
        Ok(())
    }

    fn is_taken(&self, place: &Range<u64>) -> bool {
        let before = self.places.range(..place.end).next_back();
        before.is_some_and(|(_, end)| *end > place.start)
    }

    fn take(&mut self, Range { mut start, mut end }: Range<u64>) {
        let before = self.places.range(..start).next_back().map(|(begin, end)| (*begin, *end));
        if let Some((begin, _)) = before.filter(|(_, end)| *end == start) {
            start = begin;
        }
        if let Some(further) = self.places.remove(&end) {
            end = further;
        }
        self.places.insert(start, end);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_that_touch_are_one_and_none_is_taken_twice() {
        let mut once = Once::default();
        for (start, end) in [(10, 20), (30, 40), (20, 30), (50, 60), (0, 10)] {
            assert!(!once.is_taken(&(start..end)), "{start}");
            once.take(start..end);
        }
        assert_eq!(once.places.into_iter().collect::<Vec<_>>(), [(0, 40), (50, 60)]);
        let once = Once { places: [(0, 40), (50, 60)].into(), ..Once::default() };
        let taken = |start, end| once.is_taken(&(start..end));
        assert!(taken(39, 41) && taken(45, 51) && taken(55, 56) && taken(0, 100) && taken(59, 70));
        assert!(!taken(40, 50) && !taken(60, 70));
    }
}
