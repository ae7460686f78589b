//! The promise: what a point depends on is found by names, pointers and manifests, and where these are
//! at odds, or a file is missing or damaged, nothing is served that is not certain.

use std::path::Path;

use crate::support::tools::{have, run};
use crate::support::tree::{self, Backups, manifest};
use fleecefs::chain::scan::{ScanOptions, scan};
use fleecefs::error::{Kind, Severity};
use fleecefs::layout::Level;
use fleecefs::manifest as manifests;

#[test]
fn a_bad_layer_takes_only_what_is_above_it() {
    let b = Backups::new();
    for name in ["FULL-1-d", "INC-2-d", "INC-3-d", "INC-4-d", "FULL-5-d", "INC-6-d"] {
        b.image(&format!("d/{name}"), None);
    }
    b.image("e/FULL-1-e", None);
    b.file("d/INC-3-d", b"QFI\xfb\0\0\0\x09");
    assert_eq!(
        b.shown(),
        [
            "d: FULL-1-d",
            "d: FULL-1-d < INC-2-d",
            "d: FULL-5-d",
            "d: FULL-5-d < INC-6-d",
            "e: FULL-1-e"
        ]
    );
    let why = b.why("INC-4-d");
    assert!(why.path.ends_with("INC-3-d"), "{why}");
    assert!(why.message.contains("INC-4-d") && why.remedy.is_some(), "{why}");
}

#[test]
fn a_rebased_chain_may_have_moved_but_not_lost_a_file() {
    let b = Backups::new();
    b.image("d/FULL-1-d", None);
    b.image("d/INC-2-d", Some("FULL-1-d"));
    b.image("d/INC-3-d", Some("/old/place/d/INC-2-d"));
    assert_eq!(b.shown().last().unwrap(), "d: FULL-1-d < INC-2-d < INC-3-d");
    let findings = b.findings();
    assert_eq!(findings.len(), 1, "{findings:?}");
    assert_eq!(findings[0].severity, Severity::Warning);

    std::fs::remove_file(b.path("d/INC-2-d")).unwrap();
    assert_eq!(b.shown(), ["d: FULL-1-d"]);
    let why = b.why("INC-3-d");
    assert!(why.message.contains("INC-2-d is missing"), "{why}");
}

#[test]
fn a_pointer_that_contradicts_the_names_is_not_followed() {
    for pointer in [
        "FULL-0-d",
        "/etc/hostname",
        "json:{\"filename\":\"INC-2-d\"}",
        "nbd:localhost:1/INC-2-d",
        "nbd://localhost/INC-2-d",
        "fat:INC-2-d",
        "..",
        "INC-2-d/",
        "INC-4-d",
        "INC-3-d",
    ] {
        let b = Backups::new();
        for name in ["FULL-0-d", "FULL-1-d", "INC-2-d", "INC-4-d"] {
            b.image(&format!("d/{name}"), None);
        }
        b.image("d/INC-3-d", Some(pointer));
        let shown = b.shown();
        assert_eq!(shown, ["d: FULL-0-d", "d: FULL-1-d", "d: FULL-1-d < INC-2-d"], "{pointer}");
        assert!(b.why("INC-4-d").path.ends_with("INC-3-d"));
    }
}

/// What QEMU opens, and what has no other meaning.
#[test]
fn a_description_of_the_file_beside_is_its_name() {
    for pointer in [
        r#"json:{"file":{"filename":"FULL-1-d"}}"#,
        r#"json:{"driver":"qcow2","l2-cache-size":"1M","file":{"driver":"raw","file":{"driver":"file","filename":"FULL-1-d"}}}"#,
        "json:{'driver':'qcow2','file':{'driver':'file','filename':'FULL-1-d'}}",
    ] {
        let b = Backups::new();
        b.image("d/FULL-1-d", None);
        b.image("d/INC-2-d", Some(pointer));
        assert_eq!(b.shown(), ["d: FULL-1-d", "d: FULL-1-d < INC-2-d"], "{pointer}");
        assert!(b.findings().is_empty(), "{pointer}");
    }
}

/// No other copy of the backup has what is no backup of the disk.
#[test]
fn a_pointer_out_of_the_disk_is_no_missing_image() {
    for pointer in [
        "../../../etc/passwd",
        "file:FULL-1-d.qcow2?x=1",
        r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"file:FULL-1-d.qcow2"}}"#,
        "FULL-0-other.qcow2",
    ] {
        for full in [true, false] {
            let b = Backups::new();
            if full {
                b.image("d/FULL-1-d.qcow2", None);
            }
            b.image("d/INC-2-d.qcow2", Some(pointer));
            let why = b.why("INC-2-d.qcow2");
            assert_eq!(why.kind, Kind::Incomplete, "{pointer}");
            assert!(why.message.contains("is not in the backup directory"), "{why}");
            assert!(why.remedy.as_ref().unwrap().contains("put the backing image into"), "{why}");
        }
    }
    // One of its own disk is.
    let b = Backups::new();
    b.image("d/INC-2-d.qcow2", Some("/old/FULL-1-d.qcow2"));
    assert!(b.why("INC-2-d.qcow2").remedy.unwrap().contains("from another copy"));
}

/// The disk's name is the end of the file's: of one chain in files with two endings two disks are made.
#[test]
fn a_full_that_counts_as_another_disk_is_not_sought_in_another_copy() {
    let test = "a_full_that_counts_as_another_disk_is_not_sought_in_another_copy";
    if !have(test, &["qemu-img"]) {
        return;
    }
    let b = Backups::new();
    b.file("d/FULL-1-sda.raw", &[1; 65536]);
    let inc = b.path("d/INC-2-sda.qcow2");
    let raw = ["create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", "FULL-1-sda.raw"];
    run("qemu-img", &[&raw[..], &[inc.to_str().unwrap(), "64k"]].concat());
    let why = b.why("INC-2-sda.qcow2");
    assert!(why.message.contains("FULL-1-sda.raw counts as another disk"), "{why}");
    let remedy = why.remedy.unwrap();
    assert!(!remedy.contains("another copy"), "{remedy}");
    // The remedy is one.
    for command in remedy.split('\'').filter(|part| part.starts_with("qemu-img ")) {
        let words: Vec<&str> = command.split(' ').collect();
        let out = std::process::Command::new("qemu-img")
            .args(&words[1..])
            .current_dir(b.path("d"))
            .output();
        assert!(out.unwrap().status.success(), "{command}");
    }
    assert!(
        b.shown().contains(&"d/sda.qcow2: FULL-1-sda.qcow2 < INC-2-sda.qcow2".into()),
        "{:?}",
        b.shown()
    );
}

#[test]
fn a_root_on_an_image_inside_the_directory() {
    let b = Backups::new();
    b.image("base/deep/base.qcow2", None);
    b.image("mid.qcow2", Some(b.path("base/deep/base.qcow2").to_str().unwrap()));
    b.image("d/low.qcow2", Some("../mid.qcow2"));
    b.image("d/FULL-1-d.qcow2", Some("low.qcow2"));
    b.image("d/INC-2-d.qcow2", None);
    // A root on an increment has all that the increment has.
    b.image("e/top.qcow2", Some("../d/./INC-2-d.qcow2"));
    let d = "base.qcow2 < mid.qcow2 < low.qcow2 < FULL-1-d.qcow2";
    assert_eq!(
        b.shown(),
        [
            "base/deep/base.qcow2: base.qcow2".to_string(),
            format!("d: {d}"),
            format!("d: {d} < INC-2-d.qcow2"),
            "d/low.qcow2: base.qcow2 < mid.qcow2 < low.qcow2".to_string(),
            format!("e/top.qcow2: {d} < INC-2-d.qcow2 < top.qcow2"),
            "mid.qcow2: base.qcow2 < mid.qcow2".to_string(),
        ]
    );
}

/// QEMU takes a protocol's node for the bytes themselves, and asks nobody whether they are an image.
#[test]
fn a_description_without_a_format_means_the_bytes_of_the_file() {
    let b = Backups::new();
    b.image("base.qcow2", None);
    b.image("top.qcow2", Some(r#"json:{"driver":"file","filename":"base.qcow2"}"#));
    b.file("disk.raw", &[7; 4096]);
    b.image("over.qcow2", Some(r#"json:{"driver":"file","filename":"disk.raw"}"#));
    let shown = b.shown();
    assert!(shown.contains(&"over.qcow2: disk.raw < over.qcow2".to_string()), "{shown:?}");
    assert!(b.why("top.qcow2").message.contains("does not have format raw"));
}

#[test]
fn a_root_on_anything_else_is_not_served() {
    let outside = tempfile::tempdir().unwrap();
    std::fs::write(outside.path().join("x"), tree::tiny(None)).unwrap();
    let out = outside.path().join("x");
    for pointer in [
        "/etc/hostname",
        "../../../../../../../../etc/hostname",
        out.to_str().unwrap(),
        "json:{}",
        "nbd:unix:/run/x",
        "FULL-1-d",
        "INC-2-d",
        "linked",
        "gone",
        "x.partial",
    ] {
        let b = Backups::new();
        b.image("d/FULL-1-d", Some(pointer));
        b.image("d/INC-2-d", None);
        b.image("d/x.partial", None);
        b.image("e/FULL-1-e", None);
        b.link("d/linked", &out);
        assert_eq!(b.shown(), ["e: FULL-1-e"], "{pointer}");
    }
}

#[test]
fn a_long_loop_of_roots_ends() {
    let b = Backups::new();
    let n = 3000;
    for i in 0..n {
        b.image(&format!("x/{i}.qcow2"), Some(&format!("{}.qcow2", (i + 1) % n)));
    }
    b.image("y.qcow2", Some("x/0.qcow2"));
    assert!(b.shown().is_empty());
    assert!(b.why("y.qcow2").message.contains("loop"));
}

#[test]
fn a_very_long_chain_is_served() {
    let b = Backups::new();
    b.image("d/FULL-0-d", None);
    for i in 1..3000 {
        b.image(&format!("d/INC-{i}-d"), None);
    }
    let disk = &b.scan().disks[0];
    assert_eq!(disk.points.len(), 3000);
    assert_eq!(disk.stack(2999).len(), 3000);
    assert!(disk.points.iter().all(|p| p.is_served() && p.layers.len() == 1));
}

#[test]
fn one_second_two_files() {
    let b = Backups::new();
    for name in ["FULL-1-d", "FULL-5-d", "INC-5-d", "INC-6-d", "FULL-9-d", "INC-10-d"] {
        b.image(&format!("d/{name}"), None);
    }
    let untied = ["d: FULL-1-d", "d: FULL-5-d", "d: FULL-9-d", "d: FULL-9-d < INC-10-d"];
    assert_eq!(b.shown(), untied);
    let remedy = |b: &Backups| {
        let why = b.why("INC-5-d");
        assert_eq!(why.kind, Kind::Incomplete);
        why.remedy.unwrap()
    };
    assert!(remedy(&b).contains("FULL-5-d and INC-5-d have the same time"), "{}", remedy(&b));

    manifest(&b.path("d"), "INC-5-d", Level::Inc, Some("FULL-5-d"), 0);
    let shown = b.shown();
    assert!(shown.contains(&"d: FULL-5-d < INC-5-d".into()), "{shown:?}");
    assert!(shown.contains(&"d: FULL-5-d < INC-5-d < INC-6-d".into()), "{shown:?}");

    // Of a program that writes manifests they are missing; of one that writes none a name can be changed, and is right.
    let b = Backups::new();
    for name in ["FULL-1-d", "FULL-5-d", "INC-5-d"] {
        b.image(&format!("d/{name}"), None);
    }
    manifest(&b.path("d"), "FULL-1-d", Level::Full, None, 0);
    assert!(remedy(&b).contains("restore the manifests"), "{}", remedy(&b));
    manifests::remove(&b.path("d"), "FULL-1-d".as_ref()).unwrap();
    let told = remedy(&b);
    assert!(!told.contains("manifest") && told.contains("with 6 instead of 5"), "{told}");
    std::fs::rename(b.path("d/INC-5-d"), b.path("d/INC-6-d")).unwrap();
    assert!(b.shown().contains(&"d: FULL-5-d < INC-6-d".into()), "{:?}", b.shown());
}

#[test]
fn a_manifest_orders_what_a_wrong_clock_disordered() {
    let b = Backups::new();
    for (name, level, parent) in [
        ("FULL-500-d", Level::Full, None),
        ("INC-100-d", Level::Inc, Some("FULL-500-d")),
        ("INC-200-d", Level::Inc, Some("INC-100-d")),
        ("DIFF-150-d", Level::Diff, Some("FULL-500-d")),
    ] {
        b.image(&format!("d/{name}"), None);
        manifest(&b.path("d"), name, level, parent, 0);
    }
    assert_eq!(
        b.shown(),
        [
            "d: FULL-500-d",
            "d: FULL-500-d < INC-100-d",
            "d: FULL-500-d < DIFF-150-d",
            "d: FULL-500-d < INC-100-d < INC-200-d",
        ]
    );
    let catalog = b.scan();
    let known = catalog.disks[0].points.iter().map(|p| p.consistency);
    assert!(known.eq([Some(manifests::Achieved::Crash); 4]));
}

#[test]
fn a_manifest_tells_of_a_missing_file_and_of_a_loop() {
    let b = Backups::new();
    for (name, parent) in [("INC-2-d", "FULL-1-d"), ("INC-4-d", "INC-3-d"), ("INC-5-d", "INC-4-d")]
    {
        b.image(&format!("d/{name}"), None);
        manifest(&b.path("d"), name, Level::Inc, Some(parent), 0);
    }
    b.image("d/FULL-1-d", None);
    for (name, parent) in [("INC-2-e", "INC-3-e"), ("INC-3-e", "INC-2-e"), ("INC-4-e", "COPY-1-e")]
    {
        b.image(&format!("e/{name}"), None);
        manifest(&b.path("e"), name, Level::Inc, Some(parent), 0);
    }
    b.image("e/COPY-1-e", None);
    assert_eq!(b.shown(), ["d: FULL-1-d", "d: FULL-1-d < INC-2-d", "e: COPY-1-e"]);
    assert!(b.why("INC-4-d").message.contains("INC-3-d is missing"));
    assert!(b.why("INC-5-d").path.ends_with("INC-4-d"));
    assert!(b.why("INC-2-e").message.contains("loop"));
    assert!(b.why("INC-4-e").message.contains("cannot be its parent"));
}

#[test]
fn a_manifest_that_its_file_contradicts() {
    let b = Backups::new();
    for name in ["FULL-1-d", "INC-2-d", "INC-3-d"] {
        b.image(&format!("d/{name}"), None);
    }
    manifest(&b.path("d"), "INC-3-d", Level::Inc, Some("INC-2-d"), 1 << 20);
    assert_eq!(b.why("INC-3-d").kind, Kind::Truncated);
    // Longer: another file, but for a FULL, which qmprestore's commit writes to.
    manifest(&b.path("d"), "INC-3-d", Level::Inc, Some("INC-2-d"), 10);
    assert_eq!(b.why("INC-3-d").kind, Kind::Changed);
    manifest(&b.path("d"), "FULL-1-d", Level::Full, None, 10);
    assert!(b.shown().contains(&"d: FULL-1-d".into()), "{:?}", b.shown());
    manifest(&b.path("d"), "INC-3-d", Level::Full, None, 0);
    assert_eq!(b.why("INC-3-d").kind, Kind::Corrupt);
    // One that cannot be read may have said anything. The image's own pointer will do.
    b.file("d/.fleecefs/INC-3-d.json", br#"{"format_version": 9}"#);
    b.file("d/.fleecefs/FULL-1-d.json", b"{}");
    assert_eq!(b.shown().len(), 2);
    assert_eq!(b.why("INC-3-d").kind, Kind::Unsupported);
    b.image("d/INC-3-d", Some("INC-2-d"));
    assert_eq!(b.shown().len(), 3);
    let mut findings = b.findings();
    findings.retain(|f| f.severity == Severity::Warning);
    assert_eq!(findings.len(), 2, "{findings:?}");
    assert_eq!(findings[1].kind, Kind::Unsupported);
}

#[test]
fn manifests_that_cannot_be_looked_for_may_be_there() {
    let b = Backups::new();
    b.image("d/FULL-1-d", None);
    b.image("d/INC-2-d", None);
    // Links are not followed, whatever is behind them.
    b.link("d/.fleecefs", Path::new(".fleecefs"));
    assert_eq!(b.shown(), ["d: FULL-1-d"]);
    assert_eq!(b.why("INC-2-d").kind, Kind::Unsupported);
}

#[test]
fn the_manifest_of_a_lost_increment_marks_the_gap() {
    let b = Backups::new();
    for name in ["FULL-1-d", "INC-3-d", "INC-4-d", "FULL-1-e", "INC-3-e"] {
        b.image(name, None);
    }
    manifest(b.root(), "INC-2-d", Level::Inc, Some("FULL-1-d"), 0);
    let expected = ["d: FULL-1-d", "e: FULL-1-e", "e: FULL-1-e < INC-3-e"];
    assert_eq!(b.shown(), expected);
    assert!(b.why("INC-3-d").message.contains("INC-2-d is missing"));
    // What is on its way out is not missed; nor what the image itself does not depend on.
    b.file(".fleecefs/removal.journal", br#"{"remove": ["INC-2-d"]}"#);
    assert_eq!(b.shown().len(), 5);
    std::fs::remove_file(b.path(".fleecefs/removal.journal")).unwrap();
    b.image("INC-3-d", Some("FULL-1-d"));
    assert_eq!(b.shown().len(), 5);
}

#[test]
fn a_base_that_vanishes_under_an_open_mount_is_missed() {
    let b = Backups::new();
    for name in ["FULL-1-d", "INC-2-d", "INC-3-d", "INC-4-d"] {
        b.image(&format!("d/{name}"), None);
    }
    let options = ScanOptions::default();
    let (_, mut cache) = scan(b.root(), &options, None).unwrap();
    let mut served = |b: &Backups| {
        let (catalog, next) = scan(b.root(), &options, Some(&cache)).unwrap();
        cache = next;
        let points = &catalog.disks[0].points;
        let name = |p: &fleecefs::chain::Point| p.name.clone();
        points.iter().filter(|p| p.is_served()).map(name).collect::<Vec<_>>()
    };
    std::fs::rename(b.path("d/INC-2-d"), b.path("away.partial")).unwrap();
    // Not only at the next look: for as long as it is gone.
    for _ in 0..2 {
        assert_eq!(served(&b), ["FULL-1-d"]);
    }
    std::fs::rename(b.path("away.partial"), b.path("d/INC-2-d")).unwrap();
    assert_eq!(served(&b).len(), 4);
    // Rebased in place: the image itself says that it depends on the FULL now.
    b.image("d/INC-3-d", Some("FULL-1-d"));
    std::fs::remove_file(b.path("d/INC-2-d")).unwrap();
    assert_eq!(served(&b), ["FULL-1-d", "INC-3-d", "INC-4-d"]);
}

#[test]
fn increments_without_a_full_or_without_a_time() {
    let b = Backups::new();
    b.image("d/INC-2-d", None);
    b.image("d/INC-3-d", None);
    b.image("e/FULL-1-e", None);
    b.image("e/INC-e", None);
    b.image("f/COPY-1-f", None);
    b.image("f/INC-2-f", None);
    b.image("f/DIFF-3-f", None);
    assert_eq!(b.shown(), ["e: FULL-1-e", "f: COPY-1-f"]);
    assert!(b.why("INC-2-d").message.contains("no FULL"));
    assert!(b.why("DIFF-3-f").message.contains("no FULL"));
}

/// The rules once more, as a loop over sorted names.
fn model(files: &[(i64, &str)]) -> Vec<String> {
    let mut files = files.to_vec();
    files.sort_unstable();
    let (mut full, mut last): (Option<String>, Option<String>) = (None, None);
    let mut shown = Vec::new();
    for (time, level) in files {
        let name = format!("{level}-{time}-d");
        let below = match level {
            "INC" => last.clone(),
            "DIFF" => full.clone(),
            _ => Some(String::new()),
        };
        let Some(below) = below else { continue };
        let line = if below.is_empty() { name } else { format!("{below} < {name}") };
        match level {
            "FULL" => (full, last) = (Some(line.clone()), Some(line.clone())),
            "INC" => last = Some(line.clone()),
            _ => {}
        }
        shown.push(format!("d: {line}"));
    }
    shown
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]

    #[test]
    fn random_folders_link_as_the_rules_say(
        files in proptest::collection::btree_map(
            1..1000i64, proptest::sample::select(vec!["FULL", "INC", "INC", "DIFF", "COPY"]), 1..20)
    ) {
        let b = Backups::new();
        for (time, level) in &files {
            b.image(&format!("d/{level}-{time}-d"), None);
        }
        let files: Vec<_> = files.into_iter().collect();
        proptest::prop_assert_eq!(b.shown(), model(&files));
    }
}

/// qmpbackup's `--no-subdir --no-timestamp --no-symlink`, and folders of its that were copied.
#[test]
fn a_full_without_time_and_link_is_found_where_the_folder_shows_what_it_is() {
    let config = br#"{"format": "qcow2", "virtual-size": 0}"#;
    // Increments with a time to come, as theirs are later than the file's.
    let inc = |disk: &str| format!("INC-4000000000-{disk}");
    let with = |files: &[&str], disk: &str, names: &[&str]| {
        let b = Backups::new();
        b.image(&format!("x/{disk}"), None);
        b.image(&format!("x/{}", inc(disk)), None);
        files.iter().for_each(|f| b.file(&format!("x/{f}"), config));
        names.iter().for_each(|f| b.image(&format!("x/{f}"), None));
        b.shown()
    };
    let chain = format!("disk1.qcow2 < {}", inc("disk1.qcow2"));
    let whole = |path: &str| vec![format!("{path}: disk1.qcow2"), format!("{path}: {chain}")];
    // A copied folder, and a flat one, alone and among others.
    assert_eq!(with(&[], "disk1.qcow2", &[]), whole("x"));
    assert_eq!(with(&["disk1.qcow2.config", "uuid"], "disk1.qcow2", &[]), whole("x"));
    let two = with(&["disk1.qcow2.config", "uuid"], "disk1.qcow2", &["disk2.qcow2"]);
    assert_eq!(two[..2], whole("x"));
    // Nothing shows that it is no disk of a VM; or there is a FULL.
    for (files, names) in [(&["uuid"][..], &["disk2.qcow2"][..]), (&[], &["disk2.qcow2"])] {
        assert!(with(files, "disk1.qcow2", names).iter().all(|l| !l.contains(" < ")));
    }
    let full = with(&["disk1.qcow2.config"], "disk1.qcow2", &["FULL-1-disk1.qcow2"]);
    assert!(full.iter().any(|l| l.contains("FULL-1-disk1.qcow2 < INC-4")), "{full:?}");
    // A disk that is written to now is none of theirs.
    let b = Backups::new();
    b.image("x/INC-1700000000-d.qcow2", None);
    let old = std::fs::File::open(b.path("x/INC-1700000000-d.qcow2")).unwrap();
    old.set_modified(std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_700_000_000))
        .unwrap();
    b.file("x/d.qcow2.config", config);
    b.image("x/d.qcow2", None);
    assert_eq!(b.shown(), ["x: d.qcow2"]);
}

/// A raw FULL of qmpbackup's `--include-raw` stays good beside ours, which is qcow2 inside.
#[test]
fn a_raw_full_beside_one_with_a_manifest_is_no_damaged_qcow2() {
    for disk in ["disk3.raw", "disk3"] {
        let b = Backups::new();
        b.file(&format!("{disk}/FULL-1700000000-{disk}"), &[7; 4096]);
        b.image(&format!("{disk}/FULL-1700000100-{disk}"), None);
        let name = format!("FULL-1700000100-{disk}");
        manifest(&b.path(disk), &name, Level::Full, None, 0);
        b.file(&format!("{disk}.config"), br#"{"format": "raw"}"#);
        assert_eq!(b.shown().len(), 2, "{disk}: {:?}", b.findings());
        assert!(b.findings().is_empty(), "{:?}", b.findings());
    }
}

/// What has the time of a file that is gone, or that somebody names as its parent, is not certain.
#[test]
fn what_is_gone_at_the_same_time_is_missed() {
    // The lost FULL may be what the INC of its time depends on.
    let b = Backups::new();
    b.image("d/FULL-1-d", None);
    b.image("d/INC-5-d", None);
    manifest(&b.path("d"), "FULL-5-d", Level::Full, None, 0);
    assert_eq!(b.shown(), ["d: FULL-1-d"]);
    assert!(b.why("INC-5-d").message.contains("FULL-5-d is missing"));
    // Also where another image of that time is there, and known.
    manifest(&b.path("d"), "INC-5-d", Level::Inc, Some("FULL-1-d"), 0);
    b.image("d/INC-6-d", None);
    assert_eq!(b.shown(), ["d: FULL-1-d", "d: FULL-1-d < INC-5-d"]);
    assert!(b.why("INC-6-d").message.contains("FULL-5-d is missing"));
}

#[test]
fn a_full_of_the_same_time_is_no_parent_whoever_its_own_is() {
    let b = Backups::new();
    for name in ["FULL-1", "INC-2", "FULL-3", "INC-3"] {
        b.image(&format!("d/{name}-d"), None);
    }
    manifest(&b.path("d"), "FULL-3-d", Level::Full, Some("INC-2-d"), 0);
    assert_eq!(b.shown(), ["d: FULL-1-d", "d: FULL-1-d < INC-2-d", "d: FULL-3-d"]);
    assert!(b.why("INC-3-d").message.contains("its parent image is not known"));
}

#[test]
fn a_diff_depends_on_a_full_only_and_a_manifest_on_no_other_level() {
    let b = Backups::new();
    for name in ["FULL-1", "INC-2", "DIFF-3", "COPY-4", "INC-5"] {
        b.image(&format!("d/{name}-d"), None);
    }
    manifest(&b.path("d"), "DIFF-3-d", Level::Diff, Some("INC-2-d"), 0);
    manifest(&b.path("d"), "INC-5-d", Level::Inc, Some("COPY-4-d"), 0);
    for name in ["DIFF-3-d", "INC-5-d"] {
        assert!(b.why(name).message.contains("which cannot be its parent"), "{name}");
    }
}

/// After a consolidate the INC's manifest may stay a little longer than the INC.
#[test]
fn what_is_gone_at_the_time_of_the_newest_is_not_missed() {
    let b = Backups::new();
    b.image("d/FULL-5-d", None);
    manifest(&b.path("d"), "INC-5-d", Level::Inc, Some("FULL-1-d"), 0);
    let missed = |b: &Backups| b.findings().iter().any(|f| f.message.contains("newest"));
    assert!(!missed(&b));
    manifest(&b.path("d"), "INC-6-d", Level::Inc, Some("FULL-5-d"), 0);
    assert!(missed(&b));
}
