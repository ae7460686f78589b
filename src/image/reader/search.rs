//! Going through an image: its extents, and where data and holes begin.

use std::ops::Range;

use super::Image;
use super::lookahead::Lookahead;
use super::range_kind::RangeKind;
use crate::error::Result;
use crate::extent::Extent;
use crate::image::{MergedExtent, Source};

/// Windows that one search for data merges without finding any: 1 TiB of tables that say nothing,
/// as preallocation makes them. Then it says "data", as it may where it does not know: an image
/// can claim more such tables than anybody wants to wait for.
const MAX_SEARCH: u32 = 1 << 14;
/// The same for a search for a hole; then all the rest counts as data.
const MAX_HOLE_SEARCH: u32 = 1 << 16;
/// Windows that a search merges before it looks at whole tables: whoever copies a disk finds the next
/// data or hole within these, and reads from them next.
const NEAR: u32 = 16;
/// Windows that a search merges which must be brief.
const BRIEF: u32 = 2;
/// Extents, and so windows, that are looked at for whether a range is a hole.
const MOST_EXTENTS: u32 = 16;

impl Image {
    /// Where what reads as zeros from `at` on, because no layer has a table there, ends. Cheap: looks
    /// at no L2 table.
    fn quiet_until(&self, at: u64) -> Result<u64> {
        let stack = self.stack();
        let mut limit = self.size;
        let mut asked = stack.len();
        while asked > 0 && limit > at {
            asked -= 1;
            let layer = stack[asked].get()?;
            if layer.size() <= at {
                break;
            }
            limit = limit.min(layer.next_mapped(at));
            if layer.size() < self.size {
                limit = limit.min(layer.size());
            }
        }
        // Tables that were read while a file was being rewritten say nothing.
        if limit > at {
            stack.from(asked).try_for_each(|lazy| self.check_layer(lazy))?;
        }
        Ok(limit)
    }

    /// An offset at or after `from` before which everything reads as zeros: coarse and cheap, so that
    /// nobody has to walk over an exabyte of nothing. The size if nothing follows.
    ///
    /// # Errors
    /// A layer cannot be opened.
    pub fn next_data(&self, from: u64) -> Result<u64> {
        let mut next = self.size;
        for lazy in self.stack().from(0).rev() {
            let layer = lazy.get()?;
            if layer.size() <= from {
                // Whatever is below is cut off here.
                break;
            }
            next = next.min(layer.next_data(from));
            if next <= from {
                return Ok(from);
            }
        }
        Ok(next)
    }

    /// Calls `f` with each extent of `range`, in order, until it returns false. Extents are split
    /// at window borders; [`crate::extent::ExtentList`] joins them again.
    ///
    /// # Errors
    /// A layer cannot be opened, or changed.
    pub fn for_each_extent(
        &self,
        range: Range<u64>,
        mut f: impl FnMut(MergedExtent) -> bool,
    ) -> Result<()> {
        self.check_inside(range.start, range.end.saturating_sub(range.start))?;
        let mut at = range.start;
        while at < range.end {
            let index = at / self.window_size;
            if self.cached_window(index).is_none() {
                let quiet = self.quiet_until(at).inspect_err(|e| self.note_error(e));
                let quiet = quiet?.min(range.end);
                if quiet > at {
                    let content = Source::Unallocated;
                    if !f(Extent { start: at, len: quiet - at, content }) {
                        return Ok(());
                    }
                    at = quiet;
                    continue;
                }
            }
            let stop = range.end.min((index + 1).saturating_mul(self.window_size));
            let go_on = self.with_window(index, |w| w.clipped(at..stop).all(&mut f))?;
            if !go_on {
                return Ok(());
            }
            at = stop;
        }
        Ok(())
    }

    /// Whether all of `range` is a hole, if a few extents tell; else false.
    ///
    /// # Errors
    /// See [`Image::for_each_extent`].
    pub fn is_hole(&self, range: Range<u64>) -> Result<bool> {
        let (mut seen, mut is_hole) = (0, true);
        self.for_each_extent(range, |e| {
            seen += 1;
            is_hole = e.content.is_hole() && seen <= MOST_EXTENTS;
            is_hole
        })?;
        Ok(is_hole)
    }

    /// The first offset at or after `offset` that is not a hole, or `None`. After a very long
    /// stretch of holes that only tables show, an offset that is one.
    ///
    /// # Errors
    /// See [`Image::for_each_extent`].
    pub fn seek_data(&self, offset: u64) -> Result<Option<u64>> {
        let limits = Limits { near: NEAR, merges: MAX_SEARCH };
        match self.search(offset, RangeKind::Data, limits)? {
            SearchResult::At(at) | SearchResult::GaveUp(at) => Ok(Some(at)),
            SearchResult::Nothing => Ok(None),
        }
    }

    /// The first offset at or after `offset` that is a hole; the end of the disk counts as one, and
    /// is the answer after a very long stretch of data.
    ///
    /// # Errors
    /// See [`Image::for_each_extent`].
    pub fn seek_hole(&self, offset: u64) -> Result<u64> {
        let limits = Limits { near: NEAR, merges: MAX_HOLE_SEARCH };
        match self.search(offset, RangeKind::Hole, limits)? {
            SearchResult::At(at) => Ok(at),
            SearchResult::GaveUp(_) | SearchResult::Nothing => Ok(self.size),
        }
    }

    /// The answer of [`Image::seek_data`] or [`Image::seek_hole`] (the size if there is none), if it
    /// is not far; `None` if finding it may take long.
    ///
    /// # Errors
    /// See [`Image::for_each_extent`].
    pub fn seek_near(&self, offset: u64, wanted: RangeKind) -> Result<Option<u64>> {
        let limits = Limits { near: BRIEF, merges: BRIEF };
        match self.search(offset, wanted, limits)? {
            SearchResult::At(at) => Ok(Some(at)),
            SearchResult::Nothing => Ok(Some(self.size)),
            SearchResult::GaveUp(_) => Ok(None),
        }
    }

    fn search(&self, from: u64, wanted: RangeKind, limits: Limits) -> Result<SearchResult> {
        self.check_inside(from.min(self.size), 0)?;
        let mut ahead = Lookahead::new(self);
        let found = self.search_with(&mut ahead, from, wanted, limits)?;
        // Tables that were read while a file was being rewritten say nothing.
        ahead.check_unchanged()?;
        Ok(found)
    }

    fn search_with(
        &self,
        ahead: &mut Lookahead,
        from: u64,
        wanted: RangeKind,
        limits: Limits,
    ) -> Result<SearchResult> {
        let mut merges = 0;
        let mut at = from;
        while at < self.size {
            let index = at / self.window_size;
            if self.cached_window(index).is_none() {
                // L1 tables of many layers take their time, too.
                if limits.merges > limits.near {
                    let far = (merges >= limits.near).then_some(&mut *ahead);
                    let stretch = self.stretch(far, at).inspect_err(|e| self.note_error(e));
                    match stretch? {
                        (Some(found), _) if found == wanted => return Ok(SearchResult::At(at)),
                        (Some(_), end) => {
                            at = end;
                            continue;
                        }
                        (None, _) => {}
                    }
                }
                if merges >= limits.merges {
                    return Ok(SearchResult::GaveUp(at));
                }
                merges += 1;
            }
            let stop = self.size.min((index + 1).saturating_mul(self.window_size));
            let is_wanted = |e: &MergedExtent| e.content.is_hole() == (wanted == RangeKind::Hole);
            let found = self.with_window(index, |w| w.clipped(at..stop).find(is_wanted))?;
            if let Some(e) = found {
                return Ok(SearchResult::At(e.start));
            }
            at = stop;
        }
        Ok(SearchResult::Nothing)
    }

    /// Whether `at` and all that follows up to the offset given is a hole or data, if that can be told
    /// without merging a window.
    fn stretch(&self, ahead: Option<&mut Lookahead>, at: u64) -> Result<(Option<RangeKind>, u64)> {
        let quiet = self.quiet_until(at)?;
        if quiet > at {
            return Ok((Some(RangeKind::Hole), quiet));
        }
        ahead.map_or(Ok((None, at)), |ahead| ahead.look(at))
    }
}

/// How a search ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SearchResult {
    At(u64),
    /// There is no such byte.
    Nothing,
    /// There is none before this.
    GaveUp(u64),
}

/// How far a search goes, in windows that are merged.
#[derive(Debug, Clone, Copy)]
struct Limits {
    /// So many are merged before whole tables are looked at.
    near: u32,
    /// So many in all.
    merges: u32,
}

#[cfg(test)]
mod tests;
