//! The end of a run, once QEMU has closed the images: they become points one by one, and each
//! point says which disks of its run have none.

use super::session::{Active, DiskState, Run};
use crate::backup::publish;
use crate::error::{Error, Kind, Result};
use crate::manifest;
use crate::manifest::Skipped;

impl Run<'_> {
    /// QEMU is gone, or a signal came. What is complete needs no QEMU to become a point; the rest
    /// is undone by `finish`.
    pub(in crate::backup) fn cut_short(
        &mut self,
        disks: &mut [Active],
        refused: &[Skipped],
        error: &Error,
    ) -> Result<()> {
        let again = || Error::new(error.kind(), error.report());
        for d in disks.iter().filter(|d| d.syncing()) {
            // Whoever opens it later would not be told what this sync may have been told.
            if let Err(e) = d.folder().and_then(|f| publish::discard_image(f, &d.plan.image)) {
                self.watch.warn(&e.report());
            }
        }
        if error.kind() == Kind::Interrupted {
            return Err(again());
        }
        for d in disks.iter_mut().filter(|d| !d.is_concluded()) {
            let closed = matches!(d.state, DiskState::Closed);
            if !closed || self.publish(d, refused).is_err() {
                d.state = DiskState::Failed(again());
            }
        }
        match disks.iter().any(|d| matches!(d.state, DiskState::Done(_))) {
            true => {
                self.watch.warn(&error.report());
                Ok(())
            }
            // The caller says it.
            false => Err(again()),
        }
    }

    pub(in crate::backup) fn publish_all(
        &mut self,
        disks: &mut [Active],
        refused: &[Skipped],
    ) -> Result<()> {
        self.phase("publishing");
        for at in 0..disks.len() {
            let failed = failures(disks, refused);
            let Some(d) = disks.get_mut(at).filter(|d| !d.is_concluded()) else { continue };
            self.client.check_interrupt()?;
            if let Err(e) = self.publish(d, &failed) {
                self.fail(d, e)?;
            }
        }
        Ok(())
    }

    /// A point made before another disk failed says so too: its run was partial.
    pub(in crate::backup) fn note_failures(&mut self, disks: &mut [Active], refused: &[Skipped]) {
        let failed = failures(disks, refused);
        for d in disks {
            let DiskState::Done(m) = &mut d.state else { continue };
            if m.failed == failed {
                continue;
            }
            m.failed.clone_from(&failed);
            if let Err(e) = manifest::write(&d.plan.dir, m) {
                self.watch.warn(&e.report());
            }
        }
    }
}

/// A disk without a new point, as manifests name it.
pub(in crate::backup) fn failure(disk: &str, e: &Error) -> Skipped {
    Skipped { disk: disk.to_string(), reason: e.report() }
}

fn failures(disks: &[Active], refused: &[Skipped]) -> Vec<Skipped> {
    let failed = disks.iter().filter_map(|d| match &d.state {
        DiskState::Failed(e) => Some(failure(d.plan.disk.label(), e)),
        _ => None,
    });
    refused.iter().cloned().chain(failed).collect()
}
