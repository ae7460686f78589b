//! Unmounting.

use std::path::Path;
use std::time::Duration;

use super::holders;
use super::table::{self, Mount, Server};
use crate::error::{Error, Kind, Result};
use crate::folder;
use crate::text::path_text;

/// How long the serving process gets to end after its mount is gone.
const PATIENCE: Duration = Duration::from_secs(10);

/// Unmounts and waits until the process that served has ended; with `lazy` it detaches, and does not wait.
///
/// # Errors
/// `NotFound` if nothing is mounted there, `Usage` if it is not ours, `Busy`, `Permission`, `Timeout`; that of the process
/// that served, if it could not write down what was written to points.
pub(crate) fn umount(mountpoint: &Path, lazy: bool) -> Result<()> {
    let mount = find(mountpoint)?;
    // Asked before, so that it cannot be another mount's.
    let server = mount.server();
    table::unmount(&mount.path, lazy).map_err(|e| match e.kind() {
        Kind::Busy => holders::busy(&mount),
        _ => e,
    })?;
    match server.filter(|_| !lazy) {
        Some(server) => ended(server, &mount.path),
        None => Ok(()),
    }
}

/// Waits for the end of what served `path`, and says how that went.
fn ended(mut server: Server, path: &Path) -> Result<()> {
    // While it writes to disk it is waited for, however long that takes.
    while !server.wait(PATIENCE) {
        if server.writes_down() {
            continue;
        }
        let text = "unmounted, but the process that served it has not ended yet";
        return Err(Error::new(Kind::Timeout, text).at_path(path));
    }
    let kind = match server.told() {
        None | Some(0) => return Ok(()),
        Some(code) if code == Kind::NoSpace.exit_code() => Kind::NoSpace,
        Some(_) => Kind::Io,
    };
    let text = "unmounted, but the process that served it ended with an error";
    Err(Error::new(kind, text).at_path(path).remedy(
        "its log has the reason (journalctl, or --log-file); of what was written to points, all that was synced before \
         (fsync) is in the scratch folder",
    ))
}

fn find(path: &Path) -> Result<Mount> {
    let wrong = |e| Error::io(e, "cannot find the mount point").at_path(path);
    if let Some(mount) = table::at(path)? {
        return ours(mount);
    }
    match table::find(&folder::resolve(path).map_err(wrong)?)? {
        Some(mount) => ours(mount),
        None => Err(Error::new(Kind::NotFound, "nothing is mounted here").at_path(path)),
    }
}

fn ours(mount: Mount) -> Result<Mount> {
    if mount.is_fleecefs() {
        return Ok(mount);
    }
    let text = format!("this is a mount of type {}, not one of fleecefs", path_text(&mount.fstype));
    Err(Error::new(Kind::Usage, text).at_path(&mount.path).remedy("use umount(8)"))
}
