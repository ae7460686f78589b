//! What a plan is made of, and what it says.

use std::path::PathBuf;

use super::reason::Reason;
use crate::chain::gone::Gone;
use crate::layout::Level;

/// One point, as far as the plan needs it.
#[derive(Debug, Clone)]
pub struct Item {
    /// Its name.
    pub name: String,
    /// Seconds since the epoch.
    pub time: i64,
    /// Its kind of backup.
    pub level: Level,
    /// Whether it can be restored.
    pub served: bool,
    /// The point it depends on, as an index into [`DiskItems::items`]; always a smaller one.
    pub parent: Option<usize>,
    /// Whether it depends on something of which nobody knows what it is, because a file is missing.
    pub lies_on_unknown: bool,
    /// The run that made it: the same for all disks.
    pub run: String,
    /// The file it is in; internal snapshots share one.
    pub file: PathBuf,
    /// The name of the FULL of its chain.
    pub chain: String,
    /// Bytes that deleting it frees.
    pub bytes: u64,
}

/// The points of one disk.
#[derive(Debug, Clone, Default)]
pub struct DiskItems {
    /// The disk's path.
    pub disk: PathBuf,
    /// What is the same for all folders of one disk (`--monthly` begins one for each month).
    pub timeline: PathBuf,
    /// In chain order.
    pub items: Vec<Item>,
    /// Why nothing of this timeline may be deleted.
    pub held: Option<String>,
    /// Since when the disk, or its VM, is gone, if it is.
    pub gone: Option<Gone>,
}

/// What happens to one point.
#[derive(Debug, Clone, serde::Serialize)]
pub struct PointPlan {
    /// Its name.
    pub point: String,
    /// Why it is kept; empty if it is deleted.
    pub keep: Vec<Reason>,
    /// Bytes of its own file.
    pub bytes: u64,
}

/// What happens to one disk.
#[derive(Debug, Clone, serde::Serialize)]
pub struct DiskPlan {
    /// The disk's path.
    #[serde(serialize_with = "crate::text::as_text")]
    pub disk: PathBuf,
    /// Since when the disk, or its VM, is gone, if it is: `--keep-gone` says what stays of it.
    pub gone: Option<Gone>,
    /// In chain order.
    pub points: Vec<PointPlan>,
    /// Chains that are shortened: everything of a chain up to this point becomes one new FULL.
    pub consolidate: Vec<String>,
    /// Chains that would be, and cannot.
    pub not_consolidated: Vec<Unmerged>,
}

/// What happens to a backup directory.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Plan {
    /// One for each disk.
    pub disks: Vec<DiskPlan>,
}

impl Plan {
    /// Bytes that deleting frees (consolidation not counted).
    pub fn freed(&self) -> u64 {
        self.deleted().map(|(_, p)| p.bytes).sum()
    }

    /// All points that become part of another.
    pub fn merged(&self) -> impl Iterator<Item = &PointPlan> {
        let is_merged = |r: &Reason| matches!(r, Reason::MergedInto(_));
        self.disks.iter().flat_map(|d| &d.points).filter(move |p| p.keep.iter().any(is_merged))
    }

    /// All points that stay only because newer ones need them.
    pub fn only_needed(&self) -> impl Iterator<Item = &PointPlan> {
        let is_needed = |r: &Reason| matches!(r, Reason::NeededBy(_) | Reason::MayBeNeededBy(_));
        let all = self.disks.iter().flat_map(|d| &d.points);
        all.filter(move |p| !p.keep.is_empty() && p.keep.iter().all(is_needed))
    }

    /// All points that are deleted.
    pub fn deleted(&self) -> impl Iterator<Item = (&DiskPlan, &PointPlan)> {
        let all = self.disks.iter().flat_map(|d| d.points.iter().map(move |p| (d, p)));
        all.filter(|(_, p)| p.keep.is_empty())
    }
}

/// A chain that stays as long as it is.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Unmerged {
    /// The point that would become a FULL.
    pub until: String,
    /// Why it cannot.
    pub why: String,
}
