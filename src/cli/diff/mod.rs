//! `fleecefs diff`: what changed between two points; `ranges` of the disk, or `files`.

mod args;
mod files;
mod points;
mod ranges;

pub(super) use args::DiffArgs;

use crate::error::Result;

/// Runs `fleecefs diff`.
///
/// # Errors
/// The directory or a point cannot be read; the disks are of different sizes; a point has no such partition or
/// path; output failed.
pub(super) fn run(args: &DiffArgs) -> Result<()> {
    if args.files { files::run(args) } else { ranges::run(args) }
}
