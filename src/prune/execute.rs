//! Carries a plan out.
//!
//! Within a chain the newest point goes first, so that whatever dies whenever leaves each chain
//! whole up to where it now ends. Each folder has a journal of what is to go, written before the
//! first file is removed: the next run finishes it, and until then `verify` knows that a manifest
//! without an image is no lost point.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::plan::Plan;
use crate::chain::manifest::{Manifest, fingerprint};
use crate::chain::removal::{self, Publish, Removal};
use crate::chain::{Catalog, Disk, manifest};
use crate::error::{Error, Kind, Result};
use crate::layer::Format;
use crate::progress::Progress;
use crate::restore::verbs::{self, files};
use crate::restore::{Work, rename_new};
use crate::storage::{ReadAt, SourceFile};
use crate::text::path_text;

/// Deletes what `plan`, made from `catalog`, says. The caller holds the lock.
///
/// # Errors
/// A file cannot be removed, or is not what it was when the plan was made. What went before stays
/// gone, in an order that leaves every chain whole.
pub fn execute(catalog: &Catalog, plan: &Plan, progress: &dyn Progress) -> Result<()> {
    let mut folders: BTreeMap<PathBuf, Vec<String>> = BTreeMap::new();
    let mut seen = HashSet::new();
    let kept = kept_files(catalog, plan);
    for (disk, plan) in catalog.disks.iter().zip(&plan.disks) {
        let goes = |i: usize| plan.points.get(i).is_some_and(|p| p.keep.is_empty());
        for i in order(disk, goes) {
            check_unchanged(disk, i)?;
            for path in own_files(disk, i).into_iter().filter(|f| !kept.contains(f.as_path())) {
                let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else { continue };
                let name = text(&path, name)?;
                if seen.insert(path.clone()) {
                    folders.entry(dir.to_path_buf()).or_default().push(name);
                }
            }
        }
    }
    for (dir, remove) in folders {
        make_folder(&dir)?;
        let removal = Removal { remove, ..Removal::default() };
        removal::write(&dir, &removal)?;
        remove_all(&dir, &removal.remove, None, progress)?;
        removal::clear(&dir)?;
    }
    Ok(())
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

fn check_unchanged(disk: &Disk, i: usize) -> Result<()> {
    let p = &disk.points[i];
    let Some(layer) = p.layers.iter().find(|l| l.file.path() == p.source) else { return Ok(()) };
    // A descriptor of its own: the catalog's would stay open, one for each file that goes.
    let own = SourceFile::with_identity(layer.file.path().to_path_buf(), layer.file.identity());
    own.file()?;
    own.check_unchanged()
}

/// Removes what the journal of `dir` names; links that led there lead to `new`, or go too.
fn remove_all(
    dir: &Path,
    remove: &[String],
    new: Option<&str>,
    progress: &dyn Progress,
) -> Result<()> {
    let needed = still_needed(dir, remove)?;
    let gone: Vec<&String> = remove.iter().filter(|n| !needed.contains(*n)).collect();
    for name in &gone {
        remove_one(dir, name, progress)?;
    }
    let gone: Vec<&OsStr> = gone.into_iter().map(OsStr::new).collect();
    files::lead_links(dir, &gone, new.map(OsStr::new))
}

/// What an image that does not go lies on. The plan saw to it that there is none; but between a
/// run that was broken off and the one that finishes it, a backup may have been made.
fn still_needed(dir: &Path, remove: &[String]) -> Result<BTreeSet<String>> {
    let remove: HashSet<&String> = remove.iter().collect();
    let mut lies_on: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for image in texts(files::images(dir)?) {
        let (parent, pointer) = files::stated_parent(&dir.join(&image));
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

/// Removes one image, makes that last, and removes its manifest.
fn remove_one(dir: &Path, name: &str, progress: &dyn Progress) -> Result<()> {
    let path = dir.join(name);
    match std::fs::remove_file(&path) {
        Ok(()) => {
            sync(dir)?;
            progress.advance(1);
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => return Err(Error::io(e, "cannot delete the image").at_path(&path)),
    }
    manifest::remove(dir, OsStr::new(name))
}

pub(super) fn sync(dir: &Path) -> Result<()> {
    File::open(dir)
        .and_then(|d| d.sync_all())
        .map_err(|e| Error::io(e, "cannot sync the folder").at_path(dir))
}

pub(super) fn make_folder(dir: &Path) -> Result<()> {
    let folder = dir.join(manifest::FOLDER);
    match std::fs::create_dir(&folder) {
        Ok(()) => sync(dir),
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        Err(e) => Err(Error::io(e, "cannot make the folder for manifests").at_path(folder)),
    }
}

/// Finishes or takes back what runs that were broken off left in `dir`: prune, consolidate and the
/// verbs that alter a chain. The caller holds the lock.
///
/// # Errors
/// A journal is damaged, or a step fails again.
pub fn recover(dir: &Path, work: &Work) -> Result<()> {
    verbs::recover(dir, work)?;
    let Some(removal) = removal::read(dir)? else { return Ok(()) };
    work.progress.note(&format!("finishing what an earlier run began in {}", path_text(&dir)));
    let Some(publish) = &removal.publish else {
        remove_all(dir, &removal.remove, None, work.progress)?;
        return removal::clear(dir);
    };
    let temporary = dir.join(manifest::FOLDER).join(&publish.temporary);
    let image = dir.join(&publish.manifest.image);
    // The temporary file was complete and synced before the journal was written.
    if temporary.exists() || image.exists() {
        return replace(dir, removal, work);
    }
    // Without it nothing went; a pointer that is gone already is no loss.
    removal::clear(dir)
}

/// Publishes a new image and removes what it replaces. Every step may be done already.
///
/// 1. Children that have a backing pointer to what goes lose it, which is noted in the journal:
///    their manifests say the same.
/// 2. The image gets its name. Old and new chain are both there, children lie on the old one.
/// 3. Its manifest is written.
/// 4. The children's manifests name it as their parent.
/// 5. The old images go, newest first.
/// 6. The children that had a pointer get one to the new image.
pub(super) fn replace(dir: &Path, mut removal: Removal, work: &Work) -> Result<()> {
    let Some(publish) = removal.publish.clone() else { return Ok(()) };
    let new = publish.manifest.image.clone();
    let children = children(dir, &removal, &new)?;
    let known = removal.relink.len();
    let linked = children.iter().filter(|(_, linked)| *linked).map(|(name, _)| name.clone());
    let noted: HashSet<&String> = removal.relink.iter().collect();
    let linked: Vec<String> = linked.filter(|n| !noted.contains(n)).collect();
    removal.relink.extend(linked);
    if removal.relink.len() > known {
        removal::write(dir, &removal)?;
    }
    publish_new(dir, &publish, || {
        removal.relink.iter().try_for_each(|n| without_pointer(dir, n, &new, work))
    })?;
    for (name, _) in &children {
        if let Some(m) = manifest::read(dir, OsStr::new(name))? {
            manifest::write(dir, &Manifest { parent: Some(new.clone()), ..m })?;
        }
    }
    remove_all(dir, &removal.remove, Some(&new), work.progress)?;
    relink(dir, &removal.relink, &new, work)?;
    removal::clear(dir)
}

/// What stays and lies on what goes, also what a backup has added since an earlier run was broken
/// off; and whether a backing pointer says so.
fn children(dir: &Path, removal: &Removal, new: &str) -> Result<Vec<(String, bool)>> {
    let remove: HashSet<&String> = removal.remove.iter().collect();
    let mut found = Vec::new();
    for image in texts(files::images(dir)?) {
        if image == new || remove.contains(&image) {
            continue;
        }
        let goes = |n: Option<OsString>| texts(n).any(|n| remove.contains(&n));
        let (parent, pointer) = files::stated_parent(&dir.join(&image));
        let (by_manifest, linked) = (goes(parent), goes(pointer));
        if by_manifest || linked {
            found.push((image, linked));
        }
    }
    Ok(found)
}

/// Takes a backing pointer away, unless it leads to the new image already.
fn without_pointer(dir: &Path, name: &str, new: &str, work: &Work) -> Result<()> {
    let path = dir.join(name);
    match files::stated_parent(&path).1 {
        Some(pointer) if pointer != new => files::set_backing(&path, None, work),
        _ => Ok(()),
    }
}

/// Steps 1 to 3.
fn publish_new(dir: &Path, publish: &Publish, unlink: impl Fn() -> Result<()>) -> Result<()> {
    let temporary = dir.join(manifest::FOLDER).join(&publish.temporary);
    let image = dir.join(&publish.manifest.image);
    unlink()?;
    match rename_new(&temporary, &image) {
        Err(e) if e.kind() != ErrorKind::NotFound || !image.exists() => {
            return Err(Error::io(e, "cannot give the new image its name").at_path(&image));
        }
        _ => sync(dir)?,
    }
    let name = OsStr::new(&publish.manifest.image);
    let known = manifest::read(dir, name).ok().flatten();
    if known.as_ref() == Some(&publish.manifest) {
        return Ok(());
    }
    if fits(&publish.manifest, &image)? {
        return manifest::write(dir, &publish.manifest).map(drop);
    }
    // It may have been altered since, by somebody who said so.
    if known.is_some_and(|m| fits(&m, &image).is_ok_and(|f| f)) {
        return Ok(());
    }
    let what = "a consolidation was broken off, and this is not the FULL that it made";
    Err(Error::new(Kind::Corrupt, what)
        .at_path(image)
        .remedy("verify the disk, and remove .fleecefs/removal.journal if this file is to stay"))
}

/// Whether an image is the one that a manifest speaks of, as far as its length and ends tell.
fn fits(m: &Manifest, image: &Path) -> Result<bool> {
    let meta = std::fs::metadata(image)
        .map_err(|e| Error::io(e, "cannot look at the image").at_path(image))?;
    let same_ends = match &m.fingerprint {
        Some(known) => fingerprint(image)? == *known,
        None => true,
    };
    Ok(meta.len() == m.file_size && same_ends)
}

/// Gives those of `names` that are there a backing pointer to `new`.
fn relink(dir: &Path, names: &[String], new: &str, work: &Work) -> Result<()> {
    let base = dir.join(new);
    for path in names.iter().map(|n| dir.join(n)).filter(|p| p.exists()) {
        files::set_backing(&path, Some((&base, Format::Qcow2)), work)?;
    }
    Ok(())
}
