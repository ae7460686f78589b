//! The images of one disk in one folder, and the names that they get elsewhere.

use std::ffi::{OsStr, OsString};
use std::path::Path;

use super::planned::RenamedImage;
use crate::chain::{Disk, Point, is_foreign_name};
use crate::error::{Error, Kind, Result};
use crate::folder::{FileId, Folder};
use crate::layout::Level;
use crate::layout::name::{Name, parse};
use crate::manifest::{FOLDER, Manifest, VmConfig};
use crate::restore::check_removable;
use crate::rewrite::files;
use crate::text::{path_text, to_text};
use crate::{manifest, rewrite};

/// The images of one disk in one folder.
pub(crate) struct Images<'a> {
    pub(crate) disk: &'a Disk,
    pub(crate) folder: Folder,
    /// What their names end with.
    pub(crate) tail: String,
    /// The first point of each image.
    pub(crate) points: Vec<&'a Point>,
}

impl<'a> Images<'a> {
    pub(crate) fn of(disk: &'a Disk) -> Result<Self> {
        let odd = |p: &Path, what: &str| {
            let what = format!("'{}': {what}", path_text(&disk.path));
            Error::new(Kind::Unsupported, what).at_path(p)
        };
        let Some(dir) = disk.points.first().and_then(|p| p.source.parent()) else {
            return Err(odd(&disk.path, "it has no points"));
        };
        let mut points: Vec<&Point> = Vec::new();
        let mut tail = None;
        for p in &disk.points {
            let name = p.source.file_name().unwrap_or_default();
            if p.source.parent() != Some(dir) {
                return Err(odd(&p.source, "its points are in several folders"));
            }
            let Some(end) = tail_of(name).filter(|_| p.level != Level::Image) else {
                return Err(odd(&p.source, "not a point in a layout of fleecefs or qmpbackup"));
            };
            if *tail.get_or_insert_with(|| end.clone()) != end {
                return Err(odd(&p.source, "its images' names differ in more than time and level"));
            }
            if points.last().is_none_or(|l| l.source != p.source) {
                points.push(p);
            }
        }
        // A snapshot in an image is a point of its own.
        points.retain(|p| p.level != Level::Snapshot);
        let tail = tail.unwrap_or_default();
        Ok(Images { disk, folder: rewrite::open_folder(dir)?, tail, points })
    }

    /// The point under the name that it gets among those of `to`.
    pub(crate) fn moved(&self, p: &Point, to: &Images<'_>) -> Result<RenamedImage> {
        let name = p.source.file_name().unwrap_or_default();
        let from = name.to_str().map(str::to_string).unwrap_or_default();
        let failed = |e| Error::io(e, "cannot check the file").at_path(&p.source);
        let id = FileId::of(&self.folder.look(name).map_err(failed)?);
        // One that cannot be served comes along as it is.
        if file_of(p).is_some_and(|seen| seen != id) {
            return Err(files::exchanged(&p.source));
        }
        let known = manifest::read_in(&self.folder, name)?;
        let (renamed, stamped) = self.renamed(&from, p.level, p.time, to);
        if !stamped && known.is_none() {
            let what = "its name has no time, and there is no manifest that says it";
            return Err(Error::new(Kind::Incomplete, what)
                .at_path(&p.source)
                .remedy("'fleecefs verify --create DIR' makes one"));
        }
        let manifest = known.map(|m| self.manifest(m, &renamed, to));
        Ok(RenamedImage { from, to: renamed, time: p.time, id: Some(id), manifest })
    }

    /// The new name of an image, and whether the old one has a time.
    fn renamed(&self, name: &str, level: Level, time: i64, to: &Images<'_>) -> (String, bool) {
        match parse(OsStr::new(name)) {
            Name::Backup { level, stamp: Some(stamp), .. } => {
                (format!("{}-{stamp}-{}", word(level), to.tail), true)
            }
            _ => (format!("{}-{time}-{}", word(level), to.tail), false),
        }
    }

    fn manifest(&self, m: Manifest, renamed: &str, to: &Images<'_>) -> Manifest {
        let parent = m.parent.as_ref().map(|parent| {
            let of = self.points.iter().find(|p| p.source.file_name() == Some(OsStr::new(parent)));
            let (level, time) = of.map_or((Level::Full, 0), |p| (p.level, p.time));
            self.renamed(parent, level, time, to).0
        });
        let linked_from = Some(to_text(self.disk.path.as_os_str()));
        Manifest { image: renamed.into(), parent, linked_from, ..m }
    }

    /// Manifests whose images are gone: the gap must stay known.
    pub(crate) fn lost(&self, to: &Images<'_>) -> Result<Vec<RenamedImage>> {
        let side = match self.folder.folder(FOLDER) {
            Ok(side) => side,
            Err(_) => return Ok(Vec::new()),
        };
        let failed = |e| Error::io(e, "cannot list the manifests").at_path(side.path());
        let mut lost = Vec::new();
        for entry in side.entries().map_err(failed)? {
            let Some(image) = manifest::image_of(&entry.name) else { continue };
            let Name::Backup { level, stamp: Some(time), disk } = parse(image) else { continue };
            if disk != *self.tail || self.folder.has(image) {
                continue;
            }
            let (Some(from), Ok(Some(m))) =
                (image.to_str(), manifest::read_in(&self.folder, image))
            else {
                continue;
            };
            let renamed = self.renamed(from, level, time, to).0;
            let manifest = Some(self.manifest(m, &renamed, to));
            lost.push(RenamedImage { from: from.into(), to: renamed, time, id: None, manifest });
        }
        Ok(lost)
    }

    /// Refuses what names other files: under their new names they would not be found.
    pub(crate) fn check_images(&self) -> Result<()> {
        for p in &self.points {
            let name = p.source.file_name().unwrap_or_default();
            let refuse = |what: &str, remedy: &str| {
                Err(Error::new(Kind::Unsupported, what).at_path(&p.source).remedy(remedy))
            };
            if p.layers.iter().any(|l| l.data_file.is_some()) {
                let how = "make one image of it with 'fleecefs restore'";
                return refuse("its data are in another file, which it names", how);
            }
            if files::stated_parent(&self.folder, name).1.is_some() {
                let how = "'fleecefs consolidate' or 'fleecefs commit' makes one image of its chain; or \
                           leave both disks as they are";
                return refuse("a header of its chain names the old name (it was rebased)", how);
            }
            check_removable(&self.folder, name)?;
        }
        Ok(())
    }

    /// The manifests of its points, the newest first.
    pub(crate) fn manifests(&self) -> impl Iterator<Item = Manifest> {
        let names = self.points.iter().rev().filter_map(|p| p.source.file_name());
        names.filter_map(|n| manifest::read_in(&self.folder, n).ok().flatten())
    }

    /// What the newest manifest says of the VM.
    pub(crate) fn vm(&self) -> Option<VmConfig> {
        self.manifests().find(|m| !m.vm.is_null()).map(|m| m.vm)
    }
}

/// What an image's name ends with; `None` for what no backup calls an image.
fn tail_of(name: &OsStr) -> Option<String> {
    let tail: OsString = match parse(name) {
        Name::Backup { stamp: Some(_), disk, .. } => disk,
        Name::Other if !is_foreign_name(name) => name.to_os_string(),
        _ => return None,
    };
    tail.into_string().ok()
}

fn word(level: Level) -> &'static str {
    match level {
        Level::Full | Level::Image | Level::Snapshot => "FULL",
        Level::Inc => "INC",
        Level::Diff => "DIFF",
        Level::Copy => "COPY",
    }
}

/// The file of a point as the scan saw it.
fn file_of(p: &Point) -> Option<FileId> {
    let file = p.layers.iter().map(|l| &l.file).find(|f| f.path() == p.source)?;
    let id = file.identity();
    Some(FileId { dev: id.dev, ino: id.ino })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_images_are_called() {
        let tail = |n: &str| tail_of(OsStr::new(n));
        assert_eq!(tail("INC-17-d.qcow2").as_deref(), Some("d.qcow2"));
        assert_eq!(tail("d.qcow2").as_deref(), Some("d.qcow2"));
        for other in ["vm.vma.zst", "INC-17-d.partial", "sda.full.data", "FULL-d"] {
            assert_eq!(tail(other), None, "{other}");
        }
    }
}
