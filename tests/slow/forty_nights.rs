//! Forty nights of backups, a minute's work: the clock of the program is set on by faketime, that of
//! the machine is not. What each night says and returns, and what is left of all in the end.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CString;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::support::backup::{self, Caller, images, manifest_of, newest};
use crate::support::guard::Guard;
use crate::support::qemu::two_disks::{self, Machine, SIZE};
use crate::support::tools::{have, is_root};

/// Monday, 5 January 2026, 02:00 UTC.
const BEGIN: i64 = 1_767_578_400;
const DAY: i64 = 86_400;
const NIGHTS: i64 = 40;
const DISKS: [&str; 2] = ["a.qcow2", "o.qcow2"];
const MIB: usize = 1 << 20;
/// What the cron job keeps.
const RULES: [&str; 6] = ["--keep-daily", "5", "--keep-weekly", "3", "--keep-monthly", "2"];

/// What happens to whom.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Night {
    Plain,
    Unmounted,
    Full,
    HungAgent,
    NoAgent,
    Off,
    Killed,
    Resized,
}

fn night(n: i64) -> Night {
    match n {
        5 => Night::Unmounted,
        9 => Night::Full,
        12 => Night::HungAgent,
        16 => Night::NoAgent,
        20 => Night::Off,
        24 => Night::Killed,
        30 => Night::Resized,
        _ => Night::Plain,
    }
}

/// The preloaded library of faketime, which the command of that name would load.
fn library() -> Option<PathBuf> {
    let folders =
        ["/usr/lib", "/usr/lib64", "/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu"];
    let libraries = folders.iter().map(|f| Path::new(f).join("faketime/libfaketimeMT.so.1"));
    libraries.into_iter().find(|l| l.exists())
}

/// What processes under faketime share. One that is killed leaves what it made, so each command gets some
/// that is made here, and goes with the test.
struct Clock {
    prefix: String,
    count: Cell<u32>,
    _remover: Guard,
}

impl Clock {
    fn new() -> Self {
        let prefix = format!("fleecefs-nights-{}", std::process::id());
        let undo = r#"rm -f "/dev/shm/$1"-* "/dev/shm/sem.$1"-*"#;
        let _remover = Guard::of(undo, &[Path::new(&prefix)]);
        Clock { prefix, count: Cell::new(0), _remover }
    }

    /// The names of a new semaphore and of memory.
    fn next(&self) -> String {
        self.count.set(self.count.get() + 1);
        let name = format!("/{}-{}", self.prefix, self.count.get());
        let c_name = CString::new(name.as_str()).unwrap();
        let flags = libc::O_CREAT | libc::O_EXCL | libc::O_RDWR;
        // SAFETY: a valid name; what is opened is closed, and nothing else.
        unsafe {
            let sem =
                libc::sem_open(c_name.as_ptr(), flags, 0o600 as libc::mode_t, 1 as libc::c_uint);
            assert_ne!(sem, libc::SEM_FAILED);
            libc::sem_close(sem);
            let memory = libc::shm_open(c_name.as_ptr(), flags, 0o600);
            assert!(memory >= 0 && libc::ftruncate(memory, 4096) == 0);
            libc::close(memory);
        }
        format!("{name} {name}")
    }
}

/// Everything that lasts over the nights.
struct Setup {
    /// The backup disk: a small file system that is mounted at `at`.
    store: PathBuf,
    at: PathBuf,
    mounted: Option<Guard>,
    _store: Guard,
    library: PathBuf,
    clock: Clock,
    caller: Caller,
    /// The hash of what a disk held, by its folder and the point's time.
    held: BTreeMap<(usize, i64), blake3::Hash>,
    /// What a night without an agent, or with a silent one, asks.
    _agent: UnixListener,
    /// Last: its folder goes when nothing is mounted in it any more.
    m: Machine,
}

impl Setup {
    fn new(library: PathBuf) -> Self {
        let m = Machine::begin();
        let (store, at) = (m.path("store"), m.path("disk"));
        for folder in [&store, &at] {
            std::fs::create_dir(folder).unwrap();
        }
        let space = Guard::tmpfs("96M", &store);
        let mounted = Some(Guard::mount("--bind", &store, &at));
        let caller = Caller { target: at.join("T"), ..m.caller() };
        let caller = caller.with(&["-q", "--full-every", "7d"]);
        let agent = UnixListener::bind(m.path("agent.sock")).unwrap();
        let (held, clock) = (BTreeMap::new(), Clock::new());
        Setup { m, store, at, mounted, _store: space, library, clock, caller, held, _agent: agent }
    }

    /// The command as of night `n`, a few seconds later than the one before.
    fn at_night(&self, n: i64, command: &mut Command) -> Output {
        let (out, err) = (Stdio::piped(), Stdio::piped());
        let child = self.dated(n, command).stdout(out).stderr(err).spawn().unwrap();
        let own = PathBuf::from(format!("/dev/shm/faketime_shm_{}", child.id()));
        let out = child.wait_with_output().unwrap();
        assert!(!own.exists(), "night {n}: {} stays", own.display());
        out
    }

    fn dated<'a>(&self, n: i64, command: &'a mut Command) -> &'a mut Command {
        // A point's waits are real ones, and so are the times of files.
        command.env("LD_PRELOAD", &self.library).env("TZ", "UTC");
        command.env("FAKETIME_SHARED", self.clock.next());
        command
            .env("FAKETIME", format!("@{}", date(when(n))))
            .env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        command.env("DONT_FAKE_MONOTONIC", "1").env("NO_FAKE_STAT", "1")
    }

    fn prune(&self, n: i64, more: &[&str]) -> Output {
        let mut c = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
        c.arg("prune").args(RULES).args(more).arg(&self.caller.target);
        self.at_night(n, &mut c)
    }

    /// The guest's day.
    fn day(&mut self, n: i64) {
        let place = n as usize % 14 * MIB / 2;
        for disk in [0, 1] {
            self.m.write(disk, place, MIB / 2);
            self.m.write(disk, 7 * MIB + 4096 * (n as usize % 100), 4096);
        }
    }

    fn points(&self, disk: usize) -> Vec<PathBuf> {
        let mut images = images(&self.caller.target.join(DISKS[disk]));
        images.retain(|i| i.extension().is_some_and(|e| e == "qcow2"));
        images
    }
}

fn when(n: i64) -> i64 {
    BEGIN + n * (DAY + 20)
}

fn date(time: i64) -> String {
    let out =
        Command::new("date").args(["-u", "-d", &format!("@{time}"), "+%F %T"]).output().unwrap();
    String::from_utf8(out.stdout).unwrap().trim().to_string()
}

fn time_of(image: &Path) -> i64 {
    let name = image.file_name().unwrap().to_str().unwrap();
    name.split('-').nth(1).unwrap().parse().unwrap()
}

fn said(out: &Output) -> String {
    String::from_utf8_lossy(&[&out.stdout[..], &out.stderr].concat()).trim().to_string()
}

/// What the rules keep of points with these times, worked out by the calendar alone; each with those
/// that it depends on.
fn kept(points: &[PathBuf]) -> BTreeSet<PathBuf> {
    let mut wanted = BTreeSet::new();
    // 5 January 2026 is a Monday, and 25 nights are left of that month after it.
    let day = |t: i64| t.div_euclid(DAY);
    let week = |t: i64| (day(t) - day(BEGIN)).div_euclid(7);
    let month = |t: i64| i64::from(day(t) - day(BEGIN) > 26);
    let slots: [(&dyn Fn(i64) -> i64, usize); 3] = [(&day, 5), (&week, 3), (&month, 2)];
    for (slot, most) in slots {
        // The newest of each slot, for the newest slots that have any.
        let newest: BTreeMap<i64, &PathBuf> =
            points.iter().map(|p| (slot(time_of(p)), p)).collect();
        wanted.extend(newest.into_values().rev().take(most).cloned());
    }
    for point in wanted.clone() {
        let mut at = point;
        while let Some(below) = manifest_of(&at)["parent"].as_str() {
            at = at.with_file_name(below);
            wanted.insert(at.clone());
        }
    }
    wanted
}

#[test]
fn forty_nights() {
    let name = "forty_nights";
    if !have(name, two_disks::TOOLS) || !have(name, &["date", "mount"]) || !is_root(name) {
        return;
    }
    let Some(library) = library() else {
        assert!(std::env::var_os("CI").is_none(), "{name} needs faketime");
        println!("skipped: {name} needs faketime");
        return;
    };
    let mut s = Setup::new(library);
    println!("night date        what       exit prune points said");
    for n in 0..NIGHTS {
        let what = night(n);
        if what != Night::Off {
            s.day(n);
        }
        let (exit, text) = one_night(&mut s, n, what);
        let before: Vec<Vec<PathBuf>> = [0, 1].map(|d| s.points(d)).to_vec();
        let pruned = s.prune(n, &["-q"]);
        let after: Vec<Vec<PathBuf>> = [0, 1].map(|d| s.points(d)).to_vec();
        let first =
            text.lines().next().unwrap_or_default().replace(s.m.folder().to_str().unwrap(), "");
        println!(
            "{n:5} {} {:10} {:4} {:5} {:6} {first}",
            &date(when(n))[..10],
            format!("{what:?}"),
            exit.map_or("-".into(), |e| e.to_string()),
            pruned.status.code().unwrap(),
            after[0].len(),
        );
        expected(&s, n, what, exit, &text);
        let there = what != Night::Unmounted;
        assert_eq!(pruned.status.code(), Some(if there { 0 } else { 3 }), "{n}: {}", said(&pruned));
        for d in [0, 1].into_iter().filter(|_| there) {
            assert_eq!(after[d].iter().cloned().collect::<BTreeSet<_>>(), kept(&before[d]), "{n}");
        }
        end_of_night(&mut s, n, what);
    }
    in_the_end(&s);
}

/// One night's backup: exit code, and what was said.
fn one_night(s: &mut Setup, n: i64, what: Night) -> (Option<i32>, String) {
    let agent = s.m.text(if what == Night::HungAgent { "agent.sock" } else { "none.sock" });
    let mut caller = s.caller.clone();
    match what {
        Night::Unmounted => drop(s.mounted.take()),
        Night::Full => fill(&s.store),
        Night::HungAgent => {
            caller = caller.with(&["--quiesce", "--agent", &agent, "--agent-timeout", "1"]);
        }
        Night::NoAgent => caller = caller.with(&["--quiesce", "--agent", &agent]),
        Night::Off => s.m.off(),
        Night::Resized => s.m.resize(SIZE + 4 * MIB),
        Night::Plain | Night::Killed => {}
    }
    let mut command = caller.command("auto");
    if what == Night::Killed {
        command.env("FLEECEFS_CRASH_AT", "answer blockdev-backup");
    }
    let out = s.at_night(n, &mut command);
    if out.status.success() {
        for (d, held) in s.m.expect.iter().enumerate() {
            let image = newest(&s.caller.target, DISKS[d]);
            let late = time_of(&image) - when(n);
            assert!((0..60).contains(&late), "night {n}: {}: {late} s late", image.display());
            s.held.insert((d, time_of(&image)), blake3::hash(held));
        }
    }
    (out.status.code(), said(&out))
}

fn fill(store: &Path) {
    use std::io::Write;
    let mut file = std::fs::File::create(store.join("others")).unwrap();
    while file.write_all(&[1; 4096]).is_ok() {}
}

fn end_of_night(s: &mut Setup, n: i64, what: Night) {
    match what {
        Night::Unmounted => s.mounted = Some(Guard::mount("--bind", &s.store, &s.at)),
        Night::Full => std::fs::remove_file(s.store.join("others")).unwrap(),
        Night::Off => s.m.on(),
        _ => {}
    }
    // What the killed run left goes with the next.
    let left = backup::leftovers(&s.caller.target);
    assert_eq!(left.is_empty(), what != Night::Killed, "night {n}: {left:?}");
}

/// What each night says, to whom nobody listens, and returns.
fn expected(s: &Setup, n: i64, what: Night, exit: Option<i32>, text: &str) {
    let (code, words): (Option<i32>, &[&str]) = match what {
        Night::Plain | Night::Resized => (Some(0), &[]),
        Night::Unmounted => (Some(3), &["is gone", "mounted", "--init"]),
        Night::Full => (Some(7), &["0 b are free", "failed"]),
        Night::HungAgent => (Some(0), &["warning: not frozen", "does not answer"]),
        Night::NoAgent => (Some(0), &["warning: not frozen", "none.sock"]),
        Night::Off => (Some(3), &["qmp.sock", "is qemu running"]),
        Night::Killed => (None, &[]),
    };
    assert_eq!(exit, code, "night {n}, {what:?}: {text}");
    let text = text.to_lowercase();
    for word in words {
        assert!(text.contains(word), "night {n}, {what:?}, not {word:?}: {text}");
    }
    if words.is_empty() {
        assert_eq!(text, "", "night {n}, {what:?}: nothing happened");
    }
    if code == Some(0) {
        // A FULL each week, and nothing that went wrong in between begins a chain anew.
        let level = backup::level(&s.caller, DISKS[1]);
        assert_eq!(level, if n % 7 == 0 { "FULL" } else { "INC" }, "night {n}");
    }
}

fn in_the_end(s: &Setup) {
    let out = Command::new(env!("CARGO_BIN_EXE_fleecefs"))
        .args(["list", "--json"])
        .arg(&s.caller.target)
        .output()
        .unwrap();
    let list: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    let mut compared = 0;
    for (d, name) in DISKS.iter().enumerate() {
        let disks = list["disks"].as_array().unwrap();
        let points = disks.iter().map(|l| l["points"].as_array().unwrap());
        let of = |p: &&serde_json::Value| p["point"].as_str().unwrap().ends_with(name);
        let points: Vec<_> = points.flatten().filter(of).collect();
        assert_eq!(points.len(), s.points(d).len(), "{name}: all are listed: {list}");
        for p in points {
            let image = s.caller.target.join(name).join(p["point"].as_str().unwrap());
            let held = s.held[&(d, time_of(&image))];
            let bytes = restored(s, name, &image);
            assert_eq!(blake3::hash(&bytes), held, "{}", image.display());
            compared += 1;
        }
    }
    println!("{compared} points hold what their disks held");
    assert!(compared > 20, "{compared}");
    // Of the first month the newest alone, by its chain.
    let first_month = |p: &PathBuf| time_of(p) < BEGIN + 20 * DAY;
    assert!(!s.points(0).iter().any(first_month), "{:?}", s.points(0));
    assert_eq!(backup::leftovers(&s.caller.target), Vec::<PathBuf>::new());
}

fn restored(s: &Setup, disk: &str, image: &Path) -> Vec<u8> {
    let raw = s.m.path("restored.raw");
    let _ = std::fs::remove_file(&raw);
    let name = format!("{disk}/{}", image.file_name().unwrap().to_str().unwrap());
    let mut c = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
    let out = c.args(["restore", "-q"]).arg(&s.caller.target).arg(name).arg(&raw).output().unwrap();
    assert!(out.status.success(), "{}", said(&out));
    std::fs::read(raw).unwrap()
}
