//! How it stands with points, and with a backup directory.

use std::path::{Path, PathBuf};

use crate::error::{Finding, Kind, Severity};
use crate::layout::Level;

/// How it stands. The order is from good to bad.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// Everything that was looked at is as it should be.
    Sound,
    /// Could not tell: nothing is known to be wrong, but there is no proof.
    Unproven,
    /// Damaged, incomplete or mixed up.
    Unsound,
}

/// The result for one point.
#[derive(Debug, Clone, serde::Serialize)]
pub struct PointReport {
    /// The disk's path in the catalog.
    #[serde(serialize_with = "crate::text::as_text")]
    pub disk: PathBuf,
    /// The point's name.
    pub point: String,
    /// The file that ends the point.
    #[serde(serialize_with = "crate::text::as_text")]
    pub file: PathBuf,
    /// Its kind of backup.
    pub level: Level,
    /// Seconds since the epoch.
    #[serde(serialize_with = "crate::units::as_time")]
    pub time: i64,
    /// How it stands, with all that it depends on.
    pub outcome: Outcome,
    /// Why it is not sound, in a few words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Whether it is proved from now on, by what `create` wrote for it, or for what it depends on, in this run.
    pub recorded: bool,
    /// What was found in its own files.
    pub findings: Vec<Finding>,
}

/// A point whose data was read.
#[derive(Debug, Clone)]
pub struct CheckedPoint {
    /// The disk's path in the catalog.
    pub disk: PathBuf,
    /// Index in the disk's points.
    pub point: usize,
    /// How it stands, with all that it depends on.
    pub outcome: Outcome,
}

/// The result for a backup directory.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Report {
    /// The backup directory.
    #[serde(serialize_with = "crate::text::as_text")]
    pub root: PathBuf,
    /// Whether data was omitted.
    pub quick: bool,
    /// The worst outcome.
    pub outcome: Outcome,
    /// All points that were looked at.
    pub points: Vec<PointReport>,
    /// What belongs to no point.
    pub findings: Vec<Finding>,
    /// The points whose data was read, those that others depend on among them.
    #[serde(skip)]
    pub checked: Vec<CheckedPoint>,
}

impl Report {
    pub(super) fn new(root: &Path, quick: bool) -> Report {
        Report {
            root: root.to_path_buf(),
            quick,
            outcome: Outcome::Sound,
            points: Vec::new(),
            findings: Vec::new(),
            checked: Vec::new(),
        }
    }
}

pub(super) fn worst(report: &Report) -> Outcome {
    let points = report.points.iter().map(|p| match p.outcome {
        // What `create` has just recorded is proved from now on.
        Outcome::Unproven
            if p.recorded && p.findings.iter().all(|f| f.severity != Severity::Error) =>
        {
            Outcome::Sound
        }
        o => o,
    });
    let apart = report.findings.iter().filter(|f| f.severity == Severity::Error).map(outcome_of);
    points.chain(apart).max().unwrap_or(Outcome::Sound)
}

/// What an error finding means: damage, or that no one could look.
pub(super) fn outcome_of(finding: &Finding) -> Outcome {
    match finding.kind {
        // "Changed" while it was read; a hash that differs is told apart by its file being quiet.
        Kind::Unsupported
        | Kind::Encrypted
        | Kind::Permission
        | Kind::Busy
        | Kind::Interrupted
        | Kind::Timeout
        | Kind::Unproven => Outcome::Unproven,
        Kind::Usage
        | Kind::NotFound
        | Kind::Exists
        | Kind::NoSpace
        | Kind::Io
        | Kind::Corrupt
        | Kind::Truncated
        | Kind::Incomplete
        | Kind::Changed
        | Kind::Peer
        | Kind::Partial
        | Kind::Skipped
        | Kind::Unsound => Outcome::Unsound,
    }
}
