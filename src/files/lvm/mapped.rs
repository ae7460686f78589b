//! A logical volume's bytes, out of those of its physical volumes.

use std::io;
use std::path::Path;

use super::super::source::Source;
use super::group::{Group, Volume};
use super::label::Physical;
use crate::error::{Finding, Kind, Result};
use crate::storage::ReadAt;

/// A stretch: where in the volume, and where its stripes are.
struct Piece {
    start: u64,
    len: u64,
    stripe_size: u64,
    /// Physical volume, and where on it in bytes.
    stripes: Vec<(usize, u64)>,
}

/// What is read as a logical volume.
pub(super) struct Mapped {
    sources: Vec<Source>,
    pieces: Vec<Piece>,
}

impl Mapped {
    /// Puts it together.
    ///
    /// # Errors
    /// A finding that says why it cannot be read.
    pub(super) fn new(group: &Group, volume: &Volume, known: &[Physical]) -> Result<Self, Finding> {
        let refuse = |kind, why: String| {
            let what = format!("logical volume {}/{}: {why}", group.name, volume.name);
            let path = known.first().map_or(Path::new("point"), |p| p.source.path());
            Finding::warning(kind, path, what)
        };
        let segments =
            volume.segments.as_ref().map_err(|e| refuse(Kind::Unsupported, e.clone()))?;
        let sources: Vec<Source> = known.iter().map(|p| p.source.clone()).collect();
        let mut pieces = Vec::new();
        for s in segments {
            let mut stripes = Vec::new();
            let each = s.len / s.stripes.len().max(1) as u64;
            for (name, offset) in &s.stripes {
                let place = group.places.get(name);
                let index = place.and_then(|p| known.iter().position(|k| k.id == p.id));
                let (Some(place), Some(index)) = (place, index) else {
                    let why = format!("physical volume {name} is missing");
                    let finding = refuse(Kind::Incomplete, why);
                    let remedy = "it may be on a disk that was not backed up in the same run";
                    return Err(Finding { remedy: Some(remedy.into()), ..finding });
                };
                let at = place.start.saturating_add(*offset);
                let inside = known.get(index).is_some_and(|k| k.source.check(at, each).is_ok());
                if !inside {
                    let why = format!("it extends beyond the end of {name}");
                    return Err(refuse(Kind::Corrupt, why));
                }
                stripes.push((index, at));
            }
            pieces.push(Piece { start: s.start, len: s.len, stripe_size: s.stripe_size, stripes });
        }
        Ok(Mapped { sources, pieces })
    }

    /// Where the byte at `offset` is, and how many follow it there.
    fn find(&self, offset: u64) -> Option<(&Source, u64, u64)> {
        let index = self.pieces.partition_point(|p| p.start <= offset).checked_sub(1)?;
        let piece = self.pieces.get(index)?;
        let inside = offset - piece.start;
        let left = piece.len.checked_sub(inside).filter(|n| *n > 0)?;
        let count = piece.stripes.len() as u64;
        let (stripe, at, n) = match count {
            1 => (0, inside, left),
            _ => {
                let (number, rest) = (inside / piece.stripe_size, inside % piece.stripe_size);
                let at = (number / count) * piece.stripe_size + rest;
                (number % count, at, left.min(piece.stripe_size - rest))
            }
        };
        let (source, start) = piece.stripes.get(stripe as usize)?;
        Some((self.sources.get(*source)?, start + at, n))
    }
}

impl ReadAt for Mapped {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let Some((source, at, n)) = self.find(offset) else { return Ok(0) };
        let n = n.min(buf.len() as u64) as usize;
        source.read(buf.get_mut(..n).unwrap_or_default(), at).map_err(io::Error::other)?;
        Ok(n)
    }

    fn len(&self) -> u64 {
        self.pieces.last().map_or(0, |p| p.start + p.len)
    }

    fn name(&self) -> &Path {
        self.sources.first().map_or(Path::new("point"), Source::path)
    }
}
