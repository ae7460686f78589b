//! Once the kernel has the mount: its first answer, and its end.

use std::path::Path;

use super::plan::Plan;
use super::table::{self, Announced, Mount};
use crate::error::{Error, Kind, Result};
use crate::folder;
use crate::fs::FileSystem;
use crate::fuse::Mounted;
use crate::output::logging;
use crate::text::path_text;

/// How far the kernel reads ahead: several of its largest requests, so that all threads have work.
const READ_AHEAD_KB: u32 = 4096;

/// Said by whichever process has mounted.
pub(super) fn print_mounted(plan: &Plan) {
    let (what, at) = (path_text(&plan.backups), path_text(&plan.mountpoint));
    logging::result(&format!("{what} is mounted at {at}"));
}

/// Waits for the end, and writes down what is to be kept of what was written to points; `unmounted` is called before
/// that, which may take long.
///
/// # Errors
/// The connection to the kernel broke; what was written to points could not be written down.
pub(super) fn finish(
    mounted: Mounted,
    fs: &FileSystem,
    plan: &Plan,
    unmounted: impl FnOnce(),
) -> Result<()> {
    let ended = mounted.wait();
    unmounted();
    // However it ended.
    let finished = fs.finish();
    ended.and(finished)?;
    logging::result(&format!("{} is unmounted", path_text(&plan.mountpoint)));
    Ok(())
}

/// Waits for the first answer, raises read-ahead and announces that this process is alive, as long as
/// the second value lives.
///
/// # Errors
/// The mount does not answer.
pub(super) fn answers(mountpoint: &Path) -> Result<(Mount, Option<Announced>)> {
    folder::look(mountpoint)
        .map_err(|e| Error::io(e, "the mount does not answer").at_path(mountpoint))?;
    let Some(mount) = table::find(mountpoint)? else {
        return Err(Error::new(Kind::Io, "the mount has ended").at_path(mountpoint));
    };
    let setting = format!("/sys/class/bdi/{}/read_ahead_kb", mount.dev);
    if let Err(e) = folder::system::set(Path::new(&setting), &READ_AHEAD_KB.to_string()) {
        log::info!("{setting}: cannot raise read-ahead: {e}");
    }
    let announced = mount.announce().ok();
    Ok((mount, announced))
}
