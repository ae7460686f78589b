//! A disk that got another name, and what `link-disk` has to make of it.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::support::images;
use crate::support::tools::run;
use crate::support::verbs::{
    MIB, add_manifests, assert_same, chain, files, fleecefs, manifests_fit, name, ok, s,
};
use fleecefs::chain::scan::{ScanOptions, scan};
use fleecefs::image::{Cache, open_point};
use fleecefs::manifest;
use serde_json::Value;

/// A backup directory in which the disk `old` became `new`, and the bytes of each point by its time.
pub struct Renamed {
    pub dir: tempfile::TempDir,
    pub truth: Vec<(i64, Vec<u8>)>,
    pub old: &'static str,
    pub new: &'static str,
}

pub fn stamp(file: &Path) -> i64 {
    name(file).split('-').nth(1).unwrap().parse().unwrap()
}

impl Renamed {
    /// Each disk in a folder of its own.
    pub fn folders() -> Self {
        Self::called("old", "new")
    }

    pub fn called(from: &'static str, to: &'static str) -> Self {
        let dir = images::tempdir();
        let (old, first) = chain(dir.path(), from, &[4 * MIB]);
        let (new, second) = chain(dir.path(), to, &[4 * MIB]);
        let (old, mut new) = (old.finish(), new.finish());
        for file in &mut new.files {
            let later = name(file).replace("17000", "17010");
            let to = file.with_file_name(later);
            std::fs::rename(&*file, &to).unwrap();
            *file = to;
        }
        add_manifests(&old, &[4 * MIB]);
        add_manifests(&new, &[4 * MIB]);
        for file in &new.files {
            let m = manifest::read(&new.dir, name(file).as_ref()).unwrap().unwrap();
            let run = format!("{}-new", m.run);
            manifest::write(&new.dir, &manifest::Manifest { run, ..m }).unwrap();
        }
        let all = old.files.iter().chain(&new.files).map(|f| stamp(f));
        let truth = all.zip(first.into_iter().chain(second)).collect();
        Renamed { dir, truth, old: from, new: to }
    }

    /// All in one folder.
    pub fn flat() -> Self {
        let r = Self::folders();
        for disk in [r.old, r.new] {
            let from = r.dir.path().join(disk);
            let side = r.dir.path().join(".fleecefs");
            std::fs::create_dir_all(&side).unwrap();
            for file in files(&from) {
                std::fs::rename(from.join(&file), r.dir.path().join(&file)).unwrap();
                let m = format!("{file}.json");
                std::fs::rename(from.join(".fleecefs").join(&m), side.join(&m)).unwrap();
            }
            std::fs::remove_dir(from.join(".fleecefs")).unwrap();
            std::fs::remove_dir(from).unwrap();
        }
        Renamed { old: "old.qcow2", new: "new.qcow2", ..r }
    }

    pub fn is_flat(&self) -> bool {
        self.old.ends_with(".qcow2")
    }

    pub fn copy(&self) -> tempfile::TempDir {
        let copy = images::tempdir();
        run("cp", &["-a", &format!("{}/.", self.dir.path().display()), s(copy.path())]);
        copy
    }

    pub fn link(&self, dir: &Path, more: &[&str]) -> Output {
        fleecefs(&[&["link-disk", s(dir), self.old, self.new], more].concat())
    }

    pub fn must(&self, dir: &Path, more: &[&str]) -> String {
        let out = self.link(dir, more);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    }

    /// Where the images of the joined disk are.
    pub fn joined(&self, dir: &Path) -> PathBuf {
        if self.is_flat() { dir.to_path_buf() } else { dir.join(self.new) }
    }

    /// Each point is there, at least once, and each time that it is served it is right.
    pub fn check(&self, dir: &Path, what: &str) {
        let (catalog, _) = scan(dir, &ScanOptions::default(), None).unwrap();
        for (time, truth) in &self.truth {
            let mut found = 0;
            for disk in &catalog.disks {
                for (i, p) in disk.points.iter().enumerate().filter(|(_, p)| p.time == *time) {
                    let image = open_point(disk, i, &Cache::new(16 << 20))
                        .unwrap_or_else(|e| panic!("{what}: {}: {}", p.name, e.report()));
                    let mut bytes = vec![0; truth.len()];
                    image.read_at(&mut bytes, 0).unwrap();
                    assert_same(&format!("{what}: {}", p.name), &bytes, truth);
                    found += 1;
                }
            }
            assert!(found > 0, "{what}: the point of {time} is nowhere");
        }
    }

    /// One disk.
    pub fn check_one(&self, dir: &Path, what: &str) {
        let (catalog, _) = scan(dir, &ScanOptions::default(), None).unwrap();
        assert_eq!(catalog.disks.len(), 1, "{what}");
        assert!(!dir.join(self.old).exists(), "{what}");
    }

    /// One disk, with all points, and nothing left of the other.
    pub fn check_end(&self, dir: &Path, what: &str) {
        self.check(dir, what);
        let list: Value =
            serde_json::from_slice(&ok(&["list", s(dir), "--json"]).stdout).expect("JSON");
        let disks = list["disks"].as_array().unwrap();
        assert_eq!(disks.len(), 1, "{what}: {list:#}");
        let points = disks[0]["points"].as_array().unwrap();
        assert_eq!(points.len(), 8, "{what}: {list:#}");
        let folder = self.joined(dir);
        manifests_fit(&folder);
        for file in files(&folder) {
            let tail = format!("-{}.qcow2", self.new.trim_end_matches(".qcow2"));
            assert!(file.ends_with(&tail), "{what}: {file}");
            assert_eq!(std::fs::metadata(folder.join(&file)).unwrap().nlink(), 1, "{what}: {file}");
        }
        assert!(!dir.join(self.old).exists(), "{what}");
        let verified = fleecefs(&["verify", s(dir)]);
        assert_eq!(
            verified.status.code(),
            Some(0),
            "{what}: {}",
            String::from_utf8_lossy(&verified.stdout)
        );
    }
}

/// Killed at this step.
pub fn killed(r: &Renamed, dir: &Path, step: &str) {
    let mut c = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
    c.args(["-q", "link-disk", s(dir), r.old, r.new]).env("FLEECEFS_CRASH_AT", step);
    assert_eq!(c.status().unwrap().code(), None);
}
