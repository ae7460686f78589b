//! `fleecefs replicate`: the copy is equal, whatever was interrupted, and nothing is mixed up.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

use crate::support::backup::{Caller, PausedBackup, images, newest, same};
use crate::support::chains::{Backups, TOOLS, code, copy_to, succeed};
use crate::support::checked::daemon;
use crate::support::guard;
use crate::support::mount::Mount;
use crate::support::process::{eventually, stderr};
use crate::support::tools::{have, is_root, run, write_script};

fn replicate(from: &Path, to: &Path, more: &[&str]) -> Command {
    let mut c = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
    c.arg("replicate").arg(from).arg(to).args(more);
    c
}

/// It succeeds; what it says in JSON.
fn must(from: &Path, to: &Path, more: &[&str]) -> Value {
    let out = replicate(from, to, more).arg("--json").output().unwrap();
    assert!(out.status.success(), "{more:?}: {}", stderr(&out));
    serde_json::from_slice(&out.stdout).unwrap()
}

/// What was done with each image, by its name.
fn actions(report: &Value) -> BTreeMap<String, String> {
    let text = |v: &Value| v.as_str().unwrap().to_string();
    let name = |v: &Value| text(v).rsplit('/').next().unwrap().to_string();
    let images = report["images"].as_array().unwrap();
    images.iter().map(|i| (name(&i["file"]), text(&i["action"]))).collect()
}

/// All files below a folder but locks, with their bytes (of links: their names) and, of images, their times.
fn tree(root: &Path) -> BTreeMap<PathBuf, (Vec<u8>, i64)> {
    let mut found = BTreeMap::new();
    let mut todo = vec![root.to_path_buf()];
    while let Some(dir) = todo.pop() {
        for entry in std::fs::read_dir(&dir).unwrap().map(|e| e.unwrap()) {
            let path = entry.path();
            let meta = std::fs::symlink_metadata(&path).unwrap();
            let below = path.strip_prefix(root).unwrap().to_path_buf();
            if meta.is_dir() {
                todo.push(path);
            } else if meta.is_symlink() {
                let text = std::fs::read_link(&path).unwrap();
                let name = text.file_name().unwrap().as_encoded_bytes().to_vec();
                found.insert(below, (name, 0));
            } else if path.file_name().unwrap() != "lock" {
                let is_image = below.parent().is_some_and(|p| !p.ends_with(".fleecefs"))
                    && below.components().count() > 1;
                let time = if is_image { meta.mtime() } else { 0 };
                found.insert(below, (std::fs::read(&path).unwrap(), time));
            }
        }
    }
    found
}

fn equal(a: &Path, b: &Path, what: &str) {
    let (a, b) = (tree(a), tree(b));
    let names = |t: &BTreeMap<PathBuf, _>| t.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&a), names(&b), "{what}");
    let other: Vec<_> = a.keys().filter(|k| a[*k] != b[*k]).collect();
    assert!(other.is_empty(), "{what}: {other:?} differ");
}

fn sound(root: &Path, what: &str) {
    let out =
        Command::new(env!("CARGO_BIN_EXE_fleecefs")).arg("verify").arg(root).output().unwrap();
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    assert_eq!(code(&out), 0, "{what}: {said}{}", stderr(&out));
}

/// A source with manifests and what a target has besides: an id, a description of the disk, a link.
fn source(chains: usize, incs: usize) -> Backups {
    let b = Backups::new(chains, incs, "", false);
    succeed(&["verify", "--create"], b.dir.path());
    std::fs::write(b.dir.path().join("uuid"), "01234567-89ab-4def-8123-456789abcdef").unwrap();
    std::fs::write(b.dir.path().join("sda.config"), "{}").unwrap();
    let last = b.files.last().unwrap();
    std::os::unix::fs::symlink(last, b.dir.path().join("sda/image")).unwrap();
    b
}

/// A new folder's name.
fn target() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("copy");
    (dir, path)
}

#[test]
fn the_copy_is_equal_sparse_and_sound_and_then_only_the_new_point_is_sent() {
    if !have("the_copy_is_equal_sparse_and_sound_and_then_only_the_new_point_is_sent", &TOOLS) {
        return;
    }
    let b = source(2, 2);
    // A file with a large hole, which nothing says anything of.
    let raw = b.dir.path().join("whole.raw");
    std::fs::write(&raw, vec![7; 1 << 20]).unwrap();
    std::fs::File::options().write(true).open(&raw).unwrap().set_len(64 << 20).unwrap();
    let (newest, aside) = (b.files.last().unwrap().clone(), b.dir.path().with_extension("aside"));
    let side = newest.parent().unwrap().join(".fleecefs").join(b.name(5) + ".json");
    let hidden = aside.with_extension("json");
    std::fs::rename(&newest, &aside).unwrap();
    std::fs::rename(&side, &hidden).unwrap();
    let (_dir, to) = target();
    let dry = must(b.dir.path(), &to, &["--dry-run"]);
    assert!(dry["sent"] == 6 && !to.exists(), "{dry}");
    let first = must(b.dir.path(), &to, &["--verify"]);
    assert_eq!((&first["sent"], &first["left"]), (&dry["sent"], &dry["left"]));
    equal(b.dir.path(), &to, "the first run");
    let blocks = std::fs::metadata(to.join("whole.raw")).unwrap().blocks();
    assert!(blocks * 512 <= 2 << 20, "{blocks} blocks");
    sound(&to.join("sda"), "the first run");
    assert_eq!(must(b.dir.path(), &to, &[])["sent"], 0);
    std::fs::rename(&aside, &newest).unwrap();
    std::fs::rename(&hidden, &side).unwrap();
    let second = must(b.dir.path(), &to, &[]);
    let size = std::fs::metadata(&newest).unwrap().len();
    assert_eq!((&second["sent"], &second["bytes"]), (&1.into(), &size.into()), "{second}");
    equal(b.dir.path(), &to, "the second run");
    b.check(&to, 0..6, "the copy");
    // A mount of it, which saw all that, is no obstacle, and neither is one of the source.
    let (_a, _b) = (Mount::new(b.dir.path()), Mount::new(&to));
    assert_eq!(must(b.dir.path(), &to, &[])["sent"], 0);
}

#[test]
fn a_run_killed_at_any_step_leaves_whole_points_and_the_next_completes_it() {
    if !have("a_run_killed_at_any_step_leaves_whole_points_and_the_next_completes_it", &TOOLS) {
        return;
    }
    let b = source(2, 2);
    let mut killed = 0;
    for step in 1.. {
        let (_dir, to) = target();
        let mut run = replicate(b.dir.path(), &to, &[]);
        let out = run.env("FLEECEFS_CRASH_AT", step.to_string()).output().unwrap();
        let what = format!("killed at step {step}");
        if out.status.success() {
            break;
        }
        assert_eq!(out.status.code(), None, "{what}: {}", stderr(&out));
        killed += 1;
        // As it is: each point has its manifest, and what has none yet is no point.
        let listed = points(&to);
        let manifest = |i: &usize| to.join("sda/.fleecefs").join(b.name(*i) + ".json").exists();
        let there: Vec<usize> = (0..b.files.len()).filter(manifest).collect();
        assert_eq!(listed, there.iter().map(|i| b.name(*i)).collect::<Vec<_>>(), "{what}");
        if !there.is_empty() {
            b.check(&to, there.iter().copied(), &what);
            sound(&to, &what);
        }
        let named = |i: &usize| to.join("sda").join(b.name(*i)).exists();
        let already = (0..b.files.len()).filter(named).count();
        let report = must(b.dir.path(), &to, &[]);
        assert_eq!(report["sent"], b.files.len() - already, "{what}: {report}");
        equal(b.dir.path(), &to, &what);
        sound(&to, &what);
    }
    assert_eq!(killed, 4 * b.files.len(), "received, announced, named and committed, for each");
}

/// The names of all points that `list` shows, the oldest first.
fn points(root: &Path) -> Vec<String> {
    let mut list = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
    let out = list.args(["list", "--json"]).arg(root).output().unwrap();
    let listed: Value = serde_json::from_slice(&out.stdout).unwrap();
    let disks = listed["disks"].as_array().unwrap().iter();
    let points = disks.flat_map(|d| d["points"].as_array().unwrap());
    let name = |p: &Value| Path::new(p["file"].as_str()?).file_name()?.to_str().map(str::to_string);
    points.map(|p| name(p).unwrap()).collect()
}

#[test]
fn an_image_that_a_killed_run_has_named_is_finished_by_whoever_writes_next() {
    let test = "an_image_that_a_killed_run_has_named_is_finished_by_whoever_writes_next";
    if !have(test, &TOOLS) {
        return;
    }
    let b = source(1, 1);
    let (_dir, to) = target();
    let mut run = replicate(b.dir.path(), &to, &[]);
    let killed = run.env("FLEECEFS_CRASH_AT", "replicate: named").output().unwrap();
    assert_eq!(killed.status.code(), None, "{}", stderr(&killed));
    let side = to.join("sda/.fleecefs");
    assert!(to.join("sda").join(b.name(0)).exists() && points(&to).is_empty());
    succeed(&["prune", "--keep-last", "9"], &to);
    let name = b.name(0) + ".json";
    let text = |dir: &Path| std::fs::read(dir.join(&name)).unwrap();
    assert!(text(&side) == text(&b.dir.path().join("sda/.fleecefs")));
    assert_eq!(points(&to), [b.name(0)]);
    sound(&to, "finished by prune");
    assert_eq!(must(b.dir.path(), &to, &[])["sent"], 1);
    equal(b.dir.path(), &to, "finished by prune");
}

#[test]
fn what_was_copied_is_told_where_a_run_ends_before_its_end() {
    let test = "what_was_copied_is_told_where_a_run_ends_before_its_end";
    if !have(test, &TOOLS) || !is_root(test) {
        return;
    }
    let says = |out: &Output| serde_json::from_slice::<Value>(&out.stdout).unwrap();
    let b = source(1, 1);
    let (dir, to) = target();
    must(b.dir.path(), &to, &[]);
    // The target's rules cannot be applied.
    let aside = dir.path().join("aside");
    std::fs::rename(to.join("sda").join(b.name(1)), &aside).unwrap();
    std::fs::remove_file(to.join("sda/.fleecefs").join(b.name(1) + ".json")).unwrap();
    std::fs::write(to.join(".fleecefs/live-restore-0a.json"), "{}").unwrap();
    let run = |more: &[&str]| replicate(b.dir.path(), &to, more).output().unwrap();
    let out = run(&["--keep-last", "9", "--json"]);
    assert_eq!(code(&out), 6, "{}", stderr(&out));
    let report = says(&out);
    assert_eq!(
        (&report["sent"], &report["error"]["kind"]),
        (&1.into(), &"busy".into()),
        "{report}"
    );
    let text = String::from_utf8(run(&["--keep-last", "9"]).stdout).unwrap();
    assert!(text.contains("0 images sent"), "{text}");
    // It is full after the first image, which is small.
    let small = tempfile::tempdir().unwrap();
    let source = tempfile::tempdir().unwrap();
    for (disk, size) in [("a", 1 << 20), ("b", 8 << 20), ("c", 1 << 20)] {
        std::fs::write(source.path().join(format!("{disk}.raw")), vec![7; size]).unwrap();
    }
    let _mount = guard::Guard::tmpfs("4M", small.path());
    let full = |more: &[&str]| {
        replicate(source.path(), &small.path().join("copy"), more).output().unwrap()
    };
    let out = full(&["--json"]);
    assert_eq!(code(&out), 7, "{}", stderr(&out));
    let report = says(&out);
    let done = actions(&report);
    assert_eq!((&*done["a.raw"], &*done["b.raw"], &*done["c.raw"]), ("sent", "left", "left"));
    assert_eq!(
        (&report["left"], &report["error"]["exit_code"]),
        (&2.into(), &7.into()),
        "{report}"
    );
    let out = full(&[]);
    assert_eq!(code(&out), 7, "{}", stderr(&out));
    let text = String::from_utf8(out.stdout).unwrap();
    assert!(text.contains("left   b.raw") && text.contains("the run ended before"), "{text}");
}

#[test]
fn a_damaged_point_and_those_on_it_are_not_sent_and_named() {
    if !have("a_damaged_point_and_those_on_it_are_not_sent_and_named", &TOOLS) {
        return;
    }
    let b = source(2, 2);
    let bad = &b.files[1];
    let mut bytes = std::fs::read(bad).unwrap();
    let at = bytes.len() - 10;
    bytes[at] ^= 1;
    std::fs::write(bad, bytes).unwrap();
    let (_dir, to) = target();
    let out = replicate(b.dir.path(), &to, &["--json"]).output().unwrap();
    assert_eq!(code(&out), 16, "{}", stderr(&out));
    let report: Value = serde_json::from_slice(&out.stdout).unwrap();
    let left: Vec<String> =
        actions(&report).into_iter().filter(|(_, a)| a == "left").map(|(n, _)| n).collect();
    assert_eq!(left, [b.name(1), b.name(2)]);
    assert!(stderr(&out).contains(&b.name(1)) && stderr(&out).contains("hash"), "{}", stderr(&out));
    assert!(!to.join("sda").join(b.name(1)).exists() && !to.join("sda").join(b.name(2)).exists());
    b.check(&to, [0, 3, 4, 5], "the rest");
    sound(&to, "the rest");
}

#[test]
fn a_chain_that_was_rewritten_is_never_mixed_with_the_old_one() {
    if !have("a_chain_that_was_rewritten_is_never_mixed_with_the_old_one", &TOOLS) {
        return;
    }
    let b = source(1, 3);
    let (_dir, to) = target();
    must(b.dir.path(), &to, &[]);
    let before = tree(&to);
    // The oldest points become a FULL: its state is there, and nothing is sent.
    let merged = b.copy();
    let until = b.name(1);
    succeed(&["consolidate", "sda", "--until", &until], &merged.root);
    let report = must(&merged.root, &to, &[]);
    let full = until.replace("INC-", "FULL-");
    assert_eq!((&report["sent"], &*actions(&report)[&full]), (&0.into(), "merged"), "{report}");
    assert!(before.keys().eq(tree(&to).keys()));
    // To an empty folder it goes as it is.
    let (_other, empty) = target();
    must(&merged.root, &empty, &[]);
    sound(&empty, "the consolidated chain");
    b.check(&empty, 1..4, "the consolidated chain");
    // The FULL gets the INC's state under its own name: that is another file, and what builds on it another chain.
    let committed = b.copy();
    succeed(&["commit"], &committed.root.join("sda"));
    let out = replicate(&committed.root, &to, &[]).output().unwrap();
    assert_eq!(code(&out), 16, "{}", stderr(&out));
    assert!(
        stderr(&out).contains(&b.name(0)) && stderr(&out).contains("commit"),
        "{}",
        stderr(&out)
    );
    assert!(before == tree(&to), "something was changed");
    sound(&to, "after all that");
    b.check(&to, 0..4, "after all that");
}

#[test]
fn an_image_without_a_hash_that_was_written_to_in_its_middle_is_another() {
    let from = tempfile::tempdir().unwrap();
    let image = from.path().join("disk.raw");
    std::fs::write(&image, vec![7; 4 << 20]).unwrap();
    let (_dir, to) = target();
    must(from.path(), &to, &[]);
    assert_eq!(must(from.path(), &to, &[])["sent"], 0);
    let mut file = std::fs::OpenOptions::new().write(true).open(&image).unwrap();
    std::io::Seek::seek(&mut file, std::io::SeekFrom::Start(2 << 20)).unwrap();
    std::io::Write::write_all(&mut file, &[8; 4]).unwrap();
    let out = replicate(from.path(), &to, &[]).output().unwrap();
    assert_eq!(code(&out), 16, "{}", stderr(&out));
    assert!(std::fs::read(to.join("disk.raw")).unwrap() == vec![7; 4 << 20]);
}

#[test]
fn another_backup_directory_and_a_folder_of_other_files_are_refused() {
    if !have("another_backup_directory_and_a_folder_of_other_files_are_refused", &TOOLS) {
        return;
    }
    let b = source(1, 1);
    let says = |to: &Path, want: i32, word: &str| {
        let out = replicate(b.dir.path(), to, &[]).output().unwrap();
        assert_eq!(code(&out), want, "{}", stderr(&out));
        assert!(stderr(&out).contains(word), "{word}: {}", stderr(&out));
    };
    let (dir, to) = target();
    must(b.dir.path(), &to, &[]);
    std::fs::write(to.join("uuid"), "another one").unwrap();
    let before = tree(&to);
    says(&to, 4, "another id");
    assert!(before == tree(&to));
    let home = dir.path().join("home");
    std::fs::create_dir(&home).unwrap();
    std::fs::write(home.join("letter"), "x").unwrap();
    says(&home, 4, "letter");
    assert_eq!(std::fs::read_dir(&home).unwrap().count(), 1);
    says(&dir.path().join("no/such/folder"), 3, "mounted");
    says(&b.dir.path().join("inside"), 2, "overlap");
    says(b.dir.path(), 2, "overlap");
    let empty = dir.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    let out = replicate(&empty, &dir.path().join("x"), &[]).output().unwrap();
    assert_eq!((code(&out), dir.path().join("x").exists()), (3, false), "{}", stderr(&out));
    // Its owner leads it elsewhere.
    let (dir, to) = target();
    std::fs::create_dir_all(to.join(".fleecefs")).unwrap();
    std::fs::create_dir(dir.path().join("outside")).unwrap();
    std::fs::write(to.join(".fleecefs/lock"), "").unwrap();
    std::os::unix::fs::symlink(dir.path().join("outside"), to.join("sda")).unwrap();
    let out = replicate(b.dir.path(), &to, &[]).output().unwrap();
    assert_ne!(code(&out), 0);
    assert_eq!(std::fs::read_dir(dir.path().join("outside")).unwrap().count(), 0);
}

#[test]
fn the_target_keeps_what_its_own_rules_say() {
    if !have("the_target_keeps_what_its_own_rules_say", &TOOLS) {
        return;
    }
    let b = source(3, 1);
    let (_dir, to) = target();
    let report = must(b.dir.path(), &to, &["--keep-last", "3"]);
    assert_eq!((&report["sent"], &report["pruned"]["points"]), (&6.into(), &2.into()), "{report}");
    let left = |i: usize| to.join("sda").join(b.name(i)).exists();
    assert_eq!((0..6).map(left).collect::<Vec<_>>(), [false, false, true, true, true, true]);
    let again = must(b.dir.path(), &to, &["--keep-last", "3"]);
    assert_eq!((&again["sent"], &*actions(&again)[&b.name(0)]), (&0.into(), "older"), "{again}");
    // Points that the source has no more stay.
    succeed(&["prune", "--keep-last", "1"], b.dir.path());
    must(b.dir.path(), &to, &[]);
    assert!(left(2) && left(3));
    b.check(&to, 2..6, "the target");
}

#[test]
fn what_qmpbackup_made_gets_manifests_on_the_way() {
    if !have("what_qmpbackup_made_gets_manifests_on_the_way", &TOOLS) {
        return;
    }
    let b = Backups::new(1, 2, "", false);
    let (_dir, to) = target();
    // The first two came by other means.
    copy_to(b.dir.path(), &to);
    std::fs::remove_file(to.join("sda").join(b.name(2))).unwrap();
    let report = must(b.dir.path(), &to, &[]);
    let want = [("FULL", "recorded"), ("INC", "recorded"), ("INC", "sent")];
    let done = actions(&report);
    for (i, (_, action)) in want.iter().enumerate() {
        assert_eq!(done[&b.name(i)], *action, "{report}");
    }
    sound(&to, "with manifests");
    b.check(&to, 0..3, "with manifests");
    // One that is another file by a byte in its middle, where no fingerprint looks, gets none.
    let (_dir, to) = target();
    copy_to(b.dir.path(), &to);
    let full = to.join("sda").join(b.name(0));
    let mut bytes = std::fs::read(&full).unwrap();
    let middle = bytes.len() / 2;
    assert!(middle > 200 << 10 && bytes.len() - middle > 200 << 10);
    bytes[middle] ^= 1;
    std::fs::write(&full, bytes).unwrap();
    let out = replicate(b.dir.path(), &to, &[]).output().unwrap();
    assert_eq!(code(&out), 16, "{}", stderr(&out));
    assert!(!to.join("sda/.fleecefs").join(b.name(0) + ".json").exists());
}

/// An ssh that runs the command here, as the user nobody.
fn as_nobody(dir: &Path) -> PathBuf {
    let script = dir.join("as-nobody");
    let text = "test \"$1\" = -- && test \"$2\" = nas || exit 9\n\
                exec setpriv --reuid=65534 --regid=65534 --clear-groups sh -c \"$3\"";
    write_script(&script, text);
    script
}

#[test]
fn another_user_behind_ssh_receives_it() {
    let tools = [&TOOLS[..], &["setpriv"]].concat();
    let test = "another_user_behind_ssh_receives_it";
    if !have(test, &tools) || !is_root(test) {
        return;
    }
    let b = source(1, 2);
    let (dir, to) = target();
    run("chmod", &["755", dir.path().to_str().unwrap()]);
    std::fs::create_dir(&to).unwrap();
    run("chown", &["65534:65534", to.to_str().unwrap()]);
    // Where everybody may run it.
    let program = dir.path().join("fleecefs");
    run("install", &["-m", "755", env!("CARGO_BIN_EXE_fleecefs"), program.to_str().unwrap()]);
    let ssh = as_nobody(dir.path());
    let far = |path: &Path, more: &[&str]| -> Output {
        let to = format!("nas:{}", path.display());
        let mut c = replicate(b.dir.path(), Path::new(&to), more);
        c.arg("--ssh").arg(&ssh).arg("--remote-program").arg(&program).output().unwrap()
    };
    let out = far(&to, &["--json", "--keep-last", "9"]);
    assert!(out.status.success(), "{}", stderr(&out));
    equal(b.dir.path(), &to, "another user");
    let owner = |p: &Path| std::fs::metadata(p).unwrap().uid();
    assert_eq!(owner(&to.join("sda").join(b.name(2))), 65534);
    sound(&to, "another user");
    // What fails there is told here, once, with its kind.
    let locked = dir.path().join("locked");
    std::fs::create_dir(&locked).unwrap();
    let out = far(&locked, &[]);
    assert_eq!(code(&out), 5, "{}", stderr(&out));
    let said = stderr(&out);
    assert_eq!(said.lines().filter(|l| l.starts_with("fleecefs: ")).count(), 1, "{said}");
    let out = replicate(b.dir.path(), Path::new("nas:/x"), &["--ssh", "false"]).output().unwrap();
    assert_eq!(code(&out), 14, "{}", stderr(&out));
    let out = replicate(b.dir.path(), Path::new("nas:/x"), &["--ssh", "no-such-program"]).output();
    assert_eq!(code(&out.unwrap()), 3);
}

/// An sshd of the test's own, on a port of this host, and what ssh needs to get through to it.
struct Sshd {
    child: std::process::Child,
    port: u16,
    ssh: String,
}

impl Sshd {
    /// Lets one key in, which can do nothing but `command`.
    fn start(dir: &Path, command: &str) -> Self {
        let path = |name: &str| dir.join(name).display().to_string();
        for key in ["host", "key"] {
            run("ssh-keygen", &["-q", "-t", "ed25519", "-N", "", "-f", &path(key)]);
        }
        let key = std::fs::read_to_string(path("key.pub")).unwrap();
        let allowed = format!("restrict,command=\"{command}\" {key}");
        std::fs::write(path("allowed"), allowed).unwrap();
        let config = format!(
            "HostKey {}\nAuthorizedKeysFile {}\nPidFile none\nStrictModes no\nUsePAM no\n\
             PasswordAuthentication no\nPermitRootLogin yes\n",
            path("host"),
            path("allowed")
        );
        std::fs::write(path("config"), config).unwrap();
        // Where sshd gives up its rights.
        std::fs::create_dir_all("/run/sshd").unwrap();
        // Nobody else has the port between now and then, as far as can be known.
        let free = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        let listen = format!("ListenAddress=127.0.0.1:{port}");
        let mut sshd = Command::new("/usr/sbin/sshd");
        sshd.args(["-D", "-e", "-f", &path("config"), "-o", &listen]);
        let log = std::fs::File::create(path("log")).unwrap();
        let child = guard::tied(sshd.stderr(log)).spawn().unwrap();
        eventually("sshd listens", || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok());
        let ssh = format!(
            "ssh -F none -i {} -o IdentitiesOnly=yes -o BatchMode=yes -o StrictHostKeyChecking=no -o \
             UserKnownHostsFile=/dev/null -o LogLevel=ERROR",
            path("key")
        );
        Sshd { child, port, ssh }
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_key_that_can_only_receive_gets_the_points_to_its_directory_and_no_rule_of_the_sender() {
    let test =
        "a_key_that_can_only_receive_gets_the_points_to_its_directory_and_no_rule_of_the_sender";
    let tools = [&TOOLS[..], &["ssh", "ssh-keygen", "/usr/sbin/sshd"]].concat();
    if !have(test, &tools) || !is_root(test) {
        return;
    }
    let b = source(2, 1);
    let (dir, to) = target();
    let program = env!("CARGO_BIN_EXE_fleecefs");
    let command = format!("{program} replicate --receive={}", to.display());
    let sshd = Sshd::start(dir.path(), &command);
    // Another path, and a rule that would delete a chain.
    let far = format!("ssh://root@127.0.0.1:{}/somewhere/else", sshd.port);
    let report = must(b.dir.path(), Path::new(&far), &["--ssh", &sshd.ssh, "--keep-last", "1"]);
    assert!(report["sent"] == 4 && report["pruned"].is_null(), "{report}");
    assert!(!Path::new("/somewhere").exists());
    equal(b.dir.path(), &to, "by ssh");
    assert_eq!(must(b.dir.path(), Path::new(&far), &["--ssh", &sshd.ssh])["sent"], 0);
}

#[test]
fn a_backup_that_is_running_is_sent_when_it_is_complete_and_the_copy_goes_on_if_the_source_is_lost()
{
    let test = "a_backup_that_is_running_is_sent_when_it_is_complete_and_the_copy_goes_on_if_the_source_is_lost";
    if !have(test, &["qemu-storage-daemon", "qemu-img", "qemu-io", "/dev/fuse"]) {
        return;
    }
    let d = daemon(&[]);
    let caller = Caller::of(&d);
    caller.must("full");
    d.io("a", &["write -P 3 1M 64k"]);
    let copy = Caller { target: d.path("R"), ..caller.clone() };
    let running = PausedBackup::start(&caller, "inc");
    let report = must(&caller.target, &copy.target, &[]);
    assert_eq!(report["sent"], 1, "{report}");
    assert_eq!(running.end().0, Some(0));
    let report = must(&caller.target, &copy.target, &[]);
    assert_eq!(report["sent"], 1, "{report}");
    equal(&caller.target, &copy.target, "both points");
    // The first directory is lost.
    std::fs::remove_dir_all(&caller.target).unwrap();
    d.io("a", &["write -P 4 2M 64k", "write -z 12M 1M"]);
    let (said, views) = copy.held("inc");
    let mount = Mount::new(&copy.target);
    for (disk, view) in &views {
        assert_eq!(images(&copy.target.join(disk)).len(), 3, "{said}");
        let image = newest(&copy.target, disk);
        assert!(image.file_name().unwrap().to_str().unwrap().starts_with("INC-"), "{image:?}");
        same(&mount, disk, &image, view);
    }
    sound(&copy.target, "the copy goes on");
}
