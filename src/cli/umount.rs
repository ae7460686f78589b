//! `fleecefs umount`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;

use super::holders;
use super::mountinfo::{self, Mount};
use crate::error::{Error, Kind, Result};

/// How long the serving process gets to end after its mount is gone.
const PATIENCE: Duration = Duration::from_secs(10);

/// Unmount what 'fleecefs mount' mounted, and wait until its process has ended
#[derive(Debug, Args)]
pub struct UmountArgs {
    /// The mount point
    mountpoint: PathBuf,

    /// Detach now and end when the last open file is closed
    #[arg(short, long)]
    lazy: bool,
}

/// Runs `fleecefs umount`.
pub fn umount(args: UmountArgs) -> Result<()> {
    let mount = find(&args.mountpoint)?;
    // Asked before, so that it cannot be another mount's.
    let server = mount.server();
    mountinfo::unmount(&mount.path, args.lazy).map_err(|e| match e.kind() {
        Kind::Busy => holders::busy(&mount),
        _ => e,
    })?;
    if !args.lazy && server.is_some_and(|s| !s.wait(PATIENCE)) {
        let text = "unmounted, but the process that served it has not ended yet";
        return Err(Error::new(Kind::Timeout, text).at_path(&mount.path));
    }
    Ok(())
}

fn find(path: &Path) -> Result<Mount> {
    let wrong = |e| Error::io(e, "cannot find the mount point").at_path(path);
    if let Some(mount) = mountinfo::at(path)? {
        return ours(mount);
    }
    match mountinfo::find(&crate::folder::resolve(path).map_err(wrong)?)? {
        Some(mount) => ours(mount),
        None => Err(Error::new(Kind::NotFound, "nothing is mounted here").at_path(path)),
    }
}

fn ours(mount: Mount) -> Result<Mount> {
    if mount.is_fleecefs() {
        return Ok(mount);
    }
    let text = format!("this is a {} mount, not one of fleecefs", mount.fstype);
    Err(Error::new(Kind::Usage, text).at_path(&mount.path).remedy("use umount(8)"))
}
