//! What the walk has found: which clusters are in use, and what is wrong.

use super::clusters::ClusterSet;
use crate::error::Finding;

/// Findings kept of one file; thousands more would say nothing new.
const MAX_FINDINGS: usize = 20;

/// What to do about a damaged file.
pub(crate) const REMEDY: &str = "restore this file from another copy of the backup";

/// Which host clusters hold what.
#[derive(Debug, Default)]
pub(super) struct ClusterUse {
    /// Header, L1 tables, refcounts, snapshot table, bitmaps: exclusively used.
    pub meta: ClusterSet,
    /// L2 tables.
    pub l2: ClusterSet,
    /// Plain data.
    pub data: ClusterSet,
    /// Compressed data.
    pub packed: ClusterSet,
}

impl ClusterUse {
    /// The use of 64 clusters from `first` on.
    pub(super) fn word(&self, first: u64) -> u64 {
        [&self.meta, &self.l2, &self.data, &self.packed].iter().fold(0, |w, s| w | s.word(first))
    }

    /// Of these, the ones whose refcount must be exactly 1 if there are no snapshots.
    pub(super) fn exclusive_word(&self, first: u64) -> u64 {
        self.word(first) & !self.packed.word(first)
    }
}

/// Findings with a bound.
#[derive(Default)]
pub(crate) struct FindingList {
    found: Vec<Finding>,
    more: u64,
}

impl FindingList {
    /// Keeps it, or counts it.
    pub(crate) fn push(&mut self, finding: Finding) {
        if self.found.len() < MAX_FINDINGS {
            self.found.push(finding);
        } else {
            self.more += 1;
        }
    }

    /// What was kept; the last one says how many were not.
    pub(crate) fn finish(&mut self) -> Vec<Finding> {
        let mut found = std::mem::take(&mut self.found);
        if self.more > 0
            && let Some(last) = found.last_mut()
        {
            last.message.push_str(&format!(" (and {} more findings)", self.more));
        }
        found
    }
}
