//! Restoring points: to raw files, qcow2 files, block devices and standard output.
//!
//! Everything is planned first ([`Plan`] is a value that `--dry-run` prints) and then executed by
//! a few workers, each of which takes the next chunk of the disk, reads it through the extent map
//! and writes it by position. Files are made without a name, or under a temporary one, in the target's
//! folder (`temp`) and get their own name only when they are complete and on disk.

pub(crate) mod clone;
mod device;
pub(crate) mod options;
pub(crate) mod overlay;
pub(crate) mod plan;
pub(crate) mod qcow2;
mod raw;
pub(crate) mod readback;
pub(crate) mod run;
pub(crate) mod shape;
pub(crate) mod source;
mod stream;
pub(crate) mod temp;

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::Result;
use crate::image::Image;

use crate::job::Work;
use options::target_error;
pub(crate) use options::{Options, Reflink, Summary, Target};
pub(crate) use plan::Plan;
pub(crate) use qcow2::{Compression, Preallocation, Qcow2Options};
pub(crate) use temp::{Temp, check_removable, give_common};

use source::Reader;

/// Executes `plan`: writes the point `image` to `target`.
///
/// # Errors
/// `Exists` without `force`, also if another restore to the same target ended first; `Usage`/`NoSpace`
/// if it does not fit; `Busy` if the device is in use; `Interrupted`; whatever reading and writing
/// meet. A file target is then as it was before; a device holds part of the disk.
pub(crate) fn restore(
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
pub(crate) fn restore_to_temp(
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
