//! Reading the bytes of one window, extent by extent.

use std::sync::Arc;

use super::Image;
use crate::error::{Error, Kind, Result};
use crate::image::Source;
use crate::image::lazy::LazyLayer;
use crate::image::window::Window;
use crate::layer::{Layer, Piece, Unit};

/// The layers that a read has taken bytes from, each once. Reads go back and forth between a FULL
/// and what depends on it; looking at a file after each piece would cost a tenth of the time.
#[derive(Default)]
pub(super) struct LayersRead {
    layers: [u16; LayersRead::MOST],
    len: usize,
}

impl LayersRead {
    /// The mount reads 256 KiB at a time: 5 clusters of 64 KiB at most.
    pub(super) const MOST: usize = 24;

    /// Adds a layer; false if there is no room for it.
    fn add(&mut self, layer: u16) -> bool {
        if self.layers[..self.len].contains(&layer) {
            return true;
        }
        let Some(free) = self.layers.get_mut(self.len) else { return false };
        *free = layer;
        self.len += 1;
        true
    }

    fn iter(&self) -> impl Iterator<Item = u16> {
        self.layers[..self.len].iter().copied()
    }
}

impl Image {
    pub(super) fn read_window(&self, window: &Window, buf: &mut [u8], offset: u64) -> Result<()> {
        let stack = self.stack();
        let mut read_from = LayersRead::default();
        for e in window.clipped(offset..offset + buf.len() as u64) {
            let from = (e.start - offset) as usize;
            let part = &mut buf[from..from + e.len as usize];
            let layer = match e.content {
                Source::Unallocated | Source::Zero { .. } => {
                    part.fill(0);
                    continue;
                }
                Source::Data { layer, .. } | Source::Compressed { layer, .. } => layer,
                Source::Bad { layer } => return Err(self.bad_range(layer, e.start)),
            };
            if !read_from.add(layer) {
                self.check_layers(&read_from)?;
                read_from = LayersRead::default();
                read_from.add(layer);
            }
            let lazy = &stack[usize::from(layer)];
            self.read_extent(lazy, e.content, part).map_err(|err| self.blame(lazy, err))?;
        }
        self.check_layers(&read_from)
    }

    /// After the last read from a layer: makes sure that it was still the same file.
    fn check_layers(&self, read_from: &LayersRead) -> Result<()> {
        let stack = self.stack();
        read_from.iter().try_for_each(|layer| self.check_layer(&stack[usize::from(layer)]))
    }

    fn read_extent(&self, lazy: &LazyLayer, source: Source, part: &mut [u8]) -> Result<()> {
        let layer = lazy.get()?;
        match source {
            Source::Data { file, host, .. } => layer.read_data(file, host, part),
            Source::Compressed { host, len, unit, skip, .. } => {
                self.read_unit(lazy.id, layer, Unit { host, len, size: unit }, skip, part)
            }
            Source::Unallocated | Source::Zero { .. } | Source::Bad { .. } => Ok(()),
        }
    }

    /// Reads a compressed unit from `skip` on. Of a large one, no more is decompressed than is needed.
    fn read_unit(
        &self,
        id: u64,
        layer: &dyn Layer,
        unit: Unit,
        skip: u32,
        part: &mut [u8],
    ) -> Result<()> {
        let size = layer.piece_size(unit);
        let (mut at, mut rest) = (skip, part);
        while !rest.is_empty() {
            let (number, inside) = (at / size, at % size);
            let (now, after) = rest.split_at_mut(rest.len().min((size - inside) as usize));
            let piece = self.piece(id, layer, unit, number)?;
            let done = piece.and_then(|p| copy(&p.bytes, inside as usize, now));
            done.ok_or_else(|| short(layer, unit))?;
            at += now.len() as u32;
            rest = after;
        }
        Ok(())
    }

    fn piece(
        &self,
        id: u64,
        layer: &dyn Layer,
        unit: Unit,
        number: u32,
    ) -> Result<Option<Arc<Piece>>> {
        self.cache.piece(
            id,
            unit.host,
            number,
            || layer.working_memory(unit),
            |pieces, before| {
                let before = before.as_ref().map(|(n, piece)| (*n, &**piece));
                layer.decompress_pieces(unit, before, number, &mut |n, piece| {
                    // Bytes of a file that changed meanwhile must not get into the cache.
                    layer.check_unchanged()?;
                    pieces.keep(n, piece);
                    Ok(())
                })
            },
        )
    }

    fn bad_range(&self, layer: u16, at: u64) -> Error {
        // The finding, logged when the window was merged, has file, offset and reason.
        Error::new(Kind::Corrupt, format!("guest offset {at:#x} cannot be read; see the findings"))
            .at_path(self.layer_path(layer))
    }
}

/// Fills `part` from the bytes after `skip`; `None` if there are too few.
fn copy(bytes: &[u8], skip: usize, part: &mut [u8]) -> Option<()> {
    part.copy_from_slice(bytes.get(skip..skip.checked_add(part.len())?)?);
    Some(())
}

fn short(layer: &dyn Layer, unit: Unit) -> Error {
    Error::new(Kind::Corrupt, "a compressed unit is shorter than its extent")
        .at_path(layer.path())
        .at_offset(unit.host)
}
