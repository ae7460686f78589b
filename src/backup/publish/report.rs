//! What came of a run, disk by disk.

use std::path::PathBuf;

use crate::backup::plan::planned::{Plan, is_unwanted};
use crate::error::{Error, Kind, Result};
use crate::layout::Level;
use crate::manifest::{Achieved, Consistency, Manifest, Skipped, VmConfig};
use crate::units::counted;

/// What came of a run.
#[derive(Debug)]
pub(crate) struct Report {
    /// The plan that was made, and in a dry run not executed.
    pub plan: Plan,
    /// What became of each disk.
    pub disks: Vec<DiskReport>,
    /// What the freeze point achieved.
    pub consistency: Consistency,
    /// What is still in QEMU, and why.
    pub undo: Option<Error>,
    /// The run's id.
    pub run: String,
    /// What QEMU said about the VM.
    pub vm: VmConfig,
}

/// What became of a disk.
#[derive(Debug)]
pub(crate) struct DiskReport {
    /// Its name.
    pub disk: String,
    /// Its level.
    pub level: Level,
    /// The image.
    pub path: PathBuf,
    /// Bytes that were to be copied, as far as was known before.
    pub dirty: u64,
    /// Bytes of the frozen view that the job went through, holes among them.
    pub read: u64,
    /// Its manifest, or why there is no point.
    pub result: Result<Manifest>,
}

impl Report {
    /// For a dry run: the error that the real one would end with, as far as can be known.
    pub(crate) fn forecast(&self, strict: bool) -> Result<()> {
        let (bad, good) = (self.plan.refused.len(), self.plan.disks.len());
        let Some((_, first)) = self.plan.refused.first() else {
            return match self.first_skipped().filter(|_| strict) {
                Some(s) => {
                    let text = format!("{} would be skipped: {}", s.disk, s.reason);
                    Err(Error::new(Kind::Skipped, text))
                }
                None => Ok(()),
            };
        };
        let kind = if good > 0 { Kind::Partial } else { first.kind() };
        let all = counted(bad.saturating_add(good) as u64, "disk");
        let text = format!("backup of {bad} of {all} would fail");
        Err(Error::new(kind, text))
    }

    /// The first disk that is skipped without the user's wish.
    fn first_skipped(&self) -> Option<&Skipped> {
        self.plan.skipped.iter().find(|s| !is_unwanted(s))
    }

    /// The error to end with: that something could not be undone; `Partial` if some disks have a point
    /// and others not, the first error if none has. With `strict` `Skipped` if a disk was omitted, or
    /// if the guest was to be frozen (`quiesce`) and was not. Where the user was `logged` why a disk has none
    /// when it failed, that is not said again.
    pub(crate) fn verdict(&self, strict: bool, quiesce: bool, logged: bool) -> Result<()> {
        if let Some(e) = &self.undo {
            return Err(Error::new(e.kind(), e.report()));
        }
        let refused = self.plan.refused.iter().map(|(d, e)| (d.as_str(), e));
        let failed =
            self.disks.iter().filter_map(|d| Some((d.disk.as_str(), d.result.as_ref().err()?)));
        let bad: Vec<_> = refused.chain(failed).collect();
        let good = self.disks.iter().filter(|d| d.result.is_ok()).count();
        if let Some((disk, e)) = bad.first() {
            let kind = if good > 0 { Kind::Partial } else { e.kind() };
            let all = bad.len().saturating_add(good);
            let names: Vec<&str> = bad.iter().map(|(d, _)| *d).collect();
            let some =
                if good > 0 { format!(" ({good} of {all} succeeded)") } else { String::new() };
            let text = format!("backup of {} failed{some}", names.join(", "));
            let why = match (logged, bad.len()) {
                (true, _) => String::new(),
                (false, 1) => format!(": {}", e.report()),
                (false, _) => format!("; {disk}: {}", e.report()),
            };
            return Err(Error::new(kind, text + &why));
        }
        match self.first_skipped() {
            Some(s) if strict => {
                Err(Error::new(Kind::Skipped, format!("{} was skipped: {}", s.disk, s.reason)))
            }
            None if strict && quiesce && self.consistency.achieved == Achieved::Crash => {
                let text = format!("crash-consistent only: {}", self.consistency.reason);
                Err(Error::new(Kind::Skipped, text).remedy(
                    "the points were made and can be \
                                                            restored",
                ))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strict_wants_the_freeze_that_was_asked_for() {
        let report = |achieved| Report {
            plan: Plan { disks: vec![], skipped: vec![], refused: vec![], unknown: vec![] },
            disks: vec![],
            consistency: Consistency {
                achieved,
                reason: "not frozen: no agent".into(),
                ..Consistency::default()
            },
            undo: None,
            run: String::new(),
            vm: VmConfig::default(),
        };
        let crash = report(Achieved::Crash);
        let error = crash.verdict(true, true, true).unwrap_err();
        assert!(error.kind() == Kind::Skipped && error.message().contains("no agent"), "{error}");
        assert!(
            crash.verdict(false, true, true).is_ok() && crash.verdict(true, false, true).is_ok()
        );
        let broken = |logged| {
            let e = Error::new(Kind::Io, "it broke");
            let refused = vec![("vda".to_string(), e)];
            let plan = Plan { refused, ..report(Achieved::Crash).plan };
            Report { plan, ..report(Achieved::Crash) }
                .verdict(false, false, logged)
                .unwrap_err()
                .report()
        };
        assert!(broken(false).contains("it broke") && !broken(true).contains("it broke"));
        assert!(broken(true).contains("vda"));
        assert!(report(Achieved::FileSystem).verdict(true, true, true).is_ok());
    }
}
