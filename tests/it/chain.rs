//! The promise: every layout that qmpbackup made or makes is linked right, and what cannot be
//! linked for certain is not served. Directories are built here, file by file; what the points hold
//! is tested by `matrix`.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::support::tools;
use crate::support::tree::{self, Backups, manifest, raw_manifest};
use fleecefs::chain::scan::{ScanOptions, scan};
use fleecefs::error::{Kind, Severity};
use fleecefs::layout::Level;
use fleecefs::manifest as manifests;

/// `FULL-1-d < INC-2-d` is how [`Backups::shown`] writes a point and its layers, bottom first.
#[test]
fn folders_by_disk_or_node_name() {
    let b = Backups::new();
    for disk in ["sda.qcow2", "vm1/sdb.qcow2"] {
        let name = disk.rsplit('/').next().unwrap();
        for file in ["FULL-100-", "INC-101-", "INC-102-"] {
            b.image(&format!("{disk}/{file}{name}"), None);
        }
    }
    // An older layout: the folder is the node, the name the disk; no extension.
    b.image("drive0/FULL-5-disk", None);
    b.image("drive0/INC-6-disk", None);
    b.file("uuid", b"0123");
    b.file("sda.qcow2.config", b"{}");
    assert_eq!(
        b.shown(),
        [
            "drive0: FULL-5-disk",
            "drive0: FULL-5-disk < INC-6-disk",
            "sda.qcow2: FULL-100-sda.qcow2",
            "sda.qcow2: FULL-100-sda.qcow2 < INC-101-sda.qcow2",
            "sda.qcow2: FULL-100-sda.qcow2 < INC-101-sda.qcow2 < INC-102-sda.qcow2",
            "vm1/sdb.qcow2: FULL-100-sdb.qcow2",
            "vm1/sdb.qcow2: FULL-100-sdb.qcow2 < INC-101-sdb.qcow2",
            "vm1/sdb.qcow2: FULL-100-sdb.qcow2 < INC-101-sdb.qcow2 < INC-102-sdb.qcow2",
        ]
    );
    // One note for each disk that its order is by names alone.
    let findings = b.findings();
    assert_eq!(findings.len(), 3, "{findings:?}");
    assert!(findings.iter().all(|f| f.severity == Severity::Note && f.path.is_dir()));
    manifest(&b.path("drive0"), "INC-6-disk", Level::Inc, Some("FULL-5-disk"), 0);
    assert_eq!(b.findings().len(), 2);
}

#[test]
fn monthly_and_flat_folders() {
    let b = Backups::new();
    b.image("2024-01/d/FULL-1-d", None);
    b.image("2024-01/d/INC-2-d", None);
    b.image("2024-02/d/FULL-3-d", None);
    b.image("flat/FULL-1-a", None);
    b.image("flat/FULL-1-b", None);
    b.image("flat/INC-2-a", None);
    b.image("flat/INC-2-b", None);
    b.image("FULL-9-top", None);
    assert_eq!(
        b.shown(),
        [
            "2024-01/d: FULL-1-d",
            "2024-01/d: FULL-1-d < INC-2-d",
            "2024-02/d: FULL-3-d",
            "flat/a: FULL-1-a",
            "flat/a: FULL-1-a < INC-2-a",
            "flat/b: FULL-1-b",
            "flat/b: FULL-1-b < INC-2-b",
            "top: FULL-9-top",
        ]
    );
}

#[test]
fn several_fulls_copies_and_diffs_in_one_folder() {
    let b = Backups::new();
    for name in
        ["FULL-10", "INC-11", "COPY-12", "DIFF-13", "INC-14", "DIFF-15", "FULL-20", "INC-21"]
    {
        b.image(&format!("d/{name}-d"), None);
    }
    assert_eq!(
        b.shown(),
        [
            "d: FULL-10-d",
            "d: FULL-10-d < INC-11-d",
            "d: COPY-12-d",
            "d: FULL-10-d < DIFF-13-d",
            "d: FULL-10-d < INC-11-d < INC-14-d",
            "d: FULL-10-d < DIFF-15-d",
            "d: FULL-20-d",
            "d: FULL-20-d < INC-21-d",
        ]
    );
    let catalog = b.scan();
    let chains: Vec<_> = catalog.disks[0].points.iter().map(|p| p.chain.as_str()).collect();
    assert_eq!(chains[1..5], ["FULL-10-d", "COPY-12-d", "FULL-10-d", "FULL-10-d"]);
    assert_eq!(chains[7], "FULL-20-d");
}

#[test]
fn no_timestamp_with_a_good_a_dangling_a_foreign_and_no_link() {
    let outside = tempfile::tempdir().unwrap();
    std::fs::write(outside.path().join("d"), b"not ours").unwrap();
    for link in ["good", "relative", "dangling", "outside", "none"] {
        let b = Backups::new();
        b.image("d/d", None);
        b.image("d/INC-5-d", None);
        b.image("d/INC-6-d", Some("/elsewhere/d/INC-5-d"));
        match link {
            "good" => b.link("d/FULL-d", &b.path("d/d")),
            "relative" => b.link("d/FULL-d", Path::new("d")),
            "dangling" => b.link("d/FULL-d", Path::new("/nowhere/d/d")),
            "outside" => b.link("d/FULL-d", &outside.path().join("d")),
            _ => {}
        }
        let expected = ["d: d", "d: d < INC-5-d", "d: d < INC-5-d < INC-6-d"];
        assert_eq!(b.shown(), expected, "{link}");
        assert_eq!(b.scan().disks[0].points[0].level, Level::Full);
        assert!(b.scan().disks[0].points[0].time < 5, "a FULL is before what lies on it");
    }
}

#[test]
fn no_timestamp_copies_flat_folders_and_pointers_by_link_name() {
    let b = Backups::new();
    b.image("d/d", None);
    b.link("d/COPY-d", &b.path("d/d"));
    b.image("flat/a", None);
    b.link("flat/FULL-a", &b.path("flat/a"));
    b.image("flat/INC-5-a", Some("/old/FULL-a"));
    // Without a link this may be anything that is called like the disk.
    b.image("flat/b", None);
    b.image("flat/INC-5-b", None);
    // In the disk's own folder it is its FULL, whatever it looks like.
    b.file("r/r", &[1; 512]);
    b.image("r/INC-5-r", None);
    assert_eq!(b.shown(), ["d: d", "flat/a: a", "flat/a: a < INC-5-a", "flat/b-2: b"]);
    assert_eq!(b.scan().disks[0].points[0].level, Level::Copy);
    assert!(b.why("INC-5-b").message.contains("no FULL"));
    assert_eq!(b.why("INC-5-r").kind, Kind::Incomplete);
    assert!(b.why("r").message.contains("qcow2 header"));
}

#[test]
fn a_full_without_a_time_that_was_overwritten_carries_no_older_increments() {
    let b = Backups::new();
    for name in ["d", "INC-5-d", "INC-6-d", "INC-7-d"] {
        b.image(&format!("d/{name}"), None);
    }
    manifest(&b.path("d"), "INC-7-d", Level::Inc, Some("d"), 0);
    let later = std::time::SystemTime::now() + std::time::Duration::from_secs(100);
    let full = std::fs::File::options().write(true).open(b.path("d/d")).unwrap();
    full.set_modified(later).unwrap();
    // A manifest settles what the times of files only hint at.
    assert_eq!(b.shown(), ["d: d", "d: d < INC-7-d"]);
    assert_eq!(b.why("INC-5-d").kind, Kind::Changed);
    assert!(b.why("INC-6-d").path.ends_with("INC-5-d"));
    full.set_modified(std::time::UNIX_EPOCH).unwrap();
    assert_eq!(b.shown().len(), 4);
}

#[test]
fn a_full_that_is_only_a_link_to_the_outside_is_missing() {
    let outside = tempfile::tempdir().unwrap();
    let b = Backups::new();
    std::fs::write(outside.path().join("d"), tree::tiny(None)).unwrap();
    b.link("d/FULL-d", &outside.path().join("d"));
    b.image("d/INC-5-d", None);
    assert!(b.shown().is_empty());
    assert!(b.findings().iter().any(|f| f.path.ends_with("d/FULL-d")));
    assert_eq!(b.why("INC-5-d").kind, Kind::Incomplete);
}

#[test]
fn a_copy_that_overwrote_the_full_carries_no_increments() {
    let b = Backups::new();
    b.image("d/d", None);
    b.image("d/INC-5-d", None);
    b.link("d/FULL-d", &b.path("d/d"));
    b.link("d/COPY-d", &b.path("d/d"));
    assert_eq!(b.shown(), ["d: d"]);
}

#[test]
fn two_files_that_may_both_be_the_full_carry_no_increments() {
    // `cp -L` makes a file of the link; nothing says that the two are the same.
    let b = Backups::new();
    b.image("d/d", None);
    b.image("d/FULL-d", None);
    b.image("d/INC-5-d", None);
    b.image("e/e", None);
    b.image("e/FULL-1-e", None);
    b.image("e/INC-5-e", None);
    b.image("e/INC-6-e", Some("INC-5-e"));
    b.link("e/FULL-e", Path::new("e"));
    assert_eq!(b.shown(), ["d: FULL-d", "d: d", "e: e", "e: FULL-1-e"]);
    assert!(b.why("INC-5-d").remedy.is_some());
}

#[test]
fn an_unfinished_backup_is_told_of() {
    let b = Backups::new();
    b.image("d/FULL-1-d.qcow2", None);
    b.image("d/INC-2-d.qcow2.partial", None);
    let findings = b.findings();
    assert_eq!((findings.len(), findings[0].severity), (1, Severity::Note));
    b.image("d/INC-3-d.qcow2", None);
    assert_eq!(b.findings()[0].severity, Severity::Warning);
    manifest(&b.path("d"), "INC-3-d.qcow2", Level::Inc, Some("FULL-1-d.qcow2"), 0);
    assert_eq!(b.findings()[0].severity, Severity::Note);
    b.image("alone/FULL-1-x.partial", None);
    assert_eq!(b.scan().disks.len(), 1);
    assert_eq!(b.findings().len(), 2);
}

#[test]
fn links_are_not_followed_and_loops_do_not_hang() {
    let outside = tempfile::tempdir().unwrap();
    std::fs::write(outside.path().join("FULL-1-x"), tree::tiny(None)).unwrap();
    let b = Backups::new();
    b.image("d/FULL-1-d", None);
    b.link("d/loop", Path::new("."));
    b.link("up", Path::new(".."));
    b.link("outside", outside.path());
    b.link("d/INC-2-d", &outside.path().join("FULL-1-x"));
    b.link("d/FULL-3-d", &outside.path().join("FULL-1-x"));
    b.link("d/FULL-self", Path::new("FULL-self"));
    b.link("d/image", &b.path("d/FULL-1-d"));
    // An increment does not become a FULL because a link calls it so.
    b.image("e/FULL-1-e", None);
    b.image("e/INC-2-e", None);
    b.link("e/FULL-f", &b.path("e/INC-2-e"));
    assert_eq!(b.shown(), ["d: FULL-1-d", "e: FULL-1-e", "e: FULL-1-e < INC-2-e"]);
    // Each is told once, with where it leads and what to do.
    for (link, what, remedy) in [
        ("d/INC-2-d", "a symbolic link, which is not followed, where a backup should be", "itself"),
        ("d/FULL-3-d", "where a backup should be: it leads to", "put the image itself here"),
        ("d/FULL-self", "it leads to FULL-self, which is not in this", "put the image self into"),
        ("e/FULL-f", "which is no FULL or COPY", "remove the link"),
    ] {
        let told: Vec<_> = b.findings().into_iter().filter(|f| f.path == b.path(link)).collect();
        assert_eq!(told.len(), 1, "{link}: {told:?}");
        assert!(told[0].message.contains(what), "{link}: {}", told[0].message);
        assert!(told[0].remedy.as_ref().unwrap().contains(remedy), "{:?}", told[0].remedy);
    }
}

#[test]
fn what_is_no_point_is_not_shown() {
    let b = Backups::new();
    b.image("d/FULL-1-d", None);
    b.image("d/INC-2-d.partial", None);
    b.image("d/FULL-1-node.fleece.qcow2", None);
    b.image("d/.INC-2-d.Xq31", None);
    b.image("d/.fleecefs/FULL-3-d", None);
    b.image("d/d.config", None);
    b.file("d/FULL-1-d.sha256", b"0123  FULL-1-d");
    b.file("d/notes.txt", b"hello");
    b.file("d/FULL-story.txt", b"once upon a time");
    b.file("vmlinuz", &[7; 100]);
    // A disk that is called like another and a number is no file beside it.
    b.file("flat/FULL-1-sda", &[7; 512]);
    b.file("flat/FULL-1-sda.1", &[7; 512]);
    assert_eq!(b.shown(), ["d: FULL-1-d", "flat/sda: FULL-1-sda", "flat/sda.1: FULL-1-sda.1"]);
}

#[test]
fn other_images_are_disks_of_their_own() {
    let b = Backups::new();
    b.image("vm/noextension", None);
    b.image("vm/over.qcow2", Some("base/base.img"));
    b.file("vm/base/base.img", &[1; 512]);
    b.file("vm/fake.qcow2", b"no magic here");
    b.file("vm/zip.img", b"\x1f\x8b\x08\0 and so on");
    b.file("vm/empty.raw", b"");
    b.file("vm/parallels.img", b"WithouFreSpacExt and so on");
    b.file("vm/cowd.img", b"COWD\x01\0\0\0");
    assert_eq!(
        b.shown(),
        [
            "vm/base/base.img: base.img",
            "vm/noextension: noextension",
            "vm/over.qcow2: base.img < over.qcow2",
        ]
    );
    assert_eq!(b.why("fake.qcow2").kind, Kind::Corrupt);
    for other in ["zip.img", "parallels.img", "cowd.img"] {
        assert_eq!(b.why(other).kind, Kind::Unsupported, "{other}");
    }
    assert_eq!(b.why("empty.raw").kind, Kind::Corrupt);
    assert_eq!(b.scan().disks[0].points[0].level, Level::Image);
}

#[test]
fn raw_fulls_are_served_and_raw_increments_are_not_unless_a_manifest_says_that_they_are_whole() {
    let b = Backups::new();
    for name in ["FULL-1-r.raw", "INC-2-r.raw", "INC-3-r.raw", "INC-4-r.raw"] {
        b.file(&format!("r/{name}"), &[1; 1024]);
    }
    b.file("s/FULL-1-s", &[1; 512]);
    b.file("s/COPY-2-s", &[1; 512]);
    raw_manifest(&b.path("r"), "INC-3-r.raw", manifests::Contents::Full);
    raw_manifest(&b.path("r"), "INC-4-r.raw", manifests::Contents::DirtyOnly);
    let expected = ["r: FULL-1-r.raw", "r: INC-3-r.raw", "s: FULL-1-s", "s: COPY-2-s"];
    assert_eq!(b.shown(), expected);
    assert_eq!(b.why("INC-2-r.raw").kind, Kind::Unsupported);
    assert_eq!(b.why("INC-4-r.raw").kind, Kind::Unsupported);
}

#[test]
fn a_damaged_qcow2_full_is_not_taken_for_a_raw_one() {
    let b = Backups::new();
    b.file("a.qcow2/FULL-1-a.qcow2", &[1; 4096]);
    b.image("a.qcow2/INC-2-a.qcow2", None);
    b.file("b/FULL-1-b", &[1; 4096]);
    b.image("b/INC-2-b", None);
    b.file("c/FULL-1-c", b"");
    assert!(b.shown().is_empty(), "{:?}", b.shown());
    let why = b.why("INC-2-a.qcow2");
    assert_eq!((why.kind, why.offset), (Kind::Incomplete, Some(0)));
    assert!(why.path.ends_with("FULL-1-a.qcow2") && why.remedy.is_some());
    assert_eq!(b.why("FULL-1-b").kind, Kind::Corrupt);
    assert_eq!(b.why("FULL-1-c").kind, Kind::Corrupt);
}

#[test]
fn a_qcow2_file_with_damaged_magic_is_never_raw() {
    let b = Backups::new();
    let spoilt = |len: usize| {
        let mut image = tree::tiny(None);
        image[0] ^= 1;
        image.resize(len, 0);
        image
    };
    // By its manifest, alone and under increments.
    b.file("a.img/FULL-1-a.img", &spoilt(4096));
    b.image("a.img/INC-2-a.img", None);
    manifest(&b.path("a.img"), "FULL-1-a.img", Level::Full, None, 0);
    manifest(&b.path("a.img"), "INC-2-a.img", Level::Inc, Some("FULL-1-a.img"), 0);
    // By a COPY beside it, by the disk's own format, by what follows the magic, by what is left.
    b.file("b/FULL-1-b", &spoilt(4096));
    b.image("b/COPY-2-b", None);
    b.file("c/FULL-1-c", &spoilt(4096));
    b.file("c.config", br#"{"format": "qcow2", "children": []}"#);
    let mut header = spoilt(4096);
    header[0..4].fill(0);
    header[45] = 3;
    header[53] = 1;
    b.file("d/COPY-1-d", &header);
    b.file("e/FULL-1-e", b"QFI");
    // A manifest that says raw, and one of another size.
    b.file("f/FULL-1-f", &spoilt(4096));
    b.file("f/INC-2-f", &[1; 512]);
    raw_manifest(&b.path("f"), "INC-2-f", manifests::Contents::Full);
    b.file("f/INC-2-f", &[1; 1024]);
    b.file("f.config", br#"{"format": "raw"}"#);
    assert_eq!(b.shown(), ["b: COPY-2-b", "f: FULL-1-f"]);
    for name in ["FULL-1-a.img", "FULL-1-b", "FULL-1-c", "COPY-1-d", "FULL-1-e"] {
        assert_eq!(b.why(name).kind, Kind::Corrupt, "{name}");
    }
    assert_eq!(b.why("INC-2-a.img").kind, Kind::Incomplete);
    assert_eq!(b.why("INC-2-f").kind, Kind::Changed);
    // Whatever a raw image begins with.
    b.image("f/INC-2-f", None);
    assert_eq!(b.why("INC-2-f").kind, Kind::Changed);
    let mut disk = tree::tiny(Some("FULL-1-f"));
    disk.resize(512, 0);
    b.file("f/INC-2-f", &disk);
    assert_eq!(b.shown(), ["b: COPY-2-b", "f: FULL-1-f", "f: INC-2-f"]);
}

#[test]
fn names_that_are_no_text_and_names_that_would_escape() {
    let b = Backups::new();
    let name = std::ffi::OsStr::from_bytes(b"FULL-1-d\xff");
    std::fs::write(b.root().join(name), tree::tiny(None)).unwrap();
    b.image("d/FULL-1-..", None);
    b.image("FULL-1-.fleecefs", None);
    let catalog = b.scan();
    let paths: Vec<_> = catalog.disks.iter().map(|d| d.path.as_os_str().as_bytes()).collect();
    assert!(paths.contains(&&b"d\xff"[..]), "{paths:?}");
    for disk in &catalog.disks {
        assert!(!disk.path.starts_with(".fleecefs") && !disk.path.starts_with(".."));
        assert!(disk.path.components().all(|c| matches!(c, std::path::Component::Normal(_))));
    }
    let text = tree::fleecefs(&["list", "--json", b.root().to_str().unwrap()]);
    assert!(text.status.success(), "{}", String::from_utf8_lossy(&text.stderr));
}

#[test]
fn internal_snapshots_are_points() {
    if !tools::have("internal_snapshots_are_points", &["qemu-img"]) {
        return;
    }
    let b = Backups::new();
    let path = b.path("d/FULL-1000-d.qcow2");
    std::fs::create_dir_all(b.path("d")).unwrap();
    let qemu_img =
        |args: &[&str]| tools::run("qemu-img", &[args, &[path.to_str().unwrap()]].concat());
    tools::run("qemu-img", &["create", "-q", "-f", "qcow2", path.to_str().unwrap(), "1M"]);
    for name in ["FULL-BACKUP", "2024-01-26-09:17:26", "a/b", "2024-01-26-09:17:26"] {
        qemu_img(&["snapshot", "-c", name]);
    }
    b.image("d/INC-1900000000-d.qcow2", None);
    let catalog = b.scan();
    let points = &catalog.disks[0].points;
    let names: Vec<_> = points.iter().map(|p| p.name.as_str()).collect();
    assert_eq!(
        names,
        [
            "FULL-1000-d.qcow2@FULL-BACKUP",
            "FULL-1000-d.qcow2@2024-01-26-09:17:26",
            "FULL-1000-d.qcow2@a_b",
            "FULL-1000-d.qcow2@2024-01-26-09:17:26#4",
            "FULL-1000-d.qcow2",
            "INC-1900000000-d.qcow2",
        ]
    );
    assert!(points.iter().all(|p| p.is_served()));
    assert_eq!(points[0].time, 1000);
    // Its names are in local time: within a day of UTC.
    assert!((points[1].time - 1_706_260_646).abs() <= 86_400);
    assert!(points[4].time >= points[1].time);
    assert_eq!((points[1].level, points[1].size), (Level::Snapshot, 1 << 20));
    assert_eq!(points[5].parent, Some(4));
}

/// A tiny image whose snapshots have one id and one name; each is one sector larger than the last.
fn twins(count: u32) -> Vec<u8> {
    let mut image = tree::tiny(None);
    image[23] = 9;
    image[60..64].copy_from_slice(&count.to_be_bytes());
    image[64..72].copy_from_slice(&512u64.to_be_bytes());
    image.resize(512, 0);
    for i in 0..count {
        let mut entry = [0; 40 + 16 + 8];
        // One L1 entry, in the middle of nowhere but inside the file; lengths of id and name; extra.
        entry[8..12].copy_from_slice(&1u32.to_be_bytes());
        entry[13] = 1;
        entry[15] = 1;
        entry[36..40].copy_from_slice(&16u32.to_be_bytes());
        entry[48..56].copy_from_slice(&(u64::from(i % 64) * 512).to_be_bytes());
        entry[56..58].copy_from_slice(b"7x");
        image.extend(entry);
    }
    image
}

#[test]
fn snapshots_of_one_id_are_told_apart() {
    let b = Backups::new();
    b.file("d/FULL-1-d", &twins(3));
    let catalog = b.scan();
    let points = &catalog.disks[0].points;
    let names: Vec<_> = points.iter().map(|p| (p.name.as_str(), p.size)).collect();
    let expected = [("FULL-1-d@x", 0), ("FULL-1-d@x#7", 512), ("FULL-1-d@x#7-3", 1024)];
    assert_eq!(names[..3], expected);
    for point in &points[..3] {
        let layer = fleecefs::layer::open(&point.layers[0]).unwrap();
        assert_eq!(layer.size(), point.size, "{}", point.name);
    }
}

#[test]
fn as_many_snapshots_as_there_may_be_take_no_quadratic_time() {
    let b = Backups::new();
    b.file("d/FULL-1-d", &twins(65536));
    let catalog = b.scan();
    assert_eq!(catalog.disks[0].points.len(), 65537);
    assert!(catalog.disks[0].points.iter().all(|p| p.is_served()));
    // QEMU does not read longer tables, and nor do we.
    let mut entry = twins(1)[512..].to_vec();
    entry[12..16].fill(0xff);
    entry.resize((40 + 16 + 2 * 0xffff_usize).next_multiple_of(8), b'x');
    let count = (65 << 20) / entry.len() as u32;
    let mut long = twins(0);
    long[60..64].copy_from_slice(&count.to_be_bytes());
    (0..count).for_each(|_| long.extend(&entry));
    b.file("d/FULL-1-d", &long);
    let catalog = b.scan();
    assert_eq!(catalog.disks[0].points.len(), 1);
    assert!(catalog.disks[0].findings.iter().any(|f| f.message.contains("too long")));
}

#[test]
fn a_data_file_belongs_to_its_image() {
    if !tools::have("a_data_file_belongs_to_its_image", &["qemu-img"]) {
        return;
    }
    let b = Backups::new();
    let outside = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(b.path("d")).unwrap();
    let create = |image: &str, data: &Path| {
        let option = format!("data_file={}", data.display());
        let image = b.path(image);
        let image = image.to_str().unwrap();
        tools::run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &option, image, "1M"]);
    };
    create("d/FULL-1-d.qcow2", &b.path("d/FULL-1-d.data.raw"));
    b.image("d/INC-2-d.qcow2", None);
    create("out.qcow2", &outside.path().join("x.raw"));
    create("gone.qcow2", &b.path("gone.raw"));
    std::fs::remove_file(b.path("gone.raw")).unwrap();
    let expected = ["d: FULL-1-d.qcow2", "d: FULL-1-d.qcow2 < INC-2-d.qcow2"];
    assert_eq!(b.shown(), expected);
    let catalog = b.scan();
    let data = catalog.disks[0].points[0].layers[0].data_file.as_ref().unwrap();
    assert!(data.path().ends_with("FULL-1-d.data.raw"));
    assert_eq!(b.why("out.qcow2").kind, Kind::Incomplete);
    assert_eq!(b.why("gone.qcow2").kind, Kind::Incomplete);
}

#[test]
fn a_rescan_keeps_what_is_unchanged() {
    let b = Backups::new();
    b.image("d/FULL-1-d", None);
    b.image("d/INC-2-d", None);
    let options = ScanOptions::default();
    let (before, cache) = scan(b.root(), &options, None).unwrap();
    b.image("d/INC-3-d", None);
    b.image("d/INC-2-d", Some("FULL-1-d"));
    // Another name for the same bytes changes nothing.
    std::fs::hard_link(b.path("d/FULL-1-d"), b.path("other")).unwrap();
    let (after, cache) = scan(b.root(), &options, Some(&cache)).unwrap();
    let file = |c: &fleecefs::chain::Catalog, i: usize| c.disks[0].points[i].layers[0].file.clone();
    assert!(Arc::ptr_eq(&file(&before, 0), &file(&after, 0)));
    assert!(!Arc::ptr_eq(&file(&before, 1), &file(&after, 1)));
    assert_eq!(after.disks[0].points.len(), 3);
    std::fs::remove_file(b.path("d/INC-3-d")).unwrap();
    let (last, cache) = scan(b.root(), &options, Some(&cache)).unwrap();
    assert_eq!((last.disks[0].points.len(), cache.len()), (2, 3));
}

#[test]
fn a_folder_can_be_left_out() {
    let b = Backups::new();
    b.image("d/FULL-1-d", None);
    b.image("mnt/d/FULL-1-d", None);
    let options = ScanOptions { skip: vec![b.root().join("mnt")], ..ScanOptions::default() };
    let (catalog, _) = scan(b.root(), &options, None).unwrap();
    assert_eq!(catalog.disks.len(), 1);
}

#[test]
fn only_the_directory_itself_is_an_error() {
    let b = Backups::new();
    b.file("plain", b"x");
    let options = ScanOptions::default();
    assert!(scan(&b.path("nowhere"), &options, None).is_err());
    assert!(scan(&b.path("plain"), &options, None).is_err());
    assert!(scan(b.root(), &options, None).unwrap().0.disks.is_empty());
}

#[test]
fn a_pipe_does_not_hang() {
    let b = Backups::new();
    b.image("d/FULL-1-d", None);
    let fifo = std::ffi::CString::new(b.path("d/INC-2-d").as_os_str().as_bytes()).unwrap();
    // SAFETY: a valid C string.
    assert_eq!(unsafe { libc::mkfifo(fifo.as_ptr(), 0o600) }, 0);
    assert_eq!(b.shown(), ["d: FULL-1-d"]);
}

#[test]
fn list_says_what_was_checked_and_what_was_not() {
    let b = Backups::new();
    b.image("d/FULL-1706260639-d", None);
    b.image("d/INC-1706260646-d", None);
    b.file("e/FULL-1-e.qcow2", b"bad\x1b[31m");
    let root = b.root().to_str().unwrap();
    let out = tree::fleecefs(&["list", root]);
    let text = String::from_utf8(out.stdout).unwrap();
    assert!(out.status.success());
    assert!(text.contains("2024-01-26T09:17:26Z") && text.contains("not verified"), "{text}");
    assert!(text.contains("unavailable:") && text.contains("findings:"), "{text}");
    assert_eq!(tree::fleecefs(&["list", "--strict", root]).status.code(), Some(12));

    let out = tree::fleecefs(&["list", "--json", root]);
    let json: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    let points = &json["disks"][0]["points"];
    assert_eq!(points[1]["parent"], "FULL-1706260639-d");
    assert_eq!(points[1]["time"], "2024-01-26T09:17:26Z");
    assert_eq!((&points[1]["served"], &points[1]["checked"]), (&true.into(), &false.into()));
    let bad = &json["disks"][1]["points"][0];
    assert_eq!((&bad["served"], &bad["unavailable"]["kind"]), (&false.into(), &"corrupt".into()));
    let missing: PathBuf = b.path("nowhere");
    assert_eq!(tree::fleecefs(&["list", missing.to_str().unwrap()]).status.code(), Some(3));
}
