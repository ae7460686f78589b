//! Whose a folder is.
//!
//! Folders of backups may be anybody's: the gate keeps every act inside them. Folders that decide
//! what root does (state, our own sockets, hooks, configuration) may not.
//!
//! Access control lists count: where there is one, the group bits of a file's mode are the mask, the
//! most that any entry of the list allows (acl(5)), so that they tell whether others may write.

use std::fs::Metadata;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::Folder;
use super::open::proc_path;
use crate::error::{Error, Kind, Result};
use crate::text::path_text;

/// Write permission of group and others.
const OTHERS_WRITE: u32 = 0o022;
/// Only an entry's owner may rename or remove it.
const STICKY: u32 = 0o1000;

/// Fails unless the folder `path` and all above it are root's or the caller's own, and nobody else
/// may write to them. (Above it others may, where the sticky bit keeps them from renaming it.)
///
/// # Errors
/// `Permission` naming the folder that somebody else may change; what the operating system said.
pub fn check_private(path: &Path) -> Result<()> {
    check_unchangeable(
        path,
        "journals and locks must be in a folder of yours or root's that nobody else may write to: \
         chmod go-w, or --state-dir",
    )
}

/// Fails where somebody other than root and the caller could exchange what is in the folder, as in
/// [`check_private`]; `remedy` says what to do then.
///
/// # Errors
/// As [`check_private`].
pub fn check_unchangeable(path: &Path, remedy: &str) -> Result<()> {
    check_unchangeable_below(path, true, remedy)
}

/// `is_used`: what is in the folder itself counts, and not only what is in one of its own below.
fn check_unchangeable_below(path: &Path, is_used: bool, remedy: &str) -> Result<()> {
    for folder in path.ancestors() {
        let failed = |e| Error::io(e, "cannot check the folder").at_path(folder);
        let held = Folder::open(folder).map_err(failed)?;
        let meta = held.metadata().map_err(failed)?;
        let sticky = (folder != path || !is_used) && meta.mode() & STICKY != 0;
        let shared = may_others_write(&meta, has_list(&held)) && !sticky;
        if is_own(&meta) && !shared {
            continue;
        }
        let whose = match is_own(&meta) {
            true => "other users may write to it".to_string(),
            false => format!("it belongs to user {}", meta.uid()),
        };
        let what = match folder == path {
            true => format!("this folder is not safe here: {whose}"),
            false => format!("the folder above {} is not safe here: {whose}", path_text(path)),
        };
        return Err(Error::new(Kind::Permission, what).at_path(folder).remedy(remedy));
    }
    Ok(())
}

/// The same of a folder that is still to be made at `path`: whoever refuses it has made nothing.
///
/// # Errors
/// As [`check_unchangeable`], of the nearest folder above that is there.
pub fn check_unchangeable_to_make(path: &Path, remedy: &str) -> Result<()> {
    let there = path.ancestors().find(|above| super::exists(above));
    there.map_or(Ok(()), |folder| check_unchangeable_below(folder, folder == path, remedy))
}

/// Fails unless the plain file at `real`, which has no link on its path, is root's or the caller's own and nobody else may
/// write to it or put another one in its place; `remedy` says what to do then.
///
/// # Errors
/// `Permission`; a refusal for anything but a plain file; what the operating system said.
pub fn check_unchangeable_file(real: &Path, remedy: &str) -> Result<Metadata> {
    if let Some(folder) = real.parent() {
        check_unchangeable(folder, remedy)?;
    }
    let failed = |e| Error::io(e, "cannot check the file").at_path(real);
    let held = super::pin(real).map_err(failed)?;
    let meta = held.metadata().map_err(failed)?;
    if !meta.is_file() {
        return Err(Error::new(Kind::Unsupported, "it is not a plain file").at_path(real));
    }
    let what = match is_own(&meta) {
        true if !may_others_write(&meta, has_list_at(&proc_path(held.as_raw_fd()))) => {
            return Ok(meta);
        }
        true => "this file is not safe here: other users may write to it".to_string(),
        false => format!("this file is not safe here: it belongs to user {}", meta.uid()),
    };
    Err(Error::new(Kind::Permission, what).at_path(real).remedy(remedy))
}

/// Whether it belongs to root or the caller.
pub fn is_own(meta: &Metadata) -> bool {
    meta.uid() == 0 || meta.uid() == rustix::process::geteuid().as_raw()
}

/// Whether the folder has an access control list.
fn has_list(folder: &Folder) -> bool {
    has_list_at(&folder.proc_path())
}

fn has_list_at(path: &Path) -> bool {
    let mut list = [0u8; 4096];
    match rustix::fs::getxattr(path, "system.posix_acl_access", &mut list[..]) {
        Ok(_) | Err(rustix::io::Errno::RANGE) => true,
        Err(_) => false,
    }
}

/// A user's own group (same number as the user) counts as the user, unless there is an access control
/// list: then the group bits stand for others, too.
fn may_others_write(meta: &Metadata, has_list: bool) -> bool {
    let own_group = !has_list && meta.uid() != 0 && meta.gid() == meta.uid();
    let mask = if own_group { 0o002 } else { OTHERS_WRITE };
    meta.mode() & mask != 0
}

/// Who else may change what is in a folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ForeignOwner {
    /// It belongs to this user, who is neither root nor the caller.
    User(u32),
    /// Its group, or everybody, may write to it.
    Others,
}

/// Who besides root and the caller may change what is in the folder; `None` if nobody.
///
/// # Errors
/// What the operating system said.
pub fn foreign_owner(folder: &Folder) -> io::Result<Option<ForeignOwner>> {
    let meta = folder.metadata()?;
    Ok(match () {
        () if !is_own(&meta) => Some(ForeignOwner::User(meta.uid())),
        () if may_others_write(&meta, has_list(folder)) => Some(ForeignOwner::Others),
        () => None,
    })
}
