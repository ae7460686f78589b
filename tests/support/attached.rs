//! `fleecefs attach` and `detach` with a state folder and a folder to mount in of their own: whatever happens to the
//! test, devices and mounts are gone with them.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use super::guard::Guard;

/// What is needed beside root and what makes points.
pub const TOOLS: [&str; 3] = ["/dev/fuse", "/dev/loop-control", "losetup"];

/// `$1` is the program, `$2` the state folder, `$3` where it is mounted. What `detach` does not do is done by hand.
const UNDO: &str = r#"
    "$1" detach --all --state-dir "$2" && exit
    for d in $(cut -d' ' -f2 /proc/mounts | grep "^$3/" | tac); do umount -l "$d"; done
    losetup -n -O NAME,BACK-FILE | grep " $2/" | while read -r name rest; do losetup -d "$name"; done
    for d in $(cut -d' ' -f2 /proc/mounts | grep "^$2/" | tac); do umount -l "$d"; done
"#;

/// The folders.
pub struct Attach {
    // Before the folders go.
    _undo: Guard,
    pub state: tempfile::TempDir,
    pub view: tempfile::TempDir,
}

impl Attach {
    pub fn new() -> Self {
        let (state, view) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let program = Path::new(env!("CARGO_BIN_EXE_fleecefs"));
        let undo = Guard::of(UNDO, &[program, state.path(), view.path()]);
        Attach { _undo: undo, state, view }
    }

    /// `fleecefs VERB ... --state-dir STATE`.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
        command.args(args).arg("--state-dir").arg(self.state.path());
        command
    }

    /// `fleecefs attach DIR POINT --mount VIEW ...`.
    pub fn attach_command(&self, backups: &Path, point: &str, more: &[&str]) -> Command {
        let mut command = self.command(&["attach"]);
        command.arg("--mount").arg(self.view.path()).args(more).arg(backups).arg(point);
        command
    }

    /// The same, which has to succeed; gives what it printed.
    pub fn attach(&self, backups: &Path, point: &str, more: &[&str]) -> String {
        let out = self.attach_command(backups, point, more).output().unwrap();
        succeeded(&out)
    }

    /// `fleecefs detach ...`, which has to succeed and leave nothing.
    pub fn detach(&self, what: &str) {
        succeeded(&self.command(&["detach", what]).output().unwrap());
        assert_eq!(self.left(), Vec::<String>::new());
    }

    /// The private folder of the one attachment.
    pub fn private(&self) -> PathBuf {
        let names = std::fs::read_dir(self.state.path()).unwrap();
        names.map(|e| e.unwrap().path()).find(|p| p.is_dir()).unwrap()
    }

    /// Where `name` is mounted.
    pub fn at(&self, name: &str) -> PathBuf {
        self.view.path().join(name)
    }

    /// All that is left of ours: mounts, loop devices, files.
    pub fn left(&self) -> Vec<String> {
        let own = [self.state.path(), self.view.path()].map(|p| p.to_str().unwrap().to_string());
        // Others may have mounts at paths that are no text.
        let mounts = std::fs::read("/proc/self/mountinfo").unwrap();
        let mounts = String::from_utf8_lossy(&mounts).into_owned();
        let loops = Command::new("losetup").args(["-n", "-O", "NAME,BACK-FILE"]).output().unwrap();
        let loops = String::from_utf8_lossy(&loops.stdout).into_owned();
        let is_own = |line: &&str| own.iter().any(|o| line.contains(o.as_str()));
        let mut left: Vec<String> =
            mounts.lines().chain(loops.lines()).filter(is_own).map(str::to_string).collect();
        for dir in [self.state.path(), self.view.path()] {
            let names = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
            left.extend(names.map(|p| format!("{p:?}")));
        }
        left
    }
}

/// What a command printed that has to succeed.
pub fn succeeded(out: &Output) -> String {
    assert!(out.status.success(), "{}: {}", out.status, String::from_utf8_lossy(&out.stderr));
    String::from_utf8_lossy(&out.stdout).into_owned()
}
