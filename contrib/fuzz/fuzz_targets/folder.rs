//! A folder of somebody else's: journals, manifests, saved headers, images and odd names out of
//! hostile bytes. It is read, what is unfinished is finished or refused, and nothing beside it is
//! touched.
#![no_main]

use std::path::Path;

use fleecefs::chain::scan::{scan, ScanOptions};
use fleecefs::image::{open_point, Cache};
use fleecefs::job::Work;

/// What the pieces of the input are written to.
const NAMES: [&str; 14] = [
    ".fleecefs/removal.journal",
    ".fleecefs/fold.json",
    ".fleecefs/FULL-1-d.header",
    ".fleecefs/FULL-1-d.json",
    ".fleecefs/INC-2-d.json",
    ".fleecefs/consolidate-FULL-1-d",
    ".fleecefs/INC-2-d.partial.json",
    "FULL-1-d",
    "INC-2-d",
    "INC-3-d",
    "FULL-4-d",
    "d.full.data",
    "a.vma",
    "uuid",
];

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let top = tempfile::tempdir_in("/dev/shm").expect("a folder in memory");
    let top = top.path().canonicalize().expect("it is there");
    let dir = top.join("d");
    std::fs::create_dir_all(dir.join(".fleecefs")).expect("folders");
    std::fs::write(top.join("victim"), "precious").expect("a file beside it");
    // Pieces: a byte that chooses the name, two of length, the contents.
    let mut rest = bytes;
    while let [name, high, low, more @ ..] = rest {
        let len = (usize::from(*high) << 8 | usize::from(*low)).min(more.len());
        let path = dir.join(NAMES[usize::from(*name) % NAMES.len()]);
        std::fs::write(path, &more[..len]).expect("a file");
        rest = &more[len..];
    }
    look(&dir);
    let cancel = std::sync::atomic::AtomicBool::new(false);
    let work = Work { cancel: &cancel, progress: &(), workers: 1, rate: None };
    let _ = fleecefs::rewrite::remove::recover(&dir, &work);
    look(&dir);
    assert_eq!(std::fs::read(top.join("victim")).expect("it is still there"), b"precious");
    assert_eq!(std::fs::read_dir(&top).expect("a folder").count(), 2);
});

fn look(dir: &Path) {
    let Ok((catalog, _)) = scan(dir, &ScanOptions::default(), None) else { return };
    for disk in &catalog.disks {
        for i in 0..disk.points.len().min(4) {
            let Ok(image) = open_point(disk, i, &Cache::new(1 << 20)) else { continue };
            let mut buf = vec![0; image.size().min(65536) as usize];
            let _ = image.read_at(&mut buf, 0);
        }
    }
    let _ = fleecefs::prune::items(&catalog);
    let options = fleecefs::verify::Options { quick: true, ..Default::default() };
    let _ = fleecefs::verify::verify(&catalog, &options, &());
}
