//! Contents of two files, compared in step.

use super::types::Trees;
use crate::error::{Error, Kind, Result};
use crate::files::tree::{NodeId, OpenFile};

/// Bytes that are compared at once: little enough that what is the same is still in the cache for the second.
const CHUNK: usize = 256 << 10;

/// Whether two files have the same bytes.
///
/// # Errors
/// What reading says.
pub(super) fn same_content(trees: &Trees<'_>, from: NodeId, to: NodeId) -> Result<bool> {
    let (a, b) = (trees.from.0.open(from)?, trees.to.0.open(to)?);
    let (mut one, mut other) = (vec![0; CHUNK], vec![0; CHUNK]);
    let mut at = 0;
    while at < a.size() && a.size() == b.size() {
        // A hole in both needs no reading.
        let holes = (a.stretch(at)?, b.stretch(at)?);
        if let (Some(x), Some(y)) = holes
            && x.hole
            && y.hole
            && x.end.min(y.end) > at
        {
            at = x.end.min(y.end);
            continue;
        }
        let n = (a.size() - at).min(CHUNK as u64) as usize;
        let (x, y) = (one.get_mut(..n), other.get_mut(..n));
        let (x, y) = (x.unwrap_or_default(), y.unwrap_or_default());
        fill(&*a, x, at)?;
        fill(&*b, y, at)?;
        if x != y {
            return Ok(false);
        }
        at += n as u64;
    }
    Ok(a.size() == b.size())
}

fn fill(file: &dyn OpenFile, buf: &mut [u8], offset: u64) -> Result<()> {
    let mut done = 0;
    while let Some(rest) = buf.get_mut(done..).filter(|r| !r.is_empty()) {
        match file.read_at(rest, offset + done as u64)? {
            0 => return Err(Error::new(Kind::Truncated, "the file ends too early")),
            n => done += n,
        }
    }
    Ok(())
}
