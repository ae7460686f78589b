//! What readers find odd: each once, and not without end.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{LazyLock, Mutex, PoisonError};

use super::source::Source;
use crate::error::{Error, Finding, Kind, Result, Severity};

/// Findings that are kept.
const MAX: usize = 256;

/// Findings that are logged by one process; more are not worth a log's space.
const MOST_LOGGED: usize = 4096;

/// What was logged, by hash.
static LOGGED: LazyLock<Mutex<HashSet<u64>>> = LazyLock::new(Mutex::default);

/// Logs a finding, unless that was done before: a mount opens the same file system again and again.
pub fn log_once(finding: &Finding) {
    let mut hasher = DefaultHasher::new();
    finding.hash(&mut hasher);
    let mut logged = LOGGED.lock().unwrap_or_else(PoisonError::into_inner);
    let is_new = logged.len() < MOST_LOGGED && logged.insert(hasher.finish());
    drop(logged);
    match finding.severity {
        _ if !is_new => {}
        Severity::Note => log::info!("{finding}"),
        Severity::Warning | Severity::Error => log::warn!("{finding}"),
    }
}

/// A bounded list of findings that many threads add to.
#[derive(Debug, Default)]
pub struct Findings(Mutex<Vec<Finding>>);

impl Findings {
    /// Adds one, unless it is there.
    pub fn note(&self, finding: Finding) {
        let mut list = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if list.len() < MAX && !list.contains(&finding) {
            log_once(&finding);
            list.push(finding);
        }
    }

    /// That the bytes are right, but somebody should know: a journal that was not replayed.
    pub fn warn(&self, source: &Source, kind: Kind, message: &str, remedy: Option<&str>) {
        let text = format!("{}: {message}", source.label());
        let finding = Finding::warning(kind, source.path(), text);
        self.note(Finding { remedy: remedy.map(str::to_string), ..finding });
    }

    /// That something the file system keeps twice is damaged, and its copy at byte `at` is used instead.
    pub(super) fn copy_used(&self, source: &Source, why: &str, at: u64, remedy: &str) {
        let what = format!("{why}: its copy at {at:#x} is used");
        self.warn(source, Kind::Corrupt, &what, Some(remedy));
    }

    /// That all is served, and that something about it is worth knowing.
    pub(super) fn tell(&self, source: &Source, kind: Kind, message: &str) {
        let text = format!("{}: {message}", source.label());
        let finding = Finding::warning(kind, source.path(), text);
        self.note(Finding { severity: Severity::Note, ..finding });
    }

    /// That something cannot be served; hands the error on, for `map_err`.
    pub fn failed(&self, source: &Source, error: Error) -> Error {
        if error.kind().is_lasting() {
            self.note(Finding::from_error(&error, source.path()));
        }
        error
    }

    /// As [`Findings::failed`], of what reading gave.
    pub(super) fn noted<T>(&self, source: &Source, result: Result<T>) -> Result<T> {
        result.map_err(|e| self.failed(source, e))
    }

    /// What was found so far, the worst first.
    pub fn list(&self) -> Vec<Finding> {
        let mut list = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        list.sort_by_key(|f| std::cmp::Reverse(f.severity));
        list
    }

    /// Whether something cannot be served.
    pub fn has_errors(&self) -> bool {
        self.list().iter().any(|f| f.severity == Severity::Error)
    }
}
