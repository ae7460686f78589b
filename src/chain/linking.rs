//! A `link-disk` that is at work, or was broken off: `.fleecefs/link-disk.journal` in the folders of both
//! disks, from before the first file gets its second name until the last old one is gone.
//!
//! A manifest whose image is yet to come is listed here, and is no lost point.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::journal::{self, MAX_JOURNAL};
use super::manifest::FOLDER;
use crate::error::{Error, Kind, Result};
use crate::folder::{self, Folder};

/// The journal's name, in the folder for manifests.
pub const NAME: &str = "link-disk.journal";

/// What is being done.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Linking {
    /// The disk's old name, as `list` showed it.
    pub old: String,
    /// Its new name.
    pub new: String,
    /// The names that the old images get.
    pub arriving: Vec<String>,
    /// What the user said of disks of different VMs.
    #[serde(default)]
    pub other_vm: bool,
    /// What he said of other sizes and devices.
    #[serde(default)]
    pub force: bool,
    /// All of them have arrived: an image that is not there now is gone.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub arrived: bool,
}

/// What to do about one that cannot be finished. No command with the names that the journal says: its
/// owner may write there what he likes.
pub const REMEDY: &str = "call 'fleecefs link-disk' again as it was called, or remove the journal: points \
                          may be there twice then, none is lost";

/// Bytes of a disk's name in a journal.
const MAX_NAME: usize = 4096;

impl Linking {
    /// Whether both are of one call.
    pub fn is_of(&self, other: &Linking) -> bool {
        let same = Linking { arrived: other.arrived, ..self.clone() };
        same == *other
    }
}

/// Where the journal of `dir` is.
pub fn journal_path(dir: &Path) -> PathBuf {
    dir.join(FOLDER).join(NAME)
}

/// Reads the journal of `dir`; `None` if there is none.
///
/// # Errors
/// It cannot be read, or is damaged: a half-written one never gets its name.
pub fn read_in(dir: &Folder) -> Result<Option<Linking>> {
    let failed = |e| Error::io(e, "cannot read the journal").at_path(journal_path(dir.path()));
    match folder::absent_is_none(dir.folder(FOLDER)).map_err(failed)? {
        Some(side) => read_side(&side),
        None => Ok(None),
    }
}

/// As [`read_in`], in the folder for manifests.
pub(super) fn read_side(side: &Folder) -> Result<Option<Linking>> {
    let path = || side.join(NAME);
    let failed = |e| Error::io(e, "cannot read the journal").at_path(path());
    let Some(bytes) = side.read_if_there(NAME, MAX_JOURNAL).map_err(failed)? else {
        return Ok(None);
    };
    journal::check_count(&bytes, &path())?;
    let damaged = || {
        Error::new(Kind::Corrupt, "the journal of a link-disk is damaged")
            .at_path(path())
            .remedy("remove the journal, and call 'fleecefs link-disk' again as it was called")
    };
    let linking: Linking = serde_json::from_slice(&bytes).map_err(|e| damaged().with_source(e))?;
    match linking.old.len().max(linking.new.len()) > MAX_NAME {
        true => Err(damaged()),
        false => Ok(Some(linking)),
    }
}

/// The images beside `side` that are on their way in.
pub(super) fn arriving(side: &Folder) -> Vec<String> {
    let linking = read_side(side).ok().flatten().filter(|l| !l.arrived);
    linking.map(|l| l.arriving).unwrap_or_default()
}

/// Writes the journal of `dir`, so that it survives a power cut.
///
/// # Errors
/// What the operating system said; `Unsupported` if it would not be read again.
pub fn write_in(dir: &Folder, linking: &Linking) -> Result<()> {
    let path = journal_path(dir.path());
    let text = serde_json::to_vec_pretty(linking)
        .map_err(|e| Error::new(Kind::Io, "cannot write JSON").with_source(e).at_path(&path))?;
    journal::check_count(&text, &path)?;
    dir.make_folder(FOLDER)
        .and_then(|side| side.write_whole(NAME, &text))
        .map_err(|e| Error::io(e, "cannot write the journal").at_path(&path))
}

/// Fails while a link of the images in `dir` is unfinished: what alters a chain would alter one of the two.
///
/// # Errors
/// `Incomplete`; the journal cannot be read.
pub fn refuse(dir: &Path) -> Result<()> {
    let open = folder::absent_is_none(Folder::open(dir));
    let Some(folder) = open.map_err(|e| Error::io(e, "cannot open the folder").at_path(dir))?
    else {
        return Ok(());
    };
    match read_in(&folder)? {
        None => Ok(()),
        Some(_) => Err(Error::new(Kind::Incomplete, "a link-disk was broken off here")
            .at_path(journal_path(dir))
            .remedy(REMEDY)),
    }
}

/// Removes the journal of `dir`, if there is one.
///
/// # Errors
/// What the operating system said.
pub fn clear_in(dir: &Folder) -> Result<()> {
    let clear = || match folder::absent_is_none(dir.folder(FOLDER))? {
        Some(side) if side.remove_if_there(NAME)? => side.sync(),
        _ => Ok(()),
    };
    clear().map_err(|e| Error::io(e, "cannot remove the journal").at_path(journal_path(dir.path())))
}
