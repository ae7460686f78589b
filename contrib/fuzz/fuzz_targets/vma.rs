//! A whole VMA archive from hostile bytes, compressed or not. Start from real archives: nothing gets
//! behind the MD5 sums by chance.
#![no_main]

use std::sync::Arc;

use fleecefs::layer::vma::{Archive, VmaLayer, read_beginning};
use fleecefs::layer::{Layer, Mapping};
use fleecefs::storage::MemStorage;

/// Guest bytes looked at.
const SPAN: u64 = 4 << 20;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let storage = Arc::new(MemStorage::new("a.vma", bytes.to_vec()));
    let Ok(beginning) = read_beginning(&*storage) else { return };
    let Ok(archive) = Archive::open(storage).map(Arc::new) else { return };
    for device in beginning.header.devices.iter().take(4) {
        let Ok(layer) = VmaLayer::new(archive.clone(), device.id) else { continue };
        let range = 0..layer.size().min(SPAN);
        let map = layer.map(range.clone());
        map.extents.check(&range).unwrap();
        for e in map.extents.as_slice().iter().take(64) {
            match e.content {
                Mapping::Data { file, host } => {
                    let n = (e.len as usize).min(512);
                    layer.read_data(file, host, &mut vec![0; n]).expect("data lies in the file");
                }
                Mapping::Zero => {}
                other => panic!("{other:?} in a sound archive"),
            }
        }
    }
});
