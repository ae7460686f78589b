//! A VM that is gone, and its return by `live-restore`: what is started, written to, killed, and compared at the end.
//! Without an operating system: the test writes as the guest's devices would.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::{Value, json};

use crate::support::backup::images;
use crate::support::guard::Guard;
use crate::support::guest::Qmp;
use crate::support::images::first_difference;
use crate::support::process::{eventually, is_gone, signal};
use crate::support::qemu::two_disks::{Machine, TOOLS, bytes};
use crate::support::tools::{have, run};

pub const MIB: usize = 1 << 20;
pub const UUID: &str = "9a8b0c00-1111-2222-3333-444455556666";
/// The disks' files, which have a FULL and an INC each.
pub const FILES: [&str; 2] = ["a.qcow2", "o.qcow2"];

/// Ends the QEMUs that have the folder in their arguments.
pub const END: &str = r#"for p in /proc/[0-9]*; do
    case $(cat "$p/comm" 2>/dev/null) in qemu*) ;; *) continue ;; esac
    tr '\0' '\n' < "$p/cmdline" 2>/dev/null | grep -qF "$1/" && kill -9 "${p#/proc/}"
done"#;

/// A VM that is gone, and its backup.
pub struct Lost {
    _end: Guard,
    pub m: Machine,
    pub before: Vec<(PathBuf, Vec<u8>)>,
}

impl Lost {
    pub fn new(test: &str) -> Option<Lost> {
        Self::with(test, &[])
    }

    /// With more options for its QEMU.
    pub fn with(test: &str, more: &[&str]) -> Option<Lost> {
        if !have(test, TOOLS) {
            return None;
        }
        let mut m = Machine::launch(&[&["-uuid", UUID, "-name", "vm1"], more].concat());
        m.fill();
        let caller = m.caller();
        caller.must("full");
        m.scribble();
        caller.must("inc");
        m.off();
        // Whatever was started in its folder, also if that was to be refused.
        let target = m.path("T");
        let end = Guard::of(END, &[target.parent().unwrap()]);
        let mut lost = Lost { _end: end, m, before: Vec::new() };
        lost.before = lost.files();
        Some(lost)
    }

    pub fn target(&self) -> PathBuf {
        self.m.path("T")
    }

    /// The images of the backup.
    pub fn files(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let all = FILES.iter().flat_map(|f| images(&self.target().join(f)));
        all.map(|p| (p.clone(), std::fs::read(p).unwrap())).collect()
    }

    pub fn home(&self, name: &str) -> Home<'_> {
        let path = self.m.path(name);
        let end = Guard::of(END, &[&path]);
        Home { lost: self, path, expect: self.m.expect.clone(), byte: 100, _end: end }
    }
}

/// Where its disks go.
pub struct Home<'a> {
    pub lost: &'a Lost,
    pub path: PathBuf,
    pub expect: [Vec<u8>; 2],
    pub byte: u8,
    _end: Guard,
}

impl Home<'_> {
    pub fn state(&self) -> PathBuf {
        self.path.with_extension("state")
    }

    pub fn command(&self, more: &[&str]) -> Command {
        let mut c = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
        c.arg("live-restore").arg(self.lost.target()).arg("--to").arg(&self.path);
        c.arg("--state-dir").arg(self.state()).args(["--accel", "tcg", "--progress", "plain"]);
        c.args(more).stdin(Stdio::null());
        c
    }

    pub fn run(&self, more: &[&str]) -> Output {
        self.command(more).output().unwrap()
    }

    /// The socket for backups of the VM.
    pub fn socket(&self) -> Option<PathBuf> {
        let own = std::fs::read_dir(self.state().join("live")).ok()?.next()?.unwrap().path();
        Some(own.join("backup.sock"))
    }

    /// A monitor of the test's own, if QEMU lives.
    pub fn monitor(&self) -> Option<Qmp> {
        let mut qmp = None;
        eventually("QEMU takes a connection", || {
            qmp = self.socket().and_then(|s| Qmp::try_connect(&s));
            qmp.is_some() || self.pids().is_empty()
        });
        qmp
    }

    /// Whether the QEMU that is there is one whose guest runs: one that never ran may be ended.
    pub fn is_started(&self) -> bool {
        let journal = std::fs::read_to_string(self.path.join(".fleecefs-live/journal"));
        journal.is_ok_and(|j| j.contains("\"started\"") || j.contains("\"done\""))
    }

    /// The QEMUs.
    pub fn pids(&self) -> Vec<i32> {
        let is_one = |dir: &Path| {
            let read = |name: &str| std::fs::read(dir.join(name)).unwrap_or_default();
            let text = String::from_utf8_lossy(&read("cmdline")).into_owned();
            read("comm").starts_with(b"qemu") && text.contains(&format!("{}/", self.path.display()))
        };
        let all = std::fs::read_dir("/proc").unwrap().flatten();
        let pid = |dir: PathBuf| dir.file_name()?.to_str()?.parse::<i32>().ok();
        let found = all.filter(|e| is_one(&e.path())).filter_map(|e| pid(e.path()));
        found.filter(|p| !is_gone(*p)).collect()
    }

    /// The guest's next numbered write and its flush, over what the backup has and beside it. Whether it ran.
    pub fn write(&mut self, qmp: &mut Qmp) -> bool {
        if qmp.execute("query-status", json!({}))["status"] != "running" {
            return false;
        }
        self.byte += 1;
        let at = (usize::from(self.byte) * 7 * 65_536 + 512) % (7 * MIB);
        for disk in [0, 1] {
            let device = format!("/machine/peripheral/drive{disk}/virtio-backend");
            for what in [format!("write -P {} {at} 70000", self.byte), "flush".into()] {
                let line = json!({"command-line": format!("qemu-io -d {device} \"{what}\"")});
                let said = qmp.execute("human-monitor-command", line);
                let said = said.as_str().unwrap();
                assert!(!said.contains("rror") && !said.contains("ailed"), "{said}");
            }
            self.expect[disk][at..at + 70_000].fill(self.byte);
        }
        true
    }

    /// Kills QEMU as a crash would.
    pub fn kill_qemu(&self) {
        let pids = self.pids();
        assert!(pids.len() <= 1, "{pids:?}");
        for pid in pids {
            signal(pid, libc::SIGKILL);
            eventually("QEMU is gone", || is_gone(pid));
        }
    }

    /// All is at home, and as it has to be; ends QEMU.
    pub fn check(&mut self, what: &str) {
        let mut qmp = self.monitor().unwrap_or_else(|| panic!("{what}: no QEMU"));
        assert!(self.write(&mut qmp), "{what}: the guest does not run");
        let target = self.lost.target().display().to_string();
        let nodes = qmp.execute("query-named-block-nodes", json!({})).to_string();
        assert!(!nodes.contains(&target), "{what}: QEMU has the backup open: {nodes}");
        for pid in self.pids() {
            let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
            let open: Vec<_> = fds.filter_map(|f| std::fs::read_link(f.path()).ok()).collect();
            assert!(!open.iter().any(|p| p.starts_with(&target)), "{what}: {open:?}");
        }
        qmp.execute("quit", json!({}));
        eventually("QEMU ends", || self.pids().is_empty());
        self.compare(what);
    }

    /// The images have what the guest wrote over what the point had, and refer to nothing.
    pub fn compare(&self, what: &str) {
        for (file, expect) in FILES.iter().zip(&self.expect) {
            let image = self.path.join(file);
            let info = run("qemu-img", &["info", "--output=json", image.to_str().unwrap()]);
            let info: Value = serde_json::from_slice(&info.stdout).unwrap();
            assert_eq!(info["backing-filename"], Value::Null, "{what}: {file}");
            if let Some(d) = first_difference(&bytes(&image, "qcow2"), expect) {
                panic!("{what}: {file}: {d}");
            }
            // A QEMU that was killed may leave clusters that nobody uses, which does no harm.
            let mut check = Command::new("qemu-img");
            let check = check.args(["check", "-q", "-f", "qcow2"]).arg(&image).status().unwrap();
            assert!([Some(0), Some(3)].contains(&check.code()), "{what}: {file}: {check}");
        }
        assert!(self.lost.files() == self.lost.before, "{what}: the backup was changed");
    }
}

/// Writes a few times while the child works, and waits for its end.
pub fn write_while(home: &mut Home<'_>, mut child: Child, what: &str) {
    let (mut wrote, mut monitor) = (0, None);
    loop {
        let ended = child.try_wait().unwrap();
        monitor = monitor.or_else(|| home.is_started().then(|| home.monitor())?);
        if wrote < 5
            && let Some(qmp) = &mut monitor
        {
            wrote += usize::from(home.write(qmp));
        }
        if let Some(status) = ended {
            assert!(status.success(), "{what}: {status}");
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}
