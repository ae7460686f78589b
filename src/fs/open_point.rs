//! An open point: reads of it, and of what was written over it.

use std::sync::Arc;

use super::point::PointFile;
use crate::error::{Error, Kind, Result};
use crate::image::{HeldPoint, RangeKind};
use crate::overlay::{Overlay, Slot, State};

/// A point that somebody has open.
pub(super) struct OpenPoint {
    /// The point.
    pub file: Arc<PointFile>,
    /// Where its overlay is or will be, on a writable file system.
    slot: Option<Arc<Slot>>,
    /// Whether it may be written to.
    writes: bool,
    _held: HeldPoint,
}

impl OpenPoint {
    /// A point, its files held open.
    pub(super) fn new(
        file: Arc<PointFile>,
        held: HeldPoint,
        slot: Option<Arc<Slot>>,
        writes: bool,
    ) -> Self {
        OpenPoint { file, slot, writes, _held: held }
    }

    /// What was written over it, whoever did.
    pub(super) fn overlay(&self) -> Option<&Overlay> {
        self.slot.as_ref()?.overlay()
    }

    /// The overlay, if this may write.
    pub(super) fn writes(&self) -> Option<&Overlay> {
        self.overlay().filter(|_| self.writes)
    }

    /// Whether the point is no longer in the backup directory.
    pub(super) fn is_gone(&self) -> bool {
        self.slot.as_ref().is_some_and(|s| s.is_gone())
    }

    /// Fills `buf` with the bytes at `offset`, which are inside the disk.
    ///
    /// # Errors
    /// The point, or what was written, cannot be read.
    pub(super) fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        match self.overlay() {
            None => self.file.image.read_at(buf, offset),
            Some(overlay) => {
                overlay.read_at(|buf, at| self.file.image.read_at(buf, at), buf, offset)
            }
        }
    }

    /// Writes inside the disk.
    ///
    /// # Errors
    /// See [`Overlay::write`]; `Permission` if this may not write.
    pub(super) fn write(&self, data: &[u8], offset: u64) -> Result<()> {
        let overlay = self.writes().ok_or_else(read_only)?;
        overlay.write(|buf, at| self.file.image.read_at(buf, at), data, offset)
    }

    /// Makes a stretch inside the disk zeros.
    ///
    /// # Errors
    /// As [`OpenPoint::write`].
    pub(super) fn zero(&self, offset: u64, len: u64) -> Result<()> {
        let overlay = self.writes().ok_or_else(read_only)?;
        overlay.zero_over(&self.file.image, offset, len)
    }

    /// The first offset from `at` on, or the size, where there is data or a hole; `below` finds it in the point. `None` if
    /// it is not in the next `most` stretches of the overlay, or if `below` does not say.
    ///
    /// # Errors
    /// Those of `below`.
    pub(super) fn seek(
        &self,
        (mut at, size): (u64, u64),
        wanted: RangeKind,
        most: usize,
        below: impl Fn(u64) -> Result<Option<u64>>,
    ) -> Result<Option<u64>> {
        let Some(overlay) = self.overlay() else { return below(at) };
        // Where the point has the next one: it is not searched again for each stretch.
        let mut next = None;
        for _ in 0..most {
            if at >= size {
                return Ok(Some(size));
            }
            let (state, end) = overlay.run(at, size);
            match (state, wanted) {
                (State::Data, RangeKind::Data) | (State::Zero, RangeKind::Hole) => {
                    return Ok(Some(at));
                }
                (State::Data, RangeKind::Hole) | (State::Zero, RangeKind::Data) => {}
                (State::Untouched, _) => {
                    let found = match next.filter(|n| *n >= at) {
                        Some(n) => n,
                        None => match below(at)? {
                            Some(n) => n,
                            None => return Ok(None),
                        },
                    };
                    if found < end {
                        return Ok(Some(found));
                    }
                    next = Some(found);
                }
            }
            at = end;
        }
        Ok(None)
    }
}

fn read_only() -> Error {
    Error::new(Kind::Permission, "this was opened for reading")
}
