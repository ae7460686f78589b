//! The extent list and its invariant.
//!
//! An [`ExtentList`] describes one contiguous guest range as extents that are ascending,
//! contiguous, coalesced and clipped to that range. [`ExtentList::push`] keeps the invariant by
//! construction; [`ExtentList::check`] states it for tests and fuzzing.

use std::ops::Range;

/// What an extent may carry: something that knows how it continues.
pub trait Content: Copy + PartialEq {
    /// The same content `skip` bytes further on.
    fn advanced(self, skip: u64) -> Self;

    /// Whether `next`, which starts `len` bytes after `self`, is simply its continuation.
    fn continues(self, len: u64, next: Self) -> bool {
        self.advanced(len) == next
    }
}

/// One run of equal content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent<C> {
    /// First guest byte.
    pub start: u64,
    /// Length in bytes, never 0.
    pub len: u64,
    /// What is there.
    pub content: C,
}

impl<C: Content> Extent<C> {
    /// One past the last guest byte.
    pub fn end(&self) -> u64 {
        self.start + self.len
    }

    /// The part inside `range`, if any.
    pub fn clip(&self, range: &Range<u64>) -> Option<Self> {
        let start = self.start.max(range.start);
        let end = self.end().min(range.end);
        (start < end).then(|| Extent {
            start,
            len: end - start,
            content: self.content.advanced(start - self.start),
        })
    }
}

/// Extents that cover one range without gap or overlap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExtentList<C> {
    start: u64,
    extents: Vec<Extent<C>>,
}

impl<C: Content> ExtentList<C> {
    /// An empty list that will begin at `start`.
    pub fn new(start: u64) -> Self {
        ExtentList { start, extents: Vec::new() }
    }

    /// One past the last guest byte covered so far.
    pub fn end(&self) -> u64 {
        self.extents.last().map_or(self.start, Extent::end)
    }

    /// Appends `len` bytes of `content`, merged into the last extent where it continues it.
    pub fn push(&mut self, len: u64, content: C) {
        if len == 0 {
            return;
        }
        let start = self.end();
        if let Some(last) = self.extents.last_mut()
            && last.content.continues(last.len, content)
        {
            last.len += len;
            return;
        }
        self.extents.push(Extent { start, len, content });
    }

    /// The extents, ascending.
    pub fn as_slice(&self) -> &[Extent<C>] {
        &self.extents
    }

    /// The extents, as an owned boxed slice without spare room.
    pub fn into_boxed(self) -> Box<[Extent<C>]> {
        self.extents.into_boxed_slice()
    }

    /// Says where the invariant is broken, if it is.
    pub fn check(&self, range: &Range<u64>) -> Result<(), String> {
        if self.start != range.start || self.end() != range.end {
            return Err(format!("covers {}..{}, not {range:?}", self.start, self.end()));
        }
        let mut at = self.start;
        for (i, e) in self.extents.iter().enumerate() {
            if e.start != at || e.len == 0 {
                return Err(format!("extent {i} starts at {} instead of {at}", e.start));
            }
            if i > 0 && self.extents[i - 1].content.continues(self.extents[i - 1].len, e.content) {
                return Err(format!("extent {i} is not coalesced with the one before"));
            }
            at = e.end();
        }
        Ok(())
    }
}

/// The part of sorted, contiguous `extents` that overlaps `range`, clipped to it. Finds the
/// first by binary search and allocates nothing.
pub(crate) fn clipped<C: Content>(
    extents: &[Extent<C>],
    range: Range<u64>,
) -> impl Iterator<Item = Extent<C>> + '_ {
    let first = extents.partition_point(|e| e.end() <= range.start);
    clipped_from(&extents[first..], range)
}

/// The same where the first of `extents` is known to overlap, if any does.
pub(crate) fn clipped_from<C: Content>(
    extents: &[Extent<C>],
    range: Range<u64>,
) -> impl Iterator<Item = Extent<C>> + '_ {
    // The one after the last is not looked at: a short read of a window needs one extent alone, and the
    // next may be the first in a line of memory.
    let end = range.end;
    let mut done = false;
    extents.iter().map_while(move |e| {
        let clipped = if done { None } else { e.clip(&range) };
        done |= e.end() >= end;
        clipped
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Clone, Copy, PartialEq)]
    enum C {
        Zero,
        At(u64),
    }

    impl Content for C {
        fn advanced(self, skip: u64) -> Self {
            match self {
                C::Zero => C::Zero,
                C::At(o) => C::At(o + skip),
            }
        }
    }

    #[test]
    fn neighbours_that_continue_are_one_extent() {
        let mut l = ExtentList::new(100);
        l.push(10, C::At(0));
        l.push(10, C::At(10));
        l.push(5, C::Zero);
        l.push(0, C::At(7));
        l.push(5, C::Zero);
        l.push(5, C::At(99));
        l.check(&(100..135)).unwrap();
        assert_eq!(l.as_slice().len(), 3);
    }

    #[test]
    fn clipping_moves_the_content_along() {
        let mut l = ExtentList::new(0);
        l.push(10, C::At(1000));
        l.push(10, C::Zero);
        let part: Vec<_> = clipped(l.as_slice(), 4..12).collect();
        assert_eq!(part[0], Extent { start: 4, len: 6, content: C::At(1004) });
        assert_eq!(part[1], Extent { start: 10, len: 2, content: C::Zero });
        assert_eq!(clipped(l.as_slice(), 20..30).count(), 0);
    }

    #[test]
    fn a_list_with_a_gap_or_a_seam_is_noticed() {
        let e = |start, len, content| Extent { start, len, content };
        let list = |start, extents: &[Extent<C>]| ExtentList { start, extents: extents.to_vec() };
        let (a, b) = (e(0, 10, C::At(0)), e(10, 10, C::Zero));
        assert_eq!(list(0, &[a, b]).check(&(0..20)), Ok(()));
        assert_eq!(list(7, &[]).check(&(7..7)), Ok(()));
        let bad = [
            (list(5, &[]), 0..5),
            (list(0, &[a, b]), 0..30),
            (list(1, &[a, b]), 0..20),
            (list(0, &[a, e(12, 8, C::Zero)]), 0..20),
            (list(0, &[a, e(5, 15, C::Zero)]), 0..20),
            (list(0, &[a, e(10, 0, C::At(99)), b]), 0..20),
            (list(0, &[a, e(10, 10, C::At(10))]), 0..20),
        ];
        for (list, range) in bad {
            assert!(list.check(&range).is_err(), "{list:?}");
        }
    }
}
