//! From a catalog to what the plan works on.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Component, Path, PathBuf};

use super::plan::{DiskItems, Item};
use crate::chain::manifest;
use crate::chain::{Catalog, Disk, Level, Point};
use crate::error::Result;
use crate::layer::Format;
use crate::verify::{Options, Outcome, verify};

/// The points of all disks; of each disk the newest is verified quickly, for nothing may go as
/// long as nobody knows whether there is a good successor.
///
/// # Errors
/// The newest point cannot be looked at.
pub fn items(catalog: &Catalog) -> Result<Vec<DiskItems>> {
    let mut all: Vec<DiskItems> = catalog.disks.iter().map(of_disk).collect();
    let mut newest: BTreeMap<PathBuf, (i64, usize, usize)> = BTreeMap::new();
    for (d, disk) in catalog.disks.iter().enumerate() {
        for (i, p) in disk.points.iter().enumerate().filter(|(_, p)| is_backup(p)) {
            let best = newest.entry(all[d].timeline.clone()).or_insert((p.time, d, i));
            *best = (*best).max((p.time, d, i));
        }
    }
    for (timeline, (_, d, i)) in newest {
        let held = held(catalog, &catalog.disks[d], i)?;
        all.iter_mut().filter(|a| a.timeline == timeline).for_each(|a| a.held = held.clone());
    }
    Ok(all)
}

fn is_backup(point: &Point) -> bool {
    matches!(point.level, Level::Full | Level::Inc | Level::Diff | Level::Copy)
        && !is_foreign(point)
}

fn is_foreign(point: &Point) -> bool {
    point.layers.iter().any(|l| !matches!(l.format, Format::Qcow2 | Format::Raw))
}

fn of_disk(disk: &Disk) -> DiskItems {
    let item = |p: &Point| Item {
        name: p.name.clone(),
        time: p.time,
        // Other programs' archives are theirs to prune.
        level: if is_foreign(p) { Level::Image } else { p.level },
        served: p.is_served(),
        parent: p.parent,
        run: run(p),
        file: p.source.clone(),
        chain: p.chain.clone(),
        bytes: if p.level == Level::Snapshot { 0 } else { p.own_bytes },
    };
    DiskItems {
        disk: disk.path.clone(),
        timeline: timeline(&disk.path),
        items: disk.points.iter().map(item).collect(),
        held: None,
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
