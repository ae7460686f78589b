//! Merging layers that say anything about anything: the result covers the range exactly.
#![no_main]

use std::ops::Range;

use fleecefs::error::{Error, Kind, Result};
use fleecefs::image::LayerMerge;
use fleecefs::layer::{Layer, LayerMap, Mapping};
use fleecefs::storage::{MemStorage, ReadAt};

/// A layer given by one byte per block of 512 bytes.
struct Blocks(Vec<u8>, MemStorage);

impl Layer for Blocks {
    fn size(&self) -> u64 {
        self.0.len() as u64 * 512
    }

    fn map(&self, range: Range<u64>) -> LayerMap {
        let mut map = LayerMap::new(range.start);
        let mut at = range.start;
        while at < range.end {
            let block = at / 512;
            let len = ((block + 1) * 512).min(range.end) - at;
            match self.0[block as usize] {
                b @ 0..64 => map.extents.push(len, Mapping::Data { file: b & 1, host: at }),
                64..128 => map.extents.push(len, Mapping::Below),
                128..192 => map.extents.push(len, Mapping::Zero),
                _ => map.push_bad(len, &Error::new(Kind::Corrupt, "bad"), self.path()),
            }
            at += len;
        }
        map
    }

    fn decompress(&self, _: u64, _: u32, _: &mut [u8]) -> Result<()> {
        Ok(())
    }

    fn storage(&self, _: u8) -> &dyn ReadAt {
        &self.1
    }
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let [from, len, rest @ ..] = bytes else { return };
    let layers: Vec<Blocks> = rest
        .split(|b| *b == 255)
        .take(64)
        .map(|b| Blocks(b.to_vec(), MemStorage::new("layer", Vec::new())))
        .collect();
    let Some(top) = layers.last() else { return };
    let start = (u64::from(*from) * 100).min(top.size());
    let range = start..top.size().min(start + u64::from(*len) * 1000);
    let mut fold = LayerMerge::new(range.clone());
    for (i, layer) in layers.iter().enumerate().rev() {
        if fold.is_covered() {
            break;
        }
        fold.add_layer(i as u16, layer);
    }
    fold.finish().unwrap().extents.check(&range).unwrap();
});
