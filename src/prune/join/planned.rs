//! What will be done: a plan that is printed and carried out.

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::chain::linking::Linking;
use crate::chain::manifest::{self, Manifest};
use crate::chain::{Disk, Point};
use crate::error::Result;
use crate::folder::FileId;
use crate::text::to_text;

/// What will be done.
#[derive(Debug, Serialize)]
pub struct Joining {
    /// The disk's old name, as `list` shows it.
    #[serde(serialize_with = "crate::text::as_text")]
    pub old: PathBuf,
    /// Its new name.
    #[serde(serialize_with = "crate::text::as_text")]
    pub new: PathBuf,
    /// The old name's points, parents first.
    pub points: Vec<Moved>,
    /// What has the name of an image of `old`, and is no file: it stays where it is.
    #[serde(serialize_with = "texts")]
    pub left: Vec<PathBuf>,
    /// What the journal says.
    #[serde(skip)]
    pub(super) linking: Linking,
    /// Their folder.
    #[serde(skip)]
    pub(super) from: PathBuf,
    /// The folder that they go to.
    #[serde(skip)]
    pub(super) to: PathBuf,
}

fn texts<S: serde::Serializer>(paths: &[PathBuf], to: S) -> Result<S::Ok, S::Error> {
    to.collect_seq(paths.iter().map(|p| to_text(p.as_os_str())))
}

/// One image that gets another name.
#[derive(Debug, Serialize)]
pub struct Moved {
    /// Its name.
    pub from: String,
    /// The name that it gets.
    pub to: String,
    /// The time of its point, in seconds since the epoch.
    pub time: i64,
    /// The file; `None` if only the manifest is left.
    #[serde(skip)]
    pub(super) id: Option<FileId>,
    /// Its new manifest, if it has one.
    #[serde(skip)]
    pub(super) manifest: Option<Manifest>,
}

impl Joining {
    /// Nothing to do: the points of `old` are among those of `new`.
    pub fn done(old: &Path, new: &Disk) -> Self {
        let to = new.points.first().and_then(|p| p.source.parent()).unwrap_or(Path::new(""));
        Joining {
            old: old.to_path_buf(),
            new: new.path.clone(),
            points: Vec::new(),
            left: Vec::new(),
            linking: Linking::default(),
            from: PathBuf::new(),
            to: to.to_path_buf(),
        }
    }
}

/// Whether points of the disk `new` were those of a disk `old`: then there is nothing left to do.
pub fn is_joined(old: &Path, new: &Disk) -> bool {
    let is = |p: &Point| {
        let (dir, name) = (p.source.parent()?, p.source.file_name()?);
        let m = manifest::read(dir, name).ok().flatten()?;
        Some(m.linked_from? == to_text(old.as_os_str()))
    };
    new.points.iter().any(|p| is(p) == Some(true))
}
