//! What prune and consolidate were about to remove from a folder when they were interrupted:
//! `.fleecefs/removal.journal`, written before the first file goes, removed after the last.
//!
//! A manifest whose image is gone speaks of a lost point, unless its name is listed here.

use std::ffi::OsStr;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize};

use super::{MAX_JOURNAL, linking};
use crate::error::{Error, Kind, Result};
use crate::folder::{Folder, PlainName};
use crate::journal;
use crate::manifest::{FOLDER, Manifest, plain_name};

/// The journal's name, in the folder for manifests.
pub const NAME: &str = "removal.journal";
/// The name of an unfinished one in version 0.1.0.
const OLD_TEMPORARY: &str = "removal.journal-tmp";

/// The journal of one folder. Every name in it is a single one, of a file in that folder: another does
/// not get in when it is read.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Removal {
    /// A new image that takes the place of what is removed.
    #[serde(default)]
    pub publish: Option<Publish>,
    /// Image files to remove, in this order.
    #[serde(deserialize_with = "plain_names")]
    pub remove: Vec<String>,
    /// Images whose headers named one of these as their backing file: they lose the pointer before
    /// anything goes, and get one to the new image in the end.
    #[serde(default, deserialize_with = "plain_names")]
    pub relink: Vec<String>,
}

/// A new image on its way in.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Publish {
    /// Its temporary name, in `.fleecefs/`.
    #[serde(deserialize_with = "plain_name")]
    pub temporary: String,
    /// Its manifest, with its final name.
    pub manifest: Manifest,
}

fn plain_names<'a, D: Deserializer<'a>>(from: D) -> Result<Vec<String>, D::Error> {
    let names = Vec::<String>::deserialize(from)?;
    let check = |name: &String| PlainName::new(name).map(drop).map_err(serde::de::Error::custom);
    names.iter().try_for_each(check)?;
    Ok(names)
}

/// Where the journal of `dir` is.
pub fn journal_path(dir: &Path) -> PathBuf {
    dir.join(FOLDER).join(NAME)
}

/// Reads the journal of `dir`; `None` if there is none.
///
/// # Errors
/// It cannot be read, names something outside its folder, or is damaged: a half-written one never
/// gets its name.
pub fn read(dir: &Path) -> Result<Option<Removal>> {
    match Folder::open(&dir.join(FOLDER)) {
        Ok(side) => read_side(&side),
        Err(e) if is_absent(&e) => Ok(None),
        Err(e) => Err(cannot_read(e, &journal_path(dir))),
    }
}

/// As [`read`], in the folder for manifests.
pub(crate) fn read_side(side: &Folder) -> Result<Option<Removal>> {
    let path = || side.join(NAME);
    let bytes = side.read_if_there(NAME, MAX_JOURNAL).map_err(|e| cannot_read(e, &path()))?;
    let Some(bytes) = bytes else { return Ok(None) };
    journal::check_count(&bytes, &path())?;
    let removal: Removal = serde_json::from_slice(&bytes).map_err(|e| {
        Error::new(Kind::Corrupt, "the journal of removals is damaged")
            .with_source(e)
            .at_path(path())
            .remedy(REMEDY)
    })?;
    removal.check_names(&path())?;
    Ok(Some(removal))
}

fn cannot_read(e: io::Error, path: &Path) -> Error {
    Error::io(e, "cannot read the journal of removals").at_path(path)
}

/// Where something else than a folder has the name of the folder for manifests, nothing is in it.
fn is_absent(e: &io::Error) -> bool {
    matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}

/// The images that are on their way out of `dir`, or into it, whatever moves them.
pub fn pending(dir: &Path) -> Vec<String> {
    Folder::open(&dir.join(FOLDER)).map(|side| pending_in(&side)).unwrap_or_default()
}

/// As [`pending`], with the folder for manifests. A journal that cannot be read names none; the scan
/// says that there is one.
pub(crate) fn pending_in(side: &Folder) -> Vec<String> {
    let mut leaving = read_side(side).ok().flatten().map(|r| r.remove).unwrap_or_default();
    leaving.extend(journal::removed_by_flatten(side));
    leaving.extend(linking::arriving(side));
    leaving
}

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
            let what = format!(
                "the journal of removals names {name:?}, which is not an image that fleecefs made here"
            );
            Err(Error::new(Kind::Corrupt, what).at_path(path).remedy(REMEDY))
        };
        let new = self.publish.as_ref().map(|p| &p.manifest.image);
        for name in self.remove.iter().chain(&self.relink).chain(new) {
            if !crate::layout::name::is_image(OsStr::new(name)) {
                return refuse(name);
            }
        }
        match &self.publish {
            Some(p) if !p.temporary.starts_with(TEMPORARY) => refuse(&p.temporary),
            _ => Ok(()),
        }
    }
}

/// As [`read`], in a folder that is held.
///
/// # Errors
/// See [`read`].
pub fn read_in(dir: &Folder) -> Result<Option<Removal>> {
    match dir.folder(FOLDER) {
        Ok(side) => read_side(&side),
        Err(e) if is_absent(&e) => Ok(None),
        Err(e) => Err(cannot_read(e, &journal_path(dir.path()))),
    }
}

/// Writes the journal of `dir`, so that it survives a power cut before anything it names goes.
///
/// # Errors
/// What the operating system said; `Corrupt` if it would not be read again.
pub fn write_in(dir: &Folder, removal: &Removal) -> Result<()> {
    let path = journal_path(dir.path());
    removal.check_names(&path)?;
    let text = serde_json::to_vec_pretty(removal)
        .map_err(|e| Error::new(Kind::Io, "cannot write JSON").with_source(e).at_path(&path))?;
    journal::check_count(&text, &path)?;
    let write = || {
        let side = dir.make_folder(FOLDER)?;
        side.write_whole(NAME, &text)?;
        side.remove_if_there(OLD_TEMPORARY).map(drop)
    };
    write().map_err(|e| Error::io(e, "cannot write the journal of removals").at_path(&path))
}

/// Removes the journal of `dir`.
///
/// # Errors
/// What the operating system said.
pub fn clear_in(dir: &Folder) -> Result<()> {
    let clear = || {
        let side = dir.folder(FOLDER)?;
        side.remove(NAME)?;
        side.sync()
    };
    clear().map_err(|e| {
        Error::io(e, "cannot remove the journal of removals").at_path(journal_path(dir.path()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Level;
    use crate::manifest::tests::example;

    fn dir() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().canonicalize().unwrap();
        (dir, path)
    }

    #[test]
    fn what_is_written_is_read_and_goes() {
        let (_dir, path) = dir();
        let publish = Publish {
            temporary: "consolidate-INC-2-d".into(),
            manifest: example("INC-2-d", Level::Full, None),
        };
        let journal =
            Removal { publish: Some(publish), remove: vec!["a".into()], relink: vec!["b".into()] };
        assert_eq!(read(&path).unwrap(), None);
        let folder = Folder::open(&path).unwrap();
        write_in(&folder, &journal).unwrap();
        assert_eq!(read(&path).unwrap(), Some(journal));
        assert_eq!(pending(&path), ["a"]);
        clear_in(&folder).unwrap();
        assert_eq!(std::fs::read_dir(path.join(FOLDER)).unwrap().count(), 0);
    }

    #[test]
    fn a_journal_that_names_something_elsewhere_is_damaged() {
        let (_dir, path) = dir();
        write_in(&Folder::open(&path).unwrap(), &Removal::default()).unwrap();
        let publish = |temporary: &str, image: &str| {
            let manifest = example(image, Level::Full, None);
            serde_json::json!({"remove": [], "publish": {"temporary": temporary, "manifest": manifest}})
        };
        for bad in ["", "..", "../a", "a/b", "/etc/passwd", "a\0b", ".bashrc"] {
            let journals = [
                serde_json::json!({"remove": ["FULL-1-d", bad]}),
                serde_json::json!({"remove": [], "relink": [bad]}),
                publish(bad, "FULL-1-d"),
                publish("consolidate-FULL-1-d", bad),
            ];
            for journal in journals {
                std::fs::write(journal_path(&path), journal.to_string()).unwrap();
                let e = read(&path).unwrap_err();
                assert_eq!(e.kind(), Kind::Corrupt, "{journal}");
                assert_eq!(
                    (e.path(), e.remedy_text().is_some()),
                    (Some(&*journal_path(&path)), true)
                );
                assert!(pending(&path).is_empty(), "{journal}");
            }
        }
    }

    /// Whoever lists meanwhile takes a manifest without its image for no lost point.
    #[test]
    fn what_any_journal_says_comes_or_goes_is_pending() {
        let (_dir, path) = dir();
        let folder = Folder::open(&path).unwrap();
        let side = folder.make_folder(FOLDER).unwrap();
        let fold = serde_json::json!({"interim": "FULL-2-d", "increments": ["INC-1-d", "INC-2-d"]});
        side.write_whole(journal::FLATTEN, fold.to_string().as_bytes()).unwrap();
        assert_eq!(pending(&path), ["INC-1-d", "INC-2-d", "FULL-2-d"]);
        side.remove(journal::FLATTEN).unwrap();
        for arrived in [false, true] {
            let link = linking::Linking {
                old: "old".into(),
                new: "new".into(),
                arriving: vec!["FULL-1-new".into()],
                arrived,
                ..linking::Linking::default()
            };
            linking::write_in(&folder, &link).unwrap();
            assert_eq!(pending(&path).is_empty(), arrived);
        }
    }

    #[test]
    fn a_journal_of_too_many_values_is_refused_before_it_is_read() {
        let (_dir, path) = dir();
        let list = |n: usize| format!("{{\"remove\":[{}\"FULL-1-d\"]}}", "\"FULL-1-d\",".repeat(n));
        journal::check_count(list(100).as_bytes(), &path).unwrap();
        let e = journal::check_count(list(1_000_001).as_bytes(), &path).unwrap_err();
        assert_eq!(e.kind(), Kind::Corrupt);
    }
}
