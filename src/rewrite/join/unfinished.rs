//! Going on with what was interrupted.

use std::cell::OnceCell;
use std::collections::HashSet;
use std::ffi::OsStr;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::execute::execute;
use super::plan::plan;
use super::planned::{JoinPlan, is_joined};
use crate::chain::scan::{ScanOptions, scan};
use crate::chain::{Catalog, Disk};
use crate::error::{Error, Kind, Result};
use crate::folder::{FileId, Folder};
use crate::journal::linking::Linking;
use crate::journal::{linking, unfinished};
use crate::progress::Progress;
use crate::text::{path_text, to_text};
use crate::units::counted;
use crate::{folder, rewrite};

/// Of how many journals it is said what becomes of them. More are counted.
const MOST_TOLD: usize = 10;

/// Goes on with what was interrupted from `root` downward, but for that of the disks `own`. The caller
/// holds the locks. Where it cannot be gone on with, a warning says so: no point is lost or wrong, and
/// nobody's backup has to wait for it. The directory is read once, however many there are: each is of two
/// folders that no other has.
///
/// # Errors
/// A journal is damaged.
pub(crate) fn finish(
    root: &Path,
    own: Option<(&Path, &Path)>,
    progress: &dyn Progress,
) -> Result<()> {
    let (known, mut count) = (OnceCell::new(), 0_usize);
    for dir in unfinished::folders(root) {
        // The other one of a pair may be gone with it.
        let open = folder::absent_is_none(Folder::open(&dir));
        let failed = |e| Error::io(e, "cannot open the folder").at_path(&dir);
        let Some(folder) = open.map_err(failed)? else { continue };
        let Some(linking) = linking::read_in(&folder)? else { continue };
        let is_own = |(old, new): (&Path, &Path)| {
            let same = |p: &Path, said: &str| p.components().eq(Path::new(said).components());
            same(old, &linking.old) && same(new, &linking.new)
        };
        if own.is_some_and(is_own) {
            continue;
        }
        let catalog = match known.get() {
            Some(catalog) => catalog,
            None => {
                let options =
                    ScanOptions { called: Some(root.to_path_buf()), ..ScanOptions::default() };
                let (catalog, _) = scan(root, &options, None)?;
                known.get_or_init(|| catalog)
            }
        };
        count = count.saturating_add(1);
        tell_and_go_on(catalog, &folder, &linking, count <= MOST_TOLD, progress);
    }
    if let Some(more) = count.checked_sub(MOST_TOLD).filter(|n| *n > 0) {
        let what = counted(more as u64, "more journal");
        log::warn!("{}: {what} of link-disk; 'fleecefs list' shows what is left", path_text(root));
    }
    Ok(())
}

fn tell_and_go_on(
    catalog: &Catalog,
    dir: &Folder,
    linking: &Linking,
    aloud: bool,
    progress: &dyn Progress,
) {
    if aloud {
        let path = path_text(dir.path());
        log::warn!("{path}: finishing an interrupted link-disk");
    }
    match go_on(catalog, dir, linking, progress) {
        Ok(left) => left
            .iter()
            .filter(|_| aloud)
            .for_each(|path| log::warn!("{}: not a plain file: not joined", path_text(path))),
        Err(e) if aloud => log::warn!(
            "{}: a link-disk was interrupted here and cannot be finished: {} ({})",
            path_text(&linking::journal_path(dir.path())),
            e.report(),
            linking::REMEDY
        ),
        Err(_) => {}
    }
}

/// Goes on with what the journal in `dir` says; what could not come along.
fn go_on(
    catalog: &Catalog,
    dir: &Folder,
    linking: &Linking,
    progress: &dyn Progress,
) -> Result<Vec<PathBuf>> {
    let (old, to) = pair(catalog, dir, linking)?;
    let Some(from) = named(catalog, &old) else {
        if !is_joined(&old, to) {
            return Err(catalog.no_disk(&old));
        }
        check_old_gone(&catalog.root, to, linking)?;
        let done = JoinPlan::done(&catalog.root, &old, to)?;
        return execute(&done, catalog, progress).map(|()| done.left);
    };
    // The owner of one folder has no say about another's.
    match (says(from, linking)?, says(to, linking)?) {
        (Some(_), Some(_)) => {
            let plan = plan(from, to, linking.other_vm, linking.force)?.going_on(linking);
            execute(&plan, catalog, progress).map(|()| plan.left)
        }
        // Nothing was done yet.
        (None, Some(folder)) => linking::clear_in(&folder).map(|()| Vec::new()),
        _ => Err(Error::new(Kind::Incomplete, "the other disk's folder has no such journal")),
    }
}

/// The old name and the new disk of a journal in `dir`, as they are called here.
fn pair<'a>(catalog: &'a Catalog, dir: &Folder, linking: &Linking) -> Result<(PathBuf, &'a Disk)> {
    let is_here = |d: &&Disk| d.points.first().and_then(|p| p.source.parent()) == Some(dir.path());
    let disks = catalog.disks.iter().filter(is_here).map(|d| d.path.as_path());
    // Its points may be gone, all of them.
    let own = dir.path().strip_prefix(&catalog.root).ok();
    let names = disks.chain(own).map(|path| PathBuf::from(to_text(path.as_os_str())));
    let mut pairs = names.flat_map(|name| linking.pairs(&name));
    pairs.find_map(|(old, new)| Some((old, named(catalog, &new)?))).ok_or_else(|| {
        let what = format!("no disk '{}' in or below this folder", path_text(&linking.new));
        Error::new(Kind::NotFound, what)
    })
}

/// The disk that a journal calls so.
fn named<'a>(catalog: &'a Catalog, name: &Path) -> Option<&'a Disk> {
    catalog.disks.iter().find(|d| Path::new(&to_text(d.path.as_os_str())) == name)
}

/// The folder of a disk, if it has this journal.
fn says(disk: &Disk, linking: &Linking) -> Result<Option<Folder>> {
    let Some(dir) = disk.points.first().and_then(|p| p.source.parent()) else { return Ok(None) };
    let folder = rewrite::open_folder(dir)?;
    Ok(linking::read_in(&folder)?.filter(|l| l.is_of(linking)).map(|_| folder))
}

/// Fails if the images may have their old names yet: in the old disk's folder, which may be outside of the
/// directory that is read. (Elsewhere they may have others: in a copy of hard links.)
fn check_old_gone(root: &Path, to: &Disk, linking: &Linking) -> Result<()> {
    let dir = rewrite::open_folder(
        to.points.first().and_then(|p| p.source.parent()).unwrap_or(Path::new("")),
    )?;
    let looked = linking.arriving.iter().filter_map(|n| dir.look(n).ok());
    let several: HashSet<FileId> =
        looked.filter(|m| m.nlink() > 1).map(|m| FileId::of(&m)).collect();
    let seen =
        linking.old_folders(dir.path()).into_iter().filter(|(above, _)| above.starts_with(root));
    let places: Vec<PathBuf> = seen.map(|(_, place)| place).collect();
    let has_old = |place: &PathBuf| {
        let old = match Folder::open(place) {
            Ok(old) => old,
            Err(e) => return !matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory),
        };
        let is_new = |n: &OsStr| {
            old.path() == dir.path() && linking.arriving.iter().any(|a| n == a.as_str())
        };
        let names = old.entries().unwrap_or_default().into_iter().map(|e| e.name);
        let mut ids = names.filter(|n| !is_new(n)).filter_map(|n| old.look(&n).ok());
        ids.any(|m| several.contains(&FileId::of(&m)))
    };
    if several.is_empty() || !places.is_empty() && !places.iter().any(has_old) {
        return Ok(());
    }
    Err(Error::new(Kind::Incomplete, "the old names are not in this directory"))
}
