//! One writer per backup directory: `flock` on `.fleecefs/lock`, so that a killed process leaves
//! no lock behind.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashSet};
use std::ffi::OsStr;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Kind, Result};
use crate::folder::{EntryKind, FileId, Folder, Lock};
use crate::text::path_text;

/// The folder that holds the lock file, in the one that is locked.
const FOLDER: &str = ".fleecefs";
/// The lock file in it: there wherever something was written.
pub const NAME: &str = "lock";
/// Folders that lie deeper below the one that is locked are not looked into.
const DEPTH: usize = 200;

/// Locks, held until they are dropped.
#[derive(Debug)]
pub struct Locks {
    /// By the paths of their files.
    held: BTreeMap<PathBuf, Lock>,
}

impl Locks {
    /// Takes the lock of `root`, an absolute path without links, and every other that a run on these
    /// images may hold: of the folders above `root` and below it, as far as they have a lock file.
    ///
    /// # Errors
    /// `Busy` if somebody else holds one; `Unsupported` if a lock file is a link, a pipe or a folder;
    /// `Permission` where it cannot be made.
    pub fn take(root: &Path) -> Result<Locks> {
        let folder = Folder::open(root)
            .map_err(|e| Error::io(e, "cannot open the backup directory").at_path(root))?;
        let side = folder.make_folder(FOLDER).map_err(|e| {
            explain(Error::io(e, "cannot make the folder for the lock").at_path(root.join(FOLDER)))
        })?;
        let mut taken = TakenLocks::default();
        taken.add(&side)?;
        // After the own one: of two first runs, one above the other, at least one sees the other's.
        for above in root.ancestors().skip(1) {
            // One that cannot be entered is nobody's who writes here.
            let Ok(above) = Folder::open(above) else { continue };
            taken.add_of(&above)?;
        }
        taken.add_below(&folder, DEPTH)?;
        Ok(Locks { held: taken.locks })
    }

    /// The folders for manifests whose locks these are: of all directories that a run on these images may be at.
    pub(crate) fn folders(&self) -> impl Iterator<Item = &Path> {
        self.held.keys().filter_map(|file| file.parent())
    }
}

/// Locks by the paths of their files.
#[derive(Default)]
struct TakenLocks {
    locks: BTreeMap<PathBuf, Lock>,
    /// Which files they are: in a copy of hard links there are the same again, by other names.
    files: HashSet<FileId>,
}

impl TakenLocks {
    /// Takes the lock of the folder `dir`, if that has a lock file.
    fn add_of(&mut self, dir: &Folder) -> Result<()> {
        let Ok(side) = dir.folder(FOLDER) else { return Ok(()) };
        if !side.has(NAME) || is_strangers(dir, &side) {
            return Ok(());
        }
        self.add(&side)
    }

    fn add(&mut self, side: &Folder) -> Result<()> {
        let there = side.look(NAME).ok().map(|m| FileId::of(&m));
        if there.is_some_and(|id| self.files.contains(&id)) {
            return Ok(());
        }
        if let Entry::Vacant(place) = self.locks.entry(side.join(NAME)) {
            let lock = lock(side)?;
            let failed = |e| Error::io(e, "cannot check the lock").at_path(side.join(NAME));
            self.files.insert(FileId::of(&lock.file().metadata().map_err(failed)?));
            place.insert(lock);
        }
        Ok(())
    }

    /// Takes the locks of all folders in `dir`, and of those in them.
    fn add_below(&mut self, dir: &Folder, depth: usize) -> Result<()> {
        // A folder that cannot be read has no images that can be altered.
        let Ok(entries) = dir.entries() else { return Ok(()) };
        for entry in entries {
            if entry.kind != EntryKind::Folder || entry.name == OsStr::new(FOLDER) {
                continue;
            }
            let below = match dir.folder(&entry.name) {
                Ok(below) => below,
                Err(e) if is_out_of_files(&e) => {
                    let what = "cannot check for locks below it";
                    return Err(Error::io(e, what).at_path(dir.join(&entry.name)));
                }
                Err(_) => continue,
            };
            self.add_of(&below)?;
            match depth.checked_sub(1) {
                Some(depth) => self.add_below(&below, depth)?,
                None => log::warn!(
                    "{}: folders nested too deep: locks below are not checked",
                    path_text(below.path())
                ),
            }
        }
        Ok(())
    }
}

fn is_out_of_files(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EMFILE | libc::ENFILE))
}

/// Whether the side folder was put into a sticky folder such as /tmp by somebody who is neither root,
/// nor the caller, nor the owner of that folder: he has nothing to say there.
fn is_strangers(dir: &Folder, side: &Folder) -> bool {
    let (Ok(dir), Ok(side)) = (dir.metadata(), side.metadata()) else { return false };
    let own = rustix::process::geteuid().as_raw();
    dir.mode() & 0o1002 == 0o1002 && ![0, own, dir.uid()].contains(&side.uid())
}

fn lock(side: &Folder) -> Result<Lock> {
    let path = side.join(NAME);
    match side.lock(NAME) {
        Ok(Some(lock)) => Ok(lock),
        Ok(None) => Err(Error::new(
            Kind::Busy,
            "another command is writing to this backup \
                                                directory",
        )
        .at_path(path)
        .remedy("try again when it has ended")),
        Err(e) => Err(explain(Error::io(e, "cannot take the lock").at_path(path))),
    }
}

/// What can be done about a lock that cannot be made.
fn explain(e: Error) -> Error {
    match e.kind() {
        Kind::Permission => e.remedy(
            "this needs write access: run it as the directory's owner (NFS with root_squash \
             refuses root), or mount it read-write",
        ),
        Kind::Unsupported | Kind::NotFound => e.remedy("remove what has its name, and try again"),
        _ => e,
    }
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
        let taken = Locks::take(&vm).unwrap();
        assert_eq!(Locks::take(&vm).unwrap_err().kind(), Kind::Busy);
        assert_eq!(Locks::take(&root).unwrap_err().kind(), Kind::Busy);
        assert_eq!(Locks::take(&disk).unwrap_err().kind(), Kind::Busy);
        drop(taken);
        let taken = Locks::take(&disk).unwrap();
        assert_eq!(Locks::take(&root).unwrap_err().kind(), Kind::Busy);
        assert_eq!(Locks::take(&vm).unwrap_err().kind(), Kind::Busy);
        drop(taken);
        Locks::take(&root).unwrap();
    }

    #[test]
    fn a_copy_of_hard_links_has_the_same_lock_again() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        for name in ["vm", "copy"] {
            std::fs::create_dir_all(root.join(name).join(FOLDER)).unwrap();
        }
        let file = |name: &str| root.join(name).join(FOLDER).join(NAME);
        std::fs::write(file("vm"), "").unwrap();
        std::fs::hard_link(file("vm"), file("copy")).unwrap();
        let taken = Locks::take(&root).unwrap();
        for name in ["vm", "copy"] {
            assert_eq!(Locks::take(&root.join(name)).unwrap_err().kind(), Kind::Busy);
        }
        drop(taken);
        let _held = Locks::take(&root.join("copy")).unwrap();
        assert_eq!(Locks::take(&root).unwrap_err().kind(), Kind::Busy);
    }

    #[test]
    fn what_is_no_lock_file_is_an_error_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let side = root.join("sda").join(FOLDER);
        let elsewhere = root.join("precious");
        let make: [(&str, &dyn Fn()); 3] = [
            ("pipe", &|| {
                let at = rustix::fs::CWD;
                let (kind, mode) = (rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR);
                rustix::fs::mknodat(at, side.join(NAME), kind, mode, 0).unwrap();
            }),
            ("link", &|| std::os::unix::fs::symlink(&elsewhere, side.join(NAME)).unwrap()),
            ("folder", &|| std::fs::create_dir(side.join(NAME)).unwrap()),
        ];
        for (what, make) in make {
            std::fs::create_dir_all(&side).unwrap();
            make();
            for locked in [&root, &root.join("sda")] {
                let e = Locks::take(locked).unwrap_err();
                assert_ne!(e.kind(), Kind::Busy, "{what}: {}", e.report());
                assert_eq!(e.path(), Some(side.join(NAME).as_path()), "{what}: {}", e.report());
            }
            std::fs::remove_dir_all(&side).unwrap();
        }
        std::os::unix::fs::symlink(root.join("elsewhere"), root.join("sda").join(FOLDER)).unwrap();
        assert_eq!(Locks::take(&root.join("sda")).unwrap_err().kind(), Kind::Unsupported);
        // A link to a folder is not gone into.
        std::fs::create_dir_all(root.join("elsewhere").join(FOLDER)).unwrap();
        assert_eq!(Locks::take(&root.join("sda")).unwrap_err().kind(), Kind::Unsupported);
        assert!(!root.join("elsewhere").join(FOLDER).join(NAME).exists());
        assert!(!elsewhere.exists());
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
