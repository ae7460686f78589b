//! From a catalog to what the plan works on.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use super::plan::{DiskItems, Item, vm};
use crate::chain::gone::gone;
use crate::chain::{Catalog, Disk, Point, timeline};
use crate::error::Result;
use crate::folder::Folder;
use crate::journal::removal;
use crate::layer::Format;
use crate::layout::name::{Name, parse_partial};
use crate::layout::{Level, name};
use crate::text::path_text;
use crate::verify::{Outcome, PointOutcome, quick};
use crate::{folder, manifest};

/// The points of all disks; of each the newest is verified quickly, for nothing of a VM may go as
/// long as nobody knows whether there is a good successor on each of its disks.
///
/// # Errors
/// The newest point cannot be looked at.
pub fn items(catalog: &Catalog) -> Result<Vec<DiskItems>> {
    let mut all: Vec<DiskItems> = catalog.disks.iter().map(of_disk).collect();
    let mut timelines: BTreeMap<&Path, Timeline> = BTreeMap::new();
    for (d, disk) in catalog.disks.iter().enumerate() {
        let timeline = timelines.entry(&all[d].timeline).or_default();
        timeline.disks.push(d);
        for (i, _) in disk.points.iter().enumerate().filter(|(_, p)| is_backup(p)) {
            timeline.newest = timeline.newest.max(Some((all[d].items[i].time, d, i)));
        }
    }
    let held: HashMap<PathBuf, String> = held(catalog, &timelines)?;
    let gone = gone(catalog, jiff::Timestamp::now().as_second());
    for (disk, gone) in all.iter_mut().zip(gone) {
        disk.held = held.get(vm(&disk.timeline)).cloned();
        disk.gone = gone;
    }
    Ok(all)
}

/// The folders of one disk.
#[derive(Default)]
struct Timeline {
    /// Indices of the catalog's disks.
    disks: Vec<usize>,
    /// The newest point: its time, disk and index.
    newest: Option<(i64, usize, usize)>,
}

/// Why nothing of a VM may be deleted, by the folder of its disks: the first reason that there is.
fn held(
    catalog: &Catalog,
    timelines: &BTreeMap<&Path, Timeline>,
) -> Result<HashMap<PathBuf, String>> {
    let mut lost = LostImages::default();
    let mut reasons: BTreeMap<&Path, String> = BTreeMap::new();
    let mut unknown = Vec::new();
    for (path, timeline) in timelines {
        let Some((time, d, i)) = timeline.newest else { continue };
        let disks = timeline.disks.iter().map(|d| &catalog.disks[*d]);
        match lost_or_unfinished(disks, time, &mut lost) {
            Some(why) => drop(reasons.insert(path, why)),
            None => match &catalog.disks[d].points[i] {
                Point { name, unavailable: Some(finding), .. } => {
                    let why =
                        format!("the newest point, {name}, is not available: {}", finding.message);
                    reasons.insert(path, why);
                }
                _ => unknown.push((*path, (d, i))),
            },
        }
    }
    let points: Vec<(usize, usize)> = unknown.iter().map(|(_, point)| *point).collect();
    for ((path, (d, i)), standing) in unknown.into_iter().zip(quick(catalog, &points)?) {
        reasons.extend(unproven(&catalog.disks[d].points[i], standing).map(|why| (path, why)));
    }
    let mut held = HashMap::new();
    for (path, why) in reasons {
        let why = || format!("{}: {why}", path_text(path));
        held.entry(vm(path).to_path_buf()).or_insert_with(why);
    }
    Ok(held)
}

/// A point that is newer than all that are there, by its manifest or by an unfinished file.
fn lost_or_unfinished<'a>(
    disks: impl Iterator<Item = &'a Disk>,
    newest: i64,
    lost: &mut LostImages,
) -> Option<String> {
    for disk in disks {
        if let Some(image) = lost.newer(disk, newest) {
            return Some(format!(
                "the newest point, {image}, is missing: there is a manifest and no image"
            ));
        }
        for path in disk.findings.iter().map(|f| &f.path) {
            let name = path.file_name().unwrap_or_default();
            let Some((_, stamp, _)) = parse_partial(name) else { continue };
            if folder::exists(path) && stamp.is_none_or(|t| t > newest) {
                return Some(format!("the newest backup, {}, was interrupted", path_text(name)));
            }
        }
    }
    None
}

/// Manifests whose images are gone, and not on their way out. Each folder is looked at once, for all
/// disks in it.
#[derive(Default)]
struct LostImages {
    /// By folder.
    folders: HashMap<PathBuf, Lost>,
}

/// Time and name of images, by the disk in their names.
type Lost = HashMap<OsString, Vec<(i64, String)>>;

impl LostImages {
    /// The name of one of the disk that is newer than `time`.
    fn newer(&mut self, disk: &Disk, time: i64) -> Option<&str> {
        let parents = disk.points.iter().filter_map(|p| p.source.parent());
        let folders: BTreeSet<&Path> = parents.collect();
        for dir in &folders {
            if !self.folders.contains_key(*dir) {
                self.folders.insert(dir.to_path_buf(), lost_in(dir));
            }
        }
        let names: BTreeSet<OsString> = disk.points.iter().map(|p| disk_of(&p.name)).collect();
        for dir in folders {
            let Some(lost) = self.folders.get(dir) else { continue };
            let of_disk = names.iter().filter_map(|n| lost.get(n)).flatten();
            if let Some((_, image)) = of_disk.into_iter().find(|(t, _)| *t > time) {
                return Some(image);
            }
        }
        None
    }
}

/// The disk in an image's name; the whole name where that has none.
fn disk_of(image: &str) -> OsString {
    match name::parse(OsStr::new(image)) {
        Name::Backup { disk, .. } => disk,
        _ => image.into(),
    }
}

fn lost_in(dir: &Path) -> Lost {
    let mut found = Lost::new();
    let leaving: HashSet<String> = removal::pending(dir).into_iter().collect();
    let Ok(folder) = Folder::open(dir) else { return found };
    let side = folder.folder(manifest::FOLDER);
    for entry in side.and_then(|s| s.entries()).unwrap_or_default() {
        let Some(image) = entry.name.to_str().and_then(|n| n.strip_suffix(".json")) else {
            continue;
        };
        if leaving.contains(image) || folder.has(image) {
            continue;
        }
        if let Some(m) = manifest::read_in(&folder, OsStr::new(image)).ok().flatten() {
            found.entry(disk_of(&m.image)).or_default().push((m.time, m.image));
        }
    }
    found
}

fn is_backup(point: &Point) -> bool {
    matches!(point.level, Level::Full | Level::Inc | Level::Diff | Level::Copy)
        && !is_foreign(point)
}

fn is_foreign(point: &Point) -> bool {
    point.layers.iter().any(|l| !matches!(l.format, Format::Qcow2 | Format::Raw))
}

/// When the points were taken; none is older than the one it depends on, whatever clocks said.
fn times(disk: &Disk) -> Vec<i64> {
    let mut times: Vec<i64> = Vec::with_capacity(disk.points.len());
    for p in &disk.points {
        // What a point depends on comes before it.
        let below = p.parent.and_then(|j| times.get(j)).copied();
        times.push(below.map_or(p.time, |t| t.max(p.time)));
    }
    times
}

fn of_disk(disk: &Disk) -> DiskItems {
    let times = times(disk);
    let mut recorded = RecordedParents::of(disk);
    let mut item = |(i, p): (usize, &Point)| {
        let parent = p.parent.or_else(|| recorded.parent(i));
        Item {
            name: p.name.clone(),
            time: times[i],
            // Other programs' archives are theirs to prune.
            level: if is_foreign(p) { Level::Image } else { p.level },
            served: p.is_served(),
            parent,
            lies_on_unknown: matches!(p.level, Level::Inc | Level::Diff)
                && !p.is_served()
                && parent.is_none(),
            run: run(p),
            file: p.source.clone(),
            chain: p.chain.clone(),
            bytes: if p.level == Level::Snapshot { 0 } else { p.own_bytes },
        }
    };
    let items = disk.points.iter().enumerate().map(&mut item).collect();
    let timeline = timeline(&disk.path);
    DiskItems { disk: disk.path.clone(), timeline, items, held: None, gone: None }
}

/// What points that cannot be served depend on by their manifests, or, where such an image is missing,
/// by the manifest that is left of it.
struct RecordedParents<'a> {
    disk: &'a Disk,
    /// The first point in each file; filled when it is first needed.
    points: HashMap<&'a Path, usize>,
    /// The point that a missing image leads to, if any: each manifest is read once.
    missing: HashMap<PathBuf, Option<usize>>,
}

impl<'a> RecordedParents<'a> {
    fn of(disk: &'a Disk) -> Self {
        RecordedParents { disk, points: HashMap::new(), missing: HashMap::new() }
    }

    fn parent(&mut self, i: usize) -> Option<usize> {
        let p = &self.disk.points[i];
        if p.is_served() {
            return None;
        }
        if self.points.is_empty() {
            for (j, q) in self.disk.points.iter().enumerate() {
                self.points.entry(&q.source).or_insert(j);
            }
        }
        let dir = p.source.parent()?;
        let mut at = p.source.clone();
        let mut passed = Vec::new();
        let found = loop {
            let name = at.file_name().and_then(|n| manifest::read(dir, n).ok().flatten());
            let Some(below) = name.and_then(|m| m.parent) else { break None };
            at = dir.join(below);
            if let Some(found) = self.points.get(at.as_path()) {
                break Some(*found);
            }
            if let Some(known) = self.missing.get(&at) {
                break *known;
            }
            // Manifests may form a loop; whoever comes by here again finds this.
            self.missing.insert(at.clone(), None);
            passed.push(at.clone());
        };
        self.missing.extend(passed.into_iter().map(|path| (path, found)));
        found.filter(|j| *j < i)
    }
}

fn run(point: &Point) -> String {
    let dir = point.source.parent().unwrap_or(Path::new(""));
    let name = point.source.file_name().unwrap_or(OsStr::new(""));
    match manifest::read(dir, name) {
        Ok(Some(m)) => m.run,
        _ => format!("time-{}", point.time),
    }
}

/// Why nothing older than the newest point, which can be served, may be deleted.
fn unproven(newest: &Point, standing: PointOutcome) -> Option<String> {
    let word = match standing.outcome {
        Outcome::Sound => return None,
        Outcome::Unsound => "unsound",
        Outcome::Unproven => "not verified",
    };
    let why = standing.reason.unwrap_or_default();
    Some(format!("the newest point, {}, is {word}: {why}", newest.name))
}
