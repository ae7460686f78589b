//! What every command that alters a backup directory begins with: the lock, and what a run that was
//! broken off left to be finished.

use std::path::{Path, PathBuf};

use super::bar::Bar;
use super::work::cancel_flag;
use crate::chain::scan::{ScanOptions, scan};
use crate::chain::{Catalog, unfinished};
use crate::error::{Error, Result};
use crate::lock::Locks;
use crate::prune::recover;
use crate::restore::Work;

/// Takes the locks, finishes what an earlier run left, and then reads the directory.
///
/// # Errors
/// `Busy` if somebody else is writing, or what recovery says.
pub(super) fn locked(dir: &Path) -> Result<(Catalog, Locks)> {
    let locks = finished(dir)?;
    let (catalog, _) = scan(dir, &ScanOptions::default(), None)?;
    Ok((catalog, locks))
}

/// Takes the locks and finishes what an earlier run left.
///
/// # Errors
/// See [`locked`].
pub(super) fn finished(dir: &Path) -> Result<Locks> {
    let failed = |e| Error::io(e, "cannot read the backup directory").at_path(dir);
    let root = dir.canonicalize().map_err(failed)?;
    std::fs::read_dir(&root).map_err(failed)?;
    let locks = Locks::take(&root)?;
    let folders: Vec<PathBuf> = unfinished::folders(&root);
    if !folders.is_empty() {
        let (bar, cancel) = (Bar::default(), cancel_flag()?);
        let work = Work { cancel: &cancel, progress: &bar, workers: 2, rate: None };
        folders.iter().try_for_each(|f| recover(f, &work))?;
    }
    Ok(locks)
}

/// The same for a command that takes the locks itself later, and need not wait for anybody now.
///
/// # Errors
/// See [`locked`].
pub(super) fn finish_what_is_left(dir: &Path) -> Result<()> {
    match unfinished::folders(dir).is_empty() {
        true => Ok(()),
        false => finished(dir).map(drop),
    }
}
