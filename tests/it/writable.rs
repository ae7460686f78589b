//! Points that can be written to (`mount --writable`): real mounts, with fio, qemu-img, qemu-io and the kernel as judges.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::file_systems::{self, Image, Listing, shell};
use crate::support::guard::Guard;
use crate::support::images::{Chain, Rng, first_difference};
use crate::support::mount::Mount;
use crate::support::owner::fleecefs;
use crate::support::process::{eventually, is_gone, server_pid, signal, status, stderr};
use crate::support::three_points::{MIB, SIZE, backups};
use crate::support::tools::{have, is_root, run};

const TOOLS: [&str; 3] = ["qemu-img", "qemu-io", "/dev/fuse"];
const BLOCK: u64 = 4096;

fn rw(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}

fn errno<T>(result: std::io::Result<T>) -> Option<i32> {
    result.err().and_then(|e| e.raw_os_error())
}

fn fallocate(file: &File, mode: i32, at: u64, len: u64) -> std::io::Result<()> {
    // SAFETY: a call with an open descriptor and numbers.
    match unsafe { libc::fallocate(file.as_raw_fd(), mode, at as i64, len as i64) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE;

/// Hash and times of all files below a folder.
fn hashes(dir: &Path) -> BTreeMap<PathBuf, (blake3::Hash, i64, i64)> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(hashes(&path));
        } else {
            let (bytes, meta) = (std::fs::read(&path).unwrap(), path.metadata().unwrap());
            found.insert(path, (blake3::hash(&bytes), meta.mtime(), meta.ctime()));
        }
    }
    found
}

fn scratch_option(scratch: &Path) -> String {
    format!("--writable={}", scratch.display())
}

/// A mount that keeps what is written in `scratch`.
fn keeping(backups: &Path, scratch: &Path) -> Mount {
    Mount::with(backups, &[&scratch_option(scratch), "--keep"])
}

#[test]
fn writes_discards_and_reads_are_as_on_a_disk_and_backups_stay() {
    if !have("writes_discards_and_reads_are_as_on_a_disk_and_backups_stay", &TOOLS) {
        return;
    }
    let (dir, chain) = backups();
    let scratch = tempfile::tempdir().unwrap();
    let before = hashes(dir.path());
    let mut mount = keeping(dir.path(), scratch.path());
    let mut model = std::fs::read(mount.point("sda", &chain.files[1])).unwrap();
    let neighbour = std::fs::read(mount.point("sda", &chain.files[2])).unwrap();
    let mut rng = Rng(15);
    for round in 0..4 {
        let file = rw(&mount.point("sda", &chain.files[1]));
        // Whoever has it open for reading sees the same.
        let reader = File::open(mount.point("sda", &chain.files[1])).unwrap();
        for step in 0..60 {
            let align = [1, 512, BLOCK][rng.below(3) as usize];
            let (at, len) = rng.range(SIZE, align);
            let (at, len) = (at, len.min(2 * MIB));
            let part = at as usize..(at + len) as usize;
            match rng.below(4) {
                0 => {
                    fallocate(&file, [PUNCH, ZERO][rng.below(2) as usize], at, len).unwrap();
                    model[part.clone()].fill(0);
                }
                1 => {}
                _ => {
                    let data = vec![(round * 60 + step) as u8; len as usize];
                    file.write_all_at(&data, at).unwrap();
                    model[part.clone()].copy_from_slice(&data);
                }
            }
            let mut got = vec![0; len as usize];
            reader.read_exact_at(&mut got, at).unwrap();
            assert_eq!(first_difference(&got, &model[part]), None, "round {round}, step {step}");
        }
        drop((file, reader));
        let got = std::fs::read(mount.point("sda", &chain.files[1])).unwrap();
        assert_eq!(first_difference(&got, &model), None, "round {round}");
        assert!(std::fs::read(mount.point("sda", &chain.files[2])).unwrap() == neighbour);
        drop(mount);
        // Gone on with by another mount.
        mount = keeping(dir.path(), scratch.path());
        let got = std::fs::read(mount.point("sda", &chain.files[1])).unwrap();
        assert_eq!(first_difference(&got, &model), None, "after round {round}");
    }
    // What lseek says leads to all that is not zero, and to nothing else that was not written.
    let file = File::open(mount.point("sda", &chain.files[1])).unwrap();
    for (start, end) in holes(&file) {
        assert!(model[start as usize..end as usize].iter().all(|b| *b == 0), "{start}..{end}");
    }
    assert!(hashes(dir.path()) == before);
}

fn holes(file: &File) -> Vec<(u64, u64)> {
    // SAFETY: lseek on an open descriptor.
    let seek = |at: u64, w| unsafe { libc::lseek(file.as_raw_fd(), at as i64, w) };
    let (mut found, mut at) = (Vec::new(), 0);
    while at < SIZE {
        let start = seek(at, libc::SEEK_HOLE) as u64;
        if start >= SIZE {
            break;
        }
        at = u64::try_from(seek(start, libc::SEEK_DATA)).unwrap_or(SIZE);
        found.push((start, at));
    }
    assert!(!found.is_empty());
    found
}

#[test]
fn a_write_storm_verifies_and_neither_backup_nor_neighbour_changes() {
    let tools = [TOOLS.as_slice(), &["fio"]].concat();
    if !have("a_write_storm_verifies_and_neither_backup_nor_neighbour_changes", &tools) {
        return;
    }
    let (dir, chain) = backups();
    let before = hashes(dir.path());
    let mount = Mount::with(dir.path(), &["--writable"]);
    let neighbour = std::fs::read(mount.point("sda", &chain.files[0])).unwrap();
    let name = format!("--filename={}", mount.point("sda", &chain.files[2]).display());
    for engine in [
        &["--ioengine=libaio", "--direct=1", "--iodepth=16", "--bsrange=512-64k"][..],
        &["--ioengine=mmap", "--bs=4k", "--fsync=64"],
        &["--ioengine=psync", "--bsrange=1k-200k", "--numjobs=1", "--fdatasync=32"],
    ] {
        let common = ["--name=w", &name, "--rw=randwrite", "--size=64M", "--io_size=24M"];
        let verify = ["--verify=crc32c", "--verify_fatal=1", "--randseed=7", "--blockalign=512"];
        let quiet = ["--allow_file_create=0", "--output-format=terse"];
        run("fio", &[&common[..], &verify, engine, &quiet].concat());
    }
    assert!(std::fs::read(mount.point("sda", &chain.files[0])).unwrap() == neighbour);
    let told = status(mount.path());
    let overlays = told["writable"]["overlays"].as_array().unwrap();
    assert_eq!(overlays.len(), 1, "{told}");
    assert_eq!((&overlays[0]["disk"], &overlays[0]["kept"]), (&"sda".into(), &false.into()));
    assert!(overlays[0]["bytes"].as_u64().unwrap() > 16 << 20);
    drop(mount);
    assert!(hashes(dir.path()) == before);
}

#[test]
fn a_full_scratch_is_enospc_and_all_stays_readable() {
    if !have("a_full_scratch_is_enospc_and_all_stays_readable", &TOOLS) {
        return;
    }
    let (dir, chain) = backups();
    let mount = Mount::with(dir.path(), &["--writable", "--scratch-size=3M"]);
    let shown = mount.point("sda", &chain.files[0]);
    let mut model = std::fs::read(&shown).unwrap();
    let (file, other) = (rw(&shown), rw(&mount.point("sda", &chain.files[1])));
    let (mut at, data) = (0, vec![9; 64 << 10]);
    let full = loop {
        match file.write_at(&data, at) {
            Ok(n) => {
                assert_eq!(n, data.len());
                model[at as usize..][..n].fill(9);
                at += n as u64;
            }
            Err(e) => break e,
        }
        assert!(at < 3 * MIB, "the limit is passed");
    };
    assert_eq!(full.raw_os_error(), Some(libc::ENOSPC));
    assert!(at > 2 * MIB, "{at}");
    // The limit is for all of them.
    assert_eq!(errno(other.write_at(&data, 0)), Some(libc::ENOSPC));
    // What has its place can be written again, and what is discarded gives way.
    file.write_all_at(&[8; 100], 10).unwrap();
    model[10..110].fill(8);
    file.sync_all().unwrap();
    fallocate(&file, PUNCH, MIB, MIB).unwrap();
    model[MIB as usize..2 * MIB as usize].fill(0);
    file.write_all_at(&data, 40 * MIB).unwrap();
    model[40 * MIB as usize..][..data.len()].fill(9);
    assert_eq!(first_difference(&std::fs::read(&shown).unwrap(), &model), None);
    let space = rustix::fs::statvfs(mount.path()).unwrap();
    assert!(
        space.f_bavail * space.f_frsize <= 3 * MIB
            && space.f_blocks * space.f_frsize <= 3 * MIB + BLOCK
    );
}

#[test]
fn a_scratch_whose_file_system_is_full_is_enospc_too() {
    let test = "a_scratch_whose_file_system_is_full_is_enospc_too";
    if !have(test, &TOOLS) || !is_root(test) {
        return;
    }
    let (dir, chain) = backups();
    let small = tempfile::tempdir().unwrap();
    let _tmpfs = Guard::tmpfs("2m", small.path());
    let option = scratch_option(&small.path().join("scratch"));
    let mount = Mount::with(dir.path(), &[&option, "--keep", "--scratch-size=1G"]);
    let shown = mount.point("sda", &chain.files[0]);
    let (file, mut model) = (rw(&shown), std::fs::read(&shown).unwrap());
    let (mut at, data) = (0, vec![9; 64 << 10]);
    while let Ok(n) = file.write_at(&data, at) {
        assert_eq!(n, data.len());
        model[at as usize..][..n].fill(9);
        at += n as u64;
        assert!(at < 3 * MIB);
    }
    assert!(at > MIB, "{at}");
    assert_eq!(errno(file.write_at(&data, at)), Some(libc::ENOSPC));
    fallocate(&file, PUNCH, 0, MIB).unwrap();
    model[..MIB as usize].fill(0);
    file.sync_all().unwrap();
    let mut got = std::fs::read(&shown).unwrap();
    // Of the write that failed any block may be there.
    let torn = at as usize..at as usize + data.len();
    assert!(got[torn.clone()].iter().zip(&model[torn.clone()]).all(|(g, m)| *g == 9 || g == m));
    got[torn.clone()].copy_from_slice(&model[torn]);
    assert_eq!(first_difference(&got, &model), None);
}

#[test]
fn what_a_disk_cannot_do_is_refused_and_modes_show_who_may_write() {
    if !have("what_a_disk_cannot_do_is_refused_and_modes_show_who_may_write", &TOOLS) {
        return;
    }
    let (dir, chain) = backups();
    let mount = Mount::with(dir.path(), &["--writable"]);
    let shown = mount.point("sda", &chain.files[0]);
    let mode = |path: &Path| path.metadata().unwrap().mode() & 0o7777;
    let json = mount.path().join(".fleecefs/status.json");
    assert_eq!((mode(&shown), mode(&json), mode(mount.path())), (0o600, 0o400, 0o500));
    let mut truncate = OpenOptions::new();
    assert_eq!(errno(truncate.write(true).truncate(true).open(&shown)), Some(libc::EPERM));
    let file = rw(&shown);
    assert_eq!(errno(file.set_len(SIZE - 1)), Some(libc::EPERM));
    assert_eq!(errno(file.set_len(SIZE + 1)), Some(libc::EPERM));
    file.set_len(SIZE).unwrap();
    assert_eq!(errno(file.write_at(&[1], SIZE)), Some(libc::EFBIG));
    assert_eq!(file.write_at(&[1; 100], SIZE - 10).unwrap(), 10);
    assert_eq!(errno(fallocate(&file, 0, 0, BLOCK)), Some(libc::EOPNOTSUPP));
    assert_eq!(errno(fallocate(&file, ZERO, SIZE - 10, 20)), Some(libc::EFBIG));
    fallocate(&file, PUNCH, SIZE - 10, 1 << 40).unwrap();
    assert_eq!(shown.metadata().unwrap().len(), SIZE);
    let locked = std::fs::Permissions::from_mode(0o400);
    assert_eq!(errno(std::fs::set_permissions(&shown, locked)), Some(libc::EPERM));
    assert_eq!(errno(File::create(mount.path().join("new"))), Some(libc::EROFS));
    assert_eq!(errno(std::fs::remove_file(&shown)), Some(libc::EROFS));
    assert_eq!(errno(OpenOptions::new().write(true).open(&json)), Some(libc::EROFS));
    // A reader writes nothing.
    let reader = File::open(&shown).unwrap();
    assert_eq!(errno(fallocate(&reader, PUNCH, 0, BLOCK)), Some(libc::EBADF));
    drop((file, reader, mount));
    let mount = Mount::with(dir.path(), &["-o", "writable,mode=0664"]);
    assert_eq!(mode(&mount.point("sda", &chain.files[0])), 0o664);
    let at = tempfile::tempdir().unwrap();
    let (backups, at) = (dir.path().to_str().unwrap(), at.path().to_str().unwrap());
    for wrong in [&["--keep"][..], &["--scratch-size=1M"], &["--writable", "--keep"]] {
        let out = fleecefs(&[&["mount"], wrong, &[backups, at]].concat());
        assert_eq!(out.status.code(), Some(2), "{wrong:?}: {}", stderr(&out));
    }
}

#[test]
fn all_ways_to_write_are_seen_by_all_who_have_it_open() {
    if !have("all_ways_to_write_are_seen_by_all_who_have_it_open", &TOOLS) {
        return;
    }
    let (dir, chain) = backups();
    let mount = Mount::with(dir.path(), &["--writable"]);
    let shown = mount.point("sda", &chain.files[2]);
    let sda = shown.parent().unwrap();
    let early = File::open(&shown).unwrap();
    let mut warm = vec![0; 1 << 20];
    early.read_exact_at(&mut warm, 0).unwrap();
    // By the names that stand for it.
    let by_time = std::fs::read_dir(sda.join("by-time")).unwrap().map(|e| e.unwrap().path());
    let newest = by_time.max().unwrap();
    rw(&sda.join("latest.raw")).write_all_at(b"latest", 100).unwrap();
    rw(&newest).write_all_at(b"by time", 200).unwrap();
    // Past the page cache.
    let direct = OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(&shown).unwrap();
    #[repr(align(4096))]
    struct Aligned([u8; 4096]);
    direct.write_all_at(&Aligned([b'd'; 4096]).0, 8192).unwrap();
    let synced = OpenOptions::new().write(true).custom_flags(libc::O_SYNC).open(&shown).unwrap();
    synced.write_all_at(b"synced", 300).unwrap();
    // By way of a map.
    let file = rw(&shown);
    let (len, protection) = (1 << 20, libc::PROT_READ | libc::PROT_WRITE);
    // SAFETY: a shared map of an open file, within its length, that is taken away below.
    unsafe {
        let map = libc::mmap(
            std::ptr::null_mut(),
            len,
            protection,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        );
        assert_ne!(map, libc::MAP_FAILED);
        std::ptr::copy_nonoverlapping(b"mapped".as_ptr(), map.cast::<u8>().add(400), 6);
        assert_eq!(libc::msync(map, len, libc::MS_SYNC), 0);
        assert_eq!(libc::munmap(map, len), 0);
    }
    let mut want = warm.clone();
    want[100..106].copy_from_slice(b"latest");
    want[200..207].copy_from_slice(b"by time");
    want[300..306].copy_from_slice(b"synced");
    want[400..406].copy_from_slice(b"mapped");
    want[8192..12288].fill(b'd');
    let mut got = vec![0; 1 << 20];
    early.read_exact_at(&mut got, 0).unwrap();
    assert_eq!(first_difference(&got, &want), None);
    // And what the server has, without the kernel's cache.
    let direct = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(&shown).unwrap();
    let mut page = Aligned([0; 4096]);
    direct.read_exact_at(&mut page.0, 0).unwrap();
    assert_eq!(first_difference(&page.0, &want[..4096]), None);
}

/// The bytes that a kill may leave: those that were last synced, or what was written over them since, block by block.
struct Possible {
    blocks: Vec<Vec<Vec<u8>>>,
}

impl Possible {
    fn new(bytes: &[u8]) -> Self {
        Possible { blocks: bytes.chunks(BLOCK as usize).map(|b| vec![b.to_vec()]).collect() }
    }

    fn write(&mut self, data: &[u8], at: u64) {
        for (i, byte) in data.iter().enumerate() {
            let place = at + i as u64;
            let versions = &mut self.blocks[(place / BLOCK) as usize];
            if i == 0 || place.is_multiple_of(BLOCK) {
                versions.push(versions.last().unwrap().clone());
            }
            versions.last_mut().unwrap()[(place % BLOCK) as usize] = *byte;
        }
    }

    fn synced(&mut self) {
        self.blocks.iter_mut().for_each(|v| drop(v.drain(..v.len() - 1)));
    }

    fn check(&self, bytes: &[u8], what: &str) {
        for (i, (got, any)) in bytes.chunks(BLOCK as usize).zip(&self.blocks).enumerate() {
            assert!(any.iter().any(|b| b == got), "{what}: block {i} is neither old nor new");
        }
    }
}

/// Writes, discards and syncs until the server is gone; whether it came to the end.
fn work(file: &File, possible: &mut Possible, seed: u64) -> bool {
    let mut rng = Rng(seed);
    for step in 0..14_u8 {
        let (at, len) = rng.range(2 * MIB, if step % 2 == 0 { 512 } else { BLOCK });
        let data = vec![if step % 5 == 4 { 0 } else { 100 + step }; len as usize];
        possible.write(&data, at);
        let done = match step % 5 {
            4 => fallocate(file, PUNCH, at, len),
            _ => file.write_all_at(&data, at),
        };
        if done.is_err() {
            return false;
        }
        if step % 3 == 2 {
            if file.sync_all().is_err() {
                return false;
            }
            possible.synced();
        }
    }
    true
}

#[test]
fn killed_at_any_step_all_that_was_synced_is_there_and_no_block_is_wrong() {
    if !have("killed_at_any_step_all_that_was_synced_is_there_and_no_block_is_wrong", &TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut chain = Chain::new(dir.path(), "sda");
    chain.point("", 4 * MIB, &["write -P 1 0 1M".to_string()]);
    let before = hashes(dir.path());
    let (mut at, mut killed) = (1, 0);
    loop {
        let scratch = tempfile::tempdir().unwrap();
        let option = scratch_option(scratch.path());
        let mount = Mount::by(|mnt| {
            Command::new(env!("CARGO_BIN_EXE_fleecefs"))
                .args(["-q", "mount", &option, "--keep"])
                .args([dir.path(), mnt])
                .env("FLEECEFS_CRASH_AT", at.to_string())
                .output()
        });
        let shown = mount.point("sda", &chain.files[0]);
        let mut possible = Possible::new(&std::fs::read(&shown).unwrap());
        let ended = match OpenOptions::new().read(true).write(true).open(&shown) {
            Ok(file) => work(&file, &mut possible, at),
            Err(_) => false,
        };
        drop(mount);
        let mount = keeping(dir.path(), scratch.path());
        let got = std::fs::read(mount.point("sda", &chain.files[0])).unwrap();
        possible.check(&got, &format!("killed at step {at}"));
        // And it goes on from there.
        let mut possible = Possible::new(&got);
        assert!(work(&rw(&mount.point("sda", &chain.files[0])), &mut possible, at + 1));
        drop(mount);
        if ended {
            break;
        }
        (at, killed) = (at + 1, killed + 1);
    }
    assert!(killed > 40, "{killed}");
    assert!(hashes(dir.path()) == before);
}

#[test]
fn what_is_not_kept_leaves_nothing_also_after_a_kill() {
    if !have("what_is_not_kept_leaves_nothing_also_after_a_kill", &TOOLS) {
        return;
    }
    let (dir, chain) = backups();
    let scratch = tempfile::tempdir().unwrap();
    let names = || std::fs::read_dir(scratch.path()).unwrap().count();
    let option = scratch_option(scratch.path());
    let mount = Mount::with(dir.path(), &[&option]);
    let original = std::fs::read(mount.point("sda", &chain.files[0])).unwrap();
    let file = rw(&mount.point("sda", &chain.files[0]));
    file.write_all_at(&[7; 1 << 20], 0).unwrap();
    assert_eq!(names(), 0, "it has no name");
    let pid = server_pid(mount.path());
    signal(pid, libc::SIGKILL);
    eventually("it is killed", || is_gone(pid));
    drop((file, mount));
    // As on a file system that has no files without names, from a mount that was killed.
    let left = scratch.path().join(".fleecefs-tmp-000000000000000000000000");
    std::fs::write(&left, "left").unwrap();
    let mount = Mount::with(dir.path(), &[&option]);
    assert!(std::fs::read(mount.point("sda", &chain.files[0])).unwrap() == original);
    assert_eq!(names(), 0, "what was left is swept");
}

#[test]
fn a_scratch_is_outside_the_backups_and_nobody_elses() {
    let test = "a_scratch_is_outside_the_backups_and_nobody_elses";
    if !have(test, &TOOLS) || !is_root(test) {
        return;
    }
    let (dir, _chain) = backups();
    let aside = tempfile::tempdir().unwrap();
    let before = hashes(dir.path());
    let path = |name: &str| aside.path().join(name);
    for name in ["bound", "mnt", "theirs", "open", "busy"] {
        std::fs::create_dir(path(name)).unwrap();
    }
    std::os::unix::fs::symlink(dir.path().join("sda"), path("link")).unwrap();
    let _bound = Guard::mount("--bind", &dir.path().join("sda"), &path("bound"));
    std::os::unix::fs::chown(path("theirs"), Some(4711), None).unwrap();
    std::fs::set_permissions(path("open"), std::fs::Permissions::from_mode(0o777)).unwrap();
    let _busy = keeping(dir.path(), &path("busy"));
    let at = path("mnt");
    for (scratch, code) in [
        (dir.path().to_path_buf(), 2),
        (dir.path().join("sda/new"), 2),
        (path("link"), 2),
        (path("link/new"), 2),
        (path("bound"), 2),
        (path("bound/new/newer"), 2),
        (at.join("new"), 2),
        (path("theirs"), 5),
        (path("open"), 5),
        (path("busy"), 6),
    ] {
        let (option, keep) = (scratch_option(&scratch), "--keep");
        let (backups, at) = (dir.path().to_str().unwrap(), at.to_str().unwrap());
        let out = fleecefs(&["mount", &option, keep, backups, at]);
        assert_eq!(out.status.code(), Some(code), "{scratch:?}: {}", stderr(&out));
    }
    let out = fleecefs(&["scratch", "list", path("theirs").to_str().unwrap()]);
    assert_eq!(out.status.code(), Some(5), "{}", stderr(&out));
    assert!(hashes(dir.path()) == before, "nothing was made in the backups");
}

#[test]
fn what_is_kept_is_listed_exported_dropped_and_never_shown_over_other_contents() {
    let test = "what_is_kept_is_listed_exported_dropped_and_never_shown_over_other_contents";
    if !have(test, &TOOLS) {
        return;
    }
    let (dir, chain) = backups();
    let (scratch, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let text = |p: &Path| p.to_str().unwrap().to_string();
    let name = |i: usize| text(Path::new(chain.files[i].file_name().unwrap()));
    let mount = keeping(dir.path(), scratch.path());
    let shown = mount.point("sda", &chain.files[2]);
    let file = rw(&shown);
    file.write_all_at(&[7; 300_000], 1000).unwrap();
    file.write_all_at(&[8; 5000], SIZE - 5000).unwrap();
    fallocate(&file, PUNCH, 2 * MIB, 20 * MIB).unwrap();
    // Opened, and nothing was written.
    drop((file, rw(&mount.point("sda", &chain.files[1]))));
    let want = out.path().join("want.raw");
    std::fs::copy(&shown, &want).unwrap();
    let list = |json: &[&str]| {
        let args = [&["scratch", "list"], json, &[scratch.path().to_str().unwrap()]].concat();
        String::from_utf8(fleecefs(&args).stdout).unwrap()
    };
    assert!(list(&[]).contains(&name(1)), "also while it is mounted");
    let drop_all = ["scratch", "drop", scratch.path().to_str().unwrap(), "--all"];
    assert_eq!(fleecefs(&drop_all).status.code(), Some(6), "a mount has it");
    let at = mount.path().to_path_buf();
    run(env!("CARGO_BIN_EXE_fleecefs"), &["umount", at.to_str().unwrap()]);
    let all: serde_json::Value = serde_json::from_str(&list(&["--json"])).unwrap();
    let all = all["overlays"].as_array().unwrap().clone();
    assert_eq!(all.len(), 1, "what nothing was written to is not kept: {all:?}");
    assert_eq!(all[0]["point"], name(2));
    // Without --keep nothing is shown of it, and nothing lost.
    let (backups, option) = (text(dir.path()), scratch_option(scratch.path()));
    let refused = fleecefs(&["mount", &option, &backups, at.to_str().unwrap()]);
    assert_eq!(refused.status.code(), Some(4), "{}", stderr(&refused));
    let image = out.path().join("changes.qcow2");
    let export = ["scratch", "export", scratch.path().to_str().unwrap()];
    let which = format!("sda/{}", name(2));
    let export = [&export[..], &[&which, image.to_str().unwrap()]].concat();
    let done = fleecefs(&export);
    assert!(done.status.success(), "{}", stderr(&done));
    assert_eq!(fleecefs(&export).status.code(), Some(4), "it is there");
    // Where the point was shown, in a mount that shows it as it is.
    let plain = fleecefs(&["mount", &backups, at.to_str().unwrap()]);
    assert!(plain.status.success(), "{}", stderr(&plain));
    run("qemu-img", &["check", "-q", image.to_str().unwrap()]);
    run("qemu-img", &["compare", image.to_str().unwrap(), want.to_str().unwrap()]);
    run(env!("CARGO_BIN_EXE_fleecefs"), &["umount", at.to_str().unwrap()]);
    drop(mount);
    // The same file with another time: for all that is known, other contents.
    let touched = std::time::SystemTime::now();
    File::open(&chain.files[0]).unwrap().set_modified(touched).unwrap();
    let mount = keeping(dir.path(), scratch.path());
    let shown = mount.point("sda", &chain.files[2]);
    assert_eq!(errno(File::open(&shown)), Some(libc::EIO));
    let findings = status(mount.path())["findings"].to_string();
    assert!(findings.contains("other contents"), "{findings}");
    assert!(std::fs::read(mount.point("sda", &chain.files[1])).is_ok(), "the others are there");
    drop(mount);
    let done = fleecefs(&drop_all);
    assert!(done.status.success(), "{}", stderr(&done));
    let mount = keeping(dir.path(), scratch.path());
    assert!(
        std::fs::read(mount.point("sda", &chain.files[2])).unwrap()
            != std::fs::read(&want).unwrap()
    );
}

#[test]
fn a_point_that_goes_stays_with_who_has_it_open_and_a_new_one_can_be_written() {
    let test = "a_point_that_goes_stays_with_who_has_it_open_and_a_new_one_can_be_written";
    if !have(test, &TOOLS) {
        return;
    }
    let (dir, mut chain) = backups();
    let mount = Mount::with(dir.path(), &["--writable"]);
    let shown = mount.point("sda", &chain.files[2]);
    let mut want = std::fs::read(&shown).unwrap();
    let file = rw(&shown);
    file.write_all_at(&[7; 10_000], 100).unwrap();
    want[100..10_100].fill(7);
    std::fs::remove_file(&chain.files[2]).unwrap();
    eventually("it is gone", || !shown.exists());
    file.write_all_at(&[8; 10_000], 5 * MIB + 7).unwrap();
    want[5 * MIB as usize + 7..][..10_000].fill(8);
    file.sync_all().unwrap();
    let mut got = vec![0; SIZE as usize];
    file.read_exact_at(&mut got, 0).unwrap();
    assert_eq!(first_difference(&got, &want), None);
    drop(file);
    chain.files.pop();
    let new = chain.point("", SIZE, &["write -P 9 0 64k".to_string()]);
    let shown = mount.point("sda", &new);
    eventually("it is there", || shown.exists());
    rw(&shown).write_all_at(&[1; 10], 0).unwrap();
    // What was written over the one that is gone takes nothing any more.
    let overlays = || status(mount.path())["writable"]["overlays"].as_array().unwrap().len();
    assert_eq!(overlays(), 1);
}

#[test]
fn as_owner_what_is_written_goes_to_a_folder_of_his() {
    let test = "as_owner_what_is_written_goes_to_a_folder_of_his";
    if !have(test, &TOOLS) || !is_root(test) {
        return;
    }
    const UID: u32 = 4711;
    let (dir, chain) = backups();
    run("chown", &["-R", &UID.to_string(), dir.path().to_str().unwrap()]);
    // Root's alone: the server cannot get there by a path.
    let aside = tempfile::tempdir().unwrap();
    std::fs::set_permissions(aside.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
    let scratch = aside.path().join("scratch");
    let options = [scratch_option(&scratch), "--keep".into(), "--as-owner".into()];
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    for round in 0..2 {
        let mount = Mount::with(dir.path(), &options);
        let file = rw(&mount.point("sda", &chain.files[0]));
        let mut got = [0; 3];
        file.read_exact_at(&mut got, BLOCK).unwrap();
        assert_eq!(got, if round == 0 { [1; 3] } else { [7; 3] });
        file.write_all_at(&[7; 10_000], 1).unwrap();
    }
    let his = aside.path().join(format!("scratch.as-{UID}"));
    let owners = std::fs::read_dir(&his).unwrap().map(|e| e.unwrap().metadata().unwrap().uid());
    assert!(owners.into_iter().all(|uid| uid == UID));
    assert!(!scratch.exists());
    let list = ["--as-owner", "scratch", "list", his.to_str().unwrap()];
    // Nor can he, from outside.
    assert_eq!(fleecefs(&list).status.code(), Some(5));
    std::fs::set_permissions(aside.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let listed = String::from_utf8(fleecefs(&list).stdout).unwrap();
    assert!(listed.contains("FULL-"), "{listed}");
}

#[test]
fn a_journal_is_replayed_and_a_file_system_written_to_over_a_point() {
    let test = "a_journal_is_replayed_and_a_file_system_written_to_over_a_point";
    let tools =
        [TOOLS.as_slice(), &file_systems::TOOLS, &["mke2fs", "e2fsck", "dumpe2fs"]].concat();
    if !have(test, &tools) || !is_root(test) {
        return;
    }
    let image = Image::new(64 << 20, &["mke2fs", "-q", "-F", "-t", "ext4"]);
    let mounted = image.mount("");
    shell(
        &image.mnt(),
        "for i in 1 2 3 4 5 6 7 8; do mkdir d$i; seq $i 2000 > d$i/f; sync d$i/f; done",
    );
    // As a power cut leaves it.
    let cut = image.dir.path().join("cut");
    run("cp", &["--sparse=always", image.path().to_str().unwrap(), cut.to_str().unwrap()]);
    drop(mounted);
    let head = run("dumpe2fs", &["-h", cut.to_str().unwrap()]);
    assert!(String::from_utf8_lossy(&head.stdout).contains("needs_recovery"));
    let dir = tempfile::tempdir().unwrap();
    let mut chain = Chain::new(dir.path(), "vda");
    let full = chain.next_path();
    let (from, to) = (cut.to_str().unwrap(), full.to_str().unwrap());
    run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", from, to]);
    let before = hashes(dir.path());
    // What the kernel makes of the original.
    let mnt = image.dir.path().join("mnt");
    let replayed = file_systems::mount(&cut, &mnt, "").unwrap();
    let want = Listing::of(&mnt, &[]);
    drop(replayed);
    let mount = Mount::with(dir.path(), &["--writable"]);
    let point = mount.point("vda", &full);
    let replayed = file_systems::mount(&point, &mnt, "discard").unwrap();
    want.assert_same(&Listing::of(&mnt, &[]), "replayed over the point");
    shell(&mnt, "rm -r d1 d2; seq 1 100000 > new; sync; fstrim . || true");
    let new = std::fs::read(mnt.join("new")).unwrap();
    drop(replayed);
    run("e2fsck", &["-fn", point.to_str().unwrap()]);
    let again = file_systems::mount(&point, &mnt, "").unwrap();
    assert!(std::fs::read(mnt.join("new")).unwrap() == new && !mnt.join("d1").exists());
    drop(again);
    assert!(hashes(dir.path()) == before);
}

#[test]
fn qemu_writes_to_a_point_past_the_page_cache() {
    if !have("qemu_writes_to_a_point_past_the_page_cache", &TOOLS) {
        return;
    }
    let (dir, chain) = backups();
    let mount = Mount::with(dir.path(), &["--writable"]);
    let shown = mount.point("sda", &chain.files[2]);
    let mut model = std::fs::read(&shown).unwrap();
    let writes = [
        "aio_write -P 7 4k 512k",
        "aio_write -P 8 30M 1M",
        "aio_write -P 9 512 512",
        "aio_flush",
        "write -z 33M 64k",
        "discard 34M 1M",
        "flush",
    ];
    let mut args = vec!["-f", "raw", "-t", "none", "-i", "native", "-d", "unmap"];
    writes.iter().for_each(|w| args.extend(["-c", w]));
    let shown = shown.to_str().unwrap();
    args.push(shown);
    let out = run("qemu-io", &args);
    assert!(!String::from_utf8_lossy(&out.stdout).contains("failed"));
    model[4096..][..512 << 10].fill(7);
    model[30 * MIB as usize..][..1 << 20].fill(8);
    model[512..1024].fill(9);
    model[33 * MIB as usize..][..64 << 10].fill(0);
    model[34 * MIB as usize..35 * MIB as usize].fill(0);
    let want = dir.path().parent().unwrap().join(format!("{}-want", std::process::id()));
    let _gone = Guard::of(r#"rm -f "$1""#, &[&want]);
    std::fs::write(&want, &model).unwrap();
    let (a, b) = (shown, want.to_str().unwrap());
    run("qemu-img", &["compare", "-T", "none", "-f", "raw", "-F", "raw", a, b]);
}
