//! Carrying it out.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::io::Errno;

use super::planned::{JoinPlan, RenamedImage, is_same_end};
use crate::chain::Catalog;
use crate::error::{Error, Kind, Result};
use crate::failpoint::step;
use crate::folder::{FileId, Folder};
use crate::journal::linking::Linking;
use crate::journal::removal::Removal;
use crate::journal::{linking, removal};
use crate::manifest::{FOLDER, Manifest};
use crate::progress::Progress;
use crate::rewrite::remove::{KnownFiles, remove_all};
use crate::rewrite::{config, files};
use crate::text::path_text;
use crate::{manifest, rewrite};

/// Carries it out. The caller holds the lock.
///
/// # Errors
/// What the operating system said; `Changed` if a file is not what it was when the plan was made.
/// What was done stays, and the next run goes on from there.
pub(crate) fn execute(
    joining: &JoinPlan,
    catalog: &Catalog,
    progress: &dyn Progress,
) -> Result<()> {
    if joining.points.is_empty() {
        return clear_left(joining, catalog);
    }
    let (from, to) = (rewrite::open_folder(&joining.from)?, rewrite::open_folder(&joining.to)?);
    linking::write_in(&to, &joining.linking)?;
    step("a journal of the link");
    let arrived = linking::write_in(&from, &joining.linking)
        .and_then(|()| bring(joining, &from, &to, progress));
    if let Err(e) = arrived {
        // What has two names does no harm, and a journal that nobody can finish does.
        let _ = linking::clear_in(&to);
        let _ = linking::clear_in(&from);
        return Err(e);
    }
    let linking = Linking { arrived: true, ..joining.linking.clone() };
    linking::write_in(&to, &linking)?;
    step("all points have their new names");
    let names = joining.points.iter().rev().filter(|p| p.from != p.to || from.path() != to.path());
    let removal = Removal { remove: names.map(|p| p.from.clone()).collect(), ..Removal::default() };
    removal::write_in(&from, &removal)?;
    step("journal of what goes");
    let ids = joining.points.iter().filter_map(|p| Some((p.from.clone(), p.id?)));
    let known: KnownFiles = ids.collect();
    remove_all(&from, &removal.remove, None, &known, &Steps)?;
    removal::clear_in(&from)?;
    step("journal gone");
    config::sweep(&from)?;
    if from.path() != to.path() {
        linking::clear_in(&from)?;
        step("a journal of the link gone");
        tidy(&from, &catalog.root);
    }
    linking::clear_in(&to)?;
    step("journals of the link gone");
    Ok(())
}

/// Gives all points their new names, in addition to the old ones.
fn bring(joining: &JoinPlan, from: &Folder, to: &Folder, progress: &dyn Progress) -> Result<()> {
    step("journals of the link");
    for p in &joining.points {
        p.copy_config(from, to)?;
        if let Some(m) = p.manifest.as_ref().filter(|m| !is_written(to, m)) {
            manifest::write_in(to, m)?;
            step("manifest under the new name");
        }
        if let Some(id) = p.id {
            p.link(id, from, to)?;
            step("image under the new name");
        }
        progress.advance(1);
    }
    to.sync().map_err(|e| Error::io(e, "cannot sync the folder").at_path(to.path()))
}

/// Clears up after a run whose points are all there.
fn clear_left(joining: &JoinPlan, catalog: &Catalog) -> Result<()> {
    let clear = |folder: &Folder| match linking::read_in(folder)? {
        // It may be another disk's.
        Some(l) if is_same_end(Path::new(&l.old), &joining.old) => linking::clear_in(folder),
        _ => Ok(()),
    };
    if let Ok(from) = Folder::open(&catalog.root.join(&joining.old)) {
        clear(&from)?;
        tidy(&from, &catalog.root);
    }
    clear(&rewrite::open_folder(&joining.to)?)
}

/// Counts each file that goes as a step.
struct Steps;

impl Progress for Steps {
    fn advance(&self, _bytes: u64) {
        step("old name gone");
    }
}

fn is_written(to: &Folder, m: &Manifest) -> bool {
    manifest::read_in(to, OsStr::new(&m.image)).is_ok_and(|there| there.as_ref() == Some(m))
}

impl RenamedImage {
    /// Gives the image its second name.
    fn link(&self, id: FileId, from: &Folder, to: &Folder) -> Result<()> {
        match from.link(&self.from, to, &self.to) {
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
            other => other.map_err(|e| cannot_link(e, &from.join(&self.from)))?,
        }
        // Its owner may have put another file there meanwhile.
        files::check_same(to, OsStr::new(&self.to), id)
    }

    /// The copies of configuration files that its manifest names.
    fn copy_config(&self, from: &Folder, to: &Folder) -> Result<()> {
        let kept = self.manifest.iter().flat_map(|m| &m.config_files);
        let names = kept.filter_map(|c| Path::new(&c.stored).file_name());
        if from.path() == to.path() {
            return Ok(());
        }
        for name in names.filter(|n| n.as_bytes().starts_with(b"config-")) {
            let Ok(side) = from.folder(FOLDER) else { return Ok(()) };
            if !side.has(name) {
                continue;
            }
            let there = rewrite::side_folder(to)?;
            match side.link(name, &there, name) {
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
                other => other.map_err(|e| cannot_link(e, &side.join(name)))?,
            }
            step("configuration file");
        }
        Ok(())
    }
}

fn cannot_link(e: std::io::Error, path: &Path) -> Error {
    let none = [Errno::PERM, Errno::OPNOTSUPP, Errno::NOSYS].map(|e| e.raw_os_error());
    let apart = e.raw_os_error() == Some(Errno::XDEV.raw_os_error());
    if e.raw_os_error().is_some_and(|n| none.contains(&n)) {
        let what = "this file system has no hard links, which are needed to rename points safely";
        return Error::new(Kind::Unsupported, what).with_source(e).at_path(path).remedy(
            "copy the backup directory to a file system that has them (ext4, XFS, btrfs, NFS)",
        );
    }
    let error = Error::io(e, "cannot make a hard link to the image").at_path(path);
    match apart {
        true => error.remedy("both folders have to be on one file system"),
        false => error,
    }
}

/// Removes the old folder, if nothing is left in it.
fn tidy(from: &Folder, root: &Path) {
    if from.path() == root {
        return;
    }
    // What is left is told by `list`, if it is a backup.
    let _ = from.remove_folder(FOLDER);
    let Some(name) = from.path().file_name() else { return };
    let gone = from.path().parent().map(Folder::open).map(|above| above?.remove_folder(name));
    if let Some(Err(e)) = gone {
        log::info!("{}: stays: {e}", path_text(from.path()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::scan::{ScanOptions, scan};

    /// The new name is taken by then.
    #[test]
    fn a_link_that_fails_leaves_no_journal_and_all_points() {
        let t = tempfile::tempdir().unwrap();
        let root = t.path().canonicalize().unwrap();
        let [from, to] = ["old", "new"].map(|d| root.join(d));
        for (dir, image) in [(&from, "FULL-1-old"), (&to, "FULL-1-new")] {
            std::fs::create_dir(dir).unwrap();
            std::fs::write(dir.join(image), image).unwrap();
        }
        let id = FileId::of(&std::fs::metadata(from.join("FULL-1-old")).unwrap());
        let point = RenamedImage {
            from: "FULL-1-old".into(),
            to: "FULL-1-new".into(),
            time: 1,
            id: Some(id),
            manifest: None,
        };
        let linking = Linking { old: "old".into(), new: "new".into(), ..Default::default() };
        let plan = JoinPlan {
            old: "old".into(),
            new: "new".into(),
            points: vec![point],
            left: Vec::new(),
            linking,
            from: from.clone(),
            to: to.clone(),
        };
        let catalog = scan(&root, &ScanOptions::default(), None).unwrap().0;
        assert_eq!(execute(&plan, &catalog, &()).unwrap_err().kind(), Kind::Changed);
        for (dir, image) in [(&from, "FULL-1-old"), (&to, "FULL-1-new")] {
            assert!(linking::read_in(&Folder::open(dir).unwrap()).unwrap().is_none());
            assert_eq!(std::fs::read(dir.join(image)).unwrap(), image.as_bytes());
        }
    }
}
