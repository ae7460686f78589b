//! [`Run`]: a backup at work, and its disks ([`Active`]). What is done with them is in the files that
//! have a part of it each: `begin`, `disk`, `barrier`, `interference`, `conclude`, `watermark`, `work`.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::backup::fleece::space::Reserves;
use crate::backup::fleece::zeros::ChainData;
use crate::backup::fleece::{Fleece, migration, nbdserver};
use crate::backup::freeze::freeze_point;
use crate::backup::graph::foreign_jobs::ForeignJobs;
use crate::backup::plan::planned::DiskPlan;
use crate::backup::publish::OpenImage;
use crate::backup::publish::hasher::Barriers;
use crate::backup::state::control::Shared;
use crate::backup::state::journal::{DiskRecord, Journal};
use crate::backup::target::target_id::TargetId;
use crate::backup::target::targets::Folders;
use crate::backup::{Options, Watch};
use crate::error::{Error, Kind, Result};
use crate::folder::Folder;
use crate::manifest::{Consistency, Manifest, VmConfig};
use crate::progress::Progress;
use crate::qmp::Client;
use crate::qmp::types::Job;

/// A run at work.
pub(crate) struct Run<'a> {
    pub(in crate::backup) options: &'a Options,
    pub(in crate::backup) watch: &'a dyn Watch,
    pub(in crate::backup) client: Client,
    pub(in crate::backup) journal: Journal,
    pub(in crate::backup) run: String,
    pub(in crate::backup) target: TargetId,
    pub(in crate::backup) base: PathBuf,
    pub(in crate::backup) status: Shared,
    pub(in crate::backup) server: Option<nbdserver::Server>,
    /// From the beginning on.
    pub(in crate::backup) migration: Option<migration::MigrationGuard>,
    pub(in crate::backup) watchdog: Option<freeze_point::HeldGuest>,
    pub(in crate::backup) consistency: Consistency,
    /// The frozen view needs care, see `run::hides_status`.
    pub(in crate::backup) hides_status: bool,
    /// What QEMU says about the VM.
    pub(in crate::backup) vm: VmConfig,
    /// Chains that INCs build on, by the new image's path.
    pub(in crate::backup) chains: HashMap<PathBuf, ChainData>,
    /// What is given with `--config`: paths and bytes.
    pub(in crate::backup) config: Vec<(PathBuf, Vec<u8>)>,
    /// What must stay free where fleece images are.
    pub(in crate::backup) reserves: Reserves,
    /// The fleece images by the disk's number, held open until QEMU has closed them.
    pub(in crate::backup) fleeces: HashMap<usize, Fleece>,
    /// What other programs do.
    pub(in crate::backup) foreign_jobs: ForeignJobs,
    /// See [`crate::backup::plan::planned::Inputs::newcomer`].
    pub(in crate::backup) newcomer: bool,
    /// See [`crate::backup::plan::planned::Inputs::renamed`].
    pub(in crate::backup) renamed: Folders,
    /// Where the VM was backed up to until now, if the target is a new one.
    pub(in crate::backup) elsewhere: Option<PathBuf>,
}

/// A disk on its way.
pub(crate) struct Active {
    pub(in crate::backup) index: usize,
    pub(in crate::backup) plan: DiskPlan,
    pub(in crate::backup) record: DiskRecord,
    pub(in crate::backup) manifest: Manifest,
    pub(in crate::backup) chain: Option<ChainData>,
    /// Its folder in the target, open from then on.
    pub(in crate::backup) folder: Option<Arc<Folder>>,
    /// The image, open from its beginning to its end.
    pub(in crate::backup) held: Option<OpenImage>,
    /// Hashes it while it is written.
    pub(in crate::backup) hasher: Option<Barriers>,
    pub(in crate::backup) progress: Arc<dyn Progress>,
    pub(in crate::backup) shown: u64,
    /// Length of the image before anything was copied.
    pub(in crate::backup) empty: u64,
    pub(in crate::backup) began: Instant,
    pub(in crate::backup) state: DiskState,
}

/// How a disk is getting on.
pub(crate) enum DiskState {
    /// Up to the end of its job.
    Going,
    /// The filter is gone; the image is being synced.
    Syncing(Syncing),
    /// QEMU has closed the image.
    Closed,
    Done(Box<Manifest>),
    Failed(Error),
}

/// A sync beside the run.
pub(crate) struct Syncing {
    thread: JoinHandle<Result<()>>,
    /// Closed at its end; nothing is ever sent.
    over: Receiver<()>,
}

impl Syncing {
    /// Starts the sync in a thread.
    pub(in crate::backup) fn begin(sync: impl FnOnce() -> Result<()> + Send + 'static) -> Self {
        let (bell, over) = channel();
        let work = move || {
            let _rung_at_the_end = bell;
            sync()
        };
        Syncing { thread: std::thread::spawn(work), over }
    }

    /// Waits until it is over, at most so long.
    pub(in crate::backup) fn rest(&self, most: Duration) {
        // It is over, or the time is.
        let _ = self.over.recv_timeout(most);
    }

    fn is_over(&self) -> bool {
        self.over.try_recv() == Err(TryRecvError::Disconnected)
    }

    /// The result of the sync, once it has ended.
    ///
    /// # Errors
    /// As the sync; `Io` if it has crashed.
    pub(in crate::backup) fn end(self) -> Result<()> {
        let crashed = |_| Err(Error::new(Kind::Io, "the sync has crashed"));
        self.thread.join().unwrap_or_else(crashed)
    }
}

impl Active {
    pub(in crate::backup) fn is_active(&self) -> bool {
        matches!(self.state, DiskState::Going)
    }

    /// Its folder.
    pub(in crate::backup) fn folder(&self) -> Result<&Arc<Folder>> {
        let folder = self.folder.as_ref();
        folder.ok_or_else(|| Error::new(Kind::Io, "the folder is not open").at_path(&self.plan.dir))
    }

    /// Its image.
    pub(in crate::backup) fn held(&self) -> Result<&OpenImage> {
        self.held.as_ref().ok_or_else(|| Error::new(Kind::Io, "the image is not open"))
    }

    pub(in crate::backup) fn syncing(&self) -> bool {
        self.sync().is_some()
    }

    pub(in crate::backup) fn sync(&self) -> Option<&Syncing> {
        if let DiskState::Syncing(s) = &self.state { Some(s) } else { None }
    }

    pub(in crate::backup) fn synced(&self) -> bool {
        self.sync().is_some_and(Syncing::is_over)
    }

    /// Bytes that the image got: a job counts the holes that it passes as well.
    pub(in crate::backup) fn copied(&self, job: &Job) -> u64 {
        let len = self.held.as_ref().and_then(|h| h.length());
        len.map_or(job.current_progress, |l| l.saturating_sub(self.empty).min(job.current_progress))
    }

    pub(in crate::backup) fn is_concluded(&self) -> bool {
        matches!(self.state, DiskState::Done(_) | DiskState::Failed(_))
    }
}
