//! The promise: a copy of a disk is not taken for the disk, nor another directory for the one that was meant,
//! without a word.

use std::process::Command;

use crate::support::backup::{images, level, same};
use crate::support::mount::Mount;
use crate::support::qemu::one_disk::{Vm, image};
use crate::support::shut_off::*;
use crate::support::tools::have;

const QEMU: &[&str] = &["qemu-system-x86_64", "qemu-storage-daemon", "qemu-img", "qemu-io"];

/// A path that is mistyped in its last letters makes a new backup directory.
#[test]
fn a_first_backup_to_another_target_is_warned_of() {
    if !have("a_first_backup_to_another_target_is_warned_of", QEMU) {
        return;
    }
    let (d, file, mut caller) = shut_off();
    let (known, state) = (caller.target.clone(), caller.state.clone());
    // T, or Tt once that is one: of several, any is named.
    let told = format!("it has been backed up to {}", s(&known));
    let missing = d.path().join("none");
    for words in [&["info", "status"][..], &["recover"], &["cancel"]] {
        for target in [&missing, &d.path().join("vm")] {
            let mut c = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
            c.args(words).arg("--target").arg(target).arg("--state-dir").arg(&state);
            refused(&c.output().unwrap(), 3, "no backup --offline to this backup directory");
        }
    }
    for new in ["Tt", "empty"] {
        caller.target = d.path().join(new);
        if new == "empty" {
            std::fs::create_dir(&caller.target).unwrap();
        }
        let dry = offline(&caller, "auto", &[s(&file)], &["-n"]);
        assert!(String::from_utf8_lossy(&dry.stderr).contains(&told), "{dry:?}");
        refused(&offline(&caller, "auto", &[s(&file)], &["-q", "--strict"]), 17, &told);
        assert_eq!(images(&caller.target.join("data.qcow2")).len(), 1, "it is made");
        // From here on it is known.
        let out = offline(&caller, "auto", &[s(&file)], &["-q", "--strict"]);
        refused(&out, 0, "");
        assert_eq!(String::from_utf8_lossy(&out.stderr), "");
    }
    // A copy is meant, a target that is begun on purpose too, and another disk was nowhere yet.
    let other = image(&d.path().join("vm/other.qcow2"));
    for (new, level, file, more) in [
        ("copies", "copy", &file, &[][..]),
        ("begun", "auto", &file, &["--init"]),
        ("others", "auto", &other, &[]),
    ] {
        caller.target = d.path().join(new);
        let more = [&["-q", "--strict"], more].concat();
        refused(&offline(&caller, level, &[s(file)], &more), 0, "");
    }
    // The VM itself, by its socket.
    let vm = Vm::start(d.path(), &file, &UUID);
    let mut caller = vm.caller.clone();
    caller.target = d.path().join("Ttt");
    let out = caller.with(&["-q", "--strict"]).run("auto");
    refused(&out, 17, "first backup of web to");
    vm.quit();
}

/// `cp` takes the bitmaps along.
#[test]
fn a_copy_does_not_go_on_with_the_points_of_its_original() {
    if !have("a_copy_does_not_go_on_with_the_points_of_its_original", QEMU) {
        return;
    }
    let d = tempfile::tempdir().unwrap();
    let caller = caller(d.path());
    let file = image(&d.path().join("e.qcow2"));
    must(&caller, "auto", &file);
    must(&caller, "auto", &file);
    let copy = d.path().join("q/d.qcow2");
    std::fs::create_dir(d.path().join("q")).unwrap();
    std::fs::copy(&file, &copy).unwrap();
    write(&file, "write -P 1 0 64k");
    write(&copy, "write -P 2 0 64k");
    let truth = bytes(&copy, "qcow2");
    let out = offline(&caller, "auto", &[s(&copy)], &["-q", "--strict"]);
    refused(&out, 17, &format!("{}, which is still there", s(&file)));
    refused(&out, 17, "--name");
    assert_eq!(images(&caller.target.join("e.qcow2")).len(), 2);
    assert_eq!(level(&caller, "d.qcow2"), "FULL");
    // From here on each goes on by itself.
    must(&caller, "inc", &file);
    assert_eq!(must(&caller, "auto", &copy).matches("bitmaps of").count(), 0);
    assert_eq!(
        (level(&caller, "e.qcow2"), level(&caller, "d.qcow2")),
        ("INC".into(), "INC".into())
    );
    let mount = Mount::new(&caller.target);
    let made = images(&caller.target.join("d.qcow2"));
    same(&mount, "d.qcow2", &made[0], &truth);
    drop(mount);
    verified(&caller.target);
}
