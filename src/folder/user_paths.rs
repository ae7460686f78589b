//! Paths that the user has named: each is resolved once, here, before anything is opened. What comes
//! out has no symbolic link on it, and is opened by the rest of the gate, which follows none.
//!
//! Links that belong to root or the caller may lead anywhere (`/backups -> /srv/b`, `/dev/vg/lv`);
//! those of others only to what is their own, see [`resolve`](super::resolve).

use std::fs::File;
use std::path::{Path, PathBuf};

use super::Folder;
use crate::error::{Error, Kind, Result};
use crate::text::path_text;

/// A backup directory, which has to exist.
///
/// # Errors
/// As the exit codes say; a refusal where a link of somebody else's leads to what isn't his.
pub(crate) fn backups(path: &Path) -> Result<PathBuf> {
    resolved(path, "cannot read the backup directory").map_err(|e| match e.kind() {
        Kind::NotFound => e.remedy("name another, or mount the file system that it is on"),
        _ => e,
    })
}

/// Something that has to exist; `what` begins the message if it does not.
///
/// # Errors
/// As [`backups`].
pub(crate) fn resolved(path: &Path, what: &str) -> Result<PathBuf> {
    super::resolve(path).map_err(|e| Error::io(e, what).at_path(path))
}

/// A folder that has to exist.
///
/// # Errors
/// As [`backups`]; `Usage` if it is something else.
pub(crate) fn existing_folder(path: &Path, what: &str) -> Result<PathBuf> {
    let real = resolved(path, &format!("cannot use {what}")).map_err(|e| match e.kind() {
        Kind::NotFound => e.remedy(format!("make it first: 'mkdir -p {}'", path_text(&path))),
        _ => e,
    })?;
    if !super::is_folder(&real) {
        return Err(Error::new(Kind::Usage, format!("{what} is not a directory")).at_path(path));
    }
    Ok(real)
}

/// A file or folder that may have to be made, as folders above it may: what is there is resolved.
///
/// # Errors
/// What the operating system said, but for `NotFound`.
pub(crate) fn to_make(path: &Path) -> Result<PathBuf> {
    super::resolve_to_make(path).map_err(|e| Error::io(e, "cannot use this path").at_path(path))
}

/// Opens a log file for appending, now, so that a wrong name is told to the user.
///
/// # Errors
/// It cannot be opened, or is neither a plain file nor a device.
pub(crate) fn log_file(path: &Path) -> Result<File> {
    let failed = |e| Error::io(e, "cannot open the log file").at_path(path);
    let real = super::resolve_target(path).map_err(failed)?;
    let (folder, name) = Folder::of(&real).map_err(failed)?;
    folder.append(name).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_is_resolved_and_the_rest_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().canonicalize().unwrap();
        std::fs::create_dir(top.join("real")).unwrap();
        std::os::unix::fs::symlink("real", top.join("link")).unwrap();
        std::os::unix::fs::symlink("nowhere", top.join("dangling")).unwrap();
        assert_eq!(to_make(&top.join("link/a/b")).unwrap(), top.join("real/a/b"));
        assert_eq!(to_make(&top.join("link")).unwrap(), top.join("real"));
        // The gate refuses this one later: it is a link.
        assert_eq!(to_make(&top.join("dangling/x")).unwrap(), top.join("dangling/x"));
        assert_eq!(backups(&top.join("link")).unwrap(), top.join("real"));
        assert_eq!(backups(&top.join("none")).unwrap_err().kind(), Kind::NotFound);
        let e = existing_folder(Path::new("/dev/null"), "the mount point").unwrap_err();
        assert_eq!(e.kind(), Kind::Usage);
    }

    #[test]
    fn a_log_goes_to_a_file_and_not_through_a_pipe() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("log", dir.path().join("link")).unwrap();
        log_file(&dir.path().join("log")).unwrap();
        log_file(&dir.path().join("link")).unwrap();
        log_file(Path::new("/dev/null")).unwrap();
        assert!(log_file(dir.path()).is_err());
    }
}
