//! The private mount: the backups, served by a process of its own as `fleecefs mount` starts it, for root alone.
//!
//! Its points can be written to where a journal is to be replayed. What is written goes to a throw-away overlay
//! (`mount --writable`), which is gone with the mount.

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use super::place::Place;
use super::tools;
use crate::error::{Error, Kind, Result};
use crate::failpoint::step;
use crate::folder::{Access, Folder};
use crate::text::path_text;

/// Mounts `backups` in the private folder.
///
/// # Errors
/// What the mounting process says.
pub(super) fn mount(place: &Place, backups: &Path, writable: bool) -> Result<()> {
    // This very program, also where an upgrade has replaced its file since it was started.
    let mut command = Command::new("/proc/self/exe");
    command.arg0("fleecefs").arg("mount");
    command.args(writable.then_some("--writable")).arg("--").arg(backups).arg(place.mount());
    let ended = tools::run(&mut command, "fleecefs mount")?;
    ended.said.lines().filter(|l| !l.starts_with("fleecefs: ")).for_each(|l| log::warn!("{l}"));
    step("serve");
    if ended.status.success() {
        return Ok(());
    }
    let said = ended.said.lines().last().unwrap_or_default().trim_start_matches("fleecefs: ");
    let kind = ended.status.code().and_then(|c| u8::try_from(c).ok()).map_or(Kind::Io, kind_of);
    Err(Error::new(kind, format!("cannot mount the backups: {said}")))
}

/// The kind of an exit code, as far as it says something of storage.
fn kind_of(code: u8) -> Kind {
    let all = [Kind::NotFound, Kind::Permission, Kind::Busy, Kind::NoSpace, Kind::Incomplete];
    all.into_iter().find(|k| k.exit_code() == code).unwrap_or(Kind::Io)
}

/// Opens the point that the mount shows at `path`, which has to have `size` bytes.
///
/// # Errors
/// It is not there (any more), or another.
pub(super) fn open(place: &Place, path: &Path, size: u64, writable: bool) -> Result<File> {
    let access = if writable { Access::ReadWrite } else { Access::Read };
    let shown = place.mount().join(path);
    let (above, name): (&Path, OsString) = match (path.parent(), path.file_name()) {
        (Some(above), Some(name)) => (above, name.to_os_string()),
        _ => return Err(Error::new(Kind::NotFound, "the point is not there").at_path(shown)),
    };
    let opened = Folder::open(&place.mount())
        .and_then(|root| root.beneath(above))
        .and_then(|folder| folder.open_with(name, access));
    let failed = |e| Error::io(e, "cannot open the point").at_path(&shown);
    let file = opened.map_err(failed)?;
    if file.metadata().map_err(failed)?.len() != size {
        let what = format!("{} has changed meanwhile", path_text(path));
        return Err(Error::new(Kind::Changed, what).remedy("attach it again"));
    }
    Ok(file)
}
