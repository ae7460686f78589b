//! `.fleecefs/status.json`: what is mounted, what was found, and how the cache does.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

use super::attr::time_text;
use super::tree::Tree;
use crate::chain::{Disk, Point};
use crate::error::Finding;
use crate::image::CacheFigures;
use crate::layout::Level;
use crate::manifest::Achieved;
use crate::overlay::{Overlays, Told};
use crate::text;
use crate::text::to_text;

/// What the tree does not know about the mount.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Running {
    /// How many times the tree was replaced since mounting.
    pub generation: u64,
    /// Files that are open through the mount.
    pub open_files: u64,
    /// How changes in the backup directory are noticed: `inotify`, `polling` or `off`.
    pub watch: &'static str,
    /// The cache's figures.
    pub cache: CacheFigures,
    /// What was written; absent unless points can be written to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub writable: Option<Writable>,
}

/// The overlays of a mount.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Writable {
    /// The folder that they are in.
    scratch: String,
    /// Bytes that they take, as they are counted against the limit.
    used: u64,
    /// Bytes that they may take.
    limit: u64,
    overlays: Vec<Told>,
}

impl Writable {
    /// As they are now.
    pub(crate) fn of(overlays: &Overlays) -> Self {
        Writable {
            scratch: to_text(overlays.folder().path().as_os_str()),
            used: overlays.budget().used(),
            limit: overlays.budget().limit(),
            overlays: overlays.told(),
        }
    }
}

/// The whole text. Paths that are not UTF-8 have `\xNN` in them, as in `list`.
#[derive(Serialize)]
struct Status<'a> {
    format_version: u32,
    fleecefs: &'static str,
    pid: u32,
    root: String,
    scanned: String,
    #[serde(flatten)]
    running: Running,
    disks: Vec<DiskStatus<'a>>,
    findings: Vec<Finding>,
}

#[derive(Serialize)]
struct DiskStatus<'a> {
    disk: String,
    chains: Vec<ChainStatus<'a>>,
    findings: &'a [Finding],
}

#[derive(Serialize)]
struct ChainStatus<'a> {
    chain: &'a str,
    points: Vec<PointStatus<'a>>,
}

#[derive(Serialize)]
struct PointStatus<'a> {
    point: &'a str,
    level: Level,
    parent: Option<&'a str>,
    time: String,
    size: u64,
    own_bytes: u64,
    /// `crash`, `file-system`, `paused` or `unknown`.
    consistency: &'static str,
    /// Its image, below the backup directory.
    file: String,
    /// Below the mount point; `null` if the point is not served.
    mounted: Option<String>,
    /// Why it is not served.
    #[serde(skip_serializing_if = "Option::is_none")]
    unavailable: Option<&'a Finding>,
    /// Ranges that turned out to be unreadable so far.
    bad_ranges: usize,
}

/// The file's text: JSON, ended by a newline.
pub(crate) fn render(tree: &Tree, running: Running, inside: Vec<Finding>) -> Vec<u8> {
    let paths = tree.paths();
    let served: Served = paths
        .iter()
        .map(|(path, file)| (file.index(), (path.as_path(), file.image.findings())))
        .collect();
    let root = &tree.catalog.root;
    let disks = tree.catalog.disks.iter().enumerate();
    let status = Status {
        format_version: crate::output::JSON_VERSION,
        fleecefs: env!("CARGO_PKG_VERSION"),
        pid: std::process::id(),
        root: to_text(root.as_os_str()),
        scanned: scanned(tree.built),
        running,
        disks: disks.map(|(index, disk)| disk_status(index, disk, root, &served)).collect(),
        findings: all_findings(tree, &served, inside),
    };
    let text = text::json_pretty(&status).unwrap_or_else(|e| format!("{{\"error\": \"{e}\"}}"));
    (text + "\n").into_bytes()
}

/// Path below the mount point and bad ranges of each served point, by disk and point index.
type Served<'a> = HashMap<(usize, usize), (&'a Path, Vec<Finding>)>;

fn disk_status<'a>(
    index: usize,
    disk: &'a Disk,
    root: &Path,
    served: &Served<'a>,
) -> DiskStatus<'a> {
    let mut chains: Vec<ChainStatus> = Vec::new();
    let mut chain_index: HashMap<&str, usize> = HashMap::new();
    for (p, point) in disk.points.iter().enumerate() {
        let mut status = point_status(disk, point, root);
        if let Some((path, bad)) = served.get(&(index, p)) {
            status.mounted = Some(to_text(path.as_os_str()));
            status.bad_ranges = bad.len();
        }
        let chain = *chain_index.entry(&point.chain).or_insert_with(|| {
            chains.push(ChainStatus { chain: &point.chain, points: Vec::new() });
            chains.len() - 1
        });
        chains[chain].points.push(status);
    }
    DiskStatus { disk: to_text(disk.path.as_os_str()), chains, findings: &disk.findings }
}

fn point_status<'a>(disk: &'a Disk, point: &'a Point, root: &Path) -> PointStatus<'a> {
    PointStatus {
        point: &point.name,
        level: point.level,
        parent: point.parent.and_then(|p| disk.points.get(p)).map(|p| p.name.as_str()),
        time: time_text(point.time),
        size: point.size,
        own_bytes: point.own_bytes,
        consistency: Achieved::word(point.consistency),
        file: to_text(point.source.strip_prefix(root).unwrap_or(&point.source).as_os_str()),
        mounted: None,
        unavailable: point.unavailable.as_ref(),
        bad_ranges: 0,
    }
}

fn scanned(built: SystemTime) -> String {
    let since = built.duration_since(UNIX_EPOCH).unwrap_or_default();
    time_text(i64::try_from(since.as_secs()).unwrap_or(0))
}

/// What belongs to no disk, and what reading turned up. Points that depend on each other find the
/// same; it is told once.
fn all_findings(tree: &Tree, served: &Served, inside: Vec<Finding>) -> Vec<Finding> {
    let mut all: Vec<Finding> = tree.catalog.findings.clone();
    all.extend(tree.findings.iter().cloned());
    let mut seen: HashSet<Finding> = all.iter().cloned().collect();
    let inside = inside.iter();
    for finding in served.values().flat_map(|(_, bad)| bad).chain(inside) {
        if seen.insert(finding.clone()) {
            all.push(finding.clone());
        }
    }
    all
}
