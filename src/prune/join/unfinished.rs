//! Going on with what was broken off.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::execute::execute;
use super::plan::plan;
use super::planned::{Joining, is_joined};
use crate::chain::linking::{self, Linking};
use crate::chain::scan::{ScanOptions, scan};
use crate::chain::{Disk, unfinished};
use crate::error::{Error, Kind, Result};
use crate::folder::{self, Folder};
use crate::progress::Progress;
use crate::restore::verbs;
use crate::text::path_text;

/// Goes on with what was broken off from `root` downward, but for that of the disks `own`. The caller
/// holds the locks. Where it cannot be gone on with, a warning says so: no point is lost or wrong, and
/// nobody's backup has to wait for it.
///
/// # Errors
/// A journal is damaged.
pub fn finish(root: &Path, own: Option<(&Path, &Path)>, progress: &dyn Progress) -> Result<()> {
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
        log::warn!("{}: going on with a link-disk that was broken off", path_text(&dir));
        if let Err(e) = go_on(root, &folder, &linking, progress) {
            log::warn!(
                "{}: a link-disk was broken off here and cannot be finished: {} ({})",
                path_text(&linking::journal_path(&dir)),
                e.report(),
                linking::REMEDY
            );
        }
    }
    Ok(())
}

/// Goes on with what the journal in `dir` says.
fn go_on(root: &Path, dir: &Folder, linking: &Linking, progress: &dyn Progress) -> Result<()> {
    let options = ScanOptions { called: Some(root.to_path_buf()), ..ScanOptions::default() };
    let (catalog, _) = scan(root, &options, None)?;
    let (old, new) = (Path::new(&linking.old), Path::new(&linking.new));
    // It may have been begun in a folder further down.
    let above = catalog.disks.iter().find_map(|d| {
        let is_here = d.points.iter().any(|p| p.source.parent() == Some(dir.path()));
        [old, new].into_iter().filter(|_| is_here).find_map(|n| before(&d.path, n))
    });
    let above = above.unwrap_or_default();
    let to = catalog.disk(&above.join(new))?;
    let from = match catalog.disk(&above.join(old)) {
        Err(e) if e.kind() == Kind::NotFound && is_joined(old, to) => {
            check_single(to, linking)?;
            let done = Joining::done(&above.join(old), to);
            return execute(&done, &catalog, progress);
        }
        from => from?,
    };
    // The owner of one folder has no say about another's.
    match (says(from, linking)?, says(to, linking)?) {
        (Some(_), Some(_)) => {
            let plan = plan(from, to, linking.other_vm, linking.force)?;
            execute(&plan, &catalog, progress)
        }
        // Nothing was done yet.
        (None, Some(folder)) => linking::clear_in(&folder),
        _ => Err(Error::new(Kind::Incomplete, "the other disk's folder has no such journal")),
    }
}

/// The folder of a disk, if it has this journal.
fn says(disk: &Disk, linking: &Linking) -> Result<Option<Folder>> {
    let Some(dir) = disk.points.first().and_then(|p| p.source.parent()) else { return Ok(None) };
    let folder = verbs::open_folder(dir)?;
    Ok(linking::read_in(&folder)?.filter(|l| l.is_of(linking)).map(|_| folder))
}

/// Fails if the images have other names yet, which are then outside of the directory that is read.
fn check_single(to: &Disk, linking: &Linking) -> Result<()> {
    let dir = verbs::open_folder(
        to.points.first().and_then(|p| p.source.parent()).unwrap_or(Path::new("")),
    )?;
    let is_single = |n: &String| dir.look(n).is_ok_and(|m| m.nlink() == 1);
    match linking.arriving.iter().all(is_single) {
        true => Ok(()),
        false => Err(Error::new(Kind::Incomplete, "the old names are not in this directory")),
    }
}

/// What of `path` comes before `end`.
fn before(path: &Path, end: &Path) -> Option<PathBuf> {
    let above = path.components().count().checked_sub(end.components().count())?;
    path.ends_with(end).then(|| path.components().take(above).collect())
}
