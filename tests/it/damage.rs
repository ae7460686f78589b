//! A chain whose second INC is removed, cut, or bit-flipped: what is shown, what errors, and that
//! everything else reads right. Never wrong bytes, never zeros in place of data.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::support::images::{self, Chain, Oracle, Rng};
use crate::support::mount::Mount;
use crate::support::tools::{self, run};
use serde_json::Value;

const TOOLS: [&str; 3] = ["qemu-img", "qemu-io", "/dev/fuse"];
const SIZE: u64 = 4 << 20;
const CLUSTER: usize = 65536;

/// A backup directory with a disk to damage and a disk that has to stay well.
struct Backups {
    dir: tempfile::TempDir,
    victim: Chain,
    healthy: Chain,
    /// The right bytes of each point of the victim and of the healthy disk.
    truth: [Vec<Vec<u8>>; 2],
}

fn backups(options: &str, compressed: bool) -> Backups {
    let dir = images::tempdir();
    let mut rng = Rng(42);
    let mut chain = |name: &str| {
        let mut chain = Chain::new(dir.path(), name);
        for point in 0..4u64 {
            let mut ops = vec![];
            // Every point has its own clusters and shares some with the others.
            for i in 0..16 {
                let at = (point * 8 + i + rng.below(4)) % 64 * CLUSTER as u64;
                let c = if compressed { "-c " } else { "" };
                let op = format!("write {c}-P {} {at} {CLUSTER}", 1 + point * 16 + i);
                if !ops.iter().any(|o: &String| o.contains(&format!(" {at} "))) {
                    ops.push(op);
                }
            }
            chain.point(options, SIZE, &ops);
        }
        chain.finish()
    };
    let (victim, healthy) = (chain("victim"), chain("healthy"));
    let truth = [&victim, &healthy].map(|c| {
        let oracle = Oracle::new(&c.files);
        (0..c.files.len()).map(|i| oracle.bytes(i)).collect()
    });
    Backups { dir, victim, healthy, truth }
}

/// What reading a point gave.
#[derive(Debug, PartialEq)]
enum ReadResult {
    Absent,
    /// The number of 64 KiB blocks that failed with EIO; all others were right.
    Errors(usize),
}

fn look(mount: &Mount, chain: &Chain, i: usize, truth: &[u8]) -> ReadResult {
    let path = mount.point(&chain.name, &chain.files[i]);
    let Ok(file) = File::open(&path) else {
        assert!(!path.exists(), "{} cannot be opened", path.display());
        return ReadResult::Absent;
    };
    assert_eq!(file.metadata().unwrap().len(), truth.len() as u64);
    let mut errors = 0;
    for (n, right) in truth.chunks(CLUSTER).enumerate() {
        let mut buf = vec![0xee; right.len()];
        match file.read_exact_at(&mut buf, (n * CLUSTER) as u64) {
            Ok(()) => assert!(buf == right, "{} block {n}: wrong bytes", path.display()),
            Err(e) => {
                assert_eq!(e.raw_os_error(), Some(libc::EIO), "{e}");
                errors += 1;
            }
        }
    }
    ReadResult::Errors(errors)
}

/// Mounts, checks that the points below the second INC and the other disk are right, and returns
/// what became of the second and third INC, and the findings in status.json afterwards.
fn examine(b: &Backups) -> (ReadResult, ReadResult, Vec<Value>) {
    let mount = Mount::new(b.dir.path());
    for i in 0..4 {
        assert_eq!(
            look(&mount, &b.healthy, i, &b.truth[1][i]),
            ReadResult::Errors(0),
            "healthy {i}"
        );
    }
    for i in 0..2 {
        assert_eq!(look(&mount, &b.victim, i, &b.truth[0][i]), ReadResult::Errors(0), "victim {i}");
    }
    let second = look(&mount, &b.victim, 2, &b.truth[0][2]);
    let third = look(&mount, &b.victim, 3, &b.truth[0][3]);
    let status = std::fs::read(mount.path().join(".fleecefs/status.json")).unwrap();
    (second, third, findings(&serde_json::from_slice(&status).unwrap()))
}

/// All findings anywhere in status.json: objects with a message and a path.
fn findings(value: &Value) -> Vec<Value> {
    match value {
        Value::Object(o) if o.contains_key("message") && o.contains_key("path") => {
            vec![value.clone()]
        }
        Value::Object(o) => o.values().flat_map(findings).collect(),
        Value::Array(a) => a.iter().flat_map(findings).collect(),
        _ => vec![],
    }
}

fn names(findings: &[Value], file: &Path) -> bool {
    findings.iter().any(|f| {
        Path::new(f["path"].as_str().unwrap_or("")).file_name() == file.file_name()
            && f["severity"] == "error"
    })
}

fn flip(path: &Path, offset: u64, bit: u32) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ (1 << bit)], offset).unwrap();
}

fn be64(path: &Path, offset: u64) -> u64 {
    let mut b = [0; 8];
    File::open(path).unwrap().read_exact_at(&mut b, offset).unwrap();
    u64::from_be_bytes(b)
}

/// L1 table, the first used L2 table, the first used L2 entry (its offset in the file).
fn places(path: &Path) -> (u64, u64, u64) {
    let l1 = be64(path, 40);
    let l2 = be64(path, l1) & 0x00ff_ffff_ffff_fe00;
    let entry = (0..64).map(|i| l2 + i * 8).find(|o| be64(path, *o) != 0).unwrap();
    (l1, l2, entry)
}

/// Where the last data cluster ends in the file.
fn end_of_data(path: &Path) -> u64 {
    let (_, l2, _) = places(path);
    let host = (0..64).map(|i| be64(path, l2 + i * 8) & 0x00ff_ffff_ffff_fe00).max();
    host.unwrap() + CLUSTER as u64
}

#[test]
fn a_removed_inc_makes_its_children_unavailable() {
    if !tools::have("a_removed_inc_makes_its_children_unavailable", &TOOLS) {
        return;
    }
    let b = backups("", false);
    // The chain knows its order from backing pointers, as 'qmprestore rebase' leaves it.
    for pair in b.victim.files.windows(2) {
        let (base, top) = (pair[0].file_name().unwrap(), pair[1].to_str().unwrap());
        run(
            "qemu-img",
            &[
                "rebase",
                "-q",
                "-u",
                "-f",
                "qcow2",
                "-F",
                "qcow2",
                "-b",
                base.to_str().unwrap(),
                top,
            ],
        );
    }
    assert_eq!(examine(&b).0, ReadResult::Errors(0));
    std::fs::remove_file(&b.victim.files[2]).unwrap();
    let (second, third, findings) = examine(&b);
    assert_eq!((second, third), (ReadResult::Absent, ReadResult::Absent));
    assert!(names(&findings, &b.victim.files[3]), "{findings:#?}");
}

#[test]
fn a_cut_inc_errs_where_its_bytes_are_gone() {
    if !tools::have("a_cut_inc_errs_where_its_bytes_are_gone", &TOOLS) {
        return;
    }
    // Nothing, a piece of the magic, of the header, of the tables, of the data, one byte short.
    for keep in [Some(0), Some(3), Some(100), Some(65536), Some(200_000), Some(262_152), None] {
        let b = backups("", false);
        let victim = &b.victim.files[2];
        let keep = keep.unwrap_or_else(|| end_of_data(victim) - 1);
        assert!(std::fs::metadata(victim).unwrap().len() > keep);
        OpenOptions::new().write(true).open(victim).unwrap().set_len(keep).unwrap();
        // The third INC may have what the second has lost; wrong bytes are ruled out by examine().
        let (second, _, findings) = examine(&b);
        assert_ne!(second, ReadResult::Errors(0), "cut to {keep}");
        assert!(names(&findings, victim), "cut to {keep}: {findings:#?}");
    }
}

#[test]
fn a_flipped_header_bit_makes_the_point_absent() {
    if !tools::have("a_flipped_header_bit_makes_the_point_absent", &TOOLS) {
        return;
    }
    // Magic, version, cluster bits, encryption, L1 size and offset, incompatible
    // features, header length. (A smaller disk size is plausible: only a manifest tells.)
    let fields = [(0u64, 3u32), (7, 2), (23, 3), (35, 0), (39, 0), (46, 4), (76, 0), (101, 0)];
    // That one says that the image is corrupt, and its clusters that it is not.
    let b = backups("", false);
    flip(&b.victim.files[2], 79, 1);
    let (second, third, findings) = examine(&b);
    assert_eq!((second, third), (ReadResult::Errors(0), ReadResult::Errors(0)));
    let marked = |f: &&Value| f["message"].as_str().is_some_and(|m| m.contains("marked"));
    assert_eq!(findings.iter().filter(marked).count(), 1, "{findings:#?}");
    for (offset, bit) in fields {
        let b = backups("", false);
        flip(&b.victim.files[2], offset, bit);
        let (second, third, findings) = examine(&b);
        assert_eq!(
            (second, third),
            (ReadResult::Absent, ReadResult::Absent),
            "byte {offset} bit {bit}"
        );
        assert!(names(&findings, &b.victim.files[2]), "byte {offset} bit {bit}: {findings:#?}");
    }
}

#[test]
fn a_flipped_table_bit_errs_and_is_never_zeros() {
    if !tools::have("a_flipped_table_bit_errs_and_is_never_zeros", &TOOLS) {
        return;
    }
    // Reserved, unaligned, and far past the end. (A bit that turns one good place into another
    // good place is for 'verify', which knows all tables at once.)
    for bit in [1u32, 3, 9, 15, 30, 40, 55, 57, 61] {
        for table in ["L1", "L2"] {
            let b = backups("", false);
            let victim = &b.victim.files[2];
            let (l1, _, l2_entry) = places(victim);
            let at = if table == "L1" { l1 } else { l2_entry };
            flip(victim, at + 7 - u64::from(bit / 8), bit % 8);
            let (second, _, findings) = examine(&b);
            match second {
                ReadResult::Errors(n) if n > 0 => {}
                other => panic!("{table} bit {bit}: {other:?}"),
            }
            assert!(names(&findings, victim), "{table} bit {bit}: {findings:#?}");
            let offset = findings.iter().find_map(|f| f["offset"].as_u64());
            assert_eq!(offset, Some(at), "{table} bit {bit}: {findings:#?}");
        }
    }
}

#[test]
fn a_flipped_bit_in_compressed_data_errs_for_its_cluster() {
    if !tools::have("a_flipped_bit_in_compressed_data_errs_for_its_cluster", &TOOLS) {
        return;
    }
    for options in ["", "compression_type=zstd"] {
        let b = backups(options, true);
        let victim = &b.victim.files[2];
        let (_, _, entry) = places(victim);
        let host = be64(victim, entry) & ((1 << 54) - 1);
        // The start of the stream: for zstd its magic, for deflate its block type.
        let file = OpenOptions::new().write(true).open(victim).unwrap();
        file.write_all_at(&[0xff; 4], host).unwrap();
        drop(file);
        let (second, _, findings) = examine(&b);
        assert_eq!(second, ReadResult::Errors(1), "{options}");
        assert!(names(&findings, victim), "{options}: {findings:#?}");
    }
}

#[test]
fn a_flipped_data_bit_is_passed_on_as_it_is() {
    if !tools::have("a_flipped_data_bit_is_passed_on_as_it_is", &TOOLS) {
        return;
    }
    // Plain data has no checksum in qcow2; 'verify' compares it with the manifest's hash. The
    // mount shows what is there, and only there.
    let b = backups("", false);
    let victim = &b.victim.files[2];
    let (_, _, entry) = places(victim);
    flip(victim, (be64(victim, entry) & 0x00ff_ffff_ffff_fe00) + 5, 0);
    let mount = Mount::new(b.dir.path());
    let bytes = std::fs::read(mount.point("victim", victim)).unwrap();
    let different = bytes.iter().zip(&b.truth[0][2]).filter(|(x, y)| x != y).count();
    assert_eq!(different, 1);
    assert_eq!(look(&mount, &b.victim, 1, &b.truth[0][1]), ReadResult::Errors(0));
}

#[test]
fn an_image_that_is_only_a_magic_number_disturbs_nobody() {
    if !tools::have("an_image_that_is_only_a_magic_number_disturbs_nobody", &TOOLS) {
        return;
    }
    let b = backups("", false);
    let stray: PathBuf = b.dir.path().join("victim/INC-1700018001-victim.qcow2");
    File::create(&stray).unwrap().write_all(b"QFI\xfb").unwrap();
    let (second, third, findings) = examine(&b);
    assert_eq!((second, third), (ReadResult::Errors(0), ReadResult::Errors(0)));
    assert!(names(&findings, &stray));
}
