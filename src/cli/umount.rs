//! `fleecefs umount`.

use std::path::PathBuf;

use clap::Args;

use crate::error::Result;
use crate::mount;

/// Unmount what 'fleecefs mount' mounted, and wait until its process has ended
///
/// It fails if that process could not write down what is to be kept of writes to points (--writable --keep). umount(8),
/// fusermount3 -u and --lazy do not tell.
#[derive(Debug, Args)]
pub(super) struct UmountArgs {
    /// The mount point
    mountpoint: PathBuf,

    /// Detach now and end when the last open file is closed
    #[arg(short, long)]
    lazy: bool,
}

/// Runs `fleecefs umount`.
///
/// # Errors
/// As [`mount::umount`].
pub(super) fn umount(args: UmountArgs) -> Result<()> {
    mount::umount(&args.mountpoint, args.lazy)
}
