//! Where an attachment keeps what is its own: in the state folder a journal and a lock, and a private folder with
//! the mount of its backups, device nodes that `/dev` does not have, and settings for LVM.

use std::ffi::OsStr;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::backup::state::lock::{state_folder, state_folder_if_there};
use crate::error::{Error, Kind, Result};
use crate::folder::{self, EntryKind, Folder, Lock, NewNode};

/// What the names of all of it begin with.
const PREFIX: &str = "attach-";
/// How the name of the journal ends.
const JOURNAL: &str = ".journal";
/// How that of the lock ends.
const LOCK: &str = ".lock";
/// Hexadecimal digits of an id.
const DIGITS: usize = 8;
/// How deep the private folder is.
const DEPTH: usize = 3;

/// The folders of one attachment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    /// Its id: hexadecimal digits.
    pub id: String,
    state: PathBuf,
}

impl Place {
    /// A new one below `state`, locked.
    ///
    /// # Errors
    /// The state folder cannot be made, or others may write to it.
    pub(super) fn new(state: &Path) -> Result<(Self, Lock)> {
        let folder = state_folder(state)?;
        let mut bytes = [0; DIGITS / 2];
        let failed = |e| Error::io(e, "cannot choose an id").at_path(state);
        folder::random(&mut bytes).map_err(failed)?;
        let id = bytes.iter().map(|b| format!("{b:02x}")).collect();
        let place = Place { id, state: folder.path().to_path_buf() };
        if folder.has(place.journal_name()) {
            return Err(Error::new(Kind::Busy, "this id is taken").at_path(place.private()));
        }
        let lock = place.lock()?;
        Ok((place, lock))
    }

    /// All that have a journal below `state`, by id.
    ///
    /// # Errors
    /// The state folder cannot be read, or others may write to it.
    pub(super) fn all(state: &Path) -> Result<Vec<Self>> {
        let Some(folder) = state_folder_if_there(state)? else { return Ok(Vec::new()) };
        let entries = folder.entries();
        let entries =
            entries.map_err(|e| Error::io(e, "cannot read the state folder").at_path(state))?;
        let id = |name: &OsStr| {
            parts(name.to_str()?).filter(|(_, end)| *end == JOURNAL).map(|(id, _)| id.to_string())
        };
        let mut ids: Vec<String> = entries.iter().filter_map(|e| id(&e.name)).collect();
        ids.sort();
        let state = folder.path().to_path_buf();
        Ok(ids.into_iter().map(|id| Place { id, state: state.clone() }).collect())
    }

    /// Removes the files of those that were killed before they did anything: locks without journals, and journals that
    /// never got their name. What cannot be removed is tried again the next time.
    ///
    /// # Errors
    /// As [`Place::all`].
    pub(super) fn sweep(state: &Path) -> Result<()> {
        let Some(folder) = state_folder_if_there(state)? else { return Ok(()) };
        for entry in folder.entries().unwrap_or_default() {
            let Some((id, end)) = entry.name.to_str().and_then(parts) else { continue };
            let place = Place { id: id.to_string(), state: folder.path().to_path_buf() };
            if end == JOURNAL || folder.has(place.journal_name()) {
                continue;
            }
            // Locked until it is gone, so that it is nobody else's.
            if let Ok(_lock) = place.lock()
                && !folder.has(place.journal_name())
            {
                let _ = folder.remove_if_there(format!("{}.new", place.journal_name()));
                let _ = folder.remove_if_there(format!("{PREFIX}{id}{LOCK}"));
            }
        }
        Ok(())
    }

    /// The state folder.
    ///
    /// # Errors
    /// As [`state_folder`].
    pub(super) fn state(&self) -> Result<Folder> {
        state_folder(&self.state)
    }

    /// The name of the journal.
    pub(super) fn journal_name(&self) -> String {
        format!("{PREFIX}{}{JOURNAL}", self.id)
    }

    /// The private folder. Its name is a pattern of the udev rule, and the id that of a loop device.
    pub(super) fn private(&self) -> PathBuf {
        self.state.join(self.name())
    }

    /// The name of the private folder, which only this attachment has.
    pub(super) fn name(&self) -> String {
        format!("{PREFIX}{}", self.id)
    }

    /// Where it has nodes of devices that `/dev` does not have.
    pub(super) fn nodes(&self) -> PathBuf {
        self.private().join("dev")
    }

    /// Where its backups are mounted.
    pub(super) fn mount(&self) -> PathBuf {
        self.private().join("mnt")
    }

    /// Takes its lock.
    ///
    /// # Errors
    /// `Busy` if somebody is attaching or detaching it.
    pub(super) fn lock(&self) -> Result<Lock> {
        let name = format!("{PREFIX}{}{LOCK}", self.id);
        let state = self.state()?;
        let failed = |e| Error::io(e, "cannot take the lock").at_path(state.join(&name));
        state.lock(&name).map_err(failed)?.ok_or_else(|| {
            let what = format!("{} is being attached or detached", self.id);
            Error::new(Kind::Busy, what)
                .remedy("'fleecefs attach --list' shows it; try again later")
        })
    }

    /// Whether somebody is attaching or detaching it.
    pub(super) fn is_locked(&self) -> bool {
        self.lock().is_err_and(|e| e.kind() == Kind::Busy)
    }

    /// Makes the private folder, with one to mount at.
    ///
    /// # Errors
    /// What the operating system said.
    pub(super) fn make(&self) -> Result<()> {
        let make = || folder::make_folders(&self.mount()).map(drop);
        make().map_err(|e| Error::io(e, "cannot make a private folder").at_path(self.private()))
    }

    /// A node for the block device of these numbers, which `/dev` does not have.
    ///
    /// # Errors
    /// What the operating system said: a container may make none.
    pub(super) fn node(&self, name: &str, (major, minor): (u32, u32)) -> Result<PathBuf> {
        let make = || {
            let dev = Folder::open(&self.private())?.make_folder("dev")?;
            // One that is there has other numbers: of a partition that was made anew.
            dev.remove_if_there(name)?;
            let node = dev.new_node(name, NewNode::BlockDevice(major, minor));
            node.map(|_| dev.join(name))
        };
        make().map_err(|e| {
            Error::io(e, format!("cannot make a device node for {name}"))
                .at_path(self.private())
                .remedy("there is none in /dev: let the container make nodes, or give it a /dev")
        })
    }

    /// Removes the private folder, in which nothing may be mounted any more, the journal, and the lock's file.
    ///
    /// # Errors
    /// What the operating system said.
    pub(super) fn remove(&self) -> Result<()> {
        let failed = |e| Error::io(e, "cannot remove it").at_path(self.private());
        let state = self.state()?;
        let private = folder::absent_is_none(state.folder(self.name())).map_err(failed)?;
        if let Some(private) = private {
            empty(&private, DEPTH).map_err(failed)?;
            state.remove_folder(self.name()).map_err(failed)?;
        }
        state.remove_if_there(self.journal_name()).map_err(failed)?;
        state.remove_if_there(format!("{PREFIX}{}{LOCK}", self.id)).map_err(failed)?;
        state.sync().map_err(failed)
    }
}

/// The id in the name of a file of ours, and how that ends.
fn parts(name: &str) -> Option<(&str, &str)> {
    let rest = name.strip_prefix(PREFIX)?;
    let (id, end) = rest.split_at_checked(DIGITS)?;
    let known = [JOURNAL, ".journal.new", LOCK].contains(&end);
    (is_id(id) && known).then_some((id, end))
}

/// Whether this can be an id.
fn is_id(text: &str) -> bool {
    text.len() == DIGITS && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// Removes all that is in a folder, and stays on its file system.
fn empty(folder: &Folder, depth: usize) -> io::Result<()> {
    let device = folder.metadata()?.dev();
    for entry in folder.entries()? {
        if entry.kind != EntryKind::Folder {
            folder.remove_if_there(&entry.name)?;
            continue;
        }
        let below = folder.folder(&entry.name)?;
        if depth == 0 || below.metadata()?.dev() != device {
            return Err(io::Error::from_raw_os_error(libc::EBUSY));
        }
        empty(&below, depth - 1)?;
        folder.remove_folder(&entry.name)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attachment_is_known_by_its_journal_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().canonicalize().unwrap();
        let (place, lock) = Place::new(&state).unwrap();
        assert!(is_id(&place.id) && place.is_locked());
        assert_eq!(Place::all(&state).unwrap(), []);
        place.make().unwrap();
        std::fs::create_dir(place.private().join("below")).unwrap();
        std::fs::write(place.private().join("below/file"), "x").unwrap();
        std::os::unix::fs::symlink("/etc", place.private().join("link")).unwrap();
        std::fs::write(state.join(place.journal_name()), "").unwrap();
        for other in ["attach-0.journal", "attach-0123456G.journal", "attach-01234567.lock"] {
            std::fs::write(state.join(other), "").unwrap();
        }
        assert_eq!(Place::all(&state).unwrap(), std::slice::from_ref(&place));
        drop(lock);
        assert!(!place.is_locked());
        place.remove().unwrap();
        let left = || std::fs::read_dir(&state).unwrap().count();
        assert_eq!((left(), Path::new("/etc/passwd").exists()), (3, true));
        place.remove().unwrap();
        // A lock without a journal, but for one that is held.
        let (_other, _lock) = Place::new(&state).unwrap();
        Place::sweep(&state).unwrap();
        assert_eq!(left(), 3);
    }
}
