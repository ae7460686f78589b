//! What a bitmap cannot know: a disk that was shrunk and grown again between two points reads
//! zeros in the regrown part, and no bit is dirty there, while the chain still has the old bytes.
//!
//! So the frozen view is asked which ranges are zeros, and the chain which ranges hold data; the
//! ranges that are both are copied as well. QMP can set no bit in a bitmap, but a write can: the
//! ranges are written to a scratch node (`null-co`, which keeps nothing) whose bitmap records, and
//! that bitmap is merged into the one that the job copies by.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use crate::chain::manifest::Manifest;
use crate::error::{Error, Kind, Result};
use crate::image::{Cache, Image, Source};
use crate::layer::{Format, LayerSpec, Part};
use crate::storage::SourceFile;

/// Bytes of folded windows that are kept while a chain is walked once.
const CACHE_BYTES: u64 = 16 << 20;

/// A chain opened for comparison with the frozen view.
pub struct ChainData {
    image: Arc<Image>,
    ranges: Vec<Range<u64>>,
}

impl ChainData {
    /// Opens the points of `chain` (root first) and finds where they hold data.
    ///
    /// # Errors
    /// A layer cannot be read or is bad somewhere: nothing may be built on such a chain.
    pub fn open(dir: &Path, chain: &[Manifest]) -> Result<Self> {
        let size = chain.last().map_or(0, |m| m.virtual_size);
        let mut layers = Vec::new();
        for m in chain {
            layers.push(LayerSpec {
                file: Arc::new(SourceFile::look(dir.join(&m.image))?),
                format: Format::Qcow2,
                part: Part::Whole,
                data_file: None,
            });
        }
        let image = Image::new(size, &layers, None, &Cache::new(CACHE_BYTES))?;
        let ranges = data_ranges(&image).map_err(|e| e.at_path(dir))?;
        Ok(ChainData { image, ranges })
    }

    /// Of the ranges that are zeros in the frozen view, those where the chain has something else.
    /// `cluster` is the unit in which the job copies.
    ///
    /// # Errors
    /// The chain cannot be read.
    pub fn lost(&self, zeros: &[Range<u64>], cluster: u64) -> Result<Vec<Range<u64>>> {
        let mut lost = Vec::new();
        for r in intersect(zeros, &self.ranges) {
            // A hole in part of a cluster is in the chain as data that is zero: that is no loss,
            // and copying it again at each INC would never end. A whole cluster is copied as a
            // zero cluster, so it comes up once.
            let whole = r.start.next_multiple_of(cluster).saturating_add(cluster) <= r.end;
            if whole || !self.is_zero(&r)? {
                // The cut may lie in the unit before: its end became zero too, as data.
                lost.push(r.start.saturating_sub(1)..r.end);
            }
        }
        Ok(lost)
    }

    fn is_zero(&self, range: &Range<u64>) -> Result<bool> {
        let mut buf = vec![0u8; 64 << 10];
        let mut at = range.start;
        while at < range.end {
            let n = (range.end - at).min(64 << 10);
            let part = buf.get_mut(..n as usize).unwrap_or_default();
            self.image.read_at(part, at)?;
            if part.iter().any(|b| *b != 0) {
                return Ok(false);
            }
            at += n;
        }
        Ok(true)
    }
}

fn data_ranges(image: &Image) -> Result<Vec<Range<u64>>> {
    let mut ranges: Vec<Range<u64>> = Vec::new();
    let mut bad = None;
    image.for_each_extent(0..image.size(), |e| {
        match e.content {
            Source::Bad { .. } => bad = Some(e.start),
            c if c.is_hole() => {}
            _ => match ranges.last_mut() {
                Some(last) if last.end == e.start => last.end = e.end(),
                _ => ranges.push(e.start..e.end()),
            },
        }
        bad.is_none()
    })?;
    match bad {
        Some(at) => Err(Error::new(Kind::Unsound, "the chain cannot be read").at_offset(at)),
        None => Ok(ranges),
    }
}

/// What is in both lists; both ascending and without overlaps.
pub fn intersect(a: &[Range<u64>], b: &[Range<u64>]) -> Vec<Range<u64>> {
    let (mut i, mut j) = (0, 0);
    let mut out = Vec::new();
    while let (Some(x), Some(y)) = (a.get(i), b.get(j)) {
        let both = x.start.max(y.start)..x.end.min(y.end);
        if both.start < both.end {
            out.push(both);
        }
        if x.end < y.end { i += 1 } else { j += 1 }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intersections() {
        let got = intersect(&[0..10, 20..30, 40..50], &[5..25, 29..41, 60..70]);
        assert_eq!(got, vec![5..10, 20..25, 29..30, 40..41]);
        assert!(intersect(&[], &got).is_empty());
    }
}
