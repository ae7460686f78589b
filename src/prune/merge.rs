//! Which chains `prune --consolidate` shortens.

use std::collections::{BTreeMap, BTreeSet};

use super::planned::{DiskItems, PointPlan, Unmerged};
use super::reason::Reason;
use crate::layout::Level;

/// Whether a chain of a disk can become one FULL up to a point, once these points of the disk are
/// gone; else why not. Disk and points are indices.
pub type CanMerge<'a> = dyn Fn(usize, usize, &BTreeSet<usize>) -> Result<(), String> + 'a;

/// Of each chain whose FULL is kept only for others: the oldest point that is wanted, if it is an
/// INC and nothing wanted is older. What is older becomes part of it, if `can` says so.
pub(super) fn shortened(
    disk: &DiskItems,
    points: &mut [PointPlan],
    can: impl Fn(usize, &BTreeSet<usize>) -> Result<(), String>,
) -> (Vec<String>, Vec<Unmerged>) {
    let (mut merged, mut unmerged) = (Vec::new(), Vec::new());
    let gone: BTreeSet<usize> = (0..points.len()).filter(|i| points[*i].keep.is_empty()).collect();
    let mut chains: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (i, item) in disk.items.iter().enumerate() {
        chains.entry(&item.chain).or_default().push(i);
    }
    for members in chains.into_values() {
        let Some((i, before)) = until(disk, points, members) else { continue };
        let until = disk.items[i].name.clone();
        if let Err(why) = can(i, &gone) {
            unmerged.push(Unmerged { until, why });
            continue;
        }
        for j in before.into_iter().filter(|j| !gone.contains(j)) {
            points[j].keep = vec![Reason::MergedInto(until.clone())];
        }
        merged.push(until);
    }
    (merged, unmerged)
}

/// The point that a chain with these members could begin with, and what is older.
fn until(
    disk: &DiskItems,
    points: &[PointPlan],
    members: Vec<usize>,
) -> Option<(usize, Vec<usize>)> {
    let is_wanted = |i: &&usize| points[**i].keep.iter().any(Reason::is_own);
    let i = *members.iter().find(is_wanted)?;
    let item = &disk.items[i];
    if item.level != Level::Inc || item.parent.is_none() || !item.served {
        return None;
    }
    // What may be needed by a point of another chain cannot become part of this one.
    let before: Vec<usize> = members.into_iter().take_while(|j| *j != i).collect();
    let only_for_it = |j: &usize| points[*j].keep.iter().all(|r| matches!(r, Reason::NeededBy(_)));
    before.iter().all(only_for_it).then_some((i, before))
}
