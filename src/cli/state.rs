//! The folder for journals and locks: `--state-dir`.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use clap::Args;

use super::{paths, verbosity};
use crate::backup::state::lock;
use crate::error::{Error, Kind, Result};
use crate::folder;
use crate::privileges::Owner;

/// Where locks and journals are.
#[derive(Debug, Args)]
pub(super) struct StateArgs {
    /// Folder for journals, locks, the history and the results of 'verify' [default: /var/lib/fleecefs, or the user's state folder]
    #[arg(long, value_name = "FOLDER", env = "FLEECEFS_STATE_DIR")]
    state_dir: Option<PathBuf>,

    /// See [`Self::give_to`].
    #[arg(skip)]
    own: Option<PathBuf>,

    /// Whether the owner has none.
    #[arg(skip)]
    is_without: bool,
}

impl StateArgs {
    /// For `--as-owner`: makes a state folder of the owner's own beside root's, which he may not enter,
    /// and uses that: `/var/lib/fleecefs.as-1000`.
    ///
    /// # Errors
    /// It cannot be made; `Permission` if others may write where it is to be.
    pub(super) fn give_to(&mut self, owner: &Owner) -> Result<()> {
        let (above, own) = self.place_for(owner)?;
        let failed =
            |e| Error::io(e, "cannot make the owner's state folder").at_path(above.join(&own));
        let folder = folder::make_folders(&above).map_err(failed)?;
        folder::check_private(&above)?;
        folder.make_folder_of(&own, owner.uid).map_err(failed)?;
        self.own = Some(above.join(own));
        Ok(())
    }

    /// The folder above that of an owner, and its name.
    fn place_for(&self, owner: &Owner) -> Result<(PathBuf, OsString)> {
        let state = self.dir()?;
        let (Some(above), Some(name)) = (state.parent(), state.file_name()) else {
            return Err(verbosity::usage("the state folder needs a name"));
        };
        let mut own = name.to_os_string();
        own.push(format!(".as-{}", owner.uid));
        Ok((above.to_path_buf(), own))
    }

    /// As [`Self::give_to`], for commands that do without. Those that only `read` it make none.
    pub(super) fn give_if_possible(&mut self, owner: &Owner, read: bool) {
        let given = match read {
            true => self.place_for(owner).map(|(above, own)| self.own = Some(above.join(own))),
            false => self.give_to(owner),
        };
        if let Err(e) = given {
            log::info!("no state is kept for the owner: {}", e.report());
            self.is_without = true;
        }
    }

    /// Whether it is that of an owner.
    pub(super) fn is_owners(&self) -> bool {
        self.own.is_some()
    }

    /// What was given.
    pub(super) fn given(&self) -> Option<&Path> {
        self.state_dir.as_deref()
    }

    /// The folder, without links. What is in it decides what is deleted later, so it has to be the
    /// caller's own if it is there; where it has to be made, whoever makes it looks.
    ///
    /// # Errors
    /// `Permission` if others may change it.
    pub(super) fn dir(&self) -> Result<PathBuf> {
        if self.is_without {
            return Err(Error::new(Kind::NotFound, "the owner has no state folder"));
        }
        let given = self.own.as_ref().or(self.state_dir.as_ref()).cloned();
        let path = given.map_or_else(lock::default_state_dir, Ok)?;
        let path = paths::to_make(&path)?;
        if folder::exists(&path) {
            folder::check_private(&path)?;
        }
        Ok(path)
    }
}

/// The state folders beside `state` of the owners as whom `--as-owner` has worked.
pub(super) fn of_owners(state: &Path) -> Vec<PathBuf> {
    let (Some(above), Some(name)) = (state.parent(), state.file_name()) else { return Vec::new() };
    let mut prefix = name.to_os_string();
    prefix.push(".as-");
    let entries = folder::entries(above).unwrap_or_default().into_iter();
    let is = |n: &OsStr| n.as_bytes().starts_with(prefix.as_bytes());
    entries.filter(|e| is(&e.name)).map(|e| above.join(e.name)).collect()
}
