//! What a plan is made from, and what it is.

use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::backup::disks::{GuestDisk, NO_MEDIUM, Survey};
use crate::backup::target::target_id::TargetId;
use crate::backup::target::targets::Folders;
use crate::error::Error;
use crate::layout::Level;
use crate::manifest::{BitmapInfo, EXCLUDED, Manifest, NOT_INCLUDED, Skipped};

/// What will be done.
#[derive(Debug)]
pub(crate) struct Plan {
    /// The disks, in the order QEMU lists them.
    pub disks: Vec<DiskPlan>,
    /// Disks omitted.
    pub skipped: Vec<Skipped>,
    /// Disks that should be backed up and cannot.
    pub refused: Vec<(String, Error)>,
    /// What `--exclude` names and is not there.
    pub unknown: Vec<String>,
}

/// What will be done with one disk.
#[derive(Debug, Clone)]
pub struct DiskPlan {
    /// Its number in the run.
    pub index: usize,
    /// The disk.
    pub disk: GuestDisk,
    /// Its folder in the target.
    pub dir: PathBuf,
    /// The level it gets.
    pub level: Level,
    /// Why it gets a FULL though an INC was possible to hope for.
    pub demoted: Option<String>,
    /// File name of the new image.
    pub image: String,
    /// The run that began its chain.
    pub chain: String,
    /// What it builds on: manifests, root first; empty for FULL and COPY.
    pub base: Vec<Manifest>,
    /// The bitmap that says what changed.
    pub since: Option<BitmapInfo>,
    /// The bitmap that will record from now on.
    pub new_bitmap: Option<BitmapInfo>,
    /// The FULL's own bitmap, if DIFFs are wanted.
    pub diff_bitmap: Option<BitmapInfo>,
    /// Bitmaps of this target that nothing needs once the point is published.
    pub obsolete: Vec<String>,
    /// The latest time in the folder's names.
    pub last_time: i64,
    /// The file that the disk had at the last point, where it has another one now.
    pub moved_from: Option<String>,
    /// The file of another disk of the target, still there, of which it is a copy: its bitmaps came along.
    pub copy_of: Option<String>,
}

impl DiskPlan {
    /// The point it depends on.
    pub fn parent(&self) -> Option<&Manifest> {
        match self.level {
            Level::Diff => self.base.first(),
            _ => self.base.last(),
        }
    }

    /// Where the disk has grown since the point it depends on and what is there has to be read, though
    /// no bit is dirty for it: all of a raw disk, which gives what its storage has there. qcow2 gives
    /// zeros, but in the cluster that the old end was in: what was cut off there comes back.
    pub fn grown(&self) -> Option<Range<u64>> {
        let old = self.since.as_ref().and(self.parent())?.virtual_size;
        let end = match self.disk.identity.format.as_str() {
            "qcow2" => old.checked_next_multiple_of(self.disk.cluster_size)?.min(self.disk.size),
            _ => self.disk.size,
        };
        (old < end).then_some(old..end)
    }

    /// Bytes that will be copied, as far as can be known before.
    pub fn estimate(&self) -> u64 {
        let grown = self.grown().map_or(0, |r| r.end - r.start);
        match &self.since {
            Some(b) => {
                let dirty = self.disk.bitmap(&b.name).map_or(0, |b| b.count);
                let cut = self.unproved().map_or(0, |r| r.end - r.start);
                dirty.saturating_add(grown).saturating_add(cut).min(self.disk.size)
            }
            None => self.disk.allocated,
        }
    }
}

/// A point that cannot be built on: its folder, its file name, and why.
pub(crate) type Unsound = (PathBuf, String, String);

/// What planning needs to know beside the options.
pub(crate) struct Inputs<'a> {
    /// The disks.
    pub seen: Survey,
    /// The run's id.
    pub run: &'a str,
    /// Whose bitmaps are this target's.
    pub target: &'a TargetId,
    /// The folder for this run's disks: the target, or its folder of the month.
    pub base: &'a Path,
    /// Seconds since the epoch.
    pub now: i64,
    /// The VM's UUID, if it has one.
    pub vm: Option<&'a str>,
    /// The VM's name, if it has one.
    pub vm_name: Option<&'a str>,
    /// Whether this VM was never backed up to this target, and may not share it.
    pub newcomer: bool,
    /// What the folders of renamed disks were called at the last run.
    pub renamed: &'a Folders,
    /// Why INC and DIFF are impossible in this run, if they are.
    pub no_inc: Option<String>,
    /// Points that were tried and cannot be built on.
    pub unsound: &'a [Unsound],
}

/// Whether a disk is skipped because the user wants it so, or as there is none in its drive.
pub(crate) fn is_unwanted(s: &Skipped) -> bool {
    [NOT_INCLUDED, EXCLUDED, NO_MEDIUM].contains(&s.reason.as_str())
}

/// What is said of a name in [`Plan::unknown`].
pub(crate) fn unknown_disk(name: &str) -> String {
    format!("--exclude {name}: there is no such disk (fleecefs info blockdev lists them)")
}
