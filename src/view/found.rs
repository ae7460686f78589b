//! What was found odd in points: kept when their file systems are closed, for as long as the points are there.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::error::Finding;
use crate::files::log_once;

/// Findings that are kept, of all points together.
const MAX: usize = 1024;

/// Findings by the numbers of their points.
#[derive(Default)]
pub(super) struct Found(Mutex<State>);

#[derive(Default)]
struct State {
    count: usize,
    points: BTreeMap<u64, Vec<Finding>>,
}

impl Found {
    /// Keeps what is new, and logs it.
    pub(super) fn add(&self, number: u64, findings: Vec<Finding>) {
        if findings.is_empty() {
            return;
        }
        let mut state = self.lock();
        for finding in findings {
            let State { count, points } = &mut *state;
            let list = points.entry(number).or_default();
            if *count < MAX && !list.contains(&finding) {
                log_once(&finding);
                *count += 1;
                list.push(finding);
            }
        }
    }

    /// All of them.
    pub(super) fn list(&self) -> Vec<Finding> {
        self.lock().points.values().flatten().cloned().collect()
    }

    /// Forgets points.
    pub(super) fn retain(&self, keep: impl Fn(u64) -> bool) {
        let mut state = self.lock();
        state.points.retain(|number, _| keep(*number));
        state.count = state.points.values().map(Vec::len).sum();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    #[test]
    fn each_finding_is_kept_once_and_no_more_than_there_is_space_for() {
        let found = Found::default();
        let finding = |n: usize| Finding::warning(Kind::Corrupt, "/b/f", format!("inode {n}"));
        for _ in 0..2 {
            found.add(1, vec![finding(1), finding(2)]);
            found.add(2, vec![finding(1)]);
        }
        assert_eq!(found.list().len(), 3);
        found.add(3, (0..5000).map(finding).collect());
        assert_eq!(found.list().len(), MAX);
        found.retain(|n| n == 2);
        assert_eq!(found.list(), vec![finding(1)]);
        found.add(1, vec![finding(7)]);
        assert_eq!(found.list().len(), 2);
    }
}
