//! Walks a backup directory and finds its disks, chains and points.
//!
//! The walk goes to any depth and follows no symbolic link; the `FULL-<disk>` links of
//! `--no-timestamp` are read as text and looked up among the files that were walked. A name found
//! inside an image is looked up in the same way, so nothing outside the directory is ever touched.
//!
//! The top is held by a descriptor as long as the walk lasts, and each folder below it while its files
//! are looked at. Whatever changes its name meanwhile, what is read is what was in that folder.
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

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::Catalog;
use super::link::format;
use super::points::assemble;
use super::walk::probe::ManifestResult;
use super::walk::side_folder::SideFolder;
use super::walk::tree::{Decision, FileEntry, Folder, LINK, LINK_REMEDY, Link, Tree};
use crate::error::{Error, Finding, Kind, Result, Severity};
use crate::folder::{Entry, EntryKind};
use crate::layout::name;
use crate::layout::name::Name;
use crate::{folder, manifest};

pub use super::link::format::FormatOverride;
pub use super::walk::probe::ProbeCache;

/// How to scan.
#[derive(Debug, Clone, Default)]
pub struct ScanOptions {
    /// Folders that are omitted, as absolute paths: a mount point inside the backup directory.
    pub skip: Vec<PathBuf>,
    /// The directory as the user calls it, absolute, where that is by way of a link: images may name
    /// it so.
    pub called: Option<PathBuf>,
    /// What the user says of images about which nothing else decides.
    pub format_override: Option<FormatOverride>,
    /// Qcow2 images that are shorter than their manifests say are served as far as they go: for who wants what is
    /// left.
    pub salvage: bool,
}

/// What is said of an image that is announced and has no manifest yet.
pub(crate) const AT_ITS_END: &str = "it has no manifest yet, and is no point until then: a backup is at its end, or was interrupted there";

#[cfg(test)]
thread_local! {
    /// How many times a thread has scanned a directory.
    pub(crate) static SCANS: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
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
    #[cfg(test)]
    SCANS.set(SCANS.get() + 1);
    let failed = |e| Error::io(e, "cannot read the backup directory").at_path(root);
    let path = folder::resolve(root).map_err(failed)?;
    let top = folder::Folder::open(&path).map_err(failed)?;
    top.check_readable().map_err(failed)?;
    let called = match &options.called {
        Some(called) => called.clone(),
        None => std::path::absolute(root).map_err(failed)?,
    };
    let mut walk = Walk {
        options,
        previous,
        cache: ProbeCache::default(),
        unfinished: Vec::new(),
        loose_links: Vec::new(),
        tree: Tree {
            root: path,
            called,
            folders: Vec::new(),
            files: Vec::new(),
            salvage: options.salvage,
            by_path: HashMap::new(),
            former: HashMap::new(),
            findings: Vec::new(),
        },
    };
    walk.run(&top);
    let loose = std::mem::take(&mut walk.loose_links);
    let (mut tree, mut cache) = (walk.tree, walk.cache);
    let outside =
        loose.into_iter().filter_map(|(dir, name, text)| tree.outside(&dir, &name, &text));
    let outside: Vec<Finding> = outside.collect();
    tree.findings.extend(outside);
    tree.findings.append(&mut walk.unfinished);
    tree.resolve_links();
    format::decide(&mut tree, options.format_override.as_ref());
    if let Some(previous) = previous {
        tree.former = previous.bases_of(&tree.files);
    }
    let (catalog, bases) = assemble::assemble(tree);
    cache.remember_bases(bases);
    Ok((catalog, cache))
}

struct Walk<'a> {
    options: &'a ScanOptions,
    previous: Option<&'a ProbeCache>,
    cache: ProbeCache,
    tree: Tree,
    /// What runs that were interrupted left.
    unfinished: Vec<Finding>,
    /// Links that stand for no backup: folder, name, and what they say.
    loose_links: Vec<(PathBuf, OsString, PathBuf)>,
}

impl Walk<'_> {
    fn run(&mut self, top: &folder::Folder) {
        let device = top.metadata().map(|m| m.dev()).unwrap_or(0);
        let mut todo = vec![(PathBuf::new(), device)];
        while let Some((relative, device)) = todo.pop() {
            let path = match relative.as_os_str().is_empty() {
                true => self.tree.root.clone(),
                false => self.tree.root.join(&relative),
            };
            if self.options.skip.contains(&path) {
                continue;
            }
            let opened = top.beneath(&relative);
            let meta = opened.as_ref().ok().and_then(|f| f.metadata().ok());
            let here = meta.map_or(device, |m| m.dev());
            // A mount of ours inside the backup directory would show every point again.
            if here != device && opened.as_ref().is_ok_and(is_own_mount) {
                continue;
            }
            let folder =
                Folder { relative, path, files: Vec::new(), links: Vec::new(), lost: Vec::new() };
            let mut folders = self.folder(folder, opened);
            folders.reverse();
            todo.extend(folders.into_iter().map(|f| (f, here)));
        }
    }

    /// Takes in one folder; returns the folders in it, sorted, relative to the root.
    fn folder(&mut self, folder: Folder, open: std::io::Result<folder::Folder>) -> Vec<PathBuf> {
        let mut folder = folder;
        let open = match open {
            Ok(open) => open,
            Err(e) => {
                self.unreadable(&folder.path, e);
                self.tree.folders.push(folder);
                return Vec::new();
            }
        };
        let mut entries = Vec::new();
        if let Err(e) = open.list(&mut entries) {
            self.unreadable(&folder.path, e);
        }
        entries.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        let side = SideFolder::of(&open, &entries, &mut self.tree.findings);
        let mut folders = Vec::new();
        for entry in &entries {
            // Before anything is asked about it: a mount of ours there would take that for use.
            if !self.options.skip.is_empty()
                && self.options.skip.contains(&folder.path.join(&entry.name))
            {
                continue;
            }
            match entry.kind {
                EntryKind::Folder if entry.name == manifest::FOLDER => {}
                EntryKind::Folder => folders.push(folder.relative.join(&entry.name)),
                _ => self.entry(entry, &open, &side, &mut folder),
            }
        }
        if let Some(contents) = side.list(&folder.path, &mut self.tree.findings) {
            folder.lost = contents.lost(|name| self.tree.has(&folder.path.join(name)));
            self.tree.findings.extend(contents.hidden());
            self.unfinished.extend(contents.unfinished());
        }
        self.tree.folders.push(folder);
        folders
    }

    fn entry(
        &mut self,
        entry: &Entry,
        open: &folder::Folder,
        side: &SideFolder,
        folder: &mut Folder,
    ) {
        match entry.kind {
            EntryKind::File => self.file(&entry.name, open, side, folder),
            EntryKind::Link => self.link(&entry.name, open, folder),
            EntryKind::Other => {
                let finding = no_backup(&entry.name, "a pipe, socket or device", &folder.path);
                self.tree.findings.extend(finding);
            }
            EntryKind::Folder => {}
        }
    }

    fn link(&mut self, name: &OsStr, open: &folder::Folder, folder: &mut Folder) {
        let Ok(text) = open.read_link(name) else { return };
        let Some((level, disk)) = name::parse_link(name) else {
            if let Some(finding) = no_backup(name, LINK, &folder.path) {
                let remedy = Some(LINK_REMEDY.to_string());
                self.tree.findings.push(Finding { remedy, ..finding });
            // `image` is what qmprestore leaves beside a chain, as an absolute path.
            } else if name::parse(name) != Name::Ignored && name != "image" {
                self.loose_links.push((folder.path.clone(), name.to_os_string(), text));
            }
            return;
        };
        let (name, disk) = (name.to_os_string(), disk.to_os_string());
        folder.links.push(Link { name, level, disk, text, target: None });
    }

    fn file(
        &mut self,
        name: &OsStr,
        open: &folder::Folder,
        side: &SideFolder,
        folder: &mut Folder,
    ) {
        let path = folder.path.join(name);
        let handle = match open.handle(name) {
            Ok(handle) => handle,
            // Removed or renamed since the folder was read.
            Err(e) if e.kind() == ErrorKind::NotFound => return,
            Err(e) => return self.unreadable(&path, e),
        };
        // Exchanged since then: the next scan, which the change leads to, tells what for.
        if !handle.metadata().is_file() {
            let what = "something that was replaced while it was read";
            return self.tree.findings.extend(no_backup(name, what, &folder.path));
        }
        let parsed = name::parse(name);
        let wanted = parsed != Name::Ignored;
        let probed = self.cache.probe(&path, &handle, wanted, self.previous);
        let (manifest, is_point) = match wanted {
            true => self.manifest(&path, side),
            false => (Ok(None), true),
        };
        let (manifest, manifest_problem) = match manifest {
            Ok(m) => (m, None),
            Err(finding) => (None, Some(finding)),
        };
        let id = self.tree.files.len();
        self.tree.by_path.insert(path.as_os_str().to_os_string(), id);
        let decision = Decision::default();
        // Its content is looked at all the same: with its manifest it is a point, and the same file.
        let parsed = if is_point { parsed } else { Name::Ignored };
        let entry = FileEntry { path, name: parsed, probed, manifest, manifest_problem, decision };
        self.tree.files.push(entry);
        folder.files.push(id);
    }

    /// The manifest of the image at `path`, and whether that is a point: it is none as long as its manifest is announced
    /// and not there. That is the end of a backup or a copy, or what is left of one that was killed.
    fn manifest(&mut self, path: &Path, side: &SideFolder) -> (ManifestResult, bool) {
        let found = self.cache.manifest(path, side, self.previous);
        if !matches!((&found, side), (Ok(None), SideFolder::Open(_))) {
            return (found, true);
        }
        let announcement = manifest::announcement(path.file_name().unwrap_or_default());
        match side.handle(&announcement).map(|there| there.is_some()) {
            Err(finding) => (Err(finding), true),
            // The announcement goes when the manifest is there, which may have been just now.
            Ok(false) => (self.cache.manifest(path, side, self.previous), true),
            Ok(true) => {
                let remedy =
                    "'fleecefs recover', or the next command that writes there, finishes it";
                let finding = Finding::warning(Kind::Incomplete, path, AT_ITS_END);
                let remedy = Some(remedy.into());
                self.unfinished.push(Finding { severity: Severity::Note, remedy, ..finding });
                (Ok(None), false)
            }
        }
    }

    fn unreadable(&mut self, path: &Path, e: std::io::Error) {
        let error = Error::io(e, "cannot read it; points in it are not shown").at_path(path);
        self.tree.findings.push(Finding::from_error(&error, path));
    }
}

/// What is to be said of something in the place of a backup that is none.
fn no_backup(name: &OsStr, what: &str, folder: &Path) -> Option<Finding> {
    let Name::Backup { stamp: Some(_), .. } = name::parse(name) else { return None };
    let what = format!("{what} where a backup should be");
    Some(Finding::warning(Kind::Unsupported, folder.join(name), what))
}

/// Whether a folder is the top of a mount of ours, which shows no files.
fn is_own_mount(folder: &folder::Folder) -> bool {
    let status = folder.folder(manifest::FOLDER).and_then(|f| f.look("status.json"));
    status.is_ok_and(|m| m.is_file()) && folder.is_fuse()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::Format;
    use crate::layer::qcow2::create::NewImage;

    #[test]
    fn an_image_whose_manifest_is_announced_is_no_point_until_it_has_it() {
        let dir = tempfile::tempdir().unwrap();
        let (image, side) =
            (dir.path().join("sda/FULL-1700000000-sda"), dir.path().join("sda/.fleecefs"));
        std::fs::create_dir_all(&side).unwrap();
        let file = std::fs::File::options().write(true).read(true).create_new(true).open(&image);
        NewImage::plain(1 << 20, 65536).write(&file.unwrap(), &image).unwrap();
        let look = |previous: Option<&ProbeCache>| {
            scan(dir.path(), &ScanOptions::default(), previous).unwrap()
        };
        let (catalog, cache) = look(None);
        assert!(catalog.disks.len() == 1 && catalog.findings.is_empty(), "{:?}", catalog.findings);
        let mut m = crate::chain::describe(&catalog.disks[0], 0).unwrap();
        m.consistency.reason = "of its own".into();
        // As a backup, or a copy, that is at its end.
        let announcement = side.join("FULL-1700000000-sda.partial.json");
        std::fs::write(&announcement, "whatever").unwrap();
        let (catalog, cache) = look(Some(&cache));
        assert!(catalog.disks.is_empty());
        let [finding] = &catalog.findings[..] else { panic!("{:?}", catalog.findings) };
        assert_eq!(
            (finding.severity, &finding.path),
            (Severity::Note, &image.canonicalize().unwrap())
        );
        // What an earlier scan of the same file found in it holds.
        let (empty, fresh) = look(None);
        assert!(empty.disks.is_empty());
        manifest::write(&image.parent().unwrap().canonicalize().unwrap(), &m).unwrap();
        for cache in [cache, fresh] {
            let (catalog, _) = look(Some(&cache));
            assert_eq!(catalog.disks[0].points.len(), 1, "{:?}", catalog.findings);
            assert_eq!(catalog.disks[0].points[0].layers[0].format, Format::Qcow2);
        }
        std::fs::remove_file(&announcement).unwrap();
        assert_eq!(look(None).0.disks.len(), 1);
    }
}
