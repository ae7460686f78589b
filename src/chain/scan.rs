//! Walks a backup directory and finds its disks, chains and points.
//!
//! The walk goes to any depth and follows no symbolic link; the `FULL-<disk>` links of
//! `--no-timestamp` are read as text and looked up among the files that were walked. A name found
//! inside an image is looked up in the same way, so nothing outside the directory is ever touched.
//!
//! Layouts, all of which may be mixed in one directory:
//! - `<folder>/<LEVEL>-<seconds>-<disk>`: one disk per folder (qmpbackup, by disk or node name);
//!   `--monthly` puts such folders below `YYYY-MM/`, each with chains of its own
//! - several disks in one folder (`--no-subdir`): the disk is the name after the time
//! - `<disk>/<disk>` with or without a `FULL-<disk>` link (`--no-timestamp`): the FULL of the INCs
//!   beside it
//! - any other image: a disk of its own with one point
//!
//! Other backup formats plug in by folder: see `Tree` and `assemble`.

use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::fs::{DirEntry, Metadata};
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::link::normalise;
use super::manifest::{self, Brief};
use super::name::{self, Name};
use super::probe::Probed;
use super::{Catalog, Level, assemble, removal};
use crate::error::{Error, Finding, Kind, Result};

pub use super::probe::ProbeCache;

/// How to scan.
#[derive(Debug, Clone, Default)]
pub struct ScanOptions {
    /// Folders that are left out, as absolute paths: a mount point inside the backup directory.
    pub skip: Vec<PathBuf>,
    /// The directory as the user calls it, absolute, where that is by way of a link: images may name
    /// it so.
    pub called: Option<PathBuf>,
}

/// Index into [`Tree::files`].
pub(super) type FileId = usize;

/// A plain file.
pub(super) struct FileEntry {
    /// Absolute path without symbolic links.
    pub path: PathBuf,
    /// What its name says.
    pub name: Name,
    /// What it holds.
    pub probed: Arc<Probed>,
    /// Its manifest, if there is one that can be read.
    pub manifest: Option<Arc<Brief>>,
    /// Why its manifest cannot be read.
    pub manifest_problem: Option<Finding>,
}

/// A `FULL-<disk>` or `COPY-<disk>` link.
pub(super) struct Link {
    /// Its name.
    pub name: OsString,
    /// The level in its name.
    pub level: Level,
    /// The disk in its name.
    pub disk: OsString,
    /// The walked file that it leads to.
    pub target: Option<FileId>,
}

/// A folder.
pub(super) struct Folder {
    /// Relative to the root; empty for the root itself.
    pub relative: PathBuf,
    /// Absolute path.
    pub path: PathBuf,
    /// Its plain files, by name.
    pub files: Vec<FileId>,
    /// Its links, by name.
    pub links: Vec<Link>,
    /// Images that have a manifest and are gone.
    pub lost: Vec<Lost>,
}

/// An image that was here once: only its manifest is left.
#[derive(Debug, Clone)]
pub(super) struct Lost {
    /// Its file name.
    pub name: OsString,
    /// The level in its name.
    pub level: Level,
    /// The time in its name.
    pub stamp: i64,
    /// The disk in its name.
    pub disk: OsString,
}

/// All plain files of a backup directory.
pub(super) struct Tree {
    /// Absolute path without symbolic links.
    pub root: PathBuf,
    /// The same directory as the user called it: images may name it so.
    called: PathBuf,
    /// All folders, each after the one that contains it.
    pub folders: Vec<Folder>,
    /// All files.
    pub files: Vec<FileEntry>,
    by_path: HashMap<PathBuf, FileId>,
    /// What files lay on at the last scan, if they have not changed since.
    pub former: HashMap<FileId, PathBuf>,
    /// What belongs to no disk.
    pub findings: Vec<Finding>,
}

/// Finds the disks, chains and points of the backup directory `root`. `previous` is what the last
/// scan of it gave back: files that have not changed since are not read again.
///
/// # Errors
/// The directory itself cannot be read. Anything wrong inside it is a finding.
pub fn scan(
    root: &Path,
    options: &ScanOptions,
    previous: Option<&ProbeCache>,
) -> Result<(Catalog, ProbeCache)> {
    let failed = |e| Error::io(e, "cannot read the backup directory").at_path(root);
    let path = root.canonicalize().map_err(failed)?;
    std::fs::read_dir(&path).map_err(failed)?;
    let called = match &options.called {
        Some(called) => called.clone(),
        None => std::path::absolute(root).map_err(failed)?,
    };
    let mut walk = Walk {
        options,
        previous,
        cache: ProbeCache::default(),
        tree: Tree {
            root: path.clone(),
            called,
            folders: Vec::new(),
            files: Vec::new(),
            by_path: HashMap::new(),
            former: HashMap::new(),
            findings: Vec::new(),
        },
    };
    walk.run(path);
    let (mut tree, mut cache) = (walk.tree, walk.cache);
    tree.resolve_links();
    let left = tree.folders.iter().flat_map(|f| super::unfinished::findings(&f.path));
    let left: Vec<Finding> = left.collect();
    tree.findings.extend(left);
    if let Some(previous) = previous {
        tree.former = previous.bases_of(&tree.files);
    }
    let (catalog, bases) = assemble::assemble(tree);
    cache.remember_bases(bases);
    Ok((catalog, cache))
}

impl Tree {
    /// The walked file that `name`, as it stands in a file of `folder`, means. Purely by name.
    pub fn lookup(&self, folder: &Path, name: &Path) -> Option<FileId> {
        let path = normalise(folder, name)?;
        if let Some(id) = self.by_path.get(&path) {
            return Some(*id);
        }
        let inside = path.strip_prefix(&self.called).ok()?;
        self.by_path.get(&self.root.join(inside)).copied()
    }

    /// Whether there is a walked file at `path`.
    pub fn has(&self, path: &Path) -> bool {
        self.by_path.contains_key(path)
    }

    fn resolve_links(&mut self) {
        for f in 0..self.folders.len() {
            for l in 0..self.folders[f].links.len() {
                let folder = &self.folders[f].path;
                let target = std::fs::read_link(folder.join(&self.folders[f].links[l].name));
                let found = target.ok().and_then(|t| self.lookup(folder, &t));
                self.folders[f].links[l].target = found;
            }
        }
    }
}

struct Walk<'a> {
    options: &'a ScanOptions,
    previous: Option<&'a ProbeCache>,
    cache: ProbeCache,
    tree: Tree,
}

impl Walk<'_> {
    fn run(&mut self, root: PathBuf) {
        let device = std::fs::metadata(&root).map(|m| m.dev()).unwrap_or(0);
        let mut todo = vec![(root, device)];
        while let Some((path, device)) = todo.pop() {
            if self.options.skip.contains(&path) {
                continue;
            }
            let here = std::fs::metadata(&path).map(|m| m.dev()).unwrap_or(device);
            // A mount of ours inside the backup directory would show every point again.
            if here != device && path.join(manifest::FOLDER).join("status.json").is_file() {
                continue;
            }
            let mut folders = self.folder(path);
            folders.reverse();
            todo.extend(folders.into_iter().map(|f| (f, here)));
        }
    }

    /// Takes in one folder; returns the folders in it, sorted.
    fn folder(&mut self, path: PathBuf) -> Vec<PathBuf> {
        let mut entries = Vec::new();
        match std::fs::read_dir(&path) {
            Ok(list) => {
                for entry in list {
                    match entry {
                        Ok(e) => entries.push(e),
                        Err(e) => self.unreadable(&path, e),
                    }
                }
            }
            Err(e) => self.unreadable(&path, e),
        }
        entries.sort_by_key(DirEntry::file_name);
        let relative = path.strip_prefix(&self.tree.root).unwrap_or(&path).to_path_buf();
        let lost = Vec::new();
        let mut folder = Folder { relative, path, files: Vec::new(), links: Vec::new(), lost };
        let mut folders = Vec::new();
        let has_manifests = entries.iter().any(|e| e.file_name() == manifest::FOLDER);
        for entry in &entries {
            self.entry(entry, has_manifests, &mut folder, &mut folders);
        }
        if has_manifests {
            folder.lost = self.lost(&folder.path);
        }
        self.tree.folders.push(folder);
        folders
    }

    /// The backups whose manifests are in a folder that does not have them.
    fn lost(&mut self, path: &Path) -> Vec<Lost> {
        let manifests = path.join(manifest::FOLDER);
        let names = std::fs::read_dir(&manifests).and_then(|list| {
            list.map(|entry| entry.map(|e| e.file_name())).collect::<std::io::Result<Vec<_>>>()
        });
        let names = match names {
            Ok(names) => names,
            // A file of that name is none of ours.
            Err(e) if e.kind() == ErrorKind::NotADirectory => return Vec::new(),
            Err(e) => {
                let error = Error::io(e, "cannot list the manifests; a gap may go unnoticed");
                self.tree.findings.push(Finding::from_error(&error, &manifests));
                return Vec::new();
            }
        };
        let is_here = |name: &OsStr| self.tree.has(&path.join(name));
        let mut lost: Vec<Lost> = (names.iter())
            .filter_map(|n| n.as_bytes().strip_suffix(b".json").map(OsStr::from_bytes))
            .filter(|name| !is_here(name))
            .filter_map(|name| match name::parse(name) {
                Name::Backup { level, stamp: Some(stamp), disk } => {
                    Some(Lost { name: name.to_os_string(), level, stamp, disk })
                }
                _ => None,
            })
            .collect();
        if !lost.is_empty() {
            let leaving: HashSet<OsString> =
                removal::pending(path).into_iter().map(OsString::from).collect();
            lost.retain(|l| !leaving.contains(&l.name));
        }
        lost
    }

    fn entry(
        &mut self,
        entry: &DirEntry,
        has_manifests: bool,
        folder: &mut Folder,
        folders: &mut Vec<PathBuf>,
    ) {
        let name = entry.file_name();
        // Before anything is asked about it: a mount of ours there would take that for use.
        if !self.options.skip.is_empty() && self.options.skip.contains(&entry.path()) {
            return;
        }
        let meta = match entry.metadata() {
            Ok(m) => m,
            // Removed or renamed since the folder was read.
            Err(e) if e.kind() == ErrorKind::NotFound => return,
            Err(e) => return self.unreadable(&entry.path(), e),
        };
        if meta.is_dir() && name != manifest::FOLDER {
            folders.push(entry.path());
        } else if meta.is_symlink() {
            self.link(&name, folder);
        } else if meta.is_file() {
            folder.files.push(self.file(entry.path(), &name, &meta, has_manifests));
        }
    }

    fn link(&mut self, name: &OsStr, folder: &mut Folder) {
        if let Name::Backup { stamp: Some(_), .. } = name::parse(name) {
            let what = "a symbolic link in the place of a backup; links are not followed";
            let path = folder.path.join(name);
            self.tree.findings.push(Finding::warning(Kind::Unsupported, path, what));
        }
        if let Some((level, disk)) = name::parse_link(name) {
            let (name, disk) = (name.to_os_string(), disk.to_os_string());
            folder.links.push(Link { name, level, disk, target: None });
        }
    }

    fn file(&mut self, path: PathBuf, name: &OsStr, meta: &Metadata, manifests: bool) -> FileId {
        let name = name::parse(name);
        let probed = self.cache.probe(&path, meta, name != Name::Ignored, self.previous);
        let manifest = match manifests && name != Name::Ignored {
            true => self.cache.manifest(&path, self.previous),
            false => Ok(None),
        };
        let id = self.tree.files.len();
        self.tree.by_path.insert(path.clone(), id);
        let (manifest, manifest_problem) = match manifest {
            Ok(m) => (m, None),
            Err(finding) => (None, Some(finding)),
        };
        self.tree.files.push(FileEntry { path, name, probed, manifest, manifest_problem });
        id
    }

    fn unreadable(&mut self, path: &Path, e: std::io::Error) {
        let error = Error::io(e, "cannot read it; points in it are not shown").at_path(path);
        self.tree.findings.push(Finding::from_error(&error, path));
    }
}
