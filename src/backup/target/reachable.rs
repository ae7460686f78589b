//! Targets that cannot be reached: one that is not mounted, and one whose server hangs. What is asked of the
//! latter is asked in a thread of its own, since nothing ends such a question.

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

use crate::error::{Error, Kind, Result};
use crate::folder::{self, Folder};
use crate::qmp::timeout::answer_timeout;

/// What did not answer: it and all in it is asked no more.
static SILENT: OnceLock<Mutex<HashSet<PathBuf>>> = OnceLock::new();

/// Fails if the file system of `dir` does not answer in time, whatever it would say.
///
/// # Errors
/// `Io`.
pub(crate) fn check_answers(dir: &Path) -> Result<()> {
    check_answers_within(dir, answer_timeout())
}

/// As [`check_answers`], for who has less patience.
///
/// # Errors
/// `Io`.
pub(crate) fn check_answers_within(dir: &Path, patience: Duration) -> Result<()> {
    let silent = SILENT.get_or_init(Mutex::default);
    let known = || silent.lock().unwrap_or_else(|e| e.into_inner());
    let is_silent = |path: &Path| {
        let asked = folder::ask_within(path, patience);
        matches!(asked, Err(e) if e.kind() == io::ErrorKind::TimedOut)
    };
    if !known().iter().any(|k| dir.starts_with(k)) {
        // Folders of disks are beside one another on one file system.
        let both = dir.parent().into_iter().chain([dir]);
        let Some(found) = both.into_iter().find(|p| is_silent(p)) else { return Ok(()) };
        known().insert(found.to_path_buf());
    }
    let what = format!("its file system does not answer within {} s", patience.as_secs());
    Err(Error::new(Kind::Io, what)
        .at_path(dir)
        .remedy("check its server or unmount it (umount -l), then try again"))
}

/// Whether [`check_answers`] does not fail.
pub(crate) fn answers(dir: &Path) -> bool {
    check_answers(dir).inspect_err(|e| log::info!("{}", e.report())).is_ok()
}

/// The folder that a journal names; links on the way to it are followed as on the command line.
/// `None` if it is not there.
///
/// # Errors
/// As [`check_answers`]; what the operating system said.
pub(crate) fn real_folder(dir: &Path) -> Result<Option<Folder>> {
    check_answers(dir)?;
    let failed = |e| Error::io(e, "cannot open the folder").at_path(dir);
    let real = folder::absent_is_none(folder::resolve(dir)).map_err(failed)?;
    real.map(|r| Folder::open(&r)).transpose().map_err(failed)
}
