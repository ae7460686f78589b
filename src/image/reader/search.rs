//! Going through an image: its extents, and where data and holes begin.

use std::ops::Range;

use super::Image;
use crate::error::Result;
use crate::extent::Extent;
use crate::image::{FoldedExtent, Source};

/// Windows that one search for data folds without finding any: 1 TiB of tables that say nothing,
/// as preallocation makes them. Then it says "data", as it may where it does not know: an image
/// can claim more such tables than anybody wants to wait for.
const MAX_SEARCH: u32 = 1 << 14;
/// The same for a search for a hole; then all the rest counts as data.
const MAX_HOLE_SEARCH: u32 = 1 << 16;

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
            stack[asked..].iter().try_for_each(|lazy| self.check_layer(lazy))?;
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
        for lazy in self.stack().iter().rev() {
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
        f: impl FnMut(FoldedExtent) -> bool,
    ) -> Result<()> {
        self.walk(range, u64::MAX, f).map(drop)
    }

    /// As [`Self::for_each_extent`], but folds at most `folds` windows. Where it gave up, if it did.
    fn walk(
        &self,
        range: Range<u64>,
        mut folds: u64,
        mut f: impl FnMut(FoldedExtent) -> bool,
    ) -> Result<Option<u64>> {
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
                        return Ok(None);
                    }
                    at = quiet;
                    continue;
                }
                if folds == 0 {
                    return Ok(Some(at));
                }
                folds -= 1;
            }
            let stop = range.end.min((index + 1).saturating_mul(self.window_size));
            let go_on = self.with_window(index, |w| w.clipped(at..stop).all(&mut f))?;
            if !go_on {
                return Ok(None);
            }
            at = stop;
        }
        Ok(None)
    }

    /// The first offset at or after `offset` that is not a hole, or `None`. After a very long
    /// stretch of holes that only tables show, an offset that is one.
    ///
    /// # Errors
    /// See [`Image::for_each_extent`].
    pub fn seek_data(&self, offset: u64) -> Result<Option<u64>> {
        let (found, stopped) = self.seek(offset, MAX_SEARCH, |e| !e.content.is_hole())?;
        Ok(found.or(stopped))
    }

    /// The first offset at or after `offset` that is a hole; the end of the disk counts as one, and
    /// is the answer after a very long stretch of data.
    ///
    /// # Errors
    /// See [`Image::for_each_extent`].
    pub fn seek_hole(&self, offset: u64) -> Result<u64> {
        let (found, _) = self.seek(offset, MAX_HOLE_SEARCH, |e| e.content.is_hole())?;
        Ok(found.unwrap_or(self.size))
    }

    fn seek(
        &self,
        offset: u64,
        folds: u32,
        wanted: impl Fn(&FoldedExtent) -> bool,
    ) -> Result<(Option<u64>, Option<u64>)> {
        let mut found = None;
        let stopped = self.walk(offset.min(self.size)..self.size, folds.into(), |e| {
            if wanted(&e) {
                found = Some(e.start);
            }
            found.is_none()
        })?;
        Ok((found, stopped))
    }
}

#[cfg(test)]
mod tests {
    use super::super::WINDOW;
    use super::super::tests::{image, qcow2};
    use crate::layer::Format;

    #[test]
    fn a_search_gives_up_in_tables_that_say_nothing() {
        let f = qcow2(16, 1 << 30, &[0x20000, 0x20000], &[]);
        let image = image(f.path(), Format::Qcow2, 1 << 30, None);
        assert_eq!(image.walk(0..1 << 30, 2, |_| true).unwrap(), Some(2 * WINDOW));
        assert_eq!(image.seek_data(0).unwrap(), None);
    }
}
