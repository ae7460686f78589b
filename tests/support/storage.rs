//! Block devices and file systems that tests make: gone with their guards. They need root.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::guard::{Guard, tied};
use crate::support::tools::run;

/// A file as a block device.
pub struct Loop(Guard);

impl Loop {
    /// Attaches `file`.
    pub fn new(file: &Path) -> Self {
        Loop(Guard::attach("", file))
    }

    /// The device.
    pub fn path(&self) -> &Path {
        self.0.made()
    }
}

/// A mounted file system on which no file is larger than 16 GiB, as ext4 ends them at 16 TiB.
pub struct SmallFiles {
    _mount: Guard,
    dir: tempfile::TempDir,
}

impl SmallFiles {
    /// What it needs beside root.
    pub const TOOLS: &[&str] = &["mkfs.ext4", "mount", "/dev/loop-control"];

    /// Makes it with 256 MiB.
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (file, mnt) = (dir.path().join("fs"), dir.path().join("mnt"));
        std::fs::create_dir(&mnt).unwrap();
        std::fs::File::create(&file).unwrap().set_len(256 << 20).unwrap();
        let features = ["-q", "-b", "1024", "-O", "^64bit,^extent,^has_journal"];
        run("mkfs.ext4", &[&features[..], &[file.to_str().unwrap()]].concat());
        SmallFiles { _mount: Guard::mount("-o loop", &file, &mnt), dir }
    }

    /// Where it is mounted.
    pub fn path(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }
}

/// A mounted ext4 whose disk writes no more than so many bytes a second, and whose writes all wait
/// for that disk: QEMU throttles an image and exports it as a file, a loop device is on that.
pub struct Slow {
    // In the order in which they go.
    mount: Option<Guard>,
    disk: Child,
    /// A killed export leaves its mount behind.
    _export: Guard,
    dir: tempfile::TempDir,
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
        let export_guard = Guard::of(r#"umount -q -l "$1""#, &[&export]);
        let mut disk = Command::new("qemu-storage-daemon");
        disk.args(["--object", &format!("throttle-group,id=g,x-bps-write={bytes_per_second}")])
            .args(["--blockdev", &format!("file,node-name=f,filename={}", file.display())])
            .args(["--blockdev", "throttle,node-name=t,throttle-group=g,file=f"])
            .args([
                "--export",
                &format!("fuse,id=e,node-name=t,mountpoint={},writable=on", export.display()),
            ])
            .stdin(Stdio::null());
        let disk = tied(&mut disk).spawn().expect("qemu-storage-daemon starts");
        let mut slow = Slow { mount: None, disk, _export: export_guard, dir };
        let end = Instant::now() + Duration::from_secs(20);
        while std::fs::metadata(&export).map_or(0, |m| m.len()) == 0 {
            assert!(Instant::now() < end, "the throttled disk does not come up");
            std::thread::sleep(Duration::from_millis(20));
        }
        slow.mount = Some(Guard::mount("-o loop,sync", &export, &slow.mnt()));
        slow
    }

    /// Where it is mounted.
    pub fn mnt(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        drop(self.mount.take());
        let _ = self.disk.kill();
        let _ = self.disk.wait();
    }
}
