//! A file under a temporary name beside its target, which takes the target's place when it is
//! complete and on disk.
//!
//! The name is a function of the target's, and the file is locked as long as its maker lives. So
//! the leftover of a killed run is recognised by the next restore to the same target (nobody
//! holds its lock), emptied and used again; one that is in use is left alone. After any error or
//! signal the file is removed.

use std::ffi::{CString, OsString};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::{check_new, target_error};
use crate::error::{Error, Kind, Result};
use crate::text::path_text;

/// Longest file name on the usual file systems.
const NAME_MAX: usize = 255;
/// Ends every temporary name.
const SUFFIX: &str = ".fleecefs-partial";
/// How often somebody may take the name away while it is being locked.
const TRIES: usize = 16;

/// The temporary file.
#[derive(Debug)]
pub struct Temp {
    file: File,
    path: PathBuf,
    target: PathBuf,
    force: bool,
    /// Bytes that a killed run had left under this name.
    pub leftover: u64,
    published: bool,
}

impl Temp {
    /// Makes the temporary file of `target`. A link is followed: the file it names is replaced.
    ///
    /// # Errors
    /// `Exists` if there is a target and `force` is not set; `Busy` if another process writes the
    /// same target; what the operating system said.
    pub fn create(target: &Path, force: bool) -> Result<Self> {
        let target = resolve(target)?;
        check_new(&target, force)?;
        let path = temporary_path(&target)?;
        for _ in 0..TRIES {
            let file = open_locked(&path)?;
            let meta =
                file.metadata().map_err(|e| target_error(e, "cannot look at the file", &path))?;
            // Its last owner may have renamed or removed it before we had the lock.
            if !std::fs::symlink_metadata(&path).is_ok_and(|m| m.ino() == meta.ino()) {
                continue;
            }
            file.set_len(0).map_err(|e| target_error(e, "cannot empty the file", &path))?;
            let leftover = meta.len();
            return Ok(Temp { file, path, target, force, leftover, published: false });
        }
        Err(Error::new(Kind::Busy, "others keep writing the same target").at_path(target))
    }

    /// The open file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Where it is now.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where it will be, links resolved.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Writes everything out and gives the file its name.
    ///
    /// # Errors
    /// What the operating system said; `Exists` if a target has appeared meanwhile. The temporary
    /// file is gone then.
    pub fn publish(mut self) -> Result<()> {
        if self.force {
            self.take_over_owner();
        }
        let (path, target) = (&self.path, &self.target);
        self.file.sync_all().map_err(|e| target_error(e, "cannot write to disk", path))?;
        let renamed =
            if self.force { std::fs::rename(path, target) } else { rename_new(path, target) };
        renamed.map_err(|e| target_error(e, "cannot give the file its name", target))?;
        self.published = true;
        sync_folder(&self.target)
    }

    /// The same under another name on the same file system, replacing what is there.
    ///
    /// # Errors
    /// See [`Temp::publish`].
    pub fn publish_as(mut self, target: &Path) -> Result<()> {
        self.target = target.to_path_buf();
        self.force = true;
        self.publish()
    }

    /// The same, but fails if there is a file of that name.
    ///
    /// # Errors
    /// See [`Temp::publish`]; `Exists`.
    pub fn publish_as_new(mut self, target: &Path) -> Result<()> {
        self.target = target.to_path_buf();
        self.force = false;
        self.publish()
    }

    /// Mode and owner of the file that is being replaced, as far as we may.
    fn take_over_owner(&self) {
        let Ok(old) = std::fs::metadata(&self.target) else { return };
        let mode = std::fs::Permissions::from_mode(old.mode() & 0o777);
        let kept = self
            .file
            .set_permissions(mode)
            .and_then(|()| std::os::unix::fs::fchown(&self.file, Some(old.uid()), Some(old.gid())));
        if let Err(e) = kept {
            log::warn!("{}: cannot keep mode and owner: {e}", path_text(&self.target));
        }
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        if !self.published
            && let Err(e) = std::fs::remove_file(&self.path)
        {
            log::warn!("{}: cannot remove the temporary file: {e}", path_text(&self.path));
        }
    }
}

/// Makes a rename or removal beside `path` survive a power cut.
///
/// # Errors
/// What the operating system said.
pub fn sync_folder(path: &Path) -> Result<()> {
    let folder = folder_of(path);
    File::open(folder)
        .and_then(|d| d.sync_all())
        .map_err(|e| target_error(e, "cannot write the folder to disk", folder))
}

/// The folder that `path` is in.
pub fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    }
}

fn resolve(target: &Path) -> Result<PathBuf> {
    let is_link = std::fs::symlink_metadata(target).is_ok_and(|m| m.is_symlink());
    if !is_link {
        return Ok(target.to_path_buf());
    }
    std::fs::canonicalize(target).map_err(|e| target_error(e, "cannot follow the link", target))
}

fn temporary_path(target: &Path) -> Result<PathBuf> {
    let Some(name) = target.file_name() else {
        return Err(Error::new(Kind::Usage, "the target needs a file name").at_path(target));
    };
    let mut temporary = OsString::from(".");
    if name.len() + 1 + SUFFIX.len() <= NAME_MAX {
        temporary.push(name);
    } else {
        temporary.push(&blake3::hash(name.as_bytes()).to_hex()[..32]);
    }
    temporary.push(SUFFIX);
    Ok(target.with_file_name(temporary))
}

fn open_locked(path: &Path) -> Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_CLOEXEC | libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
        .map_err(|e| target_error(e, "cannot make the temporary file", path))?;
    // SAFETY: flock on a descriptor that is open.
    if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0 {
        return Ok(file);
    }
    let e = io::Error::last_os_error();
    match e.raw_os_error() {
        Some(libc::EWOULDBLOCK) => {
            Err(Error::new(Kind::Busy, "another restore writes this target").at_path(path))
        }
        // A file system without locks: go on without.
        Some(libc::ENOLCK | libc::EOPNOTSUPP | libc::ENOSYS) => Ok(file),
        _ => Err(target_error(e, "cannot lock the temporary file", path)),
    }
}

/// Renames without replacing.
///
/// # Errors
/// What the operating system said: `AlreadyExists` if there is such a file.
pub fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    let c = |p: &Path| CString::new(p.as_os_str().as_bytes()).map_err(io::Error::other);
    let (a, b) = (c(from)?, c(to)?);
    let at = libc::AT_FDCWD;
    // SAFETY: two paths that end in NUL and live until the call returns.
    let rc = unsafe { libc::renameat2(at, a.as_ptr(), at, b.as_ptr(), libc::RENAME_NOREPLACE) };
    if rc == 0 {
        return Ok(());
    }
    let e = io::Error::last_os_error();
    match e.raw_os_error() {
        // A file system that cannot: the next best is to look first.
        Some(libc::EINVAL | libc::ENOSYS) => match std::fs::symlink_metadata(to) {
            Ok(_) => Err(io::Error::from_raw_os_error(libc::EEXIST)),
            Err(_) => std::fs::rename(from, to),
        },
        _ => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_target_appears_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("disk.raw");
        let temp = Temp::create(&target, false).unwrap();
        temp.file().write_all(b"hello").unwrap();
        assert!(!target.exists());
        assert_eq!(Temp::create(&target, false).unwrap_err().kind(), Kind::Busy);
        temp.publish().unwrap();
        assert_eq!(std::fs::read(&target).unwrap(), b"hello");
        assert_eq!(Temp::create(&target, false).unwrap_err().kind(), Kind::Exists);
        drop(Temp::create(&target, true).unwrap());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_leftover_is_used_again() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("x".repeat(250));
        let path = temporary_path(&target).unwrap();
        std::fs::write(&path, [1; 1000]).unwrap();
        let temp = Temp::create(&target, false).unwrap();
        assert_eq!((temp.leftover, temp.file().metadata().unwrap().len()), (1000, 0));
    }

    #[test]
    fn a_target_that_appears_meanwhile_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("disk.raw");
        let temp = Temp::create(&target, false).unwrap();
        std::fs::write(&target, b"other").unwrap();
        assert_eq!(temp.publish().unwrap_err().kind(), Kind::Exists);
        assert_eq!(std::fs::read(&target).unwrap(), b"other");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
