//! All disks of one run.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use crate::chain::manifest::{self, Manifest};
use crate::chain::{Catalog, Disk, Level};
use crate::error::{Error, Kind, Result};
use crate::folder::{Folder, PlainName};
use crate::text::path_text;
use crate::units::iso_time;

/// What a run consists of.
#[derive(Debug, Default)]
pub struct Run<'a> {
    /// The points: disk and index.
    pub points: Vec<(&'a Disk, usize)>,
    /// Disks beside those that have no point of this run.
    pub without: Vec<PathBuf>,
}

/// How the user names a run.
enum Wish<'a> {
    /// By its id, or by its time in seconds.
    Named(&'a str, Option<i64>),
    /// The time of the newest run of each guest (its folder).
    Newest(BTreeMap<Option<&'a Path>, i64>),
}

impl<'a> Wish<'a> {
    /// `latest`; a date, or a date and time, as `list` shows them or the beginning of that: the newest
    /// run of this day or minute; else a time in seconds, or an id.
    fn of(catalog: &'a Catalog, name: &'a str) -> Self {
        let mut bytes = name.bytes();
        let is_date = name.len() >= "2026-11-22".len()
            && bytes.by_ref().take(4).all(|b| b.is_ascii_digit())
            && bytes.next() == Some(b'-');
        if name != "latest" && !is_date {
            return Wish::Named(name, name.parse().ok());
        }
        let fits = |time: i64| !is_date || iso_time(time).starts_with(name);
        let mut newest = BTreeMap::new();
        for disk in &catalog.disks {
            let points = disk.points.iter().filter(|p| p.level != Level::Snapshot);
            let Some(time) = points.map(|p| p.time).filter(|t| fits(*t)).max() else { continue };
            let known = newest.entry(disk.path.parent()).or_insert(time);
            *known = time.max(*known);
        }
        Wish::Newest(newest)
    }

    fn has_time(&self, disk: &Disk, time: i64) -> bool {
        match self {
            Wish::Named(_, named) => *named == Some(time),
            Wish::Newest(newest) => newest.get(&disk.path.parent()) == Some(&time),
        }
    }

    fn has_id(&self, id: Option<&str>) -> bool {
        matches!(self, Wish::Named(name, _) if id == Some(*name))
    }
}

/// Finds the points of run `name`: a run's id as manifests have it, a time in seconds, `latest`, or a
/// date or time, or the beginning of one, as `list` shows them.
///
/// A time means all points that have exactly this time (that in their file names, or after a commit
/// that of the last image folded in), and, where these have manifests, all others of the same run
/// id. (qmpbackup gives all disks of a run one time.)
///
/// # Errors
/// `NotFound` if there is none.
pub fn find<'a>(catalog: &'a Catalog, name: &str) -> Result<Run<'a>> {
    let all: Vec<(&Disk, usize, Option<String>)> = catalog
        .disks
        .iter()
        .flat_map(|d| (0..d.points.len()).map(move |i| (d, i, run_id(d, i))))
        .filter(|(d, i, _)| d.points[*i].level != Level::Snapshot)
        .collect();
    let wish = Wish::of(catalog, name);
    let at_time = |d: &Disk, i: usize| wish.has_time(d, d.points[i].time);
    let ids: BTreeSet<&str> = all
        .iter()
        .filter(|(d, i, id)| at_time(d, *i) || wish.has_id(id.as_deref()))
        .filter_map(|(_, _, id)| id.as_deref())
        .collect();
    let is_in = |d: &Disk, i: usize, id: &Option<String>| match id {
        Some(id) => ids.contains(id.as_str()),
        None => at_time(d, i),
    };
    let points: Vec<(&Disk, usize)> =
        all.iter().filter(|(d, i, id)| is_in(d, *i, id)).map(|(d, i, _)| (*d, *i)).collect();
    if points.is_empty() {
        let text = format!("no run '{}' in {}", path_text(name), path_text(&catalog.root));
        return Err(Error::new(Kind::NotFound, text).remedy(
            "'fleecefs list DIR' shows the points; a run is named by their time, or 'latest'",
        ));
    }
    let without = disks_without(catalog, &points);
    for disk in catalog.disks.iter().filter(|d| without.contains(&d.path)) {
        if let Some(image) = lost(disk, &ids) {
            let what = "its manifest says that it belongs to the run, and it is gone";
            return Err(Error::new(Kind::Incomplete, what)
                .at_path(image)
                .remedy("restore the other disks one by one, or this file from another copy"));
        }
    }
    Ok(Run { points, without })
}

/// An image of one of these runs of which only the manifest is left.
fn lost(disk: &Disk, runs: &BTreeSet<&str>) -> Option<PathBuf> {
    let folders: BTreeSet<&Path> = disk.points.iter().filter_map(|p| p.source.parent()).collect();
    for dir in folders {
        let Ok(folder) = Folder::open(dir) else { continue };
        let side = folder.folder(manifest::FOLDER);
        for entry in side.and_then(|s| s.entries()).unwrap_or_default() {
            let Some(image) = entry.name.to_str().and_then(|n| n.strip_suffix(".json")) else {
                continue;
            };
            let known = || manifest::read_in(&folder, OsStr::new(image)).ok().flatten();
            let is_there = folder.has(image);
            let image = dir.join(image);
            if !is_there && known().is_some_and(|m| runs.contains(m.run.as_str())) {
                return Some(image);
            }
        }
    }
    None
}

/// The manifest of a point. One that cannot be read is a finding of the scan's; here it is as if it were
/// not there.
pub fn manifest_of(disk: &Disk, point: usize) -> Option<Manifest> {
    let source = &disk.points[point].source;
    manifest::read(source.parent()?, source.file_name()?).ok()?
}

fn run_id(disk: &Disk, point: usize) -> Option<String> {
    manifest_of(disk, point).map(|m| m.run).filter(|id| !id.is_empty())
}

/// What the guest's disk was when a point was made, as its manifest tells.
#[derive(Debug)]
pub struct Original {
    /// The name of its file, without folders.
    pub name: PlainName,
    /// Whether it was a qcow2 image.
    pub is_qcow2: bool,
}

/// The disk that `point` is a state of, as the VM's configuration names it; `None` if no manifest
/// says.
pub fn original(disk: &Disk, point: usize) -> Option<Original> {
    let identity = manifest_of(disk, point)?.disk;
    let name = PlainName::new(Path::new(&identity.file).file_name()?).ok()?;
    // A device's name says nothing of a file.
    let is_file = Path::new(&identity.file).is_absolute() && !identity.file.starts_with("/dev/");
    is_file.then(|| Original { name, is_qcow2: identity.format == "qcow2" })
}

/// Disks of the same guests (folders) that have no point among `points`.
fn disks_without(catalog: &Catalog, points: &[(&Disk, usize)]) -> Vec<PathBuf> {
    let guests: BTreeSet<Option<&Path>> = points.iter().map(|(d, _)| d.path.parent()).collect();
    let has = |disk: &Disk| points.iter().any(|(d, _)| d.path == disk.path);
    let beside = catalog.disks.iter().filter(|d| guests.contains(&d.path.parent()));
    beside.filter(|d| !has(d)).map(|d| d.path.clone()).collect()
}

/// The name of a disk's file below the folder that a run is restored to.
pub fn file_name(disk: &Disk, point: usize, extension: &str) -> PathBuf {
    let mut path = disk.path.clone();
    if path.file_name().is_none() {
        path = PathBuf::from(disk.points[point].source.file_name().unwrap_or(OsStr::new("disk")));
    }
    let has_it = path.extension() == Some(OsStr::new(extension));
    if has_it {
        return path;
    }
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(".");
    name.push(extension);
    path.with_file_name(name)
}
