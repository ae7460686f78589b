//! A guest without a guest: qemu-storage-daemon, whose disks the test writes to.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::support::guard;
use crate::support::guest;
use crate::support::images::Rng;
use crate::support::tools::run;

/// A qemu-storage-daemon with qcow2 or raw disks, each below a raw node that is exported by NBD:
/// a guest without a guest. Ended on drop.
pub struct Daemon {
    pub dir: tempfile::TempDir,
    child: Child,
    disks: Vec<(String, String)>,
}

impl Daemon {
    /// Starts it over `disks`: node name, and the `--blockdev` options of the format node but its
    /// file and name. The image of disk `a` is `a.img` in `dir`.
    pub fn start(dir: tempfile::TempDir, disks: &[(&str, &str)]) -> Self {
        let child = Self::spawn(dir.path(), disks);
        let disks = disks.iter().map(|(a, b)| (a.to_string(), b.to_string())).collect();
        let d = Daemon { dir, child, disks };
        d.wait_ready();
        d
    }

    fn spawn(dir: &Path, disks: &[(&str, &str)]) -> Child {
        for s in ["qmp.sock", "qmp2.sock", "nbd.sock"] {
            let _ = std::fs::remove_file(dir.join(s));
        }
        let mut c = Command::new("qemu-storage-daemon");
        for (id, name) in [("c1", "qmp.sock"), ("c2", "qmp2.sock")] {
            let path = dir.join(name);
            c.arg("--chardev");
            c.arg(format!("socket,id={id},path={},server=on,wait=off", path.display()));
            c.arg("--monitor").arg(format!("chardev={id}"));
        }
        c.arg("--nbd-server").arg(format!("addr.type=unix,addr.path={}/nbd.sock", dir.display()));
        for (name, format) in disks {
            let file = dir.join(format!("{name}.img"));
            c.arg("--blockdev").arg(format!(
                "driver=file,node-name={name}-file,filename={},discard=unmap",
                file.display()
            ));
            let child = if format.contains("blkdebug") { "file.image" } else { "file" };
            c.arg("--blockdev")
                .arg(format!("{format},node-name={name},{child}={name}-file,discard=unmap"));
            c.arg("--blockdev")
                .arg(format!("driver=raw,node-name={name}-top,file={name},discard=unmap"));
            c.arg("--export").arg(format!(
                "type=nbd,id={name}-export,node-name={name}-top,name={name},writable=on"
            ));
        }
        guard::tied(c.stdin(Stdio::null())).spawn().expect("qemu-storage-daemon starts")
    }

    fn wait_ready(&self) {
        let end = Instant::now() + Duration::from_secs(20);
        while std::os::unix::net::UnixStream::connect(self.path("nbd.sock")).is_err() {
            assert!(Instant::now() < end, "qemu-storage-daemon does not come up");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Its process.
    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Kills it as a power cut would, and starts it again over the same images.
    pub fn restart_after_kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.respawn();
    }

    /// Ends it in order and starts it again.
    pub fn restart(&mut self) {
        self.stop();
        self.respawn();
    }

    /// Ends it in order.
    pub fn stop(&mut self) {
        // SAFETY: a signal to our own child.
        unsafe { libc::kill(self.child.id() as i32, libc::SIGTERM) };
        let _ = self.child.wait();
    }

    /// Starts it again with another format for `disk`.
    pub fn heal(&mut self, disk: &str, format: &str) {
        self.stop();
        for d in self.disks.iter_mut().filter(|d| d.0 == disk) {
            d.1 = format.to_string();
        }
        self.respawn();
    }

    pub fn respawn(&mut self) {
        let list: Vec<(&str, &str)> =
            self.disks.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
        self.child = Self::spawn(self.dir.path(), &list);
        self.wait_ready();
    }

    /// Where the guest's side of a disk is.
    pub fn uri(&self, disk: &str) -> String {
        format!("nbd+unix:///{disk}?socket={}/nbd.sock", self.dir.path().display())
    }

    /// Writes as a guest would.
    pub fn io(&self, disk: &str, ops: &[&str]) {
        let uri = self.uri(disk);
        let mut args = vec!["-d", "unmap", "-f", "raw"];
        for op in ops {
            args.extend(["-c", op]);
        }
        args.push(&uri);
        let out = run("qemu-io", &args);
        let text = String::from_utf8_lossy(&out.stdout);
        assert!(!text.contains("failed"), "{ops:?}: {text}");
    }

    /// A QMP client of the test's own.
    pub fn qmp(&self) -> guest::Qmp {
        guest::Qmp::connect(&self.path("qmp2.sock"))
    }

    /// Writes, zeroes and discards all the time until the guard is dropped.
    pub fn churn(&self, disk: &str, size: u64, seed: u64) -> Churn {
        let end = Arc::new(AtomicBool::new(false));
        let (flag, uri) = (end.clone(), self.uri(disk));
        let thread = std::thread::spawn(move || {
            let mut rng = Rng(seed);
            while !flag.load(Ordering::SeqCst) {
                let mut args = vec!["-d".to_string(), "unmap".into(), "-f".into(), "raw".into()];
                for _ in 0..30 {
                    let (start, len) = rng.range(size, 4096);
                    let len = len.min(1 << 20);
                    let op = match rng.below(5) {
                        0 => format!("write -z {start} {len}"),
                        1 => format!("discard {start} {len}"),
                        _ => format!("write -P {} {start} {len}", 1 + rng.below(255)),
                    };
                    args.extend(["-c".into(), op]);
                }
                args.push(uri.clone());
                let args: Vec<&str> = args.iter().map(String::as_str).collect();
                run("qemu-io", &args);
            }
        });
        Churn { end, thread: Some(thread) }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A writer; dropping it ends it.
pub struct Churn {
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Churn {
    fn drop(&mut self) {
        self.end.store(true, Ordering::SeqCst);
        let ended = self.thread.take().map(JoinHandle::join);
        if !std::thread::panicking() {
            ended.unwrap().expect("the writer works");
        }
    }
}
