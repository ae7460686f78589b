//! Carries a plan out.
//!
//! Within a chain the newest point goes first, so that whatever dies whenever leaves each chain
//! whole up to where it now ends. Each folder has a journal of what is to go, written before the
//! first file is removed: the next run finishes it, and until then `verify` knows that a manifest
//! without an image is no lost point.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::{config, files};
use crate::chain::{Catalog, Disk};
use crate::error::{Error, Kind, Result};
use crate::folder::{FileId, Folder, absent_is_none};
use crate::job::Work;
use crate::journal::linking::Linking;
use crate::journal::removal::{Publish, Removal};
use crate::journal::{linking, removal};
use crate::layer::Format;
use crate::manifest::Manifest;
use crate::progress::Progress;
use crate::prune::plan::Plan;
use crate::restore::check_removable;
use crate::storage::{Identity, SourceFile};
use crate::text::path_text;
use crate::{manifest, rewrite};

/// Which files names stood for when the folder was read; empty for whoever finishes the work of
/// another.
pub(crate) type KnownFiles = BTreeMap<String, FileId>;

/// What goes from one folder.
struct FolderRemoval {
    /// The folder itself.
    id: FileId,
    /// In this order.
    names: Vec<String>,
    known: KnownFiles,
}

/// Deletes what `plan`, made from `catalog`, says. The caller holds the lock.
///
/// # Errors
/// A file cannot be removed, or is not what it was when the plan was made. What went before stays
/// gone, in an order that leaves every chain whole.
pub fn execute(catalog: &Catalog, plan: &Plan, progress: &dyn Progress) -> Result<()> {
    let mut folders: BTreeMap<PathBuf, FolderRemoval> = BTreeMap::new();
    let kept = kept_files(catalog, plan);
    for (disk, plan) in catalog.disks.iter().zip(&plan.disks) {
        let goes = |i: usize| plan.points.get(i).is_some_and(|p| p.keep.is_empty());
        let mut held = None;
        for i in order(disk, goes) {
            for path in own_files(disk, i).into_iter().filter(|f| !kept.contains(f.as_path())) {
                let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else { continue };
                let folder = open_once(&mut held, dir)?;
                let going = match folders.entry(dir.to_path_buf()) {
                    Entry::Occupied(e) => e.into_mut(),
                    Entry::Vacant(e) => e.insert(FolderRemoval::new(folder)?),
                };
                going.add(folder, disk, i, &path, text(&path, name)?)?;
            }
        }
    }
    for (dir, going) in folders {
        let folder = rewrite::open_folder(&dir)?;
        going.check_folder(&folder)?;
        let removal = Removal { remove: going.names, ..Removal::default() };
        removal::write_in(&folder, &removal)?;
        remove_all(&folder, &removal.remove, None, &going.known, progress)?;
        removal::clear_in(&folder)?;
        config::sweep(&folder)?;
    }
    Ok(())
}

/// Opens `dir` unless it is the one that is held.
fn open_once<'a>(held: &'a mut Option<Folder>, dir: &Path) -> Result<&'a Folder> {
    let folder = match held.take().filter(|f| f.path() == dir) {
        Some(folder) => folder,
        None => rewrite::open_folder(dir)?,
    };
    Ok(held.insert(folder))
}

impl FolderRemoval {
    fn new(folder: &Folder) -> Result<Self> {
        Ok(FolderRemoval { id: folder_id(folder)?, names: Vec::new(), known: KnownFiles::new() })
    }

    /// Adds a file of point `i`, if it is what it was when the folder was read.
    fn add(
        &mut self,
        folder: &Folder,
        disk: &Disk,
        i: usize,
        path: &Path,
        name: String,
    ) -> Result<()> {
        if self.known.contains_key(&name) {
            return Ok(());
        }
        let failed = |e| Error::io(e, "cannot check the file").at_path(path);
        let now = Identity::of(&folder.look(&name).map_err(failed)?);
        if let Some(file) = seen(disk, i, path) {
            let was = file.identity();
            if (now.dev, now.ino) != (was.dev, was.ino) {
                return Err(files::exchanged(path));
            }
            if !file.has_same_bytes(&now) {
                let what = "the file changed after the backup directory was read";
                return Err(Error::new(Kind::Changed, what).at_path(path).remedy("try again"));
            }
        }
        check_removable(folder, OsStr::new(&name))?;
        self.known.insert(name.clone(), FileId { dev: now.dev, ino: now.ino });
        self.names.push(name);
        Ok(())
    }

    /// Fails if the path leads to another folder by now.
    fn check_folder(&self, folder: &Folder) -> Result<()> {
        match folder_id(folder)? == self.id {
            true => Ok(()),
            false => Err(files::exchanged(folder.path())),
        }
    }
}

fn folder_id(folder: &Folder) -> Result<FileId> {
    let meta = folder.metadata();
    let meta = meta.map_err(|e| Error::io(e, "cannot check it").at_path(folder.path()))?;
    Ok(FileId::of(&meta))
}

/// The file `path` of point `i` as the scan saw it; `None` if the point could not be read.
fn seen<'a>(disk: &'a Disk, i: usize, path: &Path) -> Option<&'a SourceFile> {
    let layers = disk.points[i].layers.iter();
    let mut files = layers.flat_map(|l| std::iter::once(&l.file).chain(&l.data_file));
    files.find(|f| f.path() == path).map(|f| &**f)
}

/// The names in the journal are text; an image whose name is none was not made by a backup.
fn text(path: &Path, name: &OsStr) -> Result<String> {
    name.to_str().map(str::to_string).ok_or_else(|| {
        Error::new(Kind::Unsupported, "the file's name is not UTF-8")
            .at_path(path)
            .remedy("remove it by hand")
    })
}

/// What goes: chain by chain, in each the newest first (children come after their parents).
fn order(disk: &Disk, goes: impl Fn(usize) -> bool) -> Vec<usize> {
    let mut numbers: HashMap<&str, usize> = HashMap::new();
    let mut chains: Vec<Vec<usize>> = Vec::new();
    for (i, p) in disk.points.iter().enumerate() {
        let number = *numbers.entry(&p.chain).or_insert(chains.len());
        if number == chains.len() {
            chains.push(Vec::new());
        }
        if goes(i) {
            chains[number].push(i);
        }
    }
    chains.into_iter().flat_map(|chain| chain.into_iter().rev()).collect()
}

/// Every file that some point of some disk still needs: one archive may hold several disks.
fn kept_files<'a>(catalog: &'a Catalog, plan: &Plan) -> BTreeSet<&'a Path> {
    let mut kept = BTreeSet::new();
    for (disk, plan) in catalog.disks.iter().zip(&plan.disks) {
        for (point, plan) in disk.points.iter().zip(&plan.points) {
            if plan.keep.is_empty() {
                continue;
            }
            kept.insert(point.source.as_path());
            for l in &point.layers {
                kept.insert(l.file.path());
                kept.extend(l.data_file.as_ref().map(|d| d.path()));
            }
        }
    }
    kept
}

/// The file that ends point `i`, and its external data file.
fn own_files(disk: &Disk, i: usize) -> Vec<PathBuf> {
    let p = &disk.points[i];
    let mut own = vec![p.source.clone()];
    let layers = p.layers.iter().filter(|l| l.file.path() == p.source);
    own.extend(layers.filter_map(|l| l.data_file.as_ref()).map(|d| d.path().to_path_buf()));
    own
}

/// Removes what the journal of `dir` names; links that led there lead to `new`, or go too.
pub(crate) fn remove_all(
    dir: &Folder,
    remove: &[String],
    new: Option<&str>,
    known: &KnownFiles,
    progress: &dyn Progress,
) -> Result<()> {
    let needed = still_needed(dir, remove)?;
    let gone: Vec<&String> = remove.iter().filter(|n| !needed.contains(*n)).collect();
    for name in &gone {
        remove_one(dir, name, known.get(*name), progress)?;
    }
    let gone: Vec<&OsStr> = gone.into_iter().map(OsStr::new).collect();
    files::lead_links(dir, &gone, new.map(OsStr::new))
}

/// What an image that does not go depends on. The plan saw to it that there is none; but between a
/// run that was interrupted and the one that finishes it, a backup may have been made.
fn still_needed(dir: &Folder, remove: &[String]) -> Result<BTreeSet<String>> {
    let mut lies_on: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let remove: BTreeSet<&String> = remove.iter().collect();
    for image in texts(files::images(dir)?) {
        let (parent, pointer) = files::stated_parent(dir, OsStr::new(&image));
        let stated = texts(parent.into_iter().chain(pointer)).filter(|n| remove.contains(n));
        lies_on.insert(image, stated.collect());
    }
    let staying = lies_on.iter().filter(|(name, _)| !remove.contains(name));
    let mut todo: Vec<&String> = staying.flat_map(|(_, below)| below).collect();
    let mut needed = BTreeSet::new();
    while let Some(name) = todo.pop() {
        if needed.insert(name.clone()) {
            todo.extend(lies_on.get(name).into_iter().flatten());
        }
    }
    Ok(needed)
}

/// Names in a journal are text, so others are of no interest.
fn texts(names: impl IntoIterator<Item = OsString>) -> impl Iterator<Item = String> {
    names.into_iter().filter_map(|n| n.into_string().ok())
}

/// Which file is to go by this name: the one that is known, else the one that its manifest tells of.
fn file_to_go(dir: &Folder, name: &OsStr, known: Option<&FileId>) -> Result<Option<FileId>> {
    if known.is_some() {
        return Ok(known.copied());
    }
    let failed = |e| Error::io(e, "cannot check the file").at_path(dir.join(name));
    let found = absent_is_none(dir.look(name)).map_err(failed)?.map(|meta| FileId::of(&meta));
    if found.is_some() {
        files::check_recorded(dir, name, manifest::read_in(dir, name)?.as_ref())?;
    }
    Ok(found)
}

/// Removes one image, if it is still the file that it was; makes that last, and removes its manifest.
fn remove_one(
    dir: &Folder,
    name: &str,
    known: Option<&FileId>,
    progress: &dyn Progress,
) -> Result<()> {
    let path = dir.join(name);
    let removed = match file_to_go(dir, OsStr::new(name), known)? {
        Some(id) => dir.remove_if_same(name, id),
        None => Ok(false),
    };
    let removed = removed
        .and_then(|was| if was { dir.sync().map(|()| true) } else { Ok(false) })
        .map_err(|e| match check_removable(dir, OsStr::new(name)) {
        Err(why) => why,
        Ok(()) => Error::io(e, "cannot delete the image").at_path(&path),
    })?;
    if removed {
        progress.advance(1);
    } else if dir.has(name) {
        return Err(files::exchanged(&path));
    }
    manifest::remove_in(dir, OsStr::new(name))
}

/// Whether those of these images that are there have their new names too, where a link-disk put them. (A
/// copy of hard links of the whole directory gives each file another name as well.)
fn have_new_names(dir: &Folder, images: &[String], linking: &Linking) -> bool {
    let Some(to) = linking.new_folder(dir.path()) else { return false };
    let going: HashSet<&OsStr> = images.iter().map(OsStr::new).collect();
    let stays = |name: &OsStr| to.path() != dir.path() || !going.contains(name);
    let names = to.entries().unwrap_or_default().into_iter().map(|e| e.name).filter(|n| stays(n));
    let there: HashSet<FileId> =
        names.filter_map(|n| Some(FileId::of(&to.look(&n).ok()?))).collect();
    images.iter().filter_map(|n| dir.look(n).ok()).all(|m| there.contains(&FileId::of(&m)))
}

/// Finishes or takes back what runs that were interrupted left in `dir`: prune, consolidate and the
/// verbs that alter a chain. The caller holds the lock.
///
/// # Errors
/// A journal is damaged, or a step fails again.
pub fn recover(dir: &Path, work: &Work) -> Result<()> {
    let dir = &rewrite::open_folder(dir)?;
    rewrite::recover(dir, work)?;
    let Some(removal) = removal::read_in(dir)? else { return Ok(()) };
    let path = path_text(dir.path());
    work.progress.note(&format!("{path}: finishing an interrupted command"));
    let Some(publish) = &removal.publish else {
        return match linking::read_in(dir)? {
            Some(linking) => finish_link(dir, &removal, &linking, work),
            None => finish_prune(dir, &removal, work),
        };
    };
    let temporary = rewrite::side_folder(dir)?.has(&publish.temporary);
    // The temporary file was complete and synced before the journal was written.
    if temporary || dir.has(&publish.manifest.image) {
        return replace(dir, removal, &KnownFiles::new(), work);
    }
    // Without it nothing went; a pointer that is gone already is no loss.
    removal::clear_in(dir)
}

fn finish_prune(dir: &Folder, removal: &Removal, work: &Work) -> Result<()> {
    match remove_all(dir, &removal.remove, None, &KnownFiles::new(), work.progress) {
        // What goes first depends on what goes later, so what is left is whole: whoever prunes next decides.
        Err(e) if e.kind() == Kind::Changed => {
            log::warn!("an interrupted prune is not finished, what is left stays: {}", e.report());
        }
        done => done?,
    }
    removal::clear_in(dir)?;
    config::sweep(dir)
}

/// Removes the old names of what a link-disk gave new ones.
fn finish_link(dir: &Folder, removal: &Removal, linking: &Linking, work: &Work) -> Result<()> {
    if !have_new_names(dir, &removal.remove, linking) {
        // Nothing goes that is not under its new name: somebody has removed that.
        log::warn!(
            "{}: a link-disk was interrupted, and the new names of its points are missing",
            path_text(dir.path())
        );
        return removal::clear_in(dir);
    }
    let id = |name: &String| Some((name.clone(), FileId::of(&dir.look(name).ok()?)));
    let known = removal.remove.iter().filter_map(id).collect();
    remove_all(dir, &removal.remove, None, &known, work.progress)?;
    removal::clear_in(dir)?;
    config::sweep(dir)
}

/// Publishes a new image and removes what it replaces. Every step may be done already.
///
/// 1. Children that have a backing pointer to what goes lose it, which is noted in the journal:
///    their manifests say the same.
/// 2. The image gets its name. Old and new chain are both there, children depend on the old one.
/// 3. Its manifest is written.
/// 4. The children's manifests name it as their parent.
/// 5. The old images go, newest first.
/// 6. The children that had a pointer get one to the new image.
pub(crate) fn replace(
    dir: &Folder,
    mut removal: Removal,
    known: &KnownFiles,
    work: &Work,
) -> Result<()> {
    let Some(publish) = removal.publish.clone() else { return Ok(()) };
    let new = publish.manifest.image.clone();
    let children = children(dir, &removal, &new)?;
    let before = removal.relink.len();
    let linked = children.iter().filter(|(_, linked)| *linked).map(|(name, _)| name.clone());
    let noted: HashSet<&String> = removal.relink.iter().collect();
    let linked: Vec<String> = linked.filter(|n| !noted.contains(n)).collect();
    removal.relink.extend(linked);
    if removal.relink.len() > before {
        removal::write_in(dir, &removal)?;
    }
    removal.relink.iter().try_for_each(|n| without_pointer(dir, n, &new, work))?;
    publish_new(dir, &publish, known)?;
    for (name, _) in &children {
        if let Some(m) = manifest::read_in(dir, OsStr::new(name))? {
            manifest::write_in(dir, &Manifest { parent: Some(new.clone()), ..m })?;
        }
    }
    remove_all(dir, &removal.remove, Some(&new), known, work.progress)?;
    relink(dir, &removal.relink, &new, work)?;
    removal::clear_in(dir)?;
    config::sweep(dir)
}

/// What stays and depends on what goes, also what a backup has added since an earlier run was broken
/// off; and whether a backing pointer says so.
fn children(dir: &Folder, removal: &Removal, new: &str) -> Result<Vec<(String, bool)>> {
    let mut found = Vec::new();
    let remove: BTreeSet<&String> = removal.remove.iter().collect();
    for image in texts(files::images(dir)?) {
        if image == new || remove.contains(&image) {
            continue;
        }
        let goes = |n: Option<OsString>| texts(n).any(|n| remove.contains(&n));
        let (parent, pointer) = files::stated_parent(dir, OsStr::new(&image));
        let (by_manifest, linked) = (goes(parent), goes(pointer));
        if by_manifest || linked {
            found.push((image, linked));
        }
    }
    Ok(found)
}

/// Takes a backing pointer away, unless it leads to the new image already.
fn without_pointer(dir: &Folder, name: &str, new: &str, work: &Work) -> Result<()> {
    match files::stated_parent(dir, OsStr::new(name)).1 {
        Some(pointer) if pointer != new => files::set_backing(&dir.join(name), None, work),
        _ => Ok(()),
    }
}

/// Steps 2 and 3.
fn publish_new(dir: &Folder, publish: &Publish, known: &KnownFiles) -> Result<()> {
    let name = OsStr::new(&publish.manifest.image);
    let path = dir.join(name);
    match rewrite::side_folder(dir)?.rename_new(&publish.temporary, dir, name) {
        Err(e) if e.kind() != ErrorKind::NotFound || !dir.has(name) => {
            return Err(Error::io(e, "cannot give the new image its name").at_path(&path));
        }
        _ => dir.sync().map_err(|e| Error::io(e, "cannot sync the folder").at_path(dir.path()))?,
    }
    if let Some(id) = known.get(&publish.manifest.image) {
        files::check_same(dir, name, *id)?;
    }
    let recorded = manifest::read_in(dir, name).ok().flatten();
    if recorded.as_ref() == Some(&publish.manifest) {
        return Ok(());
    }
    let fits = |m: &Manifest| files::is_as_recorded(dir, name, m);
    if fits(&publish.manifest).map_err(|e| Error::io(e, "cannot read the image").at_path(&path))? {
        return manifest::write_in(dir, &publish.manifest);
    }
    // It may have been altered since, by somebody who said so.
    if recorded.is_some_and(|m| fits(&m).is_ok_and(|f| f)) {
        return Ok(());
    }
    let what = "a consolidate was interrupted, and this is not the FULL that it made";
    Err(Error::new(Kind::Corrupt, what)
        .at_path(path)
        .remedy("verify the disk, and remove .fleecefs/removal.journal if this file is to stay"))
}

/// Gives those of `names` that are there a backing pointer to `new`.
fn relink(dir: &Folder, names: &[String], new: &str, work: &Work) -> Result<()> {
    let base = dir.join(new);
    for path in names.iter().filter(|n| dir.has(n)).map(|n| dir.join(n)) {
        files::set_backing(&path, Some((&base, Format::Qcow2)), work)?;
    }
    Ok(())
}
