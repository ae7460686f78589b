//! What really differs between two points: the bytes of what may differ are compared, and nothing else is read.

use std::ops::Range;

use super::Image;
use super::changes::{Change, Joined};
use crate::error::Result;

/// The unit in which differences are told: what disks are written in.
const SECTOR: usize = 512;
/// Bytes that are read of each point at once.
const CHUNK: usize = 1 << 20;

impl Image {
    /// As [`Image::for_each_change`], with only those parts whose bytes differ, in units of 512 bytes. Beyond the
    /// end of the smaller disk there are zeros.
    ///
    /// # Errors
    /// As [`Image::for_each_change`]; what may differ cannot be read.
    pub fn for_each_difference(
        &self,
        to: &Image,
        range: Range<u64>,
        f: impl FnMut(Change) -> bool,
    ) -> Result<()> {
        let mut joined = Joined::new(f);
        let (mut one, mut other) = (vec![0; CHUNK], vec![0; CHUNK]);
        let (mut failed, mut wanted) = (None, true);
        self.for_each_change(to, range, |change| {
            let mut at = change.start;
            while at < change.end() && wanted && failed.is_none() {
                let n = (change.end() - at).min(CHUNK as u64) as usize;
                let (a, b) = (one.get_mut(..n), other.get_mut(..n));
                let (a, b) = (a.unwrap_or_default(), b.unwrap_or_default());
                match self.fill(a, at).and_then(|()| to.fill(b, at)) {
                    Ok(()) => wanted = differing(a, b, Change { start: at, ..change }, &mut joined),
                    Err(e) => failed = Some(e),
                }
                at += n as u64;
            }
            wanted && failed.is_none()
        })?;
        if wanted {
            joined.end();
        }
        failed.map_or(Ok(()), Err)
    }

    /// Fills `buf` with the bytes at `offset`, and with zeros beyond the end.
    fn fill(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let inside = self.size().saturating_sub(offset).min(buf.len() as u64) as usize;
        let (part, rest) = buf.split_at_mut(inside);
        rest.fill(0);
        if part.is_empty() { Ok(()) } else { self.read_at(part, offset) }
    }
}

/// Gives the sectors that differ between `a` and `b`, which begin where `change` does; whether more is wanted.
fn differing(
    a: &[u8],
    b: &[u8],
    change: Change,
    joined: &mut Joined<impl FnMut(Change) -> bool>,
) -> bool {
    if a == b {
        return true;
    }
    let (mut at, mut wanted) = (change.start, true);
    for (x, y) in a.chunks(SECTOR).zip(b.chunks(SECTOR)) {
        if wanted && x != y {
            wanted = joined.add(Change { start: at, length: x.len() as u64, ..change });
        }
        at += x.len() as u64;
    }
    wanted
}
