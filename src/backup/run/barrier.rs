//! Following a disk's job, and its barriers: points at which it is certain what of the guest is in
//! the image, so that it can be hashed while the job goes on (see `hasher`).
//!
//! For a barrier the job is paused, which makes QEMU wait for its writes under way, and resumed as
//! soon as it was looked at. Nothing is believed of the pause itself. A job that copies all of a disk
//! copies each guest cluster until it has succeeded, and never again; its progress counts the bytes that
//! have. `wr_highest_offset` of the image's node is the end of the highest write that has come back, be
//! it with an error. If both are the same number, no byte below it is missing: neither under way nor
//! failed. (A pause hides the error of a write from the job, which then tries again.) While the job runs
//! they hardly ever agree; while it is paused they do, unless a write has failed.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::disk::job_error;
use super::session::{Active, Run};
use crate::backup::names::{Role, object};
use crate::backup::publish::hasher::{Barriers, CopyMark};
use crate::error::Result;
use crate::failpoint;
use crate::failpoint::step;
use crate::progress::Position;
use crate::qmp::budget::short;
use crate::qmp::types::Job;

/// How much an image grows from one barrier to the next. A pause costs some tens of milliseconds.
const EVERY: u64 = 256 << 20;

/// How long a job may take to pause: its writes under way have to end, 64 MiB at most.
const PATIENCE: Duration = Duration::from_secs(30);

/// How much an image has to grow, if it is to be hashed while it does: without a second processor the
/// copying would only become slower.
fn interval() -> Option<u64> {
    let several = std::thread::available_parallelism().is_ok_and(|n| n.get() > 1);
    failpoint::barrier().or(several.then_some(EVERY))
}

impl Run<'_> {
    /// Of a disk whose job begins. An image of compressed clusters is small; one that is written past
    /// the page cache would be read from the disk beside the copying; and where a bitmap says what is
    /// copied, progress tells no offset.
    pub(in crate::backup) fn barriers(&self, d: &Active) -> Option<Barriers> {
        let copy = &self.options.copy;
        let apt = !self.options.no_hash && copy.compress.is_none() && !copy.direct;
        let knows =
            ["job-pause", "job-resume", "query-blockstats"].iter().all(|c| self.client.has(c));
        // A QEMU elsewhere writes by another page cache than the one that is read here.
        if !apt || !knows || self.client.is_remote() || d.plan.since.is_some() {
            return None;
        }
        let hasher = d.held.as_ref()?.hasher(d.plan.disk.size);
        Some(Barriers { hasher, every: interval()?, last: d.empty, paused: None })
    }

    /// Shows progress; gives the job once it has ended.
    pub(in crate::backup) fn follow(&mut self, d: &mut Active, job: &Job) -> Option<Result<Job>> {
        let (at, of, copied) = (job.current_progress, job.total_progress, d.copied(job));
        let copy = &self.options.copy;
        d.progress.position(Position { at, of, paced: copy.speed > 0 || copy.compress.is_some() });
        d.progress.advance(copied.saturating_sub(d.shown));
        d.shown = d.shown.max(copied);
        self.disk_status(d.index, |s| {
            s.copied = copied;
            s.done = job.current_progress;
            s.total = job.total_progress;
        });
        if !job.concluded() {
            return self.hash_ahead(d, job).err().map(Err);
        }
        step("job concluded");
        d.progress.end(d.began.elapsed());
        if let Some(e) = &job.error {
            return Some(Err(job_error(e)));
        }
        // Without an error all is copied: the rest is hashed while it is synced.
        let length = d.held.as_ref().and_then(|h| h.length());
        if let (Some(b), Some(length)) = (&mut d.hasher, length) {
            b.hasher.go_on(CopyMark { guest: u64::MAX, length });
        }
        Some(Ok(job.clone()))
    }

    /// Begins a barrier when it is due, and ends one that was begun.
    fn hash_ahead(&mut self, d: &mut Active, job: &Job) -> Result<()> {
        let Some(length) = d.held.as_ref().and_then(|h| h.length()) else { return Ok(()) };
        let Some(b) = &mut d.hasher else { return Ok(()) };
        // Its end is a barrier too.
        let left = job.total_progress.saturating_sub(job.current_progress);
        let due = length.saturating_sub(b.last) >= b.every && left >= b.every;
        match b.paused {
            None if due && job.status == "running" => {
                b.last = length;
                // A refusal: it has just ended, or another program has paused it.
                let paused = self.client.call("job-pause", json!({"id": job.id}))?;
                b.paused = paused.ok().and_then(|_| Instant::now().checked_add(PATIENCE));
            }
            Some(until) if job.status == "paused" || Instant::now() > until => {
                b.paused = None;
                if let Some(guest) = self.end_barrier(d.index, job)?
                    && let Some(b) = &mut d.hasher
                {
                    b.last = length;
                    b.hasher.go_on(CopyMark { guest, length });
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Resumes the job; gives the end of what is copied without a gap, if that is certain.
    fn end_barrier(&mut self, index: usize, job: &Job) -> Result<Option<u64>> {
        let copied = job.current_progress;
        let certain = job.status == "paused"
            && copied > 0
            && self.highest_write(&object(&self.run, Role::Target, index))? == Some(copied);
        // It does not matter whether somebody else has resumed it before: what was proven is.
        if let Err(r) = self.client.call("job-resume", json!({"id": job.id}))? {
            log::debug!("{} was not resumed: {}", job.id, short(&r.desc));
        }
        Ok(certain.then_some(copied))
    }

    /// Where the highest write to a node ended, if QEMU says it.
    fn highest_write(&mut self, node: &str) -> Result<Option<u64>> {
        let answer = self.client.call("query-blockstats", json!({"query-nodes": true}))?;
        let answer = answer.unwrap_or_default();
        let mut all = answer.as_array().into_iter().flatten();
        let ours = all.find(|s| s.get("node-name").and_then(Value::as_str) == Some(node));
        Ok(ours.and_then(|s| s.get("stats")?.get("wr_highest_offset")?.as_u64()))
    }
}
