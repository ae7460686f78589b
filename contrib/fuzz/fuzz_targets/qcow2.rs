//! A whole image from hostile bytes: header, snapshot table, L1, L2, compressed clusters. The map
//! keeps its invariant, every extent reads or fails, nothing panics.
#![no_main]

use std::sync::Arc;

use fleecefs::layer::qcow2::Qcow2Layer;
use fleecefs::layer::{Layer, Mapping, LayerPart, probe};
use fleecefs::storage::MemStorage;

/// Guest bytes looked at: enough for several L2 tables of small clusters.
const SPAN: u64 = 1 << 20;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let storage = Arc::new(MemStorage::new("image", bytes.to_vec()));
    let Ok(info) = probe(&*storage) else { return };
    let parts = (0..info.snapshots.len().min(2) as u32).map(LayerPart::Snapshot);
    for part in std::iter::once(LayerPart::Whole).chain(parts) {
        let data = info.data_file.is_some().then(|| storage.clone() as _);
        let Ok(layer) = Qcow2Layer::open(storage.clone(), data, &part) else { continue };
        look(&layer, 0);
        look(&layer, layer.size().saturating_sub(SPAN));
    }
});

fn look(layer: &Qcow2Layer, start: u64) {
    let range = start.min(layer.size())..layer.size().min(start.saturating_add(SPAN));
    if range.is_empty() {
        return;
    }
    assert!(layer.next_mapped(range.start) >= range.start);
    let map = layer.map(range.clone());
    map.extents.check(&range).unwrap();
    let mut buf = [0; 512];
    for e in map.extents.as_slice().iter().take(64) {
        match e.content {
            Mapping::Data { file, host } => {
                let n = (e.len as usize).min(buf.len());
                layer.read_data(file, host, &mut buf[..n]).expect("mapped data lies in the file");
            }
            Mapping::Compressed { host, len, unit, .. } => {
                let _ = layer.decompress(host, len, &mut vec![0; unit as usize]);
            }
            Mapping::Below | Mapping::Zero | Mapping::Bad => {}
        }
    }
}
