//! Block devices and file systems that tests make: gone with their guards. They need root.

#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::qemu::run;

/// A file as a block device.
pub struct Loop(PathBuf);

impl Loop {
    /// Attaches `file`.
    pub fn new(file: &Path) -> Self {
        let out = run("losetup", &["--find", "--show", file.to_str().unwrap()]);
        Loop(PathBuf::from(String::from_utf8(out.stdout).unwrap().trim()))
    }

    /// The device.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.0).status();
    }
}

/// A mounted file system on which no file is larger than 16 GiB, as ext4 ends them at 16 TiB.
pub struct SmallFiles(tempfile::TempDir);

impl SmallFiles {
    /// What it needs beside root.
    pub const TOOLS: &[&str] = &["mkfs.ext4", "mount", "/dev/loop-control"];

    /// Makes it with 256 MiB.
    pub fn new() -> Self {
        let small = SmallFiles(tempfile::tempdir().unwrap());
        let file = small.0.path().join("fs");
        std::fs::create_dir(small.path()).unwrap();
        std::fs::File::create(&file).unwrap().set_len(256 << 20).unwrap();
        let file = file.to_str().unwrap();
        run("mkfs.ext4", &["-q", "-b", "1024", "-O", "^64bit,^extent,^has_journal", file]);
        run("mount", &["-o", "loop", file, small.path().to_str().unwrap()]);
        small
    }

    /// Where it is mounted.
    pub fn path(&self) -> PathBuf {
        self.0.path().join("mnt")
    }
}

impl Drop for SmallFiles {
    fn drop(&mut self) {
        let _ = Command::new("umount").args(["-q", "-l"]).arg(self.path()).status();
    }
}

/// A mounted ext4 whose disk writes no more than so many bytes a second, and whose writes all wait
/// for that disk: QEMU throttles an image and exports it as a file, a loop device is on that.
pub struct Slow {
    dir: tempfile::TempDir,
    disk: Child,
}

impl Slow {
    /// What it needs beside root.
    pub const TOOLS: &[&str] =
        &["qemu-storage-daemon", "mkfs.ext4", "mount", "/dev/fuse", "/dev/loop-control"];

    /// Makes it with 256 MiB.
    pub fn new(bytes_per_second: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (file, export) = (dir.path().join("fs"), dir.path().join("export"));
        std::fs::create_dir(dir.path().join("mnt")).unwrap();
        std::fs::File::create(&file).unwrap().set_len(256 << 20).unwrap();
        std::fs::File::create(&export).unwrap();
        // Nothing but the data and what it costs is written: no journal, no late initialisation.
        let features = ["-q", "-b", "4096", "-O", "^has_journal"];
        let more = ["-E", "nodiscard,lazy_itable_init=0", file.to_str().unwrap()];
        run("mkfs.ext4", &[&features[..], &more].concat());
        let disk = Command::new("qemu-storage-daemon")
            .args(["--object", &format!("throttle-group,id=g,x-bps-write={bytes_per_second}")])
            .args(["--blockdev", &format!("file,node-name=f,filename={}", file.display())])
            .args(["--blockdev", "throttle,node-name=t,throttle-group=g,file=f"])
            .args([
                "--export",
                &format!("fuse,id=e,node-name=t,mountpoint={},writable=on", export.display()),
            ])
            .stdin(Stdio::null())
            .spawn()
            .expect("qemu-storage-daemon starts");
        let slow = Slow { dir, disk };
        let end = Instant::now() + Duration::from_secs(20);
        while std::fs::metadata(&export).map_or(0, |m| m.len()) == 0 {
            assert!(Instant::now() < end, "the throttled disk does not come up");
            std::thread::sleep(Duration::from_millis(20));
        }
        run("mount", &["-o", "loop,sync", export.to_str().unwrap(), slow.mnt().to_str().unwrap()]);
        slow
    }

    /// Where it is mounted.
    pub fn mnt(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        let umount = |options: &[&str]| {
            Command::new("umount").args(options).arg(self.mnt()).status().is_ok_and(|s| s.success())
        };
        if !umount(&[]) {
            umount(&["-l"]);
        }
        let _ = self.disk.kill();
        let _ = self.disk.wait();
        // A killed export leaves its mount behind.
        let _ =
            Command::new("umount").args(["-q", "-l"]).arg(self.dir.path().join("export")).status();
    }
}
