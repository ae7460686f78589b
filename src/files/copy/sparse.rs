//! The contents of a file, stretch by stretch.

use super::super::tree::OpenFile;
use super::report::Options;
use crate::error::{Error, Kind, Result};

/// Bytes that are read at once.
const CHUNK: usize = 1 << 20;
/// Stretches without a byte of data that are passed before somebody looks whether to stop.
const LOOK: u32 = 1024;

/// Calls `write` with all data of a file and where it belongs; holes are passed over.
///
/// # Errors
/// What reading or `write` says; `Interrupted`.
pub(super) fn each_data(
    file: &dyn OpenFile,
    options: &Options<'_>,
    mut write: impl FnMut(&[u8], u64) -> Result<()>,
) -> Result<()> {
    let (mut at, mut buf, mut passed) = (0, Vec::new(), 0u32);
    while let Some(stretch) = file.stretch(at)? {
        if stretch.end <= at {
            return Err(Error::new(Kind::Corrupt, "the file's extents do not advance"));
        }
        passed = passed.wrapping_add(1);
        if passed.is_multiple_of(LOOK) {
            options.check()?;
        }
        if stretch.hole {
            at = stretch.end;
            continue;
        }
        while at < stretch.end {
            options.check()?;
            let n = (stretch.end - at).min(CHUNK as u64) as usize;
            buf.resize(n.max(buf.len()), 0);
            let part = buf.get_mut(..n).unwrap_or_default();
            let read = file.read_at(part, at)?;
            if read == 0 {
                return Err(Error::new(Kind::Truncated, "the file ends before its length"));
            }
            write(part.get(..read).unwrap_or_default(), at)?;
            options.progress.advance(read as u64);
            at += read as u64;
        }
    }
    Ok(())
}
