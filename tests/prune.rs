//! Retention: what is kept stays right, whatever breaks a run off.

mod qemu;

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use fleecefs::chain::manifest;
use fleecefs::chain::removal::{self, Publish, Removal};
use fleecefs::chain::scan::{ScanOptions, scan};
use fleecefs::image::{Cache, open_point};
use fleecefs::lock::Locks;
use qemu::{Chain, Oracle, Rng, run};

const TOOLS: [&str; 3] = ["qemu-img", "qemu-io", "cp"];
const SIZE: u64 = 8 << 20;
const CLUSTER: u64 = 65536;

/// A backup directory and the right bytes of each point, oldest first.
struct Backups {
    dir: tempfile::TempDir,
    files: Vec<PathBuf>,
    truth: Vec<Vec<u8>>,
}

impl Backups {
    /// One disk, `chains` times a FULL and `incs` INCs, an hour apart.
    fn new(chains: usize, incs: usize, options: &str, compressed: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (mut files, mut truth) = (Vec::new(), Vec::new());
        let mut rng = Rng(77);
        for c in 0..chains {
            let aside = tempfile::tempdir().unwrap();
            let mut chain = Chain::new(aside.path(), "sda");
            for point in 0..=incs as u64 {
                let ops = ops(&mut rng, c as u64 * 40 + point, compressed);
                chain.point(options, SIZE, &ops);
            }
            let chain = chain.finish();
            let oracle = Oracle::new(&chain.files);
            for (i, file) in chain.files.iter().enumerate() {
                let time = 1_700_000_000 + (c * 100 + i) as u64 * 3600;
                let level = if i == 0 { "FULL" } else { "INC" };
                let to = dir.path().join("sda").join(format!("{level}-{time}-sda.qcow2"));
                std::fs::create_dir_all(to.parent().unwrap()).unwrap();
                std::fs::copy(file, &to).unwrap();
                files.push(to);
                truth.push(oracle.bytes(i));
            }
        }
        Backups { dir, files, truth }
    }

    fn copy(&self) -> Copy {
        let dir = tempfile::tempdir().unwrap();
        copy_to(self.dir.path(), dir.path());
        Copy { root: dir.path().to_path_buf(), _dir: dir }
    }

    fn name(&self, i: usize) -> String {
        self.files[i].file_name().unwrap().to_str().unwrap().to_string()
    }

    /// Asserts that these points are there, by their times, and right.
    fn check(&self, root: &Path, points: impl IntoIterator<Item = usize>, what: &str) {
        let (catalog, _) = scan(root, &ScanOptions::default(), None).unwrap();
        for i in points {
            let name = self.name(i);
            let full = name.replace("INC-", "FULL-");
            let disk = &catalog.disks[0];
            let wanted = |p: &&fleecefs::chain::Point| p.name == name || p.name == full;
            let found: Vec<_> = disk.points.iter().filter(wanted).collect();
            assert!(!found.is_empty(), "{what}: {name} is lost");
            for p in found {
                let index = disk.points.iter().position(|q| q.name == p.name).unwrap();
                let image = open_point(disk, index, &Cache::new(16 << 20))
                    .unwrap_or_else(|e| panic!("{what}: {}: {}", p.name, e.report()));
                let mut bytes = vec![0; SIZE as usize];
                image.read_at(&mut bytes, 0).unwrap();
                assert!(bytes == self.truth[i], "{what}: {} is wrong", p.name);
            }
        }
    }
}

struct Copy {
    root: PathBuf,
    _dir: tempfile::TempDir,
}

fn copy_to(from: &Path, to: &Path) {
    let from = format!("{}/.", from.display());
    run("cp", &["-a", "--sparse=always", &from, to.to_str().unwrap()]);
}

fn ops(rng: &mut Rng, seed: u64, compressed: bool) -> Vec<String> {
    let c = if compressed { "-c " } else { "" };
    let mut ops: Vec<String> = (0..30)
        .map(|i| {
            let at = (i * 4 + rng.below(4)) * CLUSTER;
            format!("write {c}-P {} {at} {CLUSTER}", 1 + (seed * 31 + i) % 255)
        })
        .collect();
    ops.push(format!("write -z {} {CLUSTER}", (rng.below(2) + 126) * CLUSTER));
    ops
}

fn fleecefs(args: &[&str], dir: &Path) -> Output {
    let (verb, rest) = args.split_first().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
    command.args(["-q", verb]).arg(dir).args(rest).output().unwrap()
}

fn code(out: &Output) -> i32 {
    out.status.code().unwrap_or(-1)
}

fn succeed(args: &[&str], dir: &Path) -> String {
    let out = fleecefs(args, dir);
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

fn names(root: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(root.join("sda")).unwrap();
    let mut names: Vec<String> =
        entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.retain(|n| n != ".fleecefs");
    names.sort_by_key(|n| n.split_once('-').map(|(_, rest)| rest.to_string()));
    names
}

#[test]
fn a_real_run_executes_the_plan_that_a_dry_run_prints() {
    if !qemu::have("a_real_run_executes_the_plan_that_a_dry_run_prints", &TOOLS) {
        return;
    }
    let b = Backups::new(3, 3, "", false);
    succeed(&["verify", "--create"], b.dir.path());
    let before = names(b.dir.path());
    let planned = succeed(&["prune", "--keep-last", "2", "-n"], b.dir.path());
    assert_eq!(names(b.dir.path()), before);
    let done = succeed(&["prune", "--keep-last", "2"], b.dir.path());
    assert_eq!(planned, done + "dry run: nothing was changed\n");
    assert_eq!(names(b.dir.path()), before[8..]);
    b.check(b.dir.path(), 8..12, "after prune");
    succeed(&["verify"], b.dir.path());
    // Nothing more to do, and no manifest is left over.
    succeed(&["prune", "--keep-last", "2"], b.dir.path());
    let left = std::fs::read_dir(b.dir.path().join("sda/.fleecefs")).unwrap().count();
    assert_eq!(left, 4);
}

#[test]
fn nothing_goes_without_a_good_newest_point() {
    if !qemu::have("nothing_goes_without_a_good_newest_point", &TOOLS) {
        return;
    }
    let b = Backups::new(2, 2, "", false);
    let before = names(b.dir.path());
    // No manifest: nobody knows.
    succeed(&["prune", "--keep-last", "1"], b.dir.path());
    assert_eq!(names(b.dir.path()), before);
    succeed(&["verify", "--create"], b.dir.path());
    // The newest is damaged.
    let good = std::fs::read(&b.files[5]).unwrap();
    std::fs::write(&b.files[5], &good[..good.len() / 2]).unwrap();
    succeed(&["prune", "--keep-last", "1"], b.dir.path());
    assert_eq!(names(b.dir.path()), before);
    std::fs::write(&b.files[5], &good).unwrap();
    // Somebody else is writing.
    let root = b.dir.path().canonicalize().unwrap();
    let lock = Locks::take(&root).unwrap();
    assert_eq!(code(&fleecefs(&["prune", "--keep-last", "1"], &root)), 6);
    drop(lock);
    assert_eq!(code(&fleecefs(&["prune"], &root)), 2);
    succeed(&["prune", "--keep-last", "1"], &root);
    assert_eq!(names(&root), before[3..]);
}

#[test]
fn a_consolidated_chain_is_right_and_goes_on() {
    if !qemu::have("a_consolidated_chain_is_right_and_goes_on", &TOOLS) {
        return;
    }
    let variants = [
        ("", false),
        ("cluster_size=4k", false),
        ("", true),
        ("compression_type=zstd", true),
        ("extended_l2=on", false),
        ("cluster_size=2M", false),
    ];
    for (options, compressed) in variants {
        // Without manifests the links are another matter, the image's format is not.
        for manifests in if options.is_empty() { &[true, false][..] } else { &[true] } {
            let (manifests, compressed) = (*manifests, compressed);
            let compressed = compressed && options != "cluster_size=2M";
            let b = Backups::new(1, 5, options, compressed);
            if manifests {
                succeed(&["verify", "--create"], b.dir.path());
            }
            // A reader that was open before goes on reading right.
            let (catalog, _) = scan(b.dir.path(), &ScanOptions::default(), None).unwrap();
            let open = open_point(&catalog.disks[0], 1, &Cache::new(16 << 20)).unwrap();
            open.read_at(&mut [0; 512], 0).unwrap();
            let mtime = std::fs::metadata(&b.files[3]).unwrap().mtime();
            succeed(&["consolidate", "sda", "--until", &b.name(3)], b.dir.path());
            let mut bytes = vec![0; SIZE as usize];
            open.read_at(&mut bytes, 0).unwrap();
            assert!(bytes == b.truth[1]);
            let full = b.name(3).replace("INC-", "FULL-");
            assert_eq!(names(b.dir.path()), [full.clone(), b.name(4), b.name(5)]);
            b.check(b.dir.path(), 3..6, options);
            let path = b.dir.path().join("sda").join(&full);
            assert_eq!(std::fs::metadata(&path).unwrap().mtime(), mtime);
            run("qemu-img", &["check", "-q", path.to_str().unwrap()]);
            let out = fleecefs(&["verify"], b.dir.path());
            assert_eq!(code(&out), if manifests { 0 } else { 19 }, "{out:?}");
            assert!(
                succeed(&["consolidate", "sda", "--until", &b.name(3)], b.dir.path())
                    .contains("already")
            );
            // Down to one file.
            succeed(&["consolidate", "sda", "--until", "latest"], b.dir.path());
            assert_eq!(names(b.dir.path()), [b.name(5).replace("INC-", "FULL-")]);
            b.check(b.dir.path(), [5], options);
            assert!(!b.dir.path().join("sda/.fleecefs/removal.journal").exists());
        }
    }
}

#[test]
fn a_diff_lies_on_the_new_full() {
    if !qemu::have("a_diff_lies_on_the_new_full", &TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut rng = Rng(5);
    let written: Vec<Vec<String>> = (0..4).map(|i| ops(&mut rng, i, false)).collect();
    let mut chain = Chain::new(dir.path(), "sda");
    for ops in &written[..3] {
        chain.point("", SIZE, ops);
    }
    // All changes since the FULL, as its dirty bitmap names them.
    let diff = chain.dir.join("DIFF-1700012000-sda.qcow2");
    let (full, to) = (chain.files[0].to_str().unwrap(), diff.to_str().unwrap());
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", full, "-F", "qcow2", to]);
    qemu::qemu_io(&diff, &written[1..].concat());
    let raw = dir.path().join("truth");
    run("qemu-img", &["convert", "-O", "raw", to, raw.to_str().unwrap()]);
    let truth = std::fs::read(&raw).unwrap();
    std::fs::remove_file(&raw).unwrap();
    run("qemu-img", &["rebase", "-q", "-u", "-b", "", to]);
    let chain = chain.finish();
    let until = chain.files[2].file_name().unwrap().to_str().unwrap();
    succeed(&["consolidate", "sda", "--until", until], dir.path());
    let name = diff.file_name().unwrap().to_str().unwrap().to_string();
    assert_eq!(names(dir.path()), [until.replace("INC-", "FULL-"), name.clone()]);
    let (catalog, _) = scan(dir.path(), &ScanOptions::default(), None).unwrap();
    let (disk, i) = catalog.find(Path::new(&name)).unwrap();
    let mut bytes = vec![0; SIZE as usize];
    open_point(disk, i, &Cache::new(16 << 20)).unwrap().read_at(&mut bytes, 0).unwrap();
    assert!(bytes == truth);
}

#[test]
fn a_backup_made_before_recovery_keeps_what_it_lies_on() {
    if !qemu::have("a_backup_made_before_recovery_keeps_what_it_lies_on", &TOOLS) {
        return;
    }
    let b = Backups::new(1, 4, "", false);
    succeed(&["verify", "--create"], b.dir.path());
    // A journal of consolidation, as a crash before its first step leaves it.
    let (done, broken) = (b.copy(), b.copy());
    succeed(&["consolidate", "sda", "--until", &b.name(3)], &done.root);
    let full = b.name(3).replace("INC-", "FULL-");
    let (from, to) = (done.root.join("sda"), broken.root.join("sda"));
    std::fs::copy(from.join(&full), to.join(".fleecefs/consolidate-x")).unwrap();
    let manifest = manifest::read(&from, full.as_ref()).unwrap().unwrap();
    let publish = Some(Publish { temporary: "consolidate-x".into(), manifest });
    let remove: Vec<String> = (0..4).rev().map(|i| b.name(i)).collect();
    removal::write(&to, &Removal { publish, remove, relink: Vec::new() }).unwrap();
    b.check(&broken.root, 0..5, "before recovery");
    succeed(&["verify"], &broken.root);
    succeed(&["prune", "--keep-last", "9"], &broken.root);
    assert_eq!(names(&broken.root), [full, b.name(4)]);
    b.check(&broken.root, 3..5, "after recovery");
    succeed(&["verify"], &broken.root);
    // A journal of deletion whose points have got a child since.
    let broken = b.copy();
    let to = broken.root.join("sda");
    let remove = vec![b.name(2), b.name(1), b.name(0)];
    removal::write(&to, &Removal { remove, ..Removal::default() }).unwrap();
    succeed(&["prune", "--keep-last", "9"], &broken.root);
    assert_eq!(names(&broken.root).len(), 5);
    b.check(&broken.root, 0..5, "after recovery");
}

#[test]
fn prune_consolidates_what_is_only_needed() {
    if !qemu::have("prune_consolidates_what_is_only_needed", &TOOLS) {
        return;
    }
    let b = Backups::new(2, 5, "", false);
    succeed(&["verify", "--create"], b.dir.path());
    succeed(&["prune", "--keep-last", "3", "--consolidate"], b.dir.path());
    let full = b.name(9).replace("INC-", "FULL-");
    assert_eq!(names(b.dir.path()), [full, b.name(10), b.name(11)]);
    b.check(b.dir.path(), 9..12, "after prune --consolidate");
    succeed(&["verify"], b.dir.path());
}

#[test]
fn later_points_follow_a_chain_with_backing_pointers() {
    if !qemu::have("later_points_follow_a_chain_with_backing_pointers", &TOOLS) {
        return;
    }
    let b = Backups::new(1, 5, "", false);
    let plain = b.copy();
    succeed(&["verify", "--create"], b.dir.path());
    for (how, recorded) in [("ours", true), ("ours", false), ("qemu", true), ("qemu", false)] {
        let copy = if recorded { b.copy() } else { copy_of(&plain) };
        let (root, dir) = (&copy.root, copy.root.join("sda"));
        if how == "ours" {
            succeed(&["rebase"], &dir);
        } else {
            // Absolute, as qmprestore and people write them.
            for i in 1..6 {
                let (base, image) = (dir.join(b.name(i - 1)), dir.join(b.name(i)));
                let (base, image) = (base.to_str().unwrap(), image.to_str().unwrap());
                run("qemu-img", &["rebase", "-u", "-F", "qcow2", "-b", base, image]);
            }
            std::fs::remove_dir_all(dir.join(".fleecefs")).ok();
            if recorded {
                succeed(&["verify", "--create"], root);
            }
        }
        succeed(&["consolidate", "sda", "--until", &b.name(3)], root);
        let full = b.name(3).replace("INC-", "FULL-");
        let what = format!("{how}, {recorded}");
        b.check(root, 3..6, &what);
        let out = fleecefs(&["verify"], root);
        assert_eq!(code(&out), if recorded { 0 } else { 19 }, "{what}: {out:?}");
        // QEMU opens the newest directly, over the new FULL.
        let (newest, raw) = (dir.join(b.name(5)), dir.join(".fleecefs/raw"));
        run("qemu-img", &["convert", "-O", "raw", newest.to_str().unwrap(), raw.to_str().unwrap()]);
        assert!(std::fs::read(&raw).unwrap() == b.truth[5], "{what}");
        let info =
            run("qemu-img", &["info", "--output=json", dir.join(b.name(4)).to_str().unwrap()]);
        assert!(String::from_utf8_lossy(&info.stdout).contains(&full), "{what}");
        // The link leads to what took the newest point's place.
        succeed(&["consolidate", "sda", "--until", "latest"], root);
        b.check(root, [5], &what);
        if how == "ours" {
            let link = std::fs::read_link(dir.join("image")).unwrap();
            assert_eq!(link.to_str().unwrap(), b.name(5).replace("INC-", "FULL-"));
        }
    }
}

fn copy_of(copy: &Copy) -> Copy {
    let dir = tempfile::tempdir().unwrap();
    copy_to(&copy.root, dir.path());
    Copy { root: dir.path().to_path_buf(), _dir: dir }
}

#[test]
fn recovery_keeps_a_manifest_that_is_newer() {
    if !qemu::have("recovery_keeps_a_manifest_that_is_newer", &TOOLS) {
        return;
    }
    let b = Backups::new(1, 2, "", false);
    let (root, dir) = (b.dir.path(), b.dir.path().join("sda"));
    succeed(&["verify", "--create"], root);
    succeed(&["consolidate", "sda", "--until", "latest"], root);
    let full = b.name(2).replace("INC-", "FULL-");
    let first = manifest::read(&dir, full.as_ref()).unwrap().unwrap();
    succeed(&["snapshot-rebase"], &dir);
    let second = manifest::read(&dir, full.as_ref()).unwrap().unwrap();
    assert_ne!(first.file_size, second.file_size);
    let journal = |manifest| {
        let publish = Some(Publish { temporary: "consolidate-x".into(), manifest });
        let remove = vec![b.name(2), b.name(1), b.name(0)];
        removal::write(&dir, &Removal { publish, remove, relink: Vec::new() }).unwrap();
    };
    journal(first.clone());
    succeed(&["prune", "--keep-last", "9"], root);
    assert_eq!(manifest::read(&dir, full.as_ref()).unwrap(), Some(second));
    succeed(&["verify"], root);
    // What nobody knows takes no place: nothing goes.
    std::fs::write(dir.join(b.name(1)), b"old").unwrap();
    manifest::remove(&dir, full.as_ref()).unwrap();
    journal(first);
    assert_eq!(code(&fleecefs(&["prune", "--keep-last", "9"], root)), 10);
    assert!(dir.join(b.name(1)).exists());
}

#[test]
fn what_concerns_one_disk_holds_all_of_its_vm() {
    if !qemu::have("what_concerns_one_disk_holds_all_of_its_vm", &TOOLS) {
        return;
    }
    let b = Backups::new(2, 2, "", false);
    let (root, dir) = (b.dir.path(), b.dir.path().join("sda"));
    let second = root.join("sdb");
    std::fs::create_dir(&second).unwrap();
    for file in &b.files {
        let name = file.file_name().unwrap().to_str().unwrap().replace("sda", "sdb");
        std::fs::copy(file, second.join(name)).unwrap();
    }
    succeed(&["verify", "--create"], root);
    let count = |dir: &Path| files_in(dir).len();
    let held = |why: &str| {
        let said = succeed(&["prune", "--keep-last", "1"], root);
        assert!(said.contains(why), "{said}");
        assert_eq!(count(&second), 6, "{why}");
        said
    };
    let newest = dir.join(b.name(5));
    let good = std::fs::read(&newest).unwrap();
    std::fs::write(&newest, &good[..good.len() / 2]).unwrap();
    held("is lost: it has");
    // Its manifest says that there was one.
    std::fs::remove_file(&newest).unwrap();
    held("the image is not");
    std::fs::write(&newest, &good).unwrap();
    // A backup that did not finish.
    let partial = dir.join("INC-1800000000-sda.qcow2.partial");
    std::fs::write(&partial, b"half").unwrap();
    held("did not finish");
    std::fs::remove_file(&partial).unwrap();
    succeed(&["prune", "--keep-last", "1"], root);
    assert_eq!((count(&dir), count(&second)), (3, 3));
}

fn files_in(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap());
    entries.filter(|e| e.file_type().unwrap().is_file()).map(|e| e.path()).collect()
}

#[test]
fn many_points_go_with_few_descriptors() {
    if !qemu::have("many_points_go_with_few_descriptors", &TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("sda");
    std::fs::create_dir(&disk).unwrap();
    let name = |i: u64| disk.join(format!("FULL-{}-sda.qcow2", 1_700_000_000 + i * 60));
    run("qemu-img", &["create", "-q", "-f", "qcow2", name(0).to_str().unwrap(), "1M"]);
    for i in 1..120 {
        std::fs::copy(name(0), name(i)).unwrap();
    }
    // The link of a FULL without a time leads to one that goes.
    std::os::unix::fs::symlink(name(3), disk.join("FULL-sda.qcow2")).unwrap();
    succeed(&["verify", "--create", "--jobs", "1"], dir.path());
    let command = "ulimit -n 48; exec \"$0\" prune \"$1\" --keep-last 1";
    let out = Command::new("sh")
        .args(["-c", command, env!("CARGO_BIN_EXE_fleecefs"), dir.path().to_str().unwrap()])
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    assert_eq!(names(dir.path()), ["FULL-1700007140-sda.qcow2"]);
}

#[test]
fn a_plan_with_consolidation_is_one_document_and_says_what_happens() {
    let test = "a_plan_with_consolidation_is_one_document_and_says_what_happens";
    if !qemu::have(test, &TOOLS) {
        return;
    }
    let b = Backups::new(1, 4, "", false);
    let root = b.dir.path();
    // A disk may itself be called *.raw.
    let rename = |name: String| name.replace("sda.qcow2", "x.raw");
    for file in &b.files {
        let name = rename(file.file_name().unwrap().to_str().unwrap().into());
        std::fs::rename(file, file.with_file_name(name)).unwrap();
    }
    succeed(&["verify", "--create"], root);
    let args = ["prune", "--keep-last", "2", "--consolidate", "--json"];
    let plan: serde_json::Value = serde_json::from_str(&succeed(&args, root)).unwrap();
    let disk = &plan["disks"][0];
    let until = rename(b.name(3));
    assert_eq!(disk["consolidate"], serde_json::json!([until]));
    for i in 0..3 {
        assert_eq!(disk["points"][i]["keep"], serde_json::json!([{"merged-into": until}]), "{i}");
    }
    assert_eq!(names(root), [until.replace("INC-", "FULL-"), rename(b.name(4))]);
    succeed(&["consolidate", "sda", "--until", &rename(b.name(4))], root);
    assert_eq!(names(root), [rename(b.name(4)).replace("INC-", "FULL-")]);
}

#[test]
fn what_another_disk_needs_stays() {
    if !qemu::have("what_another_disk_needs_stays", &TOOLS) {
        return;
    }
    let b = Backups::new(1, 2, "", false);
    let other = b.dir.path().join("sda/other.qcow2");
    let (base, other) = (b.name(1), other.to_str().unwrap());
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", &base, other, "8M"]);
    let before = names(b.dir.path());
    let out = fleecefs(&["consolidate", "sda", "--until", &b.name(2)], b.dir.path());
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(code(&out) == 2 && said.contains("other.qcow2"), "{out:?}");
    assert_eq!(names(b.dir.path()), before);
    // Nor does a plan promise what would be refused. (An image beside a chain gets no manifest.)
    assert_eq!(code(&fleecefs(&["verify", "--create"], b.dir.path())), 19);
    let args = ["prune", "--keep-last", "1", "--consolidate", "--json"];
    let plan: serde_json::Value = serde_json::from_str(&succeed(&args, b.dir.path())).unwrap();
    let disks = plan["disks"].as_array().unwrap();
    let disk = disks.iter().find(|d| !d["not_consolidated"].as_array().unwrap().is_empty());
    let refused =
        &disk.unwrap_or_else(|| panic!("nothing is refused: {plan:#}"))["not_consolidated"][0];
    assert_eq!(refused["until"], b.name(2));
    assert!(refused["why"].as_str().unwrap().contains("other.qcow2"), "{refused}");
    assert_eq!(names(b.dir.path()), before);
}

/// A run that is killed after `delay`; whether it was still at work.
fn killed(args: &[&str], dir: &Path, delay: Duration) -> bool {
    let (verb, rest) = args.split_first().unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_fleecefs"))
        .args(["-q", verb])
        .arg(dir)
        .args(rest)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    std::thread::sleep(delay);
    let at_work = child.try_wait().unwrap().is_none();
    // It may have ended by itself.
    let _ = child.kill();
    child.wait().unwrap();
    qemu::wait_until_closed(dir);
    at_work
}

/// How often a run is killed or meets a full file system; more on demand.
fn rounds() -> usize {
    std::env::var("FLEECEFS_KILLS").map_or(16, |n| n.parse().unwrap())
}

/// Kills `args` at random moments spread over its duration. After each, the points in `stay` must be
/// there and right, `verify` must not find damage, and a second run must finish the work.
fn kill_at_random(b: &Backups, args: &[&str], stay: &[usize], seed: u64) {
    let probe = b.copy();
    let started = Instant::now();
    succeed(args, &probe.root);
    let took = started.elapsed();
    let end = names(&probe.root);
    let mut rng = Rng(seed);
    let mut cut_short = 0;
    for round in 0..rounds() {
        let copy = b.copy();
        let delay = took.mul_f64(rng.below(1000) as f64 / 1000.0);
        cut_short += usize::from(killed(args, &copy.root, delay));
        let what = format!("{args:?} killed after {delay:?} of {took:?}, round {round}");
        b.check(&copy.root, stay.iter().copied(), &what);
        let out = fleecefs(&["verify"], &copy.root);
        // 19: the new FULL has its name and not yet its manifest.
        assert!([0, 19].contains(&code(&out)), "{what}: {}", String::from_utf8_lossy(&out.stdout));
        succeed(args, &copy.root);
        assert_eq!(names(&copy.root), end, "{what}");
        b.check(&copy.root, stay.iter().copied(), &what);
        succeed(&["verify"], &copy.root);
    }
    println!("{cut_short} of {} runs were killed in time", rounds());
    assert!(cut_short > 0, "no run was killed in time");
}

#[test]
fn prune_survives_kill() {
    if !qemu::have("prune_survives_kill", &TOOLS) {
        return;
    }
    let b = Backups::new(4, 6, "", false);
    succeed(&["verify", "--create"], b.dir.path());
    let stay: Vec<usize> = (21..28).collect();
    kill_at_random(&b, &["prune", "--keep-last", "2"], &stay, 1);
}

#[test]
fn consolidate_survives_kill() {
    if !qemu::have("consolidate_survives_kill", &TOOLS) {
        return;
    }
    let b = Backups::new(1, 6, "cluster_size=4k", false);
    succeed(&["verify", "--create"], b.dir.path());
    let until = b.name(4);
    kill_at_random(&b, &["consolidate", "sda", "--until", &until], &[4, 5, 6], 2);
}

#[test]
fn consolidate_of_linked_images_survives_kill() {
    if !qemu::have("consolidate_of_linked_images_survives_kill", &TOOLS) {
        return;
    }
    let b = Backups::new(1, 5, "", false);
    succeed(&["rebase"], &b.dir.path().join("sda"));
    succeed(&["verify", "--create"], b.dir.path());
    let until = b.name(3);
    kill_at_random(&b, &["consolidate", "sda", "--until", &until], &[3, 4, 5], 4);
}

/// A small file system in memory.
struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    fn new(bytes: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let size = format!("size={bytes}");
        run("mount", &["-t", "tmpfs", "-o", &size, "tmpfs", dir.path().to_str().unwrap()]);
        Tmpfs(dir)
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

#[test]
fn a_full_file_system_loses_nothing() {
    let tools = ["qemu-img", "qemu-io", "cp", "mount", "umount"];
    let test = "a_full_file_system_loses_nothing";
    // SAFETY: geteuid has no preconditions.
    let root = unsafe { libc::geteuid() } == 0;
    if !qemu::have(test, &tools) {
        return;
    }
    if !root {
        assert!(std::env::var_os("CI").is_none(), "{test} needs root");
        println!("skipped: {test} needs root");
        return;
    }
    let b = Backups::new(1, 6, "", false);
    succeed(&["verify", "--create"], b.dir.path());
    let used: u64 = walk(b.dir.path());
    let mut rng = Rng(3);
    let mut failed = 0;
    for round in 0..rounds() {
        let room = rng.below(12 << 20) / 4096 * 4096;
        let fs = Tmpfs::new(used + room);
        let dir = fs.0.path().join("b");
        std::fs::create_dir(&dir).unwrap();
        copy_to(b.dir.path(), &dir);
        let verb: Vec<String> = match round % 2 {
            0 => vec!["consolidate".into(), "sda".into(), "--until".into(), b.name(4)],
            _ => ["prune", "--keep-last", "3", "--consolidate"].map(String::from).to_vec(),
        };
        let args: Vec<&str> = verb.iter().map(String::as_str).collect();
        let out = fleecefs(&args, &dir);
        let what = format!("{args:?} with {room} bytes free");
        failed += usize::from(!out.status.success());
        assert!([0, 7].contains(&code(&out)), "{what}: {out:?}");
        b.check(&dir, [4, 5, 6], &what);
        assert_eq!(code(&fleecefs(&["verify"], &dir)), 0, "{what}");
    }
    println!("{failed} of {} runs met a full file system", rounds());
    assert!(failed > 0, "the file system was never full");
}

/// Bytes that a folder takes in pages of 4 KiB, and some more for names.
fn walk(dir: &Path) -> u64 {
    let entries = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap());
    entries
        .map(|e| {
            let m = e.metadata().unwrap();
            if m.is_dir() { 4096 + walk(&e.path()) } else { m.len().next_multiple_of(4096) + 4096 }
        })
        .sum()
}
