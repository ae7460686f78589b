//! Which other files an image may name: the header of a backup is written by a QEMU, and that is one
//! guest's. What it names must not show another guest's bytes as its own.
//!
//! Only an image that is no backup may depend on images of other folders. A whole backup depends on nothing,
//! or on what is beside it and is no other disk's; its data file is beside it and nobody else's.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::group::base_name;
use crate::chain::walk::pointer;
use crate::chain::walk::tree::{FileEntry, FileId, Tree};
use crate::error::{Error, Kind};
use crate::layout::Level;
use crate::layout::name::{Name, Promise, promise};
use crate::text::path_text;

/// The level that its name or manifest gives to a file.
fn stated_level(entry: &FileEntry) -> Option<Level> {
    match entry.name {
        Name::Backup { level, .. } => Some(level),
        Name::Other | Name::Ignored => {
            entry.manifest.as_ref().map(|m| m.level).filter(|l| is_backup(*l))
        }
    }
}

fn is_backup(level: Level) -> bool {
    matches!(level, Level::Full | Level::Copy | Level::Inc | Level::Diff)
}

/// A file, and as what it belongs to a disk, if it does.
pub(in crate::chain) type FileAndLevel<'a> = (&'a FileEntry, Option<Level>);

/// Fails if `from`, which no other file of its disk is below, may not depend on `to`.
///
/// # Errors
/// `Unsupported`.
pub(in crate::chain) fn check_backing(from: FileAndLevel, to: FileAndLevel) -> Result<(), Error> {
    let level =
        |(entry, level): FileAndLevel| level.filter(|l| is_backup(*l)).or(stated_level(entry));
    let beside = from.0.path.parent() == to.0.path.parent();
    let of_another = level(to).is_some() && disk(from.0) != disk(to.0);
    if level(from).is_none() || beside && !of_another {
        return Ok(());
    }
    let what = format!(
        "a FULL has no backing file, but this one names {}: another disk's data would be shown",
        path_text(&to.0.path)
    );
    Err(Error::new(Kind::Unsupported, what).at_path(&from.0.path).remedy(
        "restore this file from another copy of the backup; if it is meant to be like this, \
         flatten it with 'qemu-img convert'",
    ))
}

fn disk(entry: &FileEntry) -> &OsStr {
    match &entry.name {
        Name::Backup { disk, .. } => disk,
        Name::Other | Name::Ignored => base_name(entry),
    }
}

/// Whose the data files of images are.
#[derive(Default)]
pub(in crate::chain) struct DataFiles {
    /// Files that, by their neighbours, may be FULLs without a time in their names.
    timeless: HashSet<FileId>,
}

impl DataFiles {
    /// Looks at the neighbours of all files, if any image has a data file.
    pub(crate) fn new(tree: &Tree) -> Self {
        let has_data_file = |f: &FileEntry| f.info().is_some_and(|i| i.data_file.is_some());
        if !tree.files.iter().any(has_data_file) {
            return Self::default();
        }
        let mut known: HashSet<(&Path, &OsStr)> = HashSet::new();
        for file in &tree.files {
            if let Name::Backup { level: Level::Inc | Level::Diff, disk, .. } = &file.name {
                known.extend(file.path.parent().map(|folder| (folder, disk.as_os_str())));
            }
        }
        let links = || tree.folders.iter().flat_map(|f| f.links.iter().map(move |l| (f, l)));
        known.extend(links().map(|(f, l)| (f.path.as_path(), l.disk.as_os_str())));
        let by_neighbours = |f: &FileEntry| {
            let (Some(folder), name) = (f.path.parent(), base_name(f)) else { return false };
            let mut config = name.to_os_string();
            config.push(".config");
            let in_own = folder.file_name() == Some(name);
            f.name == Name::Other
                && (in_own || known.contains(&(folder, name)) || tree.has(&folder.join(config)))
        };
        let files = tree.files.iter().enumerate();
        let mut timeless: HashSet<FileId> =
            files.filter(|(_, f)| by_neighbours(f)).map(|(i, _)| i).collect();
        timeless.extend(links().filter_map(|(_, l)| l.target));
        DataFiles { timeless }
    }

    /// Fails if the bytes of `data` are not those of `image`, which names it as its data file.
    ///
    /// # Errors
    /// `Unsupported`.
    pub(crate) fn check(&self, tree: &Tree, image: FileId, data: FileId) -> Result<(), Error> {
        let (from, to) = (&tree.files[image], &tree.files[data]);
        from.check_followed(to)?;
        let backup = stated_level(from).is_some() || self.timeless.contains(&image);
        let plain_image = promise(base_name(to)) == Promise::Raw;
        let free = is_called_after(to, from) || !plain_image && !self.has_place(tree, data);
        let beside = from.path.parent() == to.path.parent();
        if !backup || beside && to.manifest.is_none() && free {
            return Ok(());
        }
        let what = format!(
            "it names {} as its data file, which may be another disk: a backup's data file is \
             beside it and has its name",
            path_text(&to.path)
        );
        Err(Error::new(Kind::Unsupported, what)
            .at_path(&from.path)
            .remedy("flatten the image with 'qemu-img convert'"))
    }

    /// Whether it is something by itself, whoever claims it.
    fn has_place(&self, tree: &Tree, file: FileId) -> bool {
        let entry = &tree.files[file];
        entry.name != Name::Other
            || entry.manifest.is_some()
            || !entry.is_raw()
            || self.timeless.contains(&file)
    }

    /// The files that are parts of images: external data files that are inside the directory.
    pub(crate) fn claimed(&self, tree: &Tree) -> HashSet<FileId> {
        let named = |image: FileId| {
            let f = &tree.files[image];
            let name = f.info()?.data_file.as_deref()?;
            let file = tree.lookup(f.path.parent()?, &pointer::parse(name).ok()?.path)?;
            let data = &tree.files[file];
            let free = data.manifest.is_none() && data.is_raw() && is_called_after(data, f);
            let beside = data.path.parent() == f.path.parent();
            let part = beside && (free || !self.has_place(tree, file));
            (part && self.check(tree, image, file).is_ok()).then_some(file)
        };
        (0..tree.files.len()).filter_map(named).collect()
    }
}

/// `FULL-1-d.data.raw` and `FULL-1-d.qcow2`.
fn is_called_after(data: &FileEntry, image: &FileEntry) -> bool {
    let stem = Path::new(base_name(image)).file_stem().unwrap_or_default().as_bytes();
    base_name(data).as_bytes().strip_prefix(stem).is_some_and(|rest| rest.starts_with(b"."))
}
