//! The promise above all: whatever is done to a backup directory, in whatever order, and wherever
//! a run is cut off, each point that is there holds the bytes of its moment, and none is lost.
//!
//! Backups of all levels, crashes, restarts, resizes, prune, consolidate and qmprestore's verbs in
//! random order, killed at random moments; a mount stays open all the time.
//! `FLEECEFS_ACTIONS` (default 100) says how many, `FLEECEFS_SEED` with which random numbers, and
//! `FLEECEFS_KEEP` where to leave the backups if a point is wrong;
//! `cargo test --test slow any_order:: -- --nocapture` prints them.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::support::backup::{self, Caller, Views, bitmaps, leftovers, ours_in_qemu};
use crate::support::images::{Rng, first_difference, wait_until_closed};
use crate::support::mount::Mount;
use crate::support::qemu::storage_daemon::Daemon;
use crate::support::tools::{have, run};
use serde_json::Value;

const TOOLS: &[&str] = &["qemu-storage-daemon", "qemu-img", "qemu-io", "/dev/fuse"];
const FLEECEFS: &str = env!("CARGO_BIN_EXE_fleecefs");
const DISKS: [(&str, &str); 2] = [("a", "qcow2"), ("b", "raw")];
const MIB: u64 = 1 << 20;
/// Steps of a backup of two disks, about.
const STEPS: u64 = 130;
/// What else has to happen: a verb is killed before it ends.
const KILLED: &str = "killed verb";
/// `verify`: nothing is wrong, but not all could be told.
const COULD_NOT_TELL: i32 = 19;
/// `backup`: not all disks have a point.
const PARTIAL: i32 = 16;
/// `backup`: there is nothing that an INC could depend on.
const INCOMPLETE: i32 = 12;

/// A state of a disk: its folder, and the time of its moment.
type State = (String, i64);

/// A point as `list` shows it.
#[derive(Debug, Clone)]
struct Listed {
    state: State,
    name: String,
    level: String,
}

/// What somebody who reads all the time has read: disk folder and hash of a whole file.
type ReadPoints = Arc<Mutex<BTreeSet<(String, [u8; 32])>>>;

/// For how long a mount is read on after the last change: it learns of that a moment later.
const READ_ON: Duration = Duration::from_millis(500);

/// Reads every file of a mount, over and over while the backups change, until it is dropped.
struct Reader {
    seen: ReadPoints,
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Reader {
    fn new(mount: &Path, backups: &Path) -> Self {
        let (seen, end) = (ReadPoints::default(), Arc::new(AtomicBool::new(false)));
        let (mount, backups) = (mount.to_path_buf(), backups.to_path_buf());
        let (to, until) = (seen.clone(), end.clone());
        let thread = std::thread::spawn(move || {
            let (mut then, mut changed) = (BTreeSet::new(), Instant::now());
            while !until.load(Ordering::SeqCst) {
                let now = stamp(&backups);
                if now != then {
                    (then, changed) = (now, Instant::now());
                } else if changed.elapsed() > READ_ON {
                    std::thread::sleep(Duration::from_millis(5));
                    continue;
                }
                for (disk, _) in DISKS {
                    read_all(&mount, &format!("{disk}.img"), &to);
                }
            }
        });
        Reader { seen, end, thread: Some(thread) }
    }
}

/// What changes with the backups: each file's path, inode, size and time.
fn stamp(backups: &Path) -> BTreeSet<(PathBuf, u64, u64, i64, i64)> {
    let folders = DISKS.iter().map(|(disk, _)| backups.join(format!("{disk}.img")));
    let files = folders.flat_map(|f| std::fs::read_dir(f).into_iter().flatten().flatten());
    let of = |f: std::fs::DirEntry| {
        let m = f.metadata().ok()?;
        Some((f.path(), m.ino(), m.size(), m.mtime(), m.mtime_nsec()))
    };
    files.filter_map(of).collect()
}

fn read_all(mount: &Path, disk: &str, to: &ReadPoints) {
    let files = std::fs::read_dir(mount.join(disk)).into_iter().flatten().flatten();
    for file in files.filter(|f| f.file_type().is_ok_and(|t| t.is_file())) {
        std::thread::sleep(Duration::from_millis(5));
        // What goes or changes meanwhile may be an error, but never other bytes.
        let Ok(bytes) = std::fs::read(file.path()) else { continue };
        to.lock().unwrap().insert((disk.into(), *blake3::hash(&bytes).as_bytes()));
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.end.store(true, Ordering::SeqCst);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

struct Setup {
    daemon: Daemon,
    caller: Caller,
    rng: Rng,
    sizes: [u64; 2],
    /// What each state must hold.
    known: BTreeMap<State, Vec<u8>>,
    /// All that was ever known of each disk.
    ever: BTreeSet<(String, [u8; 32])>,
    /// Ends before the mount does.
    reader: Reader,
    mount: Mount,
    /// How many different files the reader has read between two checks, in all.
    read: usize,
    /// How often each action did something.
    done: BTreeMap<&'static str, u32>,
}

impl Setup {
    fn new(seed: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let sizes = [4 * MIB, 3 * MIB + 512];
        for ((name, format), size) in DISKS.iter().zip(sizes) {
            let path = dir.path().join(format!("{name}.img"));
            let size = size.to_string();
            run("qemu-img", &["create", "-q", "-f", format, path.to_str().unwrap(), &size]);
        }
        let daemon = Daemon::start(dir, &[("a", "driver=qcow2"), ("b", "driver=raw")]);
        let caller = Caller::of(&daemon);
        std::fs::create_dir(&caller.target).unwrap();
        let mount = Mount::new(&caller.target);
        let reader = Reader::new(mount.path(), &caller.target);
        let (known, ever, done) = Default::default();
        Setup { daemon, caller, rng: Rng(seed), sizes, known, ever, reader, mount, read: 0, done }
    }

    fn chance(&mut self, one_in: u64) -> bool {
        self.rng.below(one_in) == 0
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.rng.below(from.len() as u64) as usize]
    }

    /// Writes, zeroes and discards here and there, as a guest does.
    fn scribble(&mut self) {
        for (i, (disk, _)) in DISKS.iter().enumerate() {
            let mut ops = Vec::new();
            for _ in 0..1 + self.rng.below(4) {
                let (start, len) = self.rng.range(self.sizes[i], 512);
                ops.push(match self.rng.below(4) {
                    0 => format!("write -z {start} {len}"),
                    1 => format!("discard {start} {len}"),
                    _ => format!("write -P {} {start} {len}", 1 + self.rng.below(255)),
                });
            }
            let ops: Vec<&str> = ops.iter().map(String::as_str).collect();
            self.daemon.io(disk, &ops);
        }
    }

    fn listed(&self) -> Vec<Listed> {
        let out = Command::new(FLEECEFS).args(["list", "--json"]).arg(&self.caller.target).output();
        let json: Value = serde_json::from_slice(&out.unwrap().stdout).unwrap();
        let mut all = Vec::new();
        for disk in json["disks"].as_array().unwrap() {
            for p in disk["points"].as_array().unwrap() {
                let text = |v: &Value| v.as_str().unwrap().to_string();
                assert!(p["served"].as_bool().unwrap(), "{p}");
                let state = (
                    text(&disk["disk"]),
                    fleecefs::units::parse_when(p["time"].as_str().unwrap()).unwrap(),
                );
                all.push(Listed { state, name: text(&p["point"]), level: text(&p["level"]) });
            }
        }
        all
    }

    /// Takes in the states that are new: those of a run that was cut off and then finished, and
    /// those of the last run.
    fn learn(&mut self, cut_off: &Views, last: &Views) {
        let mut fresh: BTreeMap<String, BTreeSet<i64>> = BTreeMap::new();
        for p in self.listed().into_iter().filter(|p| !self.known.contains_key(&p.state)) {
            fresh.entry(p.state.0).or_default().insert(p.state.1);
        }
        for (disk, times) in fresh {
            let of = |v: &Views| v.iter().find(|(d, _)| *d == disk).map(|(_, b)| b.clone());
            let mut states: Vec<Vec<u8>> = of(last).into_iter().collect();
            if times.len() > states.len() {
                states.insert(0, of(cut_off).expect("a point of a run that never had its moment"));
            }
            assert_eq!(times.len(), states.len(), "{disk}: {times:?}");
            self.ever.extend(states.iter().map(|s| (disk.clone(), *blake3::hash(s).as_bytes())));
            self.known.extend(times.into_iter().map(|t| (disk.clone(), t)).zip(states));
        }
    }

    /// One backup in order, which has to succeed.
    fn backup(&mut self, level: &str, cut_off: &Views) {
        let before = self.known.len();
        let (said, views) = self.options().held(level);
        assert_eq!(views.len(), DISKS.len(), "{said}");
        self.learn(cut_off, &views);
        assert!(self.known.len() >= before + DISKS.len(), "{said}");
    }

    fn options(&mut self) -> Caller {
        let mut more = Vec::new();
        if self.chance(4) {
            more.push("--compress");
        }
        if self.chance(4) {
            more.push("--no-stop");
        }
        self.caller.with(&more)
    }

    /// A backup that may not be possible (an INC where the bitmap is gone).
    fn try_backup(&mut self, level: &'static str) {
        let hold = tempfile::tempdir().unwrap();
        let mut child = self.options().command(level);
        child.env("FLEECEFS_HOLD", hold.path()).stderr(std::process::Stdio::null());
        let mut child = child.spawn().unwrap();
        let views = backup::read_views(&mut child, hold.path());
        std::fs::write(hold.path().join("go"), "").unwrap();
        let code = child.wait().unwrap().code().expect("it ends by itself");
        // Without a bitmap on one disk, or on all.
        assert!([0, PARTIAL, INCOMPLETE].contains(&code), "{level}: {code}");
        self.learn(&Vec::new(), &views);
        self.count(level, code == 0);
    }

    fn crash(&mut self) {
        let level = *self.pick(&["full", "auto", "auto", "copy"]);
        let step = 1 + self.rng.below(STEPS) as usize;
        let (killed_at, views) = self.options().crash(level, step);
        let Some(name) = killed_at else { return self.learn(&Vec::new(), &views) };
        println!("    {level} killed at {name}");
        match self.rng.below(5) {
            0 => {
                let mut recover = Command::new(FLEECEFS);
                recover.args(["recover", "--qmp"]).arg(&self.caller.qmp);
                let out = recover.arg("--state-dir").arg(&self.caller.state).output().unwrap();
                assert!(out.status.success(), "{out:?}");
            }
            1 => std::fs::remove_dir_all(&self.caller.state).unwrap(),
            2 => self.daemon.restart_after_kill(),
            _ => {}
        }
        self.scribble();
        self.backup("auto", &views);
    }

    fn resize(&mut self) {
        let i = self.rng.below(2) as usize;
        let (name, format) = DISKS[i];
        self.daemon.stop();
        let path = self.daemon.path(&format!("{name}.img"));
        // Sometimes shrunk and grown again.
        for _ in 0..1 + self.rng.below(2) {
            self.sizes[i] = MIB + self.rng.below(4 * MIB / 512) * 512;
            let size = self.sizes[i].to_string();
            let path = path.to_str().unwrap();
            run("qemu-img", &["resize", "-q", "--shrink", "-f", format, path, &size]);
        }
        self.daemon.respawn();
    }

    /// Runs a verb; in one of two cases it is killed on the way, unless it is quicker, and run again.
    fn verb(&mut self, args: &[&str]) -> Output {
        let command = || {
            let mut c = Command::new(FLEECEFS);
            c.args(args);
            c
        };
        if self.chance(2) {
            let silent = std::process::Stdio::null;
            let mut child = command().stdout(silent()).stderr(silent()).spawn().unwrap();
            std::thread::sleep(Duration::from_millis(self.rng.below(60)));
            let _ = child.kill();
            let killed = child.wait().unwrap().code().is_none();
            self.count(KILLED, killed);
            println!("    {}", if killed { "killed once" } else { "ended before it was killed" });
            // What it had started has its locks until it has gone, too.
            for folder in ["", "a.img", "b.img"] {
                wait_until_closed(&self.caller.target.join(folder).join(".fleecefs"));
            }
        }
        let out = command().output().unwrap();
        if !out.status.success() {
            let said = String::from_utf8_lossy(&out.stderr);
            println!("    {}", said.trim_end());
            // The one thing here that a verb may refuse.
            assert!(said.contains("depends on an image that would be changed"), "{args:?}: {said}");
        }
        out
    }

    /// Forgets what a verb has rightly removed: of `disk`, what `may_go`.
    fn drop_gone(&mut self, disk: &str, may_go: impl Fn(i64) -> bool) -> bool {
        let there: BTreeSet<State> = self.listed().into_iter().map(|p| p.state).collect();
        let gone: Vec<State> = self.known.keys().filter(|s| !there.contains(s)).cloned().collect();
        for s in &gone {
            assert!(s.0 == disk && may_go(s.1), "{s:?} is lost");
            self.known.remove(s);
        }
        !gone.is_empty()
    }

    fn prune(&mut self) {
        let keep = 2 + self.rng.below(6) as usize;
        let (target, n) = (self.target(), keep.to_string());
        let mut args = vec!["prune", &target, "--keep-last", &n];
        if self.chance(2) {
            args.push("--consolidate");
        }
        let out = self.verb(&args);
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        // It deletes nothing where the newest point has no manifest, which a rebase may give it.
        assert!(out.status.success(), "{said}");
        let mut times: BTreeMap<String, Vec<i64>> = BTreeMap::new();
        for (disk, time) in self.known.keys() {
            times.entry(disk.clone()).or_default().push(*time);
        }
        let mut some = false;
        for (disk, times) in times {
            let from = times[times.len().saturating_sub(keep)];
            some |= self.drop_gone_of(&disk, from);
        }
        self.count("prune", some);
    }

    /// As [`Setup::drop_gone`] for one of several disks: what is older than `from` may go.
    fn drop_gone_of(&mut self, disk: &str, from: i64) -> bool {
        let there: BTreeSet<State> = self.listed().into_iter().map(|p| p.state).collect();
        let mine: Vec<State> = self.known.keys().filter(|s| s.0 == disk).cloned().collect();
        let mut some = false;
        for s in mine.into_iter().filter(|s| !there.contains(s)) {
            assert!(s.1 < from, "{s:?} is lost");
            self.known.remove(&s);
            some = true;
        }
        some
    }

    fn target(&self) -> String {
        self.caller.target.to_str().unwrap().to_string()
    }

    /// A random increment, up to which a verb can be run.
    fn some_point(&mut self) -> Option<Listed> {
        let mut all = self.listed();
        all.retain(|p| p.level == "inc");
        if all.is_empty() { None } else { Some(self.pick(&all).clone()) }
    }

    fn consolidate(&mut self) {
        let Some(p) = self.some_point() else { return };
        let (target, (disk, time)) = (self.target(), p.state.clone());
        let out = self.verb(&["consolidate", &target, &disk, "--until", &p.name]);
        let some = self.drop_gone(&disk, |t| t < time);
        self.count("consolidate", some && out.status.success());
    }

    fn fold(&mut self, verb: &'static str) {
        let Some(p) = self.some_point() else { return };
        let (disk, time) = p.state.clone();
        let folder = format!("{}/{disk}", self.target());
        let out = self.verb(&[verb, &folder, "--until", &p.name]);
        let some = self.drop_gone(&disk, |t| verb == "commit" && t < time);
        self.count(verb, out.status.success() && (some || verb != "commit"));
    }

    fn count(&mut self, what: &'static str, did: bool) {
        *self.done.entry(what).or_default() += u32::from(did);
    }

    fn act(&mut self) {
        match self.rng.below(32) {
            0..=6 => self.named("auto", |w| w.backup("auto", &Vec::new())),
            7..=10 => self.named("inc", |w| w.try_backup("inc")),
            11..=12 => self.named("diff", |w| w.try_backup("diff")),
            13 => self.named("full", |w| w.backup("full", &Vec::new())),
            14 => self.named("copy", |w| w.backup("copy", &Vec::new())),
            15..=18 => self.named("crash", Setup::crash),
            19 => self.named("resize", Setup::resize),
            20 => self.named("restart", |w| w.daemon.restart()),
            21 => self.named("kill QEMU", |w| w.daemon.restart_after_kill()),
            22..=23 => self.named("prune", Setup::prune),
            24..=26 => self.named("consolidate", Setup::consolidate),
            27..=28 => self.named("commit", |w| w.fold("commit")),
            29..=30 => self.named("rebase", |w| w.fold("rebase")),
            _ => self.named("snapshot-rebase", |w| w.fold("snapshot-rebase")),
        }
    }

    /// What has not happened by chance: a new increment, and `what`.
    fn act_on(&mut self, what: &'static str) {
        self.named("auto", |w| w.backup("auto", &Vec::new()));
        self.named(what, |w| match what {
            "inc" | "diff" => w.try_backup(what),
            "prune" => w.prune(),
            "consolidate" => w.consolidate(),
            KILLED => w.fold("rebase"),
            verb => w.fold(verb),
        });
    }

    fn named(&mut self, what: &'static str, action: impl FnOnce(&mut Setup)) {
        println!("  {what}");
        action(self);
    }

    fn path_of(&self, p: &Listed) -> PathBuf {
        self.mount.path().join(&p.state.0).join(format!("{}.raw", p.name))
    }

    /// Leaves a copy of the backups where `FLEECEFS_KEEP` says.
    fn keep(&self) {
        if let Some(to) = std::env::var_os("FLEECEFS_KEEP") {
            run("cp", &["-a", &self.target(), to.to_str().unwrap()]);
        }
    }

    /// Every state is there, and right, in the mount that has been open from the beginning.
    fn check(&mut self) {
        let listed = self.listed();
        let states: BTreeSet<State> = listed.iter().map(|p| p.state.clone()).collect();
        let known: BTreeSet<State> = self.known.keys().cloned().collect();
        assert_eq!(states, known, "listed, and expected");
        for p in &listed {
            let (path, expected) = (self.path_of(p), &self.known[&p.state]);
            let end = Instant::now() + Duration::from_secs(20);
            // The mount learns of changes a moment later.
            loop {
                let wrong = match std::fs::read(&path) {
                    Ok(bytes) => first_difference(&bytes, expected),
                    Err(e) => Some(e.to_string()),
                };
                let Some(wrong) = wrong else { break };
                if Instant::now() > end {
                    self.keep();
                    panic!("{p:?}: {wrong}");
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        let seen = std::mem::take(&mut *self.reader.seen.lock().unwrap());
        let wrong: Vec<_> = seen.difference(&self.ever).collect();
        assert!(wrong.is_empty(), "bytes of no moment were read: {wrong:?}");
        self.read += seen.len();
        let verified = Command::new(FLEECEFS).arg("verify").arg(self.target()).output().unwrap();
        let sound = [Some(0), Some(COULD_NOT_TELL)].contains(&verified.status.code());
        assert!(sound, "{}", String::from_utf8_lossy(&verified.stdout));
        let mut qmp = self.daemon.qmp();
        assert_eq!(ours_in_qemu(&mut qmp), Vec::<String>::new());
        assert_eq!(leftovers(self.daemon.dir.path()), Vec::<PathBuf>::new());
        let maps = bitmaps(&mut qmp);
        assert!(maps.len() <= 2 * DISKS.len(), "{maps:?}");
    }
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |v| v.parse().expect("a number"))
}

#[test]
fn every_point_is_right_whatever_happens() {
    if !have("every_point_is_right_whatever_happens", TOOLS) {
        return;
    }
    let seed = number("FLEECEFS_SEED", 7);
    println!("FLEECEFS_SEED={seed}");
    let mut setup = Setup::new(seed);
    setup.backup("full", &Vec::new());
    // What did nothing has shown nothing: so it goes on until each has happened.
    let wanted =
        ["inc", "diff", "prune", "consolidate", "commit", "rebase", "snapshot-rebase", KILLED];
    let missing = |w: &Setup| {
        let did = |what: &str| w.done.get(what).is_some_and(|n| *n > 0);
        wanted.into_iter().find(|what| !did(what))
    };
    let (least, given) =
        (number("FLEECEFS_ACTIONS", 100), std::env::var_os("FLEECEFS_SEED").is_some());
    let mut n = 0;
    while n < least || !given && missing(&setup).is_some() {
        println!("{n}");
        setup.scribble();
        match missing(&setup) {
            Some(what) if n >= least => setup.act_on(what),
            _ => setup.act(),
        }
        setup.check();
        n += 1;
        assert!(n < least + 40, "{:?} never did anything", missing(&setup));
    }
    let (states, read) = (setup.known.len(), setup.read);
    println!("{states} states at the end; {read} files read meanwhile; {:?}", setup.done);
    assert!(read > 0, "nobody read anything");
}
