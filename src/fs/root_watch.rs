//! Noticing that the backup directory's place holds another folder by now: a file system was mounted
//! over it or unmounted, a folder above it was renamed, or a link on its path leads elsewhere.
//!
//! State: the mounts on the way to the directory and below it, as the kernel listed them last; the
//! folder that was found at its path; watches of the folders on the way there.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use inotify::{Inotify, WatchMask};

use crate::folder::{self, FileId, Folder, system};

/// The kernel's list of mounts. Whoever polls an open one is told of changes.
const MOUNTS: &str = "/proc/self/mountinfo";

/// How often the way to the directory is looked at again while it changes under our eyes.
const TRIES: usize = 16;

/// What is at a path, links included.
pub(super) struct RootWatch {
    /// As the user calls it, absolute.
    called: PathBuf,
    /// `None` without /proc.
    list: Option<File>,
    mounts: HashSet<String>,
    /// Watches of the folders on the way; `None` if there can be none.
    above: Option<Inotify>,
    /// What the way depends on: names in folders.
    names: Vec<(PathBuf, OsString)>,
    /// Where the way led last.
    real: PathBuf,
    folder: Option<FileId>,
}

impl RootWatch {
    /// What is at `called` now, which is absolute.
    pub(super) fn new(called: &Path) -> Self {
        let list = system::open(Path::new(MOUNTS)).ok();
        let (real, called) = (called.to_path_buf(), called.to_path_buf());
        let (mounts, names) = (HashSet::new(), Vec::new());
        let mut place = RootWatch { called, list, mounts, above: None, names, real, folder: None };
        place.renew();
        place
    }

    /// Takes note of what is there, and watches the folders on the way that are there now.
    pub(super) fn renew(&mut self) {
        self.watch_way();
        self.mounts = self.mounts_now();
        self.folder = self.folder_now();
    }

    /// The list of mounts, to be polled for `POLLPRI`; -1 if there is none.
    pub(super) fn list_fd(&self) -> RawFd {
        self.list.as_ref().map_or(-1, |f| f.as_raw_fd())
    }

    /// The watches of the folders above, to be polled for `POLLIN`; -1 if there are none.
    pub(super) fn above_fd(&self) -> RawFd {
        self.above.as_ref().map_or(-1, |i| i.as_raw_fd())
    }

    /// Whether a mount that concerns the directory came or went.
    pub(super) fn mounts_changed(&self) -> bool {
        self.mounts_now() != self.mounts
    }

    /// Whether, after an event above it, the directory is another folder, or gone, or there again.
    pub(super) fn folder_changed(&mut self) -> bool {
        let names: HashSet<&OsStr> = self.names.iter().map(|(_, n)| n.as_os_str()).collect();
        let mut concerned = false;
        let mut buffer = [0; 4096];
        if let Some(above) = &mut self.above
            && let Ok(events) = above.read_events(&mut buffer)
        {
            // Without a name it is about the folder itself, or events were lost.
            events.for_each(|e| concerned |= e.name.is_none_or(|n| names.contains(n)));
        }
        if !concerned {
            return false;
        }
        // Even where the directory is as missing as before: a folder above it may be there again.
        self.watch_way();
        self.folder_now() != self.folder
    }

    fn folder_now(&self) -> Option<FileId> {
        let real = folder::resolve(&self.called).ok()?;
        Folder::open(&real).and_then(|f| f.metadata()).ok().map(|m| FileId::of(&m))
    }

    /// Watches each folder on the way. What is made after the way was walked and before it is watched
    /// makes another way.
    fn watch_way(&mut self) {
        for _ in 0..TRIES {
            let followed = folder::follow_path(&self.called);
            self.above = watch_folders(&followed.names);
            self.names = followed.names;
            if let Ok(real) = followed.real {
                self.real = real;
            }
            if folder::follow_path(&self.called).names == self.names {
                return;
            }
        }
    }

    /// Number, device and place of each mount that is on the way to the directory or below it.
    fn mounts_now(&self) -> HashSet<String> {
        let text = system::text(Path::new(MOUNTS)).unwrap_or_default();
        let real = escaped(&self.real);
        let mut watched: HashSet<PathBuf> = self.names.iter().map(|(f, _)| escaped(f)).collect();
        watched.extend([escaped(&self.called), real.clone()]);
        let concerns = |at: &OsStr| {
            let at = Path::new(at);
            at.starts_with(&real) || watched.iter().any(|f| f.starts_with(at))
        };
        let line = |line: &str| {
            let fields: Vec<&str> = line.split(' ').take(5).collect();
            let [id, _, device, _, at] = *fields.as_slice() else { return None };
            concerns(OsStr::new(at)).then(|| format!("{id} {device} {at}"))
        };
        text.lines().filter_map(line).collect()
    }
}

fn watch_folders(names: &[(PathBuf, OsString)]) -> Option<Inotify> {
    let inotify = Inotify::init().ok()?;
    let mask = WatchMask::CREATE | WatchMask::DELETE | WatchMask::MOVE | WatchMask::ONLYDIR;
    let folders: HashSet<&Path> = names.iter().map(|(f, _)| f.as_path()).collect();
    for folder in folders {
        // One that may not be read cannot be watched; nor can one that is gone.
        if let Ok(folder) = Folder::open(folder) {
            let _ = inotify.watches().add(folder.proc_path(), mask);
        }
    }
    Some(inotify)
}

/// The path as the kernel writes it in the list.
fn escaped(path: &Path) -> PathBuf {
    let mut out = Vec::new();
    for byte in path.as_os_str().as_bytes() {
        match byte {
            b' ' | b'\t' | b'\n' | b'\\' => out.extend(format!("\\{byte:03o}").bytes()),
            _ => out.push(*byte),
        }
    }
    PathBuf::from(OsString::from(String::from_utf8_lossy(&out).into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_folder_in_its_place_is_noticed_and_other_names_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("above/backups");
        std::fs::create_dir_all(&root).unwrap();
        let mut place = RootWatch::new(&root);
        std::fs::write(dir.path().join("above/other"), "x").unwrap();
        assert!(!place.folder_changed());
        std::fs::rename(dir.path().join("above"), dir.path().join("moved")).unwrap();
        assert!(place.folder_changed(), "gone");
        place.renew();
        std::fs::create_dir_all(&root).unwrap();
        assert!(place.folder_changed(), "there again");
        place.renew();
        assert!(!place.folder_changed());
    }

    #[test]
    fn folders_above_are_watched_again_while_the_directory_is_still_missing() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("above/more/backups");
        std::fs::create_dir_all(&root).unwrap();
        let mut place = RootWatch::new(&root);
        std::fs::rename(dir.path().join("above"), dir.path().join("moved")).unwrap();
        assert!(place.folder_changed());
        place.renew();
        for made in ["above", "above/more"] {
            std::fs::create_dir(dir.path().join(made)).unwrap();
            assert!(!place.folder_changed(), "{made}: still missing");
        }
        std::fs::create_dir(&root).unwrap();
        assert!(place.folder_changed(), "there again");
    }

    #[test]
    fn a_link_that_leads_elsewhere_is_noticed_and_so_is_another_folder_behind_it() {
        let dir = tempfile::tempdir().unwrap();
        let (root, here) = (dir.path().join("called"), |name: &str| dir.path().join(name));
        for name in ["a/backups", "b"] {
            std::fs::create_dir_all(here(name)).unwrap();
        }
        std::os::unix::fs::symlink("a/backups", &root).unwrap();
        let mut place = RootWatch::new(&root);
        std::fs::rename(here("a"), here("moved")).unwrap();
        assert!(place.folder_changed(), "gone behind the link");
        place.renew();
        std::fs::create_dir_all(here("a/backups")).unwrap();
        assert!(place.folder_changed(), "there again");
        place.renew();
        std::fs::remove_file(&root).unwrap();
        std::os::unix::fs::symlink("b", &root).unwrap();
        assert!(place.folder_changed(), "another link");
    }

    #[test]
    fn paths_are_written_as_the_kernel_does() {
        assert_eq!(escaped(Path::new("/a b\\c")), Path::new("/a\\040b\\134c"));
        let place = RootWatch::new(Path::new("/proc/self"));
        assert!(place.mounts.iter().any(|m| m.ends_with(" /")), "{:?}", place.mounts);
        assert!(!place.mounts_changed());
    }
}
