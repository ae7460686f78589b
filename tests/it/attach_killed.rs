//! `attach` and `detach` killed at each of their steps: the next `detach` leaves nothing of them, and nothing of the
//! machine's own is touched.

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::support::attached::{self, Attach, succeeded};
use crate::support::file_systems::{Points, TOOLS, said};
use crate::support::tools::{have, is_root, run};

/// A disk with an ext4 and a btrfs: every kind of step that needs no device mapper.
fn points(dir: &Path) -> Points {
    let disk = dir.join("disk");
    std::fs::File::create(&disk).unwrap().set_len(160 << 20).unwrap();
    let path = disk.to_str().unwrap();
    let table = r#"printf 'label: gpt\nstart=2048, size=40960\nstart=43008, size=270336\n' | sfdisk -q "$1""#;
    run("sh", &["-e", "-c", table, "sh", path]);
    run("mkfs.ext4", &["-q", "-F", "-E", "offset=1048576", path, "20M"]);
    let btrfs = dir.join("btrfs");
    std::fs::File::create(&btrfs).unwrap().set_len(132 << 20).unwrap();
    run("mkfs.btrfs", &["-q", btrfs.to_str().unwrap()]);
    let from = format!("if={}", btrfs.display());
    run(
        "dd",
        &[&from, &format!("of={path}"), "bs=1M", "seek=21", "conv=notrunc,sparse", "status=none"],
    );
    let mut points = Points::new();
    points.add(&disk);
    points
}

/// How many steps `command` has, by its trace.
fn steps(mut command: Command, trace: &Path) -> usize {
    let _ = std::fs::remove_file(trace);
    succeeded(&command.env("FLEECEFS_STEPS", trace).output().unwrap());
    std::fs::read_to_string(trace).unwrap().lines().count()
}

fn killed(mut command: Command, step: usize) -> Output {
    let out = command.env("FLEECEFS_CRASH_AT", step.to_string()).output().unwrap();
    assert_eq!(out.status.signal(), Some(libc::SIGKILL), "step {step}: {}", said(&out));
    out
}

#[test]
fn killed_at_each_step_nothing_is_left_after_the_next_detach() {
    let test = "killed_at_each_step_nothing_is_left_after_the_next_detach";
    let more = ["sfdisk", "mkfs.ext4", "mkfs.btrfs", "dd"];
    if !have(test, &[TOOLS.as_slice(), &attached::TOOLS, &more].concat()) || !is_root(test) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (points, trace): (_, PathBuf) = (points(dir.path()), dir.path().join("trace"));
    let attach = Attach::new();
    let attaching = || attach.attach_command(points.dir.path(), "vda/latest", &[]);
    let detaching = || attach.command(&["detach", "--all"]);
    let (up, down) = (steps(attaching(), &trace), steps(detaching(), &trace));
    assert!(up >= 14 && down >= 6, "{up} {down}");
    assert_eq!(attach.left(), Vec::<String>::new());
    for step in 1..=up {
        killed(attaching(), step);
        let listed = succeeded(&attach.command(&["attach", "--list"]).output().unwrap());
        assert!(step == up || !listed.contains("since") || listed.contains("(stale"), "{listed}");
        succeeded(&detaching().output().unwrap());
        assert_eq!(attach.left(), Vec::<String>::new(), "attach killed at step {step}");
    }
    for step in 1..=down {
        succeeded(&attaching().output().unwrap());
        killed(detaching(), step);
        succeeded(&detaching().output().unwrap());
        assert_eq!(attach.left(), Vec::<String>::new(), "detach killed at step {step}");
    }
}
