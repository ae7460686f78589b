//! `verify` over time: it goes on with what is recorded already, tells what the scan knows, misses
//! no disk that is gone, and raises no alarm over a clock or over other commands at work.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::images::{Chain, Rng};
use crate::support::tools::{self, have};
use fleecefs::chain::scan::{ScanOptions, scan};
use fleecefs::manifest;
use fleecefs::manifest::manifest_path;
use fleecefs::verify::{Options, Outcome};
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
    // The increment is not even served.
    assert_eq!(code, UNSOUND, "{report:#}");
    assert!(says(&report, &inc, "is newer than it"), "{report:#}");
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
        assert!(gone.iter().all(|f| says(&report, f, "and no image")), "{report:#}");
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

/// Directories laid out as the versions of qmpbackup make them; what each holds beside its images.
fn upstreams_layouts(root: &Path) -> Vec<&'static str> {
    let beside = |vm: &Path, disk: &str| {
        std::fs::write(vm.join("uuid"), "0a8bd1a4-5d2d-4f8e-9d0c-8a1b2c3d4e5f").unwrap();
        std::fs::write(vm.join(format!("{disk}.config")), "{}").unwrap();
    };
    let moved = |c: &Chain, to: &Path, name: &dyn Fn(&str) -> String| {
        std::fs::create_dir_all(to).unwrap();
        for f in &c.files {
            let new = name(f.file_name().unwrap().to_str().unwrap());
            std::fs::rename(f, to.join(new)).unwrap();
        }
        if c.dir != to {
            std::fs::remove_dir(&c.dir).unwrap();
        }
    };
    let same = |n: &str| n.to_string();
    // By disk, two disks; several chains in one folder; a copy beside them.
    let vm = root.join("default");
    for disk in ["sda.qcow2", "sdb.qcow2"] {
        let c = chain(&vm, disk, 3);
        moved(&c, &vm.join(disk), &|n| n.replace(".qcow2.qcow2", ".qcow2"));
        let mut more = chain(&vm, "more", 2);
        more.name = disk.into();
        let later = |n: &str| n.replace("-17000", "-17100").replace("more.qcow2", disk);
        moved(&more, &vm.join(disk), &later);
        let copy = vm.join(disk).join(format!("COPY-1700099999-{disk}"));
        std::fs::copy(vm.join(disk).join(format!("FULL-1710003600-{disk}")), copy).unwrap();
        beside(&vm, disk);
    }
    // By node name; flat; by month.
    moved(&chain(root, "x", 3), &root.join("nodes/drive-virtio0"), &|n| {
        n.replace("x.qcow2", "drive-virtio0")
    });
    for disk in ["f0", "f1"] {
        moved(&chain(root, disk, 3), &root.join("flat"), &same);
        beside(&root.join("flat"), disk);
    }
    for month in ["2026-10", "2026-11"] {
        let vm = root.join("monthly").join(month);
        chain(&vm, "m0.qcow2", 3);
        beside(&vm, "m0.qcow2");
    }
    // Without a time, with the absolute link to where the directory was when it was made.
    let c = chain(root, "nt", 3);
    let to = root.join("timeless/nt.qcow2");
    let full = |n: &str| if n.starts_with("FULL") { "nt.qcow2".into() } else { n.to_string() };
    moved(&c, &to, &full);
    std::os::unix::fs::symlink("/elsewhere/nt.qcow2/nt.qcow2", to.join("FULL-nt.qcow2")).unwrap();
    // The images of one run are written in order; these were not.
    let old = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_700_000_000);
    let f = std::fs::File::options().write(true).open(to.join("nt.qcow2")).unwrap();
    f.set_modified(old).unwrap();
    // Linked by `qmprestore rebase`, with its link to the newest.
    let c = chain(root, "rebased", 3);
    for pair in c.files.windows(2) {
        let [below, above] = [&pair[0], &pair[1]].map(|f| f.to_str().unwrap());
        tools::run("qemu-img", &["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", below, above]);
    }
    std::os::unix::fs::symlink(&c.files[2], c.dir.join("image")).unwrap();
    // A disk that was shrunk between two increments.
    let mut c = Chain::new(root, "shrunk");
    for size in [SIZE, SIZE, SIZE / 2] {
        c.point("", size, &["write -P 5 64k 64k".into()]);
    }
    c.finish();
    vec!["default", "nodes", "flat", "monthly", "timeless", "rebased", "shrunk"]
}

#[test]
fn no_false_alarm_on_upstreams_directories() {
    if !have("no_false_alarm_on_upstreams_directories", &TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let layouts = upstreams_layouts(dir.path());
    let errors = |report: &Value| report.to_string().matches("\"severity\":\"error\"").count();
    for layout in layouts.into_iter().map(|l| dir.path().join(l)).chain([dir.path().into()]) {
        let (code, report) = verify(&layout, &[]);
        let fresh = layout != dir.path();
        assert_eq!(code, if fresh { UNPROVEN } else { SOUND }, "{}: {report:#}", layout.display());
        assert_eq!(errors(&report), 0, "{}: {report:#}", layout.display());
        assert!(report["points"].as_array().unwrap().len() >= 3, "{}", layout.display());
        let (code, report) = verify(&layout, &["--create"]);
        assert_eq!(code, SOUND, "{}: {report:#}", layout.display());
        let (code, report) = verify(&layout, &[]);
        assert_eq!((code, errors(&report)), (SOUND, 0), "{}: {report:#}", layout.display());
    }
    // Raw increments: nobody can tell what they hold, which is no damage.
    let raw = dir.path().join("raw/d.raw");
    std::fs::create_dir_all(&raw).unwrap();
    for name in ["FULL-1700003600-d.raw", "INC-1700007200-d.raw"] {
        std::fs::write(raw.join(name), vec![7; 1 << 20]).unwrap();
    }
    let (code, report) = verify(&raw, &["--create"]);
    assert_eq!(code, UNPROVEN, "{report:#}");
    assert_eq!(report["points"][0]["recorded"], true, "{report:#}");
}

#[test]
fn a_newest_point_that_is_gone_is_told_wherever_the_newest_is_asked_for() {
    if !have("a_newest_point_that_is_gone_is_told_wherever_the_newest_is_asked_for", &TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let [a, b] = ["sda", "sdb"].map(|n| chain(&dir.path().join("vm"), n, 3));
    assert_eq!(verify(dir.path(), &["--create"]).0, SOUND);
    let run = |args: &[&str]| {
        let out = Command::new(env!("CARGO_BIN_EXE_fleecefs")).args(args).output().unwrap();
        (out.status.code().unwrap(), String::from_utf8(out.stderr).unwrap())
    };
    let (root, to) = (dir.path().to_str().unwrap(), tempfile::tempdir().unwrap());
    let to = to.path().to_str().unwrap();
    let out = format!("{to}/out.raw");
    let newest = b.files[2].file_name().unwrap().to_str().unwrap();
    let time = newest.split('-').nth(1).unwrap();
    assert_eq!(run(&["list", "--strict", root]).0, 0);
    std::fs::remove_file(&b.files[2]).unwrap();
    let (code, said) = run(&["list", "--strict", root]);
    assert!(code == 12 && said.contains(newest), "{code}: {said}");
    let (code, said) = run(&["restore", root, "vm/sdb/latest", &out]);
    assert!(code == 0 && said.contains(newest), "{code}: {said}");
    // The other disk is restored.
    let (code, said) = run(&["restore", root, "--run", time, "--to", to]);
    let told = format!("not restored: image {newest} of this run is missing");
    assert!(code == 16 && said.matches(&told).count() == 1, "{code}: {said}");
    assert!(!said.contains("has no point of this run"), "{said}");
    assert_eq!(std::fs::read_dir(format!("{to}/vm")).unwrap().count(), 1);
    for (disk, wanted) in [("vm/sdb", 12), ("vm/sda", 0)] {
        let (code, said) = run(&["consolidate", root, disk, "--until", "latest", "-n"]);
        assert_eq!(code, wanted, "{disk}: {said}");
    }
    // Nor is one that is there and cannot be read passed over.
    let newest = &a.files[2];
    let len = newest.metadata().unwrap().len();
    std::fs::File::options().write(true).open(newest).unwrap().set_len(len - 4096).unwrap();
    let (code, said) = run(&["consolidate", root, "vm/sda", "--until", "latest", "-n"]);
    assert_eq!(code, 10, "{said}");
}
