//! What a restore is told and what it tells.

use std::path::{Path, PathBuf};

use super::qcow2::Qcow2Options;
use super::source::BadRange;
use crate::error::Error;

/// Where a point goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Target {
    /// A sparse raw file.
    Raw(PathBuf),
    /// A qcow2 file.
    Qcow2(PathBuf, Qcow2Options),
    /// An existing block device.
    Device(PathBuf),
    /// Standard output: every byte in order.
    Stdout,
}

impl Target {
    /// The path, if it has one.
    pub(crate) fn path(&self) -> Option<&Path> {
        match self {
            Target::Raw(p) | Target::Qcow2(p, _) | Target::Device(p) => Some(p),
            Target::Stdout => None,
        }
    }
}

/// Whether ranges may be cloned instead of copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Reflink {
    /// Clone where the file system can.
    #[default]
    Auto,
    /// Fail if nothing can be cloned.
    Always,
    /// Copy all.
    Never,
}

/// How to restore.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Options {
    /// Replace a target that exists.
    pub force: bool,
    /// Read the result back and compare it.
    pub verify: bool,
    /// Where the backup cannot be read, leave zeros, report it and go on.
    pub salvage: bool,
    /// Discard the whole device first.
    pub discard: bool,
    /// Cloning.
    pub reflink: Reflink,
}

/// How a restore went.
#[derive(Debug, Clone, Default, serde::Serialize)]
pub(crate) struct Summary {
    /// Size in bytes of the virtual disk.
    pub size: u64,
    /// Bytes that were read and written.
    pub copied: u64,
    /// Bytes that the target shares with the backup.
    pub cloned: u64,
    /// Bytes that read as zeros and were not written.
    pub holes: u64,
    /// What could not be read and is zeros in the target (only with `--salvage`).
    pub bad: Vec<BadRange>,
    /// Whether the result was read back and found equal.
    pub verified: bool,
    /// How long it took, in milliseconds.
    pub duration_ms: u64,
}

impl Summary {
    /// How the bytes got there, in a few words.
    pub(crate) fn method(&self) -> &'static str {
        match (self.copied, self.cloned) {
            (0, 0) => "nothing to write",
            (_, 0) => "copied",
            (0, _) => "cloned",
            _ => "cloned and copied",
        }
    }
}

/// An error of the target's, with its path.
pub(crate) fn target_error(e: std::io::Error, what: &str, path: &Path) -> Error {
    Error::io(e, what).at_path(path)
}
