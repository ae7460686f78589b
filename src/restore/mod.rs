//! Restoring points: to raw files, qcow2 files, block devices and standard output, and the
//! in-place verbs of qmprestore.
//!
//! Everything is planned first ([`Plan`] is a value that `--dry-run` prints) and then executed by
//! a few workers, each of which takes the next chunk of the disk, reads it through the extent map
//! and writes it by position. Files are made without a name, or under a temporary one, in the target's
//! folder (`temp`) and get their own name only when they are complete and on disk.

mod clone;
mod device;
mod plan;
mod pool;
pub mod qcow2;
mod raw;
mod readback;
pub mod run;
mod source;
mod stream;
mod temp;
pub mod verbs;
pub mod work;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::image::Image;

pub use device::Device;
pub use plan::{Chunk, Plan, Totals};
pub use qcow2::{Compression, Preallocation, Qcow2Options};
pub use source::BadRange;
pub use temp::{Temp, check_removable, give, give_common};
pub use work::{RateLimit, Work};

use source::Reader;

/// Where a point goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
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
    pub fn path(&self) -> Option<&Path> {
        match self {
            Target::Raw(p) | Target::Qcow2(p, _) | Target::Device(p) => Some(p),
            Target::Stdout => None,
        }
    }
}

/// Whether ranges may be cloned instead of copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Reflink {
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
pub struct Options {
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
pub struct Summary {
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
    /// Which way the bytes went, in one word.
    pub fn way(&self) -> &'static str {
        match (self.copied, self.cloned) {
            (0, 0) => "nothing to write",
            (_, 0) => "copied",
            (0, _) => "cloned",
            _ => "cloned and copied",
        }
    }
}

/// Executes `plan`: writes the point `image` to `target`.
///
/// # Errors
/// `Exists` without `force`, also if another restore to the same target ended first; `Usage`/`NoSpace`
/// if it does not fit; `Busy` if the device is in use; `Interrupted`; whatever reading and writing
/// meet. A file target is then as it was before; a device holds part of the disk.
pub fn restore(
    image: &Arc<Image>,
    plan: &Plan,
    target: &Target,
    options: &Options,
    work: &Work,
) -> Result<Summary> {
    let started = Instant::now();
    plan.check_readable(options.salvage)?;
    let reader = Reader::new(image, options.salvage);
    work.progress.begin("restore", plan.totals.data);
    let mut summary = match target {
        Target::Raw(path) => raw::to_file(&reader, plan, path, options, work)?,
        Target::Qcow2(path, q) => qcow2::to_file(&reader, plan, path, q, options, work)?,
        Target::Device(path) => raw::to_device(&reader, plan, path, options, work)?,
        Target::Stdout => stream::to_writer(&reader, plan, &mut std::io::stdout().lock(), work)?,
    };
    finish(&mut summary, plan, reader, started, work);
    Ok(summary)
}

/// Writes the point `image` as a qcow2 image into the empty file `temp`, which the caller publishes.
///
/// # Errors
/// See [`restore`].
pub fn restore_to_temp(
    image: &Arc<Image>,
    plan: &Plan,
    temp: &Temp,
    q: &Qcow2Options,
    options: &Options,
    work: &Work,
) -> Result<Summary> {
    let started = Instant::now();
    plan.check_readable(options.salvage)?;
    let reader = Reader::new(image, options.salvage);
    work.progress.begin("restore", plan.totals.data);
    let mut summary = qcow2::to_temp(&reader, plan, temp, q, options, work)?;
    finish(&mut summary, plan, reader, started, work);
    Ok(summary)
}

fn finish(summary: &mut Summary, plan: &Plan, reader: Reader, started: Instant, work: &Work) {
    work.progress.end(started.elapsed());
    summary.size = plan.size;
    summary.bad = reader.into_bad();
    summary.duration_ms = millis(started.elapsed());
}

fn millis(d: Duration) -> u64 {
    u64::try_from(d.as_millis()).unwrap_or(u64::MAX)
}

/// An error of the target's, with its path.
fn target_error(e: std::io::Error, what: &str, path: &Path) -> Error {
    Error::io(e, what).at_path(path)
}
