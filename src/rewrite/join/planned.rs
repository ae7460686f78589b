//! What will be done: a plan that is printed and carried out.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::chain::{Disk, Point};
use crate::error::{Error, Result};
use crate::folder::{EntryKind, FileId, Folder};
use crate::journal::linking::Linking;
use crate::layout::name::{Name, parse};
use crate::manifest;
use crate::manifest::Manifest;
use crate::text::to_text;

/// What will be done.
#[derive(Debug, Serialize)]
pub(crate) struct JoinPlan {
    /// The disk's old name, as `list` shows it.
    #[serde(serialize_with = "crate::text::as_text")]
    pub old: PathBuf,
    /// Its new name.
    #[serde(serialize_with = "crate::text::as_text")]
    pub new: PathBuf,
    /// The old name's points, parents first.
    pub points: Vec<RenamedImage>,
    /// What has the name of an image of `old`, and is no file: it stays where it is.
    #[serde(serialize_with = "texts")]
    pub left: Vec<PathBuf>,
    /// What the journal says.
    #[serde(skip)]
    pub(crate) linking: Linking,
    /// Their folder.
    #[serde(skip)]
    pub(crate) from: PathBuf,
    /// The folder that they go to.
    #[serde(skip)]
    pub(crate) to: PathBuf,
}

fn texts<S: serde::Serializer>(paths: &[PathBuf], to: S) -> Result<S::Ok, S::Error> {
    to.collect_seq(paths.iter().map(|p| to_text(p.as_os_str())))
}

/// One image that gets another name.
#[derive(Debug, Serialize)]
pub(crate) struct RenamedImage {
    /// Its name.
    pub from: String,
    /// The name that it gets.
    pub to: String,
    /// The time of its point, in seconds since the epoch.
    #[serde(serialize_with = "crate::units::as_time")]
    pub time: i64,
    /// The file; `None` if only the manifest is left.
    #[serde(skip)]
    pub(crate) id: Option<FileId>,
    /// Its new manifest, if it has one.
    #[serde(skip)]
    pub(crate) manifest: Option<Manifest>,
}

impl JoinPlan {
    /// Nothing to do: the points of `old` are among those of `new`. What could not come along is told again.
    ///
    /// # Errors
    /// The folder of `old` cannot be read.
    pub(crate) fn done(root: &Path, old: &Path, new: &Disk) -> Result<Self> {
        let to = new.points.first().and_then(|p| p.source.parent()).unwrap_or(Path::new(""));
        Ok(JoinPlan {
            old: old.to_path_buf(),
            new: new.path.clone(),
            points: Vec::new(),
            left: left_of(root, old)?,
            linking: Linking::default(),
            from: PathBuf::new(),
            to: to.to_path_buf(),
        })
    }

    /// Goes on with what this journal says: both keep its words, from wherever they are seen.
    pub(crate) fn going_on(self, journal: &Linking) -> Self {
        let Linking { old, new, .. } = journal.clone();
        JoinPlan { linking: Linking { old, new, ..self.linking }, ..self }
    }
}

/// Whether points of the disk `new` were those of a disk `old`: then there is nothing left to do. It may have
/// been called from a folder further up or down.
pub(crate) fn is_joined(old: &Path, new: &Disk) -> bool {
    let is = |p: &Point| {
        let (dir, name) = (p.source.parent()?, p.source.file_name()?);
        let m = manifest::read(dir, name).ok().flatten()?;
        Some(is_same_end(Path::new(&m.linked_from?), Path::new(&to_text(old.as_os_str()))))
    };
    new.points.iter().any(|p| is(p) == Some(true))
}

pub(crate) fn is_same_end(a: &Path, b: &Path) -> bool {
    a.ends_with(b) || b.ends_with(a)
}

/// What has the name of an image of the disk `old`, which has no points any more, and is no file.
fn left_of(root: &Path, old: &Path) -> Result<Vec<PathBuf>> {
    let own = root.join(old);
    let (dir, tail) = match crate::folder::is_folder(&own) {
        true => (own.as_path(), None),
        false => (own.parent().unwrap_or(root), own.file_name()),
    };
    let open = crate::folder::absent_is_none(Folder::open(dir));
    let open = open.map_err(|e| Error::io(e, "cannot open the folder").at_path(dir))?;
    open.map_or(Ok(Vec::new()), |folder| no_files(&folder, tail))
}

/// What has the name of an image of the disk `tail`, or of any, in this folder, and is none: a folder, a pipe,
/// a link.
pub(crate) fn no_files(folder: &Folder, tail: Option<&OsStr>) -> Result<Vec<PathBuf>> {
    let failed = |e| Error::io(e, "cannot list the folder").at_path(folder.path());
    let is_named = |name: &OsStr| match parse(name) {
        Name::Backup { stamp: Some(_), disk, .. } => tail.is_none_or(|tail| *disk == *tail),
        _ => false,
    };
    let entries = folder.entries().map_err(failed)?.into_iter();
    let left = entries.filter(|e| e.kind != EntryKind::File && is_named(&e.name));
    let mut left: Vec<PathBuf> = left.map(|e| folder.join(&e.name)).collect();
    left.sort();
    Ok(left)
}
