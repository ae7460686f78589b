//! Journals in a backup directory: what is written down before a backup is changed in place, one file for each
//! kind of work, and each read and written in one place.
//!
//! - [`removal`]: what prune and consolidate are about to remove
//! - [`linking`]: a `link-disk` at work
//! - [`unfinished`]: which of them are in a folder
//! - [`lines`]: one that grows by records, in the state folder; [`paths`]: paths in it
//!
//! Here is what all of them have in common, and what other files ask of the journal of a `commit`.

pub(crate) mod lines;
pub(crate) mod linking;
pub(crate) mod paths;
pub mod removal;
pub(crate) mod unfinished;

use std::path::Path;

use crate::error::{Error, Kind, Result};
use crate::folder::{Folder, PlainName};

/// The journal of a `commit` or `snapshot-rebase`, in the folder for manifests.
pub const FLATTEN: &str = "fold.json";

/// A journal names some images, and has a manifest or two: 100,000 names of 255 bytes.
pub const MAX_JOURNAL: u64 = 32 << 20;

/// Values in a journal: the names of more images than a folder has, and some manifests.
const MAX_VALUES: usize = 1_000_000;

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

/// The images beside `side` that a `commit` or `snapshot-rebase` is about to remove.
pub(crate) fn removed_by_flatten(side: &Folder) -> Vec<String> {
    read_flatten(side).ok().flatten().unwrap_or_default()
}

/// The images that the journal of a `commit` in `side` removes; `None` if there is no journal.
pub(crate) fn read_flatten(side: &Folder) -> Result<Option<Vec<String>>> {
    #[derive(serde::Deserialize)]
    struct Fold {
        interim: PlainName,
        increments: Vec<PlainName>,
    }
    let path = || side.join(FLATTEN);
    let text = side
        .read_if_there(FLATTEN, MAX_JOURNAL)
        .map_err(|e| Error::io(e, "cannot read the journal of a commit").at_path(path()))?;
    let Some(text) = text else { return Ok(None) };
    check_count(&text, &path())?;
    let fold: Fold = serde_json::from_slice(&text).map_err(|e| {
        Error::new(Kind::Corrupt, "the journal of a commit is damaged")
            .with_source(e)
            .at_path(path())
            .remedy("verify the disk, then remove the journal")
    })?;
    let all = fold.increments.iter().chain([&fold.interim]);
    Ok(Some(all.filter_map(|p| Some(p.as_os_str().to_str()?.to_string())).collect()))
}
