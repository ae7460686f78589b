//! What `verify` found is shown by `list` and `show` until a file changes; nothing of it is in the backup directory.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

use crate::support::images::Chain;
use crate::support::mount::Mount;
use crate::support::tools::{have, is_root, run};

const TOOLS: [&str; 2] = ["qemu-img", "qemu-io"];
const SIZE: u64 = 1 << 20;
const DAY: i64 = 86_400;

/// A backup directory with an id, a disk of a FULL and two INCs, and a state folder.
struct Setup {
    _dir: tempfile::TempDir,
    backups: PathBuf,
    state: PathBuf,
    files: Vec<PathBuf>,
}

impl Setup {
    fn new() -> Self {
        Self::in_dir(tempfile::tempdir().unwrap())
    }

    fn in_dir(dir: tempfile::TempDir) -> Self {
        let top = dir.path().canonicalize().unwrap();
        let backups = top.join("all/vm1");
        let mut chain = Chain::new(&backups, "sda");
        for i in 1..4 {
            chain.point("", SIZE, &[format!("write -P {i} {} 64k", i * 65536)]);
        }
        let files = chain.finish().files;
        std::fs::write(backups.join("uuid"), "5e0cf7f5-1111-4222-8333-444455556666").unwrap();
        Setup { _dir: dir, state: top.join("state"), backups, files }
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
        command.args(words).env("FLEECEFS_STATE_DIR", &self.state);
        command
    }

    fn verify(&self, args: &[&str]) -> Output {
        self.command(&[&["verify"], args].concat()).arg(&self.backups).output().unwrap()
    }

    /// The points in `list --json` of a directory.
    fn listed_at(&self, dir: &Path) -> Vec<Value> {
        let out = self.command(&["list", "--json"]).arg(dir).output().unwrap();
        assert!(out.status.success(), "{out:?}");
        let all: Value = serde_json::from_slice(&out.stdout).unwrap();
        all["disks"][0]["points"].as_array().unwrap().clone()
    }

    fn listed(&self) -> Vec<Value> {
        self.listed_at(&self.backups)
    }

    /// The outcome of each point, `changed`, or `-`.
    fn found(&self) -> Vec<String> {
        let word = |p: &Value| match &p["verified"] {
            Value::Null => "-".to_string(),
            v if v["changed"] == true => "changed".into(),
            v => v["outcome"].as_str().unwrap().into(),
        };
        self.listed().iter().map(word).collect()
    }

    /// The STATE column of the table: what follows the time and the columns of numbers.
    fn table(&self) -> String {
        let out = self.command(&["list"]).arg(&self.backups).output().unwrap();
        assert!(out.status.success(), "{out:?}");
        String::from_utf8(out.stdout).unwrap()
    }

    /// The files of the state folder that say what was verified.
    fn records(&self) -> Vec<PathBuf> {
        let list = std::fs::read_dir(self.state.join("verified")).into_iter().flatten();
        let mut list: Vec<_> = list.map(|e| e.unwrap().path()).collect();
        list.retain(|p| p.extension().is_some_and(|e| e == "json"));
        list
    }

    /// Lets what is recorded have happened `seconds` earlier.
    fn age(&self, seconds: i64) {
        for path in self.records() {
            let mut all: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
            for record in all["points"].as_object_mut().unwrap().values_mut() {
                let time = record["verified"].as_i64().unwrap();
                record["verified"] = (time - seconds).into();
            }
            for time in all["rolling"].as_object_mut().into_iter().flat_map(|o| o.values_mut()) {
                *time = (time.as_i64().unwrap() - seconds).into();
            }
            std::fs::write(&path, serde_json::to_vec(&all).unwrap()).unwrap();
        }
    }
}

/// Every name, size, time and byte below a folder.
fn snapshot(dir: &Path) -> Vec<(PathBuf, u64, i64, i64, Vec<u8>)> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let meta = path.symlink_metadata().unwrap();
        let bytes = if meta.is_file() { std::fs::read(&path).unwrap() } else { Vec::new() };
        all.push((path.clone(), meta.len(), meta.mtime_nsec(), meta.ctime_nsec(), bytes));
        if meta.is_dir() {
            all.extend(snapshot(&path));
        }
    }
    all.sort();
    all
}

#[test]
fn a_list_says_what_was_verified_and_how_long_ago() {
    if !have("a_list_says_what_was_verified_and_how_long_ago", &TOOLS) {
        return;
    }
    let s = Setup::new();
    assert_eq!(s.found(), ["-", "-", "-"]);
    assert!(s.table().contains("\nok: not verified"), "{}", s.table());
    // Without hashes nothing is proved, and that is what it says.
    assert_eq!(s.verify(&[]).status.code(), Some(19));
    assert_eq!(s.found(), ["unproven"; 3]);
    assert!(s.table().contains("unproven just now"), "{}", s.table());
    assert_eq!(s.verify(&["--create"]).status.code(), Some(0));
    assert_eq!(s.found(), ["sound"; 3]);
    assert!(s.listed().iter().all(|p| p["checked"] == true));
    s.age(2 * DAY + 60);
    let table = s.table();
    assert_eq!(table.matches("  verified 2d ago").count(), 3, "{table}");
    assert!(!table.contains("not verified"), "{table}");
    assert!(table.lines().all(|l| l.len() <= 80), "{table}");
    let show = s.command(&["show"]).arg(&s.backups).arg("sda/latest").output().unwrap();
    let show = String::from_utf8(show.stdout).unwrap();
    assert!(show.lines().any(|l| l.starts_with("state ") && l.contains("verified (20")), "{show}");
    let runs = s.command(&["list", "--runs"]).arg(&s.backups).output().unwrap();
    let runs = String::from_utf8(runs.stdout).unwrap();
    assert_eq!(runs.matches("verified 2d ago").count(), 3, "{runs}");
}

#[test]
fn a_plain_verify_writes_nothing_into_the_backup_directory() {
    if !have("a_plain_verify_writes_nothing_into_the_backup_directory", &TOOLS) {
        return;
    }
    let s = Setup::new();
    let before = snapshot(&s.backups);
    s.verify(&[]);
    assert_eq!(snapshot(&s.backups), before);
    assert_eq!(s.records().len(), 1);
    let meta = s.records()[0].metadata().unwrap();
    assert_eq!(meta.permissions().mode() & 0o777, 0o600);
}

#[test]
fn what_changed_after_it_was_verified_is_told_with_all_that_depends_on_it() {
    if !have("what_changed_after_it_was_verified_is_told_with_all_that_depends_on_it", &TOOLS) {
        return;
    }
    let s = Setup::new();
    s.verify(&["--create"]);
    // The same bytes and the same mtime: who writes to a file can set that, and no more.
    let file = std::fs::File::options().write(true).open(&s.files[1]).unwrap();
    let mtime = file.metadata().unwrap().modified().unwrap();
    std::os::unix::fs::FileExt::write_at(&file, b"QFI\xfb", 0).unwrap();
    file.set_modified(mtime).unwrap();
    drop(file);
    assert_eq!(s.found(), ["sound", "changed", "changed"]);
    let table = s.table();
    assert!(table.contains("  changed\n") && table.contains("\nchanged: since"), "{table}");
    assert!(!s.listed()[1]["checked"].as_bool().unwrap());
    s.verify(&[]);
    assert_eq!(s.found(), ["sound"; 3]);
}

#[test]
fn damage_that_verify_found_is_not_forgotten() {
    if !have("damage_that_verify_found_is_not_forgotten", &TOOLS) {
        return;
    }
    let s = Setup::new();
    s.verify(&["--create"]);
    let len = s.files[1].metadata().unwrap().len();
    let file = std::fs::File::options().write(true).open(&s.files[1]).unwrap();
    std::os::unix::fs::FileExt::write_at(&file, b"\xff", len - 1).unwrap();
    drop(file);
    assert_eq!(s.verify(&[]).status.code(), Some(18));
    assert_eq!(s.found(), ["sound", "unsound", "unsound"]);
    let table = s.table();
    assert_eq!(table.matches("UNSOUND just now").count(), 2, "{table}");
    assert!(table.contains("\nUNSOUND: "), "{table}");
    // A restore reads no hashes: it says what is known, and which point is sound.
    let sound = format!("sda/{}", s.files[0].file_name().unwrap().to_str().unwrap());
    for (point, wrong) in [("sda/latest", true), (sound.as_str(), false)] {
        let mut restore = s.command(&["restore", "--force"]);
        restore.arg(&s.backups).arg(point).arg(s.state.join("out.raw"));
        let out = restore.output().unwrap();
        let said = String::from_utf8(out.stderr).unwrap();
        assert!(out.status.success(), "{said}");
        assert_eq!(said.contains("'verify' has found an error in this point"), wrong, "{said}");
        assert_eq!(said.contains(&format!("the newest sound point is {sound}")), wrong, "{said}");
    }
}

#[test]
fn a_point_is_verified_when_the_data_of_all_its_files_was_read() {
    if !have("a_point_is_verified_when_the_data_of_all_its_files_was_read", &TOOLS) {
        return;
    }
    let s = Setup::new();
    s.verify(&["--create"]);
    std::fs::remove_dir_all(s.state.join("verified")).unwrap();
    s.verify(&["--quick"]);
    assert_eq!(s.found(), ["-"; 3]);
    // Of the newest alone; then of what it depends on, longer ago than itself.
    let time = s.listed()[2]["time"].as_str().unwrap().to_string();
    s.verify(&["--since", &time]);
    assert_eq!(s.found(), ["-"; 3]);
    s.verify(&["--point", s.files[1].file_name().unwrap().to_str().unwrap()]);
    assert_eq!(s.found(), ["sound"; 3]);
    s.age(3 * DAY);
    s.verify(&["--since", &time]);
    let table = s.table();
    assert_eq!(table.matches("verified 3d ago").count(), 3, "{table}");
}

#[test]
fn a_directory_is_known_by_its_id_wherever_it_is_and_a_copy_is_another() {
    if !have("a_directory_is_known_by_its_id_wherever_it_is_and_a_copy_is_another", &TOOLS) {
        return;
    }
    let mut s = Setup::new();
    s.verify(&["--create"]);
    let verified = |points: Vec<Value>| points.iter().filter(|p| p["checked"] == true).count();
    let all = s.backups.parent().unwrap().to_path_buf();
    assert_eq!(verified(s.listed_at(&all)), 3);
    assert_eq!(verified(s.listed_at(&s.backups.join("sda"))), 3);
    let copy = all.parent().unwrap().join("copy");
    run("cp", &["-a", s.backups.to_str().unwrap(), copy.to_str().unwrap()]);
    assert!(s.listed_at(&copy).iter().all(|p| p["verified"].is_null()));
    let moved = all.parent().unwrap().join("moved");
    std::fs::rename(&s.backups, &moved).unwrap();
    s.backups = moved;
    assert_eq!(s.found(), ["sound"; 3]);
    // Without an id it is known by its path.
    std::fs::remove_file(s.backups.join("uuid")).unwrap();
    assert_eq!(s.found(), ["-"; 3]);
    s.verify(&[]);
    assert_eq!(s.found(), ["sound"; 3]);
    assert_eq!(s.records().len(), 2);
}

#[test]
fn records_that_cannot_be_read_or_kept_are_no_failure() {
    if !have("records_that_cannot_be_read_or_kept_are_no_failure", &TOOLS) {
        return;
    }
    let s = Setup::new();
    s.verify(&["--create"]);
    let record = s.records().remove(0);
    let whole = std::fs::read(&record).unwrap();
    for bad in [&b""[..], b"{", b"{\"version\":2,\"directory\":\"\",\"points\":{}}", &whole[..99]] {
        std::fs::write(&record, bad).unwrap();
        assert_eq!(s.found(), ["-"; 3]);
    }
    // One that others may write to is not believed, and nothing is written there.
    std::fs::write(&record, &whole).unwrap();
    assert_eq!(s.found(), ["sound"; 3]);
    std::fs::set_permissions(&s.state, std::fs::Permissions::from_mode(0o777)).unwrap();
    assert_eq!(s.found(), ["-"; 3]);
    std::fs::remove_file(&record).unwrap();
    let out = s.verify(&[]);
    assert!(out.status.success() && out.stderr.is_empty(), "{out:?}");
    assert!(s.records().is_empty());
    let mut told = s.command(&["-v", "verify"]);
    let told = told.arg(&s.backups).output().unwrap();
    assert!(String::from_utf8_lossy(&told.stderr).contains("'list' will not show"), "{told:?}");
}

#[test]
fn each_user_has_what_he_verified_himself() {
    const USER: u32 = 1234;
    let name = "each_user_has_what_he_verified_himself";
    if !have(name, &TOOLS) || !is_root(name) {
        return;
    }
    // In a folder that the user can enter.
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let s = Setup::in_dir(dir);
    s.verify(&["--create"]);
    let home = s.state.with_file_name("home");
    std::fs::create_dir(&home).unwrap();
    std::os::unix::fs::chown(&home, Some(USER), Some(USER)).unwrap();
    run("chmod", &["-R", "a+rX", s.backups.to_str().unwrap()]);
    let as_user = |words: &[&str]| {
        let mut command = s.command(words);
        command.uid(USER).gid(USER).env_remove("FLEECEFS_STATE_DIR").env_remove("XDG_STATE_HOME");
        let out = command.env("HOME", &home).arg(&s.backups).output().unwrap();
        assert!(out.status.success(), "{out:?}");
        String::from_utf8(out.stdout).unwrap()
    };
    assert!(as_user(&["list"]).contains("ok: not verified"));
    as_user(&["verify"]);
    assert_eq!(as_user(&["list"]).matches("verified just now").count(), 3);
    assert!(home.join(".local/state/fleecefs/verified").is_dir());
    // Root has its own.
    std::fs::remove_dir_all(&s.state).unwrap();
    assert_eq!(s.found(), ["-"; 3]);
}

#[test]
fn nothing_is_kept_of_what_a_fuse_server_says() {
    let name = "nothing_is_kept_of_what_a_fuse_server_says";
    if !have(name, &[TOOLS.as_slice(), &["/dev/fuse"]].concat()) {
        return;
    }
    let mut s = Setup::new();
    // A mount of points is a directory of raw images.
    let mount = Mount::new(&s.backups);
    s.backups = mount.path().to_path_buf();
    assert_eq!(s.verify(&[]).status.code(), Some(19));
    assert!(s.records().is_empty());
}

/// Each run reads the points whose turn it is, and what it kept tells the next.
#[test]
fn rolling_reads_the_points_that_waited_the_longest_and_the_rest_on_later_nights() {
    let test = "rolling_reads_the_points_that_waited_the_longest_and_the_rest_on_later_nights";
    if !have(test, &TOOLS) {
        return;
    }
    let s = Setup::new();
    // A share of a thirtieth is less than a point: one a night.
    let night = || {
        let out = s.verify(&["--rolling", "30d", "--json"]);
        s.age(DAY);
        let report: Value = serde_json::from_slice(&out.stdout).unwrap();
        let names = report["points"].as_array().unwrap().iter();
        (
            out.status.code(),
            names.map(|p| p["file"].as_str().unwrap().into()).collect::<Vec<PathBuf>>(),
        )
    };
    for file in &s.files {
        assert_eq!(night(), (Some(19), vec![file.clone()]));
    }
    assert_eq!(s.found(), ["unproven"; 3]);
    // They have had their turn.
    assert_eq!(night(), (Some(0), Vec::new()));
    // And again from the first on, after half of the time; what was changed keeps its place.
    s.age(11 * DAY);
    let newest = std::fs::File::options().append(true).open(&s.files[2]).unwrap();
    newest.set_len(newest.metadata().unwrap().len() + 512).unwrap();
    assert_eq!(s.found(), ["unproven", "unproven", "changed"]);
    assert_eq!(night().1, [s.files[0].clone()]);
    // After a pause all that is late.
    s.age(40 * DAY);
    assert_eq!(night().1, s.files);
}

/// Damage of what is not due is not looked for, what the directory says is told each night.
#[test]
fn rolling_tells_each_night_what_cannot_be_served() {
    if !have("rolling_tells_each_night_what_cannot_be_served", &TOOLS) {
        return;
    }
    let s = Setup::new();
    assert_eq!(s.verify(&["--create"]).status.code(), Some(0));
    s.age(DAY);
    assert_eq!(s.verify(&["--rolling", "30d"]).status.code(), Some(0));
    std::fs::remove_file(&s.files[1]).unwrap();
    for _ in 0..2 {
        let out = s.verify(&["--rolling", "30d"]);
        let said = String::from_utf8_lossy(&out.stdout).into_owned();
        assert_eq!(out.status.code(), Some(18), "{said}");
        s.age(DAY);
    }
}

/// An error is told each night until the file is another, not only in the night that found it.
#[test]
fn rolling_reads_what_was_unsound_again_each_night() {
    if !have("rolling_reads_what_was_unsound_again_each_night", &TOOLS) {
        return;
    }
    let s = Setup::new();
    assert_eq!(s.verify(&["--create"]).status.code(), Some(0));
    let whole = std::fs::read(&s.files[2]).unwrap();
    let mut damaged = whole.clone();
    let at = damaged.iter().rposition(|b| *b == 3).unwrap();
    damaged[at] = 0x55;
    std::fs::write(&s.files[2], &damaged).unwrap();
    s.age(40 * DAY);
    for night in 0..3 {
        let out = s.verify(&["--rolling", "30d", "--json"]);
        let report: Value = serde_json::from_slice(&out.stdout).unwrap();
        let read = if night == 0 { 3 } else { 1 };
        assert_eq!(report["points"].as_array().unwrap().len(), read, "{report}");
        assert_eq!(out.status.code(), Some(18), "{night}: {report}");
        s.age(DAY);
    }
    std::fs::write(&s.files[2], &whole).unwrap();
    assert_eq!(s.verify(&["--rolling", "30d"]).status.code(), Some(0));
}

#[test]
fn rolling_needs_to_keep_what_was_read() {
    if !have("rolling_needs_to_keep_what_was_read", &["qemu-img", "qemu-io", "/dev/fuse"]) {
        return;
    }
    let s = Setup::new();
    let mount = Mount::new(&s.backups);
    let out = s.command(&["verify", "--rolling", "30d"]).arg(mount.path()).output().unwrap();
    assert_eq!(out.status.code(), Some(11), "{out:?}");
    assert!(String::from_utf8_lossy(&out.stderr).contains("on FUSE"), "{out:?}");
    // No folder can be made in a file.
    assert_eq!(s.verify(&["--create"]).status.code(), Some(0));
    let file = s.state.parent().unwrap().join("file");
    std::fs::write(&file, "").unwrap();
    let out = s
        .command(&["verify", "--rolling", "30d", "--state-dir"])
        .arg(file.join("state"))
        .arg(&s.backups)
        .output()
        .unwrap();
    assert!(!out.status.success() && !out.stderr.is_empty(), "{out:?}");
    for other in [&["--rolling", "0d"][..], &["--rolling", "1d", "--quick"], &["--rolling", "x"]] {
        assert_eq!(s.verify(other).status.code(), Some(2), "{other:?}");
    }
}
