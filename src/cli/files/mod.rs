//! `fleecefs files`: the files inside a point.

mod all_points;
mod cat;
mod cp;
mod filter;
mod find;
mod ls;
pub(super) mod point_path;
pub(super) mod row;
mod stat;
mod versions;

use clap::{Args, Subcommand};

use crate::error::Result;

/// Show and copy single files out of a point: no root, no loop device, no VM
///
/// A file is named by its point, the partition, and its path there: POINT:PARTITION/PATH, such as
/// sda/latest:p1/etc/fstab. 'p1' is the first partition; a logical volume has its name in /dev/mapper (vg-root). If a
/// volume group is on several disks, the others are taken from the same backup run. Where a point has only one file
/// system, the partition may be omitted: sda/latest/etc/fstab. 'files ls DIR POINT' shows what there is.
///
/// These file systems can be read: ext2, ext3, ext4, XFS, btrfs, NTFS, FAT and exFAT. Nothing is written. The journal
/// of ext3 and ext4 is replayed in memory, as the guest's kernel would do it. The logs of XFS, btrfs and NTFS are not
/// replayed: a warning says if they have changes. Damage is reported, and the rest can still be read.
///
/// Of btrfs, the default subvolume is shown, with the subvolumes below it as folders. NTFS, FAT and exFAT have no Unix
/// owners: files get mode 0644, or 0444 if they are read-only; times without a time zone are taken as UTC.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  fleecefs files ls /backups/vm1 sda/latest              partitions and volumes
  fleecefs files ls -l /backups/vm1 sda/latest:p1/etc
  fleecefs files cat /backups/vm1 sda/latest:p1/etc/fstab
  fleecefs files cp /backups/vm1 sda/latest:p2/home/alice restored/
  fleecefs files cp --tar /backups/vm1 sda/latest:vg-root/var | tar -tv
  fleecefs files find /backups/vm1 sda/latest:p2/home --name '*.odt'
  fleecefs files versions /backups/vm1 sda:p1/etc/fstab  when did it change")]
pub(super) struct FilesArgs {
    /// What to do
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    Ls(ls::LsArgs),
    Cat(cat::CatArgs),
    Cp(cp::CpArgs),
    Find(find::FindArgs),
    Stat(stat::StatArgs),
    Versions(versions::VersionsArgs),
}

impl FilesArgs {
    /// The backup directory.
    pub(super) fn dir(&self) -> &std::path::Path {
        match &self.what {
            What::Ls(a) => &a.from.dir,
            What::Cat(a) => &a.from.dir,
            What::Cp(a) => &a.from.dir,
            What::Find(a) => &a.from.dir,
            What::Stat(a) => &a.from.dir,
            What::Versions(a) => &a.dir,
        }
    }
}

impl FilesArgs {
    /// Whether it prints JSON.
    pub(super) fn json(&self) -> bool {
        match &self.what {
            What::Ls(a) => a.print.json,
            What::Find(a) => a.print.json,
            What::Cp(a) => a.print.json,
            What::Stat(a) => a.print.json,
            What::Versions(a) => a.print.json,
            What::Cat(_) => false,
        }
    }

    /// Whether that is an object per line.
    pub(super) fn prints_objects(&self) -> bool {
        matches!(self.what, What::Ls(_) | What::Find(_) | What::Versions(_))
    }
}

/// Runs `fleecefs files`.
///
/// # Errors
/// The directory, the point, its file system or the file cannot be read; output failed.
pub(super) fn run(args: &FilesArgs) -> Result<()> {
    match &args.what {
        What::Ls(a) => ls::run(a),
        What::Cat(a) => cat::run(a),
        What::Cp(a) => cp::run(a),
        What::Find(a) => find::run(a),
        What::Stat(a) => stat::run(a),
        What::Versions(a) => versions::run(a),
    }
}
