//! Backups that other programs made: folders with Proxmox archives or virtnbdbackup streams.
//!
//! Files are taken whose *names* are of these layouts, damaged ones included: an archive that
//! cannot be read must not turn into a raw disk. Contents never decide, because a guest can write
//! whatever it likes into its disk.

use std::collections::{BTreeMap, HashSet};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use super::virtnbd;
use super::virtnbd::FoundDisks;
use crate::chain::link::group::base_name;
use crate::chain::walk::foreign_content::{ForeignContent, archive_stem, layout};
use crate::chain::walk::tree::{FileEntry, FileId, Folder, Tree};
use crate::chain::{Disk, Point};
use crate::error::Finding;
use crate::layer::{Format, LayerPart, LayerSpec, vma};
use crate::layout::Level;

/// Whether a file with this name is taken for one of these layouts.
pub fn is_foreign_name(file: &OsStr) -> bool {
    layout(file).is_some()
}

/// Finds disks of these layouts in `folder`. `claimed` files are parts of other images.
pub(in crate::chain) fn find(
    tree: &Tree,
    folder: &Folder,
    claimed: &HashSet<FileId>,
) -> FoundDisks {
    let mut found = FoundDisks::default();
    let is_free = |f: &&FileId| !claimed.contains(*f);
    let free: Vec<FileId> = folder.files.iter().filter(is_free).copied().collect();
    let of_layout = |f: &&FileId| layout(base_name(&tree.files[**f])).is_some();
    let (mut archives, mut streams) = (BTreeMap::new(), Vec::new());
    for &file in free.iter().filter(of_layout) {
        let entry = &tree.files[file];
        let name = base_name(entry).to_string_lossy();
        found.taken.push(file);
        let Some(stem) = archive_stem(&name) else {
            streams.push(entry);
            continue;
        };
        match entry.probed.inside() {
            Ok(ForeignContent::Archive(begin)) => {
                let cut = begin.cut.as_ref().map(|e| Finding::from_error(e, &entry.path));
                found.findings.extend(cut);
                add_archive(&folder.relative.join(stem), &name, entry, begin, &mut archives);
            }
            Ok(_) => {}
            Err(finding) => found.findings.push(finding.clone()),
        }
    }
    found.disks.extend(archives.into_values());
    if !streams.is_empty() {
        let beside: Vec<(FileId, String)> = free
            .iter()
            .map(|f| (*f, base_name(&tree.files[*f]).to_string_lossy().into()))
            .collect();
        virtnbd::find(tree, &folder.relative, &streams, &beside, &mut found);
    }
    found
}

/// Each archive is a folder of disks. One that is there twice, compressed and not, has disks with
/// two points.
fn add_archive(
    place: &Path,
    name: &str,
    entry: &FileEntry,
    begin: &vma::Beginning,
    disks: &mut BTreeMap<PathBuf, Disk>,
) {
    let header = &begin.header;
    let total: u128 = header.devices.iter().map(|d| u128::from(d.size)).sum();
    for device in header.devices.iter().filter(|d| !d.is_state()) {
        let path = place.join(&device.name);
        let disk = disks.entry(path.clone()).or_insert_with(|| Disk {
            path,
            points: Vec::new(),
            findings: Vec::new(),
        });
        let is_absent = begin.absent.contains(&device.id);
        let cut = begin.cut.as_ref().filter(|_| is_absent);
        // Without reading the archive, its bytes can only be shared out by size. Sizes are at
        // least 1, and a share is at most the whole.
        let share = u128::from(entry.probed.own_bytes) * u128::from(device.size) / total;
        disk.points.push(Point {
            name: name.to_owned(),
            source: entry.path.clone(),
            level: Level::Full,
            chain: name.to_owned(),
            parent: None,
            time: header.time,
            size: device.size,
            own_bytes: share as u64,
            consistency: None,
            layers: vec![LayerSpec {
                file: entry.probed.file.clone(),
                format: Format::Vma,
                part: LayerPart::Device(device.id),
                data_file: None,
            }],
            format_is_open: false,
            unavailable: cut.map(|e| Finding::from_error(e, &entry.path)),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::scan::{ScanOptions, scan};

    #[test]
    fn archives_go_by_their_names() {
        assert_eq!(archive_stem("vzdump-qemu-101-x.vma.zst"), Some("vzdump-qemu-101-x"));
        assert_eq!(archive_stem("a.vma"), Some("a"));
        for other in ["a.vma.dat", ".vma", "a.vmax", "a.zst", "a.vma.log"] {
            assert_eq!(archive_stem(other), None, "{other}");
        }
        // A backup in our own layout is one, whatever the disk is called.
        assert_eq!(layout(OsStr::new("FULL-1700000000-sda.vma")), None);
    }

    #[test]
    fn a_damaged_archive_is_a_finding_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("pve")).unwrap();
        let path = dir.path().join("pve/a.vma");
        std::fs::write(&path, [7; 20_480]).unwrap();
        let (catalog, _) = scan(dir.path(), &ScanOptions::default(), None).unwrap();
        assert!(catalog.disks.is_empty());
        assert_eq!(catalog.findings.len(), 1);
        assert!(catalog.findings[0].path.ends_with("pve/a.vma"));
    }
}
