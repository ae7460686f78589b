//! One writer per backup directory: `flock` on `.fleecefs/lock`, so that a killed process leaves
//! no lock behind.

use std::fs::{DirBuilder, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::error::{Error, Kind, Result};

/// Relative to the folder that is locked.
const LOCK: &str = ".fleecefs/lock";

/// Locks, held until they are dropped.
#[derive(Debug)]
pub struct Locks {
    _files: Vec<File>,
}

impl Locks {
    /// Takes the lock of `root`, and of every folder where a backup of the images in `folders` may
    /// have its own: those between `root` and them, and those above `root`, as far as they have a
    /// lock file.
    ///
    /// # Errors
    /// `Busy` if somebody else holds one.
    pub fn take<'a>(root: &Path, folders: impl IntoIterator<Item = &'a Path>) -> Result<Locks> {
        let mut paths: Vec<PathBuf> = root.ancestors().skip(1).map(|a| a.join(LOCK)).collect();
        for folder in folders {
            let inside = folder.ancestors().take_while(|a| a.starts_with(root) && *a != root);
            paths.extend(inside.map(|a| a.join(LOCK)));
        }
        paths.retain(|p| p.is_file());
        paths.push(root.join(LOCK));
        paths.sort();
        paths.dedup();
        make_folder(root)?;
        Ok(Locks { _files: paths.iter().map(|p| lock(p)).collect::<Result<_>>()? })
    }
}

fn make_folder(root: &Path) -> Result<()> {
    let folder = root.join(".fleecefs");
    match DirBuilder::new().mode(0o700).create(&folder) {
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => {
            Err(Error::io(e, "cannot make the folder for the lock").at_path(folder))
        }
        _ => Ok(()),
    }
}

fn lock(path: &Path) -> Result<File> {
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
        return Ok(file);
    }
    let e = std::io::Error::last_os_error();
    if e.kind() == std::io::ErrorKind::WouldBlock {
        return Err(Error::new(Kind::Busy, "another run is writing to this backup directory")
            .at_path(path)
            .remedy("try again when it has ended"));
    }
    Err(Error::io(e, "cannot take the lock").at_path(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_below_or_above_excludes_too() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let vm = root.join("vm");
        let disk = vm.join("sda");
        std::fs::create_dir_all(&disk).unwrap();
        let held = Locks::take(&vm, [disk.as_path()]).unwrap();
        assert_eq!(Locks::take(&vm, []).unwrap_err().kind(), Kind::Busy);
        assert_eq!(Locks::take(&root, [disk.as_path()]).unwrap_err().kind(), Kind::Busy);
        assert_eq!(Locks::take(&disk, []).unwrap_err().kind(), Kind::Busy);
        drop(held);
        Locks::take(&root, [disk.as_path()]).unwrap();
    }
}
