//! [`Run`]: a backup at work, and its disks ([`Active`]). What is done with them is in the files that
//! have a part of it each: `begin`, `disk`, `barrier`, `beside`, `conclude`, `watermark`, `work`.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::control::Shared;
use super::early::Barriers;
use super::fleece::Fleece;
use super::journal::{DiskRecord, Journal};
use super::neighbours::Neighbours;
use super::planned::{DiskPlan, Folders};
use super::publish::Held;
use super::space::Reserves;
use super::target_id::TargetId;
use super::zeros::ChainData;
use super::{Options, Watch, migration, moment, nbdserver};
use crate::chain::manifest::{Consistency, Manifest};
use crate::error::{Error, Kind, Result};
use crate::folder::Folder;
use crate::progress::Progress;
use crate::qmp::Client;
use crate::qmp::types::Job;

/// A run at work.
pub struct Run<'a> {
    pub(super) options: &'a Options,
    pub(super) watch: &'a dyn Watch,
    pub(super) client: Client,
    pub(super) journal: Journal,
    pub(super) run: String,
    pub(super) target: TargetId,
    pub(super) base: PathBuf,
    pub(super) status: Shared,
    pub(super) server: Option<nbdserver::Server>,
    /// From the beginning on.
    pub(super) migration: Option<migration::Guard>,
    pub(super) guardian: Option<moment::Held>,
    pub(super) consistency: Consistency,
    /// The frozen view needs care, see `run::is_blind`.
    pub(super) blind: bool,
    /// What QEMU says about the VM.
    pub(super) vm: Arc<Value>,
    /// Chains that INCs build on, by the new image's path.
    pub(super) chains: HashMap<PathBuf, ChainData>,
    /// What is given with `--config`: paths and bytes.
    pub(super) config: Vec<(PathBuf, Vec<u8>)>,
    /// What must stay free where fleece images are.
    pub(super) reserves: Reserves,
    /// The fleece images by the disk's number, held open until QEMU has closed them.
    pub(super) fleeces: HashMap<usize, Fleece>,
    /// What other programs do.
    pub(super) neighbours: Neighbours,
    /// See [`super::planned::Inputs::newcomer`].
    pub(super) newcomer: bool,
    /// See [`super::planned::Inputs::renamed`].
    pub(super) renamed: Folders,
}

/// A disk on its way.
pub struct Active {
    pub(super) index: usize,
    pub(super) plan: DiskPlan,
    pub(super) record: DiskRecord,
    pub(super) manifest: Manifest,
    pub(super) chain: Option<ChainData>,
    /// Its folder in the target, open from then on.
    pub(super) folder: Option<Arc<Folder>>,
    /// The image, open from its beginning to its end.
    pub(super) held: Option<Held>,
    /// Hashes it while it is written.
    pub(super) early: Option<Barriers>,
    pub(super) progress: Arc<dyn Progress>,
    pub(super) shown: u64,
    /// Length of the image before anything was copied.
    pub(super) empty: u64,
    pub(super) began: Instant,
    pub(super) state: State,
}

/// How a disk is getting on.
pub enum State {
    /// Up to the end of its job.
    Going,
    /// The guest is let go of; the image is being synced.
    Syncing(Syncing),
    /// QEMU has closed the image.
    Closed,
    Done(Box<Manifest>),
    Failed(Error),
}

/// A sync beside the run.
pub struct Syncing {
    thread: JoinHandle<Result<()>>,
    /// Closed at its end; nothing is ever sent.
    over: Receiver<()>,
}

impl Syncing {
    /// Begins it.
    pub(super) fn begin(sync: impl FnOnce() -> Result<()> + Send + 'static) -> Self {
        let (bell, over) = channel();
        let work = move || {
            let _rung_at_the_end = bell;
            sync()
        };
        Syncing { thread: std::thread::spawn(work), over }
    }

    /// Waits until it is over, at most so long.
    pub(super) fn rest(&self, most: Duration) {
        // It is over, or the time is.
        let _ = self.over.recv_timeout(most);
    }

    fn is_over(&self) -> bool {
        self.over.try_recv() == Err(TryRecvError::Disconnected)
    }

    /// What came of it.
    ///
    /// # Errors
    /// As the sync; `Io` if it has crashed.
    pub(super) fn end(self) -> Result<()> {
        let crashed = |_| Err(Error::new(Kind::Io, "the sync has crashed"));
        self.thread.join().unwrap_or_else(crashed)
    }
}

impl Active {
    pub(super) fn going(&self) -> bool {
        matches!(self.state, State::Going)
    }

    /// Its folder.
    pub(super) fn folder(&self) -> Result<&Arc<Folder>> {
        let folder = self.folder.as_ref();
        folder.ok_or_else(|| Error::new(Kind::Io, "the folder is not open").at_path(&self.plan.dir))
    }

    /// Its image.
    pub(super) fn held(&self) -> Result<&Held> {
        self.held.as_ref().ok_or_else(|| Error::new(Kind::Io, "the image is not open"))
    }

    pub(super) fn syncing(&self) -> bool {
        self.sync().is_some()
    }

    pub(super) fn sync(&self) -> Option<&Syncing> {
        if let State::Syncing(s) = &self.state { Some(s) } else { None }
    }

    pub(super) fn synced(&self) -> bool {
        self.sync().is_some_and(Syncing::is_over)
    }

    /// Bytes that the image got: a job counts the holes that it passes as well.
    pub(super) fn copied(&self, job: &Job) -> u64 {
        let len = self.held.as_ref().and_then(|h| h.length());
        len.map_or(job.current_progress, |l| l.saturating_sub(self.empty).min(job.current_progress))
    }

    pub(super) fn settled(&self) -> bool {
        matches!(self.state, State::Done(_) | State::Failed(_))
    }
}
