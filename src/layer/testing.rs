//! What the tests of all layers need: reading a layer to its end.

use super::{Layer, Mapping};
use crate::error::Result;

/// A layer's bytes by its own map, merged onto `below`; every invariant of a map is checked.
///
/// # Errors
/// The first bad range or failed read.
pub(crate) fn read_onto(layer: &dyn Layer, mut below: Vec<u8>, window: u64) -> Result<Vec<u8>> {
    below.resize(layer.size() as usize, 0);
    let mut at = 0;
    while at < layer.size() {
        let end = layer.size().min(at + window);
        let map = layer.map(at..end);
        map.extents.check(&(at..end)).unwrap();
        for e in map.extents.as_slice() {
            let part = &mut below[e.start as usize..e.end() as usize];
            match e.content {
                Mapping::Below => assert!(layer.next_mapped(e.start) >= e.end().min(end)),
                Mapping::Zero => part.fill(0),
                Mapping::Data { file, host } => layer.read_data(file, host, part)?,
                Mapping::Compressed { host, len, unit, skip } => {
                    let mut out = vec![0; unit as usize];
                    layer.decompress(host, len, &mut out)?;
                    part.copy_from_slice(&out[skip as usize..skip as usize + part.len()]);
                }
                Mapping::Bad => {
                    let why = map.findings.first().expect("a bad range has a finding");
                    return Err(crate::error::Error::new(why.kind, why.message.clone()));
                }
            }
        }
        at = end;
    }
    Ok(below)
}

/// Bytes that differ from block to block, with blocks of zeros among them.
pub(crate) fn pattern(len: usize, seed: u8) -> Vec<u8> {
    let byte = |i: usize| {
        let block = i / 4096;
        let zero = (block * 7 + usize::from(seed)) % 5 < 2;
        if zero { 0 } else { (i ^ (i >> 8) ^ (block * 31)) as u8 | seed | 1 }
    };
    (0..len).map(byte).collect()
}
