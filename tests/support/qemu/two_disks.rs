//! QEMU with two disks and no operating system: the test writes as the guest's device would, and
//! knows what each disk must hold.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::backup::Caller;
use crate::support::guard::tied;
use crate::support::guest::Qmp;
use crate::support::images::first_difference;
use crate::support::tools::{have, run};

/// What it needs.
pub const TOOLS: &[&str] = &["qemu-system-x86_64", "qemu-img", "qemu-io"];

/// Size of each disk.
pub const SIZE: usize = 8 << 20;

const MIB: usize = 1 << 20;

/// `v0` is a `-drive` with id `dr0` and node `a` above a base image with node `base`; `v1` is a
/// `-blockdev` with node `o`. `b` is an empty qcow2 node for the jobs of others.
pub struct Machine {
    dir: tempfile::TempDir,
    child: Process,
    /// The test's own client.
    pub qmp: Qmp,
    /// What `v0` and `v1` must hold.
    pub expect: [Vec<u8>; 2],
    byte: u8,
    more: Vec<String>,
}

impl Machine {
    /// Starts it, unless a tool that `test` needs is missing.
    pub fn start(test: &str) -> Option<Machine> {
        have(test, TOOLS).then(Self::begin)
    }

    /// Starts it, where the tools are known to be there.
    pub fn begin() -> Machine {
        let mut m = Self::launch(&[]);
        m.fill();
        m
    }

    /// With more options for QEMU; the guest has written nothing yet.
    pub fn launch(more: &[&str]) -> Machine {
        let dir = tempfile::tempdir().unwrap();
        let path = |n: &str| dir.path().join(n).display().to_string();
        let size = SIZE.to_string();
        run("qemu-img", &["create", "-q", "-f", "qcow2", &path("base.qcow2"), &size]);
        run("qemu-io", &["-f", "qcow2", "-c", "write -P 99 0 2M", &path("base.qcow2")]);
        let base = path("base.qcow2");
        let create = ["create", "-q", "-f", "qcow2", "-b", &base, "-F", "qcow2"];
        run("qemu-img", &[create.as_slice(), &[&path("a.qcow2")]].concat());
        for name in ["o", "b"] {
            run(
                "qemu-img",
                &["create", "-q", "-f", "qcow2", &path(&format!("{name}.qcow2")), &size],
            );
        }
        let child = Self::boot(dir.path(), more, true);
        let qmp = Qmp::connect(&dir.path().join("own.sock"));
        let mut expect = [vec![0; SIZE], vec![0; SIZE]];
        expect[0][..2 * MIB].fill(99);
        let more = more.iter().map(|m| m.to_string()).collect();
        Machine { dir, child, qmp, expect, byte: 0, more }
    }

    /// QEMU over the images in `dir`, with `v1` or without.
    fn boot(dir: &Path, more: &[&str], has_second: bool) -> Process {
        let path = |n: &str| dir.join(n).display().to_string();
        let mut c = Command::new("qemu-system-x86_64");
        c.args(["-accel", "tcg", "-m", "32", "-nodefaults", "-no-user-config", "-display", "none"]);
        // For us, for the test, and for whoever works beside us.
        for socket in ["qmp.sock", "own.sock", "other.sock"] {
            let _ = std::fs::remove_file(path(socket));
            c.arg("-qmp").arg(format!("unix:{},server=on,wait=off", path(socket)));
        }
        c.arg("-drive").arg(format!(
            "if=none,id=dr0,node-name=a,backing.node-name=base,file={},format=qcow2,discard=unmap",
            path("a.qcow2")
        ));
        c.args(["-device", "virtio-blk-pci,drive=dr0,id=v0,share-rw=on"]);
        for name in ["o", "b"] {
            c.arg("-blockdev").arg(format!(
                "driver=qcow2,node-name={name},file.driver=file,file.filename={},discard=unmap",
                path(&format!("{name}.qcow2"))
            ));
        }
        if has_second {
            c.args(["-device", "virtio-blk-pci,drive=o,id=v1"]);
        }
        c.args(more);
        let log = std::fs::File::create(path("qemu.log")).unwrap();
        c.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let child = Process(tied(&mut c).spawn().expect("QEMU starts"));
        let end = Instant::now() + Duration::from_secs(60);
        while std::os::unix::net::UnixStream::connect(path("own.sock")).is_err() {
            assert!(Instant::now() < end, "QEMU does not come up");
            std::thread::sleep(Duration::from_millis(20));
        }
        child
    }

    /// Ends QEMU in order, so that bitmaps are stored.
    pub fn off(&mut self) {
        self.do_it("quit", json!({}));
        self.child.0.wait().unwrap();
    }

    /// Starts it again after [`Machine::off`].
    pub fn on(&mut self) {
        self.on_with(true);
    }

    /// As [`Machine::on`], with `v1` or without: the VM may have lost it.
    pub fn on_with(&mut self, second: bool) {
        let more: Vec<&str> = self.more.iter().map(String::as_str).collect();
        self.child = Self::boot(self.dir.path(), &more, second);
        self.qmp = Qmp::connect(&self.path("own.sock"));
    }

    /// Gives `v1` this size.
    pub fn resize(&mut self, size: usize) {
        self.do_it("block_resize", json!({"node-name": "o", "size": size}));
        self.expect[1].resize(size, 0);
    }

    /// The guest's first writes.
    pub fn fill(&mut self) {
        for disk in [0, 1] {
            self.write(disk, MIB, 4 * MIB);
            self.write(disk, 7 * MIB, MIB / 2);
        }
    }

    /// QEMU's process.
    pub fn pid(&self) -> u32 {
        self.child.0.id()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn folder(&self) -> &Path {
        self.dir.path()
    }

    pub fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    pub fn caller(&self) -> Caller {
        Caller {
            qmp: self.path("qmp.sock"),
            state: self.path("state"),
            target: self.path("T"),
            more: vec!["--progress".into(), "none".into()],
        }
    }

    pub fn do_it(&mut self, command: &str, arguments: Value) -> Value {
        self.qmp.execute(command, arguments)
    }

    /// A line for the human monitor; what it said.
    pub fn hmp(&mut self, line: &str) -> String {
        let said = self.do_it("human-monitor-command", json!({"command-line": line}));
        said.as_str().unwrap().to_string()
    }

    fn device(disk: usize) -> String {
        format!("/machine/peripheral/v{disk}/virtio-backend")
    }

    /// A write by the guest's device, with bytes that were not there before.
    pub fn write(&mut self, disk: usize, at: usize, len: usize) {
        self.byte = self.byte % 250 + 1;
        let device = Self::device(disk);
        let byte = self.byte;
        let said = self.hmp(&format!("qemu-io -d {device} \"write -P {byte} {at} {len}\""));
        assert!(!said.contains("rror") && !said.contains("failed"), "{said}");
        self.expect[disk][at..at + len].fill(byte);
    }

    /// Some writes to both disks, over what is there and beside it.
    pub fn scribble(&mut self) {
        for disk in [0, 1] {
            self.write(disk, 3 * MIB + 512, MIB);
            self.write(disk, 6 * MIB, MIB / 2);
        }
    }

    pub fn jobs(&mut self) -> Vec<Value> {
        self.do_it("query-jobs", json!({})).as_array().unwrap().clone()
    }

    /// Waits until `done` says so of the job of this name, which is null where there is none.
    pub fn wait_job(&mut self, id: &str, done: impl Fn(&Value) -> bool) {
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            let jobs = self.jobs();
            let job = jobs.iter().find(|j| j["id"] == id).unwrap_or(&Value::Null);
            if done(job) {
                return;
            }
            assert!(Instant::now() < end, "{id}: {job}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until a job of ours copies; gives false where the program ends before.
    pub fn wait_copying(&mut self, child: &mut Child) -> bool {
        let end = Instant::now() + Duration::from_secs(60);
        let copies = |j: &Value| {
            j["status"] == "running" && j["id"].as_str().unwrap().starts_with("fleecefs-")
        };
        while self.jobs().iter().filter(|j| copies(j)).count() < 2 {
            if child.try_wait().unwrap().is_some() {
                return false;
            }
            assert!(Instant::now() < end, "no job begins");
            std::thread::sleep(Duration::from_millis(10));
        }
        true
    }

    /// Lets jobs of ours copy as fast as they can.
    pub fn hurry(&mut self) {
        for j in self.jobs() {
            let id = j["id"].as_str().unwrap();
            if id.starts_with("fleecefs-") {
                // It may have ended.
                let _ =
                    self.qmp.try_execute("block-job-set-speed", json!({"device": id, "speed": 0}));
            }
        }
    }

    /// The node that a device is on, and its driver and file, as QEMU says.
    pub fn inserted(&mut self, disk: usize) -> Option<Value> {
        let drives = self.do_it("query-block", json!({}));
        let qdev = format!("/machine/peripheral/v{disk}/");
        let mine = |d: &&Value| {
            d["qdev"].as_str().is_some_and(|q| q.starts_with(&qdev) || q == format!("v{disk}"))
        };
        drives.as_array().unwrap().iter().find(mine).map(|d| d["inserted"].clone())
    }

    /// Ends QEMU in order and compares what it left with what the guest wrote. `v0` is in `files[0]`
    /// or where QEMU says.
    pub fn end(mut self, unplugged: Option<&str>) {
        let mut files = Vec::new();
        for disk in [0, 1] {
            files.push(match (self.inserted(disk), unplugged) {
                (Some(i), _) => (
                    i["file"].as_str().unwrap().to_string(),
                    i["drv"].as_str().unwrap().to_string(),
                ),
                (None, Some(name)) => (self.text(name), "qcow2".to_string()),
                (None, None) => panic!("v{disk} is gone"),
            });
        }
        self.off();
        for (disk, (file, format)) in files.into_iter().enumerate() {
            let got = bytes(Path::new(&file), &format);
            if let Some(d) = first_difference(&got, &self.expect[disk]) {
                panic!("v{disk} does not hold what the guest wrote: {d}");
            }
            run("qemu-img", &["check", "-q", "-f", &format, &file]);
        }
    }
}

/// The bytes of an image, with its backing files.
pub fn bytes(image: &Path, format: &str) -> Vec<u8> {
    let out = tempfile::NamedTempFile::new().unwrap();
    let (from, to) = (image.to_str().unwrap(), out.path().to_str().unwrap());
    run("qemu-img", &["convert", "-U", "-f", format, "-O", "raw", from, to]);
    std::fs::read(out.path()).unwrap()
}

impl Drop for Machine {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.path("qemu.log")).unwrap_or_default();
            let log: Vec<_> = log.lines().filter(|l| !l.contains("ops")).collect();
            eprintln!("QEMU's log: {}", log.join("\n"));
        }
    }
}

/// Ended on drop.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
