//! `verify` over time: it goes on with what is recorded already, tells what the scan knows, misses
//! no disk that is gone, and raises no alarm over a clock or over other commands at work.

mod qemu;

use std::path::{Path, PathBuf};
use std::process::Command;

use fleecefs::chain::manifest::{self, manifest_path};
use fleecefs::chain::scan::{ScanOptions, scan};
use fleecefs::verify::{Options, Outcome};
use qemu::{Chain, Rng, have};
use serde_json::Value;

const TOOLS: [&str; 2] = ["qemu-img", "qemu-io"];
const SIZE: u64 = 4 << 20;
const SOUND: i32 = 0;
const UNSOUND: i32 = 18;
const UNPROVEN: i32 = 19;

/// A disk of `points` points.
fn chain(parent: &Path, name: &str, points: usize) -> Chain {
    let mut chain = Chain::new(parent, name);
    let mut rng = Rng(points as u64);
    for _ in 0..points {
        let at = rng.below(SIZE / 65536) * 65536;
        chain.point("", SIZE, &[format!("write -P {} {at} 64k", 1 + rng.below(255))]);
    }
    chain.finish()
}

fn verify(dir: &Path, args: &[&str]) -> (i32, Value) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
    let out = command.args(["-q", "verify", "--json"]).args(args).arg(dir).output().unwrap();
    let report = serde_json::from_slice(&out.stdout)
        .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&out.stderr)));
    (out.status.code().unwrap(), report)
}

/// Whether some finding is about `path` and says `what`.
fn says(report: &Value, path: &Path, what: &str) -> bool {
    let all = report["points"].as_array().unwrap().iter().map(|p| &p["findings"]);
    all.chain([&report["findings"]])
        .flat_map(|f| f.as_array().unwrap())
        .any(|f| f["path"] == path.to_str().unwrap() && f["message"].to_string().contains(what))
}

fn recorded(file: &Path) -> bool {
    manifest_path(file.parent().unwrap(), file.file_name().unwrap()).exists()
}

fn flip_data(file: &Path) {
    let mut bytes = std::fs::read(file).unwrap();
    let at = bytes.len() - 100;
    bytes[at] ^= 1;
    std::fs::write(file, bytes).unwrap();
}

#[test]
fn create_goes_on_where_it_was_left() {
    if !have("create_goes_on_where_it_was_left", &TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let c = chain(dir.path(), "sda", 5);
    // The last two come later, by a program that writes no manifests.
    let (new, aside) = (&c.files[3..], tempfile::tempdir().unwrap());
    let later = |f: &PathBuf| aside.path().join(f.file_name().unwrap());
    new.iter().for_each(|f| std::fs::rename(f, later(f)).unwrap());
    assert_eq!(verify(dir.path(), &["--create"]).0, SOUND);
    new.iter().for_each(|f| std::fs::rename(later(f), f).unwrap());
    assert_eq!(verify(dir.path(), &[]).0, UNPROVEN);
    let (code, report) = verify(dir.path(), &["--create"]);
    assert_eq!(code, SOUND, "{report:#}");
    assert!(new.iter().all(|f| recorded(f)));
    assert_eq!(verify(dir.path(), &[]).0, SOUND);
    // On a point that is known to be damaged nothing is built.
    std::fs::remove_file(manifest_path(&c.dir, new[1].file_name().unwrap())).unwrap();
    flip_data(&new[0]);
    assert_eq!(verify(dir.path(), &["--create"]).0, UNSOUND);
    assert!(!recorded(&new[1]));
}

#[test]
fn points_that_may_lack_something_are_told_and_not_recorded() {
    if !have("points_that_may_lack_something_are_told_and_not_recorded", &TOOLS) {
        return;
    }
    // An increment that failed: with qmpbackup, those after it lack its changes.
    let dir = tempfile::tempdir().unwrap();
    let c = chain(dir.path(), "sda", 4);
    let partial = c.dir.join("INC-1700007300-sda.qcow2.partial");
    std::fs::write(&partial, b"half").unwrap();
    let (code, report) = verify(dir.path(), &["--create"]);
    assert_eq!(code, UNPROVEN, "{report:#}");
    assert!(says(&report, &partial, "may lack"), "{report:#}");
    let got: Vec<bool> = c.files.iter().map(|f| recorded(f)).collect();
    assert_eq!(got, [true, true, false, false]);
    assert!(report["points"][2]["reason"].to_string().contains("partial"), "{report:#}");
    assert!(report["points"][3]["reason"].to_string().contains("partial"), "{report:#}");
    // A FULL without a time in its name that was written after its increment.
    let dir = tempfile::tempdir().unwrap();
    let c = chain(dir.path(), "sda", 2);
    let full = c.dir.join("sda");
    std::fs::rename(&c.files[0], &full).unwrap();
    let inc = c.dir.join("INC-1700007200-sda");
    std::fs::rename(&c.files[1], &inc).unwrap();
    let later = std::time::SystemTime::now();
    let touch = |f: &Path, t| std::fs::File::options().write(true).open(f).unwrap().set_modified(t);
    touch(&full, later).unwrap();
    touch(&inc, later - std::time::Duration::from_secs(60)).unwrap();
    let (code, report) = verify(dir.path(), &["--create"]);
    assert_eq!(code, UNPROVEN, "{report:#}");
    assert!(says(&report, &full, "written after"), "{report:#}");
    assert_eq!((recorded(&full), recorded(&inc)), (true, false));
}

#[test]
fn a_disk_that_is_wholly_gone_is_missed() {
    if !have("a_disk_that_is_wholly_gone_is_missed", &TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let [a, b] = ["vm/sda", "vm/sdb"].map(|n| chain(&dir.path().join("vm"), &n[3..], 2));
    // And a flat folder with two disks in it.
    let flat = dir.path().join("flat");
    std::fs::create_dir(&flat).unwrap();
    for c in [&a, &b] {
        for f in &c.files {
            std::fs::copy(f, flat.join(f.file_name().unwrap())).unwrap();
        }
    }
    assert_eq!(verify(dir.path(), &["--create"]).0, SOUND);
    for folder in [&b.dir, &flat] {
        let gone: Vec<PathBuf> =
            b.files.iter().map(|f| folder.join(f.file_name().unwrap())).collect();
        let images: Vec<Vec<u8>> = gone.iter().map(|f| std::fs::read(f).unwrap()).collect();
        gone.iter().for_each(|f| std::fs::remove_file(f).unwrap());
        let (code, report) = verify(dir.path(), &["--quick"]);
        assert_eq!(code, UNSOUND, "{report:#}");
        assert!(gone.iter().all(|f| says(&report, f, "the image is not")), "{report:#}");
        gone.iter().zip(images).for_each(|(f, bytes)| std::fs::write(f, bytes).unwrap());
    }
    assert_eq!(verify(dir.path(), &[]).0, SOUND);
    // Nothing left at all.
    let all = a.files.iter().chain(&b.files);
    all.for_each(|f| std::fs::remove_file(f).unwrap());
    std::fs::remove_dir_all(&flat).unwrap();
    let (code, report) = verify(dir.path(), &[]);
    assert_eq!((code, report["findings"].as_array().unwrap().len()), (UNSOUND, 4), "{report:#}");
}

#[test]
fn a_clock_that_was_set_back_is_no_damage() {
    if !have("a_clock_that_was_set_back_is_no_damage", &TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let c = chain(dir.path(), "sda", 3);
    assert_eq!(verify(dir.path(), &["--create"]).0, SOUND);
    // Names are forced upwards; the moment is what the clock said.
    let name = c.files[1].file_name().unwrap();
    let mut m = manifest::read(&c.dir, name).unwrap().unwrap();
    m.time -= 86400;
    manifest::write(&c.dir, &m).unwrap();
    let (code, report) = verify(dir.path(), &[]);
    assert_eq!(code, SOUND, "{report:#}");
    assert!(says(&report, &c.files[1], "clock"), "{report:#}");
}

/// What other commands do between the scan and the check.
#[test]
fn what_changes_meanwhile_is_no_damage() {
    if !have("what_changes_meanwhile_is_no_damage", &TOOLS) {
        return;
    }
    type Change = fn(&Chain);
    let changes: [(&str, Change, [Outcome; 4]); 3] = [
        ("the chain is pruned", |c| c.files.iter().for_each(|f| remove(f)), [Outcome::Unproven; 4]),
        (
            "the newest point is replaced",
            |c| {
                let new = c.dir.join("new");
                std::fs::write(&new, vec![7; 100_000]).unwrap();
                std::fs::rename(&new, &c.files[3]).unwrap();
            },
            [Outcome::Sound, Outcome::Sound, Outcome::Sound, Outcome::Unproven],
        ),
        // A fault that was there before stays one, whatever else goes on.
        (
            "a point is added above a damaged one",
            |c| std::fs::write(c.dir.join("INC-1700099999-sda.qcow2"), b"").unwrap(),
            [Outcome::Sound, Outcome::Sound, Outcome::Unsound, Outcome::Unsound],
        ),
    ];
    for (what, change, wanted) in changes {
        let dir = tempfile::tempdir().unwrap();
        let c = chain(dir.path(), "sda", 4);
        assert_eq!(verify(dir.path(), &["--create"]).0, SOUND);
        if wanted[2] == Outcome::Unsound {
            flip_data(&c.files[2]);
        }
        let (catalog, _) = scan(dir.path(), &ScanOptions::default(), None).unwrap();
        change(&c);
        let report = fleecefs::verify::verify(&catalog, &Options::default(), &()).unwrap();
        let got: Vec<Outcome> = report.points.iter().map(|p| p.outcome).collect();
        assert_eq!(got, wanted, "{what}: {:#?}", report.findings);
        let worst = *wanted.iter().max().unwrap();
        assert_eq!(report.outcome, worst, "{what}: {:#?}", report.findings);
    }
}

/// Removes an image with its manifest, as prune does.
fn remove(file: &Path) {
    std::fs::remove_file(file).unwrap();
    std::fs::remove_file(manifest_path(file.parent().unwrap(), file.file_name().unwrap())).unwrap();
}
