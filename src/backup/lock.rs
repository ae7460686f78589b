//! One run per VM (and one per target, see [`crate::lock`]). Held by flock, so that a killed process leaves none.

use std::fs::{DirBuilder, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::error::{Error, Kind, Result};
use crate::qmp::Address;

/// A lock, held until it is dropped.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Takes the lock of the VM behind `address`.
    ///
    /// # Errors
    /// `Busy` if another run has it.
    pub fn vm(state: &Path, address: &Address) -> Result<Self> {
        make_dir(state)?;
        let path = state.join(format!("{}.lock", vm_key(address)));
        Self::take(&path, "a backup or recovery of this VM is running")
            .map_err(|e| e.remedy("fleecefs info status shows it, fleecefs cancel ends it"))
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
            return Ok(Lock { _file: file });
        }
        let e = std::io::Error::last_os_error();
        if e.kind() == std::io::ErrorKind::WouldBlock {
            return Err(Error::new(Kind::Busy, held).at_path(path));
        }
        Err(Error::io(e, "cannot take the lock").at_path(path))
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
}
