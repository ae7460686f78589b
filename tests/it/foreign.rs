//! Backups of other programs read as chains: virtnbdbackup's streams and Proxmox archives.

use std::path::Path;

use crate::support::foreign::{archive, archive_of, stream};
use crate::support::guard::Guard;
use crate::support::tools;
use fleecefs::chain::scan::{ScanOptions, scan};
use fleecefs::chain::{Catalog, Disk};
use fleecefs::error::Result;
use fleecefs::image::{Cache, open_point};

fn look(dir: &Path) -> Catalog {
    scan(dir, &ScanOptions::default(), None).unwrap().0
}

fn disk<'a>(catalog: &'a Catalog, path: &str) -> &'a Disk {
    catalog.disks.iter().find(|d| d.path == Path::new(path)).expect(path)
}

fn read(disk: &Disk, point: usize) -> Result<Vec<u8>> {
    let image = open_point(disk, point, &Cache::new(1 << 20))?;
    let mut bytes = vec![0xee; image.size() as usize];
    image.read_at(&mut bytes, 0).map(|()| bytes)
}

fn put(dir: &Path, name: &str, bytes: Vec<u8>) {
    let path = dir.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, bytes).unwrap();
}

/// Three streams of a disk that grows; the last depends on the second, not on the newest file.
fn three_streams(dir: &Path) -> Vec<Vec<u8>> {
    let mut states = vec![vec![0u8; 300_000]];
    states[0][70_000..80_000].fill(1);
    put(dir, "vm/sda.inc.virtnbdbackup.2.data", {
        stream("sda", 2, 400_000, &[(390_000, vec![3; 10_000])])
    });
    put(dir, "vm/sda.inc.virtnbdbackup.1.data", {
        stream("sda", 1, 300_000, &[(0, vec![2; 512]), (79_000, vec![0; 2000])])
    });
    put(dir, "vm/sda.full.data", stream("sda", 0, 300_000, &[(70_000, vec![1; 10_000])]));
    put(dir, "vm/sda.inc.virtnbdbackup.3.data.partial", b"half".to_vec());
    let mut next = states[0].clone();
    next[..512].fill(2);
    next[79_000..81_000].fill(0);
    states.push(next.clone());
    next.resize(400_000, 0);
    next[390_000..].fill(3);
    states.push(next);
    states
}

#[test]
fn streams_are_read_as_a_chain_in_the_order_of_their_checkpoints() {
    let dir = tempfile::tempdir().unwrap();
    let states = three_streams(dir.path());
    let catalog = look(dir.path());
    assert_eq!(catalog.disks.len(), 1);
    let sda = disk(&catalog, "vm/sda");
    assert_eq!(sda.points.len(), 3);
    for (i, state) in states.iter().enumerate() {
        assert!(read(sda, i).unwrap() == *state, "{}", sda.points[i].name);
    }
}

#[test]
fn a_damaged_increment_spoils_what_depends_on_it_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let states = three_streams(dir.path());
    let path = dir.path().join("vm/sda.inc.virtnbdbackup.1.data");
    let mut bytes = std::fs::read(&path).unwrap();
    let data = bytes.windows(5).position(|w| w == b"data ").unwrap();
    bytes[data + 30] = b'x';
    std::fs::write(&path, bytes).unwrap();
    let catalog = look(dir.path());
    let sda = disk(&catalog, "vm/sda");
    assert!(read(sda, 0).unwrap() == states[0]);
    assert!(read(sda, 1).is_err() && read(sda, 2).is_err());
}

#[test]
fn archives_show_a_disk_for_each_device_and_their_damage_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let whole = archive(5, 6);
    put(dir.path(), "dump/vzdump-qemu-100-a.vma", whole.clone());
    put(dir.path(), "dump/b.vma.zst", zstd::encode_all(&whole[..], 1).unwrap());
    put(dir.path(), "dump/cut.vma", whole[..whole.len() - 1].to_vec());
    put(dir.path(), "dump/not.vma", vec![7; 65536]);
    put(dir.path(), "dump/vzdump-qemu-100-a.log", b"INFO: starting".to_vec());
    let catalog = look(dir.path());
    let mut want = vec![0; 65536];
    want[..4096].fill(5);
    want[8192..12288].fill(6);
    for place in ["vzdump-qemu-100-a", "b"] {
        let scsi0 = disk(&catalog, &format!("dump/{place}/drive-scsi0"));
        assert_eq!(scsi0.points[0].time, 1_700_000_000);
        assert!(read(scsi0, 0).unwrap() == want, "{place}");
    }
    assert!(read(disk(&catalog, "dump/cut/drive-scsi0"), 0).is_err());
    assert_eq!(catalog.disks.len(), 3);
    let told: Vec<_> = catalog.findings.iter().filter_map(|f| f.path.file_name()).collect();
    assert_eq!(told, ["cut.vma", "not.vma"], "{:?}", catalog.findings);
}

#[test]
fn a_damaged_foreign_file_never_turns_into_a_raw_disk() {
    let dir = tempfile::tempdir().unwrap();
    let qcow2 = [b"QFI\xfb".to_vec(), vec![0; 1020]].concat();
    for (name, bytes) in [
        ("sda.full.data", vec![1; 1024]),
        ("sdb.full.data", qcow2.clone()),
        ("a.vma", qcow2),
        ("b.vma.gz", vec![1; 1024]),
    ] {
        put(dir.path(), name, bytes);
    }
    let catalog = look(dir.path());
    assert!(catalog.disks.iter().flat_map(|d| &d.points).all(|p| !p.is_served()));
    assert_eq!(catalog.disks.len(), 2);
}

/// What an archive's points are read from is not the packed file: its bytes must not be cloned in
/// the place of the disk's.
#[test]
fn a_packed_archive_is_never_cloned_from() {
    let dir = tempfile::tempdir().unwrap();
    let whole = archive(5, 6);
    put(dir.path(), "a.vma", whole.clone());
    put(dir.path(), "b.vma.zst", zstd::encode_all(&whole[..], 1).unwrap());
    let catalog = look(dir.path());
    for (disk_path, cloned_from) in [("a/drive-scsi0", Some("a.vma")), ("b/drive-scsi0", None)] {
        let image = open_point(disk(&catalog, disk_path), 0, &Cache::new(1 << 20)).unwrap();
        let file = image.source_file(0, 0).unwrap().map(|f| f.path().to_path_buf());
        assert_eq!(file, cloned_from.map(|n| catalog.root.join(n)), "{disk_path}");
    }
}

/// The same where the file system would do it: stored without compression, every offset in the disk
/// is one in the packed file, 15 bytes too early.
#[test]
fn a_packed_archive_is_restored_right_where_ranges_can_be_cloned() {
    let test = "a_packed_archive_is_restored_right_where_ranges_can_be_cloned";
    if !tools::have(test, &["mkfs.xfs", "losetup", "qemu-img"]) {
        return;
    }
    // SAFETY: geteuid has no preconditions.
    if unsafe { libc::geteuid() } != 0 {
        assert!(std::env::var_os("CI").is_none(), "{test} needs root");
        println!("skipped: {test} needs root");
        return;
    }
    let mount = Xfs::new();
    let data: Vec<u8> =
        (0..65536u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    // The data begins at a block's border, as cloning needs it.
    let whole = archive_of(16384 - 512, 0xffff, &data);
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::none());
    std::io::Write::write_all(&mut packed, &whole).unwrap();
    put(&mount.path, "b/packed.vma.gz", packed.finish().unwrap());
    put(&mount.path, "b/plain.vma", whole);
    for (archive, way) in [("packed", "copied"), ("plain", "cloned")] {
        for (extension, format) in [("raw", "raw"), ("qcow2", "qcow2")] {
            let target = mount.path.join(format!("{archive}.{extension}"));
            let point = format!("{archive}/drive-scsi0/{}", point_name(&mount.path, archive));
            let out = std::process::Command::new(env!("CARGO_BIN_EXE_fleecefs"))
                .args(["restore", "--json"])
                .args([&mount.path.join("b"), Path::new(&point), &target])
                .output()
                .unwrap();
            assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
            let said: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
            assert_eq!(said["way"], way, "{archive}: {said}");
            let raw = mount.path.join("out");
            let (from, to) = (target.to_str().unwrap(), raw.to_str().unwrap());
            tools::run("qemu-img", &["convert", "-f", format, "-O", "raw", from, to]);
            assert!(std::fs::read(&raw).unwrap() == data, "{archive} as {format}");
        }
    }
}

fn point_name(mount: &Path, archive: &str) -> String {
    let catalog = look(&mount.join("b"));
    disk(&catalog, &format!("{archive}/drive-scsi0")).points[0].name.clone()
}

/// A small XFS on a loop device; unmounted at the end.
struct Xfs {
    path: std::path::PathBuf,
    _mount: Guard,
    _dir: tempfile::TempDir,
}

impl Xfs {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (file, path) = (dir.path().join("xfs"), dir.path().join("mnt"));
        std::fs::File::create(&file).unwrap().set_len(320 << 20).unwrap();
        std::fs::create_dir(&path).unwrap();
        tools::run("mkfs.xfs", &["-q", "-m", "reflink=1", file.to_str().unwrap()]);
        Xfs { _mount: Guard::mount("-o loop", &file, &path), path, _dir: dir }
    }
}
