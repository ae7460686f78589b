//! A mount that goes away with its guard, whatever happens to the test.

#![allow(dead_code)]

pub mod process;

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

/// A mounted backup directory.
pub struct Mount {
    dir: tempfile::TempDir,
    /// Unmounts once its input ends: also when the test is killed and drops nothing.
    unmounter: Child,
}

/// `$1` is the program, `$2` the mount point.
const UNMOUNT: &str = r#"cat; "$1" umount "$2" || umount -l "$2"; rmdir "$2""#;

impl Mount {
    /// Mounts `backups` and waits until it is ready (the command returns then).
    pub fn new(backups: &Path) -> Self {
        Self::with(backups, &[])
    }

    /// The same with more options.
    pub fn with(backups: &Path, options: &[&str]) -> Self {
        Self::by(|at| {
            Command::new(env!("CARGO_BIN_EXE_fleecefs"))
                .arg("mount")
                .args(options)
                .arg(backups)
                .arg(at)
                .output()
        })
    }

    /// Mounts by another command, which is given the mount point.
    pub fn by(mount: impl FnOnce(&Path) -> std::io::Result<Output>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let unmounter = Command::new("sh")
            .args(["-c", UNMOUNT, "sh", env!("CARGO_BIN_EXE_fleecefs")])
            .arg(dir.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // A signal to the test's process group is not for it.
            .process_group(0)
            .spawn()
            .unwrap();
        // Its guard is there before the mount is.
        let guarded = Mount { dir, unmounter };
        let out = mount(guarded.path()).unwrap();
        assert!(out.status.success(), "mount: {}", String::from_utf8_lossy(&out.stderr));
        guarded
    }

    /// The mount point.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Where the point made from `file` of disk `disk` is shown.
    pub fn point(&self, disk: &str, file: &Path) -> PathBuf {
        let mut name = file.file_name().unwrap().to_os_string();
        name.push(".raw");
        self.path().join(disk).join(name)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        drop(self.unmounter.stdin.take());
        let _ = self.unmounter.wait();
    }
}
