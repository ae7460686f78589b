//! A QEMU and a guest agent that lie at each answer in turn, through a backup, a recovery, a
//! cleanup: nothing hangs, no wrong point is called good, no file elsewhere is touched, memory stays
//! bounded, and afterwards the guest runs, thawed, and an honest QEMU is backed up as ever.
//!
//! A spread of lies by default; `FLEECEFS_LIES` is another number for each command, or `all`, or the questions to which
//! all are told (`qom-list,qom-get`).

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::backup::{images, leftovers, ours_in_qemu};
use crate::support::guest::{Qmp, has_qemu};
use crate::support::images::{Oracle, first_difference};
use crate::support::qemu::liar::{self, Lie, Place, Stage};
use crate::support::tools::{self, run};

/// The disk, in bytes.
const SIZE: usize = 4 << 20;

/// What a program may take: memory in KiB, and time. An answer may take 2 seconds (below) and taking
/// down thirty times that, on a machine that is busy.
const MEMORY: u64 = 256 << 10;
const TIME: Duration = Duration::from_secs(100);

/// How many lies are tried by default, of each command line.
const SPREAD: usize = 12;

/// A QEMU with one disk, without a guest's system in it: it runs, and writes nothing.
struct Vm {
    dir: tempfile::TempDir,
    child: Child,
    stage: Arc<Stage>,
    /// What the disk holds.
    bytes: Vec<u8>,
    writes: u8,
}

impl Vm {
    fn start() -> Vm {
        let dir = tempfile::tempdir().unwrap();
        for d in ["vm", "elsewhere", "fleece"] {
            std::fs::create_dir(dir.path().join(d)).unwrap();
        }
        let p = |n: &str| dir.path().join(n);
        std::fs::write(p("elsewhere/root.raw"), "root's").unwrap();
        let size = SIZE.to_string();
        run("qemu-img", &["create", "-q", "-f", "qcow2", p("vm/d.qcow2").to_str().unwrap(), &size]);
        let stage = Stage::new(&p("elsewhere/root.raw"));
        let child = Self::spawn(dir.path());
        liar::proxy(&stage, &p("qmp.sock"), &p("real.sock"));
        liar::agent(&stage, &p("agent.sock"));
        Vm { dir, child, stage, bytes: vec![0; SIZE], writes: 0 }
    }

    fn spawn(dir: &Path) -> Child {
        let socket = |n: &str| format!("unix:{},server=on,wait=off", dir.join(n).display());
        let child = Command::new("qemu-system-x86_64")
            .args(["-M", "q35", "-accel", "tcg", "-m", "32", "-nodefaults", "-display", "none"])
            .args(["-qmp", &socket("real.sock"), "-qmp", &socket("test.sock")])
            .args([
                "-blockdev",
                &format!(
                    "driver=qcow2,node-name=disk0,file.driver=file,file.filename={}",
                    dir.join("vm/d.qcow2").display()
                ),
            ])
            .args(["-device", "virtio-blk-pci,id=vd0,drive=disk0"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("QEMU starts");
        let end = Instant::now() + Duration::from_secs(60);
        while std::os::unix::net::UnixStream::connect(dir.join("test.sock")).is_err() {
            assert!(Instant::now() < end, "QEMU does not come up");
            std::thread::sleep(Duration::from_millis(20));
        }
        child
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn qmp(&self) -> Qmp {
        Qmp::connect(&self.path("test.sock"))
    }

    /// Writes as the guest would.
    fn write(&mut self) {
        self.writes = self.writes % 250 + 1;
        let at = usize::from(self.writes) * 7 % 60 * 65536;
        let command = format!(
            "qemu-io -d /machine/peripheral/vd0/virtio-backend \"write -P {} {at} 65536\"",
            self.writes
        );
        let said = self.qmp().execute("human-monitor-command", json!({"command-line": command}));
        assert!(!said.as_str().unwrap().contains("rror"), "{said}");
        self.bytes[at..at + 65536].fill(self.writes);
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut c = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
        c.args(words).arg("--qmp").arg(self.path("qmp.sock"));
        c.arg("--state-dir").arg(self.path("state"));
        c.env("FLEECEFS_ANSWER_TIMEOUT", "2").env_remove("FLEECEFS_STATE_DIR");
        if words[0] == "backup" {
            c.args(["--level", "auto", "--full-every", "6", "--quiesce", "--hold-limit", "6"]);
            c.args(["--agent-timeout", "2", "--cbw-timeout", "5", "--agent"]);
            c.arg(self.path("agent.sock"));
            c.args(["--guest-before", "begin", "--guest-after", "end", "--guest-timeout", "2"]);
            c.arg("--target").arg(self.path("T")).arg("--fleece-dir").arg(self.path("fleece"));
        }
        c
    }

    /// Files and folders elsewhere, and what is in them.
    fn elsewhere(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let list = |d: &str| std::fs::read_dir(self.path(d)).unwrap().flatten();
        let names = list("elsewhere").chain(list("vm")).chain(list("."));
        let content = |p: &Path| match p.starts_with(self.path("elsewhere")) && p.is_file() {
            true => std::fs::read(p).unwrap(),
            false => Vec::new(),
        };
        names.map(|e| (e.path(), content(&e.path()))).collect()
    }

    /// The points of a folder, oldest first: the disk's own, or what QEMU has called it.
    fn points(&self) -> BTreeMap<PathBuf, Vec<PathBuf>> {
        let Ok(folders) = std::fs::read_dir(self.path("T")) else { return BTreeMap::new() };
        let folders = folders.flatten().map(|e| e.path()).filter(|p| p.is_dir());
        folders.map(|d| (d.clone(), images(&d))).collect()
    }

    /// The folder that has more points than before.
    fn grown(&self, before: &BTreeMap<PathBuf, Vec<PathBuf>>) -> Option<PathBuf> {
        let count = |d: &Path| before.get(d).map_or(0, Vec::len);
        self.points().into_iter().find(|(d, list)| list.len() > count(d)).map(|(d, _)| d)
    }

    /// Whether the newest point is the disk.
    fn difference(&self, folder: &Path) -> Option<String> {
        let mut chain = images(folder);
        let name = |p: &Path| p.file_name().unwrap().to_str().unwrap().to_string();
        let full = chain.iter().rposition(|p| name(p).starts_with("FULL"))?;
        chain.drain(..full);
        first_difference(&Oracle::new(&chain).bytes(chain.len() - 1), &self.bytes)
    }

    /// What has to hold when QEMU is honest again.
    fn settle(&mut self, case: &str) {
        self.stage.begin(None);
        let end = Instant::now() + Duration::from_secs(60);
        // The watchdog may be at it still.
        while !self.stage.is_free() {
            assert!(Instant::now() < end, "{case}: the guest stays frozen or prepared");
            std::thread::sleep(Duration::from_millis(20));
        }
        let out = self.command(&["recover"]).output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.success(), "{case}: recover: {said}");
        let mut qmp = self.qmp();
        while qmp.execute("query-status", json!({}))["status"] != "running" {
            assert!(Instant::now() < end, "{case}: the guest stays stopped");
            std::thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(ours_in_qemu(&mut qmp), Vec::<String>::new(), "{case}");
        assert_eq!(leftovers(self.dir.path()), Vec::<PathBuf>::new(), "{case}");
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// How a program ended.
struct End {
    /// Its exit code; none if a signal ended it.
    code: Option<i32>,
    said: String,
    /// The most memory that it had, in KiB.
    memory: u64,
    took: Duration,
}

fn run_watched(mut c: Command, case: &str) -> End {
    let file = tempfile::NamedTempFile::new().unwrap();
    c.stdout(Stdio::null()).stdin(Stdio::null()).stderr(file.reopen().unwrap());
    let began = Instant::now();
    let mut child = c.spawn().expect("fleecefs starts");
    let said = || String::from_utf8_lossy(&std::fs::read(file.path()).unwrap()).into_owned();
    let mut memory = 0;
    loop {
        memory = peak(child.id()).unwrap_or(0).max(memory);
        if let Some(status) = child.try_wait().unwrap() {
            return End { code: status.code(), said: said(), memory, took: began.elapsed() };
        }
        if began.elapsed() > TIME {
            let _ = child.kill();
            let _ = child.wait();
            panic!("{case}: it hangs: {}", said());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The most memory that the program has had so far, in KiB. (What wait4 tells counts that of its
/// parent as well, from before the program was started; so does this for a moment in which the
/// process has neither the program's name nor its memory.)
fn peak(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.strip_prefix("Name:\tfleecefs\n")?;
    let line = status.lines().find(|l| l.starts_with("VmHWM:"))?;
    line.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// The command lines that are lied to.
const LINES: [&[&str]; 4] =
    [&["backup"], &["recover"], &["info", "blockdev"], &["cleanup", "--all"]];

/// Gets the VM into a state in which the command line has something to do.
fn prepare(vm: &mut Vm, words: &[&str]) {
    vm.stage.begin(None);
    vm.write();
    if words[0] == "cleanup" {
        let out = vm.command(&["backup"]).output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        vm.stage.begin(None);
    }
    if words[0] == "recover" {
        // The filter is in, the job has been started, the guest is stopped and frozen.
        let mut c = vm.command(&["backup"]);
        c.env("FLEECEFS_CRASH_AT", "answer blockdev-backup");
        let out = c.output().unwrap();
        assert_eq!(out.status.code(), None, "{}", String::from_utf8_lossy(&out.stderr));
        // Its watchdog thaws and continues.
        let end = Instant::now() + Duration::from_secs(60);
        while !vm.stage.is_free() {
            assert!(Instant::now() < end, "the guest stays frozen or prepared");
            std::thread::sleep(Duration::from_millis(20));
        }
        vm.stage.begin(None);
    }
}

/// One lie; gives a line of the table.
fn lie(vm: &mut Vm, words: &[&str], place: &Place, lie: Lie) -> String {
    let case = format!("{:14} | {:31} {:2} | {lie:?}", words.join(" "), place.0, place.1);
    prepare(vm, words);
    let before = (vm.elsewhere(), vm.points());
    vm.stage.begin(Some((place.clone(), lie)));
    let end = run_watched(vm.command(words), &case);
    let told = vm.stage.told();
    assert!(!end.said.contains("panicked"), "{case}: {}", end.said);
    let code = end.code.unwrap_or_else(|| panic!("{case}: a signal: {}", end.said));
    assert!(end.memory < MEMORY, "{case}: {} KiB", end.memory);
    assert!(end.said.len() < 256 << 10, "{case}: it says {} bytes", end.said.len());
    let ours = ["T", "state", "steps"].map(|n| vm.path(n));
    let there = |vm: &Vm| {
        let mut all = vm.elsewhere();
        all.retain(|p, _| !ours.iter().any(|o| p.file_name() == o.file_name()));
        all
    };
    let mut old = before.0;
    old.retain(|p, _| !ours.iter().any(|o| p.file_name() == o.file_name()));
    assert_eq!(there(vm), old, "{case}: files elsewhere");
    if words[0] == "backup" && code == 0 {
        let folder = vm.grown(&before.1);
        let folder = folder.unwrap_or_else(|| panic!("{case}: success without a point"));
        assert_eq!(vm.difference(&folder), None, "{case}: a wrong point: {}", end.said);
    }
    vm.settle(&case);
    // A point that is there is right, whoever has finished it.
    if let Some(folder) = vm.grown(&before.1) {
        assert_eq!(
            vm.difference(&folder),
            None,
            "{case}: a wrong point after recovery: {}",
            end.said
        );
    }
    let told = if told { "" } else { " (was not asked for)" };
    let (mib, took) = (end.memory >> 10, end.took.as_secs_f64());
    format!("{case:66} | exit {code:2}, {took:5.1} s, {mib:3} MiB{told}")
}

/// The answers of an honest run, those asked for again and again only twice.
fn places(vm: &mut Vm, words: &[&str]) -> Vec<Place> {
    prepare(vm, words);
    let end = run_watched(vm.command(words), "honest");
    assert_eq!(end.code, Some(0), "{words:?}: {}", end.said);
    let polls = ["query-jobs", "query-block-exports"];
    let wanted = |p: &Place| p.1 < if polls.contains(&p.0.as_str()) { 2 } else { 8 };
    let found: Vec<Place> = vm.stage.places().into_iter().filter(wanted).collect();
    vm.settle("honest");
    found
}

#[test]
fn a_wrong_answer_to_each_question_in_turn() {
    let name = "a_wrong_answer_to_each_question_in_turn";
    if !has_qemu(name) || !tools::have(name, &["qemu-img"]) {
        return;
    }
    let asked = std::env::var("FLEECEFS_LIES").unwrap_or_else(|_| SPREAD.to_string());
    let spread = asked.parse().unwrap_or(usize::MAX);
    let names: Vec<&str> = asked.split(',').filter(|n| n.contains('-')).collect();
    let mut vm = Vm::start();
    let mut seen = BTreeSet::new();
    let mut failed = 0;
    for words in LINES {
        let mut places = places(&mut vm, words);
        places.retain(|p| names.is_empty() || names.contains(&p.0.as_str()));
        let pairs: Vec<(&Place, Lie)> =
            places.iter().flat_map(|p| Lie::ALL.map(|l| (p, l))).collect();
        // A step that has no factor in common with the number of lies meets each of them.
        let mut step = (pairs.len() / spread).max(1);
        while step.is_multiple_of(Lie::ALL.len()) {
            step += 1;
        }
        for (place, l) in pairs.into_iter().step_by(step) {
            seen.insert(format!("{l:?}"));
            // Each failure is shown, and the next lie is told to a QEMU that is new.
            let told = AssertUnwindSafe(|| lie(&mut vm, words, place, l));
            match catch_unwind(told) {
                Ok(line) => println!("{line}"),
                Err(_) => {
                    failed += 1;
                    vm = Vm::start();
                }
            }
        }
    }
    println!("kinds of lies: {seen:?}");
    assert_eq!(failed, 0, "lies that mattered");
    // All is as it was.
    let out = vm.command(&["backup"]).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    assert_eq!(vm.difference(&vm.path("T/d.qcow2")), None);
}

/// Answers that are as large as is accepted, to each question: what is kept of them together stays
/// within bounds.
#[test]
fn the_largest_answers_together_take_bounded_memory() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("qmp.sock");
    liar::giant(&socket);
    std::fs::create_dir(dir.path().join("T")).unwrap();
    for words in [
        &["info", "blockdev"][..],
        &["info", "bitmaps"],
        &["info", "jobs"],
        &["backup", "--dry-run", "--level", "full", "--target"],
        &["recover"],
    ] {
        let mut c = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
        c.args(words);
        if words[0] == "backup" {
            c.arg(dir.path().join("T"));
        }
        c.arg("--qmp").arg(&socket).arg("--state-dir").arg(dir.path().join("state"));
        c.env("FLEECEFS_ANSWER_TIMEOUT", "5");
        let end = run_watched(c, &words.join(" "));
        println!(
            "{:14} | exit {:?}, {:.1} s, {} MiB: {}",
            words[..2.min(words.len())].join(" "),
            end.code,
            end.took.as_secs_f64(),
            end.memory >> 10,
            end.said.lines().last().unwrap_or_default()
        );
        assert!(end.code.is_some() && !end.said.contains("panicked"), "{words:?}: {}", end.said);
        assert!(end.memory < MEMORY, "{words:?}: {} KiB: {}", end.memory, end.said);
    }
}
