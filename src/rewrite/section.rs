//! Which files a verb is about.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::files;
use super::member::Member;
use crate::chain::points::nearest::nearest;
use crate::chain::{Catalog, Disk, Point};
use crate::error::{Error, Kind, Result};
use crate::folder::FileId;
use crate::layout::Level;
use crate::text::{path_text, shown_as, to_text};

/// The points from a chain's FULL to one point, in order.
#[derive(Debug, Clone)]
pub struct ChainSection<'a> {
    /// The disk.
    pub disk: &'a Disk,
    /// Indices into its points: the FULL first.
    pub points: Vec<usize>,
}

impl ChainSection<'_> {
    /// The files, the FULL first.
    ///
    /// # Errors
    /// `Unsupported` for points that are not one file each (internal snapshots, foreign formats).
    pub fn members(&self) -> Result<Vec<Member>> {
        let member = |i: &usize| {
            let p = &self.disk.points[*i];
            let [layer] = p.layers.as_slice() else {
                let text = format!("{} is not one image file", p.name);
                return Err(Error::new(Kind::Unsupported, text).at_path(&p.source));
            };
            if layer.data_file.is_some() {
                // QEMU would write into that file, which no copy of the image protects.
                let text = format!("{} keeps its data in another file", p.name);
                return Err(Error::new(Kind::Unsupported, text)
                    .at_path(&p.source)
                    .remedy("use 'fleecefs restore', which does not change the backup"));
            }
            let (path, format) = (layer.file.path().to_path_buf(), layer.format);
            let identity = layer.file.identity();
            let id = FileId { dev: identity.dev, ino: identity.ino };
            Ok(Member { path, format, size: p.size, time: p.time, level: p.level, id })
        };
        self.points.iter().map(member).collect()
    }

    /// The last point.
    pub fn last(&self) -> usize {
        self.points.last().copied().unwrap_or(0)
    }
}

/// Which point is meant where none is named.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Newest {
    /// The newest state of the disk, also if it is a COPY.
    OfAll,
    /// The end of the newest chain: a COPY, which stands beside the chains, only where there is nothing else.
    OfChain,
}

/// Finds what a verb is about: the disk whose file names contain `filter`, and the points up to
/// `until` (a file name) or to the newest one that `newest` means.
///
/// # Errors
/// `Usage` if several disks fit, `NotFound` if none does or there is no such point, `Incomplete`
/// and the like if the point cannot be served.
pub fn select<'a>(
    catalog: &'a Catalog,
    filter: &OsStr,
    until: Option<&OsStr>,
    newest: Newest,
) -> Result<ChainSection<'a>> {
    let fits = |d: &&Disk| d.points.iter().any(|p| contains(&p.source, filter));
    let disks: Vec<&Disk> = catalog.disks.iter().filter(fits).collect();
    let disk = match disks.as_slice() {
        [one] => *one,
        [] => {
            return Err(no_image(catalog, filter));
        }
        many => {
            let names: Vec<String> = many.iter().map(|d| path_text(&d.path)).collect();
            return Err(Error::new(Kind::Usage, "there are several disks here")
                .at_path(&catalog.root)
                .remedy(format!("name the folder of one, or use --filter: {}", names.join(", "))));
        }
    };
    let last = last_point(disk, until, newest)?;
    if let Some(f) = disk.points[last].unavailable.as_ref() {
        let text = format!("{} cannot be used: {}", path_text(&disk.points[last].name), f.message);
        return Err(Error::new(f.kind, text).at_path(&f.path));
    }
    let mut points = vec![last];
    while let Some(parent) = disk.points[points[points.len() - 1]].parent {
        points.push(parent);
    }
    points.reverse();
    Ok(ChainSection { disk, points })
}

/// The FULL that holds the state of `until` by a commit that has been done already.
pub fn merged_into(catalog: &Catalog, filter: &OsStr, until: &OsStr) -> Option<PathBuf> {
    let wanted = Path::new(until).file_name().unwrap_or(until);
    let images = catalog.disks.iter().flat_map(|d| &d.points).map(|p| &p.source);
    let holds = |image: &&PathBuf| {
        let known = files::manifest_of(image).ok().flatten();
        known.and_then(|m| m.state_of).is_some_and(|s| OsStr::new(&s) == wanted)
    };
    images.filter(|p| contains(p, filter)).find(holds).cloned()
}

fn no_image(catalog: &Catalog, filter: &OsStr) -> Error {
    let root = path_text(&catalog.root);
    let (what, remedy) = match filter.is_empty() {
        true => (
            format!("no backup image in {root}"),
            "name the folder with the images of a disk; 'fleecefs list DIR' shows where they are",
        ),
        false => (
            format!("no image in {root} has '{}' in its name", path_text(&filter)),
            "'fleecefs list DIR' shows the names",
        ),
    };
    Error::new(Kind::NotFound, what).remedy(remedy)
}

fn contains(path: &Path, filter: &OsStr) -> bool {
    let name = path.file_name().unwrap_or_default().as_bytes();
    let filter = filter.as_bytes();
    filter.is_empty() || name.windows(filter.len()).any(|w| w == filter)
}

fn last_point(disk: &Disk, until: Option<&OsStr>, which: Newest) -> Result<usize> {
    let Some(until) = until else {
        if let Some(lost) = disk.newest_missing() {
            return Err(Error::new(Kind::Incomplete, "the newest backup is missing")
                .at_path(lost)
                .remedy("--until names the last image to merge"));
        }
        // The newest, even if it cannot be served: to leave it out silently would be wrong.
        let newest = |fits: fn(Level) -> bool| disk.points.iter().rposition(|p| fits(p.level));
        let chained = match which {
            Newest::OfChain => newest(|level| !matches!(level, Level::Snapshot | Level::Copy)),
            Newest::OfAll => None,
        };
        let newest = chained.or_else(|| newest(|level| level != Level::Snapshot));
        return newest.ok_or_else(|| Error::new(Kind::NotFound, "the disk has no points"));
    };
    // Also as a path, as qmprestore's users complete it.
    let wanted = Path::new(until).file_name().unwrap_or(until);
    let find = |is: &dyn Fn(&OsStr) -> bool| {
        let fits = |p: &crate::chain::Point| p.source.file_name().is_some_and(is);
        disk.points.iter().position(|p| fits(p) && p.level != Level::Snapshot)
    };
    let shown = || wanted.to_str().and_then(|w| find(&|name| shown_as(name, w)));
    find(&|name| name == wanted).or_else(shown).ok_or_else(|| {
        let text = format!("no point '{}' of disk {}", path_text(until), path_text(&disk.path));
        let files = disk.points.iter().filter_map(|p| p.source.file_name());
        let near = nearest(&to_text(wanted), files.map(to_text));
        Error::new(Kind::NotFound, text)
            .remedy(format!("{near}'fleecefs list DIR' shows the points"))
    })
}

/// Which points read which files.
pub struct Users<'a> {
    files: HashMap<&'a Path, Vec<&'a Point>>,
}

impl<'a> Users<'a> {
    /// Those of all disks.
    pub fn of(catalog: &'a Catalog) -> Self {
        let mut files: HashMap<&Path, Vec<&Point>> = HashMap::new();
        for p in catalog.disks.iter().flat_map(|d| &d.points) {
            for l in &p.layers {
                for file in [Some(&l.file), l.data_file.as_ref()].into_iter().flatten() {
                    files.entry(file.path()).or_default().push(p);
                }
            }
        }
        Users { files }
    }

    /// Fails if a point that is to stay reads one of the files that go or change, though it is of
    /// another disk, or of this one without depending on it by the chain's rules.
    ///
    /// # Errors
    /// `Usage` that names the point.
    pub fn refuse(&self, going: &[&Path]) -> Result<()> {
        let goes: HashSet<&Path> = going.iter().copied().collect();
        let users = going.iter().filter_map(|f| self.files.get(f)).flatten();
        match users.into_iter().find(|p| !goes.contains(p.source.as_path())) {
            None => Ok(()),
            Some(p) => {
                let text = format!("{} needs a file that would be deleted", p.name);
                Err(Error::new(Kind::Usage, text)
                    .at_path(&p.source)
                    .remedy("restore it to a file of its own first, and remove it"))
            }
        }
    }
}
