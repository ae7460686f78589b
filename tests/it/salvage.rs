//! The promise: of a backup that is cut or flagged, all that is whole is served; `restore --salvage`
//! takes it out; and no finding sends a user for another copy where nothing is damaged.

use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::support::foreign;
use crate::support::tools::{have, run};
use crate::support::tree::{Backups, fleecefs};

const CLUSTER: usize = 64 << 10;

fn salvage(b: &Backups, point: &str) -> (i32, String, Option<Vec<u8>>) {
    let outside = tempfile::tempdir().unwrap();
    let target = outside.path().join("out.raw");
    let args = ["restore", b.root().to_str().unwrap(), point, target.to_str().unwrap()];
    let out = fleecefs(&[&args[..], &["--salvage"]].concat());
    let said = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
    (out.status.code().unwrap_or(-1), said, std::fs::read(target).ok())
}

/// Without --salvage nothing is restored that lacks something: the exit code, and the disk.
fn plain(b: &Backups, point: &str) -> (i32, Option<Vec<u8>>) {
    let outside = tempfile::tempdir().unwrap();
    let target = outside.path().join("out.raw");
    let args = ["restore", b.root().to_str().unwrap(), point, target.to_str().unwrap()];
    let code = fleecefs(&args).status.code().unwrap_or(-1);
    (code, std::fs::read(target).ok())
}

#[test]
fn a_cut_stream_is_salvaged_up_to_the_cut() {
    let b = Backups::new();
    let data = [(0, vec![0x41; CLUSTER]), (8 * CLUSTER, vec![0x42; 4 * CLUSTER])];
    let mut bytes = foreign::stream("sda", 0, 16 * CLUSTER, &data);
    bytes.truncate(bytes.len() - 2 * CLUSTER);
    b.file("sda.full.data", &bytes);
    assert_eq!(plain(&b, "sda.full.data"), (10, None));
    let (code, said, out) = salvage(&b, "sda.full.data");
    assert_eq!(code, 16, "{said}");
    let out = out.unwrap();
    assert_eq!(out.len(), 16 * CLUSTER);
    assert!(out[..CLUSTER].iter().all(|b| *b == 0x41));
    assert!(out[8 * CLUSTER..10 * CLUSTER - 4096].iter().all(|b| *b == 0x42));
    assert!(out[10 * CLUSTER..].iter().all(|b| *b == 0));
    // It is said before anybody reads it.
    assert!(b.findings().iter().any(|f| f.path.ends_with("sda.full.data")));
    let out = fleecefs(&["verify", b.root().to_str().unwrap()]);
    assert_eq!(out.status.code(), Some(18));
}

#[test]
fn a_cut_archive_is_salvaged_up_to_the_cut() {
    let b = Backups::new();
    let whole = foreign::archive(5, 6);
    b.file("a.vma", &whole[..whole.len() - 1]);
    let (code, said, out) = salvage(&b, "a.vma");
    assert_eq!((code, out), (10, None), "nothing of it is whole: {said}");
}

#[test]
fn an_image_that_is_marked_corrupt_is_read_but_for_what_two_claim() {
    if !have("an_image_that_is_marked_corrupt_is_read", &["qemu-img", "qemu-io"]) {
        return;
    }
    let b = Backups::new();
    std::fs::create_dir(b.path("sda")).unwrap();
    let path = b.path("sda/FULL-1-sda.qcow2");
    let image = path.to_str().unwrap();
    run("qemu-img", &["create", "-q", "-f", "qcow2", image, "4M"]);
    run("qemu-io", &["-c", "write -P 0x41 0 4M", image]);
    let file = std::fs::File::options().read(true).write(true).open(&path).unwrap();
    file.write_all_at(&[2], 79).unwrap();
    let (code, said, out) = salvage(&b, "FULL-1-sda.qcow2");
    assert_eq!(code, 0, "nothing is lost: {said}");
    assert!(out.unwrap().iter().all(|b| *b == 0x41));
    assert!(b.findings().iter().any(|f| f.message.contains("marked the image as corrupt")));
    let out = fleecefs(&["verify", b.root().to_str().unwrap()]);
    assert_eq!(out.status.code(), Some(18));
    // Two guest clusters in one place: neither is proved.
    let mut word = [0; 8];
    let be = |at: u64, word: &mut [u8; 8]| {
        file.read_exact_at(word, at).unwrap();
        u64::from_be_bytes(*word)
    };
    let l2 = be(be(40, &mut word), &mut word) & 0x00ff_ffff_ffff_fe00;
    let entry = be(l2 + 5 * 8, &mut word);
    file.write_all_at(&entry.to_be_bytes(), l2 + 9 * 8).unwrap();
    assert_eq!(plain(&b, "FULL-1-sda.qcow2"), (10, None));
    let (code, said, out) = salvage(&b, "FULL-1-sda.qcow2");
    assert_eq!(code, 16, "{said}");
    let out = out.unwrap();
    for (i, cluster) in out.chunks(CLUSTER).enumerate() {
        let wanted = if [5, 9].contains(&i) { 0 } else { 0x41 };
        assert!(cluster.iter().all(|b| *b == wanted), "cluster {i}");
    }
}

#[test]
fn raw_files_in_virtnbdbackups_folders_are_read() {
    let mut disk = vec![0x41; CLUSTER];
    disk.resize(16 * CLUSTER, 0);
    let json = |size: usize| format!("{{\"format\": \"qcow2\", \"virtual-size\": {size}}}");
    for (name, beside) in [
        ("vda.copy.data", Some("vda.copy.qcow.json")),
        ("vda.copy.data", None),
        ("vda.full.data", Some("vda.full.qcow.json")),
        ("vda.full.data", Some("vda.virtnbdbackup.0.qcow.json")),
    ] {
        let b = Backups::new();
        b.file(name, &disk);
        if let Some(beside) = beside {
            b.file(beside, json(disk.len()).as_bytes());
        }
        assert!(b.findings().is_empty(), "{name} {beside:?}: {:?}", b.findings());
        let (code, out) = plain(&b, name);
        assert!(code == 0 && out.unwrap() == disk, "{name} {beside:?}");
    }
    // Its guest may have written a stream to it.
    let mut lies = foreign::stream("vda", 0, 2 * CLUSTER, &[(0, vec![7; CLUSTER])]);
    lies.resize(16 * CLUSTER, 0);
    let b = Backups::new();
    b.file("vda.full.data", &lies);
    b.file("vda.full.qcow.json", json(lies.len()).as_bytes());
    assert!(plain(&b, "vda.full.data") == (0, Some(lies)));
    // And what is neither is damaged.
    let b = Backups::new();
    b.file("vda.full.data", &disk[..8 * CLUSTER]);
    b.file("vda.full.qcow.json", json(disk.len()).as_bytes());
    assert_eq!(plain(&b, "vda.full.data"), (10, None));
}

#[test]
fn an_old_format_is_named_with_what_to_do() {
    if !have("an_old_format_is_named_with_what_to_do", &["qemu-img"]) {
        return;
    }
    let b = Backups::new();
    let path = b.path("old.qcow");
    run("qemu-img", &["create", "-q", "-f", "qcow", path.to_str().unwrap(), "1M"]);
    assert_eq!(plain(&b, "old.qcow"), (11, None));
    let why = b.why("old.qcow");
    assert!(why.message.contains("version 1"), "{why}");
    let remedy = why.remedy.unwrap();
    assert!(remedy.contains("qemu-img convert") && !remedy.contains("another copy"), "{remedy}");
}

#[test]
fn latest_says_why_there_is_none() {
    let b = Backups::new();
    b.file("sda/INC-1700000100-sda.qcow2", b"XXXX");
    assert_eq!(plain(&b, "INC-1700000100-sda.qcow2"), (10, None));
    assert_eq!(plain(&b, "sda/latest"), (10, None));
    assert_eq!(plain(&b, "sdb/latest"), (3, None));
}

#[test]
fn what_is_behind_a_link_is_an_omission() {
    let b = Backups::new();
    let outside = tempfile::tempdir().unwrap();
    let strict = || {
        let out = fleecefs(&["list", "--strict", b.root().to_str().unwrap()]);
        (out.status.code(), String::from_utf8_lossy(&out.stdout).into_owned())
    };
    b.image("vm1/FULL-1700000000-sda.qcow2", None);
    b.link("inside", Path::new("vm1"));
    b.link("vm1/image", Path::new("/somewhere/else/INC-1700000000-sda.qcow2"));
    assert_eq!(strict().0, Some(0), "{}", strict().1);
    for name in ["vm2", "x.qcow2"] {
        b.link(name, &outside.path().join(name));
        let (code, said) = strict();
        assert_eq!(code, Some(12), "{said}");
        assert!(said.contains("a symbolic link that leads out of the backup directory"), "{said}");
        std::fs::remove_file(b.path(name)).unwrap();
    }
    assert_eq!(strict().0, Some(0));
}

#[test]
fn an_image_in_a_format_that_is_not_read_is_an_omission() {
    let b = Backups::new();
    b.image("vm1/FULL-1700000000-sda.qcow2", None);
    let strict = || {
        let out = fleecefs(&["list", "--strict", b.root().to_str().unwrap()]);
        (out.status.code(), String::from_utf8_lossy(&out.stdout).into_owned())
    };
    // What people keep beside backups.
    for name in ["notes.gz", "vm1/log.zst", "tools.zip", "vm1/disk.json", "key.gpg"] {
        b.file(name, &[7; 512]);
    }
    assert_eq!(strict().0, Some(0), "{}", strict().1);
    for name in ["old.vmdk", "vm2/disk.vdi", "disk.qcow2.gz", "vm2/sda.RAW.zst", "win.vhdx"] {
        b.file(name, &[7; 512]);
        let (code, said) = strict();
        assert_eq!(code, Some(12), "{said}");
        let finding = format!(
            "warning: {name}: a format that is not read, by its name: skipped (unpack or convert it"
        );
        assert!(said.contains(&finding), "{said}");
        std::fs::remove_file(b.path(name)).unwrap();
    }
}

/// An image of 1 GiB, the first 4 MiB of it written, that is marked as corrupt.
struct Marked {
    b: Backups,
    file: std::fs::File,
}

impl Marked {
    fn new() -> Marked {
        let b = Backups::new();
        let path = b.path("sda.qcow2");
        let image = path.to_str().unwrap();
        run("qemu-img", &["create", "-q", "-f", "qcow2", image, "1G"]);
        run("qemu-io", &["-c", "write -P 0x41 0 4M", image]);
        run("qemu-img", &["snapshot", "-c", "one", image]);
        let file = std::fs::File::options().read(true).write(true).open(&path).unwrap();
        let marked = Marked { b, file };
        marked.file.write_all_at(&[2], 79).unwrap();
        marked
    }

    fn word(&self, at: u64) -> u64 {
        let mut word = [0; 8];
        self.file.read_exact_at(&mut word, at).unwrap();
        u64::from_be_bytes(word)
    }

    fn set(&self, at: u64, word: u64) {
        self.file.write_all_at(&word.to_be_bytes(), at).unwrap();
    }

    fn l2(&self) -> u64 {
        self.word(self.word(40)) & 0x00ff_ffff_ffff_fe00
    }

    /// The first bytes of guest clusters 0 and 3, or why they cannot be read.
    fn read(&self) -> [Result<u8, String>; 2] {
        let catalog = self.b.scan();
        let disk = &catalog.disks[0];
        let whole = disk.points.iter().position(|p| p.name == "sda.qcow2").unwrap();
        let cache = fleecefs::image::Cache::new(1 << 20);
        let image = fleecefs::image::open_point(disk, whole, &cache).unwrap();
        [0, 3].map(|i| {
            let mut byte = [0];
            let read = image.read_at(&mut byte, i * CLUSTER as u64);
            read.map(|_| byte[0]).map_err(|e| e.report())
        })
    }
}

/// Clusters that metadata claims are found, or nothing of the image is read.
#[test]
fn of_a_marked_image_all_that_claims_clusters_is_looked_into() {
    if !have("of_a_marked_image_all_that_claims_clusters_is_looked_into", &["qemu-img", "qemu-io"])
    {
        return;
    }
    let read = |change: &dyn Fn(&Marked)| {
        let marked = Marked::new();
        change(&marked);
        marked.read()
    };
    assert_eq!(read(&|_| {}), [Ok(0x41), Ok(0x41)]);
    // A refcount block in two places, and one behind that which is a guest's cluster, too.
    let blocks = |m: &Marked| {
        let table = m.word(48);
        m.set(table + 8, m.word(table));
        m.set(table + 16, m.word(m.l2() + 3 * 8) & 0x00ff_ffff_ffff_fe00);
    };
    let [first, third] = read(&blocks);
    assert!(first == Ok(0x41) && third.is_err(), "{first:?} {third:?}");
    let refused = |change: &dyn Fn(&Marked), what: &str| {
        for said in read(change) {
            let said = said.unwrap_err();
            assert!(said.contains(what) && said.contains("sda.qcow2"), "{said}");
        }
    };
    let unknown = "clusters in use twice cannot be found";
    refused(&|m| m.set(48, 1 << 40), unknown);
    // The snapshot table, the snapshot's L1 table, and an L2 table that is not where it could be.
    refused(&|m| m.set(64, 1 << 40), unknown);
    refused(&|m| m.set(m.word(64), 1 << 40), unknown);
    refused(&|m| m.set(m.word(40) + 8, 1 << 40), unknown);
    // Zeros that are said to have places all over the largest file that there may be.
    let wide = |m: &Marked| {
        let words = (64..8192u64).flat_map(|i| (i << 31 | 1).to_be_bytes()).collect::<Vec<_>>();
        m.file.write_all_at(&words, m.l2() + 64 * 8).unwrap();
    };
    refused(&wide, "too far apart");
}

/// Each range that is lost is told once, with its own reason.
#[test]
fn what_is_lost_is_told_once() {
    if !have("what_is_lost_is_told_once", &["qemu-img", "qemu-io"]) {
        return;
    }
    let marked = Marked::new();
    // Not marked as corrupt: two clusters that point nowhere, for different reasons.
    marked.file.write_all_at(&[0], 79).unwrap();
    marked.set(marked.l2() + 8 * 3, 1 << 63 | 0x7fff_0000);
    marked.set(marked.l2() + 8 * 9, 1 << 63 | 0x1_0200);
    let (code, said, _) = salvage(&marked.b, "sda.qcow2/sda.qcow2");
    assert_eq!(code, 16, "{said}");
    let lines: Vec<&str> = said.lines().filter(|l| l.starts_with("error: ")).collect();
    let [first, second] = lines.as_slice() else { panic!("{said}") };
    assert!(first.contains("65536 bytes at 0x30000 are zeros") && first.contains("past the end"));
    assert!(
        second.contains("65536 bytes at 0x90000 are zeros") && !second.contains("past the end")
    );
    // A plan says it once as well.
    let root = marked.b.root().to_str().unwrap();
    let out = fleecefs(&["restore", "-n", root, "sda.qcow2/sda.qcow2", "/nowhere.raw"]);
    let said = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
    assert_eq!(said.matches("past the end").count(), 1, "{said}");
}

/// What a manifest says of the length is no reason against what is left.
#[test]
fn a_cut_image_with_a_manifest_is_salvaged_up_to_the_cut() {
    if !have("a_cut_image_with_a_manifest_is_salvaged_up_to_the_cut", &["qemu-img", "qemu-io"]) {
        return;
    }
    let b = Backups::new();
    let path = b.root().join("FULL-1-sda.qcow2");
    let image = path.to_str().unwrap();
    run("qemu-img", &["create", "-q", "-f", "qcow2", image, "4M"]);
    run("qemu-io", &["-c", "write -P 0x41 0 4M", image]);
    assert_eq!(
        fleecefs(&["verify", "--create", b.root().to_str().unwrap()]).status.code(),
        Some(0)
    );
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    let len = file.metadata().unwrap().len();
    // The upper 1 MiB of guest data and what may follow.
    file.set_len(len - (1 << 20)).unwrap();
    assert_eq!(plain(&b, "FULL-1-sda.qcow2").1, None);
    let (code, said, out) = salvage(&b, "FULL-1-sda.qcow2");
    assert_eq!(code, 16, "{said}");
    let out = out.unwrap();
    assert_eq!(said.matches("past the end of the file").count(), 1, "told twice: {said}");
    let lost = out.chunks(CLUSTER).filter(|c| c.iter().all(|b| *b == 0)).count();
    assert!((1..=16).contains(&lost), "{lost} clusters of zeros: {said}");
    let whole = out.chunks(CLUSTER).filter(|c| c.iter().all(|b| *b == 0x41)).count();
    assert_eq!(lost + whole, 64, "{said}");
}
