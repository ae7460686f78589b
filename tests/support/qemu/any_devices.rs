//! A real QEMU whose guest has no operating system: it stands before its first instruction, and the
//! test writes by way of its devices. Ended on drop.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::backup::Caller;
use crate::support::guard::tied;
use crate::support::guest::Qmp;

/// What it needs.
pub const TOOLS: &[&str] = &["qemu-system-x86_64", "qemu-img", "/dev/fuse"];

/// The machine. Everything of it is in a folder of its own.
pub struct Bare {
    dir: PathBuf,
    child: Child,
}

impl Bare {
    /// Starts it in `dir` with these options beside those for its sockets.
    pub fn start(dir: &Path, args: &[impl AsRef<OsStr>]) -> Self {
        let mut c = Command::new("qemu-system-x86_64");
        c.args(["-accel", "tcg", "-m", "64", "-nodefaults", "-no-user-config", "-S"]);
        c.args(["-display", "none"]);
        for name in ["qmp.sock", "qmp2.sock"] {
            let path = dir.join(name);
            let _ = std::fs::remove_file(&path);
            c.arg("-qmp").arg(format!("unix:{},server=on,wait=off", path.display()));
        }
        c.args(args).stdin(Stdio::null()).stdout(Stdio::null());
        let child = tied(&mut c).spawn().expect("QEMU starts");
        let mut bare = Bare { dir: dir.to_path_buf(), child };
        let end = Instant::now() + Duration::from_secs(60);
        while std::os::unix::net::UnixStream::connect(bare.dir.join("qmp2.sock")).is_err() {
            assert!(bare.child.try_wait().unwrap().is_none(), "QEMU has ended");
            assert!(Instant::now() < end, "QEMU does not come up");
            std::thread::sleep(Duration::from_millis(20));
        }
        bare
    }

    /// How to back it up to `target` in its folder.
    pub fn caller(&self, target: &str) -> Caller {
        Caller {
            qmp: self.dir.join("qmp.sock"),
            state: self.dir.join("state"),
            target: self.dir.join(target),
            more: vec!["--progress".into(), "none".into()],
        }
    }

    /// A QMP client of the test's own.
    pub fn qmp(&self) -> Qmp {
        Qmp::connect(&self.dir.join("qmp2.sock"))
    }

    /// Waits for its end, which was asked for.
    pub fn ended(mut self) {
        self.child.wait().unwrap();
    }

    /// Writes as the guest would, by way of the device at this QOM path.
    pub fn io(&self, device: &str, op: &str) {
        let line = format!("qemu-io -d {device} \"{op}\"");
        let said = self.qmp().execute("human-monitor-command", json!({"command-line": line}));
        let said = said.as_str().unwrap();
        assert!(said.is_empty() || said.contains("wrote"), "{op}: {said}");
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The options of a node `name` over an image.
pub fn node(name: &str, format: &str, file: &Path) -> [std::ffi::OsString; 2] {
    let mut option = std::ffi::OsString::from(format!(
        "driver={format},node-name={name},discard=unmap,file.driver=file,file.discard=unmap,file.filename="
    ));
    // A comma ends an option unless there are two.
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    let mut doubled = Vec::new();
    for b in file.as_os_str().as_bytes() {
        doubled.extend(std::iter::repeat_n(*b, if *b == b',' { 2 } else { 1 }));
    }
    option.push(std::ffi::OsString::from_vec(doubled));
    ["-blockdev".into(), option]
}
