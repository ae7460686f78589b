//! The journal of removals ([`super::removal`]) in a folder that is held open, whatever happens to its
//! path; it names nothing but images of that folder.

use std::ffi::OsStr;
use std::path::Path;

use super::manifest::FOLDER;
use super::name;
use super::removal::{Removal, journal_path};
use crate::error::{Error, Kind, Result};
use crate::folder::{Folder, absent_is_none};

/// Longest journal that is read, in bytes: 70,000 images and more.
const MAX_BYTES: u64 = 64 << 20;
/// The journal's name in the folder for manifests.
const JOURNAL: &str = "removal.journal";
/// Begins the temporary names of new images.
pub const TEMPORARY: &str = "consolidate-";
/// What to do about a journal that is none.
const REMEDY: &str = "verify the disk, then remove the journal";

/// Fails if it names anything but images of the folder that the journal `path` is in: its owner may
/// write there what he likes.
fn check_names(removal: &Removal, path: &Path) -> Result<()> {
    let refuse = |name: &str| {
        let what = format!("the journal of removals names {name:?}, which is no image of ours");
        Err(Error::new(Kind::Corrupt, what).at_path(path).remedy(REMEDY))
    };
    let new = removal.publish.as_ref().map(|p| &p.manifest.image);
    for name in removal.remove.iter().chain(&removal.relink).chain(new) {
        if !name::is_image(OsStr::new(name)) {
            return refuse(name);
        }
    }
    let temporary = removal.publish.as_ref().map(|p| &p.temporary);
    let ours = |n: &&String| n.starts_with(TEMPORARY) && name::is_image(OsStr::new(n));
    match temporary.filter(|n| !ours(n)) {
        Some(name) => refuse(name),
        None => Ok(()),
    }
}

/// Reads the journal of `dir`, whose names are all those of images; `None` if there is none.
///
/// # Errors
/// It cannot be read; `Corrupt` if it is damaged or names anything else.
pub fn read(dir: &Folder) -> Result<Option<Removal>> {
    let path = journal_path(dir.path());
    let read = || match absent_is_none(dir.folder(FOLDER))? {
        Some(side) => side.read_if_there(JOURNAL, MAX_BYTES),
        None => Ok(None),
    };
    let bytes = read().map_err(|e| {
        Error::io(e, "cannot read the journal of removals").at_path(&path).remedy(REMEDY)
    })?;
    let Some(bytes) = bytes else { return Ok(None) };
    let removal: Removal = serde_json::from_slice(&bytes).map_err(|e| {
        Error::new(Kind::Corrupt, "the journal of removals is damaged")
            .with_source(e)
            .at_path(&path)
            .remedy(REMEDY)
    })?;
    check_names(&removal, &path)?;
    Ok(Some(removal))
}

/// Writes the journal of `dir`, so that it survives a power cut before anything it names goes.
///
/// # Errors
/// What the operating system said; `Corrupt` if it could not be read again.
pub fn write(dir: &Folder, removal: &Removal) -> Result<()> {
    let path = journal_path(dir.path());
    check_names(removal, &path)?;
    let text = serde_json::to_vec_pretty(removal)
        .map_err(|e| Error::new(Kind::Io, "cannot write JSON").with_source(e).at_path(&path))?;
    dir.make_folder(FOLDER)
        .and_then(|side| side.write_whole(JOURNAL, &text))
        .map_err(|e| Error::io(e, "cannot write the journal of removals").at_path(&path))
}

/// Removes the journal of `dir`.
///
/// # Errors
/// What the operating system said.
pub fn clear(dir: &Folder) -> Result<()> {
    let clear = || {
        let side = dir.folder(FOLDER)?;
        side.remove(JOURNAL)?;
        side.sync()
    };
    clear().map_err(|e| {
        Error::io(e, "cannot remove the journal of removals").at_path(journal_path(dir.path()))
    })
}
