//! Backup directories made of the smallest possible images: headers without a disk.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use fleecefs::chain::Catalog;
use fleecefs::chain::scan::{ScanOptions, scan};
use fleecefs::error::Finding;
use fleecefs::layout::Level;
use fleecefs::manifest;
use fleecefs::manifest::{Consistency, Contents, ImageFormat, Manifest};

/// A qcow2 version 2 image of 0 bytes, with a backing pointer or without.
pub fn tiny(backing: Option<&str>) -> Vec<u8> {
    let mut image = b"QFI\xfb\0\0\0\x02".to_vec();
    image.resize(72, 0);
    // cluster_bits
    image[23] = 16;
    // The L1 table needs an aligned offset, even without an entry.
    if let Some(name) = backing {
        image[8..16].copy_from_slice(&72u64.to_be_bytes());
        image[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
        image.extend(name.as_bytes());
    }
    image
}

/// A backup directory that goes away with its guard.
pub struct Backups {
    dir: tempfile::TempDir,
    root: PathBuf,
}

impl Backups {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        Backups { dir, root }
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn path(&self, relative: &str) -> PathBuf {
        self.root.join(relative)
    }

    /// Writes a file, with the folders above it; replaces one that is there.
    pub fn file(&self, relative: &str, bytes: &[u8]) {
        let path = self.path(relative);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }

    /// Writes a qcow2 image.
    pub fn image(&self, relative: &str, backing: Option<&str>) {
        self.file(relative, &tiny(backing));
    }

    pub fn link(&self, relative: &str, target: &Path) {
        let path = self.path(relative);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::os::unix::fs::symlink(target, path).unwrap();
    }

    pub fn scan(&self) -> Catalog {
        scan(&self.root, &ScanOptions::default(), None).unwrap().0
    }

    /// Each served point as `<disk>: <layer> < <layer above it>`, internal snapshots left out.
    pub fn shown(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for disk in &self.scan().disks {
            for (i, point) in disk.points.iter().enumerate() {
                assert!(point.parent.is_none_or(|p| p < i), "a point before its parent");
                assert_eq!(point.is_served(), !point.layers.is_empty());
                if !point.is_served() || point.level == Level::Snapshot {
                    continue;
                }
                let stack = disk.stack(i);
                let names: Vec<_> = stack
                    .iter()
                    .map(|l| l.file.path().file_name().unwrap().to_string_lossy())
                    .collect();
                assert_eq!(*names.last().unwrap(), point.name);
                lines.push(format!("{}: {}", disk.path.display(), names.join(" < ")));
            }
        }
        lines
    }

    /// All findings.
    pub fn findings(&self) -> Vec<Finding> {
        let catalog = self.scan();
        let of_disks = catalog.disks.iter().flat_map(|d| d.findings.clone());
        catalog.findings.iter().cloned().chain(of_disks).collect()
    }

    /// Why the point called `name` is not served.
    pub fn why(&self, name: &str) -> Finding {
        let catalog = self.scan();
        let mut points = catalog.disks.iter().flat_map(|d| &d.points);
        let point = points.find(|p| p.name == name).unwrap_or_else(|| panic!("no point {name}"));
        point.unavailable.clone().unwrap_or_else(|| panic!("{name} is served"))
    }
}

fn example(image: &str, level: Level, parent: Option<&str>) -> Manifest {
    Manifest {
        format_version: manifest::FORMAT_VERSION,
        run: "0123".into(),
        image: image.into(),
        disk: Default::default(),
        moved_from: None,
        linked_from: None,
        time_nanos: 0,
        level,
        time: 1,
        parent: parent.map(str::to_string),
        state_of: None,
        format: ImageFormat::Qcow2,
        content: if parent.is_some() { Contents::DirtyOnly } else { Contents::Full },
        virtual_size: 0,
        file_size: 0,
        bitmap: None,
        diff_bitmap: None,
        bytes_copied: 0,
        consistency: Consistency::default(),
        qemu_version: String::new(),
        duration_ms: 0,
        blake3: None,
        fingerprint: None,
        vm: Default::default(),
        backing: None,
        config_files: Vec::new(),
        skipped: Vec::new(),
        failed: Vec::new(),
        run_images: Vec::new(),
    }
}

/// Writes the manifest of a qcow2 image.
pub fn manifest(dir: &Path, image: &str, level: Level, parent: Option<&str>, file_size: u64) {
    manifest::write(dir, &Manifest { file_size, ..example(image, level, parent) }).unwrap();
}

/// Writes the manifest of a raw INC.
pub fn raw_manifest(dir: &Path, image: &str, content: Contents) {
    let virtual_size = std::fs::metadata(dir.join(image)).unwrap().len();
    let manifest = Manifest {
        content,
        virtual_size,
        format: ImageFormat::Raw,
        ..example(image, Level::Inc, None)
    };
    manifest::write(dir, &manifest).unwrap();
}

/// Runs the program.
pub fn fleecefs(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_fleecefs")).args(args).output().unwrap()
}
