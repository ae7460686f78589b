//! All disks of one run.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use crate::chain::manifest::{self, Manifest, vm_name, vm_uuid};
use crate::chain::{Catalog, Disk, Level};
use crate::error::{Error, Kind, Result};
use crate::folder::{Folder, PlainName};
use crate::text::{path_text, to_text};
use crate::units::iso_time;

/// What a run consists of.
#[derive(Debug, Default)]
pub struct Run<'a> {
    /// The points: disk and index.
    pub points: Vec<(&'a Disk, usize)>,
    /// Disks beside those that have no point of this run.
    pub without: Vec<PathBuf>,
}

/// A VM as far as manifests tell: its UUID, its name, or, where there are none, the folder of its disks.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Guest {
    /// By its UUID; with its name.
    Uuid(String, String),
    /// By its name.
    Name(String),
    /// By its folder.
    Folder(PathBuf),
}

impl Guest {
    /// Whose point it is.
    pub fn of(disk: &Disk, manifest: Option<&Manifest>) -> Self {
        let vm = manifest.map(|m| &*m.vm);
        let name = vm.and_then(vm_name).map(str::to_string);
        match (vm.and_then(vm_uuid), name) {
            (Some(uuid), name) => Guest::Uuid(uuid.into(), name.unwrap_or_default()),
            (None, Some(name)) => Guest::Name(name),
            (None, None) => Guest::Folder(disk.path.parent().unwrap_or(Path::new("")).into()),
        }
    }

    /// What to call it; empty if there is nothing.
    pub fn name(&self) -> String {
        match self {
            Guest::Uuid(uuid, name) if name.is_empty() => uuid.clone(),
            Guest::Uuid(_, name) | Guest::Name(name) => name.clone(),
            Guest::Folder(folder) => to_text(folder.as_os_str()),
        }
    }
}

/// A point of some run.
struct Member<'a> {
    disk: &'a Disk,
    point: usize,
    time: i64,
    id: Option<String>,
    guest: Guest,
}

fn members(catalog: &Catalog) -> Vec<Member<'_>> {
    let points = catalog.disks.iter().flat_map(|d| (0..d.points.len()).map(move |i| (d, i)));
    let points = points.filter(|(d, i)| d.points[*i].level != Level::Snapshot);
    let known = points.map(|(disk, point)| (disk, point, manifest_of(disk, point)));
    let all = known.map(|(disk, point, manifest)| Member {
        disk,
        point,
        time: disk.points[point].time,
        guest: Guest::of(disk, manifest.as_ref()),
        id: manifest.map(|m| m.run).filter(|id| !id.is_empty()),
    });
    all.collect()
}

/// How the user names a run.
enum Wish<'a> {
    /// By its id, or by its time in seconds.
    Named(&'a str, Option<i64>),
    /// The time of the newest run of each VM.
    Newest(BTreeMap<Guest, i64>),
}

impl<'a> Wish<'a> {
    /// `latest`; a date, or a date and time, as `list` shows them or the beginning of that: the newest
    /// run of this day or minute; else a time in seconds, or an id.
    fn of(members: &[Member<'_>], name: &'a str) -> Self {
        let mut bytes = name.bytes();
        let is_date = name.len() >= "2026-11-22".len()
            && bytes.by_ref().take(4).all(|b| b.is_ascii_digit())
            && bytes.next() == Some(b'-');
        if name != "latest" && !is_date {
            return Wish::Named(name, name.parse().ok());
        }
        let fits = |time: i64| !is_date || iso_time(time).starts_with(name);
        let mut newest = BTreeMap::new();
        for m in members.iter().filter(|m| fits(m.time)) {
            let known = newest.entry(m.guest.clone()).or_insert(m.time);
            *known = m.time.max(*known);
        }
        Wish::Newest(newest)
    }

    fn has_time(&self, m: &Member<'_>) -> bool {
        match self {
            Wish::Named(_, named) => *named == Some(m.time),
            Wish::Newest(newest) => newest.get(&m.guest) == Some(&m.time),
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
    let all = members(catalog);
    let wish = Wish::of(&all, name);
    let named = all.iter().filter(|m| wish.has_time(m) || wish.has_id(m.id.as_deref()));
    let ids: BTreeSet<&str> = named.filter_map(|m| m.id.as_deref()).collect();
    let is_in = |m: &&Member<'_>| match &m.id {
        Some(id) => ids.contains(id.as_str()),
        None => wish.has_time(m),
    };
    let found: Vec<&Member<'_>> = all.iter().filter(is_in).collect();
    let points: Vec<(&Disk, usize)> = found.iter().map(|m| (m.disk, m.point)).collect();
    if points.is_empty() {
        let text = format!("no run '{}' in {}", path_text(name), path_text(&catalog.root));
        return Err(Error::new(Kind::NotFound, text).remedy(
            "'fleecefs list --runs DIR' shows them; a run is named by its time or id, or 'latest'",
        ));
    }
    let without = disks_without(&all, &found);
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
    // A device's name says nothing of a file, nor does one of another protocol (rbd:POOL/IMAGE).
    let is_device = identity.file.starts_with("/dev/") && !identity.file.starts_with("/dev/shm/");
    let has_protocol = !identity.file.starts_with('/') && identity.file.contains(':');
    let is_file = !is_device && !has_protocol;
    is_file.then(|| Original { name, is_qcow2: identity.format == "qcow2" })
}

/// Disks of the same VMs, by their newest points, that have none among `found`.
fn disks_without(all: &[Member<'_>], found: &[&Member<'_>]) -> Vec<PathBuf> {
    let guests: BTreeSet<&Guest> = found.iter().map(|m| &m.guest).collect();
    let mut newest: BTreeMap<&Path, &Member<'_>> = BTreeMap::new();
    for m in all {
        let known = newest.entry(&m.disk.path).or_insert(m);
        if m.time >= known.time {
            *known = m;
        }
    }
    let has = |path: &Path| found.iter().any(|m| m.disk.path == path);
    let missing = newest.values().filter(|m| guests.contains(&m.guest) && !has(&m.disk.path));
    missing.map(|m| m.disk.path.clone()).collect()
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
