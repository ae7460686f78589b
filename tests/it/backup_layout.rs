//! What a backup leaves in the target: levels, layouts of qmpbackup, formats, modes; and what it
//! refuses to write.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::support::backup::{Caller, bitmaps, images, newest, same};
use crate::support::checked::{clean, code, daemon, good};
use crate::support::mount::Mount;
use crate::support::tools::{have, run};
use serde_json::json;

const TOOLS: &[&str] = &["qemu-storage-daemon", "qemu-img", "qemu-io", "/dev/fuse"];

#[test]
fn copies_and_diffs_leave_the_chain_alone() {
    if !have("copies_and_diffs_leave_the_chain_alone", TOOLS) {
        return;
    }
    let d = daemon(&[]);
    let caller = Caller::of(&d);
    caller.must("full");
    caller.must("inc");
    let before = bitmaps(&mut d.qmp());
    for level in ["copy", "diff", "copy", "diff"] {
        d.io("a", &["write -P 11 7M 1M"]);
        let (_, views) = caller.held(level);
        let mount = Mount::new(&caller.target);
        same(&mount, "a.img", &newest(&caller.target, "a.img"), &views[0].1);
        assert_eq!(bitmaps(&mut d.qmp()), before, "{level}");
    }
    good("after copies and diffs", &d, &caller, &[("a.img", "INC")]);
    let without = caller.with(&["--no-diff"]);
    good("--no-diff", &d, &without, &[("a.img", "INC")]);
    assert_eq!(bitmaps(&mut d.qmp()).len(), 1);
    assert_eq!(code(&caller, "diff").0, Some(12));
    let every = caller.with(&["--full-every", "2"]);
    good("--full-every", &d, &every, &[("a.img", "FULL")]);
    std::thread::sleep(Duration::from_millis(1));
}

#[test]
fn qemu_img_reads_the_chain_and_the_files_are_private() {
    if !have("qemu_img_reads_the_chain_and_the_files_are_private", TOOLS) {
        return;
    }
    use std::os::unix::fs::PermissionsExt;
    let d = daemon(&[]);
    let caller = Caller::of(&d);
    caller.must("full");
    caller.must("copy");
    assert_eq!(std::fs::read(caller.target.join("uuid")).unwrap().len(), 36);
    assert!(caller.target.join("a.img.config").exists());
    for image in images(&caller.target.join("a.img")) {
        let mode = std::fs::metadata(&image).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{}", image.display());
        check_compat(&image);
    }
}

fn check_compat(image: &Path) {
    let out = run("qemu-img", &["info", "--output=json", image.to_str().unwrap()]);
    let info: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(info["format-specific"]["data"]["compat"], "1.1");
}

#[test]
fn layouts_of_qmpbackup() {
    if !have("layouts_of_qmpbackup", TOOLS) {
        return;
    }
    let d = daemon(&[("b", "driver=raw")]);
    let check = |caller: &Caller, dir: &Path, level: &str, disk: &str, suffix: &str| {
        let (_, views) = caller.held(level);
        let (_, view) = views.iter().find(|v| v.0 == format!("{disk}.img")).unwrap();
        let image = images(dir).into_iter().rfind(|p| p.to_str().unwrap().ends_with(suffix));
        let image = image.unwrap_or_else(|| dir.join(suffix));
        let mount = Mount::new(&caller.target);
        let raw = format!("{}.raw", image.file_name().unwrap().to_str().unwrap());
        let found = find(mount.path(), &raw).unwrap_or_else(|| panic!("no {raw} in the mount"));
        assert!(std::fs::read(found).unwrap() == *view, "{}", image.display());
    };
    let mut caller = Caller::of(&d);
    caller.target = d.path("flat");
    let flat = caller.with(&["--no-subdir"]);
    for level in ["full", "inc", "inc"] {
        check(&flat, &d.path("flat"), level, "a", "a.img");
        d.io("a", &["write -P 77 2M 1M"]);
    }
    // The option forgotten once ends no chain.
    let (exit, said) = code(&caller, "auto");
    assert!(exit == Some(2) && said.contains("go on with --no-subdir"), "{said}");
    check(&flat, &d.path("flat"), "inc", "a", "a.img");
    caller.target = d.path("months");
    let month = jiff::Zoned::now().strftime("%Y-%m").to_string();
    for level in ["auto", "auto"] {
        let dir = d.path("months").join(&month).join("b.img");
        check(&caller.with(&["--monthly"]), &dir, level, "b", "b.img");
    }
    caller.target = d.path("plain");
    check(&caller.with(&["--no-timestamp"]), &d.path("plain/a.img"), "full", "a", "a.img");
    assert!(d.path("plain/a.img/FULL-a.img").is_symlink());
    let (exit, said) = code(&caller.with(&["--no-subdir"]), "auto");
    assert!(exit == Some(2) && said.contains("go on without --no-subdir"), "{said}");
    // The first FULL is there: what follows has times in its names, and depends on it.
    let plain = caller.with(&["--no-timestamp"]);
    for level in ["inc", "auto", "full", "inc"] {
        check(&plain, &d.path("plain/a.img"), level, "a", "a.img");
    }
    caller.target = d.path("bare");
    let bare = caller.with(&["--no-timestamp", "--no-subdir", "--no-symlink"]);
    for level in ["full", "inc", "auto", "full", "inc"] {
        check(&bare, &d.path("bare"), level, "a", "a.img");
        d.io("a", &["write -P 78 3M 1M"]);
    }
    clean("layouts", &d);
}

fn find(dir: &Path, name: &str) -> Option<PathBuf> {
    for e in std::fs::read_dir(dir).ok()?.flatten() {
        if e.file_name() == name {
            return Some(e.path());
        }
        if e.file_type().is_ok_and(|t| t.is_dir())
            && let Some(p) = find(&e.path(), name)
        {
            return Some(p);
        }
    }
    None
}

#[test]
fn encrypted_disks_are_not_written_in_plain_text() {
    let name = "encrypted_disks_are_not_written_in_plain_text";
    if !have(name, TOOLS) {
        return;
    }
    let d = daemon(&[]);
    let mut qmp = d.qmp();
    let secret = json!({"qom-type": "secret", "id": "s", "data": "geheim"});
    qmp.execute("object-add", secret);
    let path = d.path("luks.img");
    run(
        "qemu-img",
        &[
            "create",
            "-q",
            "--object",
            "secret,id=s,data=geheim",
            "-f",
            "qcow2",
            "-o",
            "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
            path.to_str().unwrap(),
            "4M",
        ],
    );
    let file = json!({"driver": "file", "filename": path, "discard": "unmap"});
    qmp.execute(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": "l", "file": file,
        "encrypt": {"format": "luks", "key-secret": "s"}}),
    );
    let top = json!({"driver": "raw", "node-name": "l-top", "file": "l", "discard": "unmap"});
    qmp.execute("blockdev-add", top);
    qmp.execute(
        "block-export-add",
        json!({"type": "nbd", "id": "l-e", "node-name": "l-top",
        "name": "l", "writable": true}),
    );
    drop(qmp);
    let caller = Caller::of(&d);
    let (exit, said) = code(&caller, "full");
    assert_eq!(exit, Some(16), "{said}");
    assert!(said.contains("the disk is encrypted"), "{said}");
    assert!(!d.path("T/luks.img").exists());
    let (exit, said) = code(&caller.with(&["--exclude", "l", "--strict"]), "full");
    assert_eq!(exit, Some(0), "{said}");
    let (_, views) = caller.with(&["--allow-plaintext"]).held("full");
    assert_eq!(views.len(), 2);
    clean(name, &d);
}

/// It takes the events of our jobs for its own: one of us has to wait.
#[test]
fn a_running_job_of_qmpbackup_refuses_the_vm() {
    if !have("a_running_job_of_qmpbackup_refuses_the_vm", TOOLS) {
        return;
    }
    let d = daemon(&[("b", "driver=raw")]);
    let caller = Caller::of(&d);
    let mut qmp = d.qmp();
    let size = std::fs::metadata(d.path("b.img")).unwrap().len();
    let void = json!({"driver": "null-co", "node-name": "void", "size": size, "read-zeroes": true});
    qmp.execute("blockdev-add", void);
    let id = "qmpbackup.b.b.img";
    let job = json!({"job-id": id, "device": "b", "target": "void", "sync": "full", "speed": 1});
    qmp.execute("blockdev-backup", job);
    // Not on that disk, but in the same QEMU.
    let (exit, said) = code(&caller.with(&["--include", "a"]), "full");
    assert!(exit == Some(6) && said.contains("qmpbackup is running"), "{said}");
    qmp.execute("job-cancel", json!({"id": id}));
    let wait = caller.with(&["--include", "a", "--wait", "1m"]);
    assert_eq!(code(&wait, "full").0, Some(0));
    // What it left behind unfinished is told.
    std::fs::write(caller.target.join("a.img/FULL-bar.partial"), b"").unwrap();
    let (exit, said) = code(&caller.with(&["--include", "a"]), "inc");
    assert!(exit == Some(0) && said.contains("FULL-bar.partial"), "{said}");
}
