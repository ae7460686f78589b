//! What a backup directory has: disks and their points.

use std::path::PathBuf;

use crate::error::Finding;
use crate::layer::LayerSpec;
use crate::layout::Level;
use crate::manifest;

/// Everything found in a backup directory.
#[derive(Debug, Clone, Default)]
pub struct Catalog {
    /// The backup directory, as an absolute path.
    pub root: PathBuf,
    /// The disks, sorted by path.
    pub disks: Vec<Disk>,
    /// What belongs to no disk (unreadable folders, links that lead outside).
    pub findings: Vec<Finding>,
}

/// One virtual disk.
#[derive(Debug, Clone)]
pub struct Disk {
    /// Where it appears below the mount point, relative to it; unique in the catalog.
    pub path: PathBuf,
    /// All points in chain order, also those that cannot be served.
    pub points: Vec<Point>,
    /// What was found in this disk's files.
    pub findings: Vec<Finding>,
}

/// The finding of [`Disk::newest_missing`].
pub(crate) const NEWEST_LOST: &str =
    "the newest backup of its disk is missing: there is a manifest and no image";

impl Disk {
    /// All layers of a point, bottom first.
    pub fn stack(&self, point: usize) -> Vec<LayerSpec> {
        let mut parts = Vec::new();
        let mut at = Some(point);
        while let Some(i) = at {
            parts.push(&self.points[i].layers);
            at = self.points[i].parent;
        }
        parts.into_iter().rev().flatten().cloned().collect()
    }
}

/// One restorable state of a disk.
#[derive(Debug, Clone)]
pub struct Point {
    /// The source's file name (for an internal snapshot `<file>@<snapshot name>`), unique within
    /// the disk. The mount shows it with `.raw` appended.
    pub name: String,
    /// The file that ends the point.
    pub source: PathBuf,
    /// What kind of backup made it.
    pub level: Level,
    /// The name of the point at the root of its chain.
    pub chain: String,
    /// The point it depends on, as an index into [`Disk::points`].
    pub parent: Option<usize>,
    /// When it was taken, in seconds since the epoch.
    pub time: i64,
    /// Size in bytes of the virtual disk; 0 if the header could not be read.
    pub size: u64,
    /// Bytes that its own file takes on disk (allocated, not apparent).
    pub own_bytes: u64,
    /// How consistent the guest's data is in it; `None` if that is not known.
    pub consistency: Option<manifest::Achieved>,
    /// The layers that this point adds on top of its parent's, bottom first; empty if the point
    /// cannot be served. [`Disk::stack`] gives them all. (A list of all layers in each point
    /// would grow with the square of the chain's length.)
    pub layers: Vec<LayerSpec>,
    /// Whether nothing but its own bytes says that it is a qcow2 image.
    pub format_is_open: bool,
    /// Why it cannot be served; `None` if it can.
    pub unavailable: Option<Finding>,
}

impl Point {
    /// Whether the mount shows it.
    pub fn is_served(&self) -> bool {
        self.unavailable.is_none()
    }
}
