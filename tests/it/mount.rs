//! The mount as its users see it: real mounts, QEMU's tools and the kernel's as judges.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Output};

use crate::support::images::{self, Chain, Oracle, first_difference};
use crate::support::mount::Mount;
use crate::support::process::{eventually, status, stderr};
use crate::support::three_points::{MIB, SIZE, backups};
use crate::support::tools::{self, have, is_root, run};

const TOOLS: [&str; 3] = ["qemu-img", "qemu-io", "/dev/fuse"];
const FLEECEFS: &str = env!("CARGO_BIN_EXE_fleecefs");

fn errno<T>(result: std::io::Result<T>) -> Option<i32> {
    result.err().and_then(|e| e.raw_os_error())
}

/// The point's bytes by name, or why not.
fn read(path: &Path) -> std::io::Result<Vec<u8>> {
    std::fs::read(path)
}

#[test]
fn every_point_reads_as_qemu_merges_it() {
    if !have("every_point_reads_as_qemu_merges_it", &TOOLS) {
        return;
    }
    let (dir, chain) = backups();
    let mount = Mount::new(dir.path());
    let oracle = Oracle::new(&chain.files);
    for (i, file) in chain.files.iter().enumerate() {
        let shown = mount.point("sda", file);
        assert_eq!(first_difference(&read(&shown).unwrap(), &oracle.bytes(i)), None, "point {i}");
        let (a, b) = (shown.to_str().unwrap(), oracle.files[i].to_str().unwrap());
        run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", a, b]);
    }
}

/// Runs of data as lseek tells them.
fn data_runs(file: &File) -> Vec<(u64, u64)> {
    let seek = |at: u64, whence| {
        // SAFETY: lseek on an open descriptor.
        let found = unsafe { libc::lseek(file.as_raw_fd(), at as i64, whence) };
        u64::try_from(found).ok()
    };
    let mut runs = Vec::new();
    let mut at = 0;
    while let Some(start) = seek(at, libc::SEEK_DATA) {
        at = seek(start, libc::SEEK_HOLE).unwrap();
        runs.push((start, at));
    }
    runs
}

#[test]
fn holes_are_exactly_where_qemu_sees_zeros() {
    if !have("holes_are_exactly_where_qemu_sees_zeros", &TOOLS) {
        return;
    }
    let (dir, chain) = backups();
    let mount = Mount::new(dir.path());
    let oracle = Oracle::new(&chain.files);
    for (i, file) in chain.files.iter().enumerate() {
        let mut want: Vec<(u64, u64)> = Vec::new();
        for e in oracle.map(i).as_array().unwrap().iter().filter(|e| e["data"] == true) {
            let start = e["start"].as_u64().unwrap();
            let end = start + e["length"].as_u64().unwrap();
            match want.last_mut() {
                Some(last) if last.1 == start => last.1 = end,
                _ => want.push((start, end)),
            }
        }
        let file = File::open(mount.point("sda", file)).unwrap();
        assert_eq!(data_runs(&file), want, "point {i}");
        // SAFETY: the file is open.
        let beyond = |w| unsafe { libc::lseek(file.as_raw_fd(), SIZE as i64, w) };
        assert_eq!((beyond(libc::SEEK_DATA), beyond(libc::SEEK_HOLE)), (-1, -1));
    }
}

#[test]
fn copies_stay_sparse() {
    if !have("copies_stay_sparse", &TOOLS) {
        return;
    }
    let (dir, chain) = backups();
    let mount = Mount::new(dir.path());
    let shown = mount.point("sda", &chain.files[2]);
    // Before anything was merged: an estimate, but one that makes tools look for holes.
    let blocks = shown.metadata().unwrap().blocks() * 512;
    assert!(blocks > 0 && blocks < SIZE, "{blocks}");
    let out = tempfile::tempdir().unwrap();
    let copy = out.path().join("copy.raw");
    run("cp", &["--sparse=auto", shown.to_str().unwrap(), copy.to_str().unwrap()]);
    assert_eq!(first_difference(&read(&copy).unwrap(), &read(&shown).unwrap()), None);
    let data: u64 = data_runs(&File::open(&shown).unwrap()).iter().map(|(a, b)| b - a).sum();
    assert!(copy.metadata().unwrap().blocks() * 512 <= data + MIB);
    // Now all is merged, and the number is the right one (attributes are trusted for a second).
    eventually("exact blocks", || shown.metadata().unwrap().blocks() * 512 == data);
    let tar = out.path().join("t.tar");
    let name = shown.file_name().unwrap().to_str().unwrap();
    let folder = shown.parent().unwrap().to_str().unwrap();
    run("tar", &["-C", folder, "-S", "-cf", tar.to_str().unwrap(), name]);
    assert!(tar.metadata().unwrap().len() < data + MIB);
}

#[test]
fn names_links_times_and_inodes() {
    if !have("names_links_times_and_inodes", &TOOLS) {
        return;
    }
    let (dir, chain) = backups();
    let inodes = |mount: &Mount| -> Vec<u64> {
        chain.files.iter().map(|f| mount.point("sda", f).metadata().unwrap().ino()).collect()
    };
    let mount = Mount::new(dir.path());
    let sda = mount.path().join("sda");
    let newest = chain.files[2].file_name().unwrap().to_str().unwrap();
    let target = std::fs::read_link(sda.join("latest.raw")).unwrap();
    assert_eq!(target.to_str().unwrap(), format!("{newest}.raw"));
    // 1,700,000,000 and three hours.
    let by_time = std::fs::read_link(sda.join("by-time/20231115T011320Z.raw")).unwrap();
    assert_eq!(by_time.to_str().unwrap(), format!("../{newest}.raw"));
    assert_eq!(std::fs::read_dir(sda.join("by-time")).unwrap().count(), 3);
    let meta = sda.join("latest.raw").metadata().unwrap();
    assert_eq!((meta.mtime(), meta.len(), meta.nlink()), (1_700_010_800, SIZE, 1));
    assert_eq!(sda.metadata().unwrap().nlink(), 3);
    let before = inodes(&mount);
    drop(mount);
    assert_eq!(inodes(&Mount::new(dir.path())), before);
}

#[test]
fn extended_attributes_describe_a_point() {
    if !have("extended_attributes_describe_a_point", &[TOOLS.as_slice(), &["getfattr"]].concat()) {
        return;
    }
    let (dir, chain) = backups();
    let mount = Mount::new(dir.path());
    let shown = mount.point("sda", &chain.files[1]);
    let out = run("getfattr", &["--absolute-names", "-d", shown.to_str().unwrap()]);
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let name = |i: usize| chain.files[i].file_name().unwrap().to_str().unwrap().to_string();
    for (key, value) in [
        ("level", "inc".to_string()),
        ("chain", name(0)),
        ("parent", name(0)),
        ("source", format!("sda/{}", name(1))),
        ("time", "2023-11-15T00:13:20Z".to_string()),
        ("consistency", "unknown".to_string()),
    ] {
        let line = format!("user.fleecefs.{key}=\"{value}\"");
        assert!(text.contains(&line), "no {line} in {text}");
    }
    // Too small a buffer is ERANGE, an unknown name ENODATA.
    let path = std::ffi::CString::new(shown.to_str().unwrap()).unwrap();
    let get = |name: &std::ffi::CStr, size: usize| {
        let mut buf = [0u8; 64];
        // SAFETY: `size` is at most the buffer's.
        let n =
            unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), buf.as_mut_ptr().cast(), size) };
        if n >= 0 { Ok(n) } else { Err(std::io::Error::last_os_error()) }
    };
    assert_eq!(get(c"user.fleecefs.level", 0).unwrap(), 3);
    assert_eq!(get(c"user.fleecefs.level", 64).unwrap(), 3);
    assert_eq!(errno(get(c"user.fleecefs.level", 2)), Some(libc::ERANGE));
    assert_eq!(errno(get(c"user.nothing", 64)), Some(libc::ENODATA));
}

#[test]
fn nothing_can_be_written() {
    if !have("nothing_can_be_written", &TOOLS) {
        return;
    }
    let (dir, chain) = backups();
    let mount = Mount::new(dir.path());
    let shown = mount.point("sda", &chain.files[0]);
    let new = mount.path().join("new");
    let rofs = Some(libc::EROFS);
    assert_eq!(errno(OpenOptions::new().write(true).open(&shown)), rofs);
    assert_eq!(errno(OpenOptions::new().read(true).write(true).open(&shown)), rofs);
    assert_eq!(errno(OpenOptions::new().write(true).truncate(true).open(&shown)), rofs);
    assert_eq!(errno(File::create(&new)), rofs);
    assert_eq!(errno(std::fs::create_dir(&new)), rofs);
    assert_eq!(errno(std::fs::remove_file(&shown)), rofs);
    assert_eq!(errno(std::fs::remove_dir(mount.path().join("sda"))), rofs);
    assert_eq!(errno(std::fs::rename(&shown, &new)), rofs);
    assert_eq!(errno(std::fs::hard_link(&shown, &new)), rofs);
    assert_eq!(errno(std::os::unix::fs::symlink("x", &new)), rofs);
    assert_eq!(errno(std::fs::set_permissions(&shown, PermissionsExt::from_mode(0o600))), rofs);
}

/// Runs a shell command as the user nobody.
fn as_nobody(command: &str) -> Output {
    Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups", "sh", "-c", command])
        .output()
        .unwrap()
}

#[test]
fn others_get_in_only_when_they_are_let() {
    let tools = [TOOLS.as_slice(), &["setpriv"]].concat();
    // SAFETY: cannot fail.
    if !have("others_get_in_only_when_they_are_let", &tools) || unsafe { libc::geteuid() } != 0 {
        return;
    }
    let (dir, chain) = backups();
    let try_read = |mount: &Mount| {
        // The directory that holds the mount point is private, too.
        std::fs::set_permissions(mount.path().parent().unwrap(), PermissionsExt::from_mode(0o1777))
            .unwrap();
        let shown = mount.point("sda", &chain.files[0]);
        as_nobody(&format!("head -c 1 '{}' >/dev/null", shown.display())).status.success()
    };
    let private = Mount::new(dir.path());
    assert!(!try_read(&private));
    let mode = |p: &Path| p.metadata().unwrap().mode() & 0o7777;
    assert_eq!(mode(&private.path().join("sda")), 0o500);
    assert_eq!(mode(&private.point("sda", &chain.files[0])), 0o400);
    assert!(!try_read(&Mount::with(dir.path(), &["--allow-other"])));
    let open = Mount::with(dir.path(), &["--allow-other", "--mode=0444", "--uid=7", "--gid=8"]);
    assert!(try_read(&open));
    let meta = open.point("sda", &chain.files[0]).metadata().unwrap();
    assert_eq!((meta.uid(), meta.gid(), meta.mode() & 0o7777), (7, 8, 0o444));
    assert!(try_read(&Mount::with(dir.path(), &["-o", "rw,noauto,allow_other,uid=65534"])));
}

/// A folder of a user without rights with the program in it; that user may read `backups`.
fn for_nobody(backups: &Path) -> tempfile::TempDir {
    std::fs::set_permissions(backups, PermissionsExt::from_mode(0o755)).unwrap();
    let home = tempfile::tempdir().unwrap();
    std::os::unix::fs::chown(home.path(), Some(65534), Some(65534)).unwrap();
    tools::copy_program(FLEECEFS, &home.path().join("fleecefs"));
    home
}

#[test]
fn a_user_mounts_without_root() {
    let tools = [TOOLS.as_slice(), &["setpriv", "fusermount3", "unshare"]].concat();
    // SAFETY: cannot fail.
    if !have("a_user_mounts_without_root", &tools) || unsafe { libc::geteuid() } != 0 {
        return;
    }
    let (dir, chain) = backups();
    let home = for_nobody(dir.path());
    // A /dev/fuse that users may open, as distributions have it, in a name space of its own, with
    // which the mount goes away whatever happens.
    let script = r#"
        cd "$HOME_DIR" && mkdir mnt && mknod fuse c 10 229 && chmod 666 fuse
        chown 65534:65534 mnt && mount --bind fuse /dev/fuse
        user() { setpriv --reuid=65534 --regid=65534 --clear-groups "$@"; }
        user ./fleecefs mount "$BACKUPS" mnt || exit 1
        user head -c 1 "mnt/sda/$POINT" >/dev/null || exit 2
        if head -c 1 "mnt/sda/$POINT" 2>/dev/null >/dev/null; then exit 3; fi
        user ./fleecefs umount mnt || exit 4
        grep -q "$HOME_DIR/mnt" /proc/self/mountinfo && exit 5
        exit 0
    "#;
    let mut point = chain.files[2].file_name().unwrap().to_os_string();
    point.push(".raw");
    let out = Command::new("unshare")
        .args(["-m", "sh", "-c", script])
        .env("HOME_DIR", home.path())
        .env("BACKUPS", dir.path())
        .env("POINT", point)
        .output()
        .unwrap();
    assert!(out.status.success(), "{:?}: {}", out.status.code(), stderr(&out));
}

#[test]
fn a_user_writes_to_points_without_root() {
    let test = "a_user_writes_to_points_without_root";
    let tools = [TOOLS.as_slice(), &["setpriv", "fusermount3", "unshare"]].concat();
    if !have(test, &tools) || !is_root(test) {
        return;
    }
    let (dir, chain) = backups();
    let home = for_nobody(dir.path());
    let script = r#"
        cd "$HOME_DIR" && mkdir mnt && mknod fuse c 10 229 && chmod 666 fuse
        chown 65534:65534 mnt && mount --bind fuse /dev/fuse
        user() { setpriv --reuid=65534 --regid=65534 --clear-groups "$@"; }
        write() { printf "$1" | user dd of="mnt/sda/$POINT" conv=notrunc,fsync status=none; }
        shows() { [ "$(user head -c 3 "mnt/sda/$POINT" | tr '\0\1' '..')" = "$1" ]; }
        user ./fleecefs mount --writable "$BACKUPS" mnt || exit 1
        write new || exit 2
        shows new || exit 3
        user ./fleecefs umount mnt || exit 4
        keep() { user ./fleecefs mount --writable=scratch --keep "$BACKUPS" mnt; }
        keep || exit 5
        shows new && exit 6
        write old || exit 7
        user ./fleecefs umount mnt || exit 8
        user ./fleecefs scratch list scratch | grep -q "sda/${POINT%.raw}" || exit 9
        keep || exit 10
        shows old || exit 11
        user ./fleecefs umount mnt || exit 12
        user ./fleecefs scratch export scratch "sda/${POINT%.raw}" changes.qcow2 || exit 13
        user ./fleecefs mount "$BACKUPS" mnt || exit 14
        user qemu-img convert -O raw changes.qcow2 changes.raw || exit 14
        [ "$(head -c 3 changes.raw)" = old ] && user ./fleecefs umount mnt || exit 14
        user ./fleecefs scratch drop scratch --all || exit 15
        user ./fleecefs scratch list scratch | grep -q sda && exit 16
        keep || exit 17
        shows old && exit 18
        user ./fleecefs umount mnt || exit 19
        exit 0
    "#;
    let mut point = chain.files[2].file_name().unwrap().to_os_string();
    point.push(".raw");
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", script]).env("HOME_DIR", home.path());
    let out = command.env("BACKUPS", dir.path()).env("POINT", point).output().unwrap();
    assert!(out.status.success(), "{:?}: {}", out.status.code(), stderr(&out));
}

/// What is missing is said: to a user all of it is "Permission denied".
#[test]
fn a_user_who_may_not_mount_is_told_what_to_do() {
    let test = "a_user_who_may_not_mount_is_told_what_to_do";
    let tools = [TOOLS.as_slice(), &["setpriv", "fusermount3", "unshare"]].concat();
    if !have(test, &tools) || !is_root(test) {
        return;
    }
    let (dir, _) = backups();
    let home = for_nobody(dir.path());
    let script = r#"
        cd "$HOME_DIR" && mkdir -p own && chown 65534:65534 own && mkdir -p roots || exit 99
        mknod fuse c 10 229; chmod "$MODE" fuse && mount --bind fuse /dev/fuse || exit 99
        exec setpriv --reuid=65534 --regid=65534 --clear-groups $MORE ./fleecefs mount "$BACKUPS" "$AT"
    "#;
    for (mode, more, at, wanted) in [
        ("600", "", "own", "(mode 0600 of user 0: Permission denied"),
        ("666", "", "roots", "on folders they own"),
        ("666", "--no-new-privs", "own", "no_new_privs"),
    ] {
        let mut user = Command::new("unshare");
        user.args(["-m", "sh", "-c", script]).env("HOME_DIR", home.path());
        user.env("BACKUPS", dir.path()).env("MODE", mode).env("MORE", more).env("AT", at);
        let out = user.output().unwrap();
        let said = stderr(&out);
        assert_eq!(out.status.code(), Some(5), "{mode} {more} {at}: {said}");
        assert!(said.contains(wanted) && !said.contains("\\n"), "{mode} {more} {at}: {said}");
    }
}

#[test]
fn new_points_appear_and_removed_ones_go() {
    if !have("new_points_appear_and_removed_ones_go", &TOOLS) {
        return;
    }
    let (dir, mut chain) = backups();
    let mount = Mount::new(dir.path());
    let sda = mount.path().join("sda");
    let before = read(&mount.point("sda", &chain.files[2])).unwrap();
    let held = File::open(mount.point("sda", &chain.files[2])).unwrap();
    held.read_exact_at(&mut [0; 512], 0).unwrap();

    let inc = chain.point("", SIZE, &["write -P 9 40M 64k".to_string()]);
    let shown = mount.point("sda", &inc);
    eventually("the new point", || shown.exists());
    eventually("the link to it", || {
        std::fs::read_link(sda.join("latest.raw")).is_ok_and(|t| sda.join(t) == shown)
    });
    eventually("its last state", || read(&shown).is_ok_and(|b| b[40 << 20] == 9));

    // A new disk in a new folder.
    let other =
        Chain::new(&dir.path().join("vm"), "sdb").point("", MIB, &["write -P 1 0 64k".into()]);
    let shown = mount.point("vm/sdb", &other);
    eventually("the new disk", || shown.exists());

    // The newest two go: one is held open, and goes on being read.
    std::fs::remove_file(&chain.files[3]).unwrap();
    std::fs::remove_file(&chain.files[2]).unwrap();
    eventually("that it is gone", || !mount.point("sda", &chain.files[2]).exists());
    let mut bytes = vec![0; SIZE as usize];
    held.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(first_difference(&bytes, &before), None);
    assert!(read(&mount.point("sda", &chain.files[1])).is_ok());
    std::fs::remove_dir_all(dir.path().join("vm")).unwrap();
    eventually("that the disk is gone", || !mount.path().join("vm").exists());
}

#[test]
fn a_rewritten_file_is_never_mixed_with_what_it_was() {
    if !have("a_rewritten_file_is_never_mixed_with_what_it_was", &TOOLS) {
        return;
    }
    let (dir, chain) = backups();
    let mount = Mount::new(dir.path());
    let shown = mount.point("sda", &chain.files[2]);
    let old = File::open(&shown).unwrap();
    let ino = old.metadata().unwrap().ino();
    let mut byte = [0];
    old.read_exact_at(&mut byte, 4 * MIB).unwrap();
    assert_eq!(byte, [1]);

    // In place: a lower layer gets other bytes where the handle has read already.
    images::qemu_io(&chain.files[0], &["write -P 77 0 8M".to_string()]);
    eventually("an error through the old handle", || match old.read_exact_at(&mut byte, 4 * MIB) {
        Ok(()) => {
            assert_eq!(byte, [1], "bytes of the new generation through an old handle");
            false
        }
        Err(e) => e.raw_os_error() == Some(libc::EIO),
    });
    eventually("the new generation", || read(&shown).is_ok_and(|b| b[4 << 20] == 77));
    assert_ne!(shown.metadata().unwrap().ino(), ino);
    let oracle = Oracle::new(&chain.files);
    assert_eq!(first_difference(&read(&shown).unwrap(), &oracle.bytes(2)), None);
    assert!(old.read_exact_at(&mut byte, 4 * MIB).is_err());

    // Replaced by another file.
    let old = File::open(&shown).unwrap();
    let other = dir.path().join("other.partial");
    run("cp", &[chain.files[2].to_str().unwrap(), other.to_str().unwrap()]);
    images::qemu_io(&other, &["write -P 78 2M 64k".to_string()]);
    std::fs::rename(&other, &chain.files[2]).unwrap();
    eventually("the replaced point", || read(&shown).is_ok_and(|b| b[2 << 20] == 78));
    eventually("an error", || errno(old.read_exact_at(&mut byte, 2 * MIB)) == Some(libc::EIO));
}

#[test]
fn mappings_and_direct_reads_agree_with_plain_ones() {
    if !have("mappings_and_direct_reads_agree_with_plain_ones", &TOOLS) {
        return;
    }
    let (dir, chain) = backups();
    let mount = Mount::new(dir.path());
    let shown = mount.point("sda", &chain.files[2]);
    let out = tempfile::tempdir().unwrap();
    let direct = out.path().join("direct");
    let from = format!("if={}", shown.display());
    let to = format!("of={}", direct.display());
    run("dd", &[&from, &to, "bs=1M", "iflag=direct", "status=none"]);
    let plain = read(&shown).unwrap();
    assert_eq!(first_difference(&read(&direct).unwrap(), &plain), None);
    let file = File::open(&shown).unwrap();
    // SAFETY: a private read-only mapping of a file that nobody shrinks, unmapped below.
    unsafe {
        let len = SIZE as usize;
        let at = libc::mmap(
            std::ptr::null_mut(),
            len,
            libc::PROT_READ,
            libc::MAP_PRIVATE,
            file.as_raw_fd(),
            0,
        );
        assert_ne!(at, libc::MAP_FAILED);
        let bytes = std::slice::from_raw_parts(at.cast::<u8>(), len);
        assert_eq!(first_difference(bytes, &plain), None);
        libc::munmap(at, len);
    }
}

#[test]
fn a_bad_range_is_in_the_log_the_status_and_the_errno() {
    if !have("a_bad_range_is_in_the_log_the_status_and_the_errno", &TOOLS) {
        return;
    }
    let (dir, chain) = backups();
    // The file ends before the data that its tables promise.
    let file = OpenOptions::new().write(true).open(&chain.files[0]).unwrap();
    file.set_len(6 * MIB).unwrap();
    let logs = tempfile::tempdir().unwrap();
    let log = logs.path().join("log");
    let mount = Mount::with(dir.path(), &["--log-file", log.to_str().unwrap()]);
    let shown = File::open(mount.point("sda", &chain.files[2])).unwrap();
    let mut byte = [0];
    assert_eq!(errno(shown.read_exact_at(&mut byte, 7 * MIB)), Some(libc::EIO));
    shown.read_exact_at(&mut byte, 2 * MIB).unwrap();
    assert_eq!(byte, [5]);
    let status = status(mount.path());
    let findings = status["findings"].as_array().unwrap();
    let full = chain.files[0].to_str().unwrap();
    assert!(findings.iter().any(|f| f["path"] == full && f["offset"].is_u64()), "{findings:?}");
    let text = std::fs::read_to_string(&log).unwrap();
    assert!(text.contains("error: ") && text.contains(full), "{text}");
}

#[test]
fn long_listings_are_complete() {
    if !have("long_listings_are_complete", &TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut chain = Chain::new(dir.path(), "sda");
    let full = chain.point("cluster_size=512", 4096, &[]);
    for i in 0..1500 {
        let copy =
            format!("FULL-{}-{}", 1_710_000_000 + i, "a-rather-long-name-of-a-disk".repeat(5));
        std::fs::hard_link(&full, full.with_file_name(copy)).unwrap();
    }
    let mount = Mount::new(dir.path());
    let (mut names, mut todo) = (Vec::new(), vec![mount.path().to_path_buf()]);
    while let Some(dir) = todo.pop() {
        for entry in std::fs::read_dir(dir).unwrap().map(|e| e.unwrap()) {
            match entry.file_type().unwrap() {
                t if t.is_dir() => todo.push(entry.path()),
                t if t.is_file() => names.push(entry.path()),
                _ => {}
            }
        }
    }
    let listed = names.len();
    names.sort();
    names.dedup();
    assert_eq!((names.len(), listed), (1502, 1502), "1501 points and status.json, each once");
    // The same through `ls -l`, which asks for attributes with the names.
    let out = run("ls", &["-lR", mount.path().to_str().unwrap()]);
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert_eq!(text.lines().filter(|l| l.starts_with('-') && l.contains(" FULL-")).count(), 1501);
}

#[test]
fn the_space_is_that_of_the_backups_and_their_file_system() {
    if !have("the_space_is_that_of_the_backups_and_their_file_system", &TOOLS) {
        return;
    }
    let (dir, chain) = backups();
    let mount = Mount::new(dir.path());
    let used: u64 = chain.files.iter().map(|f| f.metadata().unwrap().blocks() * 512).sum();
    let out = run("df", &["-B1", "--output=used,avail", mount.path().to_str().unwrap()]);
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let numbers: Vec<u64> =
        text.lines().nth(1).unwrap().split_whitespace().map(|n| n.parse().unwrap()).collect();
    assert!(numbers[0].abs_diff(used) <= 4096, "{numbers:?} {used}");
    // Free is what is free where the backups are; others write there meanwhile.
    let out = run("df", &["-B1", "--output=avail", dir.path().to_str().unwrap()]);
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let free: u64 = text.lines().nth(1).unwrap().trim().parse().unwrap();
    assert!(numbers[1] > 0 && numbers[1].abs_diff(free) < free / 4, "{numbers:?} {free}");
}
