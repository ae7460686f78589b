//! Which parts of a disk may differ between two points, as a bit for each unit: bounded, however many there are.

use std::ops::Range;

use super::Image;
use crate::error::Result;

/// The smallest unit: what backups are made in.
const UNIT: u64 = 64 << 10;
/// Bits at most: 4 MiB of them.
const MAX_BITS: u64 = 1 << 25;

/// A map of what may differ. A unit counts as a whole if something in it does.
pub struct ChangedMap {
    unit: u64,
    bits: Vec<u64>,
    /// Bytes that both disks have; what is beyond has changed.
    both: u64,
}

impl ChangedMap {
    /// What may differ between two points.
    ///
    /// # Errors
    /// As [`Image::for_each_change`].
    pub fn between(from: &Image, to: &Image) -> Result<ChangedMap> {
        let both = from.size().min(to.size());
        let unit = both.div_ceil(MAX_BITS).next_power_of_two().max(UNIT);
        let mut map = ChangedMap { unit, bits: vec![0; both.div_ceil(unit * 64) as usize], both };
        from.for_each_change(to, 0..both, |change| {
            for unit in change.start / unit..change.end().div_ceil(unit) {
                if let Some(word) = map.bits.get_mut((unit / 64) as usize) {
                    *word |= 1 << (unit % 64);
                }
            }
            true
        })?;
        Ok(map)
    }

    /// Whether something in `range` may differ.
    pub fn has(&self, range: Range<u64>) -> bool {
        let is_set = |unit: u64| {
            let word = self.bits.get((unit / 64) as usize).copied().unwrap_or(u64::MAX);
            word >> (unit % 64) & 1 == 1
        };
        range.end > self.both
            || (range.start / self.unit..range.end.div_ceil(self.unit)).any(is_set)
    }
}
