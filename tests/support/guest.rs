//! The tiny guest of `contrib/guest` for tests: started with given disks, ended on drop.
//!
//! `let Some(guest) = Guest::start("its name", …) else { return };`: where QEMU is missing it is
//! shown as skipped, and in CI it fails.

use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use crate::support::guard::Guard;
use serde_json::{Value, json};

/// How long QEMU may take to answer on a busy machine under emulation.
const ANSWER: Duration = Duration::from_secs(60);

/// One disk of a guest. In the guest it is `/dev/disk/<name>`, or `/dev/disk/disk<N>` (counted
/// from 1) where it has no name.
#[derive(Clone, Debug)]
pub struct Disk {
    /// The image; the guest writes to it.
    pub path: PathBuf,
    /// `virtio-blk`, `virtio-blk-iothread`, `virtio-scsi`, `ahci` or `nvme`.
    pub bus: &'static str,
    /// `qcow2` or `raw`.
    pub format: &'static str,
    /// The node's name; empty for a `-drive`, whose node QEMU names `#block…`.
    pub name: String,
}

impl Disk {
    /// A named qcow2 disk on virtio-blk.
    pub fn new(name: &str, path: impl Into<PathBuf>) -> Disk {
        Disk { path: path.into(), bus: "virtio-blk", format: "qcow2", name: name.to_owned() }
    }

    /// The same disk on another bus.
    pub fn on(self, bus: &'static str) -> Disk {
        Disk { bus, ..self }
    }

    /// The same disk as an image of another format.
    pub fn format(self, format: &'static str) -> Disk {
        Disk { format, ..self }
    }

    fn option(&self) -> String {
        let Disk { path, bus, format, name } = self;
        format!("{},bus={bus},format={format},name={name}", path.display())
    }
}

/// A running guest. Its sockets, logs and root disk are in a directory of its own.
pub struct Guest {
    /// Its QEMU is no child of the test.
    _stop: Guard,
    dir: tempfile::TempDir,
}

impl Guest {
    fn unbooted() -> Guest {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let run = script("run.sh");
        let stop = Guard::of(r#""$1" stop "$2""#, &[Path::new(run.get_program()), dir.path()]);
        Guest { _stop: stop, dir }
    }

    /// Starts a guest with these disks beside its root disk, and waits until it is up. Each of
    /// `run` is a command line of the guest's writer, such as `["churn /dev/disk/a 7"]`.
    ///
    /// `None` where QEMU is missing outside CI, which is printed.
    pub fn start(test: &str, disks: &[Disk], run: &[&str]) -> Option<Guest> {
        let guest = Guest::launch(test, disks, run, &[])?;
        guest.wait_ready();
        Some(guest)
    }

    /// As [`Guest::start`], without waiting, and with options for QEMU.
    pub fn launch(test: &str, disks: &[Disk], run: &[&str], qemu: &[&str]) -> Option<Guest> {
        if !has_qemu(test) {
            return None;
        }
        let guest = Guest::unbooted();
        let root = guest.path("root.qcow2");
        let cache = script("build.sh").output().expect("build.sh runs");
        assert!(cache.status.success(), "build.sh: {}", text(&cache.stderr));
        let cache = PathBuf::from(text(&cache.stdout).trim());
        fs::copy(cache.join("root.qcow2"), &root).expect("the root disk can be copied");
        guest.boot(&root, disks, run, qemu);
        Some(guest)
    }

    /// A guest that [`Guest::boot`] will start from a root disk of the test's own, and that disk as
    /// it is before its first start.
    pub fn unstarted(test: &str) -> Option<(Guest, PathBuf)> {
        if !has_qemu(test) {
            return None;
        }
        let guest = Guest::unbooted();
        let cache = text(&must(&mut script("build.sh")).stdout);
        Some((guest, PathBuf::from(cache.trim()).join("root.qcow2")))
    }

    /// Starts QEMU over the disks: at first, or again after [`Guest::kill`].
    pub fn boot(&self, root: &Path, disks: &[Disk], run: &[&str], qemu: &[&str]) {
        let mut append = String::new();
        for words in run {
            write!(append, "fleece.run={} ", words.replace(' ', ",")).expect("a string grows");
        }
        let mut command = script("run.sh");
        command.arg("start").arg(self.dir.path()).arg("--root").arg(root);
        command.args(["--append", &append]);
        for disk in disks {
            command.arg("--disk").arg(disk.option());
        }
        command.arg("--").args(qemu);
        must(&mut command);
    }

    /// Waits until the guest's user space is up.
    pub fn wait_ready(&self) {
        must(script("run.sh").arg("wait").arg(self.dir.path()).arg("180"));
    }

    /// A file in the guest's own directory: a socket, a log, or one the test puts there.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// QMP, for the program under test. It serves one client at a time.
    pub fn qmp_socket(&self) -> PathBuf {
        self.path("qmp.sock")
    }

    /// The guest agent. It serves one client at a time.
    pub fn agent_socket(&self) -> PathBuf {
        self.path("agent.sock")
    }

    /// A QMP client of the test's own, on a second socket.
    pub fn qmp(&self) -> Qmp {
        Qmp::connect(&self.path("qmp2.sock"))
    }

    /// What a shell command prints in the guest; it must succeed. Uses the agent's socket.
    pub fn shell(&self, command: &str) -> String {
        let mut script = script("run.sh");
        script.arg("exec").arg(self.dir.path()).args(["/bin/sh", "-c", command]);
        text(&must(&mut script).stdout)
    }

    /// One command of the guest agent, such as `guest-fsfreeze-status`. Uses the agent's socket.
    pub fn agent(&self, command: &str) -> Value {
        let mut stream =
            UnixStream::connect(self.agent_socket()).expect("the agent's port listens");
        stream.set_read_timeout(Some(ANSWER)).expect("a time limit can be set");
        let sync = json!({ "execute": "guest-sync-delimited", "arguments": { "id": 7 } });
        let command = json!({ "execute": command });
        // 0xff resets the agent's parser, and precedes the answer to this sync.
        stream.write_all(b"\xff").expect("the agent reads");
        writeln!(stream, "{sync}\n{command}").expect("the agent reads");
        let mut reader = BufReader::new(stream);
        reader.read_until(0xff, &mut Vec::new()).expect("the agent answers in time");
        let mut lines = reader.lines().map(|line| line.expect("the agent answers in time"));
        let mut answer =
            || -> Value { serde_json::from_str(&lines.next().expect("an answer")).expect("JSON") };
        assert_eq!(answer()["return"], 7);
        let mut answer = answer();
        assert!(answer["error"].is_null(), "{command}: {answer}");
        answer["return"].take()
    }

    /// QEMU's process.
    pub fn pid(&self) -> i32 {
        let pid = fs::read_to_string(self.path("pid")).expect("a running guest has a pid file");
        pid.trim().parse().expect("a process id")
    }

    /// Sends a signal to QEMU: `"KILL"`, `"STOP"`, `"CONT"`.
    pub fn signal(&self, name: &str) {
        must(Command::new("kill").arg(format!("-{name}")).arg(self.pid().to_string()));
    }

    /// Kills QEMU as a power cut would, and waits until it is gone.
    pub fn kill(&self) {
        self.signal("KILL");
        must(script("run.sh").arg("stop").arg(self.dir.path()));
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = fs::read_to_string(self.path("qemu.log")).unwrap_or_default();
            eprintln!("QEMU's log: {log}");
        }
    }
}

/// A plain QMP client: one command, its answer; events are kept.
pub struct Qmp {
    stream: UnixStream,
    reader: BufReader<UnixStream>,
    /// What happened between the answers.
    pub events: Vec<Value>,
}

impl Qmp {
    /// As [`Qmp::connect`], where nobody may listen, or QEMU may break the connection off: it does so with one that comes
    /// while it still parts from the one before.
    pub fn try_connect(socket: &Path) -> Option<Qmp> {
        let stream = UnixStream::connect(socket).ok()?;
        stream.set_read_timeout(Some(ANSWER)).expect("a time limit can be set");
        let mut reader = BufReader::new(stream.try_clone().expect("a socket can be cloned"));
        let greets = (0..8).any(|_| {
            let mut line = String::new();
            reader.read_line(&mut line).is_ok() && line.contains("\"QMP\"")
        });
        let mut qmp = Qmp { stream, reader, events: Vec::new() };
        greets.then(|| qmp.execute("qmp_capabilities", json!({})))?;
        Some(qmp)
    }

    /// Connects and leaves the negotiation mode.
    pub fn connect(socket: &Path) -> Qmp {
        let stream = UnixStream::connect(socket).expect("QMP listens");
        stream.set_read_timeout(Some(ANSWER)).expect("a time limit can be set");
        let reader = BufReader::new(stream.try_clone().expect("a socket can be cloned"));
        let mut qmp = Qmp { stream, reader, events: Vec::new() };
        // An event of that moment may come first.
        let greets = (0..8).any(|_| qmp.message()["QMP"].is_object());
        assert!(greets, "QMP greets");
        qmp.execute("qmp_capabilities", json!({}));
        qmp
    }

    /// Runs a command that must succeed.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Value {
        match self.try_execute(command, arguments) {
            Ok(value) => value,
            Err(error) => panic!("{command}: {error}"),
        }
    }

    /// Runs a command; the error is QEMU's description.
    pub fn try_execute(&mut self, command: &str, arguments: Value) -> Result<Value, String> {
        let message = json!({ "execute": command, "arguments": arguments });
        // In one piece: QEMU may have gone by the last byte of "quit".
        let line = format!("{message}\n");
        self.stream.write_all(line.as_bytes()).expect("QMP takes commands");
        loop {
            let mut answer = self.message();
            if answer["event"].is_string() {
                self.events.push(answer);
            } else if let Some(error) = answer.get("error") {
                return Err(error["desc"].as_str().unwrap_or_default().to_owned());
            } else {
                return Ok(answer["return"].take());
            }
        }
    }

    /// Waits for an event, also one that came earlier, and takes it off the list.
    pub fn wait_event(&mut self, name: &str) -> Value {
        let end = Instant::now() + ANSWER;
        loop {
            if let Some(at) = self.events.iter().position(|e| e["event"] == name) {
                return self.events.remove(at);
            }
            assert!(Instant::now() < end, "no event {name}, but {:?}", self.events);
            let event = self.message();
            self.events.push(event);
        }
    }

    fn message(&mut self) -> Value {
        let mut line = String::new();
        let bytes = self.reader.read_line(&mut line).expect("QMP answers in time");
        assert!(bytes > 0, "QMP was closed");
        serde_json::from_str(&line).expect("QMP speaks JSON")
    }
}

/// Whether guests can run; if not, the test is skipped by name, and fails in CI.
pub fn has_qemu(test: &str) -> bool {
    let tools = ["qemu-system-x86_64", "qemu-img", "python3"];
    let missing = tools.iter().find(|tool| !on_path(tool));
    if let Some(tool) = missing {
        assert!(std::env::var_os("CI").is_none(), "{test} needs {tool}");
        println!("skipped: {test} needs {tool}");
    }
    missing.is_none()
}

fn on_path(tool: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(tool).is_file())
}

fn script(name: &str) -> Command {
    Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("contrib/guest").join(name))
}

/// Runs a command that must succeed.
pub fn must(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(output.status.success(), "{command:?}: {}", text(&output.stderr));
    output
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
