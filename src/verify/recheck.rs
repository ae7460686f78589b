//! A backup that was pruned, consolidated or committed while it was looked at is not damaged: what
//! is found wrong with files that have gone or changed since the scan says nothing.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use super::{Outcome, Report, links};
use crate::chain::scan::{FormatOverride, ScanOptions, scan};
use crate::chain::{Catalog, Disk};
use crate::error::{Error, Finding, Kind, Result, Severity};

/// Looks at the directory again, once, if anything is wrong in one of `reports`, and takes back what
/// is said of points whose files are not those of `catalog` any more.
///
/// # Errors
/// The directory cannot be read any more.
pub(super) fn recheck(
    catalog: &Catalog,
    format_override: Option<&FormatOverride>,
    reports: &mut [Report],
) -> Result<()> {
    let bad = |r: &Report| {
        r.points.iter().any(|p| p.outcome == Outcome::Unsound) || r.findings.iter().any(is_error)
    };
    if !reports.iter().any(bad) {
        return Ok(());
    }
    let options =
        ScanOptions { format_override: format_override.cloned(), ..ScanOptions::default() };
    let (now, _) = scan(&catalog.root, &options, None)?;
    let after: HashMap<&Path, &Disk> = now.disks.iter().map(|d| (d.path.as_path(), d)).collect();
    let mut changed: HashSet<PathBuf> = HashSet::new();
    for disk in &catalog.disks {
        changed.extend(changed_files(disk, after.get(disk.path.as_path()).copied()));
    }
    // A manifest goes after its image, so the second look is the one that counts.
    let orphans: HashSet<Finding> = links::missing_images(&now).into_iter().collect();
    for report in reports {
        take_back(report, &changed, &orphans);
    }
    Ok(())
}

fn take_back(report: &mut Report, changed: &HashSet<PathBuf>, orphans: &HashSet<Finding>) {
    for p in report.points.iter_mut().filter(|p| changed.contains(&p.file)) {
        if p.outcome == Outcome::Unsound {
            p.findings.retain(|f| !is_error(f));
            p.findings.push(busy(&p.file));
            p.outcome = Outcome::Unproven;
            p.reason = Some(BUSY.into());
        }
    }
    report.findings.retain(|f| {
        !is_error(f) || !changed.contains(&f.path) && (!links::is_orphan(f) || orphans.contains(f))
    });
}

fn is_error(f: &Finding) -> bool {
    f.severity == Severity::Error
}

const BUSY: &str = "it changed while it was being verified";

fn busy(path: &Path) -> Finding {
    let error = Error::new(Kind::Busy, BUSY).at_path(path).remedy("verify again");
    Finding { severity: Severity::Warning, ..Finding::from_error(&error, path) }
}

/// Files of points that are not what they were, or depend on such.
fn changed_files(disk: &Disk, after: Option<&Disk>) -> Vec<PathBuf> {
    let points = after.map_or(&[][..], |d| &d.points);
    let index: HashMap<&str, usize> =
        points.iter().enumerate().map(|(i, p)| (p.name.as_str(), i)).collect();
    let mut changed = vec![false; disk.points.len()];
    // A parent comes before its children.
    for (i, p) in disk.points.iter().enumerate() {
        let files = |p: &crate::chain::Point| -> Vec<_> {
            p.layers.iter().map(|l| (l.file.path().to_path_buf(), l.file.identity())).collect()
        };
        let same = index.get(p.name.as_str()).map(|j| &points[*j]).is_some_and(|q| {
            let below = |d: &Disk, j: Option<usize>| j.map(|j| d.points[j].name.clone());
            let parents = after.map(|d| below(d, q.parent)) == Some(below(disk, p.parent));
            // Of a point that cannot be served only the file's own name and place are known.
            parents && p.source == q.source && files(p) == files(q) && reason(p) == reason(q)
        });
        changed[i] = !same || p.parent.is_some_and(|j| changed[j]);
    }
    let points = disk.points.iter().zip(changed).filter(|(_, c)| *c);
    points.map(|(p, _)| p.source.clone()).collect()
}

fn reason(point: &crate::chain::Point) -> Option<&str> {
    point.unavailable.as_ref().map(|f| f.message.as_str())
}
