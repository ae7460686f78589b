//! Runs the checks of single files in parallel: many small files at once, large ones one after the
//! other with all threads on each.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use super::content;
use crate::chain::Point;
use crate::error::{Error, Finding, Kind, Result, Severity};
use crate::layer;
use crate::layer::qcow2::check as structure;
use crate::layer::qcow2::check::FindingList;
use crate::layer::{Format, LayerPart, LayerSpec};
use crate::layout::name::{Promise, promise};
use crate::progress::Progress;
use crate::storage::{ReadAt, SourceFile};
use crate::text::path_text;
use crate::units::human_bytes;

/// Files of at least this size get all threads to themselves.
const LARGE: u64 = 32 << 20;

/// Zeros whose hashing takes so long that it is worth a word.
const MANY_ZEROS: u64 = 64 << 30;

/// One file, and what is wanted of it.
pub(super) struct FileTarget {
    pub path: PathBuf,
    spec: Option<LayerSpec>,
    /// The active state and internal snapshots that are points.
    parts: Vec<LayerPart>,
    deep: bool,
    /// Whether its hash is wanted, too.
    hash: bool,
}

/// What was found in one file.
pub(super) struct FileReport {
    pub path: PathBuf,
    /// Structure, decompression, read errors.
    pub findings: Vec<Finding>,
    /// Refcounts of clusters in use.
    pub refcounts: Vec<Finding>,
    /// BLAKE3 in lower-case hexadecimal, if it was wanted.
    pub hash: Option<String>,
}

/// The files of a point, without those of the points below.
pub(super) fn paths(point: &Point) -> Vec<PathBuf> {
    match point.layers.is_empty() {
        true => vec![point.source.clone()],
        false => point.layers.iter().map(|l| l.file.path().to_path_buf()).collect(),
    }
}

impl FileTarget {
    /// The files of a point; with `hash`, the point's own file is hashed.
    pub(super) fn of_point(point: &Point, deep: bool, hash: bool) -> Vec<FileTarget> {
        if point.layers.is_empty() {
            let path = point.source.clone();
            return vec![FileTarget {
                path,
                spec: None,
                parts: vec![LayerPart::Whole],
                deep,
                hash,
            }];
        }
        let target = |spec: &LayerSpec| FileTarget {
            path: spec.file.path().to_path_buf(),
            spec: Some(spec.clone()),
            parts: vec![spec.part.clone()],
            deep,
            hash: hash && spec.file.path() == point.source,
        };
        point.layers.iter().map(target).collect()
    }

    /// The same file as another point needs it.
    pub(super) fn join(&mut self, other: FileTarget) {
        self.deep |= other.deep;
        self.hash |= other.hash;
        self.spec = self.spec.take().or(other.spec);
        for part in other.parts {
            if !self.parts.contains(&part) {
                self.parts.push(part);
            }
        }
    }

    fn len(&self) -> u64 {
        match &self.spec {
            Some(s) => s.file.len(),
            None => crate::folder::look(&self.path).map_or(0, |m| m.len()),
        }
    }
}

/// Checks all files.
///
/// # Errors
/// None of its own: what is wrong is in the reports.
pub(super) fn check_all(
    targets: &[FileTarget],
    jobs: usize,
    progress: &dyn Progress,
) -> Result<HashMap<PathBuf, FileReport>> {
    let started = std::time::Instant::now();
    let total = targets.iter().filter(|t| t.deep).map(FileTarget::len).sum();
    progress.begin("verify", total);
    let (large, small): (Vec<&FileTarget>, Vec<&FileTarget>) =
        targets.iter().partition(|t| t.deep && t.len() >= LARGE);
    let done = Mutex::new(HashMap::with_capacity(targets.len()));
    let keep = |report: FileReport| {
        done.lock().unwrap_or_else(|e| e.into_inner()).insert(report.path.clone(), report);
    };
    crate::hash::in_parallel(
        small.len() as u64,
        jobs,
        || (),
        |i, _| {
            keep(check_file(small[i as usize], 1, progress));
            Ok(())
        },
    )?;
    for target in large {
        keep(check_file(target, jobs, progress));
    }
    progress.end(started.elapsed());
    Ok(done.into_inner().unwrap_or_else(|e| e.into_inner()))
}

fn check_file(target: &FileTarget, jobs: usize, progress: &dyn Progress) -> FileReport {
    let path = target.path.clone();
    let mut report = FileReport { path, findings: Vec::new(), refcounts: Vec::new(), hash: None };
    if let Err(e) = check_opened(target, jobs, progress, &mut report) {
        report.findings.push(Finding::from_error(&e, &target.path));
    }
    report
}

fn check_opened(
    target: &FileTarget,
    jobs: usize,
    progress: &dyn Progress,
    report: &mut FileReport,
) -> Result<()> {
    // Descriptors of our own: the catalog's stay open as long as it lives.
    let own =
        |f: &SourceFile| Arc::new(SourceFile::with_identity(f.path().to_path_buf(), f.identity()));
    let file = match &target.spec {
        Some(spec) => own(&spec.file),
        None => Arc::new(SourceFile::look(&target.path)?),
    };
    let data = target.spec.as_ref().and_then(|s| s.data_file.as_deref()).map(own);
    let qcow2 = match &target.spec {
        Some(spec) => spec.format == Format::Qcow2,
        // What is in a file whose name says raw, nobody knows as long as it cannot be used.
        None => !says_raw(&target.path) && layer::sniff(&*file)? == Some(Format::Qcow2),
    };
    let mut compressed = false;
    if qcow2 {
        let storage = data.clone().map(|d| d as Arc<dyn ReadAt>);
        let mut found = structure::check(&*file, storage.as_ref());
        compressed = found.compressed;
        report.findings.append(&mut found.findings);
        report.refcounts = found.refcounts;
    }
    if target.deep {
        if target.hash {
            note_holes(&file, progress);
            report.hash = Some(crate::hash::hash(&*file, jobs, progress)?.to_hex().to_string());
        } else {
            content::read_all(&*file, jobs, progress)?;
        }
        // Of formats other than qcow2 the layer itself knows what can be wrong.
        let other = |s: &&LayerSpec| !matches!(s.format, Format::Qcow2 | Format::Raw);
        let broken = report.findings.iter().any(|f| f.severity == Severity::Error);
        if let Some(spec) = target.spec.as_ref().filter(|s| (compressed && !broken) || other(s)) {
            let spec = LayerSpec { file: file.clone(), data_file: data, ..spec.clone() };
            decompress(&spec, &target.parts, jobs, report);
        }
    }
    still_the_same(&file)
}

fn says_raw(path: &Path) -> bool {
    path.file_name().is_some_and(|n| promise(n) == Promise::Raw)
}

/// Says why a file that takes little space takes long: the zeros of its holes are hashed.
fn note_holes(file: &SourceFile, progress: &dyn Progress) {
    let holes = file.unallocated();
    if holes >= MANY_ZEROS {
        progress.note(&format!(
            "{}: {} of it are holes, which are hashed with the rest",
            path_text(file.path()),
            human_bytes(holes)
        ));
    }
}

fn still_the_same(file: &SourceFile) -> Result<()> {
    file.check_unchanged().map_err(|_| {
        Error::new(Kind::Busy, "the file changed while it was being verified")
            .at_path(file.path())
            .remedy("verify again when no backup is running")
    })
}

fn decompress(spec: &LayerSpec, parts: &[LayerPart], jobs: usize, report: &mut FileReport) {
    let found = Mutex::new(FindingList::default());
    let keep = |e: &Error| {
        let finding = Finding::from_error(e, &report.path);
        found.lock().unwrap_or_else(|p| p.into_inner()).push(finding);
    };
    for part in parts {
        let opened = layer::open(&LayerSpec { part: part.clone(), ..spec.clone() });
        match opened.and_then(|l| content::decompress_all(&*l, jobs, |e| keep(&e))) {
            Ok(()) => {}
            Err(e) => keep(&e),
        }
    }
    let mut found = found.into_inner().unwrap_or_else(|p| p.into_inner()).finish();
    debug_assert!(found.iter().all(|f| f.severity == Severity::Error));
    report.findings.append(&mut found);
}
