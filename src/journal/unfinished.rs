//! What an interrupted run left in a folder that it changed, by the files that say so:
//! `.fleecefs/fold.json` (`commit`, `snapshot-rebase`), `.fleecefs/<image>.header` (a header that
//! was being changed), `.fleecefs/removal.journal` (`prune`, `consolidate`), `.fleecefs/link-disk.journal`.
//! Whoever writes to the folder finishes it first; whoever reads says that it is there.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::linking::Linking;
use super::{FLATTEN, linking, read_flatten, removal};
use crate::error::{Error, Finding, Kind, Result};
use crate::folder::{Entry, EntryKind, Folder};
use crate::manifest::FOLDER;
use crate::text::path_text;
/// Ends the names of saved headers.
pub(crate) const HEADER_SUFFIX: &str = ".header";

/// What to do about it.
const REMEDY: &str = "'fleecefs verify --create DIR', or the next command that writes there, \
                      finishes it";

fn is_journal(name: &OsStr) -> bool {
    let whole = [FLATTEN, removal::NAME, linking::NAME];
    name.as_bytes().ends_with(HEADER_SUFFIX.as_bytes()) || whole.iter().any(|n| name == *n)
}

/// The files in the folder for manifests, `side`, that say that something is unfinished.
fn journals_in(side: &Folder) -> Vec<PathBuf> {
    let names = side.entries().unwrap_or_default().into_iter().map(|e| e.name);
    let mut found: Vec<PathBuf> = names.filter(|n| is_journal(n)).map(|n| side.join(n)).collect();
    found.sort();
    found
}

/// The folders from `root` downward in which something is unfinished.
pub(crate) fn folders(root: &Path) -> Vec<PathBuf> {
    folders_where(root, |side| !journals_in(side).is_empty())
}

/// The folders from `root` downward whose folders for manifests are `such`.
pub(crate) fn folders_where(root: &Path, such: impl Fn(&Folder) -> bool) -> Vec<PathBuf> {
    let Ok(top) = Folder::open(root) else { return Vec::new() };
    let (mut found, mut todo) = (Vec::new(), vec![PathBuf::new()]);
    while let Some(relative) = todo.pop() {
        let Ok(dir) = top.beneath(&relative) else { continue };
        let entries = dir.entries().unwrap_or_default();
        for entry in entries.into_iter().filter(|e| e.kind == EntryKind::Folder) {
            if entry.name != FOLDER {
                todo.push(relative.join(entry.name));
            } else if dir.folder(FOLDER).is_ok_and(|side| such(&side)) {
                found.push(dir.path().to_path_buf());
            }
        }
    }
    found.sort();
    found
}

/// One finding for each of them among the `entries` of the folder for manifests, `side`.
pub(crate) fn findings(side: &Folder, entries: &[Entry]) -> Vec<Finding> {
    entries.iter().filter(|e| is_journal(&e.name)).map(|e| finding(side, e)).collect()
}

fn finding(side: &Folder, journal: &Entry) -> Finding {
    let path = side.join(&journal.name);
    let mut linked = None;
    let broken = match journal.kind {
        EntryKind::File if journal.name == linking::NAME => match linking::read_side(side) {
            Ok(found) => {
                linked = found;
                None
            }
            Err(e) => Some(e),
        },
        EntryKind::File if journal.name == FLATTEN => read_flatten(side).err(),
        EntryKind::File if journal.name == removal::NAME => removal::read_side(side).err(),
        EntryKind::File => None,
        _ => {
            let what = "it has the name of a journal, but is not a plain file";
            Some(Error::new(Kind::Unsupported, what).at_path(&path).remedy("remove it"))
        }
    };
    if let Some(error) = broken {
        return Finding::from_error(&error, &path);
    }
    if let Some(linking) = linked {
        return unfinished_link(path, &linking);
    }
    let what = "a command that changes this folder is running or was interrupted: until it is \
                finished, points may be missing or listed twice";
    let finding = Finding::warning(Kind::Incomplete, path, what);
    Finding { remedy: Some(REMEDY.into()), ..finding }
}

fn unfinished_link(journal: PathBuf, linking: &Linking) -> Finding {
    let what = format!(
        "link-disk is running here or was interrupted: until it is finished, points of '{}' are \
         also listed as points of '{}'",
        path_text(&linking.old),
        path_text(&linking.new)
    );
    let remedy =
        "the same 'fleecefs link-disk', or the next command that writes there, finishes it";
    Finding { remedy: Some(remedy.into()), ..Finding::warning(Kind::Incomplete, journal, what) }
}

/// Fails if there is anything unfinished from `root` downward.
///
/// # Errors
/// `Incomplete`.
pub(crate) fn refuse(root: &Path) -> Result<()> {
    let Some(dir) = folders(root).into_iter().next() else { return Ok(()) };
    let what = "a command that changed this folder was interrupted";
    Err(Error::new(Kind::Incomplete, what).at_path(dir).remedy(REMEDY))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_journal_is_found_and_told() {
        for name in [FLATTEN, removal::NAME, linking::NAME, "INC-1-d.header"] {
            let dir = tempfile::tempdir().unwrap();
            let top = dir.path().canonicalize().unwrap();
            let folder = Folder::open(&top).unwrap().make_folder("d").unwrap();
            let side = folder.make_folder(FOLDER).unwrap();
            side.write_whole("INC-1-d.json", b"{}").unwrap();
            refuse(&top).unwrap();
            assert!(findings(&side, &side.entries().unwrap()).is_empty());
            side.write_whole(name, b"").unwrap();
            assert_eq!(folders(&top), [top.join("d")], "{name}");
            assert_eq!(refuse(&top).unwrap_err().kind(), Kind::Incomplete, "{name}");
            let found = findings(&side, &side.entries().unwrap());
            assert!(found.len() == 1 && found[0].path == side.join(name), "{name}: {found:?}");
        }
    }
}
