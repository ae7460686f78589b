//! The promise: a refresh disturbs nothing that is open and keeps nothing that is gone. The file
//! system is used as the kernel would, without a mount.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Arc, Weak};

use fleecefs::chain::Catalog;
use fleecefs::chain::scan::{ProbeCache, ScanOptions, scan};
use fleecefs::fs::FileSystem;
use fleecefs::fs::attr::Owner;
use fleecefs::fs::tree::ROOT;
use fleecefs::fs::watch::Waker;
use fleecefs::image::Cache;

/// A file system over a folder, with what a refresh needs.
struct Setup {
    dir: tempfile::TempDir,
    fs: FileSystem,
    probes: ProbeCache,
}

impl Setup {
    /// Raw files with these names and contents.
    fn new(files: &[(&OsStr, &[u8])]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("d")).unwrap();
        for (name, bytes) in files {
            std::fs::write(dir.path().join("d").join(name), bytes).unwrap();
        }
        let (catalog, probes) = look(dir.path(), None);
        let owner = Owner { uid: 0, gid: 0, mode: 0o400 };
        let waker = Arc::new(Waker::new().unwrap());
        let cache = Cache::new(1 << 20);
        let fs = FileSystem::new(catalog, cache, owner, Arc::default(), waker, None);
        Setup { dir, fs, probes }
    }

    fn refresh(&mut self) {
        let (catalog, probes) = look(self.dir.path(), Some(&self.probes));
        self.probes = probes;
        self.fs.install(catalog);
    }

    fn lookup(&self, path: &[&str]) -> u64 {
        path.iter().fold(ROOT, |ino, name| self.fs.lookup(ino, OsStr::new(name)).unwrap().ino)
    }

    fn status(&self) -> serde_json::Value {
        let ino = self.lookup(&[".fleecefs", "status.json"]);
        let (handle, _) = self.fs.open(ino, libc::O_RDONLY).unwrap();
        let mut text = vec![0; 1 << 20];
        let n = self.fs.read(handle, 0, &mut text).unwrap();
        serde_json::from_slice(&text[..n]).unwrap()
    }
}

fn look(dir: &Path, previous: Option<&ProbeCache>) -> (Catalog, ProbeCache) {
    scan(dir, &ScanOptions::default(), previous).unwrap()
}

#[test]
fn a_file_removed_after_open_and_before_the_first_read_stays_readable() {
    let mut setup = Setup::new(&[(OsStr::new("FULL-1-d"), &[7; 4096])]);
    let ino = setup.lookup(&["d", "FULL-1-d.raw"]);
    let (handle, _) = setup.fs.open(ino, libc::O_RDONLY).unwrap();
    std::fs::remove_file(setup.dir.path().join("d/FULL-1-d")).unwrap();
    setup.refresh();
    assert!(setup.fs.lookup(ROOT, OsStr::new("d")).is_err(), "it is gone");
    let mut bytes = [0; 4096];
    assert_eq!(setup.fs.read(handle, 0, &mut bytes), Ok(4096));
    assert_eq!(bytes, [7; 4096]);
    // Before the next look the name is still there, and can no longer be opened.
    assert_eq!(setup.fs.seek(handle, 0, libc::SEEK_HOLE), Ok(4096));
}

#[test]
fn a_file_rewritten_in_place_fails_the_next_read_before_any_refresh() {
    use std::os::unix::fs::FileExt;
    let setup = Setup::new(&[(OsStr::new("FULL-1-d"), &[7; 8192])]);
    let ino = setup.lookup(&["d", "FULL-1-d.raw"]);
    let (handle, _) = setup.fs.open(ino, libc::O_RDONLY).unwrap();
    let mut bytes = [0; 4096];
    assert_eq!(setup.fs.read(handle, 0, &mut bytes), Ok(4096));
    // Nobody has looked at the folder since: the read itself has to notice.
    let file = std::fs::File::options().write(true).open(setup.dir.path().join("d/FULL-1-d"));
    let file = file.unwrap();
    file.write_all_at(&[8; 4096], 4096).unwrap();
    file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    assert_eq!(setup.fs.read(handle, 4096, &mut bytes), Err(libc::EIO));
    // And what was read before, too: one handle shows one state of the disk.
    assert_eq!(setup.fs.read(handle, 0, &mut bytes), Err(libc::EIO));
}

#[test]
fn what_cannot_be_opened_says_so_at_open() {
    let setup = Setup::new(&[(OsStr::new("FULL-1-d"), &[7; 4096])]);
    let ino = setup.lookup(&["d", "FULL-1-d.raw"]);
    std::fs::remove_file(setup.dir.path().join("d/FULL-1-d")).unwrap();
    assert_eq!(setup.fs.open(ino, libc::O_RDONLY).err(), Some(libc::ENOENT));
    let findings = setup.status()["findings"].as_array().unwrap().clone();
    assert!(findings.iter().any(|f| f["kind"] == "not-found"), "{findings:?}");
}

#[test]
fn refreshes_keep_no_old_catalog_alive() {
    let mut setup = Setup::new(&[(OsStr::new("FULL-1-d"), &[7; 4096])]);
    setup.lookup(&["d", "FULL-1-d.raw"]);
    setup.lookup(&["d", "latest.raw"]);
    let mut old: Vec<Weak<Catalog>> = Vec::new();
    for night in 2..20 {
        old.push(Arc::downgrade(&setup.fs.tree().catalog));
        let name = format!("d/FULL-{night}-d");
        std::fs::write(setup.dir.path().join(name), [1; 512]).unwrap();
        setup.refresh();
        // As a backup script would look: each name is known to the kernel from then on.
        setup.lookup(&["d", &format!("FULL-{night}-d.raw")]);
    }
    assert_eq!(old.iter().filter(|c| c.strong_count() > 0).count(), 0);
    assert_eq!(setup.fs.tree().files().count(), 19);
}

#[test]
fn names_that_are_not_utf8_are_in_the_status() {
    let name = OsStr::from_bytes(b"FULL-1-d\xff");
    let setup = Setup::new(&[(name, &[7; 4096]), (OsStr::new("FULL-2-e"), &[7; 4096])]);
    let status = setup.status();
    let disks = status["disks"].as_array().unwrap_or_else(|| panic!("{status}"));
    let mut sources = HashSet::new();
    for disk in disks {
        for point in disk["chains"].as_array().unwrap().iter().flat_map(|c| c["points"].as_array())
        {
            sources.extend(point.iter().map(|p| p["file"].as_str().unwrap().to_string()));
        }
    }
    assert!(sources.contains("d/FULL-1-d\\xff") && sources.contains("d/FULL-2-e"), "{sources:?}");
}

#[test]
fn names_that_are_not_utf8_are_mapped() {
    let name = OsStr::from_bytes(b"FULL-1-d\xff");
    let setup = Setup::new(&[(name, &[7; 4096])]);
    for (output, want) in [("json", r"FULL-1-d\\xff"), ("human", r"FULL-1-d\xff")] {
        let args = [OsString::from("map"), setup.dir.path().into(), r"FULL-1-d\xff".into()];
        let out = std::process::Command::new(env!("CARGO_BIN_EXE_fleecefs"))
            .args(args)
            .args(["--output", output])
            .output()
            .unwrap();
        let text = String::from_utf8(out.stdout).unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        assert!(text.contains(want), "{text}");
    }
}
