//! From a catalog to what the plan works on.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::path::{Component, Path, PathBuf};

use super::plan::{DiskItems, Item, vm};
use crate::chain::manifest::{self, Manifest};
use crate::chain::name::{self, Name, parse_partial, to_text};
use crate::chain::{Catalog, Disk, Level, Point, removal};
use crate::error::Result;
use crate::folder::{self, Folder};
use crate::layer::Format;
use crate::verify::{Options, Outcome, verify};

/// The points of all disks; of each the newest is verified quickly, for nothing of a VM may go as
/// long as nobody knows whether there is a good successor on each of its disks.
///
/// # Errors
/// The newest point cannot be looked at.
pub fn items(catalog: &Catalog) -> Result<Vec<DiskItems>> {
    let mut all: Vec<DiskItems> = catalog.disks.iter().map(of_disk).collect();
    let mut newest: BTreeMap<PathBuf, (i64, usize, usize)> = BTreeMap::new();
    for (d, disk) in catalog.disks.iter().enumerate() {
        for (i, _) in disk.points.iter().enumerate().filter(|(_, p)| is_backup(p)) {
            let here = (all[d].items[i].time, d, i);
            let best = newest.entry(all[d].timeline.clone()).or_insert(here);
            *best = (*best).max(here);
        }
    }
    for (timeline, (time, d, i)) in newest {
        let folders: Vec<&Disk> = catalog
            .disks
            .iter()
            .zip(&all)
            .filter(|(_, a)| a.timeline == timeline)
            .map(|z| z.0)
            .collect();
        let why = match lost_or_unfinished(&folders, time) {
            Some(why) => Some(why),
            None => held(catalog, &catalog.disks[d], i)?,
        };
        let Some(why) = why else { continue };
        let why = format!("{}: {why}", to_text(timeline.as_os_str()));
        for disk in all.iter_mut().filter(|a| vm(&a.timeline) == vm(&timeline)) {
            disk.held.get_or_insert_with(|| why.clone());
        }
    }
    Ok(all)
}

/// A point that is newer than all that are there, by its manifest or by an unfinished file.
fn lost_or_unfinished(disks: &[&Disk], newest: i64) -> Option<String> {
    for disk in disks {
        let lost = missing(disk).into_iter().find(|m| m.time > newest);
        if let Some(m) = lost {
            return Some(format!(
                "the newest point, {}, is lost: its manifest is there, the image is not",
                m.image
            ));
        }
        for path in disk.findings.iter().map(|f| &f.path) {
            let name = path.file_name().unwrap_or_default();
            let Some((_, stamp, _)) = parse_partial(name) else { continue };
            if folder::exists(path) && stamp.is_none_or(|t| t > newest) {
                return Some(format!("the newest backup, {}, did not finish", to_text(name)));
            }
        }
    }
    None
}

/// The manifests of a disk whose images are gone, and not on their way out.
fn missing(disk: &Disk) -> Vec<Manifest> {
    let folders: BTreeSet<&Path> = disk.points.iter().filter_map(|p| p.source.parent()).collect();
    let of = |image: &str| match name::parse(OsStr::new(image)) {
        Name::Backup { disk, .. } => disk,
        _ => image.into(),
    };
    let names: BTreeSet<_> = disk.points.iter().map(|p| of(&p.name)).collect();
    let mut found = Vec::new();
    for dir in folders {
        let leaving = removal::pending(dir);
        let Ok(folder) = Folder::open(dir) else { continue };
        let side = folder.folder(manifest::FOLDER);
        for entry in side.and_then(|s| s.entries()).unwrap_or_default() {
            let Some(image) = entry.name.to_str().and_then(|n| n.strip_suffix(".json")) else {
                continue;
            };
            if folder.has(image) || leaving.iter().any(|l| l == image) {
                continue;
            }
            let known = manifest::read_in(&folder, OsStr::new(image)).ok().flatten();
            found.extend(known.filter(|m| names.contains(&of(&m.image))));
        }
    }
    found
}

/// More images than this are not missing in one chain.
const MOST_MISSING: usize = 1000;

fn is_backup(point: &Point) -> bool {
    matches!(point.level, Level::Full | Level::Inc | Level::Diff | Level::Copy)
        && !is_foreign(point)
}

fn is_foreign(point: &Point) -> bool {
    point.layers.iter().any(|l| !matches!(l.format, Format::Qcow2 | Format::Raw))
}

/// When the points were taken; none is older than the one it lies on, whatever clocks said.
fn times(disk: &Disk) -> Vec<i64> {
    let mut times: Vec<i64> = Vec::with_capacity(disk.points.len());
    for p in &disk.points {
        // What a point lies on comes before it.
        let below = p.parent.and_then(|j| times.get(j)).copied();
        times.push(below.map_or(p.time, |t| t.max(p.time)));
    }
    times
}

fn of_disk(disk: &Disk) -> DiskItems {
    let times = times(disk);
    let item = |(i, p): (usize, &Point)| Item {
        name: p.name.clone(),
        time: times[i],
        // Other programs' archives are theirs to prune.
        level: if is_foreign(p) { Level::Image } else { p.level },
        served: p.is_served(),
        parent: p.parent.or_else(|| recorded_parent(disk, i)),
        lies_on_unknown: matches!(p.level, Level::Inc | Level::Diff)
            && !p.is_served()
            && p.parent.or_else(|| recorded_parent(disk, i)).is_none(),
        run: run(p),
        file: p.source.clone(),
        chain: p.chain.clone(),
        bytes: if p.level == Level::Snapshot { 0 } else { p.own_bytes },
    };
    DiskItems {
        disk: disk.path.clone(),
        timeline: timeline(&disk.path),
        items: disk.points.iter().enumerate().map(item).collect(),
        held: None,
    }
}

/// What a point that cannot be served lies on by its manifest, or, where that image is missing, by
/// the manifest that is left of it.
fn recorded_parent(disk: &Disk, i: usize) -> Option<usize> {
    let p = &disk.points[i];
    if p.is_served() {
        return None;
    }
    let dir = p.source.parent()?;
    let mut name = p.source.file_name()?.to_os_string();
    // Manifests may form a loop.
    for _ in 0..disk.points.len().saturating_add(MOST_MISSING) {
        name = manifest::read(dir, &name).ok()??.parent?.into();
        let path = dir.join(&name);
        if let Some(found) = disk.points.iter().position(|q| q.source == path) {
            return Some(found).filter(|j| *j < i);
        }
    }
    None
}

fn run(point: &Point) -> String {
    let dir = point.source.parent().unwrap_or(Path::new(""));
    let name = point.source.file_name().unwrap_or(OsStr::new(""));
    match manifest::read(dir, name) {
        Ok(Some(m)) => m.run,
        _ => format!("time-{}", point.time),
    }
}

/// `--monthly` puts the disk's folder into a new `YYYY-MM` each month.
fn timeline(disk: &Path) -> PathBuf {
    let is_month = |c: &Component| {
        let text = c.as_os_str().to_string_lossy();
        let b = text.as_bytes();
        b.len() == 7
            && b[4] == b'-'
            && b.iter().enumerate().all(|(i, c)| i == 4 || c.is_ascii_digit())
    };
    disk.components().filter(|c| !is_month(c)).collect()
}

/// Why nothing older than point `i`, the newest, may be deleted.
fn held(catalog: &Catalog, disk: &Disk, i: usize) -> Result<Option<String>> {
    let p = &disk.points[i];
    if let Some(finding) = &p.unavailable {
        return Ok(Some(format!("the newest point, {}, is lost: {}", p.name, finding.message)));
    }
    let options = Options { quick: true, point: Some(disk.point_path(i)), ..Options::default() };
    let report = verify(catalog, &options, &())?;
    if report.outcome == Outcome::Sound {
        return Ok(None);
    }
    let why = report.points.first().and_then(|p| p.reason.clone()).unwrap_or_default();
    let word = if report.outcome == Outcome::Unsound { "unsound" } else { "not verified" };
    Ok(Some(format!("the newest point, {}, is {word}: {why}", p.name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn months_are_one_timeline() {
        assert_eq!(timeline(Path::new("vm/2026-11/sda")), Path::new("vm/sda"));
        assert_eq!(timeline(Path::new("2026-1x/sda")), Path::new("2026-1x/sda"));
    }
}
