//! Where what is written to points goes, and something fails: its files are cut, its file system is full, is cut off, or
//! the power goes.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::support::file_systems::{self, Image, cut_off};
use crate::support::guard::{Guard, tied};
use crate::support::images::{Chain, first_difference};
use crate::support::mount::Mount;
use crate::support::owner::fleecefs;
use crate::support::process::{eventually, is_gone, server_pid, signal, status, stderr};
use crate::support::three_points::{MIB, backups};
use crate::support::tools::{have, is_root, run};
use crate::support::writable::{Possible, TOOLS, errno, hashes, keeping, rw, scratch_option, work};

/// The files in a scratch folder that end so.
fn files(scratch: &Path, end: &str) -> Vec<PathBuf> {
    let paths = std::fs::read_dir(scratch).unwrap().map(|e| e.unwrap().path());
    paths.filter(|p| p.to_str().unwrap().ends_with(end)).collect()
}

fn unmount(mount: &Mount) -> std::process::Output {
    fleecefs(&["umount", mount.path().to_str().unwrap()])
}

#[test]
fn an_overlay_that_cannot_be_made_leaves_nothing() {
    let test = "an_overlay_that_cannot_be_made_leaves_nothing";
    if !have(test, &TOOLS) || !is_root(test) {
        return;
    }
    let (dir, chain) = backups();
    let small = tempfile::tempdir().unwrap();
    // The folder's top, the scratch folder, its lock, data and map of an overlay: none is left for what names it.
    let options = "-t tmpfs -o size=8m,nr_inodes=5";
    let _tmpfs = Guard::mount(options, Path::new("none"), small.path());
    let scratch = small.path().join("scratch");
    let mount = keeping(dir.path(), &scratch);
    let shown = mount.point("sda", &chain.files[0]);
    for _ in 0..2 {
        let opened = OpenOptions::new().write(true).open(&shown);
        assert_eq!(errno(opened), Some(libc::ENOSPC));
        let names = std::fs::read_dir(&scratch).unwrap().map(|e| e.unwrap().file_name());
        assert!(names.eq(["overlays.lock"]));
    }
    run("mount", &["-o", "remount,nr_inodes=50", small.path().to_str().unwrap()]);
    rw(&shown).write_all_at(&[7; 100], 0).unwrap();
    assert_eq!(std::fs::read(&shown).unwrap()[..100], [7; 100]);
}

#[test]
fn an_overlay_whose_map_was_cut_is_refused_told_and_never_dropped() {
    let test = "an_overlay_whose_map_was_cut_is_refused_told_and_never_dropped";
    if !have(test, &TOOLS) {
        return;
    }
    let (dir, chain) = backups();
    let scratch = tempfile::tempdir().unwrap();
    let mount = keeping(dir.path(), scratch.path());
    let shown = mount.point("sda", &chain.files[2]);
    rw(&shown).write_all_at(&[7; 300_000], MIB).unwrap();
    let want = std::fs::read(&shown).unwrap();
    assert!(unmount(&mount).status.success());
    drop(mount);
    let map = files(scratch.path(), ".map").pop().unwrap();
    let whole = std::fs::read(&map).unwrap();
    for left in [0, 100, whole.len() - 1] {
        std::fs::write(&map, &whole[..left]).unwrap();
        let mount = keeping(dir.path(), scratch.path());
        let shown = mount.point("sda", &chain.files[2]);
        let findings = status(mount.path())["findings"].to_string();
        assert_eq!(errno(File::open(&shown)), Some(libc::EIO), "{left}");
        assert_eq!(errno(OpenOptions::new().write(true).open(&shown)), Some(libc::EIO), "{left}");
        let name = map.file_name().unwrap().to_str().unwrap();
        assert!(findings.contains("cut short") && findings.contains(name), "{findings}");
        assert!(findings.contains("scratch drop"), "{findings}");
        assert!(std::fs::read(mount.point("sda", &chain.files[1])).is_ok(), "the others are there");
        assert!(unmount(&mount).status.success());
    }
    std::fs::write(&map, &whole).unwrap();
    let mount = keeping(dir.path(), scratch.path());
    let shown = mount.point("sda", &chain.files[2]);
    assert_eq!(first_difference(&std::fs::read(&shown).unwrap(), &want), None);
    // What an earlier mount has made is nobody's to drop, also if nothing is known to be in it.
    drop(rw(&mount.point("sda", &chain.files[0])));
    let pid = server_pid(mount.path());
    signal(pid, libc::SIGKILL);
    eventually("it is killed", || is_gone(pid));
    drop(mount);
    let mount = keeping(dir.path(), scratch.path());
    assert!(unmount(&mount).status.success());
    assert_eq!(files(scratch.path(), ".json").len(), 2);
}

#[test]
fn what_was_written_over_a_chain_that_was_consolidated_is_exported() {
    let test = "what_was_written_over_a_chain_that_was_consolidated_is_exported";
    if !have(test, &TOOLS) {
        return;
    }
    let (dir, chain) = backups();
    let (scratch, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let text = |p: &Path| p.to_str().unwrap().to_string();
    let name = |i: usize| text(Path::new(chain.files[i].file_name().unwrap()));
    let mount = keeping(dir.path(), scratch.path());
    let shown = mount.point("sda", &chain.files[2]);
    rw(&shown).write_all_at(&[7; 300_000], MIB + 1000).unwrap();
    let want = out.path().join("want.raw");
    std::fs::copy(&shown, &want).unwrap();
    assert!(unmount(&mount).status.success());
    let done = fleecefs(&["consolidate", &text(dir.path()), "sda", "--until", &name(1)]);
    assert!(done.status.success(), "{}", stderr(&done));
    // What it was written over is not proved to be the same, so it is not shown; the way out is named.
    let (option, at) = (scratch_option(scratch.path()), text(mount.path()));
    let again = fleecefs(&["mount", &option, "--keep", &text(dir.path()), &at]);
    assert!(again.status.success(), "{}", stderr(&again));
    assert_eq!(errno(File::open(&shown)), Some(libc::EIO));
    let findings = status(mount.path())["findings"].to_string();
    assert!(findings.contains("scratch export"), "{findings}");
    assert!(unmount(&mount).status.success());
    let image = text(&out.path().join("changes.qcow2"));
    let which = format!("sda/{}", name(2));
    let done = fleecefs(&["scratch", "export", &text(scratch.path()), &which, &image]);
    assert!(done.status.success(), "{}", stderr(&done));
    let plain = fleecefs(&["mount", &text(dir.path()), &at]);
    assert!(plain.status.success(), "{}", stderr(&plain));
    run("qemu-img", &["compare", &image, &text(&want)]);
}

/// A small ext4 on a loop device, whose folder `scratch` a mount may have.
struct Small {
    // Before the folder goes.
    mounted: Guard,
    image: Image,
}

impl Small {
    const TOOLS: [&str; 3] = ["mke2fs", "mount", "/dev/loop-control"];

    fn new() -> Self {
        let image = Image::new(48 << 20, &["mke2fs", "-q", "-F", "-t", "ext4"]);
        let mounted = image.mount("");
        Small { mounted, image }
    }

    fn scratch(&self) -> PathBuf {
        self.image.mnt().join("scratch")
    }
}

#[test]
fn what_cannot_be_written_down_in_the_end_is_told() {
    let test = "what_cannot_be_written_down_in_the_end_is_told";
    let tools = [TOOLS.as_slice(), &Small::TOOLS].concat();
    if !have(test, &tools) || !is_root(test) {
        return;
    }
    let (dir, chain) = backups();
    let small = Small::new();
    let mount = keeping(dir.path(), &small.scratch());
    rw(&mount.point("sda", &chain.files[0])).write_all_at(&[7; 1 << 20], 0).unwrap();
    cut_off(&small.image.mnt());
    let out = unmount(&mount);
    assert_eq!(out.status.code(), Some(1), "{}", stderr(&out));
    assert!(stderr(&out).contains("ended with an error"), "{}", stderr(&out));
    drop((mount, small));
    // The process that was started, where it stays in the foreground.
    let (small, at) = (Small::new(), tempfile::tempdir().unwrap());
    let _unmounted = Guard::of(r#"umount "$1" 2>/dev/null || umount -l "$1""#, &[at.path()]);
    let option = scratch_option(&small.scratch());
    let mut command = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
    command.args(["mount", "--foreground", &option, "--keep"]).arg(dir.path()).arg(at.path());
    let mut server = tied(command.stderr(Stdio::piped())).spawn().unwrap();
    let name = Path::new(chain.files[0].file_name().unwrap()).with_extension("qcow2.raw");
    let shown = at.path().join("sda").join(name);
    eventually("it is mounted", || shown.exists());
    rw(&shown).write_all_at(&[7; 1 << 20], 0).unwrap();
    cut_off(&small.image.mnt());
    run("umount", &[at.path().to_str().unwrap()]);
    let mut said = String::new();
    std::io::Read::read_to_string(&mut server.stderr.take().unwrap(), &mut said).unwrap();
    assert_eq!(server.wait().unwrap().code(), Some(1), "{said}");
    assert!(said.contains("overlay-"), "{said}");
}

/// The scratch is on a device that is cut off at some moment while a writer writes, and its bytes at that moment are
/// gone on with.
#[test]
fn after_a_power_cut_all_that_was_synced_is_there() {
    let test = "after_a_power_cut_all_that_was_synced_is_there";
    let tools = [TOOLS.as_slice(), &Small::TOOLS].concat();
    if !have(test, &tools) || !is_root(test) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut chain = Chain::new(dir.path(), "sda");
    chain.point("", 4 * MIB, &["write -P 1 0 1M".to_string()]);
    let before = hashes(dir.path());
    for rounds in 1..5 {
        let small = Small::new();
        let mount = keeping(dir.path(), &small.scratch());
        let shown = mount.point("sda", &chain.files[0]);
        let (mut possible, done) =
            (Possible::new(&std::fs::read(&shown).unwrap()), AtomicUsize::new(0));
        std::thread::scope(|s| {
            let writer = s.spawn(|| {
                let file = rw(&shown);
                let mut seed = rounds;
                while work(&file, &mut possible, seed) {
                    seed += 100;
                    done.fetch_add(1, Ordering::SeqCst);
                }
            });
            eventually("some rounds are written", || {
                done.load(Ordering::SeqCst) >= rounds as usize
            });
            cut_off(&small.image.mnt());
            writer.join().unwrap();
        });
        let copy = dir.path().with_extension("cut");
        let _gone = Guard::of(r#"rm -f "$1""#, &[&copy]);
        let (from, to) = (small.image.path(), copy.to_str().unwrap());
        run("cp", &["--sparse=always", from.to_str().unwrap(), to]);
        drop((mount, small.mounted));
        let mnt = small.image.mnt();
        let _again = file_systems::mount(&copy, &mnt, "").unwrap();
        let mount = keeping(dir.path(), &mnt.join("scratch"));
        let shown = mount.point("sda", &chain.files[0]);
        possible.check(&std::fs::read(&shown).unwrap(), &format!("cut after {rounds} rounds"));
        // And it goes on from there.
        let mut possible = Possible::new(&std::fs::read(&shown).unwrap());
        assert!(work(&rw(&shown), &mut possible, rounds + 1));
        drop(mount);
    }
    assert!(hashes(dir.path()) == before);
}
