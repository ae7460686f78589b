//! Commands whose runs are kept in the history.

use std::path::{Path, PathBuf};
use std::time::Instant;

use super::paths;
use super::state::StateArgs;
use crate::backup::target::reachable;
use crate::error::{Kind, Result};
use crate::history::{self, Entry};
use crate::text::to_text;

/// Which run it is, for the history: a command, its backup directory, and where the history is kept.
pub(super) struct Recorded<'a> {
    pub command: &'a str,
    pub dir: Option<&'a Path>,
    pub state: &'a StateArgs,
    /// Nothing is done, and nothing kept.
    pub dry_run: bool,
}

impl Recorded<'_> {
    /// Runs the command, which says what it does in the entry, and keeps that. A history that cannot be written is a
    /// warning: the run is no worse for it.
    ///
    /// # Errors
    /// As the command.
    pub(super) fn run(&self, act: impl FnOnce(&mut Entry) -> Result<()>) -> Result<()> {
        let began = Instant::now();
        let mut entry = Entry::begun(self.command, jiff::Timestamp::now().as_second());
        let result = act(&mut entry);
        if !self.dry_run {
            entry.end(began.elapsed(), result.as_ref().err());
            entry.directory = self.dir.map(|dir| to_text(real(dir).as_os_str()));
            self.keep(&entry);
        }
        result
    }

    fn keep(&self, entry: &Entry) {
        let what = "this run was not recorded in the history";
        let state = match self.state.dir() {
            Ok(state) => state,
            // A user without a state folder has no history, which is the same every time.
            Err(e) => return log::info!("{what}: {}", e.report()),
        };
        match history::append(&state, entry) {
            Err(e) if e.kind() == Kind::Permission => log::info!("{what}: {}", e.report()),
            Err(e) => log::warn!("{what}: {}", e.report()),
            Ok(()) => {}
        }
    }
}

/// The directory without links, as far as its storage answers.
pub(super) fn real(dir: &Path) -> PathBuf {
    let real = reachable::answers(dir).then(|| paths::to_make(dir).ok()).flatten();
    real.or_else(|| std::path::absolute(dir).ok()).unwrap_or_else(|| dir.to_path_buf())
}
