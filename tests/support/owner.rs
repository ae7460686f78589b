//! A backup directory that somebody else owns, and what is none of his business beside it.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::support::images::Chain;
use crate::support::tools::run;
use crate::support::verbs::s;

/// Nothing here takes longer, unless it hangs.
const PATIENCE: Duration = Duration::from_secs(60);

/// A backup directory with one disk of a FULL and two INCs, and a folder that is none of its owner's
/// business.
pub struct Setup {
    _dir: tempfile::TempDir,
    pub root: PathBuf,
    pub disk: PathBuf,
    pub side: PathBuf,
    pub images: Vec<PathBuf>,
    pub outside: PathBuf,
    pub victim: PathBuf,
}

pub const PRECIOUS: &[u8] = b"precious";

impl Setup {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().canonicalize().unwrap();
        let (root, outside) = (base.join("backups"), base.join("outside"));
        let mut chain = Chain::new(&root, "sda");
        for i in 1..4 {
            chain.point("", 1 << 20, &[format!("write -P {i} 0 64k")]);
        }
        let chain = chain.finish();
        std::fs::create_dir(&outside).unwrap();
        let victim = outside.join("victim");
        std::fs::write(&victim, PRECIOUS).unwrap();
        std::fs::set_permissions(&victim, std::fs::Permissions::from_mode(0o600)).unwrap();
        let side = chain.dir.join(".fleecefs");
        std::fs::create_dir(&side).unwrap();
        Setup { _dir: dir, root, disk: chain.dir, side, images: chain.files, outside, victim }
    }

    /// Everything in the disk's folder, images with their bytes.
    pub fn images_now(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let read = |p: &PathBuf| (p.clone(), std::fs::read(p).unwrap_or_default());
        self.images.iter().map(read).collect()
    }

    pub fn check_outside(&self, what: &str) {
        assert_eq!(std::fs::read(&self.victim).unwrap(), PRECIOUS, "{what}");
        let meta = std::fs::metadata(&self.victim).unwrap();
        // SAFETY: geteuid has no preconditions.
        let own = unsafe { libc::geteuid() };
        assert_eq!((meta.mode() & 0o7777, meta.uid()), (0o600, own), "{what}");
        let names = std::fs::read_dir(&self.outside).unwrap().count();
        assert_eq!(names, 1, "{what}: files were made or removed outside");
    }

    /// Writes a journal of the owner's own making; runs what would finish it; it has to be refused,
    /// by name, and nothing may have changed.
    pub fn refuses(&self, journal: &str, text: &[u8], code: i32, what: &str) {
        let path = self.side.join(journal);
        std::fs::write(&path, text).unwrap();
        let before = self.images_now();
        let out = fleecefs(&["prune", "--keep-last", "9", s(&self.root)]);
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(code), "{what}: {said}");
        assert!(said.contains(journal) && said.contains("remove"), "{what}: {said}");
        assert!(before == self.images_now(), "{what}");
        self.check_outside(what);
        std::fs::remove_file(path).unwrap();
    }
}

/// Runs fleecefs; it may not hang.
pub fn fleecefs(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    let (id, end) = (child.id().to_string(), Instant::now() + PATIENCE);
    let done = std::sync::Arc::new(AtomicBool::new(false));
    let watch = std::thread::spawn({
        let done = done.clone();
        move || {
            while !done.load(Ordering::Relaxed) && Instant::now() < end {
                std::thread::sleep(Duration::from_millis(5));
            }
            if !done.load(Ordering::Relaxed) {
                run("kill", &["-KILL", &id]);
            }
        }
    });
    let out = child.wait_with_output().unwrap();
    done.store(true, Ordering::Relaxed);
    watch.join().unwrap();
    assert!(out.status.code().is_some(), "{args:?} hung: {}", out.status);
    out
}
