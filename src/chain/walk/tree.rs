//! What a walk over a backup directory has seen.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::pointer::normalise;
use super::probed::Probed;
use crate::error::{Finding, Kind};
use crate::layout::Level;
use crate::layout::name::Name;
use crate::manifest::Brief;

/// Index into [`Tree::files`].
pub(in crate::chain) type FileId = usize;

/// A plain file.
pub(in crate::chain) struct FileEntry {
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
    /// How it is read.
    pub decision: Decision,
}

/// What a link in the place of a backup is.
pub(in crate::chain) const LINK: &str = "a symbolic link, which is not followed,";
/// What to do about that.
pub(in crate::chain) const LINK_REMEDY: &str =
    "put the image itself here, or name the directory that it is in";

/// A `FULL-<disk>` or `COPY-<disk>` link.
pub(in crate::chain) struct Link {
    /// Its name.
    pub name: OsString,
    /// The level in its name.
    pub level: Level,
    /// The disk in its name.
    pub disk: OsString,
    /// What it says.
    pub text: PathBuf,
    /// The walked file that it leads to.
    pub target: Option<FileId>,
}

/// A folder.
pub(in crate::chain) struct Folder {
    /// Relative to the root; empty for the root itself.
    pub relative: PathBuf,
    /// Absolute path.
    pub path: PathBuf,
    /// Its plain files, by name.
    pub files: Vec<FileId>,
    /// Its links, by name.
    pub links: Vec<Link>,
    /// Images that have a manifest and are gone.
    pub lost: Vec<LostImage>,
}

/// An image that was here once: only its manifest is left.
#[derive(Debug, Clone)]
pub(in crate::chain) struct LostImage {
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
pub(in crate::chain) struct Tree {
    /// Absolute path without symbolic links.
    pub root: PathBuf,
    /// The same directory as the user called it: images may name it so.
    pub called: PathBuf,
    /// All folders, each after the one that contains it.
    pub folders: Vec<Folder>,
    /// All files.
    pub files: Vec<FileEntry>,
    /// See [`crate::chain::scan::ScanOptions::salvage`].
    pub salvage: bool,
    /// By path, as a string of bytes: that is cheaper to hash than its components.
    pub by_path: HashMap<OsString, FileId>,
    /// What files depended on at the last scan, if they have not changed since.
    pub former: HashMap<FileId, PathBuf>,
    /// What belongs to no disk.
    pub findings: Vec<Finding>,
}

impl Tree {
    /// The walked file that `name`, as it stands in a file of `folder`, means. Purely by name.
    pub(crate) fn lookup(&self, folder: &Path, name: &Path) -> Option<FileId> {
        let path = normalise(folder, name)?;
        if let Some(id) = self.by_path.get(path.as_os_str()) {
            return Some(*id);
        }
        let inside = path.strip_prefix(&self.called).ok()?;
        self.by_path.get(self.root.join(inside).as_os_str()).copied()
    }

    /// Whether there is a walked file at `path`.
    pub(crate) fn has(&self, path: &Path) -> bool {
        self.by_path.contains_key(path.as_os_str())
    }

    /// What is to be said of a link, unless it leads to what was walked: behind it there may be
    /// backups. What it leads to is not asked, as nothing outside may be touched.
    pub(crate) fn outside(&self, folder: &Path, name: &OsStr, text: &Path) -> Option<Finding> {
        let inside = |path: &Path| path.starts_with(&self.root) || path.starts_with(&self.called);
        if normalise(folder, text).is_some_and(|path| inside(&path)) {
            return None;
        }
        let what = "a symbolic link that leads out of the backup directory: skipped";
        let finding = Finding::warning(Kind::Unsupported, folder.join(name), what);
        let remedy =
            "bind-mount the folder there, move it here, or name it instead of this directory";
        Some(Finding { remedy: Some(remedy.into()), ..finding })
    }

    pub(crate) fn resolve_links(&mut self) {
        for f in 0..self.folders.len() {
            for l in 0..self.folders[f].links.len() {
                let folder = &self.folders[f].path;
                let found = self.lookup(folder, &self.folders[f].links[l].text);
                self.folders[f].links[l].target = found;
            }
        }
    }
}

/// How a file is read.
#[derive(Debug, Default)]
pub(in crate::chain) struct Decision {
    pub(in crate::chain) reading: Reading,
    /// Whether something other than its bytes says that it is qcow2.
    pub(in crate::chain) proved: bool,
    /// What a user should know about it.
    pub note: Option<Finding>,
}

#[derive(Debug, Default)]
pub(in crate::chain) enum Reading {
    /// As its content says.
    #[default]
    Content,
    /// The guest's bytes one to one, whatever they begin with.
    Raw,
    /// Not at all, until somebody says what it is.
    Undecided(Finding),
}
