//! Merging: the layers of a point over one guest range become one list of extents.
//!
//! The merge goes from the top down and stops as soon as the range is covered. What no layer has
//! reads as zero; so does what lies beyond the end of a layer that is asked, whatever is below
//! that one. Layers count from the bottom, so a list merged for a parent point is valid as it
//! stands inside its children: a cached one ends the walk.

use std::ops::Range;

use crate::error::{Error, Finding, Kind, Result};
use crate::extent::{Content, Extent, ExtentList};
use crate::layer::{Layer, MAX_EXTENTS, Mapping};

/// Where the bytes of a merged extent come from. `layer` counts from the bottom of the point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// No layer has anything here, or the range lies beyond the end of a layer that was asked: zeros.
    Unallocated,
    /// A layer says zero.
    Zero {
        /// The layer that decides.
        layer: u16,
    },
    /// Plain bytes of one of the layer's files.
    Data {
        /// The layer that has them.
        layer: u16,
        /// Which of its files.
        file: u8,
        /// Offset of the extent's first byte in that file.
        host: u64,
    },
    /// Part of a compressed unit; see [`Mapping::Compressed`].
    Compressed {
        /// The layer that has it.
        layer: u16,
        /// Where the unit starts.
        host: u64,
        /// Upper limit of its compressed length.
        len: u32,
        /// Its decompressed length.
        unit: u32,
        /// Where in the decompressed unit the extent starts.
        skip: u32,
    },
    /// Cannot be read: EIO.
    Bad {
        /// The layer to blame.
        layer: u16,
    },
}

impl Source {
    /// Whether it certainly reads as zeros. What is bad counts as data, so that no copying tool
    /// skips over it.
    pub fn is_hole(self) -> bool {
        matches!(self, Source::Unallocated | Source::Zero { .. })
    }

    /// The layer that decides, counted from the bottom.
    pub fn layer(self) -> Option<u16> {
        match self {
            Source::Unallocated => None,
            Source::Zero { layer }
            | Source::Data { layer, .. }
            | Source::Compressed { layer, .. }
            | Source::Bad { layer } => Some(layer),
        }
    }

    fn of(mapping: Mapping, layer: u16) -> Option<Source> {
        Some(match mapping {
            Mapping::Below => return None,
            Mapping::Zero => Source::Zero { layer },
            Mapping::Data { file, host } => Source::Data { layer, file, host },
            Mapping::Compressed { host, len, unit, skip } => {
                Source::Compressed { layer, host, len, unit, skip }
            }
            Mapping::Bad => Source::Bad { layer },
        })
    }
}

impl Content for Source {
    fn advanced(self, by: u64) -> Self {
        match self {
            Source::Data { layer, file, host } => {
                Source::Data { layer, file, host: host.wrapping_add(by) }
            }
            Source::Compressed { layer, host, len, unit, skip } => {
                Source::Compressed { layer, host, len, unit, skip: skip.wrapping_add(by as u32) }
            }
            other => other,
        }
    }
}

/// An extent of a point.
pub type MergedExtent = Extent<Source>;

/// What a merge yields.
pub struct MergedMap {
    /// Covers exactly the range that was merged.
    pub extents: ExtentList<Source>,
    /// Why ranges are bad.
    pub findings: Vec<Finding>,
}

/// What is below a certain layer, known already: a parent point's cached window.
pub struct KnownParent<'a> {
    /// Size in bytes of the parent's virtual disk.
    pub size: u64,
    /// The parent's extents; they cover the range up to `size`.
    pub extents: &'a [MergedExtent],
}

/// One merge in progress.
pub struct LayerMerge {
    pieces: Vec<MergedExtent>,
    /// What is not covered yet, ascending.
    pending: Vec<Range<u64>>,
    next: Vec<Range<u64>>,
    findings: Vec<Finding>,
    range: Range<u64>,
    /// Whether it came to more pieces than any sound image has.
    overflown: bool,
}

/// Pieces of one merge, covered or not: 20 MiB of them.
const MAX_PIECES: usize = 2 * MAX_EXTENTS;

impl LayerMerge {
    /// Begins the merge of `range`.
    pub fn new(range: Range<u64>) -> Self {
        LayerMerge {
            pieces: Vec::new(),
            pending: if range.is_empty() { Vec::new() } else { vec![range.clone()] },
            next: Vec::new(),
            findings: Vec::new(),
            range,
            overflown: false,
        }
    }

    /// Whether nothing is left to ask for.
    pub fn is_covered(&self) -> bool {
        self.pending.is_empty()
    }

    /// What no layer that was asked says anything about, ascending.
    pub fn pending(&self) -> &[Range<u64>] {
        &self.pending
    }

    /// Asks one more layer, number `index` from the bottom.
    pub fn add_layer(&mut self, index: u16, layer: &dyn Layer) {
        let size = layer.size();
        let pending = std::mem::take(&mut self.pending);
        let (Some(first), Some(last)) = (pending.first(), pending.last()) else { return };
        // One question for all that is pending: deep in a chain that is hundreds of small ranges,
        // and a layer answers a whole window nearly as fast as one of them.
        let hull = first.start.min(size)..last.end.min(size);
        if !hull.is_empty() {
            let map = layer.map(hull.clone());
            debug_assert_eq!(map.extents.check(&hull), Ok(()));
            if hull.end == last.end
                && matches!(map.extents.as_slice(), [e] if e.content == Mapping::Below)
            {
                self.pending = pending;
                return;
            }
            if self.take(index, &map.extents, &pending) {
                self.note(map.findings, map.suppressed);
            }
        }
        for range in pending.iter().rev().take_while(|r| r.end > size) {
            self.push(range.start.max(size)..range.end, Source::Unallocated);
        }
        self.pending = std::mem::take(&mut self.next);
        if self.pieces.len() + self.pending.len() > MAX_PIECES {
            self.overflown = true;
            self.pending.clear();
        }
    }

    /// Ends the walk with what is known of all layers below.
    pub fn add_known(&mut self, known: &KnownParent) {
        for range in std::mem::take(&mut self.pending) {
            let inside = range.start.min(known.size)..range.end.min(known.size);
            self.pieces.extend(crate::extent::clipped(known.extents, inside));
            self.push(range.start.max(known.size)..range.end, Source::Unallocated);
        }
    }

    /// Ends the merge: what is left is in no layer.
    ///
    /// # Errors
    /// `Corrupt` if the range is in more pieces than a sound image can have, or if a layer broke its
    /// promise of covering it.
    pub fn finish(mut self) -> Result<MergedMap> {
        if self.overflown {
            return Err(Error::new(Kind::Corrupt, "too many pieces for a disk of this size"));
        }
        for range in std::mem::take(&mut self.pending) {
            self.push(range, Source::Unallocated);
        }
        self.pieces.sort_unstable_by_key(|e| e.start);
        let mut extents = ExtentList::new(self.range.start);
        for piece in &self.pieces {
            if piece.start != extents.end() {
                break;
            }
            extents.push(piece.len, piece.content);
        }
        extents.check(&self.range).map_err(|what| {
            let text = format!("the merged map is inconsistent: {what}");
            Error::new(Kind::Corrupt, text)
        })?;
        Ok(MergedMap { extents, findings: self.findings })
    }

    /// Takes over what a layer says about the pending ranges; both are ascending. Says whether
    /// anything bad was among it: what is bad under data of upper layers does not matter here.
    fn take(&mut self, index: u16, map: &ExtentList<Mapping>, pending: &[Range<u64>]) -> bool {
        let mut bad = false;
        let mut extents = map.as_slice();
        for range in pending {
            let behind = extents.iter().take_while(|e| e.end() <= range.start).count();
            extents = &extents[behind..];
            for e in extents.iter().map_while(|e| e.clip(range)) {
                bad |= e.content == Mapping::Bad;
                match Source::of(e.content, index) {
                    Some(content) => {
                        self.pieces.push(Extent { start: e.start, len: e.len, content })
                    }
                    None => self.next.push(e.start..e.end()),
                }
            }
        }
        bad
    }

    fn push(&mut self, range: Range<u64>, content: Source) {
        if range.start < range.end {
            self.pieces.push(Extent { start: range.start, len: range.end - range.start, content });
        }
    }

    fn note(&mut self, mut findings: Vec<Finding>, suppressed: u64) {
        if suppressed > 0
            && let Some(last) = findings.last_mut()
        {
            last.message.push_str(&format!(" (and {suppressed} more like this)"));
        }
        self.findings.append(&mut findings);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::LayerMap;
    use crate::storage::{MemStorage, ReadAt};
    use proptest::prelude::*;

    /// A layer given by one mapping per 512-byte block.
    struct Blocks {
        blocks: Vec<u8>,
        storage: MemStorage,
    }

    const BLOCK: u64 = 512;

    impl Layer for Blocks {
        fn size(&self) -> u64 {
            self.blocks.len() as u64 * BLOCK
        }

        fn map(&self, range: Range<u64>) -> LayerMap {
            let mut map = LayerMap::new(range.start);
            let mut at = range.start;
            while at < range.end {
                let i = at / BLOCK;
                let len = ((i + 1) * BLOCK).min(range.end) - at;
                match self.blocks[i as usize] {
                    0 => map.extents.push(len, Mapping::Below),
                    1 => map.extents.push(len, Mapping::Zero),
                    2 => map.extents.push(len, Mapping::Data { file: 0, host: at }),
                    _ => map.push_bad(len, &Error::new(Kind::Corrupt, "bad"), self.path()),
                }
                at += len;
            }
            map
        }

        fn decompress(&self, _: u64, _: u32, _: &mut [u8]) -> Result<()> {
            unreachable!("no compressed blocks here")
        }

        fn storage(&self, _: u8) -> &dyn ReadAt {
            &self.storage
        }
    }

    fn layer(blocks: Vec<u8>) -> Blocks {
        Blocks { blocks, storage: MemStorage::new("mem", Vec::new()) }
    }

    /// What block `i` of the point is, worked out block by block.
    fn model(layers: &[Blocks], at: u64) -> Source {
        for (i, l) in layers.iter().enumerate().rev() {
            let layer = i as u16;
            if at >= l.size() {
                return Source::Unallocated;
            }
            match l.blocks[(at / BLOCK) as usize] {
                0 => continue,
                1 => return Source::Zero { layer },
                2 => return Source::Data { layer, file: 0, host: at },
                _ => return Source::Bad { layer },
            }
        }
        Source::Unallocated
    }

    proptest! {
        #![proptest_config(crate::failpoint::properties(256))]
        #[test]
        fn merging_agrees_with_asking_block_by_block(
            layers in prop::collection::vec(prop::collection::vec(0u8..4, 1..40), 1..7),
            from in 0u64..40 * 512, len in 1u64..40 * 512, cut in 0usize..7,
        ) {
            let layers: Vec<Blocks> = layers.into_iter().map(layer).collect();
            let size = layers.last().unwrap().size();
            let range = from.min(size)..(from + len).min(size);
            let fold = |upto: usize, range: Range<u64>| {
                let mut f = LayerMerge::new(range);
                for (i, l) in layers[..upto].iter().enumerate().rev() {
                    f.add_layer(i as u16, l);
                }
                f.finish().unwrap().extents
            };
            let folded = fold(layers.len(), range.clone());
            for at in range.clone().step_by(97) {
                let e = crate::extent::clipped(folded.as_slice(), at..at + 1).next().unwrap();
                prop_assert_eq!(e.content, model(&layers, at));
            }
            // The same with the lower layers known beforehand.
            let cut = cut.min(layers.len() - 1);
            if cut > 0 {
                let lower = layers[cut - 1].size();
                let known = fold(cut, range.start.min(lower)..range.end.min(lower));
                let mut f = LayerMerge::new(range.clone());
                for (i, l) in layers.iter().enumerate().skip(cut).rev() {
                    f.add_layer(i as u16, l);
                }
                f.add_known(&KnownParent { size: lower, extents: known.as_slice() });
                prop_assert_eq!(f.finish().unwrap().extents, folded);
            }
        }
    }

    #[test]
    fn more_pieces_than_a_map_may_have_are_refused() {
        let most = layer((0..MAX_PIECES).map(|i| 1 + (i % 2) as u8).collect());
        let more = layer((0..MAX_PIECES + 1).map(|i| 1 + (i % 2) as u8).collect());
        for (layer, fits) in [(most, true), (more, false)] {
            let mut merge = LayerMerge::new(0..layer.size());
            merge.add_layer(0, &layer);
            assert!(merge.is_covered());
            assert_eq!(merge.finish().is_ok(), fits);
        }
    }

    /// Whatever a layer says, no byte of another place is shown.
    #[test]
    fn pieces_that_overlap_or_leave_gaps_make_no_map() {
        let merged = |pieces: &[Range<u64>]| {
            let mut merge = LayerMerge::new(0..20);
            merge.pending.clear();
            for p in pieces {
                merge.push(p.clone(), Source::Data { layer: 0, file: 0, host: p.start * 100 });
            }
            merge.finish().is_ok()
        };
        assert!(merged(&[10..20, 0..10]));
        for bad in [vec![0..10, 5..15], vec![0..10, 12..22], vec![0..10, 0..10]] {
            assert!(!merged(&bad), "{bad:?}");
        }
        for bad in [0..10, 5..20] {
            assert!(!merged(std::slice::from_ref(&bad)), "{bad:?}");
        }
    }

    /// A disk that was shrunk and grown: behind the end of the smaller layer there are zeros, also where that layer
    /// has nothing of its own, and not what was there before.
    #[test]
    fn behind_the_end_of_an_empty_layer_nothing_shows_through() {
        let layers = [layer(vec![2; 4]), layer(vec![0]), layer(vec![0; 4])];
        let mut merge = LayerMerge::new(0..4 * BLOCK);
        for (i, l) in layers.iter().enumerate().rev() {
            merge.add_layer(i as u16, l);
        }
        let map = merge.finish().unwrap().extents;
        let seen: Vec<_> = map.as_slice().iter().map(|e| (e.start, e.len, e.content)).collect();
        let data = Source::Data { layer: 0, file: 0, host: 0 };
        assert_eq!(seen, [(0, BLOCK, data), (BLOCK, 3 * BLOCK, Source::Unallocated)]);
    }
}
