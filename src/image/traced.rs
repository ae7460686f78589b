//! [`Traced`]: a point that remembers which of its bytes were read. Whoever did nothing but read these would read
//! the same of another point in which none of them has changed, and come to the same result.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Image;
use crate::error::Result;
use crate::storage::ReadAt;

/// Ranges that are remembered; of more, all from the first to the last counts as read.
const MAX_RANGES: usize = 1 << 14;

/// Ranges that do not overlap, by their starts.
#[derive(Debug, Clone, Default)]
pub struct Trace(BTreeMap<u64, u64>);

impl Trace {
    /// Whether nothing was read.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn add(&mut self, range: Range<u64>) {
        let (mut start, mut end) = (range.start, range.end);
        while let Some((at, to)) = self.0.range(..=end).next_back().map(|(a, b)| (*a, *b))
            && to >= start
        {
            self.0.remove(&at);
            (start, end) = (start.min(at), end.max(to));
        }
        self.0.insert(start, end);
        if self.0.len() > MAX_RANGES
            && let (Some((first, _)), Some((_, last))) =
                (self.0.first_key_value(), self.0.last_key_value())
        {
            self.0 = BTreeMap::from([(*first, *last)]);
        }
    }

    /// Whether something of it may differ between two points.
    ///
    /// # Errors
    /// As [`Image::for_each_change`].
    pub fn may_differ(&self, from: &Image, to: &Image) -> Result<bool> {
        if from.size() != to.size() {
            return Ok(true);
        }
        for (start, end) in &self.0 {
            if from.may_differ(to, *start..*end)? {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// A point, and what was read of it.
pub struct Traced {
    image: Arc<Image>,
    trace: Mutex<Trace>,
}

impl Traced {
    /// A point of which nothing was read.
    pub fn new(image: Arc<Image>) -> Arc<Self> {
        Arc::new(Traced { image, trace: Mutex::default() })
    }

    /// What was read since the last call.
    pub fn take(&self) -> Trace {
        std::mem::take(&mut *self.lock())
    }

    fn lock(&self) -> MutexGuard<'_, Trace> {
        self.trace.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ReadAt for Traced {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let end = offset.saturating_add(buf.len() as u64);
        self.lock().add(offset..end);
        ReadAt::read_at(&*self.image, buf, offset)
    }

    fn len(&self) -> u64 {
        self.image.size()
    }

    fn name(&self) -> &Path {
        self.image.name()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_touch_are_one_and_too_many_are_all_between() {
        let mut trace = Trace::default();
        for range in [10..20, 40..50, 20..30, 5..11, 45..60, 0..1] {
            trace.add(range);
        }
        let all = |t: &Trace| t.0.iter().map(|(a, b)| (*a, *b)).collect::<Vec<_>>();
        assert_eq!(all(&trace), [(0, 1), (5, 30), (40, 60)]);
        (0..MAX_RANGES as u64).for_each(|i| trace.add(100 + 4 * i..102 + 4 * i));
        assert!(
            trace.0.len() < MAX_RANGES && trace.0.first_key_value().unwrap() == (&0, &trace.0[&0])
        );
        assert!(trace.0[&0] > 4 * MAX_RANGES as u64);
    }
}
