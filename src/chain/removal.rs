//! What prune and consolidate were about to remove from a folder when they were broken off:
//! `.fleecefs/removal.journal`, written before the first file goes, removed after the last.
//!
//! A manifest whose image is gone speaks of a lost point, unless its name is listed here.

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize};

use super::manifest::{FOLDER, Manifest, plain_name};
use super::unfinished::{self, MAX_JOURNAL};
use crate::error::{Error, Kind, Result};
use crate::folder::{Folder, PlainName};

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
        Ok(side) => read_in(&side),
        Err(e) if is_absent(&e) => Ok(None),
        Err(e) => Err(cannot_read(e, &journal_path(dir))),
    }
}

/// As [`read`], in the folder for manifests.
pub(super) fn read_in(side: &Folder) -> Result<Option<Removal>> {
    let path = || side.join(NAME);
    let bytes = side.read_if_there(NAME, MAX_JOURNAL).map_err(|e| cannot_read(e, &path()))?;
    let Some(bytes) = bytes else { return Ok(None) };
    serde_json::from_slice(&bytes).map(Some).map_err(|e| {
        Error::new(Kind::Corrupt, "the journal of removals is damaged")
            .with_source(e)
            .at_path(path())
            .remedy("verify the disk, then remove the journal")
    })
}

fn cannot_read(e: io::Error, path: &Path) -> Error {
    Error::io(e, "cannot read the journal of removals").at_path(path)
}

/// Where something else than a folder has the name of the folder for manifests, nothing is in it.
fn is_absent(e: &io::Error) -> bool {
    matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}

/// The images that are on their way out of `dir`, whatever takes them out.
pub fn pending(dir: &Path) -> Vec<String> {
    Folder::open(&dir.join(FOLDER)).map(|side| pending_in(&side)).unwrap_or_default()
}

/// As [`pending`], with the folder for manifests. A journal that cannot be read names none; the scan
/// says that there is one.
pub(super) fn pending_in(side: &Folder) -> Vec<String> {
    let mut leaving = read_in(side).ok().flatten().map(|r| r.remove).unwrap_or_default();
    leaving.extend(unfinished::leaving_by_fold(side));
    leaving
}

/// Writes the journal of `dir`, so that it survives a power cut before anything it names goes.
///
/// # Errors
/// What the operating system said.
pub fn write(dir: &Path, removal: &Removal) -> Result<()> {
    let path = journal_path(dir);
    let text = serde_json::to_vec_pretty(removal)
        .map_err(|e| Error::new(Kind::Io, "cannot write JSON").with_source(e).at_path(&path))?;
    let write = || {
        let side = Folder::open(dir)?.make_folder(FOLDER)?;
        side.write_whole(NAME, &text)?;
        side.remove_if_there(OLD_TEMPORARY).map(drop)
    };
    write().map_err(|e| Error::io(e, "cannot write the journal of removals").at_path(&path))
}

/// Removes the journal of `dir`.
///
/// # Errors
/// What the operating system said.
pub fn clear(dir: &Path) -> Result<()> {
    let clear = || {
        let side = Folder::open(&dir.join(FOLDER))?;
        side.remove(NAME)?;
        side.sync()
    };
    clear().map_err(|e| {
        Error::io(e, "cannot remove the journal of removals").at_path(journal_path(dir))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::Level;
    use crate::chain::manifest::tests::example;

    fn dir() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().canonicalize().unwrap();
        (dir, path)
    }

    #[test]
    fn what_is_written_is_read_and_goes() {
        let (_dir, path) = dir();
        let publish =
            Publish { temporary: "new".into(), manifest: example("INC-2-d", Level::Full, None) };
        let journal =
            Removal { publish: Some(publish), remove: vec!["a".into()], relink: vec!["b".into()] };
        assert_eq!(read(&path).unwrap(), None);
        write(&path, &journal).unwrap();
        assert_eq!(read(&path).unwrap(), Some(journal));
        assert_eq!(pending(&path), ["a"]);
        clear(&path).unwrap();
        assert_eq!(std::fs::read_dir(path.join(FOLDER)).unwrap().count(), 0);
    }

    #[test]
    fn a_journal_that_names_something_elsewhere_is_damaged() {
        let (_dir, path) = dir();
        write(&path, &Removal::default()).unwrap();
        let publish = |temporary: &str, image: &str| {
            let manifest = example(image, Level::Full, None);
            serde_json::json!({"remove": [], "publish": {"temporary": temporary, "manifest": manifest}})
        };
        for bad in ["", "..", "../a", "a/b", "/etc/passwd", "a\0b"] {
            let journals = [
                serde_json::json!({"remove": ["FULL-1-d", bad]}),
                serde_json::json!({"remove": [], "relink": [bad]}),
                publish(bad, "FULL-1-d"),
                publish("new", bad),
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
}
