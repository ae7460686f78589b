//! Whether a folder is a backup directory already, by what only fleecefs and qmpbackup leave there. A name
//! that somebody else's file may have as well (`x/x`, `FULL-1-letter`, `uuid`) is no proof.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use super::target_id::{is_uuid, months_of, stored_id};
use crate::backup::names;
use crate::folder::{Entry, EntryKind};
use crate::storage::SourceFile;
use crate::{folder, layer, manifest};

/// Whether `target`, or a folder in it, has backups: ours, qmpbackup's, or those of another VM.
pub(crate) fn has_backups(target: &Path) -> bool {
    // Words that a user chose are an id as well, where a target's id is.
    is_marked(target)
        || matches!(stored_id(target), Ok(Some(_)))
        || folders(target).any(|dir| has_id(&dir) || is_disk(&dir))
        || months_of(target).iter().any(|month| folders(month).any(|dir| is_disk(&dir)))
}

fn folders(dir: &Path) -> impl Iterator<Item = PathBuf> {
    let found = folder::entries(dir).unwrap_or_default().into_iter();
    found.filter(|e| e.kind == EntryKind::Folder).map(|e| dir.join(e.name))
}

/// Whether fleecefs has written there: each run leaves a lock, each point a manifest.
fn is_marked(dir: &Path) -> bool {
    let is_ours = |e: &Entry| {
        let named = e.name == crate::lock::NAME || manifest::image_of(&e.name).is_some();
        named && e.kind == EntryKind::File
    };
    folder::entries(&dir.join(manifest::FOLDER)).unwrap_or_default().iter().any(is_ours)
}

/// Whether a folder of a month or of another VM has its id.
fn has_id(dir: &Path) -> bool {
    matches!(stored_id(dir), Ok(Some(id)) if is_uuid(&id))
}

/// Whether a folder has the images of a disk.
fn is_disk(dir: &Path) -> bool {
    let Some(disk) = dir.file_name().and_then(OsStr::to_str) else { return false };
    let is_image = |e: &Entry| {
        let tail = e.name.to_str().and_then(image_tail);
        e.kind == EntryKind::File
            && tail.is_some_and(|tail| tail == disk || is_qcow2(&dir.join(&e.name)))
    };
    is_marked(dir)
        || folder::entries(dir).unwrap_or_default().iter().any(is_image)
        || is_without_time(dir, disk)
}

/// The disk's name at the end of an image's, which may be unfinished.
fn image_tail(name: &str) -> Option<&str> {
    let whole = name.strip_suffix(".partial").unwrap_or(name);
    names::parse_image(whole).map(|(_, _, tail)| tail)
}

/// Whether qmpbackup has made `disk` in `dir` with `--no-timestamp`: with a link beside it that says what it
/// is, or with the disk's description above it.
fn is_without_time(dir: &Path, disk: &str) -> bool {
    let is = |path: &Path, kind: fn(&std::fs::Metadata) -> bool| {
        folder::look(path).is_ok_and(|meta| kind(&meta))
    };
    let is_told = || {
        let config = dir.parent().map(|above| above.join(format!("{disk}.config")));
        config.is_some_and(|config| is(&config, std::fs::Metadata::is_file))
            || ["FULL", "COPY"]
                .iter()
                .any(|word| is(&dir.join(format!("{word}-{disk}")), std::fs::Metadata::is_symlink))
    };
    is(&dir.join(disk), std::fs::Metadata::is_file) && is_told()
}

fn is_qcow2(path: &Path) -> bool {
    let file = SourceFile::look(path).ok();
    file.is_some_and(|file| matches!(layer::sniff(&file), Ok(Some(layer::Format::Qcow2))))
}
