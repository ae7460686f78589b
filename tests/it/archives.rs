//! The promise: what is wrong with an archive is told, with a remedy, and nothing else suffers.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use crate::support::mount::Mount;
use crate::support::tools::have;
use fleecefs::chain::scan::{ScanOptions, scan};
use fleecefs::fs::attr::Owner;
use fleecefs::fs::tree::ROOT;
use fleecefs::fs::watch::Waker;
use fleecefs::fs::{FileSystem, WaitsFor};
use fleecefs::image::Cache;
use md5::{Digest, Md5};

/// An archive with one disk of one cluster: block 0 is stored, the others are zero.
fn archive(first: u8) -> Vec<u8> {
    archive_of(&["drive-scsi0"], first)
}

/// The same of several devices, each in an extent of its own.
fn archive_of(devices: &[&str], first: u8) -> Vec<u8> {
    let put = |at: &mut [u8], bytes: &[u8]| at[..bytes.len()].copy_from_slice(bytes);
    let seal = |block: &mut [u8], at: usize| {
        let sum = Md5::digest(&*block);
        put(&mut block[at..], &sum);
    };
    let mut h = vec![0; 12800];
    put(&mut h, b"VMA\0\0\0\0\x01an archive's id.");
    put(&mut h[24..], &1_700_000_000u64.to_be_bytes());
    put(&mut h[48..], &[12288u32, 100, 12800].map(u32::to_be_bytes).concat());
    let mut extents = Vec::new();
    for (i, name) in devices.iter().enumerate() {
        let (at, blob) = (4096 + 32 * (i + 1), 1 + 40 * i);
        put(&mut h[at..], &(blob as u32).to_be_bytes());
        put(&mut h[at + 8..], &65536u64.to_be_bytes());
        put(&mut h[12288 + blob..], &(name.len() as u16 + 1).to_le_bytes());
        put(&mut h[12290 + blob..], name.as_bytes());
        let mut e = vec![0; 512];
        put(&mut e, b"VMAE\0\0\0\x01an archive's id.");
        put(&mut e[40..], &[0, 0b1, 0, i as u8 + 1, 0, 0, 0, 0]);
        seal(&mut e, 24);
        extents.extend(e);
        extents.extend(vec![first; 4096]);
    }
    seal(&mut h, 32);
    [h, extents].concat()
}

/// The only point below a folder of the mount.
fn point_below(dir: &Path) -> File {
    let mut todo = vec![dir.to_path_buf()];
    while let Some(dir) = todo.pop() {
        for entry in std::fs::read_dir(&dir).unwrap().map(|e| e.unwrap()) {
            match entry.file_type().unwrap() {
                t if t.is_dir() => todo.push(entry.path()),
                t if t.is_file() => return File::open(entry.path()).unwrap(),
                _ => {}
            }
        }
    }
    panic!("no point below {}", dir.display())
}

fn findings(mount: &Mount) -> Vec<serde_json::Value> {
    let text = std::fs::read(mount.path().join(".fleecefs/status.json")).unwrap();
    let status: serde_json::Value = serde_json::from_slice(&text).unwrap();
    status["findings"].as_array().unwrap().clone()
}

#[test]
fn a_cut_archive_is_an_error_a_finding_and_a_log_line() {
    if !have("a_cut_archive_is_an_error_a_finding_and_a_log_line", &["/dev/fuse"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let whole = archive(5);
    std::fs::write(dir.path().join("good.vma"), &whole).unwrap();
    // What is before it is the RAM's state, which is no disk.
    let longer = archive_of(&["vmstate", "drive-scsi0"], 5);
    std::fs::write(dir.path().join("cut.vma"), &longer[..longer.len() - 1]).unwrap();
    let log = dir.path().join("log");
    let mount = Mount::with(dir.path(), &["--log-file", log.to_str().unwrap()]);
    let cut = point_below(&mount.path().join("cut"));
    for _ in 0..3 {
        let e = cut.read_exact_at(&mut [0; 512], 0).unwrap_err();
        assert_eq!(e.raw_os_error(), Some(libc::EIO));
    }
    // SAFETY: lseek on an open descriptor.
    let found = unsafe { libc::lseek(std::os::fd::AsRawFd::as_raw_fd(&cut), 0, libc::SEEK_DATA) };
    assert_eq!(found, -1);
    assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::EIO));
    let of_cut = |f: &&serde_json::Value| f["path"].as_str().unwrap().ends_with("cut.vma");
    let findings = findings(&mount);
    assert_eq!(findings.iter().filter(of_cut).count(), 1, "{findings:?}");
    let text = std::fs::read_to_string(&log).unwrap();
    assert_eq!(text.matches("cut.vma").count(), 1, "said once: {text}");
    let mut bytes = [0; 512];
    point_below(&mount.path().join("good")).read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, [5; 512]);
}

/// `list` reads no more of an archive than its beginning.
#[test]
fn an_archive_that_is_cut_at_its_beginning_is_told_without_being_read() {
    let dir = tempfile::tempdir().unwrap();
    let whole = archive(5);
    std::fs::write(dir.path().join("good.vma"), &whole).unwrap();
    std::fs::write(dir.path().join("header.vma"), &whole[..12800]).unwrap();
    std::fs::write(dir.path().join("extent.vma"), &whole[..whole.len() - 1]).unwrap();
    let (catalog, _) = scan(dir.path(), &ScanOptions::default(), None).unwrap();
    let cut = |name: &str| catalog.findings.iter().filter(|f| f.path.ends_with(name)).count();
    assert_eq!((cut("good.vma"), cut("header.vma"), cut("extent.vma")), (0, 1, 1));
    let points = catalog.disks.iter().flat_map(|d| &d.points).filter(|p| p.is_served());
    assert_eq!(points.map(|p| p.name.as_str()).collect::<Vec<_>>(), ["good.vma"]);
    let list = |more: &[&str]| {
        let mut c = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
        c.arg("list").arg(dir.path()).args(more).output().unwrap()
    };
    assert_eq!(list(&["--strict"]).status.code(), Some(12));
    let said = String::from_utf8(list(&[]).stdout).unwrap();
    assert!(said.contains("unavailable") && said.contains("the archive ends inside"), "{said}");
}

#[test]
fn no_room_to_unpack_is_an_error_with_its_remedy() {
    if !have("no_room_to_unpack_is_an_error_with_its_remedy", &["/dev/fuse"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let packed = zstd::encode_all(&archive(5)[..], 1).unwrap();
    std::fs::write(dir.path().join("a.vma.zst"), packed).unwrap();
    let mount = |scratch: &Path| {
        Mount::by(|at| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
            command.env("TMPDIR", scratch).arg("mount").arg(dir.path()).arg(at).output()
        })
    };
    let bad = mount(Path::new("/nonexistent/folder"));
    let e = point_below(&bad.path().join("a")).read_exact_at(&mut [0; 512], 0).unwrap_err();
    assert_eq!(e.raw_os_error(), Some(libc::EIO), "whatever the reason, read knows one word");
    let findings = findings(&bad);
    let remedy = findings.iter().find_map(|f| f["remedy"].as_str()).unwrap_or_default();
    assert!(remedy.contains("TMPDIR"), "{findings:?}");
    drop(bad);
    let scratch = tempfile::tempdir().unwrap();
    let good = mount(scratch.path());
    let mut bytes = [0; 512];
    point_below(&good.path().join("a")).read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, [5; 512]);
}

/// Only reads that would unpack an archive go to the threads that may wait.
#[test]
fn only_what_has_to_be_unpacked_waits() {
    let dir = tempfile::tempdir().unwrap();
    let packed = zstd::encode_all(&archive(5)[..], 1).unwrap();
    std::fs::write(dir.path().join("a.vma.zst"), packed).unwrap();
    std::fs::create_dir(dir.path().join("d")).unwrap();
    std::fs::write(dir.path().join("d/FULL-1-d"), [1; 4096]).unwrap();
    let (catalog, _) = scan(dir.path(), &ScanOptions::default(), None).unwrap();
    let owner = Owner { uid: 0, gid: 0, mode: 0o400 };
    let waker = Arc::new(Waker::new().unwrap());
    let fs = FileSystem::new(catalog, Cache::new(1 << 20), owner, Arc::default(), waker, None);
    let handle = |path: &Path| {
        let ino = path.iter().fold(ROOT, |ino, name| fs.lookup(ino, name).unwrap().ino);
        fs.open(ino, libc::O_RDONLY).unwrap().0
    };
    let paths = fs.tree().paths().into_iter().map(|(p, _)| p).collect::<Vec<_>>();
    let of = |folder: &str| paths.iter().find(|p| p.starts_with(folder)).expect(folder);
    let (archive, plain) = (handle(of("a")), handle(of("d")));
    assert_eq!([512, u64::MAX].map(|len| fs.waits_for(archive, 0, len)), [WaitsFor::Long; 2]);
    assert_eq!(fs.waits_for(archive, 65536, 512), WaitsFor::Storage, "nothing is there to be read");
    assert_eq!(fs.waits_for(plain, 0, 512), WaitsFor::Storage);
    assert_eq!(fs.read(archive, 0, &mut [0; 512]), Ok(512));
    assert_eq!(fs.waits_for(archive, 0, u64::MAX), WaitsFor::Storage, "it is unpacked");
}
