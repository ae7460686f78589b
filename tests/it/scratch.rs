//! Where that goes which is written to points: a folder and its limit, what is kept there, killed at any step, and who
//! may use it.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use crate::support::guard::Guard;
use crate::support::images::{Chain, first_difference};
use crate::support::mount::Mount;
use crate::support::owner::fleecefs;
use crate::support::process::{eventually, is_gone, server_pid, signal, status, stderr};
use crate::support::three_points::{MIB, SIZE, backups};
use crate::support::tools::{have, is_root, run};
use crate::support::writable::{
    BLOCK, PUNCH, Possible, TOOLS, errno, fallocate, hashes, keeping, rw, scratch_option, work,
};

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
fn what_others_fill_the_disk_with_loses_nothing_that_was_written() {
    let test = "what_others_fill_the_disk_with_loses_nothing_that_was_written";
    if !have(test, &TOOLS) || !is_root(test) {
        return;
    }
    let (dir, chain) = backups();
    let small = tempfile::tempdir().unwrap();
    let _tmpfs = Guard::tmpfs("4m", small.path());
    let scratch = small.path().join("scratch");
    let mount = keeping(dir.path(), &scratch);
    let shown = mount.point("sda", &chain.files[0]);
    let mut want = std::fs::read(&shown).unwrap();
    let file = rw(&shown);
    for block in 0..100 {
        let at = block * 17 * BLOCK;
        file.write_all_at(&[7; BLOCK as usize], at).unwrap();
        want[at as usize..][..BLOCK as usize].fill(7);
    }
    fallocate(&file, PUNCH, 40 * MIB, 20 * MIB).unwrap();
    want[40 * MIB as usize..60 * MIB as usize].fill(0);
    drop(file);
    let filler = File::create(small.path().join("others")).unwrap();
    let mut at = 0;
    while filler.write_all_at(&[1; BLOCK as usize], at).is_ok() {
        at += BLOCK;
    }
    drop(mount);
    drop(filler);
    std::fs::remove_file(small.path().join("others")).unwrap();
    let mount = keeping(dir.path(), &scratch);
    let got = std::fs::read(mount.point("sda", &chain.files[0])).unwrap();
    assert_eq!(first_difference(&got, &want), None);
}

#[test]
fn what_anybody_puts_into_a_folder_for_temporary_files_stops_no_mount() {
    let test = "what_anybody_puts_into_a_folder_for_temporary_files_stops_no_mount";
    if !have(test, &TOOLS) {
        return;
    }
    let (dir, chain) = backups();
    let temporary = tempfile::tempdir().unwrap();
    std::fs::set_permissions(temporary.path(), std::fs::Permissions::from_mode(0o1777)).unwrap();
    let planted = temporary.path().join("overlay-x.json");
    std::fs::write(&planted, "").unwrap();
    let mount = Mount::by(|at| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
        command.args(["mount", "--writable"]).arg(dir.path()).arg(at);
        command.env("TMPDIR", temporary.path()).output()
    });
    rw(&mount.point("sda", &chain.files[0])).write_all_at(&[7; 10], 0).unwrap();
    assert!(planted.exists());
}
