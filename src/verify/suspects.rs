//! What the scan found in a disk, as far as it concerns the proof: hints that increments may lack
//! something although every single file is whole.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use super::PointReport;
use crate::chain::name::{Name, parse, parse_partial};
use crate::chain::{Disk, Level};
use crate::error::{Finding, Kind, Severity};
use crate::text::path_text;
use crate::verify::links::Record;

/// Points that must not be recorded as they are, and why: increments after one that qmpbackup did
/// not finish, and those of a FULL that seems to have been overwritten later. What lies on them
/// shares their fate through them. A point with a manifest is none: whoever wrote it knew better.
pub(super) fn suspects(disk: &Disk, records: &[Record]) -> HashMap<usize, String> {
    let mut found = HashMap::new();
    for f in disk.findings.iter().filter(|f| f.severity == Severity::Warning) {
        let unfinished = match f.kind {
            Kind::Incomplete => f.path.file_name().and_then(parse_partial),
            _ => None,
        };
        for (i, p) in disk.points.iter().enumerate() {
            let unrecorded = records[i].manifest.is_none();
            let hit = match &unfinished {
                Some((_, stamp, name)) => {
                    let own = p.source.file_name().map(parse);
                    matches!(own, Some(Name::Backup { level: Level::Inc, stamp: s, disk: d })
                        if s > *stamp && d == *name)
                        && p.source.parent() == f.path.parent()
                }
                None => f.kind == Kind::Changed && lies_on(disk, i, &f.path),
            };
            if hit && unrecorded {
                let name = path_text(f.path.file_name().unwrap_or_default());
                found.entry(i).or_insert_with(|| format!("{name}: {}", f.message));
            }
        }
    }
    found
}

fn lies_on(disk: &Disk, i: usize, file: &Path) -> bool {
    disk.points[i].parent.is_some_and(|j| disk.points[j].source == file)
}

/// The disk's findings that `points` do not have already. With `only`, those about these files.
pub(super) fn untold(
    disk: &Disk,
    points: &[PointReport],
    only: Option<&HashSet<&Path>>,
) -> Vec<Finding> {
    let key = |f: &Finding| (f.path.clone(), f.message.clone());
    let mut told: HashSet<_> = points.iter().flat_map(|p| p.findings.iter().map(key)).collect();
    let wanted = |f: &&Finding| only.is_none_or(|files| files.contains(f.path.as_path()));
    disk.findings.iter().filter(wanted).filter(|f| told.insert(key(f))).cloned().collect()
}
