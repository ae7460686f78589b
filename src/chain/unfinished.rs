//! What a run that altered a folder left when it was broken off, by the files that say so:
//! `.fleecefs/fold.json` (`commit`, `snapshot-rebase`), `.fleecefs/<image>.header` (a header that
//! was being changed), `.fleecefs/removal.journal` (`prune`, `consolidate`), `.fleecefs/link-disk.journal`.
//! Whoever writes to the folder finishes it first; whoever reads says that it is there.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::linking::Linking;
use super::manifest::FOLDER;
use super::{linking, removal};
use crate::error::{Error, Finding, Kind, Result};
use crate::folder::{Entry, EntryKind, Folder, PlainName};
use crate::text::path_text;

/// The journal of a fold, in the folder for manifests.
pub const FOLD: &str = "fold.json";
/// Ends the names of saved headers.
pub const HEADER_SUFFIX: &str = ".header";
/// A journal names some images, and has a manifest or two: 100,000 names of 255 bytes.
pub const MAX_JOURNAL: u64 = 32 << 20;

/// Values in a journal: the names of more images than a folder has, and some manifests.
const MAX_VALUES: usize = 1_000_000;

/// What to do about it.
const REMEDY: &str = "'fleecefs verify --create DIR', or the next command that writes there, \
                      finishes it";

fn is_journal(name: &OsStr) -> bool {
    let whole = [FOLD, removal::NAME, linking::NAME];
    name.as_bytes().ends_with(HEADER_SUFFIX.as_bytes()) || whole.iter().any(|n| name == *n)
}

/// The files in `dir` that say that something is unfinished.
pub fn journals(dir: &Path) -> Vec<PathBuf> {
    let Ok(side) = Folder::open(&dir.join(FOLDER)) else { return Vec::new() };
    journals_in(&side)
}

fn journals_in(side: &Folder) -> Vec<PathBuf> {
    let names = side.entries().unwrap_or_default().into_iter().map(|e| e.name);
    let mut found: Vec<PathBuf> = names.filter(|n| is_journal(n)).map(|n| side.join(n)).collect();
    found.sort();
    found
}

/// The folders from `root` downward in which something is unfinished.
pub fn folders(root: &Path) -> Vec<PathBuf> {
    let Ok(top) = Folder::open(root) else { return Vec::new() };
    let (mut found, mut todo) = (Vec::new(), vec![PathBuf::new()]);
    while let Some(relative) = todo.pop() {
        let Ok(dir) = top.beneath(&relative) else { continue };
        let entries = dir.entries().unwrap_or_default();
        for entry in entries.into_iter().filter(|e| e.kind == EntryKind::Folder) {
            if entry.name != FOLDER {
                todo.push(relative.join(entry.name));
            } else if dir.folder(FOLDER).is_ok_and(|side| !journals_in(&side).is_empty()) {
                found.push(dir.path().to_path_buf());
            }
        }
    }
    found.sort();
    found
}

/// One finding for each of them among the `entries` of the folder for manifests, `side`.
pub(super) fn findings(side: &Folder, entries: &[Entry]) -> Vec<Finding> {
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
        EntryKind::File if journal.name == FOLD => read_fold(side).err(),
        EntryKind::File if journal.name == removal::NAME => removal::read_side(side).err(),
        EntryKind::File => None,
        _ => {
            let what = "it has the name of a journal, and is not a plain file";
            Some(Error::new(Kind::Unsupported, what).at_path(&path).remedy("remove it"))
        }
    };
    if let Some(error) = broken {
        return Finding::from_error(&error, &path);
    }
    if let Some(linking) = linked {
        return unfinished_link(path, &linking);
    }
    let what = "a run that alters this folder is at work, or was broken off: until it is finished, \
                points may be missing or there twice";
    let finding = Finding::warning(Kind::Incomplete, path, what);
    Finding { remedy: Some(REMEDY.into()), ..finding }
}

fn unfinished_link(journal: PathBuf, linking: &Linking) -> Finding {
    let what = format!(
        "link-disk is at work here, or was broken off: until it is finished, points of '{}' are there \
         twice, as those of '{}' too; none is lost",
        path_text(&linking.old),
        path_text(&linking.new)
    );
    let remedy =
        format!("{}, or the next command that writes there, finishes it", linking.command());
    Finding { remedy: Some(remedy), ..Finding::warning(Kind::Incomplete, journal, what) }
}

/// Fails if there is anything unfinished from `root` downward.
///
/// # Errors
/// `Incomplete`.
pub fn refuse(root: &Path) -> Result<()> {
    let Some(dir) = folders(root).into_iter().next() else { return Ok(()) };
    let what = "a run that altered this folder was broken off";
    Err(Error::new(Kind::Incomplete, what).at_path(dir).remedy(REMEDY))
}

/// Fails if a journal has more values than any of ours: each takes many times its bytes in memory.
///
/// # Errors
/// `Corrupt`.
pub fn check_count(journal: &[u8], path: &Path) -> Result<()> {
    if journal.iter().filter(|b| **b == b',').count() <= MAX_VALUES {
        return Ok(());
    }
    Err(Error::new(Kind::Corrupt, "the journal has too many entries")
        .at_path(path)
        .remedy("verify the disk, then remove the journal"))
}

/// The images beside `side` that a fold is about to remove.
pub(super) fn leaving_by_fold(side: &Folder) -> Vec<String> {
    read_fold(side).ok().flatten().unwrap_or_default()
}

/// The images that the journal of a fold in `side` removes; `None` if there is no journal.
fn read_fold(side: &Folder) -> Result<Option<Vec<String>>> {
    #[derive(serde::Deserialize)]
    struct Fold {
        interim: PlainName,
        increments: Vec<PlainName>,
    }
    let path = || side.join(FOLD);
    let text = side
        .read_if_there(FOLD, MAX_JOURNAL)
        .map_err(|e| Error::io(e, "cannot read the journal of a fold").at_path(path()))?;
    let Some(text) = text else { return Ok(None) };
    check_count(&text, &path())?;
    let fold: Fold = serde_json::from_slice(&text).map_err(|e| {
        Error::new(Kind::Corrupt, "the journal of a fold is damaged")
            .with_source(e)
            .at_path(path())
            .remedy("verify the disk, then remove the journal")
    })?;
    let all = fold.increments.iter().chain([&fold.interim]);
    Ok(Some(all.filter_map(|p| Some(p.as_os_str().to_str()?.to_string())).collect()))
}
