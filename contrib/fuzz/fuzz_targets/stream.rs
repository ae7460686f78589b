//! A whole virtnbdbackup stream from hostile bytes: frames, metadata, trailer, lz4.
#![no_main]

use std::sync::Arc;

use fleecefs::layer::sparsestream::{StreamLayer, has_magic, probe};
use fleecefs::layer::{Layer, Mapping};
use fleecefs::storage::MemStorage;

/// Guest bytes looked at.
const SPAN: u64 = 4 << 20;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let storage = Arc::new(MemStorage::new("sda.full.data", bytes.to_vec()));
    let _ = (has_magic(&*storage), probe(&*storage));
    let Ok(layer) = StreamLayer::open(storage) else { return };
    for start in [0, layer.size().saturating_sub(SPAN)] {
        let range = start..layer.size().min(start + SPAN);
        assert!(range.is_empty() || layer.next_mapped(range.start) >= range.start);
        let map = layer.map(range.clone());
        map.extents.check(&range).unwrap();
        for e in map.extents.as_slice().iter().take(16) {
            match e.content {
                Mapping::Data { file, host } => {
                    let n = (e.len as usize).min(512);
                    layer.read_data(file, host, &mut vec![0; n]).expect("data lies in the file");
                }
                Mapping::Compressed { host, len, unit, .. } => {
                    let _ = layer.decompress(host, len, &mut vec![0; unit as usize]);
                }
                Mapping::Zero | Mapping::Below | Mapping::Bad => {}
            }
        }
    }
});
