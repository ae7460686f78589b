//! The mount as a process: signals, idling, unmounting, `mount -t`, and what it refuses.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::{Command, Output};
use std::time::Duration;

use crate::support::mount::Mount;
use crate::support::process::{
    eventually, is_gone, is_mounted, server_pid, signal, status, stderr,
};
use crate::support::three_points::{MIB, backups};
use crate::support::tools::have;

const TOOLS: [&str; 3] = ["qemu-img", "qemu-io", "/dev/fuse"];
const FLEECEFS: &str = env!("CARGO_BIN_EXE_fleecefs");

fn fleecefs(args: &[&str]) -> Output {
    Command::new(FLEECEFS).args(args).output().unwrap()
}

#[test]
fn sigterm_unmounts_and_a_second_one_detaches() {
    if !have("sigterm_unmounts_and_a_second_one_detaches", &TOOLS) {
        return;
    }
    let (dir, chain) = backups();
    let mount = Mount::new(dir.path());
    let pid = server_pid(mount.path());
    signal(pid, libc::SIGTERM);
    eventually("the end of an idle mount", || is_gone(pid));
    assert!(!is_mounted(mount.path()));

    let mount = Mount::new(dir.path());
    let pid = server_pid(mount.path());
    let held = File::open(mount.point("sda", &chain.files[0])).unwrap();
    signal(pid, libc::SIGTERM);
    std::thread::sleep(Duration::from_millis(700));
    assert!(is_mounted(mount.path()), "a busy mount stays until it is free");
    held.read_exact_at(&mut [0; 4096], 0).unwrap();
    signal(pid, libc::SIGINT);
    eventually("that it is detached", || !is_mounted(mount.path()));
    held.read_exact_at(&mut [0; 4096], 3 * MIB).unwrap();
    drop(held);
    eventually("the end after the last file", || is_gone(pid));
}

/// It grows while several threads run only at the cost of the kernel's waiting for all processors.
#[test]
fn the_table_of_descriptors_is_large_before_the_first_read() {
    if !have("the_table_of_descriptors_is_large_before_the_first_read", &TOOLS) {
        return;
    }
    let (dir, _) = backups();
    let mount = Mount::new(dir.path());
    let status = std::fs::read_to_string(format!("/proc/{}/status", server_pid(mount.path())));
    let status = status.unwrap();
    let size = status.lines().find_map(|l| l.strip_prefix("FDSize:")).unwrap();
    let most = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum;
    let least = most.map_or(8192, |most| most.min(8192));
    assert!(size.trim().parse::<u64>().unwrap() >= least, "{status}");
}

#[test]
fn an_idle_mount_goes_away_and_a_busy_one_stays() {
    if !have("an_idle_mount_goes_away_and_a_busy_one_stays", &TOOLS) {
        return;
    }
    let (dir, chain) = backups();
    let mount = Mount::with(dir.path(), &["--idle-timeout", "1"]);
    let held = File::open(mount.point("sda", &chain.files[0])).unwrap();
    std::thread::sleep(Duration::from_secs(3));
    held.read_exact_at(&mut [0; 16], 0).unwrap();
    assert!(is_mounted(mount.path()));
    drop(held);
    eventually("that it is unmounted", || !is_mounted(mount.path()));
}

#[test]
fn umount_waits_and_says_why_it_cannot() {
    if !have("umount_waits_and_says_why_it_cannot", &TOOLS) {
        return;
    }
    let (dir, chain) = backups();
    let mount = Mount::new(dir.path());
    let at = mount.path().to_str().unwrap().to_string();
    let held = File::open(mount.point("sda", &chain.files[0])).unwrap();
    let out = fleecefs(&["umount", &at]);
    assert_eq!(out.status.code(), Some(6), "{}", stderr(&out));
    assert!(stderr(&out).contains("in use"), "{}", stderr(&out));
    drop(held);
    let pid = server_pid(mount.path());
    // The file's release may still be on its way to the server.
    eventually("umount", || fleecefs(&["umount", &at]).status.success());
    assert!(is_gone(pid), "umount returns after the process has ended");
    assert!(!is_mounted(mount.path()));
    assert_eq!(fleecefs(&["umount", &at]).status.code(), Some(3));
    let out = fleecefs(&["umount", "/proc"]);
    assert_eq!(out.status.code(), Some(2), "{}", stderr(&out));
}

#[test]
fn mount_refuses_what_makes_no_sense() {
    if !have("mount_refuses_what_makes_no_sense", &TOOLS) {
        return;
    }
    let (dir, _chain) = backups();
    let backups = dir.path().to_str().unwrap();
    let mount = Mount::new(dir.path());
    let at = mount.path().to_str().unwrap();
    for (args, code) in [
        (vec!["mount", "/nonexistent", at], 3),
        (vec!["mount", backups, "/nonexistent"], 3),
        (vec!["mount", backups, backups], 2),
        (vec!["mount", backups, dir.path().parent().unwrap().to_str().unwrap()], 2),
        (vec!["mount", backups, at], 6),
        (vec!["mount", backups, at, "-o", "frobnicate"], 2),
        (vec!["mount", backups, at, "--mode=0666"], 2),
        (vec!["mount", backups, at, "--allow-other", "--allow-root"], 2),
    ] {
        let out = fleecefs(&args);
        assert_eq!(out.status.code(), Some(code), "{args:?}: {}", stderr(&out));
        assert!(!stderr(&out).is_empty(), "{args:?} says nothing");
    }
}

#[test]
fn a_mount_helper_takes_what_mount_8_passes() {
    if !have("a_mount_helper_takes_what_mount_8_passes", &TOOLS) {
        return;
    }
    let (dir, chain) = backups();
    let names = tempfile::tempdir().unwrap();
    for name in ["mount.fleecefs", "mount.fuse.fleecefs"] {
        let helper = names.path().join(name);
        std::os::unix::fs::symlink(FLEECEFS, &helper).unwrap();
        let mount = Mount::by(|at| {
            let options =
                "rw,noexec,nofail,x-systemd.automount,allow_other,mode=0440,cache_size=8M";
            Command::new(&helper).arg(dir.path()).arg(at).args(["-n", "-o", options]).output()
        });
        let meta = mount.point("sda", &chain.files[0]).metadata().unwrap();
        assert_eq!(meta.mode() & 0o7777, 0o440);
        assert_eq!(status(mount.path())["cache"]["limit"], 8 * MIB);
    }
    let fake = Command::new(names.path().join("mount.fleecefs"))
        .args(["/nonexistent", "/nowhere", "-f"])
        .status();
    assert!(fake.unwrap().success());
}

#[test]
fn the_foreground_process_is_the_mount() {
    if !have("the_foreground_process_is_the_mount", &TOOLS) {
        return;
    }
    let (dir, chain) = backups();
    let at = tempfile::tempdir().unwrap();
    let mut child = Command::new(FLEECEFS)
        .args(["-v", "mount", "--foreground"])
        .arg(dir.path())
        .arg(at.path())
        // That it is mounted is a result, and no line of the log.
        .env("FLEECEFS_LOG", "error")
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut name = chain.files[0].file_name().unwrap().to_os_string();
    name.push(".raw");
    eventually("the mount", || at.path().join("sda").join(&name).exists());
    signal(i32::try_from(child.id()).unwrap(), libc::SIGINT);
    assert!(child.wait().unwrap().success());
    let mut log = String::new();
    child.stderr.take().unwrap().read_to_string(&mut log).unwrap();
    assert!(log.contains("is mounted at") && log.contains("is unmounted"), "{log}");
    assert!(!is_mounted(at.path()));
}
