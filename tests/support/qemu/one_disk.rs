//! A QEMU without an operating system, and its disk.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::backup::Caller;
use crate::support::guest::Qmp;
use crate::support::tools::run;

/// A QEMU with one disk, `vda`; ended on drop.
pub struct Vm {
    child: Child,
    pub caller: Caller,
}

impl Vm {
    pub fn start(dir: &Path, file: &Path, more: &[&str]) -> Vm {
        Self::on(dir, file, ("n", "vda"), more)
    }

    /// With other names of node and device.
    pub fn on(dir: &Path, file: &Path, (node, device): (&str, &str), more: &[&str]) -> Vm {
        let file = file.display();
        let disk = format!("qcow2,node-name={node},file.driver=file,file.filename={file}");
        let device = format!("virtio-blk-pci,drive={node},id={device}");
        Self::with(dir, &[&["-blockdev", &disk, "-device", &device], more].concat())
    }

    /// With these disks and devices; files may be named as seen from `dir`.
    pub fn with(dir: &Path, args: &[&str]) -> Vm {
        let qmp = dir.join("qmp");
        let _ = std::fs::remove_file(&qmp);
        let mut c = Command::new("qemu-system-x86_64");
        c.args(["-accel", "tcg", "-m", "32", "-nodefaults", "-no-user-config", "-display", "none"]);
        c.arg("-qmp").arg(format!("unix:{},server=on,wait=off", qmp.display()));
        let child = c.args(args).current_dir(dir).stdin(Stdio::null()).spawn().unwrap();
        let caller = Caller {
            qmp: qmp.clone(),
            state: dir.join("state"),
            target: dir.join("T"),
            more: vec!["--progress".into(), "none".into()],
        };
        let vm = Vm { child, caller };
        let end = Instant::now() + Duration::from_secs(60);
        while std::os::unix::net::UnixStream::connect(&qmp).is_err() {
            assert!(Instant::now() < end, "QEMU does not come up");
            std::thread::sleep(Duration::from_millis(20));
        }
        vm
    }

    /// Ends QEMU in order, so that bitmaps are stored.
    pub fn quit(mut self) {
        Qmp::connect(&self.caller.qmp).execute("quit", json!({}));
        self.child.wait().unwrap();
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn image(path: &Path) -> PathBuf {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    run("qemu-img", &["create", "-q", "-f", "qcow2", path.to_str().unwrap(), "4M"]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 5 0 1M", path.to_str().unwrap()]);
    path.to_path_buf()
}
