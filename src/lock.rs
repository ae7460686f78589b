//! One writer per backup directory: `flock` on `.fleecefs/lock`, so that a killed process leaves
//! no lock behind.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::{DirBuilder, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::error::{Error, Kind, Result};

/// Relative to the folder that is locked.
const LOCK: &str = ".fleecefs/lock";
/// The folder that holds it.
const FOLDER: &str = ".fleecefs";

/// Locks, held until they are dropped.
#[derive(Debug)]
pub struct Locks {
    _files: Vec<File>,
}

impl Locks {
    /// Takes the lock of `root`, an absolute path, and every other that a run on these images may
    /// hold: of the folders above `root` and below it, as far as they have a lock file.
    ///
    /// # Errors
    /// `Busy` if somebody else holds one.
    pub fn take(root: &Path) -> Result<Locks> {
        make_folder(root)?;
        let own = root.join(LOCK);
        let mut held = BTreeMap::from([(own.clone(), lock(&own)?)]);
        // After the own one: of two first runs, one above the other, at least one sees the other's.
        for path in others(root) {
            if let Entry::Vacant(place) = held.entry(path) {
                let file = lock(place.key())?;
                place.insert(file);
            }
        }
        Ok(Locks { _files: held.into_values().collect() })
    }
}

/// The lock files above and below `root`.
fn others(root: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = root.ancestors().skip(1).map(|a| a.join(LOCK)).collect();
    let mut todo = vec![root.to_path_buf()];
    while let Some(dir) = todo.pop() {
        paths.push(dir.join(LOCK));
        // A folder that cannot be read has no images that can be altered.
        let Ok(entries) = std::fs::read_dir(&dir) else { continue };
        for entry in entries.flatten() {
            let is_folder = entry.file_type().is_ok_and(|t| t.is_dir());
            if is_folder && entry.file_name() != FOLDER {
                todo.push(entry.path());
            }
        }
    }
    paths.retain(|p| p.is_file());
    paths
}

fn make_folder(root: &Path) -> Result<()> {
    let folder = root.join(FOLDER);
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
        let held = Locks::take(&vm).unwrap();
        assert_eq!(Locks::take(&vm).unwrap_err().kind(), Kind::Busy);
        assert_eq!(Locks::take(&root).unwrap_err().kind(), Kind::Busy);
        assert_eq!(Locks::take(&disk).unwrap_err().kind(), Kind::Busy);
        drop(held);
        let held = Locks::take(&disk).unwrap();
        assert_eq!(Locks::take(&root).unwrap_err().kind(), Kind::Busy);
        assert_eq!(Locks::take(&vm).unwrap_err().kind(), Kind::Busy);
        drop(held);
        Locks::take(&root).unwrap();
    }

    #[test]
    fn of_two_first_runs_one_above_the_other_at_most_one_goes_on() {
        for _ in 0..50 {
            let dir = tempfile::tempdir().unwrap();
            let root = dir.path().canonicalize().unwrap();
            let disk = root.join("sda");
            std::fs::create_dir(&disk).unwrap();
            let start = std::sync::Barrier::new(2);
            let (a, b) = std::thread::scope(|scope| {
                let take = |path: PathBuf| {
                    start.wait();
                    Locks::take(&path).ok()
                };
                let a = scope.spawn(move || take(root));
                let b = scope.spawn(move || take(disk));
                (a.join().unwrap(), b.join().unwrap())
            });
            assert!(a.is_none() || b.is_none());
        }
    }
}
