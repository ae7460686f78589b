//! Where the clusters of an attribute are ("mapping pairs"): lengths, and each start as the difference to the one
//! before; no start is a hole.

use std::ops::Range;
use std::sync::Arc;

use super::super::blocks::{Blocks, Holding};
use super::super::source::Source;
use crate::error::{Kind, Result};

/// Clusters one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    /// The attribute's cluster with which it begins.
    pub vcn: u64,
    /// How many, at least 1.
    pub count: u64,
    /// The volume's cluster with which it begins; `None` for a hole.
    pub lcn: Option<u64>,
}

/// Runs that are counted against the cache at once: most files have fewer.
const STEP: usize = 256;

/// All runs of an attribute, without gaps, from its first cluster on.
#[derive(Default)]
pub(super) struct Runs {
    list: Vec<Run>,
    /// Clusters in all, and how many of them are no holes.
    end: u64,
    real: u64,
    held: Vec<Holding>,
}

impl Runs {
    /// Adds what one record has of them: it begins with cluster `lowest` of the attribute. `clusters` are in the
    /// volume. In words, what is wrong with them.
    ///
    /// # Errors
    /// `Unsupported` if they do not fit into the cache.
    pub(super) fn add(
        &mut self,
        mapping: &[u8],
        (lowest, highest): (u64, u64),
        clusters: u64,
        blocks: &Arc<Blocks>,
    ) -> Result<Result<(), &'static str>> {
        if lowest != self.end {
            return Ok(Err("has extents that do not follow each other"));
        }
        let (mut rest, mut lcn) = (mapping, 0u64);
        while let Some((head, tail)) = rest.split_first().filter(|(head, _)| **head != 0) {
            if self.list.len() >= self.held.len() * STEP {
                self.held.push(blocks.hold((STEP * size_of::<Run>()) as u64)?);
            }
            let Some((run, after)) = decode(*head, tail, lcn) else {
                return Ok(Err("has an invalid run list"));
            };
            if let Err(what) = self.push(run, clusters) {
                return Ok(Err(what));
            }
            lcn = run.1.unwrap_or(lcn);
            rest = after;
        }
        // An empty attribute ends with cluster -1.
        if self.end != highest.wrapping_add(1) {
            return Ok(Err("has a run list of the wrong length"));
        }
        Ok(Ok(()))
    }

    fn push(&mut self, (count, lcn): Pair, clusters: u64) -> Result<(), &'static str> {
        let beyond = "has clusters beyond the end of the volume";
        let vcn = self.end;
        self.end = vcn.checked_add(count).filter(|e| *e < 1 << 55).ok_or("is too long")?;
        if let Some(lcn) = lcn {
            let inside = lcn.checked_add(count).is_some_and(|end| end <= clusters);
            self.real = self.real.saturating_add(count);
            match (inside, self.real <= clusters) {
                (false, _) => return Err(beyond),
                (_, false) => return Err("has more clusters than the volume"),
                _ => {}
            }
        }
        match self.list.last_mut() {
            Some(last) if follows(last, lcn) => last.count += count,
            _ => self.list.push(Run { vcn, count, lcn }),
        }
        Ok(())
    }

    /// Clusters in all.
    pub(super) fn end(&self) -> u64 {
        self.end
    }

    /// Where all of them are, in bytes of the volume.
    pub(super) fn places(&self, cluster: u64) -> impl Iterator<Item = Range<u64>> {
        let real = self.list.iter().filter_map(|r| Some((r.lcn?, r.count)));
        // They end inside the volume.
        real.map(move |(lcn, count)| lcn * cluster..(lcn + count) * cluster)
    }

    /// What is at cluster `vcn` of the attribute, and how far that goes; `None` behind the end.
    pub(super) fn at(&self, vcn: u64) -> Option<Run> {
        let index = self.list.partition_point(|r| r.vcn <= vcn).checked_sub(1)?;
        let run = self.list.get(index)?;
        let inside = vcn - run.vcn;
        let count = run.count.checked_sub(inside).filter(|c| *c > 0)?;
        Some(Run { vcn, count, lcn: run.lcn.map(|lcn| lcn + inside) })
    }

    /// Fills `buf` with what is at byte `offset` of the attribute, by way of the cache: for metadata.
    ///
    /// # Errors
    /// `Corrupt` if that is behind its end; what reading the point says.
    pub(super) fn read(
        &self,
        source: &Source,
        cluster: u64,
        buf: &mut [u8],
        offset: u64,
    ) -> Result<()> {
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let run = self.at(at / cluster);
            let run =
                run.ok_or_else(|| source.error(Kind::Corrupt, "offset beyond the extents", at))?;
            let inside = at % cluster;
            let left = run.count.saturating_mul(cluster) - inside;
            let (part, tail) = rest.split_at_mut(left.min(rest.len() as u64) as usize);
            match run.lcn {
                Some(lcn) => source.read_meta(part, lcn * cluster + inside)?,
                None => part.fill(0),
            }
            (at, rest) = (at + part.len() as u64, tail);
        }
        Ok(())
    }
}

/// Whether something at `lcn` is the continuation of `last`.
fn follows(last: &Run, lcn: Option<u64>) -> bool {
    match (last.lcn, lcn) {
        (None, None) => true,
        (Some(before), Some(lcn)) => before + last.count == lcn,
        _ => false,
    }
}

/// How many clusters, and with which of the volume's they begin.
type Pair = (u64, Option<u64>);

/// One pair: how many clusters, and where; and what is behind it.
fn decode(head: u8, bytes: &[u8], before: u64) -> Option<(Pair, &[u8])> {
    let (count_len, lcn_len) = (usize::from(head & 15), usize::from(head >> 4));
    if !(1..=8).contains(&count_len) || lcn_len > 8 {
        return None;
    }
    let (count, rest) = bytes.split_at_checked(count_len)?;
    let (lcn, rest) = rest.split_at_checked(lcn_len)?;
    let count = u64::try_from(signed(count)).ok().filter(|c| *c > 0)?;
    let lcn = match lcn_len {
        0 => None,
        _ => Some(before.checked_add_signed(signed(lcn))?),
    };
    Some(((count, lcn), rest))
}

/// A number of up to eight bytes, the lowest first, the highest with the sign.
fn signed(bytes: &[u8]) -> i64 {
    let sign = bytes.last().is_some_and(|b| b & 0x80 != 0);
    let start = if sign { -1 } else { 0 };
    bytes.iter().rev().fold(start, |n, b| (n << 8) | i64::from(*b))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    fn parse(mapping: &[u8], highest: u64) -> Result<Runs, &'static str> {
        let mut runs = Runs::default();
        let added = runs.add(mapping, (0, highest), 10_000, &Blocks::new(1 << 20)).unwrap();
        added.map(|()| runs)
    }

    #[test]
    fn runs_with_holes_and_steps_back() {
        // 24 clusters at 0x2211, a hole of 16, 8 clusters 0x11 before; as in the documentation of Linux-NTFS.
        let runs = parse(&[0x21, 0x18, 0x11, 0x22, 0x01, 0x10, 0x11, 0x08, 0xef, 0], 47).unwrap();
        assert_eq!(runs.end(), 48);
        assert_eq!(runs.at(5), Some(Run { vcn: 5, count: 19, lcn: Some(0x2216) }));
        assert_eq!(runs.at(24), Some(Run { vcn: 24, count: 16, lcn: None }));
        assert_eq!(runs.at(47), Some(Run { vcn: 47, count: 1, lcn: Some(0x2207) }));
        assert_eq!(runs.at(48), None);
        assert!(parse(&[0], u64::MAX).is_ok_and(|r| r.at(0).is_none()));
    }

    #[test]
    fn neighbours_become_one() {
        let runs = parse(&[0x11, 2, 10, 0x11, 3, 2, 0x01, 1, 0x01, 1, 0], 6).unwrap();
        assert_eq!(runs.list.len(), 2);
        assert_eq!(runs.at(1), Some(Run { vcn: 1, count: 4, lcn: Some(11) }));
    }

    #[test]
    fn what_cannot_be_is_told() {
        let wrong: [&[u8]; 7] = [
            &[0x11, 1],                            // cut
            &[0x10, 1, 1, 0],                      // no length
            &[0x11, 0, 1, 0],                      // of nothing
            &[0x11, 1, 0xff, 0],                   // before the beginning
            &[0x21, 1, 0x10, 0x27, 0],             // at the end
            &[0x19, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], // nine bytes
            &[0x12, 0, 0x20, 1, 0x12, 0, 0x20, 1], // more than there is
        ];
        for bytes in wrong {
            assert!(parse(bytes, 0).is_err(), "{bytes:?}");
        }
        assert!(parse(&[0x11, 1, 1, 0], 7).is_err());
        assert!(parse(&[0x12, 0x00, 0x20, 1, 0x12, 0, 0x20, 1, 0], 16383).is_err());
        let mut runs = Runs::default();
        let blocks = Blocks::new(1 << 20);
        assert!(runs.add(&[0], (5, 4), 10, &blocks).unwrap().is_err());
    }

    #[test]
    fn endless_lists_are_bounded_by_the_cache() {
        let mapping: Vec<u8> = (0..40_000).flat_map(|_| [0x11, 1, 2]).collect();
        let mut runs = Runs::default();
        let e = runs.add(&mapping, (0, 39_999), 1 << 40, &Blocks::new(600_000)).unwrap_err();
        assert_eq!(e.kind(), Kind::Unsupported);
    }
}
