//! What a test has made goes, also if the test is killed.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::guard::{Guard, tied};
use crate::support::images::Chain;
use crate::support::mount::Mount;
use crate::support::process::{eventually, is_gone, is_mounted, signal};
use crate::support::qemu::two_disks::{self, Machine};
use crate::support::storage::{Loop, Slow};
use crate::support::tools::{have, is_root, run};

const TOOLS: &[&str] = &["losetup", "mkfs.ext4", "mount", "/dev/loop-control", "/dev/fuse"];
/// Where the test that is killed has its files.
const PLACE: &str = "FLEECEFS_GUARDS_PLACE";

fn attached(file: &Path) -> bool {
    let out = run("losetup", &["-n", "-O", "NAME", "-j", file.to_str().unwrap()]);
    !out.stdout.is_empty()
}

#[test]
fn what_is_warned_of_is_no_part_of_what_was_made() {
    let made = Guard::new("echo a warning >&2; echo it", ":", &[]);
    assert_eq!(made.made(), Path::new("it"));
    let why = Guard::try_new("echo why >&2; echo half; exit 1", ":", &[]).err().unwrap();
    assert_eq!(why, "why\nhalf");
}

#[test]
fn a_killed_test_leaves_nothing() {
    let name = "a_killed_test_leaves_nothing";
    if !have(name, TOOLS)
        || !have(name, Slow::TOOLS)
        || !have(name, two_disks::TOOLS)
        || !is_root(name)
    {
        return;
    }
    for (sent, group) in [(libc::SIGKILL, false), (libc::SIGKILL, true), (libc::SIGHUP, true)] {
        let place = tempfile::tempdir().unwrap();
        let mut test = Command::new(std::env::current_exe().unwrap());
        test.args(["--ignored", "--exact", "guards::makes_all_kinds_and_waits"])
            .env(PLACE, place.path());
        test.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
        let mut test = tied(&mut test).spawn().unwrap();
        let list = place.path().join("made");
        eventually("all kinds", || {
            assert!(test.try_wait().unwrap().is_none(), "it failed");
            list.exists()
        });
        let made = std::fs::read_to_string(&list).unwrap();
        let made: Vec<(&str, &str)> = made.lines().map(|l| l.split_once(' ').unwrap()).collect();
        let left = || {
            let is_there = |(kind, what): &&(&str, &str)| match *kind {
                "mounted" => is_mounted(Path::new(what)),
                "attached" => attached(Path::new(what)),
                _ => !is_gone(what.parse().unwrap()),
            };
            made.iter().filter(is_there).map(|m| format!("{} {}", m.0, m.1)).collect::<Vec<_>>()
        };
        assert_eq!(left().len(), made.len(), "of {made:?} there are {:?}", left());
        let id = i32::try_from(test.id()).unwrap();
        signal(if group { -id } else { id }, sent);
        test.wait().unwrap();
        let began = Instant::now();
        eventually("nothing is left", || left().is_empty());
        println!("signal {sent}: {} things gone after {:?}", made.len(), began.elapsed());
    }
}

/// The test that is killed.
#[test]
#[ignore = "waits for its end"]
fn makes_all_kinds_and_waits() {
    let Some(place) = std::env::var_os(PLACE).map(PathBuf::from) else { return };
    let backups = place.join("backups");
    Chain::new(&backups, "sda").point("", 1 << 20, &["write -P 1 0 64k".into()]);
    let mount = Mount::new(&backups);
    let (disk, fs, at) = (place.join("disk"), place.join("fs"), place.join("at"));
    for file in [&disk, &fs] {
        std::fs::File::create(file).unwrap().set_len(16 << 20).unwrap();
    }
    std::fs::create_dir(&at).unwrap();
    let looped = Loop::new(&disk);
    run("mkfs.ext4", &["-q", fs.to_str().unwrap()]);
    let inner = Guard::mount("-o loop", &fs, &at);
    let slow = Slow::new(64 << 20);
    let point = mount.path().join("sda/latest.raw");
    // On a file of the mount, which can go only after it.
    let upon = Guard::attach("-r", &point);
    let machine = Machine::launch(&[]);
    let busy = std::fs::File::open(at.join("lost+found")).unwrap();
    let made = format!(
        "mounted {}\nmounted {}\nmounted {}\nattached {}\nattached {}\nprocess {}\n",
        mount.path().display(),
        at.display(),
        slow.mnt().display(),
        disk.display(),
        fs.display(),
        machine.pid(),
    );
    std::fs::write(place.join("made.new"), made).unwrap();
    std::fs::rename(place.join("made.new"), place.join("made")).unwrap();
    std::thread::sleep(Duration::from_secs(60));
    drop((looped, inner, upon, busy));
}

/// A mount or a loop device without a guard stays where the test is killed.
#[test]
fn no_test_mounts_or_attaches_by_itself() {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let mut todo = vec![tests];
    let mut found = Vec::new();
    while let Some(path) = todo.pop() {
        if path.is_dir() {
            todo.extend(std::fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
            continue;
        }
        if path.ends_with("guards.rs") {
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        for (n, line) in text.lines().enumerate() {
            let begins = |call: &str| {
                ["run(", "Command::new("].iter().any(|f| line.contains(&format!("{f}\"{call}\"")))
            };
            let changes = begins("mount") && !line.contains("remount");
            // A list of what there is changes nothing.
            let attaches = begins("losetup") && !line.contains("\"-O\"");
            if attaches || changes {
                found.push(format!("{}:{}: {line}", path.display(), n + 1));
            }
        }
    }
    assert_eq!(found, Vec::<String>::new());
}
