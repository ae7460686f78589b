//! Points of other disks that belong to a point.

use crate::chain::{Catalog, Disk};
use crate::manifest::{self, Manifest};

/// The manifest of a point. One that cannot be read is a finding of the scan's; here it is as if it were
/// not there.
pub(crate) fn manifest_of(disk: &Disk, point: usize) -> Option<Manifest> {
    let source = &disk.points[point].source;
    manifest::read(source.parent()?, source.file_name()?).ok()?
}

/// Points of other disks that were made in the same run: at the same time, and nothing says that it was another.
pub(crate) fn beside<'a>(
    catalog: &'a Catalog,
    disk: &Disk,
    point: usize,
) -> Vec<(&'a Disk, usize)> {
    let run = |d: &Disk, p: usize| manifest_of(d, p).map(|m| m.run).filter(|id| !id.is_empty());
    let (own, time) = (run(disk, point), disk.points.get(point).map(|p| p.time));
    let of_run = |d: &'a Disk| -> Option<(&'a Disk, usize)> {
        let found = d.points.iter().position(|p| Some(p.time) == time && p.is_served())?;
        let theirs = run(d, found);
        (own.is_none() || theirs.is_none() || own == theirs).then_some((d, found))
    };
    catalog.disks.iter().filter(|d| d.path != disk.path).filter_map(of_run).collect()
}
