//! The arguments of `fleecefs diff`.

use std::path::PathBuf;

use clap::Args;

use super::super::shared::JsonArgs;
use crate::units::parse_bytes;

/// Show what changed between two points: ranges of the disk, or files
///
/// Without --files: which ranges of the disk may differ, and how many bytes that is. It is told from the maps of
/// the images alone, whatever they are of: a range may differ if another image has it, or another place of the
/// same image, or if it is data in one point and zeros in the other. That is quick; it counts whole clusters, and
/// what the guest wrote again as it was. --exact reads these ranges, and no others, and shows those that do
/// differ, in units of 512 bytes. -v lists the ranges.
///
/// With --files: which files were added, removed, modified or renamed, with their sizes, sorted by path. POINT may
/// have a partition behind it, as with 'fleecefs files' (sda/latest:p1), and a folder to start from. A file is
/// modified if its size, its time (mtime) or its attributes (owner, permissions, ctime) are others: contents are
/// not read. --content reads those of equal size on both sides, and so also finds what was changed with its times
/// kept, and what has new times only. What the maps say is the same is read once.
///
/// The points are of one disk, or of two disks of one size. The exit code is 0 whether something changed or not.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  fleecefs diff /backups/vm1 FULL-1706260646-sda.qcow2 sda/latest
  fleecefs diff -v --exact /backups/vm1 INC-1706260646-sda.qcow2 INC-1706347046-sda.qcow2
  fleecefs diff --files /backups/vm1 INC-1706260646-sda.qcow2:p1 sda/latest:p1
  fleecefs diff --files --content /backups/vm1 INC-1706260646-sda.qcow2:p2/home sda/latest:p2/home")]
pub(in crate::cli) struct DiffArgs {
    /// The backup directory
    pub dir: PathBuf,
    /// The point to start from, as 'map' and 'restore' take it
    #[arg(value_name = "POINT")]
    pub from: PathBuf,
    /// The point to compare with it
    #[arg(value_name = "POINT")]
    pub to: PathBuf,
    /// Compare the bytes of what may differ
    #[arg(long, conflicts_with = "files")]
    pub exact: bool,
    /// Show files that were added, removed, modified or renamed
    #[arg(long)]
    pub files: bool,
    /// Compare contents of files, too
    #[arg(long, requires = "files")]
    pub content: bool,
    /// Memory for maps, decompressed clusters and blocks of file systems
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes, default_value = "64M")]
    pub cache_size: u64,
    #[command(flatten)]
    pub print: JsonArgs,
}
