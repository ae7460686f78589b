//! Contents: whether all data can be read, and the decompression of every compressed cluster.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::hash::{Holes, in_parallel};
use crate::layer::{Layer, Mapping};
use crate::progress::Progress;
use crate::storage::ReadAt;

/// Guest bytes mapped at once when looking for compressed clusters.
const WINDOW: u64 = 64 << 20;
/// Bytes read at once.
const PIECE: u64 = 1 << 20;
/// Windows or pieces that are lined up at once: a hostile image has more than memory could hold.
const BATCH: usize = 1 << 12;

/// Reads all data of a file, and none of its holes.
///
/// # Errors
/// Reading failed.
pub(super) fn read_all(storage: &dyn ReadAt, jobs: usize, progress: &dyn Progress) -> Result<()> {
    let (len, holes) = (storage.len(), Holes::of(storage));
    let mut at = 0;
    while at < len {
        let mut pieces = Vec::new();
        while at < len && pieces.len() < BATCH {
            let (hole, end) = holes.stretch(at, len);
            if hole {
                progress.advance(end - at);
                at = end;
            }
            while at < end && pieces.len() < BATCH {
                let stop = end.min((at - at % PIECE).saturating_add(PIECE));
                pieces.push(at..stop);
                at = stop;
            }
        }
        in_parallel(pieces.len() as u64, jobs, Vec::new, |i, buf: &mut Vec<u8>| {
            let piece = &pieces[i as usize];
            buf.resize((piece.end - piece.start) as usize, 0);
            storage.read_exact_at(buf, piece.start)?;
            progress.advance(piece.end - piece.start);
            Ok(())
        })?;
    }
    Ok(())
}

/// Maps all of `layer` and decompresses every compressed cluster; `found` gets each error.
///
/// # Errors
/// None of its own; what the layer says goes to `found`.
pub(super) fn decompress_all(
    layer: &dyn Layer,
    jobs: usize,
    found: impl Fn(Error) + Sync,
) -> Result<()> {
    let mut at = layer.next_mapped(0);
    while at < layer.size() {
        let windows = mapped_windows(layer, &mut at);
        let work = |i: u64, out: &mut Vec<u8>| -> Result<()> {
            decompress_window(layer, windows[i as usize].clone(), out, &found);
            Ok(())
        };
        in_parallel(windows.len() as u64, jobs, Vec::new, work)?;
    }
    Ok(())
}

/// The next parts of the disk that have tables; a sparse disk of exabytes has few. Moves `at` behind
/// them.
fn mapped_windows(layer: &dyn Layer, at: &mut u64) -> Vec<Range<u64>> {
    let mut windows = Vec::new();
    while *at < layer.size() && windows.len() < BATCH {
        let start = *at - *at % WINDOW;
        let end = start.saturating_add(WINDOW).min(layer.size());
        windows.push(start..end);
        *at = layer.next_mapped(end).max(end);
    }
    windows
}

fn decompress_window(
    layer: &dyn Layer,
    range: Range<u64>,
    out: &mut Vec<u8>,
    found: &(impl Fn(Error) + Sync),
) {
    let start = range.start;
    let map = layer.map(range);
    for f in &map.findings {
        let mut error = Error::new(f.kind, &f.message).at_path(&f.path);
        if let Some(offset) = f.offset {
            error = error.at_offset(offset);
        }
        found(error);
    }
    for e in map.extents.as_slice() {
        let Mapping::Compressed { host, len, unit, skip } = e.content else { continue };
        // A unit that began in the window before was looked at there.
        if skip != 0 && e.start == start && start != 0 {
            continue;
        }
        out.resize(unit as usize, 0);
        if let Err(error) = layer.decompress(host, len, out) {
            found(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;
    use crate::storage::SourceFile;

    /// Counts the bytes that are reported.
    #[derive(Default)]
    struct Counted(AtomicU64);

    impl Progress for Counted {
        fn advance(&self, bytes: u64) {
            self.0.fetch_add(bytes, Ordering::Relaxed);
        }
    }

    #[test]
    fn a_sparse_file_of_terabytes_is_read_where_it_has_data() {
        // A file system may have a smaller limit; what matters is that holes are passed over.
        let f = tempfile::NamedTempFile::new().unwrap();
        let len = (1u64 << 40) + 5;
        f.as_file().set_len(len).unwrap();
        f.as_file().write_all_at(&[7; 4096], 3 << 30).unwrap();
        let done = Counted::default();
        read_all(&SourceFile::look(f.path()).unwrap(), 2, &done).unwrap();
        assert_eq!(done.0.into_inner(), len);
    }
}
