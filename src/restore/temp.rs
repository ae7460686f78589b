//! A target that gets its name when it is complete and on disk: [`crate::folder::Temp`] with what a
//! restore adds. Until then it has no name at all where the file system can do without, and else one
//! that nobody can guess. What killed runs left in the folder is removed by the next one.

use std::ffi::OsString;
use std::fs::{File, Metadata, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::target_error;
use crate::error::{Error, Kind, Result};
use crate::folder::{self, Folder, Replace, Swept, Undeletable, sweep_counted};
use crate::storage::SourceFile;
use crate::text::path_text;

/// Ends the names of version 0.1.0's temporary files.
pub(crate) const OLD_SUFFIX: &str = ".fleecefs-partial";

/// The file that is being made.
#[derive(Debug)]
pub(crate) struct Temp {
    file: folder::Temp,
    name: OsString,
    path: PathBuf,
    force: bool,
    /// What killed runs had left in the folder; it is gone.
    pub leftover: Swept,
}

impl Temp {
    /// Makes the temporary file of `target`. If that is a link, the file it leads to is meant.
    ///
    /// # Errors
    /// `Exists` if there is a target and `force` is not set; what the operating system said.
    pub(crate) fn create(target: &Path, force: bool) -> Result<Self> {
        let real = folder::resolve_target(target)
            .map_err(|e| target_error(e, "cannot find the target's folder", target))?;
        let Some(name) = real.file_name().filter(|_| target.file_name().is_some()) else {
            return Err(Error::new(Kind::Usage, "the target needs a file name").at_path(target));
        };
        let (folder, _) = Folder::of(&real)
            .map_err(|e| target_error(e, "cannot open the target's folder", &real))?;
        check_new(&folder, name, force)?;
        let leftover = sweep_counted(&folder, &[OLD_SUFFIX]).unwrap_or_else(|e| {
            log::debug!("{}: cannot look for leftovers: {e}", path_text(folder.path()));
            Swept::default()
        });
        let file = folder.temp().map_err(|e| failed_to_make(e, &folder))?;
        Ok(Temp { file, name: name.to_os_string(), path: real.clone(), force, leftover })
    }

    /// One in `folder` that has a name from the beginning, `path`, and gets another when it is
    /// published.
    ///
    /// # Errors
    /// What the operating system said.
    pub(crate) fn create_named(folder: &Path) -> Result<Self> {
        let failed = |e| target_error(e, "cannot make a temporary file", folder);
        let file = Folder::open(folder).and_then(folder::Temp::create_named).map_err(failed)?;
        let name = file.name().unwrap_or_default().to_os_string();
        let path = file.folder().join(&name);
        Ok(Temp { file, name, path, force: false, leftover: Swept::default() })
    }

    /// One in a folder that is held, for [`Temp::publish_in`].
    ///
    /// # Errors
    /// What the operating system said.
    pub(crate) fn create_in(folder: &Folder) -> Result<Self> {
        let file = folder.temp().map_err(|e| failed_to_make(e, folder))?;
        let path = folder.path().to_path_buf();
        Ok(Temp { file, name: OsString::new(), path, force: false, leftover: Swept::default() })
    }

    /// The open file.
    pub(crate) fn file(&self) -> &File {
        self.file.file()
    }

    /// What to call it: its path if it has a name ([`Temp::create_named`]), else its target's.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// What has been written so far, for our own readers.
    ///
    /// # Errors
    /// What the operating system said.
    pub(crate) fn source(&self) -> Result<SourceFile> {
        let file = self.file().try_clone();
        let file = file.map_err(|e| target_error(e, "cannot read the file", &self.path))?;
        SourceFile::of_open(file, self.path.clone())
    }

    /// The folder that it is in.
    pub(crate) fn folder(&self) -> &Folder {
        self.file.folder()
    }

    /// Writes everything out and gives the file its name.
    ///
    /// # Errors
    /// What the operating system said; `Exists` if a target has appeared meanwhile. The temporary
    /// file is gone then.
    pub(crate) fn publish(self) -> Result<()> {
        let replace = if self.force { Replace::Yes } else { Replace::No };
        if self.force {
            // A VM may have been started meanwhile.
            check_unused(self.file.folder(), &self.name)?;
            self.take_over_owner();
        }
        let failed = |e| target_error(e, "cannot give the file its name", &self.path);
        self.file.publish(&self.name, replace).map_err(failed)
    }

    /// The same under the name `name` in `to`, a folder on the same file system. Mode and owner are
    /// left as they are.
    ///
    /// # Errors
    /// See [`Temp::publish`]; `Exists` if there is such a file and it may not be replaced.
    pub(crate) fn publish_in(
        self,
        to: &Folder,
        name: &std::ffi::OsStr,
        replace: Replace,
    ) -> Result<()> {
        let failed = |e| target_error(e, "cannot give the file its name", &to.join(name));
        self.file.publish_in(to, name, replace).map_err(failed)
    }

    /// Mode and owner of the plain file that is being replaced, as far as we may.
    fn take_over_owner(&self) {
        let old = self.file.folder().look(&self.name);
        let Some(old) = old.ok().filter(Metadata::is_file) else { return };
        if !self.may_take_over(&old) {
            log::warn!(
                "{}: the file that is replaced belongs to user {}, who may have put it there: the \
                 new one stays yours alone",
                path_text(&self.path),
                old.uid()
            );
            return;
        }
        if let Err(e) = give(self.file(), &old) {
            log::warn!("{}: cannot keep mode and owner: {e}", path_text(&self.path));
        }
    }
}

impl Temp {
    /// Whether the owner of the file that is replaced may have what takes its place: not if he could
    /// put that file there himself.
    fn may_take_over(&self, old: &Metadata) -> bool {
        let own = rustix::process::geteuid().as_raw();
        let others = folder::foreign_owner(self.file.folder());
        old.uid() == 0 || old.uid() == own || matches!(others, Ok(None))
    }
}

/// Gives an open file the owner and the mode of another, but no setuid, setgid or sticky bit.
///
/// # Errors
/// What the operating system said; only root may give files away.
pub(crate) fn give(file: &File, like: &Metadata) -> std::io::Result<()> {
    let owned = std::os::unix::fs::fchown(file, Some(like.uid()), Some(like.gid()));
    // The mode last: it may let others read, and changing the owner clears some of its bits.
    file.set_permissions(Permissions::from_mode(like.mode() & 0o777))?;
    owned
}

/// Gives a file that is made of several others their common owner, and a mode that lets nobody read
/// it who may not read all of them: what one of them allows, another's owner has not. Of files of
/// different owners it stays the caller's own; so it does where a file of somebody else's has a second
/// name, which may be a file elsewhere that is not his to read.
///
/// # Errors
/// As [`give`].
pub(crate) fn give_common(file: &File, parts: &[Metadata]) -> std::io::Result<()> {
    let Some(first) = parts.first() else { return Ok(()) };
    let own = rustix::process::geteuid().as_raw();
    let alike = |m: &Metadata| (m.uid(), m.gid()) == (first.uid(), first.gid());
    let single = |m: &Metadata| m.uid() == own || m.nlink() == 1;
    if !parts.iter().all(|m| alike(m) && single(m)) {
        return Ok(());
    }
    let mode = parts.iter().fold(0o777, |mode, m| mode & m.mode());
    let owned = std::os::unix::fs::fchown(file, Some(first.uid()), Some(first.gid()));
    file.set_permissions(Permissions::from_mode(mode))?;
    owned
}

/// Fails if the file `name` cannot be removed or replaced, whoever tries: before the work that would end
/// with that, and before a journal that nobody could finish.
///
/// # Errors
/// `Permission`, or `Busy` if something is mounted there; what the operating system said.
pub(crate) fn check_removable(folder: &Folder, name: &std::ffi::OsStr) -> Result<()> {
    let path = folder.join(name);
    let fixed = folder.fixed(name).map_err(|e| target_error(e, "cannot check it", &path))?;
    let (kind, what, remedy) = match fixed {
        None => return Ok(()),
        Some(Undeletable::File) => (
            Kind::Permission,
            "it is immutable or append-only, and cannot be removed or replaced",
            "chattr -i -a if that is intended",
        ),
        Some(Undeletable::Folder) => (
            Kind::Permission,
            "its folder is immutable or append-only: nothing in it can be removed or replaced",
            "chattr -i -a on the folder if that is intended",
        ),
        Some(Undeletable::Mount) => (
            Kind::Busy,
            "something is mounted there: it cannot be removed or replaced",
            "unmount it first",
        ),
    };
    Err(Error::new(kind, what).at_path(path).remedy(remedy))
}

fn failed_to_make(e: std::io::Error, folder: &Folder) -> Error {
    target_error(e, "cannot make a temporary file", folder.path())
}

/// Fails if `name` must not be overwritten.
fn check_new(folder: &Folder, name: &std::ffi::OsStr, force: bool) -> Result<()> {
    let path = folder.join(name);
    let meta = folder::absent_is_none(folder.look(name))
        .map_err(|e| target_error(e, "cannot check the target", &path))?;
    let Some(meta) = meta else { return Ok(()) };
    if !meta.is_file() {
        let remedy = match meta.is_dir() {
            true => "this is a folder: name a file in it",
            false => "name a new file",
        };
        return Err(Error::new(Kind::Exists, "the target exists and is not a plain file")
            .at_path(path)
            .remedy(remedy));
    }
    if !force {
        return Err(Error::new(Kind::Exists, "the target exists already")
            .at_path(path)
            .remedy("choose another name, or replace it with --force"));
    }
    check_unused(folder, name)?;
    check_removable(folder, name)
}

/// Fails if somebody works with the file that is to be replaced: a VM would go on with one that has no
/// name any more, and all that it writes would be lost.
fn check_unused(folder: &Folder, name: &std::ffi::OsStr) -> Result<()> {
    match folder.open_file(name) {
        Ok(file) if folder::is_in_use(&file) => Err(Error::new(
            Kind::Busy,
            "the target is in use by another process, such as a running VM",
        )
        .at_path(folder.join(name))
        .remedy("shut the VM off first, or restore to another name")),
        // Whether it may be replaced does not depend on whether it can be read.
        _ => Ok(()),
    }
}

/// The folder that `path` is in.
pub(crate) fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn names(dir: &Path) -> Vec<OsString> {
        std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name()).collect()
    }

    #[test]
    fn a_target_appears_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("disk.raw");
        let temp = Temp::create(&target, false).unwrap();
        temp.file().write_all(b"hello").unwrap();
        assert!(!target.exists());
        temp.publish().unwrap();
        assert_eq!(std::fs::read(&target).unwrap(), b"hello");
        assert_eq!(std::fs::metadata(&target).unwrap().mode() & 0o777, 0o600);
        assert_eq!(Temp::create(&target, false).unwrap_err().kind(), Kind::Exists);
        drop(Temp::create(&target, true).unwrap());
        assert_eq!(names(dir.path()), ["disk.raw"]);
    }

    #[test]
    fn what_a_killed_run_left_goes_and_is_never_used_again() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("x".repeat(250));
        std::fs::write(dir.path().join(".y.fleecefs-partial"), [1; 1000]).unwrap();
        std::fs::write(dir.path().join(".fleecefs-tmp-0123"), [1; 24]).unwrap();
        let temp = Temp::create(&target, false).unwrap();
        assert_eq!(temp.leftover, Swept { files: 2, bytes: 1024 });
        assert_eq!(temp.file().metadata().unwrap().len(), 0);
        temp.publish().unwrap();
        assert_eq!(names(dir.path()), [target.file_name().unwrap()]);
    }

    #[test]
    fn a_target_that_appears_meanwhile_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("disk.raw");
        let (first, second) =
            (Temp::create(&target, false).unwrap(), Temp::create(&target, false).unwrap());
        first.file().write_all(b"first").unwrap();
        first.publish().unwrap();
        assert_eq!(second.publish().unwrap_err().kind(), Kind::Exists);
        assert_eq!(std::fs::read(&target).unwrap(), b"first");
        assert_eq!(names(dir.path()), ["disk.raw"]);
    }

    #[test]
    fn a_replaced_file_leaves_its_mode_but_no_setuid_bit() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("disk.raw");
        std::fs::write(&target, b"old").unwrap();
        std::fs::set_permissions(&target, Permissions::from_mode(0o6755)).unwrap();
        Temp::create(&target, true).unwrap().publish().unwrap();
        assert_eq!(std::fs::metadata(&target).unwrap().mode() & 0o7777, 0o755);
    }

    #[test]
    fn a_link_is_followed_to_its_file_and_stays() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::create_dir(at("real")).unwrap();
        std::fs::write(at("real/disk"), b"old").unwrap();
        std::os::unix::fs::symlink("real/disk", at("link")).unwrap();
        assert_eq!(Temp::create(&at("link"), false).unwrap_err().kind(), Kind::Exists);
        let temp = Temp::create(&at("link"), true).unwrap();
        temp.file().write_all(b"new").unwrap();
        temp.publish().unwrap();
        assert_eq!(std::fs::read(at("real/disk")).unwrap(), b"new");
        assert!(at("link").is_symlink());
    }
}
