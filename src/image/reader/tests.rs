use super::read::LayersRead;
use super::*;
use crate::layer::{Format, LayerPart};
use std::os::unix::fs::FileExt;

fn spec(path: &Path, format: Format) -> LayerSpec {
    let file = Arc::new(SourceFile::look(path).unwrap());
    LayerSpec { file, format, part: LayerPart::Whole, data_file: None }
}

pub(crate) fn image(
    path: &Path,
    format: Format,
    size: u64,
    below: Option<Arc<Image>>,
) -> Arc<Image> {
    Image::new(size, &[spec(path, format)], below, &Cache::new(1 << 24)).unwrap()
}

/// A qcow2 of version 2 with this L1 table and, at 0x20000, this L2 table.
pub(crate) fn qcow2(
    cluster_bits: u8,
    size: u64,
    l1: &[u64],
    l2: &[u64],
) -> tempfile::NamedTempFile {
    let l1_at = 0x10000u64.max(1 << cluster_bits);
    let mut header = b"QFI\xfb\0\0\0\x02".to_vec();
    header.resize(72, 0);
    header[23] = cluster_bits;
    header[24..32].copy_from_slice(&size.to_be_bytes());
    header[36..40].copy_from_slice(&(l1.len() as u32).to_be_bytes());
    header[40..48].copy_from_slice(&l1_at.to_be_bytes());
    let words = |w: &[u64]| w.iter().flat_map(|w| w.to_be_bytes()).collect::<Vec<u8>>();
    let f = tempfile::NamedTempFile::new().unwrap();
    f.as_file().write_all_at(&header, 0).unwrap();
    f.as_file().write_all_at(&words(l1), l1_at).unwrap();
    f.as_file().write_all_at(&words(l2), 0x20000).unwrap();
    f.as_file().set_len(0x40000.max(l1_at + l1.len() as u64 * 8)).unwrap();
    f
}

#[test]
fn a_hole_is_not_taken_from_a_table_that_is_being_rewritten() {
    let f = qcow2(16, 1 << 30, &[0x20000, 0x20000], &[0x30000]);
    let image = image(f.path(), Format::Qcow2, 1 << 30, None);
    image.read_at(&mut [0], 0).unwrap();
    // An in-place rebase or commit begins by writing tables.
    f.as_file().write_all_at(&[0; 16], 0x10000).unwrap();
    f.as_file().set_len(0x40200).unwrap();
    assert_eq!(image.seek_data(512 << 20).unwrap_err().kind(), Kind::Changed);
    assert_eq!(image.read_at(&mut [0], 0).unwrap_err().kind(), Kind::Changed);
}

#[test]
fn opening_layers_checks_first_level_tables_and_no_others() {
    const GIB: u64 = 1 << 30;
    let good = qcow2(16, GIB, &[0x20000, 0], &[0x30000]);
    // Beyond the file's end, in the header, with reserved bits.
    for bad in [0x50000, 0x100, 0x20200] {
        let first_level = qcow2(16, GIB, &[0, bad], &[]);
        let second_level = qcow2(16, GIB, &[0x20000, 0], &[0, bad]);
        for (below, sound) in [(first_level, false), (second_level, true)] {
            let below = image(below.path(), Format::Qcow2, GIB, None);
            let top = image(good.path(), Format::Qcow2, GIB, Some(below));
            assert_eq!(top.open_layers().is_ok(), sound, "{bad:#x}");
        }
    }
    let gone = qcow2(16, GIB, &[0, 0], &[]);
    let below = image(gone.path(), Format::Qcow2, GIB, None);
    drop(gone);
    let top = image(good.path(), Format::Qcow2, GIB, Some(below));
    assert_eq!(top.open_layers().unwrap_err().kind(), Kind::NotFound);
}

#[test]
fn a_file_cut_in_place_has_changed_whatever_the_read_says() {
    let f = tempfile::NamedTempFile::new().unwrap();
    f.as_file().write_all_at(&[7; 1 << 20], 0).unwrap();
    let image = image(f.path(), Format::Raw, 1 << 20, None);
    image.read_at(&mut [0; 4096], 900 << 10).unwrap();
    f.as_file().set_len(512 << 10).unwrap();
    assert_eq!(image.read_at(&mut [0; 4096], 900 << 10).unwrap_err().kind(), Kind::Changed);
}

#[test]
fn a_huge_disk_over_tiny_clusters_does_not_fill_the_memory() {
    // 512-byte clusters, all L1 entries one L2 table, in which every other cluster is data.
    let (spans, span) = (1u64 << 13, 1u64 << 15);
    let l2: Vec<u64> = (0..64).map(|i| (i % 2) * 0x30000).collect();
    let bottom = qcow2(9, spans * span, &vec![0x20000; spans as usize], &l2);
    let top = qcow2(21, 1 << 61, &[0; 1 << 22], &[]);
    let below = image(bottom.path(), Format::Qcow2, spans * span, None);
    below.read_at(&mut [0; 512], 0).unwrap();
    let top = image(top.path(), Format::Qcow2, 1 << 61, Some(below.clone()));
    let error = top.read_at(&mut [0], spans * span - 1).unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt, "{error}");
    assert!(top.findings()[0].message.contains("too many pieces"));
    // The same bytes are fine where windows are small.
    below.read_at(&mut [0], spans * span - 1).unwrap();
}

#[test]
fn a_read_from_more_layers_than_are_remembered_looks_at_each() {
    // 512-byte clusters; layer n has cluster n and nothing else.
    let (count, size) = (LayersRead::MOST as u64 + 8, 64 * 512);
    let l2 = |n| (0..64).map(|i| if i == n { 0x30000 } else { 0 }).collect::<Vec<u64>>();
    for rewritten in [0, 1, LayersRead::MOST - 1, LayersRead::MOST, count as usize - 1] {
        let files: Vec<_> = (0..count).map(|n| qcow2(9, size, &[0x20000], &l2(n))).collect();
        let chain = files.iter().fold(None, |below, f| {
            f.as_file().write_all_at(&[7; 512], 0x30000).unwrap();
            Some(image(f.path(), Format::Qcow2, size, below))
        });
        let chain = chain.unwrap();
        let mut bytes = vec![0; size as usize];
        chain.read_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes.iter().position(|b| *b != 7), Some(count as usize * 512));
        files[rewritten].as_file().set_len(0x50000).unwrap();
        let error = chain.read_at(&mut bytes, 0).unwrap_err();
        assert_eq!(error.kind(), Kind::Changed, "layer {rewritten}");
    }
}

#[test]
fn nothing_is_allocated_for_windows_that_nobody_reads() {
    let f = qcow2(16, 1 << 30, &[0, 0], &[]);
    let image = image(f.path(), Format::Qcow2, i64::MAX as u64, None);
    assert!(image.groups.get().is_none());
}
