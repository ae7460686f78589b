//! Watching QEMU copy.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::json;

use super::journal::{Begun, NewDisk};
use super::nodes::{self, base_name, job_name, stream};
use super::surroundings::{Status, Surroundings};
use crate::backup::graph::GRAPH;
use crate::error::{Error, Kind, Result};
use crate::failpoint::step;
use crate::progress::Progress;
use crate::qmp::Client;
use crate::qmp::budget::short;
use crate::qmp::types::{FdSet, Graph, Job};

/// How often QEMU is asked; it tells by itself when a job comes to its end.
const LOOK: Duration = Duration::from_millis(500);
/// How often it is tried again what could not be read or written.
const RETRY: Duration = Duration::from_secs(2);
/// QEMU's word for a guest that stopped because a disk failed.
const STOPPED: &str = "io-error";

/// `BlockJobInfo`, as far as `query-jobs` does not have it.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
struct BlockJob {
    /// The job's id.
    device: String,
    /// `ok`, or why it is paused.
    io_status: String,
}

/// A disk on its way.
struct Moving<'a> {
    disk: &'a NewDisk,
    progress: Arc<dyn Progress>,
    begun: Instant,
    /// How far it was when last seen.
    seen: u64,
    copied: bool,
    /// Why it last did not go on.
    told: Option<String>,
}

/// All disks on their way.
pub(super) struct Copying<'a> {
    s: &'a Surroundings<'a>,
    client: Client,
    begun: &'a Begun,
    disks: Vec<Moving<'a>>,
    /// When something was tried again.
    tried: Option<Instant>,
    guest_told: bool,
}

impl<'a> Copying<'a> {
    /// Over the connection to the QEMU of `begun`.
    pub(super) fn new(s: &'a Surroundings<'a>, client: Client, begun: &'a Begun) -> Self {
        let moving = |disk: &'a NewDisk| {
            let progress = s.watch.disk(&disk.point.disk);
            progress.begin("live-restore", disk.point.size);
            Moving { disk, progress, begun: Instant::now(), seen: 0, copied: false, told: None }
        };
        let disks = begun.disks.iter().map(moving).collect();
        Copying { s, client, begun, disks, tried: None, guest_told: false }
    }

    /// Goes on until all are copied.
    ///
    /// # Errors
    /// As [`super::finish`].
    pub(super) fn run(mut self) -> Result<()> {
        self.set_speeds()?;
        loop {
            let jobs: Vec<Job> = self.client.poll("query-jobs")?;
            let retry = self.tried.is_none_or(|at| at.elapsed() >= RETRY);
            for i in 0..self.disks.len() {
                if !self.disks.get(i).is_none_or(|m| m.copied) {
                    self.look(i, &jobs, retry)?;
                }
            }
            self.look_at_guest(retry)?;
            if retry {
                self.tried = Some(Instant::now());
            }
            if self.disks.iter().all(|m| m.copied) {
                return Ok(());
            }
            step("waiting");
            self.client.pause(Instant::now() + LOOK)?;
        }
    }

    /// Jobs that are there already get the limit of this call.
    fn set_speeds(&mut self) -> Result<()> {
        let jobs: Vec<Job> = self.client.poll("query-jobs")?;
        for m in &self.disks {
            let id = job_name(&m.disk.node);
            if jobs.iter().any(|j| j.id == id && !j.concluded()) {
                let speed = json!({"device": id, "speed": self.s.rate});
                // It may have come to its end just now.
                let _ended = self.client.call("block-job-set-speed", speed)?;
            }
        }
        Ok(())
    }

    /// Looks at a disk, and does what its job waits for.
    fn look(&mut self, i: usize, jobs: &[Job], retry: bool) -> Result<()> {
        let Some(m) = self.disks.get_mut(i) else { return Ok(()) };
        let id = job_name(&m.disk.node);
        let Some(job) = jobs.iter().find(|j| j.id == id) else { return self.without_job(i) };
        m.progress.advance(job.current_progress.saturating_sub(m.seen));
        m.seen = m.seen.max(job.current_progress);
        match job.status.as_str() {
            "pending" => match self.flush(i, true)? {
                true => self.client.execute("job-finalize", json!({"id": id})).map(drop),
                false => Ok(()),
            },
            "concluded" => {
                let error = job.error.as_deref().map(short);
                self.client.execute("job-dismiss", json!({"id": id}))?;
                match error {
                    Some(why) => {
                        self.tell(i, &why);
                        Ok(())
                    }
                    None => self.without_job(i),
                }
            }
            "paused" if retry => self.wake(i),
            _ => Ok(()),
        }
    }

    /// A disk without a job is copied, or needs one.
    fn without_job(&mut self, i: usize) -> Result<()> {
        let Some(disk) = self.disks.get(i).map(|m| m.disk) else { return Ok(()) };
        let graph: Graph = self.client.query(GRAPH, json!({}))?;
        if graph.id(&disk.node).is_none() {
            let e = Error::new(Kind::Peer, "QEMU does not have this disk any more");
            return Err(e.at_path(self.s.storage.image(disk)));
        }
        if graph.child(&disk.node, "backing").is_some() {
            let arguments = stream(disk, self.s.rate);
            if let Err(refused) = self.client.call("block-stream", arguments)? {
                self.tell(i, &Error::from(refused).report());
            }
            return Ok(());
        }
        if self.s.storage.needs_backup(self.begun, disk)? {
            let what = "QEMU has forgotten the backup, and the image has not";
            return Err(Error::new(Kind::Peer, what).at_path(self.s.storage.image(disk)));
        }
        // So that a power cut finds it so, too.
        if !self.flush(i, false)? {
            return Ok(());
        }
        self.let_go(disk, graph.id(&base_name(&disk.node)).is_some())?;
        if let Some(m) = self.disks.get_mut(i) {
            m.copied = true;
            m.progress.advance(m.disk.point.size.saturating_sub(m.seen));
            m.progress.end(m.begun.elapsed());
            self.s.watch.say(&format!("{}: no longer needs the backup", m.disk.point.disk));
        }
        Ok(())
    }

    /// Has QEMU close the files of a disk's point.
    fn let_go(&mut self, disk: &NewDisk, is_open: bool) -> Result<()> {
        if is_open {
            let base = json!({"node-name": base_name(&disk.node)});
            self.client.execute("blockdev-del", base)?;
        }
        let sets: Vec<FdSet> = self.client.query("query-fdsets", json!({}))?;
        let own = job_name(&disk.node);
        for set in sets.iter().filter(|s| s.names().any(|name| name == own)) {
            self.client.execute("remove-fd", json!({"fdset-id": set.fdset_id}))?;
        }
        Ok(())
    }

    /// Has QEMU write out all that it has of a disk. Whether it could: else that is told, and tried again.
    fn flush(&mut self, i: usize, needs_backup: bool) -> Result<bool> {
        let Some(m) = self.disks.get(i) else { return Ok(false) };
        let options = json!({"options": [nodes::unchanged(m.disk, needs_backup)]});
        match self.client.call("blockdev-reopen", options)? {
            Ok(_) => Ok(true),
            Err(refused) => {
                self.tell(i, &Error::from(refused).report());
                Ok(false)
            }
        }
    }

    /// Lets a job go on that an error has paused. (One that somebody else has paused stays so.)
    fn wake(&mut self, i: usize) -> Result<()> {
        let Some(id) = self.disks.get(i).map(|m| job_name(&m.disk.node)) else { return Ok(()) };
        let all: Vec<BlockJob> = self.client.poll("query-block-jobs")?;
        let Some(job) = all.iter().find(|j| j.device == id) else { return Ok(()) };
        let why = match job.io_status.as_str() {
            "nospace" => "copying waits: no space is left in the storage folder",
            "failed" => "copying waits: the backup cannot be read, or the disk cannot be written",
            _ => return Ok(()),
        };
        self.tell(i, why);
        // It may have come to its end just now.
        let _ended = self.client.call("job-resume", json!({"id": id}))?;
        Ok(())
    }

    /// Tells once what is wrong.
    fn tell(&mut self, i: usize, why: &str) {
        if let Some(m) = self.disks.get_mut(i)
            && m.told.as_deref() != Some(why)
        {
            m.told = Some(why.to_string());
            self.s.watch.warn(&format!("{}: {why}", m.disk.point.disk));
        }
    }

    /// A guest that stopped because a disk failed goes on; if that still fails, it stops again.
    fn look_at_guest(&mut self, retry: bool) -> Result<()> {
        let status: Status = self.client.poll("query-status")?;
        if status.status != STOPPED {
            self.guest_told = false;
            return Ok(());
        }
        if !std::mem::replace(&mut self.guest_told, true) {
            self.s.watch.warn("the guest is stopped: a disk cannot be read or written");
        }
        if retry {
            // Refused while another stop is under way.
            let _refused = self.client.call("cont", json!({}))?;
        }
        Ok(())
    }
}
