//! Noticing that the backup directory's place holds another folder by now: a file system was mounted
//! over it or unmounted, or a folder above it was renamed.
//!
//! State: the mounts on the way to the directory and below it, as the kernel listed them last; the
//! folder that was found at its path; watches of the folders above it.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use inotify::{Inotify, WatchMask};

use crate::folder::{FileId, Folder, system};

/// The kernel's list of mounts. Whoever polls an open one is told of changes.
const MOUNTS: &str = "/proc/self/mountinfo";

/// What is at a path.
pub struct Place {
    root: PathBuf,
    /// `None` without /proc.
    list: Option<File>,
    mounts: HashSet<String>,
    /// Watches of the folders above; `None` if there can be none.
    above: Option<Inotify>,
    folder: Option<FileId>,
}

impl Place {
    /// What is at `root` now, which is absolute and without links.
    pub fn new(root: &Path) -> Self {
        let list = system::open(Path::new(MOUNTS)).ok();
        let (mounts, root) = (HashSet::new(), root.to_path_buf());
        let mut place = Place { root, list, mounts, above: None, folder: None };
        place.renew();
        place
    }

    /// Takes note of what is there, and watches the folders above that are there now.
    pub fn renew(&mut self) {
        self.mounts = self.mounts_now();
        self.above = self.watch_above();
        self.folder = self.folder_now();
    }

    /// The list of mounts, to be polled for `POLLPRI`; -1 if there is none.
    pub fn list_fd(&self) -> RawFd {
        self.list.as_ref().map_or(-1, |f| f.as_raw_fd())
    }

    /// The watches of the folders above, to be polled for `POLLIN`; -1 if there are none.
    pub fn above_fd(&self) -> RawFd {
        self.above.as_ref().map_or(-1, |i| i.as_raw_fd())
    }

    /// Whether a mount that concerns the directory came or went.
    pub fn mounts_changed(&self) -> bool {
        self.mounts_now() != self.mounts
    }

    /// Whether, after an event above it, the directory is another folder, or gone, or there again.
    pub fn folder_changed(&mut self) -> bool {
        let names: HashSet<&OsStr> = self.root.iter().collect();
        let mut concerned = false;
        let mut buffer = [0; 4096];
        if let Some(above) = &mut self.above
            && let Ok(events) = above.read_events(&mut buffer)
        {
            // Without a name it is about the folder itself, or events were lost.
            events.for_each(|e| concerned |= e.name.is_none_or(|n| names.contains(n)));
        }
        concerned && self.folder_now() != self.folder
    }

    fn folder_now(&self) -> Option<FileId> {
        Folder::open(&self.root).and_then(|f| f.metadata()).ok().map(|m| FileId::of(&m))
    }

    fn watch_above(&self) -> Option<Inotify> {
        let inotify = Inotify::init().ok()?;
        let mask = WatchMask::CREATE | WatchMask::DELETE | WatchMask::MOVE | WatchMask::ONLYDIR;
        for folder in self.root.ancestors().skip(1) {
            // One that may not be read cannot be watched; nor can one that is gone.
            if let Ok(folder) = Folder::open(folder) {
                let _ = inotify.watches().add(folder.proc_path(), mask);
            }
        }
        Some(inotify)
    }

    /// Number, device and place of each mount that lies on the way to the directory or below it.
    fn mounts_now(&self) -> HashSet<String> {
        let text = system::text(Path::new(MOUNTS)).unwrap_or_default();
        let root = escaped(&self.root);
        let concerns = |at: &OsStr| {
            let at = Path::new(at);
            root.starts_with(at) || at.starts_with(&root)
        };
        let line = |line: &str| {
            let fields: Vec<&str> = line.split(' ').take(5).collect();
            let [id, _, device, _, at] = *fields.as_slice() else { return None };
            concerns(OsStr::new(at)).then(|| format!("{id} {device} {at}"))
        };
        text.lines().filter_map(line).collect()
    }
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
        let mut place = Place::new(&root);
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
    fn paths_are_written_as_the_kernel_does() {
        assert_eq!(escaped(Path::new("/a b\\c")), Path::new("/a\\040b\\134c"));
        let place = Place::new(Path::new("/proc/self"));
        assert!(place.mounts.iter().any(|m| m.ends_with(" /")), "{:?}", place.mounts);
        assert!(!place.mounts_changed());
    }
}
