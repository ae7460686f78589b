//! Proof that backups are sound, as far as there is proof.
//!
//! Three looks at each file: `structure` walks over every reference of a qcow2 file (`clusters`,
//! `refcounts`), `links` compares files, names and manifests of a chain with each other, `content`
//! hashes whole files and decompresses every compressed cluster. `files` runs them in parallel,
//! [`verify`] puts the results together into one outcome per point. `record` writes manifests for
//! chains that have none. `last_verified` keeps for `list` what was verified when; `rolling` chooses by that what is
//! read next. Nothing is repaired.
//!
//! Only a manifest with a hash proves what plain data is: without one the outcome is
//! [`Outcome::Unproven`], however good the structure looks.

mod content;
mod files;
pub(crate) mod last_verified;
mod links;
mod recheck;
mod record;
mod report;
pub(crate) mod rolling;
mod suspects;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};

use files::{FileReport, FileTarget};
use links::{Record, Records};
use record::Recorder;
pub use report::{CheckedPoint, Outcome, PointReport, Report};
use report::{outcome_of, worst};

use crate::chain::scan::FormatOverride;
use crate::chain::{Catalog, Disk, Point, run_gaps};
use crate::error::{Error, Finding, Kind, Result, Severity};
use crate::layer::qcow2::check as structure;
use crate::progress::Progress;
use crate::text::path_text;

pub use structure::{Structure, check as check_structure};

/// What to look at.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Structure and chain only; no data is read.
    pub quick: bool,
    /// Only this point and what it depends on: a path into the catalog.
    pub point: Option<PathBuf>,
    /// Only points taken at or after this time. Of what they depend on, structure and chain are
    /// looked at, data is not.
    pub since: Option<i64>,
    /// Only these points, each as the disk's place in the catalog and its place there, and what the directory says
    /// of all others without a look at them. Of what they depend on, structure and chain are looked at, data is not.
    pub only: Option<HashSet<(usize, usize)>>,
    /// Threads; 0 for as many as there are processors.
    pub jobs: usize,
    /// Write manifests, with hashes, for points that have none.
    pub create: bool,
    /// What the user says of files whose format nothing else decides; `catalog` was made with it.
    pub format_override: Option<FormatOverride>,
}

/// Looks at the points of `catalog` that `options` names.
///
/// # Errors
/// `NotFound` if there is no such point, or none at all; writing a manifest failed. What is wrong
/// with the backups is in the report.
pub fn verify(catalog: &Catalog, options: &Options, progress: &dyn Progress) -> Result<Report> {
    let orphans = match options.point {
        None => links::missing_images(catalog),
        Some(_) => Vec::new(),
    };
    let gaps = if options.point.is_none() { run_gaps(catalog) } else { Vec::new() };
    // With all images gone there is no point left to look at, and much to tell.
    let all_gone = !orphans.is_empty() && options.since.is_none();
    let chosen = choose(catalog, options, all_gone)?;
    let files = files::check_all(&targets(options, &chosen), options.threads(), progress)?;
    let mut report = Report::new(&catalog.root, options.quick);
    report.findings = catalog.findings.iter().cloned().chain(orphans).chain(gaps).collect();
    let mut look =
        PointChecker { options, files: &files, recorder: None, reported: HashSet::new() };
    if options.create && !options.quick {
        look.recorder = recorder(&catalog.root, options.format_override.as_ref(), &mut report)?;
    }
    for chosen in &chosen {
        look.disk_report(chosen, &mut report)?;
    }
    self::recheck::recheck(
        catalog,
        options.format_override.as_ref(),
        std::slice::from_mut(&mut report),
    )?;
    report.outcome = worst(&report);
    Ok(report)
}

/// The files of the points that `options` names, without those that they depend on.
///
/// # Errors
/// `NotFound` if there is no such point.
pub fn requested(catalog: &Catalog, options: &Options) -> Result<HashSet<PathBuf>> {
    let chosen = choose(catalog, options, true)?;
    let sources = |c: &Selection| {
        c.wanted.iter().map(|i| c.disk.points[*i].source.clone()).collect::<Vec<_>>()
    };
    Ok(chosen.iter().flat_map(sources).collect())
}

/// How a point stands with all that it depends on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PointOutcome {
    /// As of a report about that point alone.
    pub outcome: Outcome,
    /// Why the point is not sound, in a few words.
    pub reason: Option<String>,
}

/// How each of `points` (disk and point, as indices; at most one of each disk) stands by itself:
/// what a [`verify`] of that point with `quick` says. All together take as long as one look at the
/// directory, however many disks there are.
///
/// # Errors
/// The directory cannot be read any more.
pub fn quick(catalog: &Catalog, points: &[(usize, usize)]) -> Result<Vec<PointOutcome>> {
    let options = Options { quick: true, ..Options::default() };
    let chosen: Vec<Selection> = (points.iter())
        .map(|(d, i)| Selection::new(&catalog.disks[*d], HashSet::from([*i]), true))
        .collect();
    let files = files::check_all(&targets(&options, &chosen), options.threads(), &())?;
    let mut reports = Vec::with_capacity(points.len() + 1);
    for chosen in &chosen {
        let mut look = PointChecker {
            options: &options,
            files: &files,
            recorder: None,
            reported: HashSet::new(),
        };
        let mut report = Report::new(&catalog.root, options.quick);
        look.disk_report(chosen, &mut report)?;
        reports.push(report);
    }
    // What belongs to no disk counts for each.
    let findings = catalog.findings.clone();
    reports.push(Report { findings, ..Report::new(&catalog.root, options.quick) });
    self::recheck::recheck(catalog, None, &mut reports)?;
    let common = reports.pop().map_or(Outcome::Sound, |r| worst(&r));
    let standing = |r: Report| PointOutcome {
        outcome: worst(&r).max(common),
        reason: r.points.into_iter().next().and_then(|p| p.reason),
    };
    Ok(reports.into_iter().map(standing).collect())
}

/// What writes manifests; `None`, with a finding, if somebody else is writing.
fn recorder(
    root: &Path,
    format_override: Option<&FormatOverride>,
    report: &mut Report,
) -> Result<Option<Recorder>> {
    match Recorder::begin(root, format_override) {
        // What was found is worth telling all the same.
        Err(e) if e.kind() == Kind::Busy => {
            let found = Finding::from_error(&e, root);
            report.findings.push(Finding { severity: Severity::Warning, ..found });
            Ok(None)
        }
        other => other.map(Some),
    }
}

impl Options {
    /// Whether the data of a point is read: of those that are asked for, and, but with `since` and `only`, of what they
    /// depend on.
    fn reads_data(&self, is_wanted: bool) -> bool {
        !self.quick && (self.since.is_none() && self.only.is_none() || is_wanted)
    }

    fn threads(&self) -> usize {
        match self.jobs {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            n => n,
        }
    }
}

/// Which points of a disk are looked at.
struct Selection<'a> {
    disk: &'a Disk,
    /// Those that are reported.
    wanted: HashSet<usize>,
    /// Those and all that they depend on, ascending.
    needed: BTreeSet<usize>,
    /// Whether one point is asked for, so that what the disk's other files say is omitted.
    single: bool,
}

impl<'a> Selection<'a> {
    fn new(disk: &'a Disk, wanted: HashSet<usize>, single: bool) -> Self {
        let mut needed = BTreeSet::new();
        for &i in &wanted {
            let mut at = Some(i);
            while let Some(j) = at.filter(|j| needed.insert(*j)) {
                at = disk.points[j].parent;
            }
        }
        Selection { disk, wanted, needed, single }
    }
}

/// The disks of which there is something to look at.
fn choose<'a>(
    catalog: &'a Catalog,
    options: &Options,
    may_be_none: bool,
) -> Result<Vec<Selection<'a>>> {
    let point = options.point.as_deref().map(|p| catalog.find(p)).transpose()?;
    let mut all = Vec::new();
    for (d, disk) in catalog.disks.iter().enumerate() {
        let wanted: HashSet<usize> = (0..disk.points.len())
            .filter(|i| point.is_none_or(|(d, p)| std::ptr::eq(d, disk) && p == *i))
            .filter(|i| options.since.is_none_or(|t| disk.points[*i].time >= t))
            .filter(|i| options.only.as_ref().is_none_or(|only| only.contains(&(d, *i))))
            .collect();
        // Of a disk none of whose points is due, there is what the directory says of it.
        if !wanted.is_empty() || options.only.is_some() {
            all.push(Selection::new(disk, wanted, point.is_some()));
        }
    }
    if !may_be_none && all.is_empty() {
        catalog.check_any()?;
        return Err(Error::new(Kind::NotFound, "no backup point to verify")
            .at_path(&catalog.root)
            .remedy("'fleecefs list DIR' shows what there is"));
    }
    Ok(all)
}

/// Each file once, with all that is wanted of it.
fn targets(options: &Options, chosen: &[Selection]) -> Vec<FileTarget> {
    let mut targets: Vec<FileTarget> = Vec::new();
    let mut index: HashMap<PathBuf, usize> = HashMap::new();
    for chosen in chosen {
        for &i in &chosen.needed {
            let deep = options.reads_data(chosen.wanted.contains(&i));
            let point = &chosen.disk.points[i];
            let hash = deep && wants_hash(point, options.create);
            for target in FileTarget::of_point(point, deep, hash) {
                match index.get(&target.path) {
                    Some(known) => targets[*known].join(target),
                    None => {
                        index.insert(target.path.clone(), targets.len());
                        targets.push(target);
                    }
                }
            }
        }
    }
    targets
}

/// Whether the point's file is hashed: without a hash to compare with, or one to be written down, it is
/// enough that all data can be read. A file that has not the length of its manifest is another one,
/// whatever is in it; it may be terabytes of zeros that somebody made in no time.
fn wants_hash(point: &Point, create: bool) -> bool {
    let record = Record::read(point);
    let Some(m) = &record.manifest else { return create };
    (create || m.blake3.is_some())
        && crate::folder::look(&point.source).is_ok_and(|meta| meta.len() == m.file_size)
}

/// What is known about a point with all that it depends on.
#[derive(Clone)]
struct PointVerdict {
    outcome: Outcome,
    reason: Option<String>,
    findings: Vec<Finding>,
}

/// One look at the points of several disks.
struct PointChecker<'a> {
    options: &'a Options,
    files: &'a HashMap<PathBuf, FileReport>,
    /// What writes manifests, if that is wanted.
    recorder: Option<Recorder>,
    /// File and message of what was found in points so far.
    reported: HashSet<(PathBuf, String)>,
}

impl PointChecker<'_> {
    /// Adds the points of one disk to the report.
    fn disk_report(&mut self, chosen: &Selection, out: &mut Report) -> Result<()> {
        let disk = chosen.disk;
        let records = Records::read(disk);
        let suspects = suspects::suspects(disk, &records);
        let mut verdicts: Vec<Option<PointVerdict>> = vec![None; disk.points.len()];
        // Without what each depends on.
        let mut alone = vec![Outcome::Unsound; disk.points.len()];
        // A parent comes before its children.
        for &i in &chosen.needed {
            let below = disk.points[i].parent.and_then(|p| Some((p, verdicts[p].as_ref()?)));
            let skips = !self.options.reads_data(chosen.wanted.contains(&i));
            let mut own = point_verdict((disk, i), &records, skips, self.files, below.is_some());
            if let Some(why) = suspects.get(&i).filter(|_| own.outcome == Outcome::Unproven) {
                own.reason = Some(why.clone());
            }
            let name = below.map(|(p, _)| disk.points[p].name.as_str());
            alone[i] = own.outcome;
            verdicts[i] = Some(join(own, below.map(|b| b.1), name));
        }
        let outcome = |i: usize| match &verdicts[i] {
            Some(v) if !suspects.contains_key(&i) => v.outcome,
            _ => Outcome::Unsound,
        };
        let recorded = match &self.recorder {
            Some(recorder) => recorder.create(disk, &records, self.files, outcome, |i| alone[i])?,
            None => HashSet::new(),
        };
        out.checked.extend(checked(self.options, chosen, &verdicts, &recorded));
        for (i, verdict) in verdicts.into_iter().enumerate() {
            let Some(v) = verdict.filter(|_| chosen.wanted.contains(&i)) else { continue };
            let p = &disk.points[i];
            self.reported.extend(v.findings.iter().map(suspects::key));
            out.points.push(PointReport {
                disk: disk.path.clone(),
                point: p.name.clone(),
                file: p.source.clone(),
                level: p.level,
                time: p.time,
                outcome: v.outcome,
                reason: v.reason,
                recorded: recorded.contains(&i),
                findings: v.findings,
            });
        }
        let files = |i: &usize| disk.points[*i].source.as_path();
        let needed: HashSet<&Path> = chosen.needed.iter().map(files).collect();
        let only = chosen.single.then_some(&needed);
        out.findings.extend(suspects::untold(disk, &self.reported, only));
        Ok(())
    }
}

/// The points whose data was read, and how they stand.
fn checked(
    options: &Options,
    chosen: &Selection,
    verdicts: &[Option<PointVerdict>],
    recorded: &HashSet<usize>,
) -> Vec<CheckedPoint> {
    let is_read = |i: &&usize| options.reads_data(chosen.wanted.contains(i));
    let checked = chosen.needed.iter().filter(is_read).filter_map(|&point| {
        let outcome = match verdicts[point].as_ref()?.outcome {
            // What has just been recorded is proved from now on.
            Outcome::Unproven if recorded.contains(&point) => Outcome::Sound,
            outcome => outcome,
        };
        Some(CheckedPoint { disk: chosen.disk.path.clone(), point, outcome })
    });
    checked.collect()
}

/// How a point stands by itself. `skips` says that its data was not read, on purpose.
fn point_verdict(
    (disk, i): (&Disk, usize),
    records: &Records,
    skips: bool,
    reports: &HashMap<PathBuf, FileReport>,
    has_parent: bool,
) -> PointVerdict {
    let p = &disk.points[i];
    let record = &records.list[i];
    let mut findings = links::check(disk, i, records);
    let mut proved = true;
    for path in files::paths(p) {
        let Some(report) = reports.get(&path) else { continue };
        let known = if path == p.source { record.hash() } else { None };
        let compared = compare(report, known, &mut findings);
        proved &= compared || report.hash.is_none() && skips;
    }
    // A point that cannot be served because of what it depends on has its parent's verdict.
    if let Some(f) = &p.unavailable
        && !(has_parent && f.path != p.source)
    {
        findings.push(f.clone());
    }
    let mut seen = HashSet::new();
    findings.retain(|f| seen.insert((f.path.clone(), f.offset, f.message.clone())));
    let reason_unproven = match () {
        () if record.manifest.is_none() => Some("no manifest"),
        () if !record.sealed => Some("its manifest has no checksum of its own"),
        () if !proved => Some("its manifest has no hash"),
        () => None,
    };
    let worst = findings.iter().filter(|f| f.severity == Severity::Error);
    match worst.max_by_key(|f| outcome_of(f)) {
        Some(f) => {
            let (outcome, reason) = (outcome_of(f), Some(f.message.clone()));
            PointVerdict { outcome, reason, findings }
        }
        None => {
            let outcome =
                if reason_unproven.is_some() { Outcome::Unproven } else { Outcome::Sound };
            PointVerdict { outcome, reason: reason_unproven.map(str::to_string), findings }
        }
    }
}

/// Takes in what was found in one file; true if its hash is the one that is `known`.
fn compare(report: &FileReport, known: Option<&str>, findings: &mut Vec<Finding>) -> bool {
    findings.extend(report.findings.iter().cloned());
    let same = match (&report.hash, known) {
        (Some(found), Some(known)) => *found == known.to_ascii_lowercase(),
        _ => false,
    };
    let differs = !same && report.hash.is_some() && known.is_some();
    if differs {
        let what = "the file is damaged: its BLAKE3 differs from its manifest's";
        let error = Error::new(Kind::Changed, what).at_path(&report.path).remedy(structure::REMEDY);
        findings.push(Finding::from_error(&error, &report.path));
    }
    // Bytes that are proved to be as they were written are no damage, whatever the refcounts.
    findings.extend(report.refcounts.iter().cloned().map(|f| match same {
        true => Finding { severity: Severity::Warning, ..f },
        false => f,
    }));
    same
}

impl PointVerdict {
    /// Whether the reason is a finding where the other only lacks proof.
    fn is_worse_than(&self, other: &PointVerdict) -> bool {
        let error = |v: &PointVerdict| v.findings.iter().any(|f| f.severity == Severity::Error);
        let inherited = self.reason.as_deref().is_some_and(|r| r.starts_with("it depends on "));
        self.outcome == other.outcome && (error(self) || inherited) && !error(other)
    }
}

fn join(own: PointVerdict, below: Option<&PointVerdict>, below_name: Option<&str>) -> PointVerdict {
    match (below, below_name) {
        (Some(b), Some(name)) if b.outcome > own.outcome || b.is_worse_than(&own) => {
            // Name the file that is the cause, not each one between.
            let reason = match b.reason.as_deref() {
                Some(r) if r.starts_with("it depends on ") => r.to_string(),
                Some(r) => format!("it depends on {}: {r}", path_text(name)),
                None => format!("it depends on {}", path_text(name)),
            };
            PointVerdict { outcome: b.outcome, reason: Some(reason), findings: own.findings }
        }
        _ => own,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::scan::{SCANS, ScanOptions, scan};

    /// A version 2 image whose L1 entry leads to `l2`.
    fn qcow2(l2: u64) -> Vec<u8> {
        let mut bytes = b"QFI\xfb\0\0\0\x02".to_vec();
        bytes.resize(0x30000, 0);
        bytes[23] = 16;
        bytes[24..32].copy_from_slice(&(1u64 << 20).to_be_bytes());
        bytes[36..40].copy_from_slice(&1u32.to_be_bytes());
        bytes[40..48].copy_from_slice(&0x10000u64.to_be_bytes());
        bytes[0x10000..0x10008].copy_from_slice(&l2.to_be_bytes());
        bytes
    }

    #[test]
    fn many_points_stand_as_each_by_itself_and_the_directory_is_looked_at_once_more() {
        for count in [3, 30] {
            let dir = tempfile::tempdir().unwrap();
            for i in 0..count {
                // Some are raw, and have nothing that could be wrong; in others a table is missing.
                let bytes = if i % 3 == 0 { vec![7; 4096] } else { qcow2(0x12_0000) };
                std::fs::write(dir.path().join(format!("FULL-{i}-d{i}")), bytes).unwrap();
            }
            let (catalog, _) = scan(dir.path(), &ScanOptions::default(), None).unwrap();
            let points: Vec<_> = (0..catalog.disks.len()).map(|d| (d, 0)).collect();
            assert_eq!(points.len(), count);
            let before = SCANS.get();
            let all = quick(&catalog, &points).unwrap();
            assert_eq!(SCANS.get() - before, 1);
            for ((d, i), standing) in points.iter().zip(&all) {
                let point = Some(catalog.disks[*d].point_path(*i));
                let options = Options { quick: true, point, ..Options::default() };
                let alone = verify(&catalog, &options, &()).unwrap();
                let alone = (alone.outcome, alone.points[0].reason.clone());
                assert_eq!((standing.outcome, standing.reason.clone()), alone);
            }
            assert!(all.iter().any(|s| s.outcome == Outcome::Unsound));
            assert!(all.iter().any(|s| s.outcome == Outcome::Unproven));
        }
    }
}
