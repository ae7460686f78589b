//! What the source directory has to send: each file of its points once, in an order in which everything comes after
//! what it builds on.
//!
//! Nothing is locked: the source is read as a mount reads it. What was seen here is compared again before a file
//! becomes a point at the other side ([`Item::check_unchanged`]): the file, its manifest, what it builds on, and that
//! nobody has begun to rewrite the folder. Whoever rewrites one writes a journal first. An image that had no manifest
//! must still have none: a backup that was at its end has one now, which says more than what was made up here.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::name::{FolderPath, SmallKind, WireName};
use crate::chain;
use crate::chain::{Catalog, Disk, Point};
use crate::error::{Error, Kind, Result};
use crate::folder::{EntryKind, Folder};
use crate::journal::unfinished;
use crate::layout::Level;
use crate::manifest;
use crate::manifest::{ConfigFile, Manifest, fingerprint_of};
use crate::storage::{ReadAt, SourceFile};

/// One file of a point.
pub(crate) struct Item {
    /// Its folder.
    pub folder: FolderPath,
    /// Its name.
    pub name: WireName,
    /// The file, as the scan saw it; none of one that cannot be sent.
    pub file: Option<Arc<SourceFile>>,
    /// Its place in the catalog: disk, and point in it.
    pub at: (usize, usize),
    /// When its point was taken, in seconds since the epoch.
    pub time: i64,
    /// The items that it builds on, each before this one.
    pub needs: Vec<usize>,
    /// Why it cannot be sent.
    pub blocked: Option<String>,
    /// Its manifest.
    pub manifest: SourceManifest,
    /// Names of other images whose states are of the same time.
    pub twins: Vec<WireName>,
}

/// The manifest that goes with an image.
#[derive(Debug, Clone)]
pub(crate) enum SourceManifest {
    /// There is none, and none can be made.
    Absent,
    /// There is none; what is known of the point is written down as one.
    Made,
    /// It is beside the image: BLAKE3 of its text, the image's hash, and the files kept with it.
    Beside(blake3::Hash, Option<String>, Vec<ConfigFile>),
}

/// A small file that goes with the images of a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SmallFile {
    /// Its folder.
    pub folder: FolderPath,
    /// Its name.
    pub name: WireName,
    /// What it is.
    pub kind: SmallKind,
}

impl Item {
    /// Its path below the backup directory.
    pub(crate) fn path(&self) -> PathBuf {
        self.folder.path().join(self.name.as_os_str())
    }

    /// The file.
    ///
    /// # Errors
    /// `Incomplete` if it cannot be sent.
    pub(crate) fn file(&self) -> Result<&Arc<SourceFile>> {
        let why = || self.blocked.clone().unwrap_or_default();
        self.file.as_ref().ok_or_else(|| Error::new(Kind::Incomplete, why()))
    }

    /// Length of the file in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.file.as_ref().map_or(0, |f| f.identity().size)
    }

    /// The hash of the file that its manifest has.
    pub(crate) fn blake3(&self) -> Option<&str> {
        match &self.manifest {
            SourceManifest::Beside(_, hash, _) => hash.as_deref(),
            SourceManifest::Absent | SourceManifest::Made => None,
        }
    }

    /// The file's fingerprint, as manifests have it.
    ///
    /// # Errors
    /// It cannot be read, or has changed.
    pub(crate) fn fingerprint(&self) -> Result<String> {
        let file = self.file()?;
        let opened = file.file()?;
        let text = fingerprint_of(&opened)
            .map_err(|e| Error::io(e, "cannot read the image").at_path(file.path()))?;
        file.check_unchanged()?;
        Ok(text)
    }

    /// Fails if its file or manifest are not what they were, or somebody has begun to rewrite its folder. Asked
    /// last, after all was read.
    ///
    /// # Errors
    /// `Changed`, or what the operating system said.
    pub(crate) fn check_unchanged(&self) -> Result<()> {
        let file = self.file()?;
        let folder = file.path().parent().unwrap_or(file.path());
        match &self.manifest {
            SourceManifest::Beside(hash, ..) => {
                let text = self.manifest_text()?;
                if text.is_none_or(|text| blake3::hash(&text) != *hash) {
                    return Err(changed(file.path(), "its manifest changed"));
                }
            }
            // First whether one is announced: that goes when the manifest is there.
            SourceManifest::Absent | SourceManifest::Made => {
                let is_announced = is_announced(folder, self.name.as_os_str())?;
                if is_announced || self.manifest_text()?.is_some() {
                    return Err(changed(file.path(), "it got its manifest"));
                }
            }
        }
        file.check_unchanged()?;
        match is_being_rewritten(folder)? {
            true => Err(changed(folder, "a command has begun to change this folder")),
            false => Ok(()),
        }
    }

    /// The text of the manifest beside the image, if it has one.
    ///
    /// # Errors
    /// What the operating system said.
    pub(crate) fn manifest_text(&self) -> Result<Option<Vec<u8>>> {
        let file = self.file()?;
        let folder = file.path().parent().unwrap_or(file.path());
        let folder = Folder::open(folder)
            .map_err(|e| Error::io(e, "cannot open the folder").at_path(folder))?;
        manifest::read_text(&folder, self.name.as_os_str())
    }
}

fn changed(path: &Path, what: &str) -> Error {
    Error::new(Kind::Changed, format!("{what} while it was being replicated"))
        .at_path(path)
        .remedy("run it again")
}

/// Whether the manifest of an image is announced: a backup is at its end, or was interrupted there.
fn is_announced(folder: &Path, image: &OsStr) -> Result<bool> {
    let side = Folder::open(folder).and_then(|f| f.folder(manifest::FOLDER));
    let failed = |e| Error::io(e, "cannot open the folder for manifests").at_path(folder);
    let side = crate::folder::absent_is_none(side).map_err(failed)?;
    Ok(side.is_some_and(|side| side.has(manifest::announcement(image))))
}

/// Whether something in the folder is unfinished. (Journals of the folders above are about other files.)
fn is_being_rewritten(folder: &Path) -> Result<bool> {
    let failed = |e| Error::io(e, "cannot read the folder for manifests").at_path(folder);
    let side = Folder::open(folder).and_then(|f| f.folder(manifest::FOLDER));
    let Some(side) = crate::folder::absent_is_none(side).map_err(failed)? else {
        return Ok(false);
    };
    let entries = side.entries().map_err(failed)?;
    Ok(!unfinished::findings(&side, &entries).is_empty())
}

/// What a directory has to send.
#[derive(Default)]
pub(crate) struct Source {
    /// All files of its points.
    pub items: Vec<Item>,
    /// Files that no message can name, and why.
    pub refused: Vec<(PathBuf, String)>,
}

impl Source {
    /// That of a directory that was scanned.
    pub(crate) fn of(catalog: &Catalog) -> Source {
        let mut list = Items {
            catalog,
            source: Source::default(),
            by_path: HashMap::new(),
            rewritten: unfinished::folders(&catalog.root).into_iter().collect(),
        };
        for (d, disk) in catalog.disks.iter().enumerate() {
            for p in 0..disk.points.len() {
                list.point((d, p), disk);
            }
        }
        list.source
    }
}

struct Items<'a> {
    catalog: &'a Catalog,
    source: Source,
    /// `None`: it is refused.
    by_path: HashMap<PathBuf, Option<usize>>,
    /// Folders in which something is unfinished.
    rewritten: HashSet<PathBuf>,
}

impl Items<'_> {
    fn point(&mut self, at: (usize, usize), disk: &Disk) {
        let point = &disk.points[at.1];
        let parent = point.parent.and_then(|j| self.by_path.get(&disk.points[j].source).copied());
        let mut needs: Vec<Option<usize>> = parent.into_iter().collect();
        for layer in &point.layers {
            // What is below comes first, and the point's own file last.
            let files = layer.data_file.iter().chain([&layer.file]);
            for file in files.filter(|f| f.path() != point.source) {
                needs.push(self.add(file.path(), Some(file.clone()), at, point));
            }
        }
        let own = point.layers.iter().map(|l| &l.file).find(|f| f.path() == point.source);
        let Some(index) = self.add(&point.source, own.cloned(), at, point) else { return };
        // Points inside an image say nothing of the image.
        if point.level != Level::Snapshot {
            self.is_of(index, at, disk, needs);
        }
    }

    /// Adds to an item what its point tells.
    fn is_of(&mut self, index: usize, at: (usize, usize), disk: &Disk, needs: Vec<Option<usize>>) {
        let Some(item) = self.source.items.get_mut(index) else { return };
        if needs.contains(&None) {
            item.blocked
                .get_or_insert_with(|| "it depends on a file that is not replicated".into());
        }
        item.needs.extend(needs.into_iter().flatten().filter(|n| *n < index));
        item.needs.sort_unstable();
        item.needs.dedup();
        (item.at, item.time) = (at, disk.points[at.1].time);
        if matches!(item.manifest, SourceManifest::Absent)
            && chain::check_formats(disk, at.1).is_ok()
            && chain::describe(disk, at.1).is_some()
        {
            item.manifest = SourceManifest::Made;
        }
        item.twins = twins(&item.name);
    }

    /// The item of a file, made if it is new; `None` of one that is refused.
    fn add(
        &mut self,
        path: &Path,
        file: Option<Arc<SourceFile>>,
        at: (usize, usize),
        point: &Point,
    ) -> Option<usize> {
        if let Some(known) = self.by_path.get(path) {
            return *known;
        }
        let (folder, name) = match self.place(path) {
            Ok(place) => place,
            Err(e) => {
                self.by_path.insert(path.to_path_buf(), None);
                self.source.refused.push((path.to_path_buf(), e.report()));
                return None;
            }
        };
        let index = self.source.items.len();
        self.by_path.insert(path.to_path_buf(), Some(index));
        let mut blocked = point.unavailable.as_ref().map(|f| f.to_string());
        if self.rewritten.contains(path.parent().unwrap_or(path)) {
            blocked.get_or_insert_with(|| {
                "a command that changes its folder is running or was interrupted".to_string()
            });
        }
        let manifest = beside(path).unwrap_or_else(|e| {
            blocked.get_or_insert_with(|| e.report());
            SourceManifest::Absent
        });
        let (needs, twins, time) = (Vec::new(), Vec::new(), point.time);
        let file = file.filter(|_| blocked.is_none());
        let item = Item { folder, name, file, at, time, needs, blocked, manifest, twins };
        self.source.items.push(item);
        Some(index)
    }

    fn place(&self, path: &Path) -> Result<(FolderPath, WireName)> {
        let outside = |_| Error::new(Kind::Unsupported, "a file outside the backup directory");
        let relative = path.strip_prefix(&self.catalog.root).map_err(outside)?;
        let folder = FolderPath::of(relative.parent().unwrap_or(Path::new("")))?;
        Ok((folder, WireName::of(relative.file_name().unwrap_or_default())?))
    }
}

/// The manifest of an image. (One that is announced and not there yet makes no point, and is none of the catalog's.)
fn beside(path: &Path) -> Result<SourceManifest> {
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        return Ok(SourceManifest::Absent);
    };
    let failed = |e| Error::io(e, "cannot open the folder").at_path(dir);
    let folder = Folder::open(dir).map_err(failed)?;
    let Some(text) = manifest::read_text(&folder, name)? else {
        return Ok(SourceManifest::Absent);
    };
    let m: Manifest =
        manifest::parse(&text).map_err(|e| e.at_path(manifest::manifest_path(dir, name)))?;
    let kept = m.config_files.into_iter().filter(|c| !c.stored.is_empty()).collect();
    Ok(SourceManifest::Beside(blake3::hash(&text), m.blake3, kept))
}

/// The names that an image of the same disk and time would have at another level: what `consolidate` has made a FULL
/// of, here or there.
fn twins(name: &WireName) -> Vec<WireName> {
    let own = name.as_os_str();
    let crate::layout::name::Name::Backup { stamp: Some(_), .. } = crate::layout::name::parse(own)
    else {
        return Vec::new();
    };
    let Some((level, rest)) = own.to_str().and_then(|n| n.split_once('-')) else {
        return Vec::new();
    };
    let others = ["FULL", "INC", "DIFF"].into_iter().filter(|l| !l.eq_ignore_ascii_case(level));
    others.filter_map(|l| WireName::of(OsStr::new(&format!("{l}-{rest}"))).ok()).collect()
}

/// The small files beside the items, and in the folders above them: ids, descriptions of disks, links.
///
/// # Errors
/// A folder cannot be read.
pub(crate) fn small_files(root: &Path, items: &[Item]) -> Result<Vec<SmallFile>> {
    let mut folders = BTreeSet::from([FolderPath::default()]);
    for item in items.iter().filter(|i| i.file.is_some()) {
        let mut at = Some(item.folder.clone());
        while let Some(folder) = at.filter(|f| folders.insert(f.clone())) {
            at = folder.above();
        }
    }
    let mut found = Vec::new();
    for folder in folders {
        let path = root.join(folder.path());
        let entries = Folder::open(&path).and_then(|f| f.entries());
        let entries = entries.map_err(|e| Error::io(e, "cannot read the folder").at_path(&path))?;
        let mut names: BTreeMap<OsString, SmallKind> = BTreeMap::new();
        for e in entries.into_iter().filter(|e| matches!(e.kind, EntryKind::File | EntryKind::Link))
        {
            let kind = SmallKind::beside_images(&e.name, e.kind == EntryKind::Link);
            names.extend(kind.map(|kind| (e.name, kind)));
        }
        let small = names.into_iter().filter_map(|(name, kind)| {
            Some(SmallFile { folder: folder.clone(), name: WireName::of(&name).ok()?, kind })
        });
        found.extend(small);
    }
    Ok(found)
}

/// The contents of a small file; of a link the name that it leads to. `None` if there is none, or it leads to no name.
///
/// # Errors
/// What the operating system said; it is too large.
pub(crate) fn small_bytes(root: &Path, file: &SmallFile) -> Result<Option<Vec<u8>>> {
    let path = root.join(file.folder.path());
    let name = file.name.as_os_str();
    let failed = |e| Error::io(e, "cannot read the file").at_path(path.join(name));
    let folder = Folder::open(&path).map_err(failed)?;
    match file.kind {
        SmallKind::Link => {
            let Some(text) =
                crate::folder::absent_is_none(folder.read_link(name)).map_err(failed)?
            else {
                return Ok(None);
            };
            Ok(text.file_name().map(|n| std::os::unix::ffi::OsStrExt::as_bytes(n).to_vec()))
        }
        SmallKind::Kept => {
            let Some(side) =
                crate::folder::absent_is_none(folder.folder(manifest::FOLDER)).map_err(failed)?
            else {
                return Ok(None);
            };
            side.read_if_there(name, file.kind.largest()).map_err(failed)
        }
        SmallKind::Id | SmallKind::DiskConfig => {
            folder.read_if_there(name, file.kind.largest()).map_err(failed)
        }
    }
}
