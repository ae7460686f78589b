//! The whole life of a chain: what backups made after consolidate and prune is right, and verify
//! finds the directory sound at each stage.

use std::path::{Path, PathBuf};
use std::process::Command;

use fleecefs::manifest;

use crate::support::backup::{Caller, images, newest, same};
use crate::support::mount::Mount;
use crate::support::qemu::storage_daemon::Daemon;
use crate::support::tools::{have, run};

const TOOLS: &[&str] = &["qemu-storage-daemon", "qemu-img", "qemu-io", "/dev/fuse"];
const SIZE: u64 = 16 << 20;
const DISK: &str = "a";

struct Life {
    caller: Caller,
    /// Image and what it must hold.
    points: Vec<(PathBuf, Vec<u8>)>,
    folder: String,
}

impl Life {
    fn backup(&mut self, level: &str) -> PathBuf {
        let (_, views) = self.caller.held(level);
        let (disk, view) = views.into_iter().next().expect("one disk");
        let image = newest(&self.caller.target, &disk);
        let name = image.file_name().unwrap().to_str().unwrap().to_string();
        assert!(name.starts_with(&level.to_uppercase()), "{level} made {name}");
        self.folder = disk;
        self.points.push((image.clone(), view));
        image
    }

    fn must(&self, verb: &str, rest: &[&str]) -> String {
        let out = Command::new(env!("CARGO_BIN_EXE_fleecefs"))
            .args(["-q", verb])
            .arg(&self.caller.target)
            .args(rest)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&out.stdout).into_owned();
        let err = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success(), "{verb} {rest:?}: {}\n{said}\n{err}", out.status);
        said
    }

    /// Everything is sound, and every point that is there holds what it must.
    fn check(&self, expected: usize) {
        self.must("verify", &[]);
        self.must("verify", &["--quick"]);
        let there = images(&self.caller.target.join(&self.folder));
        assert_eq!(there.len(), expected, "{there:?}");
        let mount = Mount::new(&self.caller.target);
        for image in there {
            let name = image.file_name().unwrap().to_str().unwrap();
            let (_, rest) = name.split_once('-').unwrap();
            let of_that_time = |p: &Path| p.to_str().unwrap().ends_with(&format!("-{rest}"));
            // The newest: what a commit has removed may give its name to what comes next.
            let (_, view) = self.points.iter().rfind(|(p, _)| of_that_time(p)).unwrap();
            same(&mount, &self.folder, &image, view);
        }
    }
}

/// An empty disk.
fn daemon() -> Daemon {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(format!("{DISK}.img"));
    run("qemu-img", &["create", "-q", "-f", "qcow2", path.to_str().unwrap(), "16M"]);
    Daemon::start(dir, &[(DISK, "driver=qcow2")])
}

fn name(image: &Path) -> &str {
    image.file_name().unwrap().to_str().unwrap()
}

#[test]
fn backups_go_on_after_consolidate_and_prune() {
    if !have("backups_go_on_after_consolidate_and_prune", TOOLS) {
        return;
    }
    let d = daemon();
    let churn = d.churn(DISK, SIZE, 1);
    let mut life = Life { caller: Caller::of(&d), points: Vec::new(), folder: String::new() };
    life.backup("full");
    life.backup("inc");
    let second = life.backup("inc");
    life.backup("inc");
    life.check(4);
    // The oldest three become one; the tip stays what it is.
    life.must("consolidate", &[&life.folder, "--until", name(&second)]);
    life.check(2);
    life.backup("inc");
    life.backup("diff");
    life.check(4);
    // The tip itself becomes the FULL, and the bitmap in the guest goes on from it.
    let tip = life.backup("inc");
    life.must("consolidate", &[&life.folder, "--until", name(&tip)]);
    life.check(1);
    life.backup("inc");
    life.backup("diff");
    life.backup("inc");
    life.check(4);
    life.must("prune", &["--keep-last", "2", "--consolidate"]);
    life.backup("inc");
    life.backup("diff");
    life.must("verify", &[]);
    life.backup("full");
    life.backup("inc");
    life.must("prune", &["--keep-last", "2"]);
    life.check(2);
    life.backup("inc");
    life.check(3);
    drop(churn);
}

#[test]
fn a_backup_finishes_a_commit_that_was_killed() {
    if !have("a_backup_finishes_a_commit_that_was_killed", TOOLS) {
        return;
    }
    let d = daemon();
    let churn = d.churn(DISK, SIZE, 1);
    let mut life = Life { caller: Caller::of(&d), points: Vec::new(), folder: String::new() };
    let chain = [life.backup("full"), life.backup("inc"), life.backup("inc")];
    // As a run leaves it that is killed when the new FULL has its first name: that one is made in
    // a copy.
    let folder = life.caller.target.join(&life.folder);
    let aside = tempfile::tempdir().unwrap();
    let copy = aside.path().join(DISK);
    run("cp", &["-a", folder.to_str().unwrap(), copy.to_str().unwrap()]);
    let out = Command::new(env!("CARGO_BIN_EXE_fleecefs")).arg("commit").arg(&copy).output();
    assert!(out.unwrap().status.success());
    let (full, interim) = (name(&chain[0]), name(&chain[2]).replacen("INC", "FULL", 1));
    std::fs::copy(copy.join(full), folder.join(&interim)).unwrap();
    let journal = serde_json::json!({
        "full": full, "interim": interim, "increments": [name(&chain[1]), name(&chain[2])],
        "raw": false, "manifest": manifest::read(&copy, full.as_ref()).unwrap(),
    });
    let path = folder.join(".fleecefs/fold.json");
    std::fs::write(&path, journal.to_string()).unwrap();
    // The FULL holds now what the last INC did; the next backup depends on it.
    life.points[0].1 = life.points[2].1.clone();
    let inc = life.backup("inc");
    assert!(!path.exists());
    life.check(2);
    life.backup("diff");
    life.backup("inc");
    life.check(4);
    // A commit of some increments leaves what the next DIFF goes by.
    let diff = newest_of(&folder, "DIFF");
    std::fs::remove_file(&diff).unwrap();
    manifest::remove(&folder, diff.file_name().unwrap()).unwrap();
    let rest = ["--until", name(&inc)];
    let mut commit = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
    let out = commit.arg("commit").arg(&folder).args(rest).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    life.points[0].1 = life.points[3].1.clone();
    life.check(2);
    life.backup("diff");
    life.check(3);
    drop(churn);
}

fn newest_of(folder: &Path, level: &str) -> PathBuf {
    let mut all = images(folder);
    all.retain(|p| name(p).starts_with(level));
    all.pop().expect("there is one")
}
