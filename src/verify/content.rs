//! Contents: the decompression of every compressed cluster.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::hash::in_parallel;
use crate::layer::{Layer, Mapping};

/// Guest bytes mapped at once when looking for compressed clusters.
const WINDOW: u64 = 64 << 20;

/// Maps all of `layer` and decompresses every compressed cluster; `found` gets each error.
///
/// # Errors
/// None of its own; what the layer says goes to `found`.
pub fn decompress_all(layer: &dyn Layer, jobs: usize, found: impl Fn(Error) + Sync) -> Result<()> {
    let windows = mapped_windows(layer);
    let work = |i: u64, out: &mut Vec<u8>| -> Result<()> {
        decompress_window(layer, windows[i as usize].clone(), out, &found);
        Ok(())
    };
    in_parallel(windows.len() as u64, jobs, Vec::new, work)
}

/// The parts of the disk that have tables; a sparse disk of exabytes has few.
fn mapped_windows(layer: &dyn Layer) -> Vec<Range<u64>> {
    let mut windows = Vec::new();
    let mut at = layer.next_mapped(0);
    while at < layer.size() {
        let start = at - at % WINDOW;
        let end = start.saturating_add(WINDOW).min(layer.size());
        windows.push(start..end);
        at = layer.next_mapped(end).max(end);
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
