//! The folder for journals and locks: `--state-dir`.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use clap::Args;

use super::paths;
use crate::backup::lock;
use crate::error::Result;
use crate::folder;

/// Where locks and journals are.
#[derive(Debug, Args)]
pub(super) struct StateArgs {
    /// Where journals and locks are [default: /var/lib/fleecefs, or the user's state folder]
    #[arg(long, value_name = "DIR", env = "FLEECEFS_STATE_DIR")]
    pub state_dir: Option<PathBuf>,
}

impl StateArgs {
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
        let path = self.state_dir.clone().map_or_else(lock::default_state_dir, Ok)?;
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
