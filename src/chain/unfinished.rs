//! What a run that altered a folder left when it was broken off, by the files that say so:
//! `.fleecefs/fold.json` (`commit`, `snapshot-rebase`), `.fleecefs/<image>.header` (a header that
//! was being changed), `.fleecefs/removal.journal` (`prune`, `consolidate`). Whoever writes to the
//! folder finishes it first; whoever reads says that it is there.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::manifest::FOLDER;
use super::removal;
use crate::error::{Error, Finding, Kind, Result};

/// The journal of a fold, in the folder for manifests.
pub const FOLD: &str = "fold.json";
/// Ends the names of saved headers.
pub const HEADER_SUFFIX: &str = ".header";

/// What to do about it.
const REMEDY: &str = "'fleecefs verify --create DIR', or the next command that writes there, \
                      finishes it";

/// The files in `dir` that say that something is unfinished.
pub fn journals(dir: &Path) -> Vec<PathBuf> {
    let side = dir.join(FOLDER);
    let Ok(entries) = std::fs::read_dir(&side) else { return Vec::new() };
    let removal = removal::journal_path(dir);
    let mut found: Vec<PathBuf> = entries
        .flatten()
        .filter(|e| {
            let name = e.file_name();
            name.as_bytes().ends_with(HEADER_SUFFIX.as_bytes())
                || name == FOLD
                || e.path() == removal
        })
        .map(|e| e.path())
        .collect();
    found.sort();
    found
}

/// The folders from `root` downward in which something is unfinished.
pub fn folders(root: &Path) -> Vec<PathBuf> {
    let (mut found, mut todo) = (Vec::new(), vec![root.to_path_buf()]);
    while let Some(dir) = todo.pop() {
        if !journals(&dir).is_empty() {
            found.push(dir.clone());
        }
        let Ok(entries) = std::fs::read_dir(&dir) else { continue };
        for entry in entries.flatten() {
            let is_folder = entry.file_type().is_ok_and(|t| t.is_dir());
            if is_folder && entry.file_name() != FOLDER {
                todo.push(entry.path());
            }
        }
    }
    found.sort();
    found
}

/// One finding for each of them.
pub fn findings(dir: &Path) -> Vec<Finding> {
    let finding = |path: PathBuf| {
        let what = "a run that alters this folder is at work, or was broken off: until it is \
                    finished, points may be missing or there twice";
        let mut finding = Finding::warning(Kind::Incomplete, path, what);
        finding.remedy = Some(REMEDY.into());
        finding
    };
    journals(dir).into_iter().map(finding).collect()
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

/// The images of `dir` that a fold is about to remove.
pub(super) fn leaving_by_fold(dir: &Path) -> Vec<String> {
    #[derive(serde::Deserialize)]
    struct Fold {
        interim: PathBuf,
        increments: Vec<PathBuf>,
    }
    let Ok(text) = std::fs::read(dir.join(FOLDER).join(FOLD)) else { return Vec::new() };
    let Ok(fold) = serde_json::from_slice::<Fold>(&text) else { return Vec::new() };
    let all = fold.increments.iter().chain([&fold.interim]);
    all.filter_map(|p| Some(p.file_name()?.to_str()?.to_string())).collect()
}
