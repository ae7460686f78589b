//! How long the other side is waited for in all.
//!
//! Silence alone is no measure: whoever sends a byte, or a sign of work, every now and then is never silent, and could
//! keep the target locked for ever. So there is an end by the clock besides, which nothing moves but what comes of the
//! other side: bytes of an image, an image that became a file, an answer to what was asked. Work of known size is
//! waited for as long as a slow disk takes for it, until the next request: what is left of that is nobody's, or it
//! could be saved up. What we take ourselves does not count.

use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Bytes of an image per second below which a line counts as dead.
const SLOWEST_LINE: u64 = 1 << 10;
/// Bytes of a hole per second: what passes of it is five bytes, and the work is hashing its zeros.
const SLOWEST_HOLE: u64 = 128 << 20;
/// Bytes per second below which a disk counts as dead when a file is read for its hash.
const SLOWEST_DISK: u64 = 8 << 20;
/// What opening a file takes at most on a slow disk.
const FILE: Duration = Duration::from_secs(1);

/// The end by the clock.
pub(super) struct Patience {
    whole: Duration,
    state: Mutex<State>,
}

struct State {
    /// The end, but for what is allowed besides.
    until: Instant,
    /// What is allowed for the last request, and since when.
    allowed: Duration,
    since: Instant,
}

impl Patience {
    /// All of it begins now.
    pub(super) fn new(whole: Duration) -> Self {
        let now = Instant::now();
        let state = State { until: later(now, whole), allowed: Duration::ZERO, since: now };
        Patience { whole, state: Mutex::new(state) }
    }

    /// How much is left; nothing if it is over.
    pub(super) fn left(&self) -> Duration {
        let state = self.state();
        later(state.until, state.allowed).saturating_duration_since(Instant::now())
    }

    /// All of it.
    pub(super) fn whole(&self) -> Duration {
        self.whole
    }

    /// Something came of it: all of it begins anew.
    pub(super) fn renew(&self) {
        self.settle();
        self.earn(self.whole);
    }

    /// So many bytes of an image went from one side to the other.
    pub(super) fn moved(&self, bytes: u64) {
        self.earn(time_for(bytes, SLOWEST_LINE));
    }

    /// The same of a hole of so many bytes.
    pub(super) fn passed(&self, bytes: u64) {
        self.earn(time_for(bytes, SLOWEST_HOLE));
    }

    /// The other side has to read `files` files of so many bytes all together, before it says the next thing.
    pub(super) fn allow(&self, files: u32, bytes: u64) {
        let time = FILE.saturating_mul(files).saturating_add(time_for(bytes, SLOWEST_DISK));
        let mut state = self.state();
        if state.allowed.is_zero() {
            state.since = Instant::now();
        }
        state.allowed = state.allowed.saturating_add(time);
    }

    /// It has said the next thing: of what was allowed it had as much as it took, and the rest is gone.
    pub(super) fn settle(&self) {
        let mut state = self.state();
        let took = state.since.elapsed().min(state.allowed);
        state.until = later(state.until, took);
        state.allowed = Duration::ZERO;
    }

    /// So long it was us who were waited for.
    pub(super) fn forgive(&self, time: Duration) {
        let mut state = self.state();
        state.until = later(state.until, time);
    }

    /// Later by `time`, but never by more than all of it from now: what was earned cannot be saved up.
    fn earn(&self, time: Duration) {
        let mut state = self.state();
        let most = later(Instant::now(), self.whole);
        state.until = later(state.until, time).min(most).max(state.until);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }
}

fn time_for(bytes: u64, per_second: u64) -> Duration {
    let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(per_second);
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

/// The same time where there is none that is so late.
fn later(at: Instant, time: Duration) -> Instant {
    at.checked_add(time).unwrap_or(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn what_is_earned_is_never_more_than_all_of_it_and_what_is_allowed_comes_on_top() {
        let p = Patience::new(HOUR);
        for _ in 0..100 {
            p.moved(1 << 40);
            p.passed(u64::MAX);
            p.renew();
        }
        assert!(p.left() <= HOUR && p.left() > HOUR / 2, "{:?}", p.left());
        p.allow(0, 3600 * SLOWEST_DISK);
        assert!(p.left() > HOUR + HOUR / 2 && p.left() <= 2 * HOUR, "{:?}", p.left());
        // It is not taken away again.
        p.moved(1);
        assert!(p.left() > HOUR + HOUR / 2);
        p.allow(u32::MAX, u64::MAX);
        p.forgive(Duration::MAX);
        p.allow(u32::MAX, u64::MAX);
    }

    #[test]
    fn what_is_allowed_is_there_until_the_next_request_and_cannot_be_saved_up() {
        let p = Patience::new(HOUR);
        for _ in 0..10 {
            p.allow(1, 3600 * SLOWEST_DISK);
            p.allow(1, 3600 * SLOWEST_DISK);
            p.settle();
        }
        let left = p.left();
        // Each time it had what passed since.
        assert!(left <= HOUR && left > HOUR / 2, "{left:?}");
        // What it took of that does not count, and no more than was allowed.
        for (allowed, want) in [(10, 1), (0, 0)] {
            p.allow(allowed, 0);
            let before = p.state().until;
            let since = Instant::now().checked_sub(Duration::from_secs(1)).unwrap();
            p.state().since = since;
            p.settle();
            let more = p.state().until - before;
            let bounds = Duration::from_secs(want)..=Duration::from_secs(u64::from(allowed));
            assert!(bounds.contains(&more), "{more:?}");
        }
    }

    #[test]
    fn an_end_that_is_over_is_moved_by_what_came_alone() {
        let p = Patience::new(Duration::ZERO);
        assert_eq!(p.left(), Duration::ZERO);
        p.renew();
        p.moved(u64::MAX);
        assert_eq!(p.left(), Duration::ZERO);
        p.allow(3600, 0);
        assert!(p.left() > HOUR / 2);
    }

    #[test]
    fn a_slow_line_earns_as_much_as_it_takes() {
        assert_eq!(time_for(4 << 10, SLOWEST_LINE), Duration::from_secs(4));
        assert_eq!(time_for(1 << 30, SLOWEST_HOLE), Duration::from_secs(8));
        assert!(time_for(1, SLOWEST_LINE) > Duration::ZERO);
    }
}
