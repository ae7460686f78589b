//! Fleece images that killed runs left, and which of them are removed: those that a journal or a note
//! names, that look like ours in every way, and that are the file that was made.
//!
//! A fleece image has a name only where it must have one (see [`crate::backup::fleece`]). A note is in the
//! backup directory, whose owner may write anything into it, and a journal of version 0.1.0 does not
//! say which file was made: so a name is never enough.

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::backup::names;
use crate::error::{Error, Result};
use crate::folder;
use crate::folder::{FileId, Folder};
use crate::journal::paths;
use crate::text::path_text;

/// The longest note, in bytes: a path and two numbers, in JSON.
pub(crate) const LONGEST_NOTE: u64 = 64 << 10;

/// A file that a run made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreatedFile {
    /// Its name.
    pub path: PathBuf,
    /// Which file it is, once it is there.
    pub id: Option<FileId>,
}

/// A note as it is written.
#[derive(Serialize, Deserialize)]
struct Note {
    #[serde(with = "paths")]
    path: PathBuf,
    id: Option<FileId>,
}

/// What is noted about a fleece image.
pub(crate) fn note(fleece: &CreatedFile) -> Vec<u8> {
    let note = Note { path: fleece.path.clone(), id: fleece.id };
    serde_json::to_vec(&note).unwrap_or_default()
}

/// Version 0.1.0 noted the path alone.
fn parse(note: &[u8]) -> CreatedFile {
    match serde_json::from_slice::<Note>(note) {
        Ok(Note { path, id }) => CreatedFile { path, id },
        Err(_) => CreatedFile { path: OsStr::from_bytes(note).into(), id: None },
    }
}

/// Removes what a note in the folder `dir` names, if it is a fleece image of ours in that folder. A
/// note may be the work of the folder's owner: what it names elsewhere stays.
pub(crate) fn remove_noted(note: &[u8], dir: &Path) {
    let made = parse(note);
    if made.path.parent() != Some(dir) {
        if folder::exists(&made.path) {
            let path = path_text(&made.path);
            log::warn!(
                "{path}: may be the fleece image of an unfinished backup; remove it if no backup runs"
            );
        }
        return;
    }
    if let Err(e) = remove(&made) {
        log::warn!("{}", e.report());
    }
}

/// Holds a file open that a journal names: QEMU's closing it then frees nothing, which would take
/// time in its main loop. `None` if it is not there.
pub(crate) fn hold(path: &Path) -> Option<File> {
    let real = folder::resolve(path.parent()?).ok()?;
    Folder::open(&real).ok()?.open_file(path.file_name()?).ok()
}

/// Removes what a journal names, if it is a fleece image of ours. Links on the way to it are
/// followed as they are on the command line.
///
/// # Errors
/// What the operating system said.
pub(crate) fn remove_recorded(made: &CreatedFile) -> Result<()> {
    let (Some(parent), Some(name)) = (made.path.parent(), made.path.file_name()) else {
        return Ok(());
    };
    let real = folder::absent_is_none(folder::resolve(parent));
    let real = real.map_err(|e| Error::io(e, "cannot find the folder").at_path(parent))?;
    let Some(real) = real else { return Ok(()) };
    remove(&CreatedFile { path: real.join(name), id: made.id })
}

fn remove(made: &CreatedFile) -> Result<()> {
    let path = &made.path;
    // None, or a descriptor set's name.
    if !path.is_absolute() || path.starts_with("/dev/fdset") {
        return Ok(());
    }
    let failed = |e| Error::io(e, "cannot remove the fleece image").at_path(path);
    let Some((folder, name)) = folder::absent_is_none(Folder::of(path)).map_err(failed)? else {
        return Ok(());
    };
    let Some(meta) = folder::absent_is_none(folder.look(&name)).map_err(failed)? else {
        return Ok(());
    };
    let there = FileId::of(&meta);
    let named = name.to_str().is_some_and(names::is_fleece);
    let ours = meta.uid() == rustix::process::geteuid().as_raw() || made.id == Some(there);
    let same = made.id.is_none_or(|id| agree(id, there));
    if !(named && meta.is_file() && meta.nlink() == 1 && ours && same) {
        log::warn!("{}: this is not the fleece image that was made: it stays", path_text(path));
        return Ok(());
    }
    folder.remove_if_same(&name, there).map(drop).map_err(failed)
}

/// Whether a file is the one that was made. Device numbers are given anew at a restart (and on NFS
/// and btrfs at each mount): what a run before it made has the same inode number alone.
pub(crate) fn agree(made: FileId, there: FileId) -> bool {
    made.ino == there.ino
}

/// The path of a fleece image in `dir`.
pub(crate) fn fleece_path(dir: &Path, run: &str, index: usize) -> PathBuf {
    dir.join(names::fleece(run, index))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAME: &str = "fleecefs-0123456789ab-0.fleece.raw";

    #[test]
    fn notes_come_back_and_so_do_those_of_old() {
        let id = Some(FileId { dev: 1, ino: 2 });
        for made in [
            CreatedFile { path: "/a/b".into(), id },
            CreatedFile { path: OsStr::from_bytes(b"/a/\xff\n").into(), id: None },
        ] {
            assert_eq!(parse(&note(&made)), made);
        }
        assert_eq!(parse(b"/fast/x.raw"), CreatedFile { path: "/fast/x.raw".into(), id: None });
    }

    #[test]
    fn only_the_fleece_image_that_was_made_is_removed() {
        let d = tempfile::tempdir().unwrap();
        let dir = d.path().canonicalize().unwrap();
        let path = dir.join(NAME);
        let removed = |path: &Path, id: Option<FileId>| {
            remove_noted(&note(&CreatedFile { path: path.into(), id }), &dir);
            !folder::exists(path)
        };
        let make = || {
            std::fs::write(&path, "x").unwrap();
            FileId::of(&folder::look(&path).unwrap())
        };
        let id = make();
        assert!(removed(&path, Some(id)));
        make();
        assert!(removed(&path, None));
        let id = make();
        assert!(!removed(&path, Some(FileId { dev: id.dev, ino: id.ino + 1 })));
        // Another name of it, a link, a folder, another kind of name.
        std::fs::hard_link(&path, dir.join("second")).unwrap();
        assert!(!removed(&path, Some(id)));
        std::fs::remove_file(&path).unwrap();
        assert!(!removed(&dir.join("second"), Some(id)));
        std::os::unix::fs::symlink("second", &path).unwrap();
        assert!(!removed(&path, None));
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        assert!(!removed(&path, None));
        std::fs::remove_dir(&path).unwrap();
        // No link on the way is followed for a note; for a journal it is.
        make();
        std::fs::create_dir(dir.join("other")).unwrap();
        std::os::unix::fs::symlink(&dir, dir.join("other/link")).unwrap();
        let linked = dir.join("other/link").join(NAME);
        remove_noted(&note(&CreatedFile { path: linked.clone(), id: None }), &dir);
        // Nor does a note reach out of its folder.
        remove_noted(&note(&CreatedFile { path: path.clone(), id: None }), &dir.join("other"));
        assert!(path.exists());
        remove_recorded(&CreatedFile { path: linked, id: None }).unwrap();
        assert!(!path.exists());
    }

    /// A target may be in memory.
    #[test]
    fn below_dev_only_sets_of_descriptors_are_no_files() {
        let Ok(d) = tempfile::tempdir_in("/dev/shm") else {
            println!("skipped: below_dev_only_sets_of_descriptors_are_no_files (no /dev/shm)");
            return;
        };
        let path = d.path().join(NAME);
        std::fs::write(&path, "x").unwrap();
        remove_recorded(&CreatedFile { path: path.clone(), id: None }).unwrap();
        assert!(!path.exists());
        remove_recorded(&CreatedFile { path: "/dev/fdset/1".into(), id: None }).unwrap();
    }

    #[test]
    fn another_users_file_is_no_fleece_image_of_ours() {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: another_users_file_is_no_fleece_image_of_ours (needs root)");
            return;
        }
        let d = tempfile::tempdir().unwrap();
        let path = d.path().canonicalize().unwrap().join(NAME);
        std::fs::write(&path, "x").unwrap();
        std::os::unix::fs::chown(&path, Some(65534), None).unwrap();
        remove_noted(&note(&CreatedFile { path: path.clone(), id: None }), path.parent().unwrap());
        assert!(path.exists());
        // What root makes on a share may belong to another user at once.
        let id = Some(FileId::of(&folder::look(&path).unwrap()));
        remove_recorded(&CreatedFile { path: path.clone(), id }).unwrap();
        assert!(!path.exists());
    }
}
