//! Looking far ahead: whole tables that are one hole, or data throughout.
//!
//! State: of each layer the stretches that it was asked for last, and what is in the tables that it
//! has read. A search only moves forward, so each layer's tables are gone through once, however the
//! stretches of the layers overlap.

use super::Image;
use super::range_kind::RangeKind;
use crate::error::Result;
use crate::extent::{Extent, ExtentList};
use crate::layer::{Kinds, KnownTables, Layer};

/// What has been seen of one layer.
struct LayerOutline {
    stretches: ExtentList<Kinds>,
    /// The stretch that was looked at last.
    current: usize,
    known: KnownTables,
}

impl LayerOutline {
    /// The stretch with `at`, which lies inside the layer.
    fn stretch(&mut self, layer: &dyn Layer, at: u64) -> Extent<Kinds> {
        let covers = |e: &Extent<Kinds>| e.start <= at && at < e.end();
        while self.stretches.as_slice().get(self.current).is_some_and(|e| e.end() <= at) {
            self.current += 1;
        }
        if !self.stretches.as_slice().get(self.current).is_some_and(covers) {
            self.stretches = layer.outline(at, &mut self.known);
            self.current = 0;
        }
        let found = self.stretches.as_slice().get(self.current).copied().filter(covers);
        found.unwrap_or(Extent { start: at, len: layer.size() - at, content: Kinds::ANY })
    }
}

/// One search's view of all layers.
pub(super) struct Lookahead<'a> {
    image: &'a Image,
    /// One for each layer, bottom first; made when it is first needed.
    outlines: Vec<LayerOutline>,
    /// The lowest layer that was asked.
    lowest: usize,
}

impl<'a> Lookahead<'a> {
    /// Nothing has been looked at yet.
    pub(super) fn new(image: &'a Image) -> Self {
        Lookahead { image, outlines: Vec::new(), lowest: usize::MAX }
    }

    /// Whether `at` and all that follows up to the offset given is a hole or data, if that is known.
    ///
    /// # Errors
    /// A layer cannot be opened.
    pub(super) fn look(&mut self, at: u64) -> Result<(Option<RangeKind>, u64)> {
        let stack = self.image.stack();
        let new = || LayerOutline {
            stretches: ExtentList::new(0),
            current: 0,
            known: KnownTables::new(),
        };
        self.outlines.resize_with(stack.len(), new);
        let mut kinds = Kinds::NONE;
        let mut end = self.image.size;
        let mut asked = stack.len();
        // Whether what is here may be of a layer below all that were asked.
        let mut open = true;
        while asked > 0 && open && kinds != Kinds::ZERO.with(Kinds::DATA) {
            let layer = stack[asked - 1].get()?;
            if layer.size() <= at {
                break;
            }
            asked -= 1;
            self.lowest = self.lowest.min(asked);
            let stretch = self.outlines[asked].stretch(layer, at);
            end = end.min(stretch.end());
            for kind in [Kinds::ZERO, Kinds::DATA] {
                if stretch.content.has(kind) {
                    kinds = kinds.with(kind);
                }
            }
            open = stretch.content.has(Kinds::BELOW);
        }
        // What no layer has reads as zeros.
        if open {
            kinds = kinds.with(Kinds::ZERO);
        }
        let found = match (kinds.has(Kinds::ZERO), kinds.has(Kinds::DATA)) {
            (true, false) => Some(RangeKind::Hole),
            (false, true) => Some(RangeKind::Data),
            _ => None,
        };
        Ok((found, end))
    }

    /// Fails if a file that was looked at is not what it was.
    ///
    /// # Errors
    /// `Changed`.
    pub(super) fn check_unchanged(&self) -> Result<()> {
        let stack = self.image.stack();
        stack.from(self.lowest).try_for_each(|lazy| self.image.check_layer(lazy))
    }
}
