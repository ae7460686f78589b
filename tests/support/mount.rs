//! A mount that goes away with its guard, whatever happens to the test.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::support::guard::Guard;
use crate::support::process::{server_pid, stderr};

/// A mounted backup directory.
pub struct Mount {
    // Before the folder goes.
    _unmounter: Guard,
    dir: tempfile::TempDir,
}

/// `$1` is the program, `$2` the mount point.
const UNMOUNT: &str = r#""$1" umount "$2" || umount -l "$2"; rmdir "$2""#;

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
        let program = Path::new(env!("CARGO_BIN_EXE_fleecefs"));
        let unmounter = Guard::of(UNMOUNT, &[program, dir.path()]);
        // Its guard is there before the mount is.
        let guarded = Mount { _unmounter: unmounter, dir };
        let out = mount(guarded.path()).unwrap();
        assert!(out.status.success(), "mount: {}", String::from_utf8_lossy(&out.stderr));
        guarded
    }

    /// A mount with so few descriptors and these options, and what mounting said.
    pub fn limited(backups: &Path, limit: u32, options: &str) -> (Self, String) {
        let mut said = String::new();
        let mount = Self::by(|at| {
            let script = format!("ulimit -n {limit}; exec \"$0\" mount {options} \"$1\" \"$2\"");
            let program = env!("CARGO_BIN_EXE_fleecefs");
            let mut command = Command::new("sh");
            let out = command.args(["-c", &script, program]).arg(backups).arg(at).output()?;
            said = stderr(&out);
            Ok(out)
        });
        (mount, said)
    }

    /// Descriptors of the serving process on files of backups.
    pub fn open_files(&self, backups: &Path) -> usize {
        let folder = format!("/proc/{}/fd", server_pid(self.path()));
        let names = std::fs::read_dir(folder).unwrap().flatten();
        let leads = names.filter_map(|n| std::fs::read_link(n.path()).ok());
        leads.filter(|to| to.starts_with(backups)).count()
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
