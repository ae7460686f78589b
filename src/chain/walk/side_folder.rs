//! `.fleecefs/` beside the images of one folder, as a scan sees it.
//!
//! Its owner may make it, and anything in it, whatever he likes: a link, a pipe, a file of any size.
//! What is not what it should be is a finding, and is not read.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::hash::Hash;
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::tree::LostImage;
use crate::error::{Error, Finding, Kind, Severity};
use crate::folder::{Entry, EntryKind, Folder, Handle, plain};
use crate::journal::{removal, unfinished};
use crate::layout::name;
use crate::layout::name::Name;
use crate::manifest;

/// The folder for manifests.
pub(in crate::chain) enum SideFolder {
    /// There is none.
    None,
    /// It is held.
    Open(Folder),
    /// There is one and it cannot be opened: manifests may be in it.
    Closed(Finding),
}

/// What is in it.
pub(in crate::chain) struct Contents<'a> {
    side: &'a Folder,
    /// The folder of the images.
    dir: &'a Path,
    entries: Vec<Entry>,
}

impl SideFolder {
    /// The one in `folder`, which has `entries`.
    pub(crate) fn of(
        folder: &Folder,
        entries: &[Entry],
        findings: &mut Vec<Finding>,
    ) -> SideFolder {
        let Some(entry) = entries.iter().find(|e| e.name == manifest::FOLDER) else {
            return SideFolder::None;
        };
        let path = folder.join(manifest::FOLDER);
        if matches!(entry.kind, EntryKind::File | EntryKind::Other) {
            let what = "it is not a folder, so no manifests can be stored here";
            findings.push(Finding::warning(Kind::Unsupported, path, what));
            return SideFolder::None;
        }
        match folder.folder(manifest::FOLDER) {
            Ok(side) => SideFolder::Open(side),
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                SideFolder::None
            }
            Err(e) => {
                let error = Error::io(e, "cannot open the folder for manifests").at_path(&path);
                let finding = Finding::from_error(&error, &path);
                findings.push(Finding { severity: Severity::Warning, ..finding.clone() });
                SideFolder::Closed(finding)
            }
        }
    }

    /// The folder's path for messages, and a handle of `file` in it; `None` if there is none.
    ///
    /// # Errors
    /// There may be one and it cannot be looked at: it may say that all is otherwise.
    pub(crate) fn handle<'a>(
        &'a self,
        file: &'a OsStr,
    ) -> Result<Option<(PathBuf, Handle<'a>)>, Finding> {
        let side = match self {
            SideFolder::Open(side) => side,
            SideFolder::None => return Ok(None),
            SideFolder::Closed(finding) => return Err(finding.clone()),
        };
        // Too long a name to be one.
        if plain(file).is_err() {
            return Ok(None);
        }
        match side.handle(file) {
            Ok(handle) => Ok(Some((side.join(file), handle))),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(e) => {
                let path = side.join(file);
                let error = Error::io(e, "cannot find the manifest").at_path(&path);
                Err(Finding::from_error(&error, &path))
            }
        }
    }

    /// Lists it for the images in `dir`.
    pub(crate) fn list<'a>(
        &'a self,
        dir: &'a Path,
        found: &mut Vec<Finding>,
    ) -> Option<Contents<'a>> {
        let SideFolder::Open(side) = self else { return None };
        let mut entries = Vec::new();
        if let Err(e) = side.list(&mut entries) {
            let error = Error::io(
                e,
                "cannot list the manifests; a missing image may not be \
                                      noticed",
            );
            found.push(Finding::from_error(&error, side.path()));
        }
        entries.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        Some(Contents { side, dir, entries })
    }
}

impl Contents<'_> {
    /// The backups whose manifests are here and that are not beside it, as `is_here` knows.
    pub(crate) fn lost(&self, is_here: impl Fn(&OsStr) -> bool) -> Vec<LostImage> {
        let mut lost: Vec<LostImage> = (self.entries.iter())
            .filter_map(|e| e.name.as_bytes().strip_suffix(b".json").map(OsStr::from_bytes))
            .filter(|name| !is_here(name))
            .filter_map(|name| match name::parse(name) {
                Name::Backup { level, stamp: Some(stamp), disk } => {
                    Some(LostImage { name: name.to_os_string(), level, stamp, disk })
                }
                _ => None,
            })
            .collect();
        if !lost.is_empty() {
            let leaving = removal::pending_in(self.side).into_iter().map(OsString::from);
            leave_out(&mut lost, |l| &l.name, leaving);
        }
        lost
    }

    /// What runs that were interrupted left.
    pub(crate) fn unfinished(&self) -> Vec<Finding> {
        unfinished::findings(self.side, &self.entries)
    }

    /// Backups in here are nobody's points: a disk's folder cannot have this name.
    pub(crate) fn hidden(&self) -> Option<Finding> {
        let is_image = |e: &&Entry| {
            let known = [".json", ".header", ".fleece", ".new"];
            let known = known.iter().any(|s| e.name.as_bytes().ends_with(s.as_bytes()));
            let backup = || matches!(name::parse(&e.name), Name::Backup { stamp: Some(_), .. });
            e.kind == EntryKind::File && !known && backup()
        };
        let image = self.entries.iter().find(is_image)?;
        let what = "a backup in the folder for manifests: ignored";
        let path = self.dir.join(manifest::FOLDER).join(&image.name);
        let finding = Finding::warning(Kind::Unsupported, path, what);
        let remedy = "move it to a folder with another name";
        Some(Finding { remedy: Some(remedy.into()), ..finding })
    }
}

/// Removes the items whose key is one of `keys`. Both may be a hundred thousand.
fn leave_out<T, K: Eq + Hash>(
    items: &mut Vec<T>,
    key: impl Fn(&T) -> &K,
    keys: impl Iterator<Item = K>,
) {
    let keys: HashSet<K> = keys.collect();
    items.retain(|item| !keys.contains(key(item)));
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::hash::Hasher;

    thread_local! {
        static COMPARED: Cell<u64> = const { Cell::new(0) };
    }

    /// Counts how often it is compared.
    #[derive(Debug)]
    struct CountedReads(u64);

    impl PartialEq for CountedReads {
        fn eq(&self, other: &Self) -> bool {
            COMPARED.set(COMPARED.get() + 1);
            self.0 == other.0
        }
    }
    impl Eq for CountedReads {}
    impl Hash for CountedReads {
        fn hash<H: Hasher>(&self, state: &mut H) {
            self.0.hash(state);
        }
    }

    #[test]
    fn a_long_journal_is_not_walked_for_each_lost_point() {
        const COUNT: u64 = 20_000;
        let mut lost: Vec<CountedReads> = (0..COUNT).map(CountedReads).collect();
        leave_out(&mut lost, |l| l, (COUNT / 2..COUNT * 3 / 2).map(CountedReads));
        assert_eq!(lost.len() as u64, COUNT / 2);
        let compared = COMPARED.get();
        assert!(compared < 10 * COUNT, "{compared} comparisons");
    }
}
