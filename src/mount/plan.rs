//! What is checked and decided before mounting.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::scratch_place::{self, Writable};
use super::table;
use super::table::Mount;
use crate::error::{Error, Kind, Result};
use crate::folder::user_paths;
use crate::fs::attr;
use crate::fuse::Access;
use crate::overlay::Scratch;
use crate::privileges::Owner;
use crate::text::path_text;
use crate::{folder, fuse, privileges};

/// Dead mounts on top of each other that are taken away.
const MOST_DEAD: usize = 16;

/// More than any `/etc/fuse.conf` has, in bytes.
const FUSE_CONF_MAX: u64 = 1 << 20;

/// Bytes of cache where the user does not say.
const CACHE_SIZE: u64 = 64 << 20;

/// How the files of points are shown.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Files {
    /// Whether all of them belong to the owner of the mount.
    pub squash: bool,
}

/// What the user wants.
pub(crate) struct Options {
    /// The backup directory.
    pub backups: PathBuf,
    /// Where to mount.
    pub mountpoint: PathBuf,
    /// Who may use it.
    pub access: Access,
    /// Owner of all files; the user who mounts if omitted.
    pub uid: Option<u32>,
    /// Group of all files; that of the user who mounts if omitted.
    pub gid: Option<u32>,
    /// Permission bits of the files.
    pub mode: Option<u16>,
    /// Bytes of cache.
    pub cache_size: Option<u64>,
    /// Whether the files of points are shown.
    pub files: Option<Files>,
    /// Whether points can be written to.
    pub writable: Option<Writable>,
    /// Serving threads.
    pub threads: Option<usize>,
    /// Unmount after so long without use.
    pub idle_timeout: Option<Duration>,
    /// Also look for new points at this interval.
    pub poll_interval: Option<Duration>,
    /// Whether the owner of the backup directory serves it.
    pub as_owner: bool,
}

/// Everything that was checked and decided before mounting.
pub(crate) struct Plan {
    /// The backup directory, without links.
    pub(super) backups: PathBuf,
    /// The same as the user calls it, absolute.
    pub(super) called: PathBuf,
    /// The mount point, without links.
    pub(super) mountpoint: PathBuf,
    /// Who may use it.
    pub(super) access: Access,
    /// Owner and mode of the files.
    pub(super) owner: attr::Owner,
    /// Bytes of cache.
    pub(super) cache_size: u64,
    /// Whether the files of points are shown.
    pub(super) files: Option<Files>,
    /// Where that goes which is written, if points can be written to.
    pub(super) scratch: Option<Scratch>,
    /// Serving threads.
    pub(super) threads: usize,
    /// Unmount after so long without use.
    pub(super) idle_timeout: Option<Duration>,
    /// Polling interval, if the user wants one.
    pub(super) poll_interval: Option<Duration>,
    /// Who serves it, if that is not the user who mounts.
    pub(super) as_owner: Option<Owner>,
}

impl Plan {
    /// Checks and decides.
    ///
    /// # Errors
    /// `Usage` or `NotFound` for the folders, `Busy` where something is mounted already, `Permission`.
    pub(crate) fn new(wanted: &Options) -> Result<Self> {
        let backups = directory(&wanted.backups, "the backup directory")?;
        clear(&wanted.mountpoint)?;
        let mountpoint = directory(&wanted.mountpoint, "the mount point")?;
        if let Some(mount) = table::find(&mountpoint)?.filter(Mount::is_fleecefs) {
            return Err(mounted_already(&mount));
        }
        check_apart(&backups, &mountpoint)?;
        check_access(wanted.access)?;
        let called = std::path::absolute(&wanted.backups).map_err(|e| {
            Error::io(e, "cannot use the backup directory").at_path(&wanted.backups)
        })?;
        let as_owner = if wanted.as_owner { Owner::of(&backups)? } else { None };
        let scratch = wanted
            .writable
            .as_ref()
            .map(|w| scratch_place::find(w, (&backups, Some(&mountpoint)), as_owner.as_ref()));
        Ok(Plan {
            scratch: scratch.transpose()?,
            called,
            mountpoint,
            access: wanted.access,
            owner: owner(wanted),
            cache_size: wanted.cache_size.unwrap_or(CACHE_SIZE),
            files: wanted.files,
            threads: wanted.threads.unwrap_or_else(fuse::default_threads),
            idle_timeout: wanted.idle_timeout,
            poll_interval: wanted.poll_interval,
            as_owner,
            backups,
        })
    }

    /// What mounting needs to know.
    pub(super) fn fuse(&self) -> fuse::Options {
        fuse::Options {
            access: self.access,
            threads: self.threads,
            source: self.backups.to_string_lossy().into_owned(),
            writable: self.scratch.is_some(),
        }
    }

    /// Seconds without use after which it is unmounted.
    pub(super) fn idle_seconds(&self) -> Option<u64> {
        self.idle_timeout.map(|t| t.as_secs())
    }
}

/// Takes dead mounts of ours away. Looked up before anything asks the mount itself: its server may be dead.
fn clear(mountpoint: &Path) -> Result<()> {
    for _ in 0..MOST_DEAD {
        match table::at(mountpoint)?.filter(Mount::is_fleecefs) {
            Some(mount) => take_over(&mount)?,
            None => break,
        }
    }
    Ok(())
}

/// To whom the files belong.
fn owner(wanted: &Options) -> attr::Owner {
    if wanted.access == Access::Everybody && wanted.mode.is_none() && wanted.uid.is_none() {
        log::warn!("--allow-other without --mode: only the owner and root may read the files");
    }
    attr::Owner {
        uid: wanted.uid.unwrap_or_else(|| rustix::process::geteuid().as_raw()),
        gid: wanted.gid.unwrap_or_else(|| rustix::process::getegid().as_raw()),
        mode: mode(wanted),
    }
}

/// Where points can be written to, by their owner at least.
fn mode(wanted: &Options) -> u16 {
    let mode = wanted.mode.unwrap_or(0o400);
    let writes = wanted.writable.is_some() && mode & 0o222 == 0;
    if writes { mode | 0o200 } else { mode }
}

/// Takes away a mount whose server was killed. Whoever still has a file of it open keeps that, dead.
fn take_over(mount: &Mount) -> Result<()> {
    if folder::ask(&mount.path).err().and_then(|e| e.raw_os_error()) != Some(libc::ENOTCONN) {
        return Err(mounted_already(mount));
    }
    let path = path_text(&mount.path);
    mount.end(true).map_err(|e| {
        let text = format!("a dead mount of {} is there: {}", mount.source, e.report());
        Error::new(Kind::Busy, text)
            .at_path(&mount.path)
            .remedy(format!("'fleecefs umount --lazy {path}' as its owner or root first"))
    })?;
    log::warn!("{path}: replaced a dead mount of {}, whose process was killed", mount.source);
    Ok(())
}

fn mounted_already(mount: &Mount) -> Error {
    let text = format!("{} is mounted here already", mount.source);
    let remedy = format!("'fleecefs umount {}' first", path_text(&mount.path));
    Error::new(Kind::Busy, text).at_path(&mount.path).remedy(remedy)
}

fn directory(path: &Path, what: &str) -> Result<PathBuf> {
    user_paths::existing_folder(path, what).map_err(|e| match e.os_code() {
        Some(libc::ENOTCONN) => e.remedy("a dead mount is there; unmount it first"),
        _ => e,
    })
}

/// The mount must not cover what it reads. Inside the backup directory it may lie; it is omitted.
pub(super) fn check_apart(backups: &Path, mountpoint: &Path) -> Result<()> {
    if backups.starts_with(mountpoint) {
        let text = "mounting here would cover the backup directory";
        return Err(Error::new(Kind::Usage, text)
            .at_path(mountpoint)
            .remedy("choose an empty directory elsewhere"));
    }
    Ok(())
}

/// Fails where this user may not let others in.
fn check_access(access: Access) -> Result<()> {
    if access == Access::Owner {
        return Ok(());
    }
    let config = Path::new("/etc/fuse.conf");
    // A link on some systems.
    let text = folder::resolve(config).and_then(|p| folder::read_small(&p, FUSE_CONF_MAX));
    let allowed = text.is_ok_and(|t| allows_others(&String::from_utf8_lossy(&t)));
    if !privileges::is_root() && !allowed {
        let text = "--allow-other and --allow-root need 'user_allow_other' there";
        return Err(Error::new(Kind::Permission, text)
            .at_path(config)
            .remedy("ask the administrator to add a line 'user_allow_other', or mount as root"));
    }
    Ok(())
}

fn allows_others(config: &str) -> bool {
    config.lines().any(|l| l.trim() == "user_allow_other")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_commented_line_allows_nothing() {
        assert!(allows_others("# x\nuser_allow_other\n"));
        assert!(!allows_others("#user_allow_other\n") && !allows_others(""));
    }

    #[test]
    fn a_mount_never_covers_its_backups() {
        let check = |a: &str, b: &str| check_apart(Path::new(a), Path::new(b)).is_ok();
        assert!(!check("/b", "/b") && !check("/m/b", "/m"));
        assert!(check("/b", "/b2") && check("/b", "/b/mnt"));
    }
}
