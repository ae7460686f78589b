//! A little each night: which points' data is read now, so that each is read once in a period.
//!
//! Points wait in a line, those first whose data was read the longest ago; of what was never verified it was read
//! when it was written, so its own time counts. A run takes from the front a share of all bytes: as long as since the
//! last run is of the period (a thirtieth, where it is 30 days and the last run was yesterday). What was verified less
//! than half of the period ago is passed over: a FULL is larger than many shares, and it would be its turn again after
//! a few nights. Whatever would wait longer than the period is taken as well: the machine was off, or all was verified
//! at one time. (What was never verified waits from the first run on, or that would read all.)
//!
//! What was found unsound is read again each night, beside the share, until its file is another: an error is told as
//! long as it is there.
//!
//! What was changed since it was verified keeps its place: a chain that is consolidated each night would be read
//! each night otherwise. Where a file has a time that is to come nothing is kept: that is read each night, beside the
//! share, so that it keeps no other from its turn. What cannot be served is not read; each run tells that it cannot be.

use std::collections::HashSet;
use std::path::Path;

use super::Outcome;
use super::last_verified::{LastVerified, Memory, RollingRuns, can_be_kept};
use crate::chain::Catalog;
use crate::error::{Error, Kind, Result};
use crate::folder;

/// How often a run is expected where nobody knows when the last one was, in seconds: once a day.
const USUAL: i64 = 86_400;
/// What a run makes up for at most, in seconds: after a longer pause what is late is read as well. Runs may be a week
/// apart.
const LONGEST: i64 = 7 * 86_400;

/// A point that can be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Waiting {
    /// Where it is: the disk's place in the catalog, and its place there.
    at: (usize, usize),
    /// When its data was verified, in seconds since the epoch.
    verified: Option<i64>,
    /// When it was made.
    made: i64,
    /// Bytes to read.
    size: u64,
    /// Whether it will be known that it was read.
    kept: bool,
    /// Whether it was found unsound, and is as it was then.
    unsound: bool,
}

impl Waiting {
    fn since(&self) -> i64 {
        self.verified.unwrap_or(self.made)
    }
}

/// The points to be read at `now` (seconds since the epoch) so that each is once in `period` (seconds), each as the
/// disk's place in `catalog` and its place there.
///
/// # Errors
/// `Unsupported` if points are on FUSE, of which nothing is kept: a run would not know what the one before has read.
pub(crate) fn due(
    catalog: &Catalog,
    memory: &Memory,
    now: i64,
    period: u64,
) -> Result<HashSet<(usize, usize)>> {
    refuse_fuse(catalog)?;
    let mut waiting = Vec::new();
    for (d, disk) in catalog.disks.iter().enumerate() {
        let points = disk.points.iter().zip(memory.own_of(disk)).enumerate();
        waiting.extend(points.filter(|(_, (p, _))| p.is_served()).map(|(i, (p, own))| Waiting {
            at: (d, i),
            verified: own.map(|own| own.time),
            made: p.time,
            size: p.own_bytes,
            kept: can_be_kept(p, now),
            unsound: own.is_some_and(is_unsound),
        }));
    }
    Ok(chosen(waiting, memory.rolling(), now, i64::try_from(period).unwrap_or(i64::MAX)))
}

/// Whether a record says that a point is unsound which is still the same.
fn is_unsound(own: LastVerified) -> bool {
    own.outcome == Outcome::Unsound && !own.changed
}

fn refuse_fuse(catalog: &Catalog) -> Result<()> {
    let points = catalog.disks.iter().flat_map(|d| &d.points);
    let folders: HashSet<&Path> = points.filter_map(|p| p.source.parent()).collect();
    match folders.into_iter().find(|f| folder::is_on_fuse(f).unwrap_or(false)) {
        None => Ok(()),
        Some(folder) => {
            let what = "points on FUSE: nothing is kept of what is verified there, so that --rolling would read the \
                        same ones each time";
            Err(Error::new(Kind::Unsupported, what)
                .at_path(folder)
                .remedy("verify all of them, or name some by --since or --point"))
        }
    }
}

fn chosen(
    mut waiting: Vec<Waiting>,
    runs: Option<RollingRuns>,
    now: i64,
    period: i64,
) -> HashSet<(usize, usize)> {
    let period = period.max(1);
    // Times that are to come are another clock's.
    let last = runs.map(|r| r.last).filter(|t| *t <= now);
    let passed = last.map_or(USUAL, |t| now.saturating_sub(t)).clamp(1, period.min(LONGEST));
    let first = runs.map_or(now, |r| r.first.min(now));
    let is_beside = |w: &Waiting| !w.kept || w.unsound;
    let mut taken: HashSet<_> = waiting.iter().filter(|w| is_beside(w)).map(|w| w.at).collect();
    waiting.retain(|w| !is_beside(w));
    let all: u128 = waiting.iter().map(|w| u128::from(w.size)).sum();
    // Both are positive. Where all files are empty their turn comes, too.
    let share = all.saturating_mul(u128::from(passed.unsigned_abs()));
    let share = share.div_ceil(u128::from(period.unsigned_abs())).max(1);
    waiting.sort_by_key(|w| (w.since().min(now), w.at));
    let mut bytes = 0u128;
    for w in waiting {
        let age = now.saturating_sub(w.since().min(now));
        let is_turn = bytes < share && (w.verified.is_none() || age >= period / 2);
        // Since when it could have been read.
        let waits = now.saturating_sub(w.verified.unwrap_or(w.made.max(first)));
        if is_turn || waits >= period {
            bytes += u128::from(w.size);
            taken.insert(w.at);
        }
    }
    taken
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: i64 = 86_400;

    /// Points of one disk that are made a day apart from day 0 on, of these sizes.
    fn line(sizes: &[u64]) -> Vec<Waiting> {
        let one = |(i, size): (usize, &u64)| {
            let made = i64::try_from(i).unwrap() * DAY;
            Waiting { at: (0, i), verified: None, made, size: *size, kept: true, unsound: false }
        };
        sizes.iter().enumerate().map(one).collect()
    }

    /// A run each day until this one.
    fn daily(now: i64) -> Option<RollingRuns> {
        Some(RollingRuns { first: now - DAY, last: now - DAY })
    }

    /// Runs as often as `nights` says, the first time after `runs`. Gives what was read in each, and the most bytes of
    /// one.
    fn run_after(
        runs: &mut Option<RollingRuns>,
        line: &mut [Waiting],
        period: i64,
        nights: &[i64],
    ) -> (Vec<usize>, u64) {
        let (mut counts, mut most) = (Vec::new(), 0);
        for now in nights {
            let taken = chosen(line.to_vec(), *runs, *now, period);
            *runs = Some(RollingRuns { first: runs.map_or(*now, |r| r.first), last: *now });
            let read = line.iter_mut().filter(|w| taken.contains(&w.at));
            let mut bytes = 0;
            read.for_each(|w| {
                w.verified = Some(*now);
                bytes += w.size;
            });
            counts.push(taken.len());
            most = most.max(bytes);
        }
        (counts, most)
    }

    fn run(line: &mut [Waiting], period: i64, nights: &[i64]) -> (Vec<usize>, u64) {
        run_after(&mut None, line, period, nights)
    }

    #[test]
    fn each_point_is_read_once_in_the_period_and_each_night_has_its_share() {
        let mut points = line(&[10; 90]);
        let nights: Vec<i64> = (100..130).map(|d| d * DAY).collect();
        let (counts, most) = run(&mut points, 30 * DAY, &nights);
        assert_eq!(counts, [3; 30]);
        assert_eq!(most, 30);
        assert!(points.iter().all(|w| w.verified.is_some()));
        // The next round begins with the first again.
        assert_eq!(
            chosen(points, daily(130 * DAY), 130 * DAY, 30 * DAY),
            HashSet::from([(0, 0), (0, 1), (0, 2)])
        );
    }

    #[test]
    fn what_was_verified_at_one_time_is_spread_before_it_is_late() {
        let mut points = line(&[10; 90]);
        points.iter_mut().for_each(|w| w.verified = Some(100 * DAY));
        let nights: Vec<i64> = (101..161).map(|d| d * DAY).collect();
        let (counts, _) = run(&mut points, 30 * DAY, &nights);
        assert_eq!(counts[..14], [0; 14]);
        // In the first round half of them; the rest is late in one night. From then on all.
        assert_eq!((counts[14], &counts[15..29], counts[29]), (3, &[3; 14][..], 45));
        assert_eq!(counts[30..44], [3; 14]);
        assert!(points.iter().all(|w| w.verified >= Some(131 * DAY)), "{points:?}");
    }

    #[test]
    fn a_large_full_among_small_increments_is_read_by_itself() {
        let mut sizes = vec![1; 60];
        sizes[0] = 1000;
        let mut points = line(&sizes);
        let nights: Vec<i64> = (100..130).map(|d| d * DAY).collect();
        let (counts, most) = run(&mut points, 30 * DAY, &nights);
        assert_eq!((&counts[..3], most), (&[1, 36, 23][..], 1000));
        // And not again before half of the time is over, though it is the first in the line.
        assert_eq!((&counts[3..15], counts[15]), (&[0; 12][..], 1));
        assert!(points.iter().all(|w| w.verified.is_some()), "{points:?}");
    }

    #[test]
    fn a_run_each_hour_takes_a_share_of_an_hour_and_one_after_a_pause_what_is_late() {
        let mut points = line(&[10; 720]);
        let hours: Vec<i64> = (1..25).map(|h| 1000 * DAY + h * 3600).collect();
        let mut runs = None;
        let (counts, _) = run_after(&mut runs, &mut points, 30 * DAY, &hours);
        // Nobody knows when the first one's predecessor was.
        assert_eq!((counts[0], &counts[1..]), (24, &[1; 23][..]));
        // After twenty days a share of a week.
        let (counts, _) = run_after(&mut runs, &mut points, 30 * DAY, &[1021 * DAY]);
        assert_eq!(counts, [168]);
        // After thirty more all is late that was read, and what has never been, for it waits since the first run.
        let (counts, _) = run_after(&mut runs, &mut points, 30 * DAY, &[1051 * DAY]);
        assert_eq!(counts, [720]);
    }

    #[test]
    fn times_that_are_to_come_and_no_sizes_do_no_harm() {
        assert!(chosen(Vec::new(), None, 0, 1).is_empty());
        let (far, made, kept) = (Some(i64::MAX), i64::MIN, true);
        let far = Waiting { at: (0, 0), verified: far, made, size: u64::MAX, kept, unsound: false };
        let none = Waiting { at: (0, 1), verified: None, made, size: 0, kept, unsound: false };
        let (soon, other) = (None, Some(RollingRuns { first: i64::MAX, last: i64::MAX }));
        assert_eq!(chosen(vec![far, none], other, DAY, 0), HashSet::from([(0, 0), (0, 1)]));
        assert_eq!(chosen(vec![none], other, i64::MIN, i64::MAX), HashSet::from([(0, 1)]));
        let both = chosen(vec![far, far, none], soon, DAY, i64::MAX);
        assert!(both.contains(&(0, 1)), "{both:?}");
    }

    #[test]
    fn what_nothing_can_be_kept_of_keeps_no_other_from_its_turn() {
        let mut points = line(&[10; 30]);
        // The first in the line every night.
        points[0].kept = false;
        points[0].size = 1000;
        for (night, next) in [(100, 1), (101, 2), (102, 3)] {
            let taken = chosen(points.clone(), daily(night * DAY), night * DAY, 29 * DAY);
            assert_eq!(taken, HashSet::from([(0, 0), (0, next)]));
            points[next].verified = Some(night * DAY);
        }
    }
    #[test]
    fn what_others_verify_takes_nothing_from_a_nights_share() {
        let mut points = line(&[10; 90]);
        let mut runs = None;
        for night in 100..130 {
            // Five hours before, all that is new.
            points[89].verified = Some(night * DAY - 5 * 3600);
            let (counts, _) = run_after(&mut runs, &mut points, 30 * DAY, &[night * DAY]);
            assert_eq!(counts, [3], "{night}");
        }
        assert!(points.iter().all(|w| w.verified >= Some(100 * DAY)));
    }

    #[test]
    fn what_was_never_verified_is_late_a_period_after_the_first_run() {
        let mut points = line(&[10; 90]);
        let first = RollingRuns { first: 100 * DAY, last: 129 * DAY };
        let night =
            |now: i64, points: &[Waiting]| chosen(points.to_vec(), Some(first), now, 30 * DAY);
        // A share of a day, though all are older than the period.
        assert_eq!(night(130 * DAY - 1, &points).len(), 3);
        assert_eq!(night(130 * DAY, &points).len(), 90);
        // Not what was made later.
        points[7].made = 100 * DAY + 1;
        assert_eq!(night(130 * DAY, &points).len(), 89);
        assert_eq!(night(130 * DAY + 1, &points).len(), 90);
    }

    #[test]
    fn what_was_found_unsound_is_read_each_night_beside_the_share() {
        let mut points = line(&[10; 30]);
        points[5] = Waiting { verified: Some(99 * DAY), unsound: true, size: 1000, ..points[5] };
        for (night, next) in [(100, 0), (101, 1), (102, 2)] {
            let taken = chosen(points.clone(), daily(night * DAY), night * DAY, 29 * DAY);
            assert_eq!(taken, HashSet::from([(0, 5), (0, next)]));
            points[5].verified = Some(night * DAY);
            points[next].verified = Some(night * DAY);
        }
        let record = |outcome, changed| LastVerified { time: 0, outcome, changed };
        assert!(is_unsound(record(Outcome::Unsound, false)));
        assert!(!is_unsound(record(Outcome::Unsound, true)));
        assert!(!is_unsound(record(Outcome::Unproven, false)));
    }
}
