//! What may differ between two points, told from their maps; no guest data is read.
//!
//! Two points of one chain share the layers of their nearest common point. What no layer above that says
//! anything about is the same in both, and is passed over without a look at the tables below. Of the rest, what
//! both have at the same place of the same file is the same, and so are two holes; all else may differ.
//!
//! Memory: the extents of one window of each point, however many changes there are.

use std::ops::Range;

use super::Image;
use crate::error::Result;
use crate::extent::Extent;
use crate::image::map::{LayerMerge, MergedExtent, Source};
use crate::layer::{Format, LayerSpec};

/// What a point has in a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RangeContent {
    /// Bytes of an image, whatever they are.
    Data,
    /// Zeros by its map; also what lies beyond the end of a smaller disk.
    Zero,
    /// Something that cannot be read.
    Unreadable,
}

impl RangeContent {
    fn of(source: Source) -> RangeContent {
        match source {
            Source::Unallocated | Source::Zero { .. } => RangeContent::Zero,
            Source::Data { .. } | Source::Compressed { .. } => RangeContent::Data,
            Source::Bad { .. } => RangeContent::Unreadable,
        }
    }
}

/// A range of guest bytes that may differ between two points.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Change {
    /// First guest byte.
    pub start: u64,
    /// Length in bytes, never 0.
    pub length: u64,
    /// What the first point has there.
    pub from: RangeContent,
    /// What the second point has there.
    pub to: RangeContent,
}

impl Change {
    /// One past the last guest byte.
    pub fn end(&self) -> u64 {
        self.start.saturating_add(self.length)
    }
}

/// Joins changes that follow each other and are of one kind.
pub(super) struct Joined<F> {
    last: Option<Change>,
    each: F,
}

impl<F: FnMut(Change) -> bool> Joined<F> {
    pub(super) fn new(each: F) -> Self {
        Joined { last: None, each }
    }

    /// Takes the next change; whether more are wanted.
    pub(super) fn add(&mut self, change: Change) -> bool {
        if change.length == 0 {
            return true;
        }
        if let Some(last) = &mut self.last {
            let same = (last.from, last.to) == (change.from, change.to);
            if same && last.end() == change.start {
                last.length += change.length;
                return true;
            }
        }
        let more = self.last.replace(change).is_none_or(&mut self.each);
        if !more {
            self.last = None;
        }
        more
    }

    /// Hands on the last one.
    pub(super) fn end(mut self) {
        if let Some(last) = self.last.take() {
            (self.each)(last);
        }
    }
}

impl Image {
    /// Calls `f` with each part of `range` that may differ between this point and `to`, in order and joined, until
    /// it returns false. Of disks of different sizes the smaller one counts as zeros beyond its end.
    ///
    /// # Errors
    /// A layer cannot be opened, or changed.
    pub fn for_each_change(
        &self,
        to: &Image,
        range: Range<u64>,
        f: impl FnMut(Change) -> bool,
    ) -> Result<()> {
        let mut joined = Joined::new(f);
        let result = self.changes(to, range, &mut joined);
        // What was found before an error counts.
        joined.end();
        result
    }

    fn changes<F: FnMut(Change) -> bool>(
        &self,
        to: &Image,
        range: Range<u64>,
        joined: &mut Joined<F>,
    ) -> Result<()> {
        let pair = Pair { from: self, to, shared: self.shared_depth(to) };
        let end = range.end.min(self.size.max(to.size));
        let both = self.size.min(to.size);
        let step = self.window_size.max(to.window_size);
        let mut at = range.start;
        while at < end {
            if at < both {
                let same = pair.same_until(at)?.min(both);
                if same > at {
                    at = same;
                    continue;
                }
            }
            let stop = end.min((at / step + 1).saturating_mul(step));
            for part in pair.touched(at..stop)? {
                if !pair.compare(part, joined)? {
                    return Ok(());
                }
            }
            at = stop;
        }
        Ok(())
    }

    /// Whether something in `range` may differ between this point and `to`.
    ///
    /// # Errors
    /// As [`Image::for_each_change`].
    pub fn may_differ(&self, to: &Image, range: Range<u64>) -> Result<bool> {
        let mut found = false;
        self.for_each_change(to, range, |_| {
            found = true;
            false
        })?;
        Ok(found)
    }

    /// Bytes of data that the layers have which this point adds to the one below: what reads as zeros by the map
    /// does not count.
    ///
    /// # Errors
    /// As [`Image::for_each_change`].
    pub fn own_data_bytes(&self) -> Result<u64> {
        let bottom = self.depth - self.own.len();
        let (mut at, mut total) = (0, 0u64);
        while at < self.size {
            let untouched = self.untouched_until(bottom, at)?.min(self.size);
            if untouched > at {
                at = untouched;
                continue;
            }
            let stop = self.size.min((at / self.window_size + 1).saturating_mul(self.window_size));
            let merged = self.merge_above(bottom, at..stop)?.finish();
            let merged = merged.map_err(|e| e.at_path(self.layer_path(0)))?;
            let data = merged.extents.as_slice().iter().filter(|e| !e.content.is_hole());
            total += data.map(|e| e.len).sum::<u64>();
            at = stop;
        }
        Ok(total)
    }

    /// How many layers, from the bottom, are those of one point that both are made of.
    fn shared_depth(&self, other: &Image) -> usize {
        let (mut a, mut b) = (Some(self), Some(other));
        while let (Some(x), Some(y)) = (a, b) {
            if std::ptr::eq(x, y) {
                return x.depth;
            }
            let (deep, low) = (x.depth >= y.depth, y.depth >= x.depth);
            a = if deep { x.below.as_deref() } else { a };
            b = if low { y.below.as_deref() } else { b };
        }
        0
    }

    /// An offset at or after `at` before which no layer from number `bottom` on says anything. Cheap: looks at no
    /// L2 table.
    fn untouched_until(&self, bottom: usize, at: u64) -> Result<u64> {
        let stack = self.stack();
        let (mut limit, mut asked) = (self.size, stack.len());
        while asked > bottom && limit > at {
            asked -= 1;
            let layer = stack[asked].get()?;
            // Beyond its end a layer says zero.
            limit = limit.min(layer.size());
            if limit > at {
                limit = limit.min(layer.next_mapped(at));
            }
        }
        if limit > at {
            stack.from(asked).try_for_each(|lazy| self.check_layer(lazy))?;
        }
        Ok(limit.max(at))
    }

    /// The parts of `range` that layers from number `bottom` on decide.
    fn decided_above(&self, bottom: usize, range: Range<u64>) -> Result<Vec<Range<u64>>> {
        let inside = range.start.min(self.size)..range.end.min(self.size);
        let merge = self.merge_above(bottom, inside)?;
        let (mut parts, mut at) = (Vec::new(), range.start);
        for left in merge.pending() {
            if left.start > at {
                parts.push(at..left.start);
            }
            at = left.end;
        }
        if range.end > at {
            parts.push(at..range.end);
        }
        Ok(parts)
    }

    /// What layers from number `bottom` on say about `range`, not finished.
    fn merge_above(&self, bottom: usize, range: Range<u64>) -> Result<LayerMerge> {
        let mut merge = LayerMerge::new(range);
        let (stack, mut asked) = (self.stack(), self.stack().len());
        while asked > bottom && !merge.is_covered() {
            asked -= 1;
            merge.add_layer(asked as u16, stack[asked].get()?);
            self.check_layer(&stack[asked])?;
        }
        Ok(merge)
    }

    /// The extents of `range`, which is in one window or little more; zeros beyond the end.
    fn extents(&self, range: &Range<u64>) -> Result<Vec<MergedExtent>> {
        let mut all = Vec::new();
        let end = range.end.min(self.size);
        if range.start < end {
            self.for_each_extent(range.start..end, |e| {
                all.push(e);
                true
            })?;
        }
        let start = range.start.max(end);
        if start < range.end {
            all.push(Extent { start, len: range.end - start, content: Source::Unallocated });
        }
        Ok(all)
    }
}

/// Two points.
struct Pair<'a> {
    from: &'a Image,
    to: &'a Image,
    /// So many layers are the same in both.
    shared: usize,
}

impl Pair<'_> {
    /// An offset at or after `at`, which is inside both, before which nothing can differ.
    fn same_until(&self, at: u64) -> Result<u64> {
        let from = self.from.untouched_until(self.shared, at)?;
        if from <= at {
            return Ok(at);
        }
        Ok(self.to.untouched_until(self.shared, at)?.min(from))
    }

    /// The parts of `range` about which a layer says something that is not in both.
    fn touched(&self, range: Range<u64>) -> Result<Vec<Range<u64>>> {
        if self.shared == 0 {
            return Ok(vec![range]);
        }
        let mut all = self.from.decided_above(self.shared, range.clone())?;
        all.extend(self.to.decided_above(self.shared, range)?);
        all.sort_unstable_by_key(|r| r.start);
        let mut parts: Vec<Range<u64>> = Vec::new();
        for part in all {
            match parts.last_mut() {
                Some(last) if last.end >= part.start => last.end = last.end.max(part.end),
                _ => parts.push(part),
            }
        }
        Ok(parts)
    }

    /// Compares the extents of `range`; whether more is wanted.
    fn compare(
        &self,
        range: Range<u64>,
        joined: &mut Joined<impl FnMut(Change) -> bool>,
    ) -> Result<bool> {
        let (a, b) = (self.from.extents(&range)?, self.to.extents(&range)?);
        let (mut a, mut b) = (a.iter().peekable(), b.iter().peekable());
        let mut at = range.start;
        while let (Some(x), Some(y)) = (a.peek(), b.peek()) {
            let end = x.end().min(y.end());
            let part = at..end;
            if let (Some(one), Some(other)) = (x.clip(&part), y.clip(&part))
                && !self.is_same(one.content, other.content)
            {
                let (from, to) = (RangeContent::of(one.content), RangeContent::of(other.content));
                if !joined.add(Change { start: at, length: end - at, from, to }) {
                    return Ok(false);
                }
            }
            a.next_if(|e| e.end() <= end);
            b.next_if(|e| e.end() <= end);
            at = end;
        }
        Ok(true)
    }

    /// Whether both certainly have the same bytes.
    fn is_same(&self, from: Source, to: Source) -> bool {
        let files = |a: u16, b: u16| self.is_same_file(a, b);
        match (from, to) {
            (a, b) if a.is_hole() && b.is_hole() => true,
            (
                Source::Data { layer: a, file, host },
                Source::Data { layer: b, file: other, host: place },
            ) => (file, host) == (other, place) && files(a, b),
            (
                Source::Compressed { layer: a, host, len, unit, skip },
                Source::Compressed { layer: b, host: place, len: n, unit: of, skip: at },
            ) => (host, len, unit, skip) == (place, n, of, at) && files(a, b),
            // What cannot be read in a layer is one thing, whoever is above it.
            (Source::Bad { layer: a }, Source::Bad { layer: b }) => {
                a == b && usize::from(a) < self.shared
            }
            _ => false,
        }
    }

    /// Whether two layers have the same bytes at the same places: they are one, or states of one file.
    fn is_same_file(&self, from: u16, to: u16) -> bool {
        if from == to && usize::from(from) < self.shared {
            return true;
        }
        let spec = |image: &Image, layer: u16| -> Option<LayerSpec> {
            image.stack().get(usize::from(layer)).map(|lazy| lazy.spec.clone())
        };
        let (Some(a), Some(b)) = (spec(self.from, from), spec(self.to, to)) else { return false };
        let data = |s: &LayerSpec| s.data_file.as_ref().map(|f| f.path().to_path_buf());
        // In an archive, places are those of one of its disks.
        let places = match a.format {
            Format::Qcow2 | Format::Raw => true,
            Format::Vma | Format::SparseStream => a.part == b.part,
        };
        places && a.format == b.format && a.file.path() == b.file.path() && data(&a) == data(&b)
    }
}

#[cfg(test)]
mod tests;
