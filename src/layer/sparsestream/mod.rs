//! virtnbdbackup's streams: full, incremental, differential backups and copies of one disk.
//!
//! Its modules: `frame` (frame headers, metadata, the trailer with compressed sizes), `index` (one
//! pass over the frames), `measure` (how long a compressed frame is), `lz4` (such frames, piece by
//! piece). A full stream or a copy depends on nothing; in an incremental one, what is
//! not mentioned is looked for below. Compressed data is lz4 frames whose checksums are verified.

mod frame;
mod index;
mod lz4;
mod measure;

use std::collections::HashSet;
use std::io::{BufReader, Read};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Layer, LayerMap, Mapping, Unit};
use crate::error::{Error, Kind, Result};
use crate::layer::{PIECE, Piece as LayerPiece};
use crate::storage::{ReadAt, Section};
pub use frame::Meta;
use index::{Encoding, Piece, StreamIndex, Truncation};

/// Reads the metadata of a stream, and looks whether its last frame is there: if not, the error says
/// so, and what is before the cut can be read all the same.
///
/// # Errors
/// It is damaged, cut in its metadata, or of an unknown version.
pub fn probe(storage: &dyn ReadAt) -> Result<(Meta, Option<Error>)> {
    let named = |e: Error| e.at_path(storage.name());
    let (meta, _) = frame::read_meta(storage).map_err(named)?;
    match frame::check_end(storage, &meta) {
        Ok(()) => Ok((meta, None)),
        Err(e) if e.kind() == Kind::Truncated => Ok((meta, Some(named(e)))),
        Err(e) => Err(named(e)),
    }
}

/// Whether a file begins as a stream does. A raw disk can, too: ask for its name first.
///
/// # Errors
/// Reading failed.
pub fn has_magic(storage: &dyn ReadAt) -> Result<bool> {
    if storage.len() < frame::HEADER {
        return Ok(false);
    }
    let mut bytes = [0; frame::HEADER as usize];
    storage.read_exact_at(&mut bytes, 0)?;
    Ok(frame::Frame::parse(&bytes).is_some_and(|f| f.kind == frame::Kinds::Meta))
}

/// One stream.
pub struct StreamLayer {
    storage: Arc<dyn ReadAt>,
    meta: Meta,
    /// Ascending, without overlap.
    pieces: Vec<Piece>,
    /// Compressed frames whose content was compared with its checksum, by place.
    verified: Mutex<HashSet<u64>>,
    /// Where it ends too early.
    cut: Option<Truncation>,
}

impl StreamLayer {
    /// Reads all frame headers of the stream.
    ///
    /// # Errors
    /// The stream is damaged anywhere in its structure (one that only ends too early is not), or cannot
    /// be read.
    pub fn open(storage: Arc<dyn ReadAt>) -> Result<Self> {
        let named = |e: Error| e.at_path(storage.name());
        let (meta, at) = frame::read_meta(&*storage).map_err(named)?;
        let StreamIndex { pieces, cut } = index::read(&*storage, &meta, at).map_err(named)?;
        Ok(StreamLayer { storage, meta, pieces, cut, verified: Mutex::default() })
    }

    /// What a range that is not mentioned means.
    fn between(&self) -> Mapping {
        if self.meta.incremental { Mapping::Below } else { Mapping::Zero }
    }

    fn verified(&self) -> MutexGuard<'_, HashSet<u64>> {
        self.verified.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A compressed frame, whose content has the checksum that it should have, if it has any.
    fn frame(&self, unit: Unit) -> Result<lz4::Frame<'_>> {
        let open = || lz4::Frame::open(&*self.storage, unit);
        let frame = open()?;
        if frame.has_content_sum() && !self.verified().contains(&unit.host) {
            frame.verify()?;
            self.verified().insert(unit.host);
            return open();
        }
        Ok(frame)
    }

    /// Appends what is not mentioned, up to `to`; what would have been behind a cut is bad.
    fn push_between(&self, map: &mut LayerMap, to: u64) {
        let at = map.extents.end();
        let known = self.cut.map_or(to, |c| c.from.clamp(at, to.max(at)));
        map.extents.push(known.saturating_sub(at), self.between());
        if let Some(cut) = self.cut.filter(|_| known < to) {
            map.push_bad(to - known, &cut.error(), self.storage.name());
        }
    }

    fn first_after(&self, at: u64) -> usize {
        self.pieces.partition_point(|p| p.end() <= at)
    }
}

fn mapping(piece: &Piece, skip: u64) -> Mapping {
    match piece.how {
        Encoding::Zero => Mapping::Zero,
        Encoding::Plain => Mapping::Data { file: 0, host: piece.host + skip },
        // The length is at most `index::MAX_UNIT`.
        Encoding::Lz4(len) => {
            Mapping::Compressed { host: piece.host, len, unit: piece.len as u32, skip: skip as u32 }
        }
    }
}

impl Layer for StreamLayer {
    fn size(&self) -> u64 {
        self.meta.virtual_size
    }

    fn map(&self, range: Range<u64>) -> LayerMap {
        let mut map = LayerMap::new(range.start);
        for piece in &self.pieces[self.first_after(range.start)..] {
            if piece.start >= range.end {
                break;
            }
            let at = map.extents.end();
            if let Err(e) = map.check_room(self.storage.name()) {
                map.push_bad(range.end - at, &e, self.storage.name());
                return map;
            }
            self.push_between(&mut map, piece.start.max(at));
            let from = piece.start.max(at);
            let len = piece.end().min(range.end) - from;
            map.extents.push(len, mapping(piece, from - piece.start));
        }
        self.push_between(&mut map, range.end);
        map
    }

    fn next_mapped(&self, from: u64) -> u64 {
        if !self.meta.incremental {
            return from;
        }
        let next = self.pieces.get(self.first_after(from));
        let last = self.cut.map_or(self.meta.virtual_size, |c| c.from);
        next.map_or(last, |p| p.start).max(from)
    }

    fn decompress(&self, host: u64, len: u32, out: &mut [u8]) -> Result<()> {
        let failed = |what: String| {
            frame::corrupt(host, format!("compressed data is damaged: {what}"))
                .at_path(self.storage.name())
        };
        let packed = Section::new(&*self.storage, host, host.saturating_add(u64::from(len)));
        let mut decoder = lz4_flex::frame::FrameDecoder::new(BufReader::new(packed));
        decoder.read_exact(out).map_err(|e| failed(e.to_string()))?;
        // The end of the frame has the checksum of it all, and is read only now.
        let more = decoder.read(&mut [0]).map_err(|e| failed(e.to_string()))?;
        let rest = decoder.into_inner();
        if more != 0 || !rest.buffer().is_empty() || rest.get_ref().left() != 0 {
            return Err(failed("the frame has another length".into()));
        }
        Ok(())
    }

    fn piece_size(&self, unit: Unit) -> u32 {
        unit.size.clamp(1, PIECE)
    }

    fn working_memory(&self, unit: Unit) -> Result<u64> {
        let frame = lz4::Frame::open(&*self.storage, unit);
        frame.map(|f| f.working_memory()).map_err(|e| e.at_path(self.storage.name()))
    }

    fn decompress_pieces(
        &self,
        unit: Unit,
        after: Option<(u32, &LayerPiece)>,
        last: u32,
        keep: &mut dyn FnMut(u32, LayerPiece) -> Result<()>,
    ) -> Result<()> {
        let pieces = self.frame(unit).and_then(|f| f.pieces(after, last, keep));
        pieces.map_err(|e| e.at_path(self.storage.name()))
    }

    fn storage(&self, _file: u8) -> &dyn ReadAt {
        &*self.storage
    }
}

#[cfg(test)]
mod tests;
