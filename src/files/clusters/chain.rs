//! [`Chain`]: the clusters of one file or folder, in runs of neighbours.

use std::ops::Range;

use super::super::blocks::Holding;
use super::{Clusters, Link};
use crate::error::{Error, Result};

/// Runs that are counted against the cache at once.
const STEP: usize = 4096;
/// What one takes.
const RUN_BYTES: u64 = size_of::<Run>() as u64;
/// After so many clusters somebody looks whether a chain has led back into itself; then after twice as many.
const LOOK: u32 = 4096;

/// Neighbouring clusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    /// Which cluster of the file the first is.
    index: u32,
    /// Its number.
    first: u32,
}

/// How a chain ended.
enum Ending {
    /// It may go on: as many as were asked for are there.
    Enough,
    /// As it should.
    End,
    /// With an entry that cannot follow.
    Wrong { cluster: u32, what: String },
}

/// The clusters of a file.
pub(in super::super) struct Chain {
    runs: Vec<Run>,
    len: u32,
    /// Why there are fewer than the file needs, and at which cluster.
    broken: Option<(u32, String)>,
    held: Vec<Holding>,
}

impl Chain {
    /// No clusters at all.
    pub(in super::super) fn empty() -> Chain {
        Chain { runs: Vec::new(), len: 0, broken: None, held: Vec::new() }
    }

    /// Neighbours that need no table, for `bytes` bytes.
    ///
    /// # Errors
    /// `Corrupt` if there are not so many.
    pub(in super::super) fn contiguous(
        clusters: &Clusters,
        first: u32,
        bytes: u64,
    ) -> Result<Chain> {
        let len = clusters.needed(bytes);
        let last = u64::from(first).checked_add(len.saturating_sub(1));
        let last = last.and_then(|l| u32::try_from(l).ok());
        if !clusters.has(first) || !last.is_some_and(|l| clusters.has(l)) {
            let what = format!("{len} clusters from {first} on end beyond the last cluster");
            return Err(clusters.source.error(crate::error::Kind::Corrupt, what, 0));
        }
        let mut chain = Chain::empty();
        chain.runs.push(Run { index: 0, first });
        chain.len = len as u32;
        Ok(chain)
    }

    /// The clusters from `first` on that `bytes` bytes need. Where there are fewer, reading fails behind them.
    ///
    /// # Errors
    /// `Corrupt` if they lead round in a circle; `Unsupported` if the cache is too small for them; what reading the
    /// point says.
    pub(in super::super) fn of_file(clusters: &Clusters, first: u32, bytes: u64) -> Result<Chain> {
        let needed = clusters.needed(bytes);
        if needed == 0 {
            return Ok(Chain::empty());
        }
        // More than there are comes to an end by itself.
        let most = u32::try_from(needed).unwrap_or(u32::MAX);
        let (mut chain, ending) = walk(clusters, first, most)?;
        chain.broken = match ending {
            Ending::Enough if u64::from(chain.len) == needed => None,
            Ending::Enough | Ending::End => Some((
                first,
                format!(
                    "the cluster chain from {first} on has {} clusters, but {needed} are needed",
                    chain.len
                ),
            )),
            Ending::Wrong { cluster, what } => Some((cluster, what)),
        };
        Ok(chain)
    }

    /// All clusters from `first` on, at most `most`. Reading fails behind the last one that is right.
    ///
    /// # Errors
    /// As [`Chain::of_file`].
    pub(in super::super) fn of_folder(clusters: &Clusters, first: u32, most: u32) -> Result<Chain> {
        let (mut chain, ending) = walk(clusters, first, most.saturating_add(1))?;
        chain.broken = match ending {
            Ending::End => None,
            Ending::Enough => {
                let what = format!("the directory at cluster {first} is larger than can be");
                Some((first, what))
            }
            Ending::Wrong { cluster, what } => Some((cluster, what)),
        };
        Ok(chain)
    }

    /// How many bytes there are.
    pub(in super::super) fn bytes(&self, clusters: &Clusters) -> u64 {
        u64::from(self.len) * clusters.size
    }

    /// Where byte `offset` of the file is in the volume, and how many bytes follow it there; `None` at the end.
    ///
    /// # Errors
    /// `Corrupt` if there should be something.
    pub(in super::super) fn place(
        &self,
        clusters: &Clusters,
        offset: u64,
    ) -> Result<Option<(u64, u64)>> {
        let index = match u32::try_from(offset / clusters.size) {
            Ok(index) if index < self.len => index,
            _ => {
                return match &self.broken {
                    Some((cluster, what)) => Err(clusters.bad(*cluster, what)),
                    None => Ok(None),
                };
            }
        };
        let after = self.runs.partition_point(|r| r.index <= index);
        let Some(run) = after.checked_sub(1).and_then(|i| self.runs.get(i)) else {
            return Ok(None);
        };
        let end = self.runs.get(after).map_or(self.len, |r| r.index);
        let inside = offset - u64::from(run.index) * clusters.size;
        let len = u64::from(end - run.index) * clusters.size;
        Ok(Some((clusters.place(run.first) + inside, len - inside)))
    }

    /// Where all of it is in the volume, in bytes.
    pub(in super::super) fn places(&self, clusters: &Clusters) -> Vec<Range<u64>> {
        let ends = self.runs.iter().skip(1).map(|r| r.index).chain([self.len]);
        let runs = self.runs.iter().zip(ends);
        let place = |(run, end): (&Run, u32)| {
            let begin = clusters.place(run.first);
            begin..begin + u64::from(end - run.index) * clusters.size
        };
        runs.map(place).collect()
    }

    fn push(&mut self, cluster: u32, clusters: &Clusters) -> Result<()> {
        let follows = |r: &Run| r.first.checked_add(self.len - r.index) == Some(cluster);
        if !self.runs.last().is_some_and(follows) {
            if self.runs.len() >= self.held.len() * STEP {
                // The list grows by doubling, and is copied to be sorted.
                self.held.push(clusters.source.blocks().hold(4 * STEP as u64 * RUN_BYTES)?);
            }
            self.runs.push(Run { index: self.len, first: cluster });
        }
        self.len += 1;
        Ok(())
    }

    /// Fails if a cluster is in it twice: then it has no end.
    fn check(&self, clusters: &Clusters, first: u32) -> Result<()> {
        let ends = self.runs.iter().skip(1).map(|r| r.index).chain([self.len]);
        let mut all: Vec<(u32, u32)> = self
            .runs
            .iter()
            .zip(ends)
            .map(|(r, end)| (r.first, r.first + (end - r.index)))
            .collect();
        all.sort_unstable();
        match all.windows(2).any(|w| matches!(w, [a, b] if a.1 > b.0)) {
            true => Err(circle(clusters, first)),
            false => Ok(()),
        }
    }
}

fn circle(clusters: &Clusters, first: u32) -> Error {
    clusters.bad(first, format!("the cluster chain from {first} on is a loop"))
}

fn walk(clusters: &Clusters, first: u32, most: u32) -> Result<(Chain, Ending)> {
    let (mut chain, mut links, mut look) = (Chain::empty(), clusters.links(), LOOK);
    let (mut at, mut before) = (first, first);
    let ending = loop {
        if !clusters.has(at) {
            let what = format!(
                "the cluster chain from {first} on leads to cluster {at}, which does not exist"
            );
            break Ending::Wrong { cluster: before, what };
        }
        if chain.len > clusters.count {
            return Err(circle(clusters, first));
        }
        chain.push(at, clusters)?;
        if chain.len == look {
            chain.check(clusters, first)?;
            look = look.saturating_mul(2);
        }
        if chain.len == most {
            break Ending::Enough;
        }
        before = at;
        at = match links.get(at)? {
            Link::Next(next) => next,
            Link::End => break Ending::End,
            link @ (Link::Free | Link::Bad) => {
                let is = if link == Link::Free { "free" } else { "bad" };
                let what = format!(
                    "the cluster chain from {first} on leads to cluster {at}, which is marked as {is}"
                );
                break Ending::Wrong { cluster: at, what };
            }
        };
    };
    chain.check(clusters, first)?;
    Ok((chain, ending))
}
