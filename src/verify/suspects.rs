//! What the scan found in a disk, as far as it concerns the proof: hints that increments may lack
//! something although every single file is whole.

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::chain::Disk;
use crate::error::{Finding, Kind, Severity};
use crate::layout::Level;
use crate::layout::name::{Name, parse, parse_partial};
use crate::verify::links::Records;

/// Points that must not be recorded as they are, and why: increments after one that qmpbackup did
/// not finish, and those of a FULL that seems to have been overwritten later. What depends on them
/// is as suspect through them. A point with a manifest is none: whoever wrote it knew better.
pub(super) fn suspects(disk: &Disk, records: &Records) -> HashMap<usize, String> {
    let hints = Hints::of(disk);
    let mut found = HashMap::new();
    for (i, p) in disk.points.iter().enumerate() {
        if records.list[i].manifest.is_some() {
            continue;
        }
        let below = p.parent.map(|j| disk.points[j].source.as_path());
        let changed = below.and_then(|b| hints.changed.get(b)).copied();
        // The one that was found first says why.
        if let Some(first) = changed.into_iter().chain(hints.unfinished_before(&p.source)).min() {
            let f = &disk.findings[first];
            let name = f.path.file_name().unwrap_or_default().to_string_lossy();
            found.insert(i, format!("{name}: {}", f.message));
        }
    }
    found
}

/// The times of backups that did not finish, ascending, each with the first finding about one of
/// that time or an earlier one.
type Unfinished = Vec<(Option<i64>, usize)>;

/// A disk's findings that make points suspect, as indices, by what they are about.
struct Hints<'a> {
    /// By folder and disk.
    unfinished: HashMap<(&'a Path, OsString), Unfinished>,
    /// By file.
    changed: HashMap<&'a Path, usize>,
}

impl<'a> Hints<'a> {
    fn of(disk: &'a Disk) -> Self {
        let mut hints = Hints { unfinished: HashMap::new(), changed: HashMap::new() };
        let warnings = disk.findings.iter().enumerate();
        for (n, f) in warnings.filter(|(_, f)| f.severity == Severity::Warning) {
            let name = || f.path.file_name().and_then(parse_partial);
            if let (Kind::Incomplete, Some((_, stamp, of))) = (f.kind, name()) {
                let folder = f.path.parent().unwrap_or(Path::new(""));
                hints.unfinished.entry((folder, of)).or_default().push((stamp, n));
            } else if f.kind == Kind::Changed {
                hints.changed.entry(&f.path).or_insert(n);
            }
        }
        for list in hints.unfinished.values_mut() {
            list.sort_unstable();
            let mut first = usize::MAX;
            for (_, n) in list {
                first = first.min(*n);
                *n = first;
            }
        }
        hints
    }

    /// The first finding about a backup that did not finish before the increment `file`.
    fn unfinished_before(&self, file: &'a Path) -> Option<usize> {
        let (folder, name) = (file.parent()?, file.file_name()?);
        let Name::Backup { level: Level::Inc, stamp, disk } = parse(name) else { return None };
        let list = self.unfinished.get(&(folder, disk))?;
        let before = list.partition_point(|(t, _)| *t < stamp);
        list[..before].last().map(|(_, n)| *n)
    }
}

/// What tells a finding from others.
pub(super) fn key(f: &Finding) -> (PathBuf, String) {
    (f.path.clone(), f.message.clone())
}

/// The disk's findings that were not `reported` already. With `only`, those about these files.
pub(super) fn untold(
    disk: &Disk,
    reported: &HashSet<(PathBuf, String)>,
    only: Option<&HashSet<&Path>>,
) -> Vec<Finding> {
    let mut own = HashSet::new();
    let wanted = |f: &&Finding| only.is_none_or(|files| files.contains(f.path.as_path()));
    let new = |f: &&Finding| !reported.contains(&key(f)) && own.insert(key(f));
    disk.findings.iter().filter(wanted).filter(new).cloned().collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::chain::Point;

    fn point(name: String, parent: Option<usize>) -> Point {
        Point {
            source: Path::new("/d").join(&name),
            name,
            level: Level::Inc,
            chain: String::new(),
            parent,
            time: 0,
            size: 0,
            own_bytes: 0,
            consistency: None,
            layers: Vec::new(),
            format_is_open: false,
            unavailable: None,
        }
    }

    /// Whether finding `f` makes point `i` suspect, looked at one by one.
    fn is_hit(disk: &Disk, i: usize, f: &Finding) -> bool {
        let own = disk.points[i].source.file_name().map(parse);
        let unfinished = match f.kind {
            Kind::Incomplete => f.path.file_name().and_then(parse_partial),
            _ => None,
        };
        match (unfinished, own) {
            (Some((_, before, of)), Some(Name::Backup { stamp, disk, .. })) => {
                stamp > before && disk == of
            }
            (Some(_), _) => false,
            (None, _) => {
                let below = disk.points[i].parent.map(|j| &disk.points[j].source);
                f.kind == Kind::Changed && below == Some(&f.path)
            }
        }
    }

    proptest! {
        #[test]
        fn the_first_finding_that_concerns_a_point_says_why(
            stamps in prop::collection::vec((1u32..30, 0u8..2), 1..20),
            findings in prop::collection::vec((1u32..30, 0u8..2, 0u8..3), 0..12),
        ) {
            let name = |(stamp, disk): &(u32, u8)| format!("INC-{stamp}-d{disk}");
            let points = stamps.iter().enumerate().map(|(i, s)| point(name(s), i.checked_sub(1)));
            let finding = |(n, (stamp, disk, kind)): (usize, &(u32, u8, u8))| {
                let path = match kind {
                    0 => format!("/d/INC-{stamp}-d{disk}.partial"),
                    _ => format!("/d/INC-{stamp}-d{disk}"),
                };
                let kind = if *kind == 0 { Kind::Incomplete } else { Kind::Changed };
                Finding::warning(kind, path, format!("number {n}"))
            };
            let findings: Vec<Finding> = findings.iter().enumerate().map(finding).collect();
            let disk = Disk { path: "d".into(), points: points.collect(), findings };
            let found = suspects(&disk, &Records::read(&disk));
            for i in 0..disk.points.len() {
                let first = disk.findings.iter().find(|f| is_hit(&disk, i, f));
                let says = |f: &Finding| found.get(&i).is_some_and(|w| w.ends_with(&f.message));
                prop_assert!(first.map_or(!found.contains_key(&i), says), "{i} {found:?}");
            }
        }
    }
}
