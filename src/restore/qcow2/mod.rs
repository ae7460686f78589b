//! Writing a qcow2 file (version 3) with the bytes of a point.
//!
//! Data clusters are written as they come, by several workers that each take host clusters from
//! one counter; an L2 table is written once its last cluster is placed; L1 table, refcounts and,
//! last of all, the header follow. A file without its header is nothing, so what is left of an
//! interrupted run can never be taken for an image.
//!
//! Format: docs/interop/qcow2.rst of QEMU.

mod compress;
mod tables;
mod write;

use std::path::Path;
use std::sync::Arc;

pub(crate) use super::shape::{Compression, Preallocation, Qcow2Options};

use super::plan::Plan;
use super::source::Reader;
use super::{Options, Summary, Temp, raw, readback};
use crate::error::{Error, Kind, Result};
use crate::image::{Cache, Image};
use crate::job::Work;
use crate::layer::{Format, LayerPart, LayerSpec};

/// Restores to a new qcow2 file.
///
/// # Errors
/// See [`super::restore`].
pub(crate) fn to_file(
    reader: &Reader,
    plan: &Plan,
    path: &Path,
    qcow2: &Qcow2Options,
    options: &Options,
    work: &Work,
) -> Result<Summary> {
    let temp = Temp::create(path, options.force)?;
    raw::note_leftover(&temp, work);
    let summary = to_temp(reader, plan, &temp, qcow2, options, work)?;
    temp.publish()?;
    Ok(summary)
}

/// Restores to an empty file that the caller publishes.
///
/// # Errors
/// See [`super::restore`].
pub(crate) fn to_temp(
    reader: &Reader,
    plan: &Plan,
    temp: &Temp,
    qcow2: &Qcow2Options,
    options: &Options,
    work: &Work,
) -> Result<Summary> {
    qcow2.check(plan.size)?;
    let mut summary = write::write(reader, plan, temp, qcow2, options, work)?;
    check_size(temp, plan.size)?;
    if options.verify {
        temp.file()
            .sync_all()
            .map_err(|e| super::target_error(e, "cannot write to disk", temp.path()))?;
        let result = open(temp)?;
        readback::image(reader, plan, &result, temp.path(), work)?;
        summary.verified = true;
    }
    Ok(summary)
}

/// Reads the header back: whether the file is a disk of `size` bytes.
fn check_size(temp: &Temp, size: u64) -> Result<()> {
    let found = crate::layer::probe(&temp.source()?)?;
    if (found.format, found.virtual_size) == (Format::Qcow2, size) {
        return Ok(());
    }
    let text = format!("the result has {} bytes instead of {size}", found.virtual_size);
    Err(Error::new(Kind::Io, text).at_path(temp.path()))
}

/// Opens the file that was just written with our own reader.
fn open(temp: &Temp) -> Result<Arc<Image>> {
    let file = Arc::new(temp.source()?);
    let size = crate::layer::probe(&*file)?.virtual_size;
    let spec = LayerSpec { file, format: Format::Qcow2, part: LayerPart::Whole, data_file: None };
    /// Memory for the tables of one pass over the file.
    const CACHE_BYTES: u64 = 64 << 20;
    Image::new(size, &[spec], None, &Cache::new(CACHE_BYTES))
}
