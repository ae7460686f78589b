//! A guest with one disk, and what a backup of it left.

use std::path::{Path, PathBuf};

use super::backup::{Caller, leftovers, newest, ours_in_qemu};
use super::guest::{Disk, Guest, has_qemu};
use super::tools::{have, run};

/// What its tests need.
pub const TOOLS: &[&str] = &["qemu-img", "/dev/fuse"];

/// A new disk of 64 MiB.
pub fn image(dir: &Path, name: &str, format: &str, options: &str) -> PathBuf {
    let path = dir.join(format!("{name}.img"));
    let p = path.to_str().unwrap();
    let mut args = vec!["create", "-q", "-f", format];
    if !options.is_empty() {
        args.extend(["-o", options]);
    }
    args.extend([p, "64M"]);
    run("qemu-img", &args);
    path
}

/// A guest with the disk `a`, which `writer` writes to; `None` where something is missing.
pub fn small_guest(name: &str, dir: &Path, writer: &str, qemu: &[&str]) -> Option<Guest> {
    if !have(name, TOOLS) || !has_qemu(name) {
        return None;
    }
    let disks = [Disk::new("a", image(dir, "a", "qcow2", ""))];
    let guest = Guest::launch(name, &disks, &[writer], qemu)?;
    guest.wait_ready();
    Some(guest)
}

/// The newest manifest of a disk.
pub fn manifest(caller: &Caller, disk: &str) -> serde_json::Value {
    let image = newest(&caller.target, disk);
    let name = format!("{}.json", image.file_name().unwrap().to_str().unwrap());
    let path = image.parent().unwrap().join(".fleecefs").join(name);
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// Nothing of ours is left, in QEMU or in files.
pub fn clean(guest: &Guest, dir: &Path) {
    assert_eq!(ours_in_qemu(&mut guest.qmp()), Vec::<String>::new());
    assert_eq!(leftovers(dir), Vec::<PathBuf>::new());
    assert_eq!(leftovers(guest.path("").as_path()), Vec::<PathBuf>::new());
}

/// The journal, if there is one.
pub fn journal(caller: &Caller) -> String {
    let files = std::fs::read_dir(&caller.state).into_iter().flatten().flatten();
    let mut journals =
        files.map(|e| e.path()).filter(|p| p.extension().is_some_and(|e| e == "journal"));
    journals.next().map_or_else(String::new, |p| std::fs::read_to_string(p).unwrap())
}
