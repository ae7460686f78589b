//! Carries a plan out.
//!
//! Within a chain the newest point goes first, so that whatever dies whenever leaves each chain
//! whole up to where it now ends. Each folder has a journal of what is to go, written before the
//! first file is removed: the next run finishes it, and until then `verify` knows that a manifest
//! without an image is no lost point.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};

use super::plan::Plan;
use crate::chain::manifest::Manifest;
use crate::chain::removal::{self, Publish, Removal};
use crate::chain::{Catalog, Disk, manifest};
use crate::error::{Error, Kind, Result};
use crate::progress::Progress;
use crate::storage::ReadAt;

/// Deletes what `plan`, made from `catalog`, says. The caller holds the lock.
///
/// # Errors
/// A file cannot be removed, or is not what it was when the plan was made. What went before stays
/// gone, in an order that leaves every chain whole.
pub fn execute(catalog: &Catalog, plan: &Plan, progress: &dyn Progress) -> Result<()> {
    let mut folders: BTreeMap<PathBuf, Vec<String>> = BTreeMap::new();
    let kept = kept_files(catalog, plan);
    for (disk, plan) in catalog.disks.iter().zip(&plan.disks) {
        let goes = |i: usize| plan.points.get(i).is_some_and(|p| p.keep.is_empty());
        for i in order(disk, goes) {
            check_unchanged(disk, i)?;
            for path in own_files(disk, i).into_iter().filter(|f| !kept.contains(f.as_path())) {
                let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else { continue };
                let names = folders.entry(dir.to_path_buf()).or_default();
                let name = text(&path, name)?;
                if !names.contains(&name) {
                    names.push(name);
                }
            }
        }
    }
    for (dir, remove) in folders {
        make_folder(&dir)?;
        removal::write(&dir, &Removal { publish: None, remove: remove.clone() })?;
        finish(&dir, &remove, progress)?;
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
    let mut chains: Vec<&str> = Vec::new();
    for p in &disk.points {
        if !chains.contains(&p.chain.as_str()) {
            chains.push(&p.chain);
        }
    }
    let of = |chain: &str| -> Vec<usize> {
        let points = (0..disk.points.len()).rev();
        points.filter(|i| disk.points[*i].chain == chain && goes(*i)).collect()
    };
    chains.into_iter().flat_map(of).collect()
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
    layer.file.file()?;
    layer.file.check_unchanged()
}

/// Removes what the journal of `dir` names, and then the journal.
fn finish(dir: &Path, remove: &[String], progress: &dyn Progress) -> Result<()> {
    let needed = still_needed(dir, remove)?;
    for name in remove.iter().filter(|n| !needed.contains(*n)) {
        remove_one(dir, name, progress)?;
    }
    removal::clear(dir)
}

/// What an image that does not go lies on. The plan saw to it that there is none; but between a
/// run that was broken off and the one that finishes it, a backup may have been made.
fn still_needed(dir: &Path, remove: &[String]) -> Result<BTreeSet<String>> {
    let manifests = manifests(dir)?;
    let parent = |m: &Manifest| m.parent.clone().filter(|p| remove.contains(p));
    let mut todo: Vec<String> =
        manifests.values().filter(|m| !remove.contains(&m.image)).filter_map(parent).collect();
    let mut needed = BTreeSet::new();
    while let Some(name) = todo.pop() {
        if needed.insert(name.clone()) {
            todo.extend(manifests.get(&name).and_then(parent));
        }
    }
    Ok(needed)
}

/// All manifests of images that are there.
fn manifests(dir: &Path) -> Result<BTreeMap<String, Manifest>> {
    let failed = |e| Error::io(e, "cannot read the folder").at_path(dir);
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(dir).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        if let (Some(text), Ok(Some(m))) = (name.to_str(), manifest::read(dir, &name)) {
            found.insert(text.to_string(), m);
        }
    }
    Ok(found)
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

/// Finishes or takes back what a run that was broken off left in `dir`. The caller holds the lock.
/// Returns whether there was anything.
///
/// # Errors
/// The journal is damaged, or a step fails again.
pub fn recover(dir: &Path, progress: &dyn Progress) -> Result<bool> {
    let Some(removal) = removal::read(dir)? else { return Ok(false) };
    progress.note(&format!("finishing what an earlier run began in {}", dir.display()));
    let Some(publish) = &removal.publish else {
        finish(dir, &removal.remove, progress)?;
        return Ok(true);
    };
    let temporary = dir.join(manifest::FOLDER).join(&publish.temporary);
    let image = dir.join(&publish.manifest.image);
    // The temporary file was complete and synced before the journal was written.
    if temporary.exists() || image.exists() {
        replace(dir, publish, &removal.remove, progress)?;
    } else {
        removal::clear(dir)?;
    }
    Ok(true)
}

/// Publishes a new image and removes what it replaces. Every step may be done already.
///
/// 1. The image gets its name. Old and new chain are both there, children lie on the old one.
/// 2. Its manifest is written.
/// 3. The children's manifests name it as their parent.
/// 4. The old images go, newest first.
pub(super) fn replace(
    dir: &Path,
    publish: &Publish,
    remove: &[String],
    progress: &dyn Progress,
) -> Result<()> {
    let temporary = dir.join(manifest::FOLDER).join(&publish.temporary);
    let image = dir.join(&publish.manifest.image);
    match std::fs::rename(&temporary, &image) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound || !image.exists() => {
            return Err(Error::io(e, "cannot rename the new image").at_path(&image));
        }
        _ => sync(dir)?,
    }
    manifest::write(dir, &publish.manifest)?;
    for (name, mut m) in manifests(dir)? {
        // Also what a backup has added since an earlier run was broken off.
        let stays = name != publish.manifest.image && !remove.contains(&name);
        if stays && m.parent.as_ref().is_some_and(|p| remove.contains(p)) {
            m.parent = Some(publish.manifest.image.clone());
            manifest::write(dir, &m)?;
        }
    }
    finish(dir, remove, progress)
}
