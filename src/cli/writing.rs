//! What every command that alters a backup directory begins with: the lock, and what a run that was
//! interrupted left to be finished.

use std::path::{Path, PathBuf};
use std::sync::Once;

use super::bar::Bar;
use super::paths;
use super::work::cancel_flag;
use crate::backup::recover::named;
use crate::chain::Catalog;
use crate::error::{Error, Kind, Result};
use crate::folder::{Folder, ForeignOwner, foreign_owner};
use crate::job::Work;
use crate::journal::unfinished;
use crate::live::mark;
use crate::lock::Locks;
use crate::rewrite::join;
use crate::rewrite::remove::recover;
use crate::text::path_text;
use crate::{folder, privileges};

/// Takes the locks, finishes what an earlier run left, and then reads the directory.
///
/// # Errors
/// `Busy` if somebody else is writing, or if a VM of 'live-restore' needs the backup; what recovery says.
pub(super) fn locked(dir: &Path) -> Result<(Catalog, Locks)> {
    let locks = finished(dir)?;
    mark::check_none(&locks)?;
    let catalog = paths::catalog(dir)?;
    Ok((catalog, locks))
}

/// Takes the locks and finishes what an earlier run left.
///
/// # Errors
/// See [`locked`].
pub(super) fn finished(dir: &Path) -> Result<Locks> {
    let root = paths::backups(dir)?;
    let locks = finished_but_links(&root)?;
    join::finish(&root, None, &Bar::default())?;
    Ok(locks)
}

/// As [`finished`] for a resolved directory, but for what `link-disk` left.
///
/// # Errors
/// See [`locked`].
pub(super) fn finished_but_links(root: &Path) -> Result<Locks> {
    warn_of_others(root)?;
    let locks = Locks::take(root)?;
    let folders: Vec<PathBuf> = unfinished::folders(root);
    if !folders.is_empty() {
        // What is left may be the removal of what a VM needs.
        mark::check_none(&locks)?;
        let (bar, cancel) = (Bar::default(), cancel_flag()?);
        let work = Work { cancel: &cancel, progress: &bar, workers: 2, rate: None };
        folders.iter().try_for_each(|f| recover(f, &work))?;
    }
    named::conclude(root);
    Ok(locks)
}

/// The same for a command that takes the locks itself later, and need not wait for anybody now.
///
/// # Errors
/// See [`locked`].
pub(super) fn finish_what_is_left(dir: &Path) -> Result<()> {
    let root = match paths::backups(dir) {
        // A target that is made yet.
        Err(e) if e.kind() == Kind::NotFound => return Ok(()),
        other => other?,
    };
    warn_of_others(&root)?;
    match unfinished::folders(&root).is_empty() {
        true => Ok(()),
        false => finished(dir).map(drop),
    }
}

/// Warns, once in a process, of a folder that is written to and that somebody else may change.
///
/// # Errors
/// The folder cannot be read.
pub(super) fn warn_of_others(root: &Path) -> Result<()> {
    static WARNED: Once = Once::new();
    let failed = |e| Error::io(e, "cannot read the backup directory").at_path(root);
    let folder = Folder::open(root).map_err(failed)?;
    let Some(who) = foreign_owner(&folder).map_err(failed)? else { return Ok(()) };
    let text = of_others(root, who);
    WARNED.call_once(|| log::warn!(target: folder::STANDING, "{text}"));
    Ok(())
}

fn of_others(root: &Path, who: ForeignOwner) -> String {
    let path = path_text(root);
    match who {
        ForeignOwner::User(uid) => format!(
            "{path}: belongs to {}, who can change or remove backups there; use --as-owner, or \
             chown it",
            privileges::name_of(uid)
        ),
        ForeignOwner::Others => format!(
            "{path}: other users may write there, and change or remove backups; if that is not \
             intended: chmod go-w"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_warning_says_whose_it_is_and_what_to_do() {
        let text = of_others(Path::new("/b"), ForeignOwner::User(4_000_000));
        assert!(text.contains("user 4000000") && text.contains("--as-owner"), "{text}");
        let text = of_others(Path::new("/b"), ForeignOwner::Others);
        assert!(text.contains("chmod go-w"), "{text}");
    }
}
