//! Where that goes which is written to points.

use std::path::{Path, PathBuf};

use super::table::{self, Mount};
use crate::error::{Error, Kind, Result};
use crate::folder::{self, FileId, Folder, user_paths};
use crate::overlay::Scratch;
use crate::privileges::Owner;

/// Left free on the scratch's file system, where the user names no limit: a twentieth, but no more than this. As the
/// fleece images of a backup do.
const KEEP_FREE: u64 = 1 << 30;

/// That points can be written to, and where that goes.
#[derive(Debug, Clone, Default)]
pub(crate) struct Writable {
    /// The scratch folder; `TMPDIR` or `/var/tmp` if omitted.
    pub scratch: Option<PathBuf>,
    /// Bytes that all of it may take; what is free there, but for a reserve, if omitted.
    pub limit: Option<u64>,
    /// Whether it outlives the mount.
    pub keep: bool,
}

/// The folder that is wanted, made if it is not there, and the limit. With `owner` it is one of his beside that, where
/// root's is not his to enter.
///
/// # Errors
/// `Usage` if it is in the backup directory, however that is reached, or below the mount point, or if something is to
/// be kept in no folder that has a name; `Permission` if others may change it; what the operating system said.
pub(crate) fn find(
    wanted: &Writable,
    (backups, mountpoint): (&Path, Option<&Path>),
    owner: Option<&Owner>,
) -> Result<Scratch> {
    let folder = match &wanted.scratch {
        Some(path) => named(path, (backups, mountpoint), owner)?,
        None if wanted.keep => {
            return Err(Error::new(Kind::Usage, "--keep needs a folder: --writable=SCRATCH_DIR"));
        }
        None => temporary(backups)?,
    };
    let limit = match wanted.limit {
        Some(limit) => limit,
        None => free(&folder)?,
    };
    Ok(Scratch { folder, keep: wanted.keep, limit, named: wanted.scratch.is_some() })
}

fn named(
    path: &Path,
    (backups, mountpoint): (&Path, Option<&Path>),
    owner: Option<&Owner>,
) -> Result<Folder> {
    let failed = |e| Error::io(e, "cannot make the scratch folder").at_path(path);
    let mut real = user_paths::to_make(path)?;
    if let Some(owner) = owner {
        let mut own = real.file_name().unwrap_or_default().to_os_string();
        own.push(format!(".as-{}", owner.uid));
        real.set_file_name(own);
    }
    check_outside(&real, backups)?;
    if mountpoint.is_some_and(|m| real.starts_with(m)) {
        let text = "the mount would cover its scratch folder";
        return Err(Error::new(Kind::Usage, text).at_path(path).remedy("name one elsewhere"));
    }
    let made = match (owner, real.parent(), real.file_name()) {
        (None, ..) => {
            folder::check_unchangeable_to_make(&real, SAFE)?;
            folder::make_folders(&real).map_err(failed)?
        }
        (Some(owner), Some(above), Some(name)) => {
            folder::check_unchangeable_to_make(above, SAFE)?;
            let parent = folder::make_folders(above).map_err(failed)?;
            check_safe(above)?;
            return parent.make_folder_of(name, owner.uid).map_err(failed);
        }
        _ => return Err(Error::new(Kind::Usage, "the scratch folder needs a name").at_path(path)),
    };
    check_safe(&real)?;
    Ok(made)
}

/// What is in it decides what a mount shows, and what is removed.
const SAFE: &str = "what is written to points must go to a folder of yours or root's that nobody else may write to: \
                    chmod go-w, or name another";

fn check_safe(path: &Path) -> Result<()> {
    folder::check_unchangeable(path, SAFE)
}

/// Files without a name need no folder of their own.
fn temporary(backups: &Path) -> Result<Folder> {
    let path = std::env::var_os("TMPDIR").map_or_else(|| "/var/tmp".into(), PathBuf::from);
    let real = user_paths::existing_folder(&path, "TMPDIR")?;
    check_outside(&real, backups)?;
    Folder::open(&real).map_err(|e| Error::io(e, "cannot use TMPDIR").at_path(&path))
}

fn free(folder: &Folder) -> Result<u64> {
    let failed = |e| Error::io(e, "cannot check the room in the scratch folder");
    let space = folder.space().map_err(|e| failed(e).at_path(folder.path()))?;
    let (all, available) = (
        space.f_blocks.saturating_mul(space.f_frsize),
        space.f_bavail.saturating_mul(space.f_frsize),
    );
    Ok(available.saturating_sub((all / 20).min(KEEP_FREE)))
}

/// Fails if a folder, which need not be there yet, is in the backup directory: by its path, by a folder above it, or by
/// what is mounted there (`mount --bind`).
///
/// # Errors
/// `Usage` if it is; what the operating system said.
pub(crate) fn check_outside(scratch: &Path, backups: &Path) -> Result<()> {
    let inside = || {
        Error::new(Kind::Usage, "this folder is inside the backup directory")
            .at_path(scratch)
            .remedy("name a folder elsewhere: backups stay as they are")
    };
    let failed = |e| Error::io(e, "cannot check the backup directory").at_path(backups);
    let own = FileId::of(&folder::look(backups).map_err(failed)?);
    let is = |p: &Path| folder::look(p).is_ok_and(|m| FileId::of(&m) == own);
    if scratch.starts_with(backups) || scratch.ancestors().any(is) {
        return Err(inside());
    }
    let mounts = table::listed()?;
    let there = scratch.ancestors().find(|p| folder::exists(p)).unwrap_or(Path::new("/"));
    let Some(place) = Place::of(there, &mounts) else { return Ok(()) };
    // What is mounted below the backup directory is a part of it.
    let below = mounts.iter().filter(|m| m.path.starts_with(backups));
    let below = below.map(|m| Place { dev: m.dev.clone(), path: m.root.clone() });
    match Place::of(backups, &mounts).into_iter().chain(below).any(|p| place.is_in(&p)) {
        true => Err(inside()),
        false => Ok(()),
    }
}

/// Where a folder is in its own file system, wherever that is mounted.
#[derive(Debug, PartialEq, Eq)]
struct Place {
    dev: String,
    path: PathBuf,
}

impl Place {
    fn of(path: &Path, mounts: &[Mount]) -> Option<Place> {
        let number = folder::mount_number(path).ok()?;
        let mount = mounts.iter().find(|m| m.number == number)?;
        let path = mount.root.join(path.strip_prefix(&mount.path).ok()?);
        Some(Place { dev: mount.dev.clone(), path })
    }

    fn is_in(&self, other: &Place) -> bool {
        self.dev == other.dev && self.path.starts_with(&other.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scratch_is_never_in_the_backups_and_may_be_beside_them() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().canonicalize().unwrap();
        let backups = top.join("b");
        std::fs::create_dir_all(backups.join("vm")).unwrap();
        for inside in ["b", "b/vm", "b/vm/new/newer"] {
            let e = check_outside(&top.join(inside), &backups).unwrap_err();
            assert_eq!(e.kind(), Kind::Usage, "{inside}");
        }
        for outside in ["", "b2", "c/new"] {
            check_outside(&top.join(outside), &backups).unwrap();
        }
    }

    #[test]
    fn a_bind_mount_of_a_part_of_the_backups_is_seen() {
        let mount = |line: &str| Mount::parse(line).unwrap();
        let place = |m: &Mount, rest: &str| Place { dev: m.dev.clone(), path: m.root.join(rest) };
        let disk = mount("20 1 8:1 / / rw - ext4 /dev/a rw");
        let bind = mount("21 20 8:1 /b/vm /mnt rw - ext4 /dev/a rw");
        let other = mount("22 20 8:2 /b/vm /x rw - ext4 /dev/b rw");
        assert!(place(&bind, "scratch").is_in(&place(&disk, "b")));
        assert!(!place(&other, "scratch").is_in(&place(&disk, "b")));
        assert!(!place(&bind, "scratch").is_in(&place(&disk, "b/v")));
    }
}
