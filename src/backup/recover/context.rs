//! What a recovery works on.

use std::path::Path;

use crate::folder;
use crate::qmp::Address;

/// What a recovery works on, and what it may do.
#[derive(Debug, Clone, Copy)]
pub struct RecoverContext<'a> {
    /// The state folder.
    pub state: &'a Path,
    /// The VM. Its lock is held.
    pub vm: &'a Address,
    /// What the recovery is for.
    pub cause: RecoverCause<'a>,
    /// The guest agent to thaw with, if the user says that it is not the one in the journal.
    pub agent: Option<&'a Address>,
}

/// What a recovery is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecoverCause<'a> {
    /// The end of the run itself, which holds the lock of its target.
    OwnEnd,
    /// A backup to this target is to begin: what earlier runs left there has to be concluded first; what is in
    /// a target that is not there now is left for later.
    Backup(&'a Path),
    /// The user asked for it.
    Command,
    /// The user asked for it, and gives up what cannot be reached.
    Forget,
}

impl RecoverCause<'_> {
    /// Whether a folder that is not there can wait: its file system may not be mounted.
    pub(super) fn may_wait(&self, dir: &Path) -> bool {
        let real = |p: &Path| folder::resolve(p).unwrap_or_else(|_| p.to_path_buf());
        match self {
            RecoverCause::OwnEnd => false,
            RecoverCause::Backup(t) => !dir.starts_with(t) && !real(dir).starts_with(real(t)),
            RecoverCause::Command | RecoverCause::Forget => true,
        }
    }
}
