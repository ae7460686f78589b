//! [`Layer`]: what every format can do.

use std::ops::Range;
use std::path::Path;

use super::map::{Kinds, KnownTables, LayerMap};
use crate::error::Result;
use crate::extent::ExtentList;
use crate::storage::ReadAt;

/// Bytes of which an outline says that anything may be there, where a layer has nothing better.
const UNKNOWN_STRETCH: u64 = 64 << 20;

/// Bytes of a [`Piece`] where a unit has several.
pub const PIECE: u32 = 256 << 10;

/// A decompressed unit, or a part of a large one.
#[derive(Debug, PartialEq, Eq)]
pub struct Piece {
    /// Its bytes.
    pub bytes: Box<[u8]>,
    /// Where in the file decompression goes on after it, if that can be told.
    pub next: Option<u64>,
}

/// A compressed unit, as [`Mapping::Compressed`](super::Mapping::Compressed) names it.
#[derive(Debug, Clone, Copy)]
pub struct Unit {
    /// Where it starts in file 0.
    pub host: u64,
    /// An upper limit of its compressed length.
    pub len: u32,
    /// Its length when decompressed.
    pub size: u32,
}

/// One file's contribution to the points of a disk. Immutable once opened.
pub trait Layer: Send + Sync {
    /// Size in bytes of the virtual disk that this layer describes.
    fn size(&self) -> u64;

    /// What this layer says about `range`, which lies inside `0..size()`. The answer covers the
    /// range exactly. A part that cannot be mapped is `Bad`, with a finding.
    fn map(&self, range: Range<u64>) -> LayerMap;

    /// Fails if the table that leads to all others is bad somewhere. Looks at no other.
    ///
    /// # Errors
    /// `Corrupt`, `Truncated` or `Io`, with file and offset.
    fn check_top(&self) -> Result<()> {
        Ok(())
    }

    /// A guest offset at or after `from` before which everything is certainly `Below`: a coarse
    /// and cheap hint that lets sparse disks be skipped over. `size()` if nothing follows.
    fn next_mapped(&self, from: u64) -> u64 {
        from
    }

    /// The same for everything that is `Below` or `Zero`.
    fn next_data(&self, from: u64) -> u64 {
        self.next_mapped(from)
    }

    /// Which kinds of content occur from `from` on, which lies inside `0..size()`: a short list of
    /// long stretches that begins there, is not empty and need not reach the end. Every kind that
    /// occurs in a stretch is among its kinds; where a stretch has one kind only, all of it is so.
    fn outline(&self, from: u64, known: &mut KnownTables) -> ExtentList<Kinds> {
        let _ = known;
        let data = self.next_data(from).clamp(from, self.size());
        let mapped = self.next_mapped(from).clamp(from, data);
        let mut list = ExtentList::new(from);
        list.push(mapped - from, Kinds::BELOW);
        list.push(data - mapped, Kinds::BELOW.with(Kinds::ZERO));
        list.push((self.size() - data).min(UNKNOWN_STRETCH), Kinds::ANY);
        list
    }

    /// Reads plain bytes that [`Mapping::Data`](super::Mapping::Data) named.
    ///
    /// # Errors
    /// `Io`, `Truncated` or `Changed`, with file and offset.
    fn read_data(&self, file: u8, host: u64, buf: &mut [u8]) -> Result<()> {
        self.storage(file).read_exact_at(buf, host)
    }

    /// Decompresses the unit at `host` into `out`, whose length is the unit's.
    ///
    /// # Errors
    /// `Corrupt`, `Io` or `Truncated`, with file and offset.
    fn decompress(&self, host: u64, len: u32, out: &mut [u8]) -> Result<()>;

    /// The length of `unit`'s pieces, of which the last may be shorter; at least 1.
    fn piece_size(&self, unit: Unit) -> u32 {
        unit.size.max(1)
    }

    /// Bytes that decompressing pieces of `unit` takes at a time, what comes out included.
    ///
    /// # Errors
    /// As [`decompress`](Self::decompress).
    fn working_memory(&self, unit: Unit) -> Result<u64> {
        Ok(unit.size.into())
    }

    /// Decompresses `unit` piece by piece, up to piece number `last` and a little further at most, and
    /// gives each to `keep` with its number. Begins after the piece `after`, which has a `next`, or at the start.
    ///
    /// # Errors
    /// As [`decompress`](Self::decompress), and what `keep` says. Pieces that were kept are right.
    fn decompress_pieces(
        &self,
        unit: Unit,
        after: Option<(u32, &Piece)>,
        last: u32,
        keep: &mut dyn FnMut(u32, Piece) -> Result<()>,
    ) -> Result<()> {
        let _ = (after, last);
        let mut bytes = vec![0; unit.size as usize].into_boxed_slice();
        self.decompress(unit.host, unit.len, &mut bytes)?;
        keep(0, Piece { bytes, next: None })
    }

    /// The storage behind [`Mapping::Data`](super::Mapping::Data)'s file number.
    fn storage(&self, file: u8) -> &dyn ReadAt;

    /// Fails with `Changed` if one of the layer's files may have other bytes than when it was
    /// opened.
    fn check_unchanged(&self) -> Result<()> {
        self.storage(0).check_unchanged()
    }

    /// The file to name in messages.
    fn path(&self) -> &Path {
        self.storage(0).name()
    }
}
