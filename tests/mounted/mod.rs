//! A mount that goes away with its guard, whatever happens to the test.

#![allow(dead_code)]

pub mod process;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A mounted backup directory.
pub struct Mount {
    dir: tempfile::TempDir,
}

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
        let out = mount(dir.path()).unwrap();
        assert!(out.status.success(), "mount: {}", String::from_utf8_lossy(&out.stderr));
        Mount { dir }
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
        let umount = |program: &str, args: &[&str]| {
            let status = Command::new(program).args(args).arg(self.path()).status();
            status.is_ok_and(|s| s.success())
        };
        if !umount(env!("CARGO_BIN_EXE_fleecefs"), &["umount"]) {
            umount("umount", &["-l"]);
        }
    }
}
