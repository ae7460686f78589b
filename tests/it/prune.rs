//! Retention: what is kept stays right.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::chains::{
    Backups, Copy, SIZE, TOOLS, aloud, code, copy_to, fleecefs, names, ops, succeed,
};
use crate::support::images::{self, Chain, Rng};
use crate::support::tools::{self, run};
use fleecefs::chain::scan::{ScanOptions, scan};
use fleecefs::image::{Cache, open_point};
use fleecefs::journal::removal;
use fleecefs::journal::removal::{Publish, Removal};
use fleecefs::lock::Locks;
use fleecefs::manifest;

#[test]
fn a_real_run_executes_the_plan_that_a_dry_run_prints() {
    if !tools::have("a_real_run_executes_the_plan_that_a_dry_run_prints", &TOOLS) {
        return;
    }
    let b = Backups::new(3, 3, "", false);
    succeed(&["verify", "--create"], b.dir.path());
    let before = names(b.dir.path());
    let planned = succeed(&["prune", "--keep-last", "2", "-n"], b.dir.path());
    assert_eq!(names(b.dir.path()), before);
    let done = aloud(&["prune", "--keep-last", "2"], b.dir.path());
    let done = String::from_utf8(done.stdout).unwrap();
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
    if !tools::have("nothing_goes_without_a_good_newest_point", &TOOLS) {
        return;
    }
    let b = Backups::new(2, 2, "", false);
    let before = names(b.dir.path());
    // No manifest: nobody knows.
    assert_eq!(code(&fleecefs(&["prune", "--keep-last", "1"], b.dir.path())), 19);
    assert_eq!(names(b.dir.path()), before);
    succeed(&["verify", "--create"], b.dir.path());
    // The newest is damaged.
    let good = std::fs::read(&b.files[5]).unwrap();
    std::fs::write(&b.files[5], &good[..good.len() / 2]).unwrap();
    assert_eq!(code(&fleecefs(&["prune", "--keep-last", "1"], b.dir.path())), 19);
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

/// Two images over one file of bytes: whoever copied the smaller of both files has that.
#[test]
fn a_data_file_that_a_kept_point_needs_stays() {
    if !tools::have("a_data_file_that_a_kept_point_needs_stays", &TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("sda");
    std::fs::create_dir(&folder).unwrap();
    let option = format!("data_file={}", folder.join("bytes.bin").display());
    let images = [1_700_000_000, 1_700_003_600].map(|t| format!("FULL-{t}-sda.qcow2"));
    for image in &images {
        let image = folder.join(image);
        let image = image.to_str().unwrap();
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &option, image, "1M"]);
    }
    succeed(&["verify", "--create"], dir.path());
    succeed(&["prune", "--keep-last", "1"], dir.path());
    let mut left = names(dir.path());
    left.sort();
    assert_eq!(left, [images[1].as_str(), "bytes.bin"]);
    succeed(&["verify"], dir.path());
}

#[test]
fn a_consolidated_chain_is_right_and_goes_on() {
    if !tools::have("a_consolidated_chain_is_right_and_goes_on", &TOOLS) {
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
fn a_diff_depends_on_the_new_full() {
    if !tools::have("a_diff_depends_on_the_new_full", &TOOLS) {
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
    images::qemu_io(&diff, &written[1..].concat());
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
fn a_backup_made_before_recovery_keeps_what_it_depends_on() {
    if !tools::have("a_backup_made_before_recovery_keeps_what_it_depends_on", &TOOLS) {
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
    removal::write_in(
        &fleecefs::folder::Folder::open(&to).unwrap(),
        &Removal { publish, remove, relink: Vec::new() },
    )
    .unwrap();
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
    removal::write_in(
        &fleecefs::folder::Folder::open(&to).unwrap(),
        &Removal { remove, ..Removal::default() },
    )
    .unwrap();
    succeed(&["prune", "--keep-last", "9"], &broken.root);
    assert_eq!(names(&broken.root).len(), 5);
    b.check(&broken.root, 0..5, "after recovery");
}

#[test]
fn prune_consolidates_what_is_only_needed() {
    if !tools::have("prune_consolidates_what_is_only_needed", &TOOLS) {
        return;
    }
    let b = Backups::new(2, 5, "", false);
    succeed(&["verify", "--create"], b.dir.path());
    let planned = succeed(&["prune", "--keep-last", "3", "-n"], b.dir.path());
    let not_freed = ["3 points not freed, ", "only because newer points need them (--consolidate"];
    assert!(not_freed.iter().all(|words| planned.contains(words)), "{planned}");
    let planned = succeed(&["prune", "--keep-last", "3", "--consolidate", "-n"], b.dir.path());
    assert!(!planned.contains("not freed"), "{planned}");
    succeed(&["prune", "--keep-last", "3", "--consolidate"], b.dir.path());
    let full = b.name(9).replace("INC-", "FULL-");
    assert_eq!(names(b.dir.path()), [full, b.name(10), b.name(11)]);
    b.check(b.dir.path(), 9..12, "after prune --consolidate");
    succeed(&["verify"], b.dir.path());
}

#[test]
fn later_points_follow_a_chain_with_backing_pointers() {
    if !tools::have("later_points_follow_a_chain_with_backing_pointers", &TOOLS) {
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
    if !tools::have("recovery_keeps_a_manifest_that_is_newer", &TOOLS) {
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
        removal::write_in(
            &fleecefs::folder::Folder::open(&dir).unwrap(),
            &Removal { publish, remove, relink: Vec::new() },
        )
        .unwrap();
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
    if !tools::have("what_concerns_one_disk_holds_all_of_its_vm", &TOOLS) {
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
        let out = aloud(&["prune", "--keep-last", "1"], root);
        let said = String::from_utf8(out.stdout).unwrap();
        assert!(out.status.code() == Some(19) && said.contains(why), "{said}");
        assert_eq!(count(&second), 6, "{why}");
        said
    };
    let newest = dir.join(b.name(5));
    let good = std::fs::read(&newest).unwrap();
    std::fs::write(&newest, &good[..good.len() / 2]).unwrap();
    held("is not available: it has");
    // Its manifest says that there was one.
    std::fs::remove_file(&newest).unwrap();
    held("and no image");
    std::fs::write(&newest, &good).unwrap();
    // A backup that did not finish.
    let partial = dir.join("INC-1800000000-sda.qcow2.partial");
    std::fs::write(&partial, b"half").unwrap();
    held("was interrupted");
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
    if !tools::have("many_points_go_with_few_descriptors", &TOOLS) {
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
    if !tools::have(test, &TOOLS) {
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
    // (A name like that does not say that it is an image.)
    succeed(&["verify", "--create", "--format", "qcow2"], root);
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
    if !tools::have("what_another_disk_needs_stays", &TOOLS) {
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

#[test]
fn damage_is_not_merged_into_a_full_with_a_good_hash() {
    if !tools::have("damage_is_not_merged_into_a_full_with_a_good_hash", &TOOLS) {
        return;
    }
    let b = Backups::new(1, 3, "", false);
    let root = b.dir.path();
    succeed(&["verify", "--create"], root);
    // In the middle of an INC's data: neither its structure nor its ends show it.
    let mut bytes = std::fs::read(&b.files[1]).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&b.files[1], &bytes).unwrap();
    let before = names(root);
    for args in [
        vec!["consolidate", "sda", "--until", "latest"],
        vec!["prune", "--keep-last", "1", "--consolidate"],
    ] {
        let out = fleecefs(&args, root);
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(code(&out) == 18 && said.contains(&b.name(1)), "{args:?}: {out:?}");
        assert_eq!(names(root), before, "{args:?}");
        assert_eq!(code(&fleecefs(&["verify"], root)), 18, "{args:?}");
    }
    // Who says so merges it all the same.
    succeed(&["consolidate", "sda", "--until", "latest", "--skip-check"], root);
    assert_eq!(names(root).len(), 1);
}

/// One disk of four points with manifests, which `change` alters.
fn recorded(change: impl Fn(usize, &mut manifest::Manifest)) -> Backups {
    let b = Backups::new(1, 3, "", false);
    succeed(&["verify", "--create"], b.dir.path());
    for (i, file) in b.files.iter().enumerate() {
        let folder = file.parent().unwrap();
        let mut m = manifest::read(folder, file.file_name().unwrap()).unwrap().unwrap();
        change(i, &mut m);
        manifest::write(folder, &m).unwrap();
    }
    b
}

#[test]
fn what_is_on_another_branch_or_has_the_name_keeps_a_chain_as_it_is() {
    let test = "what_is_on_another_branch_or_has_the_name_keeps_a_chain_as_it_is";
    if !tools::have(test, &TOOLS) {
        return;
    }
    // The last depends on the second, not on the third.
    let b = recorded(|i, m| {
        if i == 3 {
            m.parent = Some(m.image.replace("INC-1700010800", "INC-1700003600"));
        }
    });
    let before = names(b.dir.path());
    let out = fleecefs(&["consolidate", "sda", "--until", &b.name(2)], b.dir.path());
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(code(&out) == 11 && said.contains("another branch"), "{said}");
    assert_eq!(names(b.dir.path()), before);
    // Without it there is no harm, but there is another image with the new name.
    std::fs::remove_file(&b.files[3]).unwrap();
    manifest::remove(b.files[3].parent().unwrap(), b.files[3].file_name().unwrap()).unwrap();
    let taken = b.files[2].with_file_name(b.name(2).replace("INC-", "FULL-"));
    std::fs::copy(&b.files[0], &taken).unwrap();
    let before = names(b.dir.path());
    let out = fleecefs(&["consolidate", "sda", "--until", &b.name(2)], b.dir.path());
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(code(&out) == 4 && said.contains("already such a FULL"), "{said}");
    assert_eq!(names(b.dir.path()), before);
}

/// What changed since the old FULL is more than since the point: the next DIFF is as right.
#[test]
fn what_a_diff_goes_by_after_a_consolidate() {
    if !tools::have("what_a_diff_goes_by_after_a_consolidate", &TOOLS) {
        return;
    }
    for (until, bitmap) in [(2, "of-0"), (3, "of-3")] {
        let b = recorded(|i, m| {
            m.bitmap = Some(manifest::BitmapInfo {
                name: format!("of-{i}"),
                node: "n".into(),
                granularity: 65536,
                persistent: true,
                watermark: false,
            });
        });
        succeed(&["consolidate", "sda", "--until", &b.name(until)], b.dir.path());
        let full = b.name(until).replace("INC-", "FULL-");
        let m = manifest::read(b.files[0].parent().unwrap(), full.as_ref()).unwrap().unwrap();
        assert_eq!(m.bitmap.unwrap().name, bitmap);
    }
}
