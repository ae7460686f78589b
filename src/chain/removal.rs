//! What prune and consolidate were about to remove from a folder when they were broken off:
//! `.fleecefs/removal.journal`, written before the first file goes, removed after the last.
//!
//! A manifest whose image is gone speaks of a lost point, unless its name is listed here.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::manifest::{FOLDER, Manifest};
use crate::error::{Error, Kind, Result};
use crate::folder::{Folder, absent_is_none};

/// The journal of one folder.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Removal {
    /// A new image that takes the place of what is removed.
    #[serde(default)]
    pub publish: Option<Publish>,
    /// Image files to remove, in this order.
    pub remove: Vec<String>,
    /// Images whose headers named one of these as their backing file: they lose the pointer before
    /// anything goes, and get one to the new image in the end.
    #[serde(default)]
    pub relink: Vec<String>,
}

/// A new image on its way in.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Publish {
    /// Its temporary name, in `.fleecefs/`.
    pub temporary: String,
    /// Its manifest, with its final name.
    pub manifest: Manifest,
}

/// Where the journal of `dir` is.
pub fn journal_path(dir: &Path) -> PathBuf {
    dir.join(FOLDER).join("removal.journal")
}

/// Reads the journal of `dir`; `None` if there is none.
///
/// # Errors
/// It cannot be read, or is damaged: a half-written one never gets its name.
pub fn read(dir: &Path) -> Result<Option<Removal>> {
    let path = journal_path(dir);
    let bytes = match std::fs::read(&path) {
        Ok(b) => b,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io(e, "cannot read the journal of removals").at_path(path)),
    };
    serde_json::from_slice(&bytes).map(Some).map_err(|e| {
        Error::new(Kind::Corrupt, "the journal of removals is damaged")
            .with_source(e)
            .at_path(path)
            .remedy("verify the disk, then remove the journal")
    })
}

/// The images that are on their way out of `dir`, whatever takes them out.
pub fn pending(dir: &Path) -> Vec<String> {
    let mut leaving = read(dir).ok().flatten().map(|r| r.remove).unwrap_or_default();
    leaving.extend(super::unfinished::leaving_by_fold(dir));
    leaving
}

/// Writes the journal of `dir`, so that it survives a power cut before anything it names goes.
///
/// # Errors
/// What the operating system said.
pub fn write(dir: &Path, removal: &Removal) -> Result<()> {
    let path = journal_path(dir);
    let temporary = path.with_extension("journal-tmp");
    let text = serde_json::to_vec_pretty(removal)
        .map_err(|e| Error::new(Kind::Io, "cannot write JSON").with_source(e).at_path(&path))?;
    let write = || {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(&text)?;
        file.sync_all()?;
        std::fs::rename(&temporary, &path)?;
        File::open(dir.join(FOLDER))?.sync_all()
    };
    write().map_err(|e| {
        let _ = std::fs::remove_file(&temporary);
        Error::io(e, "cannot write the journal of removals").at_path(&path)
    })
}

/// Removes the journal of `dir`.
///
/// # Errors
/// What the operating system said.
pub fn clear(dir: &Path) -> Result<()> {
    let path = journal_path(dir);
    std::fs::remove_file(&path)
        .and_then(|()| File::open(dir.join(FOLDER))?.sync_all())
        .map_err(|e| Error::io(e, "cannot remove the journal of removals").at_path(path))
}

/// Longest journal that is read, in bytes: 70,000 images and more.
const MAX_BYTES: u64 = 64 << 20;
/// The journal's name in the folder for manifests.
const JOURNAL: &str = "removal.journal";
/// Begins the temporary names of new images.
pub const TEMPORARY: &str = "consolidate-";
/// What to do about a journal that is none.
const REMEDY: &str = "verify the disk, then remove the journal";

impl Removal {
    /// Fails if it names anything but images of the folder that the journal `path` is in: its owner
    /// may write there what he likes.
    ///
    /// # Errors
    /// `Corrupt`.
    fn check_names(&self, path: &Path) -> Result<()> {
        let refuse = |name: &str| {
            let what = format!("the journal of removals names {name:?}, which is no image of ours");
            Err(Error::new(Kind::Corrupt, what).at_path(path).remedy(REMEDY))
        };
        let new = self.publish.as_ref().map(|p| &p.manifest.image);
        for name in self.remove.iter().chain(&self.relink).chain(new) {
            if !super::name::is_image(OsStr::new(name)) {
                return refuse(name);
            }
        }
        match &self.publish {
            Some(p) if p.temporary != format!("{TEMPORARY}{}", p.manifest.image) => {
                refuse(&p.temporary)
            }
            _ => Ok(()),
        }
    }
}

/// [`read`] in a folder that is held; all names are those of images.
///
/// # Errors
/// See [`read`]; `Corrupt` if it names anything else.
pub fn read_in(dir: &Folder) -> Result<Option<Removal>> {
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
    removal.check_names(&path)?;
    Ok(Some(removal))
}

/// [`write()`] in a folder that is held.
///
/// # Errors
/// See [`write()`]; `Corrupt` if it would not be read again.
pub fn write_in(dir: &Folder, removal: &Removal) -> Result<()> {
    let path = journal_path(dir.path());
    removal.check_names(&path)?;
    let text = serde_json::to_vec_pretty(removal)
        .map_err(|e| Error::new(Kind::Io, "cannot write JSON").with_source(e).at_path(&path))?;
    dir.make_folder(FOLDER)
        .and_then(|side| side.write_whole(JOURNAL, &text))
        .map_err(|e| Error::io(e, "cannot write the journal of removals").at_path(&path))
}

/// [`clear`] in a folder that is held.
///
/// # Errors
/// What the operating system said.
pub fn clear_in(dir: &Folder) -> Result<()> {
    let clear = || {
        let side = dir.folder(FOLDER)?;
        side.remove(JOURNAL)?;
        side.sync()
    };
    clear().map_err(|e| {
        Error::io(e, "cannot remove the journal of removals").at_path(journal_path(dir.path()))
    })
}
