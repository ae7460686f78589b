//! Points that can be written to (`mount --writable`): real mounts, with fio, qemu-img, qemu-io and the kernel as judges.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::support::file_systems::{self, Image, Listing, shell};
use crate::support::guard::Guard;
use crate::support::images::{Chain, Rng, first_difference};
use crate::support::mount::Mount;
use crate::support::owner::fleecefs;
use crate::support::process::{eventually, status, stderr};
use crate::support::three_points::{MIB, SIZE, backups};
use crate::support::tools::{have, is_root, run};
use crate::support::writable::{BLOCK, PUNCH, TOOLS, ZERO, errno, fallocate, hashes, keeping, rw};

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

/// A point whose image is replaced while some have it open, who then open it again by what they have.
#[test]
fn each_generation_of_a_point_has_writes_of_its_own() {
    if !have("each_generation_of_a_point_has_writes_of_its_own", &TOOLS) {
        return;
    }
    let (dir, chain) = backups();
    let aside = tempfile::tempdir().unwrap();
    let mount = Mount::with(dir.path(), &["--writable"]);
    let shown = mount.point("sda", &chain.files[2]);
    let old = File::open(&shown).unwrap();
    let inode = old.metadata().unwrap().ino();
    let new = aside.path().join("new");
    std::fs::copy(&chain.files[2], &new).unwrap();
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 6 4M 64k", new.to_str().unwrap()]);
    std::fs::rename(&new, &chain.files[2]).unwrap();
    eventually("the new one is shown", || shown.metadata().is_ok_and(|m| m.ino() != inode));
    let reader = File::open(&shown).unwrap();
    let again = PathBuf::from(format!("/proc/self/fd/{}", old.as_raw_fd()));
    drop(File::open(&again));
    let writer = rw(&shown);
    writer.write_all_at(&[7; 4096], 0).unwrap();
    rustix::fs::fadvise(&writer, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    for (who, file) in [("reader", &reader), ("writer", &writer)] {
        let mut got = [0; 4096];
        file.read_exact_at(&mut got, 0).unwrap();
        assert_eq!(got, [7; 4096], "{who}");
    }
    // The old one, opened for writing now, makes nobody else's writes vanish.
    drop(OpenOptions::new().read(true).write(true).open(&again));
    let mut got = [0; 4096];
    rw(&shown).read_exact_at(&mut got, 0).unwrap();
    assert_eq!(got, [7; 4096]);
}

/// Memory as direct reads and writes need it.
#[repr(align(4096))]
struct Pages([u8; 8192]);

#[test]
fn a_disk_of_any_number_of_sectors_is_read_and_written_to_its_end_past_the_page_cache() {
    let test = "a_disk_of_any_number_of_sectors_is_read_and_written_to_its_end_past_the_page_cache";
    if !have(test, &TOOLS) {
        return;
    }
    const ODD: u64 = MIB + 3 * 512;
    let dir = tempfile::tempdir().unwrap();
    let mut chain = Chain::new(dir.path(), "sda");
    chain.point("", ODD, &["write -P 1 0 1M".to_string(), "write -P 2 1M 1536".to_string()]);
    let mount = Mount::with(dir.path(), &["--writable"]);
    let shown = mount.point("sda", &chain.files[0]);
    let mut want = std::fs::read(&shown).unwrap();
    let mut options = OpenOptions::new();
    let direct = options.read(true).write(true).custom_flags(libc::O_DIRECT).open(&shown).unwrap();
    let check = |want: &[u8]| {
        let mut pages = Pages([0; 8192]);
        for (at, len) in [(MIB - 4096, 8192), (MIB, 4096), (MIB, 8192), (MIB + 1024, 512)] {
            let n = direct.read_at(&mut pages.0[..len], at).unwrap();
            assert_eq!(n, len.min((ODD - at) as usize));
            assert_eq!(first_difference(&pages.0[..n], &want[at as usize..][..n]), None, "{at}");
        }
        assert_eq!(direct.read_at(&mut pages.0, ODD.next_multiple_of(4096)).unwrap(), 0);
        assert_eq!(first_difference(&std::fs::read(&shown).unwrap(), want), None);
    };
    check(&want);
    direct.write_all_at(&Pages([3; 8192]).0[..512], MIB + 1024).unwrap();
    want[MIB as usize + 1024..].fill(3);
    check(&want);
    direct.write_all_at(&Pages([4; 8192]).0[..1536], MIB).unwrap();
    want[MIB as usize..].fill(4);
    check(&want);
    // Over the end nothing is written, and why is said.
    for (at, len) in [(MIB, 4096), (MIB - 4096, 8192), (MIB + 4096, 512)] {
        assert_eq!(errno(direct.write_at(&Pages([5; 8192]).0[..len], at)), Some(libc::EFBIG));
    }
    check(&want);
    assert_eq!(shown.metadata().unwrap().len(), ODD);
    assert_eq!(rw(&shown).write_at(&[6; 4096], MIB).unwrap(), 1536);
    want[MIB as usize..].fill(6);
    check(&want);
}

#[test]
fn what_was_written_over_a_point_that_is_gone_goes_with_who_has_it_open_and_its_name_can_come_back()
{
    let test = "what_was_written_over_a_point_that_is_gone_goes_with_who_has_it_open_and_its_name_can_come_back";
    if !have(test, &TOOLS) {
        return;
    }
    let (dir, chain) = backups();
    let aside = tempfile::tempdir().unwrap();
    let kept = tempfile::tempdir().unwrap();
    let (image, away) = (&chain.files[2], aside.path().join("away"));
    let mount = Mount::with(dir.path(), &["--writable"]);
    let shown = mount.point("sda", image);
    let original = std::fs::read(&shown).unwrap();
    let overlays = || status(mount.path())["writable"]["overlays"].as_array().unwrap().len();
    let open = rw(&shown);
    open.write_all_at(&[7; 10_000], 0).unwrap();
    std::fs::rename(image, &away).unwrap();
    eventually("it is gone", || !shown.exists());
    assert_eq!(overlays(), 1, "somebody has it open");
    // The backup directory does not change any more, so nothing but the closing of it can be the reason.
    drop(open);
    eventually("what was written is gone", || overlays() == 0);
    std::fs::rename(&away, image).unwrap();
    eventually("it is back", || shown.exists());
    let open = rw(&shown);
    open.write_all_at(&[8; 10_000], 0).unwrap();
    std::fs::rename(image, &away).unwrap();
    eventually("it is gone again", || !shown.exists());
    std::fs::rename(&away, image).unwrap();
    eventually("it is back again", || shown.exists());
    // As it was backed up for who opens it now, and as it was written to for who has it open.
    assert_eq!(first_difference(&std::fs::read(&shown).unwrap(), &original), None);
    rw(&shown).write_all_at(&[9; 100], 0).unwrap();
    let mut got = [0; 10_000];
    open.read_exact_at(&mut got, 0).unwrap();
    assert_eq!(got, [8; 10_000]);
    drop((open, mount));
    // What is kept is there again with the same point.
    let mount = keeping(dir.path(), kept.path());
    let shown = mount.point("sda", image);
    rw(&shown).write_all_at(&[7; 10_000], 0).unwrap();
    std::fs::rename(image, &away).unwrap();
    eventually("it is gone", || !shown.exists());
    std::fs::rename(&away, image).unwrap();
    eventually("it is back", || shown.exists());
    let mut want = original;
    want[..10_000].fill(7);
    assert_eq!(first_difference(&std::fs::read(&shown).unwrap(), &want), None);
}
