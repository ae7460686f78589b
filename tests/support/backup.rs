//! Running the program's `backup` against QEMU, holding it at the freeze point, and comparing
//! each point with what the frozen view was.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::guest;
use crate::support::images::first_difference;
use crate::support::mount;
use crate::support::qemu::storage_daemon::Daemon;

/// How to call `fleecefs backup`.
#[derive(Clone)]
pub struct Caller {
    pub qmp: PathBuf,
    pub state: PathBuf,
    pub target: PathBuf,
    pub more: Vec<String>,
}

impl Caller {
    /// For a daemon; state and target are in its folder.
    pub fn of(d: &Daemon) -> Self {
        Caller {
            qmp: d.path("qmp.sock"),
            state: d.path("state"),
            target: d.path("T"),
            more: vec!["--nbd".into(), d.path("nbd.sock").display().to_string()],
        }
    }

    /// For a guest; state, target and fleeces are in its folder.
    pub fn guest(g: &guest::Guest) -> Self {
        Caller {
            qmp: g.qmp_socket(),
            state: g.path("state"),
            target: g.path("T"),
            more: Vec::new(),
        }
    }

    pub fn with(&self, more: &[&str]) -> Self {
        let mut c = self.clone();
        c.more.extend(more.iter().map(|s| s.to_string()));
        c
    }

    pub fn command(&self, level: &str) -> Command {
        let mut c = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
        c.args(["backup", "--level", level, "--qmp"]).arg(&self.qmp);
        c.arg("--target").arg(&self.target).arg("--state-dir").arg(&self.state).args(&self.more);
        c.env_remove("FLEECEFS_STATE_DIR");
        // Whatever the size watermark says: a walk over the whole disk must not find more.
        c.env("FLEECEFS_WALK", "1");
        c
    }

    /// Runs to the end, whatever that is.
    pub fn run(&self, level: &str) -> Output {
        self.command(level).output().expect("fleecefs starts")
    }

    /// Starts a backup that stops itself at a step, and waits until it has. What it says goes to `err`.
    pub fn stopped_at(&self, level: &str, step: &str, err: &Path) -> Child {
        stopped(self.command(level), step, err)
    }

    /// `fleecefs recover` of the same VM.
    pub fn recovery(&self, more: &[&str]) -> Command {
        let mut c = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
        c.args(["recover", "--qmp"]).arg(&self.qmp).arg("--state-dir").arg(&self.state).args(more);
        c
    }

    /// It must succeed; gives what it said.
    pub fn must_recover(&self, more: &[&str]) -> String {
        let out = self.recovery(more).output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.success(), "recover: {said}");
        said
    }

    /// Runs and must succeed; gives what it said.
    pub fn must(&self, level: &str) -> String {
        let out = self.run(level);
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.success(), "backup --level {level}: {}\n{said}", out.status);
        said
    }

    /// Starts a backup that dies at step `n`; gives the step's name, or `None` if it ended before,
    /// and the views if it came so far.
    pub fn crash(&self, level: &str, n: usize) -> (Option<String>, Views) {
        let hold = tempfile::tempdir().unwrap();
        let trace = hold.path().join("steps");
        let mut child = self
            .command(level)
            .env("FLEECEFS_HOLD", hold.path())
            .env("FLEECEFS_STEPS", &trace)
            .env("FLEECEFS_CRASH_AT", n.to_string())
            .stderr(std::fs::File::create(hold.path().join("stderr")).unwrap())
            .spawn()
            .unwrap();
        let views = read_views(&mut child, hold.path());
        std::fs::write(hold.path().join("go"), "").unwrap();
        let status = wait(&mut child);
        if status.success() {
            return (None, views);
        }
        let said = std::fs::read_to_string(hold.path().join("stderr")).unwrap();
        assert_eq!(status.code(), None, "step {n}: it ended by itself: {said}");
        let steps = std::fs::read_to_string(trace).unwrap();
        (steps.lines().last().map(str::to_string), views)
    }

    /// Runs, reads each disk's frozen view while the run is held at it, and lets it go on.
    /// Gives what it said and the views by the disk's name.
    pub fn held(&self, level: &str) -> (String, Views) {
        let hold = tempfile::tempdir().unwrap();
        let err = hold.path().join("stderr");
        let mut child = self
            .command(level)
            .env("FLEECEFS_HOLD", hold.path())
            .stderr(std::fs::File::create(&err).unwrap())
            .spawn()
            .expect("fleecefs starts");
        let views = read_views(&mut child, hold.path());
        std::fs::write(hold.path().join("go"), "").unwrap();
        let status = child.wait().unwrap();
        let said = std::fs::read_to_string(&err).unwrap();
        assert!(status.success(), "backup --level {level}: {status}\n{said}");
        (said, views)
    }
}

/// Starts a command that stops itself at a step, and waits until it has. What it says goes to `err`.
pub fn stopped(mut command: Command, step: &str, err: &Path) -> Child {
    command.env("FLEECEFS_HANG_AT", step).stderr(std::fs::File::create(err).unwrap());
    let mut child = command.spawn().unwrap();
    let stat = format!("/proc/{}/stat", child.id());
    let stopped = || {
        let stat = std::fs::read_to_string(&stat).unwrap_or_default();
        stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('T'))
    };
    while !stopped() {
        let said = || std::fs::read_to_string(err).unwrap_or_default();
        assert!(child.try_wait().unwrap().is_none(), "it does not come so far: {}", said());
        std::thread::sleep(Duration::from_millis(1));
    }
    child
}

/// Each disk's name and its bytes at the freeze point.
pub type Views = Vec<(String, Vec<u8>)>;

fn wait(child: &mut Child) -> std::process::ExitStatus {
    let end = Instant::now() + Duration::from_secs(120);
    loop {
        if let Some(s) = child.try_wait().unwrap() {
            return s;
        }
        assert!(Instant::now() < end, "the backup hangs");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A backup that is held at its freeze point.
pub struct PausedBackup {
    pub child: Child,
    hold: tempfile::TempDir,
}

impl PausedBackup {
    /// Starts one and waits until it is there.
    pub fn start(caller: &Caller, level: &str) -> Self {
        let hold = tempfile::tempdir().unwrap();
        let mut child = caller
            .command(level)
            .env("FLEECEFS_HOLD", hold.path())
            .stderr(std::fs::File::create(hold.path().join("stderr")).unwrap())
            .spawn()
            .unwrap();
        let views = read_views(&mut child, hold.path());
        let held = PausedBackup { child, hold };
        assert!(!views.is_empty(), "{}", held.said());
        held
    }

    pub fn said(&self) -> String {
        std::fs::read_to_string(self.hold.path().join("stderr")).unwrap()
    }

    /// Lets it go on; gives its exit code and what it said.
    pub fn end(mut self) -> (Option<i32>, String) {
        std::fs::write(self.hold.path().join("go"), "").unwrap();
        let code = self.child.wait().unwrap().code();
        (code, self.said())
    }

    pub fn signal(&self, signal: i32) {
        // SAFETY: a signal to our own child.
        unsafe { libc::kill(self.child.id() as i32, signal) };
    }

    /// Ends it by a signal; gives its exit code and what it said.
    pub fn signalled(mut self, signal: i32) -> (Option<i32>, String) {
        self.signal(signal);
        let code = self.child.wait().unwrap().code();
        (code, self.said())
    }
}

pub fn read_views(child: &mut Child, hold: &Path) -> Views {
    let ready = hold.join("ready");
    while !ready.exists() {
        if child.try_wait().unwrap().is_some() {
            // The caller shows what it said.
            return Vec::new();
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let list: Value = serde_json::from_slice(&std::fs::read(&ready).unwrap()).unwrap();
    let mut views = Vec::new();
    for v in list.as_array().unwrap() {
        let text = |k: &str| v[k].as_str().unwrap().to_string();
        views.push((text("disk"), read_view(&text("address"), &text("export"))));
    }
    views
}

/// Reads an export cluster by cluster, without asking what is a hole: QEMU 7.2 shows the disk of
/// now where a request covers more.
fn read_view(socket: &str, export: &str) -> Vec<u8> {
    let address = fleecefs::qmp::Address::Unix(socket.into());
    let mut nbd =
        fleecefs::qmp::nbd::Nbd::connect(&address, export, false, Duration::from_secs(60)).unwrap();
    let mut bytes = Vec::new();
    while (bytes.len() as u64) < nbd.size() {
        let len = (nbd.size() - bytes.len() as u64).min(65536) as u32;
        bytes.extend(nbd.read(bytes.len() as u64, len).unwrap());
    }
    bytes
}

/// The images of a disk's folder by the time in their names.
pub fn images(dir: &Path) -> Vec<PathBuf> {
    let mut list: Vec<(u64, PathBuf)> = std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|e| e.file_type().unwrap().is_file())
        .filter_map(|e| {
            let name = e.file_name().into_string().unwrap();
            let time = name.split('-').nth(1)?.parse().ok()?;
            Some((time, e.path()))
        })
        .collect();
    list.sort();
    list.into_iter().map(|(_, p)| p).collect()
}

/// The newest image of a disk.
pub fn newest(target: &Path, disk: &str) -> PathBuf {
    images(&target.join(disk)).pop().expect("there is an image")
}

/// Level of the newest image of a disk.
pub fn level(caller: &Caller, disk: &str) -> String {
    let name = newest(&caller.target, disk);
    name.file_name().unwrap().to_str().unwrap().split('-').next().unwrap().to_string()
}

/// The manifest of an image.
pub fn manifest_of(image: &Path) -> Value {
    let name = format!(".fleecefs/{}.json", image.file_name().unwrap().to_str().unwrap());
    serde_json::from_slice(&std::fs::read(image.with_file_name(name)).unwrap()).unwrap()
}

/// Compares a point in the mount with the frozen view, loudly.
pub fn same(mount: &mount::Mount, disk: &str, image: &Path, view: &[u8]) {
    let got = std::fs::read(mount.point(disk, image)).unwrap();
    if let Some(d) = first_difference(&got, view) {
        panic!("{}: {d}", image.display());
    }
}

/// Bitmaps that a run has for its own time alone.
pub fn holds(qmp: &mut guest::Qmp) -> Vec<String> {
    let hold = |n: &String| n.starts_with("fleecefs-") && n.contains("-k");
    bitmaps(qmp).into_iter().filter(hold).collect()
}

/// What of ours is in QEMU: nodes, jobs, exports, bitmaps for the time of a run.
pub fn ours_in_qemu(qmp: &mut guest::Qmp) -> Vec<String> {
    let mut found = holds(qmp);
    for (command, key) in [
        ("query-named-block-nodes", "node-name"),
        ("query-jobs", "id"),
        ("query-block-exports", "id"),
    ] {
        let list = qmp.execute(command, serde_json::json!({}));
        for v in list.as_array().unwrap() {
            let name = v[key].as_str().unwrap_or_default();
            if name.starts_with("fleecefs") {
                found.push(format!("{command}: {name}"));
            }
        }
    }
    found
}

/// Named bitmaps in QEMU, but for those that are beside the bitmap that they belong to.
pub fn bitmaps(qmp: &mut guest::Qmp) -> Vec<String> {
    let list = qmp.execute("query-named-block-nodes", serde_json::json!({}));
    let nodes = list.as_array().unwrap();
    let maps = nodes.iter().filter_map(|n| n["dirty-bitmaps"].as_array()).flatten();
    let names: Vec<String> = maps.filter_map(|b| Some(b["name"].as_str()?.to_owned())).collect();
    let of = |n: &str| n.strip_suffix("-floor").or(n.strip_suffix("-open")).map(str::to_string);
    let beside = |n: &str| of(n).is_some_and(|b| names.contains(&b));
    names.iter().filter(|n| !beside(n)).cloned().collect()
}

/// Files of ours that should not be: partials, fleeces, announcements.
pub fn leftovers(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut todo = vec![dir.to_path_buf()];
    while let Some(d) = todo.pop() {
        for e in std::fs::read_dir(&d).unwrap().flatten() {
            let name = e.file_name().into_string().unwrap();
            if e.file_type().unwrap().is_dir() {
                todo.push(e.path());
            } else if name.contains(".partial")
                || name.contains(".fleece.")
                || name.starts_with(".tmp-")
                || name.ends_with(".journal")
            {
                found.push(e.path());
            }
        }
    }
    found
}
