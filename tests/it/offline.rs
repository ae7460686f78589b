//! Backups of shut-off VMs: the chain goes on from the VM's own QEMU to ours and back, whatever dies; what is
//! in use or uncertain is refused.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::support::backup::{self, Caller, images, level, manifest_of, newest, same};
use crate::support::mount::Mount;
use crate::support::qemu::one_disk::{self, Vm, image};
use crate::support::shut_off::*;
use crate::support::tools::{have, is_root, run};
use serde_json::Value;

const QEMU: &[&str] = &["qemu-system-x86_64", "qemu-storage-daemon", "qemu-img", "qemu-io"];

#[test]
fn the_chain_goes_on_while_the_vm_is_off_and_when_it_runs_again() {
    if !have("the_chain_goes_on_while_the_vm_is_off_and_when_it_runs_again", QEMU) {
        return;
    }
    let d = tempfile::tempdir().unwrap();
    let file = image(&d.path().join("vm/data.qcow2"));
    let mut truth: Vec<Vec<u8>> = Vec::new();
    let vm = Vm::start(d.path(), &file, &UUID);
    let caller = vm.caller.clone();
    caller.must("full");
    vm.quit();
    truth.push(bytes(&file, "qcow2"));
    // A guest that writes and shuts down: qemu-io sets the bits of its bitmaps as well.
    for (i, level_word) in ["inc", "diff", "auto", "copy"].into_iter().enumerate() {
        write(&file, &format!("write -P {} {}k 192k", 10 + i, 512 * i));
        truth.push(bytes(&file, "qcow2"));
        must(&caller, level_word, &file);
        let want = if level_word == "auto" { "INC" } else { &level_word.to_uppercase() };
        assert_eq!(level(&caller, "data.qcow2"), want);
    }
    write(&file, "write -P 20 3M 192k");
    truth.push(bytes(&file, "qcow2"));
    let vm = Vm::start(d.path(), &file, &UUID);
    caller.must("inc");
    vm.quit();
    write(&file, "write -z 1M 128k");
    truth.push(bytes(&file, "qcow2"));
    must(&caller, "inc", &file);
    let made = images(&caller.target.join("data.qcow2"));
    assert_eq!(made.len(), truth.len());
    let mount = Mount::new(&caller.target);
    for (image, truth) in made.iter().zip(&truth) {
        same(&mount, "data.qcow2", image, truth);
    }
    drop(mount);
    verified(&caller.target);
    // Nothing of the daemons stays.
    let state = std::fs::read_dir(&caller.state).unwrap().map(|e| e.unwrap());
    let folders: Vec<_> = state.filter(|e| e.path().is_dir()).map(|e| e.file_name()).collect();
    assert!(!folders.iter().any(|n| n.to_str().unwrap().starts_with("offline-")), "{folders:?}");
    // It is the VM's disk in each of them.
    let [online, off] = [&made[0], &made[1]].map(|i| manifest_of(i));
    for key in ["qdev", "node", "device", "file", "format"] {
        assert_eq!(online["disk"][key], off["disk"][key], "{key}");
    }
    assert_eq!(online["vm"]["query-uuid"], off["vm"]["query-uuid"]);
    assert!(off["consistency"]["reason"].as_str().unwrap().contains("shut off"), "{off:#}");
    let mut list = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
    let list = list.args(["list", "--json", s(&caller.target)]).output().unwrap();
    let list: Value = serde_json::from_slice(&list.stdout).unwrap();
    let words = list["disks"][0]["points"].as_array().unwrap().iter();
    let words: Vec<_> = words.map(|p| p["consistency"].as_str().unwrap()).collect();
    assert_eq!(words[..2], ["crash", "offline"], "{list:#}");
    run("qemu-img", &["check", "-q", s(&file)]);
    assert_eq!(backup::leftovers(d.path()), Vec::<PathBuf>::new());
}

#[test]
fn an_image_in_use_is_refused_and_a_dry_run_changes_nothing() {
    if !have("an_image_in_use_is_refused_and_a_dry_run_changes_nothing", QEMU) {
        return;
    }
    let d = tempfile::tempdir().unwrap();
    let file = image(&d.path().join("vm/data.qcow2"));
    let vm = Vm::start(d.path(), &file, &UUID);
    let caller = vm.caller.clone();
    caller.must("full");
    for more in [&["-n"][..], &[]] {
        let began = Instant::now();
        refused(&offline(&caller, "auto", &[s(&file)], more), 6, "in use by another process");
        assert!(began.elapsed() < Duration::from_secs(10), "it waits for nobody");
    }
    assert_eq!(images(&caller.target.join("data.qcow2")).len(), 1);
    caller.must("inc");
    vm.quit();
    let before = std::fs::read(&file).unwrap();
    let out = offline(&caller, "auto", &[s(&file)], &["-n"]);
    let plan = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success() && plan.contains("n: INC"), "{out:?}");
    assert!(before == std::fs::read(&file).unwrap(), "the dry run wrote to the image");
    assert_eq!(images(&caller.target.join("data.qcow2")).len(), 2);
}

#[test]
fn a_raw_image_gets_a_full_each_time_and_is_told_why() {
    if !have("a_raw_image_gets_a_full_each_time_and_is_told_why", QEMU) {
        return;
    }
    let d = tempfile::tempdir().unwrap();
    let file = d.path().join("data.raw");
    run("qemu-img", &["create", "-q", "-f", "raw", s(&file), "4M"]);
    let caller = caller(d.path());
    must(&caller, "auto", &file);
    let out = offline(&caller, "auto", &[s(&file)], &[]);
    refused(&out, 0, "a raw image keeps no bitmap");
    refused(&offline(&caller, "inc", &[s(&file)], &[]), 12, "a raw image keeps no bitmap");
    let old = d.path().join("old.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "compat=0.10", s(&old), "4M"]);
    let old = [s(&old)];
    assert!(offline(&caller, "auto", &old, &[]).status.success());
    refused(&offline(&caller, "auto", &old, &[]), 0, "a qcow2 image of version 2 keeps no bitmap");
    assert_eq!(level(&caller, "data.raw"), "FULL");
    assert_eq!(manifest_of(&newest(&caller.target, "data.raw"))["bitmap"], Value::Null);
}

/// The names of the steps of an INC, in their order, each once.
fn kinds_of_steps(caller: &Caller, file: &Path, trace: &Path) -> Vec<String> {
    let out = command(caller, "inc", &[s(file)], &[]).env("FLEECEFS_STEPS", trace).output();
    assert!(out.unwrap().status.success());
    let steps = std::fs::read_to_string(trace).unwrap();
    std::fs::remove_file(trace).unwrap();
    let mut names: Vec<String> = Vec::new();
    for (_, name) in steps.lines().map(|l| l.split_once(' ').expect("a number")) {
        if !names.iter().any(|n| n == name) {
            names.push(name.to_string());
        }
    }
    assert!(names.len() > 24, "{names:?}");
    names
}

#[test]
fn killed_at_any_time_the_daemon_ends_and_the_chain_goes_on() {
    if !have("killed_at_any_time_the_daemon_ends_and_the_chain_goes_on", QEMU) {
        return;
    }
    let (d, file, caller) = shut_off();
    let steps = kinds_of_steps(&caller, &file, &d.path().join("steps"));
    // Not all: `crash` has each of them.
    let (mut kills, each) = (0, steps.len() / 8);
    for (i, at) in steps.iter().enumerate().step_by(each) {
        write(&file, &format!("write -P {} {}k 64k", 1 + i % 200, (i * 63) % 4000));
        let status = command(&caller, "inc", &[s(&file)], &[])
            .env("FLEECEFS_CRASH_AT", at)
            .stderr(std::process::Stdio::null())
            .status()
            .unwrap();
        assert_eq!(status.code(), None, "step {at}");
        kills += 1;
        let end = Instant::now() + Duration::from_secs(30);
        // Without waiting for it, the next run comes; every other time the VM is started first.
        if kills % 2 == 0 {
            while !processes(s(&caller.state)).is_empty() {
                assert!(Instant::now() < end, "step {at}: the daemon lives on");
                std::thread::sleep(Duration::from_millis(20));
            }
            let vm = Vm::start(d.path(), &file, &UUID);
            caller.must("inc");
            vm.quit();
        } else {
            must(&caller, "inc", &file);
        }
        let truth = bytes(&file, "qcow2");
        let mount = Mount::new(&caller.target);
        same(&mount, "data.qcow2", &newest(&caller.target, "data.qcow2"), &truth);
        drop(mount);
    }
    println!("killed {kills} times");
    must(&caller, "inc", &file);
    verified(&caller.target);
    run("qemu-img", &["check", "-q", s(&file)]);
    assert_eq!(processes(s(&caller.state)), Vec::<PathBuf>::new());
    assert_eq!(backup::leftovers(d.path()), Vec::<PathBuf>::new());
    let info = run("qemu-img", &["info", "--output", "json", s(&file)]);
    let info: Value = serde_json::from_slice(&info.stdout).unwrap();
    let left = info["format-specific"]["data"]["bitmaps"].as_array().unwrap().len();
    // That of the tip, that of the FULL, and their watermarks.
    assert!(left <= 4, "{info:#}");
}

#[test]
fn the_daemon_has_few_rights() {
    let test = "the_daemon_has_few_rights";
    if !have(test, QEMU) || !is_root(test) {
        return;
    }
    let d = tempfile::tempdir().unwrap();
    let file = image(&d.path().join("vm/data.qcow2"));
    let caller = caller(d.path());
    let full = command(&caller, "full", &[s(&file)], &[]);
    let mut child = backup::stopped(full, "files created", &d.path().join("stderr"));
    let daemons = processes(s(&caller.state));
    let [daemon] = daemons.as_slice() else { panic!("{daemons:?}") };
    let status = std::fs::read_to_string(daemon.join("status")).unwrap();
    let has =
        |key: &str| status.lines().find_map(|l| l.strip_prefix(key)).unwrap().trim().to_string();
    assert_eq!(has("NoNewPrivs:"), "1");
    assert_eq!(u64::from_str_radix(&has("CapEff:"), 16).unwrap() & !6, 0, "{status}");
    assert_eq!(u64::from_str_radix(&has("CapPrm:"), 16).unwrap() & !6, 0, "{status}");
    let mode = std::fs::metadata(
        std::fs::read_dir(&caller.state)
            .unwrap()
            .map(|e| e.unwrap().path())
            .find(|p| {
                p.is_dir() && p.file_name().unwrap().to_str().unwrap().starts_with("offline-")
            })
            .unwrap(),
    )
    .unwrap()
    .permissions()
    .mode();
    assert_eq!(mode & 0o77, 0);
    // SAFETY: a signal to our own child, which is not reaped.
    unsafe { libc::kill(child.id() as i32, libc::SIGKILL) };
    child.wait().unwrap();
    wait_for_no_daemon(&caller);
}

#[test]
fn what_a_header_says_is_not_believed() {
    if !have("what_a_header_says_is_not_believed", QEMU) {
        return;
    }
    let d = tempfile::tempdir().unwrap();
    let caller = caller(d.path());
    // The guest of a raw disk writes a header that names a file of the host.
    let (secret, disk) = (d.path().join("secret"), d.path().join("disk.img"));
    std::fs::write(&secret, "secret".repeat(100_000)).unwrap();
    let create = ["create", "-q", "-f", "qcow2", "-b", s(&secret), "-F", "raw", s(&disk), "1M"];
    run("qemu-img", &create);
    refused(&offline(&caller, "full", &[s(&disk)], &[]), 2, "its format is not certain");
    let raw = format!("raw:{}", s(&disk));
    assert!(offline(&caller, "full", &[&raw], &[]).status.success());
    // From then on the target knows.
    must(&caller, "full", &disk);
    let mount = Mount::new(&caller.target);
    let image = newest(&caller.target, "disk.img");
    let truth = std::fs::read(&disk).unwrap();
    let got = std::fs::read(mount.point("disk.img", &image)).unwrap();
    assert!(got[..truth.len()] == truth[..], "the header's bytes are the disk's");
    drop(mount);
    // Nor is a format that an older point had.
    let was = d.path().join("was.img");
    one_disk::image(&was);
    let qcow2 = format!("qcow2:{}", s(&was));
    assert!(offline(&caller, "full", &[&qcow2], &[]).status.success());
    std::fs::copy(&disk, &was).unwrap();
    let before = std::fs::read(&was).unwrap();
    refused(&offline(&caller, "full", &[s(&was)], &[]), 2, "its format is not certain");
    assert!(std::fs::read(&was).unwrap() == before);
    // Backing files are named by the user as well.
    let (base, thin) = (d.path().join("base.qcow2"), d.path().join("thin.qcow2"));
    one_disk::image(&base);
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", s(&base), "-F", "qcow2", s(&thin)]);
    let truth = bytes(&thin, "qcow2");
    refused(&offline(&caller, "full", &[s(&thin)], &[]), 5, "is named only by the image's header");
    let lies = ["--backing-file", s(&base)];
    assert!(offline(&caller, "full", &[s(&thin)], &lies).status.success());
    let mount = Mount::new(&caller.target);
    same(&mount, "thin.qcow2", &newest(&caller.target, "thin.qcow2"), &truth);
    drop(mount);
    // Today's qemu-img writes the format always; older ones did not.
    let mut header = std::fs::read(&thin).unwrap();
    let at = header.windows(4).position(|w| w == [0xe2, 0x79, 0x2a, 0xca]).unwrap();
    header[at..at + 4].fill(0);
    std::fs::write(&thin, header).unwrap();
    refused(
        &offline(&caller, "full", &[s(&thin)], &lies),
        11,
        "names no format for its backing file",
    );
}

/// Whoever may rename in a folder could put another file in the place of what was looked at.
#[test]
fn where_others_could_exchange_an_image_it_is_not_opened() {
    let name = "where_others_could_exchange_an_image_it_is_not_opened";
    if !have(name, QEMU) || !is_root(name) {
        return;
    }
    let d = tempfile::tempdir().unwrap();
    let caller = caller(d.path());
    let (theirs, mine) = (d.path().join("theirs/disk.qcow2"), d.path().join("disk.qcow2"));
    one_disk::image(&theirs);
    one_disk::image(&mine);
    let give = |path: &Path, user: u32| std::os::unix::fs::chown(path, Some(user), None).unwrap();
    give(theirs.parent().unwrap(), 65534);
    refused(&offline(&caller, "full", &[s(&theirs)], &[]), 5, "--as-owner");
    // Nor into a target in which others could.
    must(&caller, "full", &mine);
    give(&caller.target, 65534);
    refused(&offline(&caller, "full", &[s(&mine)], &[]), 5, "--as-owner");
    give(&caller.target, 0);
    must(&caller, "inc", &mine);
}

#[test]
fn whose_disk_it_is_has_to_be_known() {
    if !have("whose_disk_it_is_has_to_be_known", QEMU) {
        return;
    }
    let (d, file, caller) = shut_off();
    let other = image(&d.path().join("other/disk.qcow2"));
    refused(&offline(&caller, "auto", &[s(&other)], &[]), 2, "none of these disks");
    refused(
        &offline(&caller, "auto", &[s(&d.path().join("none"))], &[]),
        3,
        "cannot find the image",
    );
    refused(&offline(&caller, "auto", &[s(&file), s(&file)], &[]), 2, "given twice");
    // With one that it knows, it is that VM's.
    let out = offline(&caller, "auto", &[s(&file), s(&other)], &[]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    assert_eq!(level(&caller, "data.qcow2"), "INC");
    assert_eq!(level(&caller, "disk.qcow2"), "FULL");
    assert_eq!(
        manifest_of(&newest(&caller.target, "disk.qcow2"))["vm"]["query-uuid"]["UUID"],
        UUID[1]
    );
    // Its path may be written in any way, and a name with or without the format.
    for (folder, name) in
        [("one", "other/disk.qcow2=one"), ("two", "qcow2:./other/../other/disk.qcow2=two")]
    {
        let out = offline(&caller, "full", &["./other/disk.qcow2"], &["--shared", "--name", name]);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        assert_eq!(images(&caller.target.join(folder)).len(), 1, "{name}");
    }
    // The file was moved while the VM was off.
    let moved = d.path().join("vm/moved.qcow2");
    std::fs::rename(&file, &moved).unwrap();
    let name = format!("{}=data.qcow2", s(&moved));
    let out = offline(&caller, "inc", &[s(&moved)], &["--name", &name]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    assert_eq!(level(&caller, "data.qcow2"), "INC");
    assert_eq!(images(&caller.target.join("data.qcow2")).len(), 3);
    verified(&caller.target);
}

/// A bitmap of the disk does not say that something was written below it.
#[test]
fn a_backing_file_that_was_changed_makes_a_full() {
    if !have("a_backing_file_that_was_changed_makes_a_full", QEMU) {
        return;
    }
    let d = tempfile::tempdir().unwrap();
    let caller = caller(d.path());
    let (base, thin) = (d.path().join("base.qcow2"), d.path().join("thin.qcow2"));
    one_disk::image(&base);
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", s(&base), "-F", "qcow2", s(&thin)]);
    let lies = ["--backing-file", s(&base)];
    let take = |want: &str, words: &str| {
        let out = offline(&caller, "auto", &[s(&thin)], &lies);
        refused(&out, 0, words);
        assert_eq!(level(&caller, "thin.qcow2"), want, "{words}");
        let mount = Mount::new(&caller.target);
        same(&mount, "thin.qcow2", &newest(&caller.target, "thin.qcow2"), &bytes(&thin, "qcow2"));
    };
    take("FULL", "first backup");
    write(&thin, "write -P 7 0 64k");
    take("INC", "");
    write(&base, "write -P 9 1M 256k");
    refused(&offline(&caller, "inc", &[s(&thin)], &lies), 12, "is not as it was at INC-");
    take("FULL", "base.qcow2 is not as it was at INC-");
    let changed = manifest_of(&newest(&caller.target, "thin.qcow2"));
    assert_eq!(changed["backing"][0]["file"], s(&base), "{changed:#}");
    write(&thin, "write -P 8 128k 64k");
    take("INC", "");
    // Another file with the same bytes and times may be anything.
    let other = d.path().join("other.qcow2");
    run("cp", &["-p", s(&base), s(&other)]);
    std::fs::rename(&other, &base).unwrap();
    take("FULL", "is not as it was at INC-");
    // The disk depends on nothing any more.
    run("qemu-img", &["rebase", "-q", "-u", "-f", "qcow2", "-b", "", s(&thin)]);
    take("FULL", "has no longer the backing file that it had at FULL-");
    take("INC", "");
    run(
        "qemu-img",
        &["rebase", "-q", "-u", "-f", "qcow2", "-b", s(&base), "-F", "qcow2", s(&thin)],
    );
    take("FULL", "has a backing file and had none at INC-");
    take("INC", "");
    verified(&caller.target);
}

/// So a new version of a base image is put in its place, and a running QEMU goes on with the old one.
#[test]
fn a_backing_file_that_is_replaced_under_a_running_vm_makes_a_full_once_it_is_read() {
    let name = "a_backing_file_that_is_replaced_under_a_running_vm_makes_a_full_once_it_is_read";
    if !have(name, QEMU) {
        return;
    }
    let d = tempfile::tempdir().unwrap();
    let (base, thin) = (d.path().join("vm/base.qcow2"), d.path().join("vm/thin.qcow2"));
    image(&base);
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", s(&base), "-F", "qcow2", s(&thin)]);
    let vm = Vm::start(d.path(), &thin, &UUID);
    let caller = vm.caller.clone();
    let take = |want: &str| {
        caller.must("auto");
        assert_eq!(level(&caller, "thin.qcow2"), want);
    };
    let new = d.path().join("vm/new.qcow2");
    run("cp", &[s(&base), s(&new)]);
    write(&new, "write -P 9 1M 256k");
    std::fs::rename(&new, &base).unwrap();
    // The old one, which no path leads to any more.
    take("FULL");
    take("INC");
    vm.quit();
    let vm = Vm::start(d.path(), &thin, &UUID);
    take("FULL");
    take("INC");
    vm.quit();
    let mount = Mount::new(&caller.target);
    same(&mount, "thin.qcow2", &newest(&caller.target, "thin.qcow2"), &bytes(&thin, "qcow2"));
    verified(&caller.target);
}

/// A raw image opens beside the QEMU that has it.
#[test]
fn a_raw_image_in_use_is_refused_before_anything_is_made() {
    if !have("a_raw_image_in_use_is_refused_before_anything_is_made", QEMU) {
        return;
    }
    let d = tempfile::tempdir().unwrap();
    let caller = caller(d.path());
    let (file, thin) = (d.path().join("data.raw"), d.path().join("thin.qcow2"));
    run("qemu-img", &["create", "-q", "-f", "raw", s(&file), "4M"]);
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", s(&file), "-F", "raw", s(&thin)]);
    let mut user = Command::new("qemu-io")
        .args(["-f", "raw", "-c", "sleep 60000", s(&file)])
        .stdin(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let end = Instant::now() + Duration::from_secs(30);
    while offline(&caller, "auto", &[s(&file)], &["-n"]).status.success() {
        assert!(Instant::now() < end, "a dry run does not see it");
    }
    for more in [&["-n"][..], &[]] {
        refused(&offline(&caller, "auto", &[s(&file)], more), 6, "in use by another process");
        let more = [more, &["--backing-file", s(&file)]].concat();
        refused(&offline(&caller, "auto", &[s(&thin)], &more), 6, "in use by another process");
    }
    assert!(!caller.target.exists());
    user.kill().unwrap();
    user.wait().unwrap();
    must(&caller, "auto", &file);
    // While it is backed up no other writes to it.
    let full = command(&caller, "full", &[s(&file)], &[]);
    let mut child = backup::stopped(full, "files created", &d.path().join("stderr"));
    let mut vm = Command::new("qemu-system-x86_64")
        .args(["-accel", "tcg", "-m", "32", "-nodefaults", "-no-user-config", "-display", "none"])
        .args(["-qmp", "stdio", "-device", "virtio-blk-pci,drive=n", "-blockdev"])
        .arg(format!("raw,node-name=n,file.driver=file,file.filename={}", file.display()))
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let mut stdin = vm.stdin.take().unwrap();
    let _ = stdin.write_all(br#"{"execute":"qmp_capabilities"}{"execute":"quit"}"#);
    let started = vm.wait().unwrap().success();
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!started, "a VM with it starts");
    wait_for_no_daemon(&caller);
}

/// A socket's address has 108 bytes.
#[test]
fn the_state_folder_may_have_a_long_path() {
    if !have("the_state_folder_may_have_a_long_path", QEMU) {
        return;
    }
    let d = tempfile::tempdir().unwrap();
    let file = image(&d.path().join("data.qcow2"));
    let mut caller = caller(d.path());
    caller.state = d.path().join("long".repeat(50));
    must(&caller, "full", &file);
    write(&file, "write -P 3 0 64k");
    must(&caller, "inc", &file);
    assert_eq!(level(&caller, "data.qcow2"), "INC");
}

#[test]
fn a_run_is_shown_ended_and_recovered_by_its_target() {
    if !have("a_run_is_shown_ended_and_recovered_by_its_target", QEMU) {
        return;
    }
    let (d, file, caller) = shut_off();
    let target = ["--target", s(&caller.target)];
    let status = ["info", "status", target[0], target[1]];
    assert!(says(&caller, &status).contains("no backup --offline"));
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 5 0 2M", s(&file)]);
    let mut child =
        command(&caller, "inc", &[s(&file)], &["--speed-limit", "16k"]).spawn().unwrap();
    let end = Instant::now() + Duration::from_secs(60);
    while !says(&caller, &status).contains(&format!("(process {})", child.id())) {
        assert!(Instant::now() < end, "its status does not come");
    }
    refused(&offline(&caller, "inc", &[s(&file)], &[]), 6, "info status --target DIR shows it");
    assert!(says(&caller, &["cancel", target[0], target[1]]).contains("stopping backup"));
    assert!(!child.wait().unwrap().success());
    assert_eq!(partials(&caller.target), 0);

    let inc = || command(&caller, "inc", &[s(&file)], &[]);
    kill(inc(), &caller.target);
    let said = says(&caller, &status);
    assert!(said.contains("was interrupted"), "{said}");
    let remedy = format!("'fleecefs recover --target {} --state-dir", s(&caller.target));
    assert!(said.contains(&remedy), "{said}");
    let json: Value =
        serde_json::from_str(&says(&caller, &[&status[..], &["--json"]].concat())).unwrap();
    assert_eq!(
        (&json["state"], &json["target"]),
        (&"interrupted".into(), &s(&caller.target).into())
    );
    let said = says(&caller, &["recover", target[0], target[1]]);
    assert!(said.contains("was not complete: removed") && partials(&caller.target) == 0, "{said}");
    assert!(says(&caller, &["recover", target[0], target[1]]).contains("nothing to recover"));
    assert!(says(&caller, &status).contains("no backup --offline"));

    // So it is by the VM's own recovery, whether it runs or not.
    for runs in [false, true] {
        kill(inc(), &caller.target);
        // Until then it has the image open.
        wait_for_no_daemon(&caller);
        let vm = runs.then(|| Vm::start(d.path(), &file, &UUID));
        let said = says(&caller, &["recover", "--qmp", s(&caller.qmp)]);
        assert_eq!(partials(&caller.target), 0, "{said}");
        if let Some(vm) = vm {
            kill(caller.command("inc"), &caller.target);
            let said = says(&caller, &["info", "status", "--qmp", s(&caller.qmp)]);
            assert!(
                said.contains(&format!("'fleecefs recover --qmp {}", s(&caller.qmp))),
                "{said}"
            );
            says(&caller, &["recover", "--qmp", s(&caller.qmp)]);
            caller.must("inc");
            vm.quit();
        }
    }
    must(&caller, "inc", &file);
    verified(&caller.target);
}
