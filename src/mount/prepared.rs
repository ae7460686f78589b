//! What is served: the backup directory as it was read, and the thread that looks at it again, swaps the
//! tree and tells the kernel.

use std::path::PathBuf;
use std::sync::Arc;

use super::plan::{Files, Plan, check_apart};
use super::process::{make_descriptor_table, start};
use crate::chain::Catalog;
use crate::chain::scan::{self, ProbeCache, ScanOptions};
use crate::error::{Error, Result};
use crate::folder;
use crate::fs::watch::{Waker, Watch};
use crate::fs::{FileSystem, Inside};
use crate::fuse::{Mounted, Notify};
use crate::image::Cache;
use crate::overlay::Overlays;
use crate::storage::files;
use crate::text::path_text;
use crate::view::View;

/// Dropping a catalog of long chains must not run out of stack.
const WATCH_STACK: usize = 16 << 20;

/// A file system that is ready to be mounted.
pub(super) struct Prepared {
    /// The file system.
    pub fs: Arc<FileSystem>,
    watch: Watch,
    waker: Arc<Waker>,
    /// The backup directory, as it is looked up each time.
    root: PathBuf,
    mountpoint: PathBuf,
    options: ScanOptions,
    probes: ProbeCache,
}

impl Prepared {
    /// Reads the backup directory. Until then the process has one thread.
    ///
    /// # Errors
    /// It cannot be read.
    pub(super) fn new(plan: &Plan) -> Result<Self> {
        make_descriptor_table();
        let waker = Waker::new().map_err(|e| Error::io(e, "cannot make an eventfd"))?;
        let waker = Arc::new(waker);
        let root = followed(plan);
        // First the watches, then the scan: what changes in between is noticed.
        let watch = Watch::new(&root, &plan.mountpoint, plan.poll_interval);
        let (skip, called) = (vec![plan.mountpoint.clone()], Some(plan.called.clone()));
        let options = ScanOptions { skip, called, ..ScanOptions::default() };
        let (catalog, probes) = scan::scan(&root, &options, None)?;
        if !catalog.disks.iter().flat_map(|d| &d.points).any(|p| p.is_served()) {
            log::warn!("{}: no point is available", path_text(&plan.backups));
        }
        // Each thread has the device open.
        files::set_limit(plan.threads as u64 + 1);
        check_file_limit(&catalog);
        let (cache, inside) = caches(plan);
        let fs = FileSystem::new(catalog, cache, plan.owner, watch.mode(), waker.clone(), inside);
        let fs = match &plan.scratch {
            None => fs,
            Some(s) => {
                let overlays = Overlays::new(s.try_clone()?, &plan.backups, &plan.mountpoint)?;
                fs.writable(overlays)
            }
        };
        let (fs, mountpoint) = (Arc::new(fs), plan.mountpoint.clone());
        Ok(Prepared { fs, watch, waker, root, mountpoint, options, probes })
    }

    /// Starts the threads that look at the directory again, and that close what nobody reads.
    ///
    /// # Errors
    /// No thread can be made.
    pub(super) fn watch(self, mounted: &Mounted) -> Result<()> {
        let Prepared { fs, watch, waker, root, mountpoint, options, probes } = self;
        let files = fs.clone();
        start("files", 0, move || files.close_files())?;
        let notify = mounted.notifier();
        let refresh = Refresh { fs, notify, root, mountpoint, options, probes, failing: false };
        start("watch", WATCH_STACK, move || refresh.run(watch, &waker))
    }
}

/// The cache of points, and what shows their files, if that is wanted: half of the memory is that's.
fn caches(plan: &Plan) -> (Arc<Cache>, Option<Inside>) {
    let Some(Files { squash }) = plan.files else { return (Cache::new(plan.cache_size), None) };
    let half = plan.cache_size / 2;
    (Cache::new(half), Some(Inside { view: View::new(half), squash }))
}

/// The directory as the user called it, so that links are looked at again each time; without them where
/// the serving process cannot go their way.
fn followed(plan: &Plan) -> PathBuf {
    match folder::resolve(&plan.called) {
        Ok(real) if real == plan.backups => plan.called.clone(),
        _ => plan.backups.clone(),
    }
}

/// What the watching thread needs to look again.
struct Refresh {
    fs: Arc<FileSystem>,
    notify: Notify,
    root: PathBuf,
    mountpoint: PathBuf,
    options: ScanOptions,
    probes: ProbeCache,
    /// Whether the last look failed.
    failing: bool,
}

impl Refresh {
    fn run(mut self, watch: Watch, waker: &Waker) {
        watch.run(waker, || {
            let look = std::panic::AssertUnwindSafe(|| self.look());
            if std::panic::catch_unwind(look).is_err() {
                log::error!(
                    "internal error while reading the backup directory again; nothing was \
                             changed"
                );
            }
        });
    }

    /// Reads the directory again. Where that fails, all stays as it is.
    fn look(&mut self) {
        let root = self.root.clone();
        match self.scan() {
            Ok((catalog, probes)) => {
                self.probes = probes;
                let changes = self.fs.install(catalog);
                self.notify.tell(&changes);
                if std::mem::take(&mut self.failing) {
                    log::warn!("{} can be read again", path_text(&root));
                }
                log::debug!("read {} again", path_text(&root));
            }
            // Said once, not at each look.
            Err(e) if !std::mem::replace(&mut self.failing, true) => {
                log::error!("kept the old points: {}", e.report());
            }
            Err(e) => log::debug!("kept the old points: {}", e.report()),
        }
    }

    fn scan(&self) -> Result<(Catalog, ProbeCache)> {
        // A link may lead into the mount by now.
        if let Ok(real) = folder::resolve_path(&self.root) {
            check_apart(&real, &self.mountpoint)?;
        }
        scan::scan(&self.root, &self.options, Some(&self.probes))
    }
}

/// Says so where a chain has more files than can be held open, before somebody opens its points.
fn check_file_limit(catalog: &Catalog) {
    let most = files::pin_limit() as u64;
    let (longest, count) = longest_chain(catalog);
    if count > most {
        log::warn!(
            "{}: chain of {count} files, only {most} can be kept open: open points cannot be read \
             after one of their files is removed; raise the hard limit (ulimit -Hn, LimitNOFILE=) \
             or consolidate the chain",
            path_text(&longest)
        );
    }
}

/// The point made of the most files, and how many.
fn longest_chain(catalog: &Catalog) -> (String, u64) {
    let mut longest = (String::new(), 0);
    for disk in &catalog.disks {
        let mut files: Vec<u64> = Vec::with_capacity(disk.points.len());
        for point in &disk.points {
            let below = point.parent.and_then(|p| files.get(p)).copied().unwrap_or(0);
            let own = point.layers.iter().map(|l| 1 + u64::from(l.data_file.is_some()));
            let all = below.saturating_add(own.sum());
            if all > longest.1 {
                longest = (point.name.clone(), all);
            }
            files.push(all);
        }
    }
    longest
}
