//! A run at work: the phases over all disks, and the end, whatever it is.

use std::ffi::OsStr;
use std::time::{Duration, Instant};

use serde_json::json;

use super::conclude::failure;
use super::session::{Active, DiskState, Run};
use crate::backup::fleece::migration::MigrationGuard;
use crate::backup::fleece::teardown::{Scope, teardown};
use crate::backup::fleece::{migration, nbdserver};
use crate::backup::freeze::context::FreezeContext;
use crate::backup::freeze::freeze_point;
use crate::backup::freeze::freeze_point::FilterInsert;
use crate::backup::graph::expected::Stage;
use crate::backup::names::{Role, object};
use crate::backup::plan::planned::Plan;
use crate::backup::publish::report::{DiskReport, Report};
use crate::backup::recover::{ImageOutcome, RecoverCause, RecoverContext};
use crate::backup::state::control::DiskStatus;
use crate::backup::state::journal::{Pending, Record};
use crate::backup::{Options, StopMode, now, publish, recover};
use crate::error::{Error, Kind, Result};
use crate::manifest::Skipped;
use crate::qmp::Client;
use crate::qmp::types::Job;
use crate::{failpoint, manifest};

impl Run<'_> {
    pub(in crate::backup) fn execute(&mut self) -> Result<Report> {
        self.phase("planning");
        self.migration = Some(MigrationGuard::begin(&mut self.client, &self.run, self.watch)?);
        let plan = self.plan()?;
        self.announce_plan(&plan);
        let mut disks = self.activate(&plan)?;
        let refused: Vec<Skipped> = plan.refused.iter().map(|(d, e)| failure(d, e)).collect();
        let mut outcome =
            self.copy_all(&mut disks).and_then(|()| self.publish_all(&mut disks, &refused));
        if let Err(e) = &outcome {
            outcome = self.cut_short(&mut disks, &refused, e);
        }
        outcome?;
        self.note_failures(&mut disks, &refused);
        Ok(self.report(plan, disks))
    }

    fn report(&self, plan: Plan, disks: Vec<Active>) -> Report {
        let passed: Vec<u64> = {
            let status = self.status.lock().unwrap_or_else(|e| e.into_inner());
            status.disks.iter().map(|d| d.done).collect()
        };
        let disks = disks.into_iter().map(|d| DiskReport {
            disk: d.plan.disk.label().to_string(),
            level: d.plan.level,
            path: d.plan.dir.join(&d.plan.image),
            dirty: d.plan.estimate(),
            read: passed.get(d.index).copied().unwrap_or(0),
            result: match d.state {
                DiskState::Done(m) => Ok(*m),
                DiskState::Failed(e) => Err(e),
                _ => Err(Error::new(Kind::Interrupted, "it was not finished")),
            },
        });
        Report {
            disks: disks.collect(),
            plan,
            consistency: self.consistency.clone(),
            undo: None,
            run: self.run.clone(),
            vm: self.vm.clone(),
        }
    }

    /// Whatever happened: nothing of ours stays in QEMU, and the journal ends.
    pub(in crate::backup) fn finish(mut self, result: Result<Report>) -> Result<Report> {
        self.client.interrupt_by(None);
        self.phase("cleaning up");
        if let Some(g) = self.watchdog.take()
            && let Err(e) = self.release(g)
        {
            // What is said below undoes this as well, or fails with it.
            self.watch.warn(&format!("cannot resume or thaw the guest: {}", e.report()));
        }
        if let Some(g) = self.migration.take().filter(|_| !self.client.timed_out()) {
            g.end(&mut self.client);
        }
        let undone = self.undo();
        let Options { state_dir, qmp, .. } = self.options;
        match (result, undone) {
            (Ok(r), Ok(())) => self.journal.end(state_dir, qmp).map(|()| r),
            (Err(e), Ok(())) => {
                if let Err(j) = self.journal.end(state_dir, qmp) {
                    self.watch.warn(&j.report());
                }
                Err(e)
            }
            // The points are there all the same.
            (Ok(r), Err(u)) => Ok(Report { undo: Some(u.remedy(RECOVER)), ..r }),
            (Err(e), Err(u)) => {
                self.watch.warn(&format!("cleaning up failed: {}", u.report()));
                Err(e.remedy(RECOVER))
            }
        }
    }

    /// By the journal; without it by the names that carry the run's id.
    fn undo(&mut self) -> Result<()> {
        let pending = self.journal.pending().unwrap_or_else(|e| {
            self.watch.warn(&e.report());
            None
        });
        let own = || Pending { run: self.run.clone(), ..Default::default() };
        let pending = pending.filter(|p| p.run == self.run).unwrap_or_else(own);
        let Options { state_dir, qmp, .. } = self.options;
        let place =
            RecoverContext { state: state_dir, vm: qmp, cause: RecoverCause::OwnEnd, agent: None };
        match recover::undo(&mut self.client, &pending, place, self.watch) {
            Err(e) if e.kind() == Kind::Peer && is_gone(&pending, qmp) => {
                recover::check_gone(&pending, qmp, e)?;
                recover::undo_offline(&pending, place, self.watch).map(drop)
            }
            other => other.map(drop),
        }
    }

    fn release(&mut self, held: freeze_point::HeldGuest) -> Result<()> {
        freeze_point::release(&mut self.freeze_context(), held)
    }

    fn freeze_context(&mut self) -> FreezeContext<'_> {
        FreezeContext {
            client: &mut self.client,
            options: self.options,
            journal: &mut self.journal,
            run: &self.run,
            watch: self.watch,
        }
    }

    pub(in crate::backup) fn phase(&self, phase: &str) {
        let mut s = self.status.lock().unwrap_or_else(|e| e.into_inner());
        s.phase = phase.to_string();
        if s.run.is_empty() {
            s.run = self.run.clone();
            s.pid = std::process::id();
            s.started = now();
            s.target = self.options.target.clone();
        }
    }

    pub(in crate::backup) fn disk_status(
        &self,
        index: usize,
        change: impl FnOnce(&mut DiskStatus),
    ) {
        let mut s = self.status.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(d) = s.disks.get_mut(index) {
            change(d);
        }
    }

    fn copy_all(&mut self, disks: &mut [Active]) -> Result<()> {
        self.phase("preparing");
        self.place_fleeces(disks)?;
        self.check_space(disks)?;
        self.each(disks, Self::prepare)?;
        self.watch_graph(disks)?;
        self.phase("freezing");
        self.freeze(disks)?;
        self.check_migration()?;
        self.check_graph(disks, Stage::Inserted)?;
        self.keep_sizes(disks)?;
        self.phase("copying");
        self.each(disks, Self::view)?;
        self.stop_after_views(disks)?;
        self.guard_fleeces(disks)?;
        self.check_graph(disks, Stage::Copying)?;
        self.each(disks, Self::start_job)?;
        self.wait(disks)
    }

    fn place_fleeces(&mut self, disks: &mut [Active]) -> Result<()> {
        for d in disks.iter_mut().filter(|d| d.is_active()) {
            self.client.check_interrupt()?;
            if let Err(e) = self.place_fleece(d) {
                self.fail(d, e)?;
            }
        }
        Ok(())
    }

    /// Does `step` for every disk still going; a failure ends that disk alone. (Whether a migration has
    /// begun is asked before each step, and so after the last one before whatever comes next.)
    fn each(
        &mut self,
        disks: &mut [Active],
        step: fn(&mut Self, &mut Active) -> Result<()>,
    ) -> Result<()> {
        for d in disks.iter_mut().filter(|d| d.is_active()) {
            self.client.check_interrupt()?;
            self.check_migration()?;
            if let Err(e) = step(self, d) {
                self.fail(d, e)?;
            }
        }
        Ok(())
    }

    /// Ends one disk: its objects leave QEMU, its new bitmap goes, its files are removed.
    pub(in crate::backup) fn fail(&mut self, d: &mut Active, error: Error) -> Result<()> {
        // A file that was not to be had in time concerns its disk alone; a QMP that is silent all.
        let over = error.kind() == Kind::Interrupted || self.client.timed_out();
        if over || gone_error(&error, &mut self.client) {
            return Err(error);
        }
        self.watch
            .warn_of(d.plan.disk.label(), &format!("{}: {}", d.plan.disk.label(), error.report()));
        self.disk_status(d.index, |s| s.state = "failed".into());
        d.state = DiskState::Failed(error);
        match self.give_up(d) {
            // What failed was a last step: the image was complete, and is told as what it is.
            Ok(ImageOutcome::Published) => self.published_after_failure(d),
            Ok(ImageOutcome::Removed) => Ok(()),
            // The other disks go on; `finish` tries again, and tells.
            Err(e) if !self.client.timed_out() && !gone_error(&e, &mut self.client) => {
                self.watch.warn_of(
                    d.plan.disk.label(),
                    &format!("{}: {}", d.plan.disk.label(), e.report()),
                );
                Ok(())
            }
            Err(e) => Err(e),
        }
    }

    /// A disk that had failed has its point.
    fn published_after_failure(&mut self, d: &mut Active) -> Result<()> {
        let Some(m) = manifest::read(&d.plan.dir, OsStr::new(&d.plan.image))? else {
            return Ok(());
        };
        self.watch.say(&format!(
            "{}: the image was complete and is kept as a point",
            d.plan.disk.label()
        ));
        self.disk_status(d.index, |s| s.state = "done".into());
        d.state = DiskState::Done(Box::new(m));
        Ok(())
    }

    fn give_up(&mut self, d: &Active) -> Result<ImageOutcome> {
        if migration::has_left(&mut self.client)? {
            // `finish` sees to the rest.
            return recover::conclude_disk(None, &d.record, false, &crate::backup::Quiet);
        }
        teardown(&mut self.client, Scope { run: &self.run, index: Some(d.index) })?;
        // Not before: QEMU's closing of a large file takes time if nobody else has it open.
        self.fleeces.remove(&d.index);
        let outcome = recover::conclude_disk(
            Some(&mut self.client),
            &d.record,
            false,
            &crate::backup::Quiet,
        )?;
        self.journal.write(&Record::Settled(d.index))?;
        Ok(outcome)
    }

    fn freeze(&mut self, disks: &mut [Active]) -> Result<()> {
        let running = self.check_migration()?.as_deref() == Some("running");
        let inserts: Vec<FilterInsert> = disks
            .iter()
            .filter(|d| d.is_active())
            .map(|d| FilterInsert {
                index: d.index,
                insertion: d.plan.disk.insertion.clone(),
                filter: object(&self.run, Role::Filter, d.index),
                label: d.plan.disk.label().to_string(),
                path: d.plan.disk.path.clone(),
            })
            .collect();
        if inserts.is_empty() {
            return Ok(());
        }
        let taken = freeze_point::take(&mut self.freeze_context(), &inserts, running)?;
        self.watchdog = taken.held;
        self.consistency = taken.consistency;
        let time = now();
        let mut unwritten = Vec::new();
        for d in disks.iter_mut().filter(|d| d.is_active()) {
            d.manifest.time = time;
            d.manifest.consistency = self.consistency.clone();
            // Who finishes this point after a crash knows no more than what is announced.
            if let Err(e) = d.folder().and_then(|f| publish::announce(f, &d.manifest)) {
                unwritten.push((d.index, e));
            }
        }
        let c = &self.consistency;
        if c.stopped_ms > 0
            || self.client.has_guest() && self.options.freeze_point.stop == StopMode::FreezePoint
        {
            self.watch.say(&format!("the guest was stopped for {} ms", c.stopped_ms));
        }
        for (index, e) in taken.failed.into_iter().chain(unwritten) {
            if let Some(d) = disks.iter_mut().find(|d| d.index == index) {
                self.fail(d, e)?;
            }
        }
        Ok(())
    }

    fn stop_after_views(&mut self, disks: &[Active]) -> Result<()> {
        if let (Some(dir), Some(server)) = (failpoint::hold(), &self.server) {
            let is_active = disks.iter().filter(|d| d.is_active());
            let layout = &self.options.layout;
            let views: Vec<_> =
                is_active.map(|d| (d.index, d.plan.disk.folder_name(layout))).collect();
            nbdserver::hold(&mut self.client, server, &self.run, &views, &dir)?;
        }
        self.stop_server()
    }

    /// Until all jobs have ended and QEMU has closed all images. No disk waits for another: each is
    /// let go of when its own job ends.
    fn wait(&mut self, disks: &mut [Active]) -> Result<()> {
        let mut limiter = PollLimiter(AT_ONCE);
        loop {
            self.check_migration()?;
            let jobs: Vec<Job> = match disks.iter().any(Active::is_active) {
                true => self.client.poll("query-jobs")?,
                false => Vec::new(),
            };
            self.check_graph(disks, Stage::Copying)?;
            for d in disks.iter_mut().filter(|d| d.is_active()) {
                let id = object(&self.run, Role::Job, d.index);
                let ended = match jobs.iter().find(|j| j.id == id) {
                    Some(j) => self.follow(d, j),
                    None => Some(Err(Error::new(Kind::Peer, "the backup job is gone"))),
                };
                let Some(ended) = ended else { continue };
                if let Err(e) = ended.and_then(|job| self.detach(d, &job)) {
                    self.fail(d, e)?;
                }
            }
            let is_active = disks.iter().any(Active::is_active);
            if let Some(g) = self.watchdog.take_if(|_| !is_active)
                && let Err(e) = self.release(g)
            {
                // `--pause`, and nothing reads the guest's disks any more. `finish` tries again.
                self.watch.warn(&format!("cannot resume or thaw the guest: {}", e.report()));
            }
            for d in disks.iter_mut().filter(|d| d.synced()) {
                if let Err(e) = self.close(d) {
                    self.fail(d, e)?;
                }
            }
            if !disks.iter().any(|d| d.is_active() || d.syncing()) {
                return Ok(());
            }
            self.client.check_interrupt()?;
            self.guard_fleeces(disks)?;
            match disks.iter().find_map(Active::sync).filter(|_| !is_active) {
                Some(sync) => sync.rest(SYNC_POLL),
                None => limiter.pause(&mut self.client)?,
            }
        }
    }

    /// Fails if a migration runs, or has run since the beginning: before the freeze point, at each look, and
    /// once a job has ended. Gives the guest's state, if there is a guest.
    pub(in crate::backup) fn check_migration(&mut self) -> Result<Option<String>> {
        self.migration.as_ref().map_or(Ok(None), |g| g.check(&mut self.client))
    }
}

/// How often a job's progress is asked for.
const POLL: Duration = Duration::from_millis(250);

/// How often it is looked whether there is something else to do while the last images are synced.
const SYNC_POLL: Duration = Duration::from_millis(50);

/// A flood of events must not become one of questions: the shortest pause, and how many may be shorter
/// in a row since there was something to hear.
const SHORTEST: Duration = Duration::from_millis(10);
const AT_ONCE: u32 = 16;

/// How many pauses may still be shorter than [`SHORTEST`].
struct PollLimiter(u32);

impl PollLimiter {
    /// Waits for the time of the next look, or until something may have ended.
    fn pause(&mut self, client: &mut Client) -> Result<()> {
        let began = Instant::now();
        client.pause(began + POLL)?;
        let short = SHORTEST.saturating_sub(began.elapsed());
        match self.0.checked_sub(1) {
            _ if short.is_zero() => self.0 = self.0.saturating_add(1).min(AT_ONCE),
            Some(left) => self.0 = left,
            None => std::thread::sleep(short),
        }
        Ok(())
    }
}

/// What to do about what could not be undone, where the error itself does not say.
const RECOVER: &str = "run fleecefs recover when QEMU answers again";

/// Whether an error means that QEMU is not there any more.
fn gone_error(e: &Error, client: &mut Client) -> bool {
    e.kind() == Kind::Peer && client.execute("query-version", json!({})).is_err()
}

/// Whether nobody answers there any more, or another QEMU: one that was restarted may listen at once.
fn is_gone(pending: &Pending, qmp: &crate::qmp::Address) -> bool {
    match Client::connect(qmp) {
        Err(e) => matches!(e.kind(), Kind::Peer | Kind::NotFound),
        Ok(now) => match (&pending.qemu, now.process()) {
            (Some(then), Some(now)) => *then != now,
            _ => false,
        },
    }
}
