//! Which backup directories a VM was backed up to: where one of them is gone, its file system is not
//! mounted, and a backup would fill the one below.
//!
//! `vm-KEY.targets` in the state folder has a JSON list of path and id (the text of the file `uuid`),
//! oldest first. Several may share a path: disks that are changed every week.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::folders::stored_id;
use super::lock::{state_folder, state_folder_if_there, vm_key};
use crate::error::{Error, Kind, Result};
use crate::folder;
use crate::qmp::Address;
use crate::text::to_text;

/// A path and an id take a few hundred bytes.
const LARGEST: u64 = 1 << 20;
/// More than that are not remembered: the oldest go. Some name a new directory each day.
const MOST: usize = 1000;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Known {
    path: String,
    id: String,
}

/// The backup directories of a VM.
#[derive(Debug)]
pub struct Targets {
    state: PathBuf,
    name: String,
    known: Vec<Known>,
}

impl Targets {
    /// Those of the VM behind `vm`, as the folder `state` has them.
    ///
    /// # Errors
    /// The list cannot be read, or is none.
    pub fn read(state: &Path, vm: &Address) -> Result<Self> {
        let name = format!("{}.targets", vm_key(vm));
        let mut known = Vec::new();
        if let Some(folder) = state_folder_if_there(state)? {
            let path = folder.join(&name);
            let failed = |e| Error::io(e, "cannot read the list of this VM's targets");
            let bytes =
                folder.read_if_there(&name, LARGEST).map_err(|e| failed(e).at_path(&path))?;
            if let Some(bytes) = bytes {
                known = serde_json::from_slice(&bytes).map_err(|e| {
                    Error::new(Kind::Corrupt, "this is no list of a VM's targets")
                        .with_source(e)
                        .at_path(path)
                        .remedy(
                            "remove it: it is made anew, but not mounted targets go unnoticed once",
                        )
                })?;
            }
        }
        Ok(Targets { state: state.to_path_buf(), name, known })
    }

    /// Whether `target` can be used: one that was used before has to be there still, and what a new
    /// one is to be made in.
    ///
    /// # Errors
    /// `NotFound` if not.
    pub fn check(&self, target: &Path) -> Result<()> {
        let path = to_text(target.as_os_str());
        let known = self.known.iter().rfind(|k| k.path == path);
        match known {
            Some(known) if stored_id(target)?.is_none() => {
                let what = format!(
                    "the backup directory that was here is gone: there is no file 'uuid' with its id {}",
                    known.id
                );
                Err(Error::new(Kind::NotFound, what).at_path(target).remedy(
                    "is its file system mounted? To begin a new backup directory here, give --init",
                ))
            }
            _ => check_parent(target),
        }
    }

    /// Remembers `target`, whose id has been written.
    ///
    /// # Errors
    /// What the operating system said.
    pub fn remember(&mut self, target: &Path) -> Result<()> {
        // A mere copy leaves no id.
        let Some(id) = stored_id(target)? else { return Ok(()) };
        let one = Known { path: to_text(target.as_os_str()), id };
        if self.known.contains(&one) {
            return Ok(());
        }
        self.known.push(one);
        let too_many = self.known.len().saturating_sub(MOST);
        self.known.drain(..too_many);
        self.write()
    }

    fn write(&self) -> Result<()> {
        let folder = state_folder(&self.state)?;
        let failed = |e| Error::io(e, "cannot write the file").at_path(folder.join(&self.name));
        let text = serde_json::to_vec(&self.known).map_err(|e| failed(e.into()))?;
        folder.write_whole(OsStr::new(&self.name), &text).map_err(failed)
    }
}

/// A new backup directory is made, but not what it is to be in: that would rather be a file system
/// that is not mounted, or a typing error.
fn check_parent(target: &Path) -> Result<()> {
    let parent = target.parent().unwrap_or(target);
    if folder::exists(target) || folder::exists(parent) {
        return Ok(());
    }
    Err(Error::new(Kind::NotFound, "the folder for the backup directory does not exist")
        .at_path(parent)
        .remedy("make it first, if it is neither mistyped nor a file system that is not mounted"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vm() -> Address {
        Address::Unix("/run/vm".into())
    }

    #[test]
    fn a_target_that_was_there_has_to_be_there() {
        let d = tempfile::tempdir().unwrap();
        let (state, disk) = (d.path().join("state"), d.path().join("disk"));
        let target = disk.join("target");
        let kind = |t: &Path| Targets::read(&state, &vm()).unwrap().check(t).map_err(|e| e.kind());
        assert_eq!(kind(&target), Err(Kind::NotFound), "no parent");
        std::fs::create_dir_all(&target).unwrap();
        assert_eq!((kind(&target), kind(&disk.join("new"))), (Ok(()), Ok(())));
        std::fs::write(target.join("uuid"), "01234567-89ab-4cde-8f01-23456789abcd").unwrap();
        Targets::read(&state, &vm()).unwrap().remember(&target).unwrap();
        assert_eq!(kind(&target), Ok(()));
        // Another disk, of which we know nothing, has an id: it is a backup directory.
        std::fs::write(target.join("uuid"), "11234567-89ab-4cde-8f01-23456789abcd").unwrap();
        assert_eq!(kind(&target), Ok(()));
        std::fs::remove_file(target.join("uuid")).unwrap();
        assert_eq!(kind(&target), Err(Kind::NotFound));
        std::fs::remove_dir(&target).unwrap();
        assert_eq!(kind(&target), Err(Kind::NotFound));
        let other = Targets::read(&state, &Address::Unix("/run/other".into())).unwrap();
        assert!(other.check(&target).is_ok());
    }

    #[test]
    fn the_oldest_go() {
        let d = tempfile::tempdir().unwrap();
        let mut targets = Targets::read(d.path(), &vm()).unwrap();
        let known = |n: usize| Known { path: format!("/t{n}"), id: "i".into() };
        targets.known = (0..MOST).map(known).collect();
        std::fs::write(d.path().join("uuid"), "01234567").unwrap();
        targets.remember(d.path()).unwrap();
        let read = Targets::read(d.path(), &vm()).unwrap();
        assert_eq!((read.known.len(), &read.known[0]), (MOST, &known(1)));
        std::fs::write(d.path().join(&read.name), "{}").unwrap();
        assert_eq!(Targets::read(d.path(), &vm()).unwrap_err().kind(), Kind::Corrupt);
    }
}
