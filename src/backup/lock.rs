//! One run per VM (and one per target, see [`crate::lock`]). Held by flock, so that a killed process
//! leaves none.
//!
//! A VM is known by its socket. Since QEMU may have several, its process is locked as well where it
//! can be told; and each run holds a mark under its id, so that a recovery which finds its objects in
//! QEMU knows that it lives.

use std::fs::{DirBuilder, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::error::{Error, Kind, Result};
use crate::qmp::{Address, Client};

/// A lock, held until it is dropped.
#[derive(Debug)]
pub struct Lock {
    _file: File,
    /// Removed at the end.
    passing: Option<PathBuf>,
}

/// What the user can do about a lock that is held.
const REMEDY: &str = "fleecefs info status shows it, fleecefs cancel ends it";

impl Lock {
    /// Takes the lock of the VM behind `address`.
    ///
    /// # Errors
    /// `Busy` if another run has it.
    pub fn vm(state: &Path, address: &Address) -> Result<Self> {
        make_dir(state)
            .map_err(|e| e.remedy("journals and locks go there: name another with --state-dir"))?;
        let path = state.join(format!("{}.lock", vm_key(address)));
        Self::take(&path, "a backup or recovery of this VM is running")
            .map_err(|e| e.remedy(REMEDY))
    }

    /// Takes the lock of the process that `client` talks to, if that can be told.
    ///
    /// # Errors
    /// `Busy` if a run that came by another socket of it is at work.
    pub fn qemu(state: &Path, client: &Client) -> Result<Option<Self>> {
        let Some(process) = client.process() else { return Ok(None) };
        let hash = blake3::hash(process.as_bytes()).to_hex();
        let name = format!("qemu-{}.lock", hash.as_str().get(..16).unwrap_or_default());
        Self::take_passing(&state.join(name)).map(Some)
    }

    /// Marks a run as alive, or makes sure that none of this id is.
    ///
    /// # Errors
    /// `Busy` if it lives.
    pub fn run(state: &Path, run: &str) -> Result<Self> {
        Self::take_passing(&state.join(format!("run-{run}.lock")))
    }

    /// A lock whose file goes with it.
    fn take_passing(path: &Path) -> Result<Self> {
        loop {
            let mut lock =
                Self::take(path, "a backup of this VM is running by another of its QMP sockets")
                    .map_err(|e| e.remedy(REMEDY))?;
            // Whoever had it before may have removed it between our open and our flock.
            let same = |f: &File| {
                let (a, b) = (f.metadata().ok()?, std::fs::symlink_metadata(path).ok()?);
                Some(a.dev() == b.dev() && a.ino() == b.ino())
            };
            if same(&lock._file) == Some(true) {
                lock.passing = Some(path.to_path_buf());
                return Ok(lock);
            }
        }
    }

    fn take(path: &Path, held: &str) -> Result<Self> {
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_CLOEXEC | libc::O_NOFOLLOW)
            .open(path)
            .map_err(|e| Error::io(e, "cannot open the lock").at_path(path))?;
        // SAFETY: flock on a descriptor we own.
        if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0 {
            return Ok(Lock { _file: file, passing: None });
        }
        let e = std::io::Error::last_os_error();
        if e.kind() == std::io::ErrorKind::WouldBlock {
            return Err(Error::new(Kind::Busy, held).at_path(path));
        }
        Err(Error::io(e, "cannot take the lock").at_path(path))
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        if let Some(p) = &self.passing {
            let _ = std::fs::remove_file(p);
        }
    }
}

/// Makes a folder that only its owner enters.
///
/// # Errors
/// What the operating system said.
pub fn make_dir(path: &Path) -> Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|e| Error::io(e, "cannot make the folder").at_path(path))
        .map_err(|e| match e.kind() {
            Kind::Exists => e.remedy("this is a file: name a folder"),
            _ => e,
        })
}

/// The name under which a VM's journal, lock and control socket are kept.
pub fn vm_key(address: &Address) -> String {
    let hash = blake3::hash(address.canonical().as_bytes()).to_hex();
    format!("vm-{}", hash.as_str().get(..16).unwrap_or_default())
}

/// Where state is kept unless `--state-dir` says otherwise: /var/lib/fleecefs, for others than
/// root their own state folder.
pub fn default_state_dir() -> PathBuf {
    // SAFETY: geteuid has no preconditions.
    if unsafe { libc::geteuid() } == 0 {
        return PathBuf::from("/var/lib/fleecefs");
    }
    let base = std::env::var_os("XDG_STATE_HOME").map(PathBuf::from).filter(|p| p.is_absolute());
    let home = || std::env::var_os("HOME").map(|h| PathBuf::from(h).join(".local/state"));
    base.or_else(home).unwrap_or_else(std::env::temp_dir).join("fleecefs")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_exclusive_and_goes_with_its_holder() {
        let d = tempfile::tempdir().unwrap();
        let a = Address::Unix("/run/a".into());
        let lock = Lock::vm(d.path(), &a).unwrap();
        assert_eq!(Lock::vm(d.path(), &a).unwrap_err().kind(), Kind::Busy);
        Lock::vm(d.path(), &Address::Unix("/run/b".into())).unwrap();
        drop(lock);
        Lock::vm(d.path(), &a).unwrap();
    }

    #[test]
    fn the_mark_of_a_run_goes_with_it() {
        let d = tempfile::tempdir().unwrap();
        let mark = Lock::run(d.path(), "0123456789ab").unwrap();
        assert_eq!(Lock::run(d.path(), "0123456789ab").unwrap_err().kind(), Kind::Busy);
        drop(mark);
        assert_eq!(std::fs::read_dir(d.path()).unwrap().count(), 0);
        Lock::run(d.path(), "0123456789ab").unwrap();
    }
}
