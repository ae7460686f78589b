//! The arguments of `fleecefs diff`.

use std::path::PathBuf;

use clap::Args;

use super::super::shared::JsonArgs;
use crate::units::parse_bytes;

/// Show what changed between two points: ranges of the disk, or files
///
/// Without --files it shows how many bytes of the disk may differ; -v lists the ranges. No data is read: a range may
/// differ if the two points have it from different images, or from different offsets of one image, or if one has
/// data and the other zeros. This is quick, but it counts whole clusters, also those that the guest has overwritten
/// with the same data. --exact reads these ranges and shows what really differs, in units of 512 bytes.
///
/// With --files it shows which files were added, removed, modified or renamed, with their sizes, sorted by path. FROM
/// and TO may name a partition and a folder, as with 'fleecefs files' (sda/latest:p1/etc). A file is modified if its
/// size, mtime or attributes (owner, permissions, ctime) differ; contents are not read. --content also compares the
/// contents of files of equal size: it finds changes behind unchanged times, and tells new times from new contents.
///
/// Both points are of one disk, or of two disks of the same size. The exit code is 0 whether they differ or not.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  fleecefs diff /backups/vm1 FULL-1706260646-sda.qcow2 sda/latest
  fleecefs diff -v --exact /backups/vm1 INC-1706260646-sda.qcow2 sda/latest
  fleecefs diff --files /backups/vm1 INC-1706260646-sda.qcow2:p1 sda/latest:p1
  fleecefs diff --files --content /backups vm1/sda/latest:p2 vm2/sda/latest:p2")]
pub(in crate::cli) struct DiffArgs {
    /// The backup directory
    pub dir: PathBuf,
    /// The older point, named as for 'map' and 'restore'
    #[arg(value_name = "FROM")]
    pub from: PathBuf,
    /// The newer point
    #[arg(value_name = "TO")]
    pub to: PathBuf,
    /// Read what may differ, and compare the bytes
    #[arg(long, conflicts_with = "files")]
    pub exact: bool,
    /// Show files that were added, removed, modified or renamed
    #[arg(long)]
    pub files: bool,
    /// Also compare the contents of files
    #[arg(long, requires = "files")]
    pub content: bool,
    /// Memory for maps, decompressed clusters and blocks of file systems
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes, default_value = "64M")]
    pub cache_size: u64,
    #[command(flatten)]
    pub print: JsonArgs,
}
