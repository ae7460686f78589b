//! [`Slots`]: a folder as a list of entries of 32 bytes.

use std::ops::Range;

use super::super::bytes::part;
use super::{Chain, Clusters};
use crate::error::Result;

/// Bytes of an entry.
pub(in super::super) const SLOT: u64 = 32;
/// Bytes that are looked at together.
const WINDOW: u64 = 4096;

/// Where a folder is.
enum Where {
    /// In one piece: the root of FAT12 and FAT16.
    Fixed { at: u64, len: u64 },
    /// In clusters.
    Chain(Chain),
}

/// A folder's bytes.
pub(in super::super) struct Slots<'a> {
    clusters: &'a Clusters,
    place: Where,
    /// Where it ends, if not where its clusters do.
    len: u64,
    window: Vec<u8>,
    /// Where the window is inside the folder and inside the volume.
    from: u64,
    at: u64,
}

impl<'a> Slots<'a> {
    /// A folder in one piece.
    pub(in super::super) fn fixed(clusters: &'a Clusters, at: u64, len: u64) -> Self {
        let place = Where::Fixed { at, len };
        Slots { clusters, place, len, window: Vec::new(), from: 0, at: 0 }
    }

    /// A folder in clusters, that is at most `len` bytes long.
    pub(in super::super) fn chain(clusters: &'a Clusters, chain: Chain, len: u64) -> Self {
        Slots { clusters, place: Where::Chain(chain), len, window: Vec::new(), from: 0, at: 0 }
    }

    /// Where the folder is in the volume, in bytes.
    pub(in super::super) fn places(&self) -> Vec<Range<u64>> {
        match &self.place {
            Where::Fixed { at, len } => std::iter::once(*at..at + len).collect(),
            Where::Chain(chain) => chain.places(self.clusters),
        }
    }

    /// The entry that begins at `offset` of the folder, and where that is in the volume; `None` behind the last one.
    ///
    /// # Errors
    /// `Corrupt` if the folder should go on there; what reading the point says.
    pub(in super::super) fn get(&mut self, offset: u64) -> Result<Option<(u64, &[u8])>> {
        if offset.checked_add(SLOT).is_none_or(|end| end > self.len) {
            return Ok(None);
        }
        let inside = offset.checked_sub(self.from).filter(|i| i + SLOT <= self.window.len() as u64);
        let inside = match inside {
            Some(inside) => inside,
            None => match self.fill(offset)? {
                true => 0,
                false => return Ok(None),
            },
        };
        let bytes = part(&self.window, inside as usize, SLOT as usize);
        Ok(Some((self.at + inside, bytes)))
    }

    fn fill(&mut self, offset: u64) -> Result<bool> {
        let found = match &self.place {
            Where::Fixed { at, len } => {
                let left = len.saturating_sub(offset);
                (left > 0).then_some((at + offset, left))
            }
            Where::Chain(chain) => chain.place(self.clusters, offset)?,
        };
        let Some((at, there)) = found else { return Ok(false) };
        let len = there.min(WINDOW);
        self.window = self.clusters.source.meta(at, len as usize)?;
        (self.from, self.at) = (offset, at);
        Ok(len >= SLOT)
    }
}
