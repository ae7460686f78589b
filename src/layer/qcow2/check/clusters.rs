//! Sets of host clusters: a bitmap in pages, so that a sparse or hostile file costs only what it
//! really names.

use std::collections::HashMap;
use std::ops::Range;

/// Words in a page; a page covers 32,768 clusters (2 GiB of 64 KiB clusters) in 4 KiB.
const PAGE_WORDS: u64 = 512;

/// A set of cluster numbers.
#[derive(Debug, Default)]
pub(crate) struct ClusterSet {
    pages: HashMap<u64, Box<[u64; PAGE_WORDS as usize]>>,
}

impl ClusterSet {
    /// Adds a cluster; false if it was in already.
    pub(crate) fn insert(&mut self, cluster: u64) -> bool {
        let (page, word, bit) = page_word_bit(cluster);
        let page = self.pages.entry(page).or_insert_with(|| Box::new([0; PAGE_WORDS as usize]));
        let new = page[word] & bit == 0;
        page[word] |= bit;
        new
    }

    /// Whether a cluster is in.
    pub(crate) fn contains(&self, cluster: u64) -> bool {
        let (page, word, bit) = page_word_bit(cluster);
        self.pages.get(&page).is_some_and(|p| p[word] & bit != 0)
    }

    /// The 64 clusters from `first`, a multiple of 64, as one word, lowest bit first.
    pub(crate) fn word(&self, first: u64) -> u64 {
        let (page, word, _) = page_word_bit(first);
        self.pages.get(&page).map_or(0, |p| p[word])
    }

    /// Bytes that it takes, about.
    pub(crate) fn bytes(&self) -> u64 {
        // A page, and its place in the map.
        (self.pages.len() as u64).saturating_mul(PAGE_WORDS * 8 + 64)
    }

    /// The parts of the number space that may hold members, in no order.
    pub(crate) fn ranges(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let page = PAGE_WORDS * 64;
        self.pages.keys().map(move |p| p.saturating_mul(page)..(p + 1).saturating_mul(page))
    }
}

fn page_word_bit(cluster: u64) -> (u64, usize, u64) {
    let word = cluster / 64;
    (word / PAGE_WORDS, (word % PAGE_WORDS) as usize, 1 << (cluster % 64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn far_apart_clusters_cost_a_page_each() {
        let mut set = ClusterSet::default();
        for c in [0, 63, 64, 1 << 20, u64::MAX] {
            assert!(!set.contains(c));
            assert!(set.insert(c) && !set.insert(c) && set.contains(c));
        }
        assert_eq!(set.word(0), 1 | 1 << 63);
        assert_eq!(set.word(64), 1);
        assert_eq!(set.pages.len(), 3);
    }
}
