//! The life of a mount, in the process that serves it.
//!
//! Threads: those of [`crate::fuse`] that serve requests; `watch`, which looks at the backup
//! directory again, swaps the tree and tells the kernel; `control`, which unmounts on a signal or
//! when idle, or has `keeper` do it; and the first, which waits for the end.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::daemon::Ready;
use super::mount::{Plan, check_apart};
use super::mountinfo::{self, Mount};
use super::{keeper, privileges};
use crate::chain::Catalog;
use crate::chain::scan::{self, ProbeCache, ScanOptions};
use crate::error::{Error, Kind, Result};
use crate::folder;
use crate::fs::FileSystem;
use crate::fs::watch::{Waker, Watch};
use crate::fuse::{self, Mounted, Notify};
use crate::image::Cache;
use crate::storage::files;
use crate::text::path_text;

/// How far the kernel reads ahead: several of its largest requests, so that all threads have work.
const READ_AHEAD_KB: u32 = 4096;
/// How often is looked whether there is something to do.
pub(super) const TICK: Duration = Duration::from_millis(500);
/// Dropping a catalog of long chains must not run out of stack.
const WATCH_STACK: usize = 16 << 20;
/// What unmounts.
pub(super) const SIGNALS: [i32; 3] = [SIGTERM, SIGINT, SIGHUP];

/// Mounts, tells `ready` once the mount answers, and serves until it is unmounted; the exit code. If
/// that is not 0, what it means has been told. Must be called while there is one thread only.
///
/// # Errors
/// Mounting failed, or the connection to the kernel broke.
pub fn serve(plan: &Plan, ready: Ready) -> Result<u8> {
    raise_file_limit();
    give_memory_back();
    log_panics();
    match privileges::is_root() {
        true => keeper::run(plan, ready),
        false => alone(plan, ready).map(|()| 0),
    }
}

/// Everything in one process: a user's, who mounts by way of fusermount3.
fn alone(plan: &Plan, ready: Ready) -> Result<()> {
    let prepared = Prepared::new(plan)?;
    // Until now a signal simply ended the process, however long the scan took.
    let signals = signals()?;
    let mounted = fuse::mount(prepared.fs.clone(), &plan.mountpoint, &plan.fuse())?;
    let (mount, _announced) = answers(&plan.mountpoint)?;
    let fs = prepared.fs.clone();
    prepared.watch(&mounted)?;
    let (tell, told) = channel();
    start("signals", 0, move || forward(signals, &tell))?;
    let control = Control { mount, idle_timeout: plan.idle_seconds(), fs, told };
    start("control", 0, move || control.run())?;
    ready.tell()?;
    say_mounted(plan);
    finish(mounted, plan)
}

/// Said by whichever process has mounted.
pub(super) fn say_mounted(plan: &Plan) {
    log::info!("{} is mounted at {}", path_text(&plan.backups), path_text(&plan.mountpoint));
}

/// A file system that is ready to be mounted.
pub(super) struct Prepared {
    /// It.
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
    /// Reads the backup directory.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn new(plan: &Plan) -> Result<Self> {
        let waker = Waker::new().map_err(|e| Error::io(e, "cannot make an eventfd"))?;
        let waker = Arc::new(waker);
        let root = followed(plan);
        // First the watches, then the scan: what changes in between is noticed.
        let watch = Watch::new(&root, &plan.mountpoint, plan.poll_interval);
        let (skip, called) = (vec![plan.mountpoint.clone()], Some(plan.called.clone()));
        let options = ScanOptions { skip, called, ..ScanOptions::default() };
        let (catalog, probes) = scan::scan(&root, &options, None)?;
        if !catalog.disks.iter().flat_map(|d| &d.points).any(|p| p.is_served()) {
            log::warn!("{}: no point can be served", path_text(&plan.backups));
        }
        // Each thread has the device open.
        files::set_limit(plan.threads as u64 + 1);
        check_file_limit(&catalog);
        let cache = Cache::new(plan.cache_size);
        let fs = FileSystem::new(catalog, cache, plan.owner, watch.mode(), waker.clone());
        let (fs, mountpoint) = (Arc::new(fs), plan.mountpoint.clone());
        Ok(Prepared { fs, watch, waker, root, mountpoint, options, probes })
    }

    /// Starts the threads that look at the directory again, and that close what nobody reads.
    ///
    /// # Errors
    /// No thread can be made.
    pub fn watch(self, mounted: &Mounted) -> Result<()> {
        let Prepared { fs, watch, waker, root, mountpoint, options, probes } = self;
        let files = fs.clone();
        start("files", 0, move || files.close_files())?;
        let notify = mounted.notifier();
        let refresh = Refresh { fs, notify, root, mountpoint, options, probes, failing: false };
        start("watch", WATCH_STACK, move || refresh.run(watch, &waker))
    }
}

/// The directory as the user called it, so that links are looked at again each time; without them where
/// the serving process cannot go their way.
fn followed(plan: &Plan) -> PathBuf {
    match folder::resolve(&plan.called) {
        Ok(real) if real == plan.backups => plan.called.clone(),
        _ => plan.backups.clone(),
    }
}

/// Waits for the end.
///
/// # Errors
/// The connection to the kernel broke.
pub(super) fn finish(mounted: Mounted, plan: &Plan) -> Result<()> {
    mounted.wait()?;
    log::info!("{} is unmounted", path_text(&plan.mountpoint));
    Ok(())
}

/// Waits for the first answer, raises read-ahead and announces that this process is alive, as long as
/// the second value lives.
///
/// # Errors
/// The mount does not answer.
pub(super) fn answers(
    mountpoint: &Path,
) -> Result<(Mount, Option<std::os::unix::net::UnixListener>)> {
    folder::look(mountpoint)
        .map_err(|e| Error::io(e, "the mount does not answer").at_path(mountpoint))?;
    let Some(mount) = mountinfo::find(mountpoint)? else {
        return Err(Error::new(Kind::Io, "the mount is gone again").at_path(mountpoint));
    };
    let setting = format!("/sys/class/bdi/{}/read_ahead_kb", mount.dev);
    if let Err(e) = folder::system::set(Path::new(&setting), &READ_AHEAD_KB.to_string()) {
        log::info!("{setting}: cannot raise read-ahead: {e}");
    }
    let announced = mount.announce().ok();
    Ok((mount, announced))
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
                log::error!("looking at the backup directory again panicked; nothing was changed");
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
        if let Ok(real) = folder::resolve_place(&self.root) {
            check_apart(&real, &self.mountpoint)?;
        }
        scan::scan(&self.root, &self.options, Some(&self.probes))
    }
}

fn forward(mut signals: Signals, tell: &Sender<i32>) {
    for signal in signals.forever() {
        if tell.send(signal).is_err() {
            return;
        }
    }
}

struct Control {
    mount: Mount,
    idle_timeout: Option<u64>,
    fs: Arc<FileSystem>,
    told: Receiver<i32>,
}

impl Control {
    /// Waits for a reason to unmount. A busy mount is tried again until it is free; a second
    /// signal detaches it at once, and the process ends with its last open file. A third ends it
    /// there and then.
    fn run(self) {
        let (mut signals, mut unmounted) = (0, false);
        loop {
            match self.told.recv_timeout(TICK) {
                Ok(signal) if signals < 2 => {
                    signals += 1;
                    log::info!("signal {signal}: unmounting");
                }
                Ok(signal) => {
                    log::warn!("signal {signal}, the third: ending with files still open");
                    std::process::exit(i32::from(Kind::Interrupted.exit_code()));
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            let idle = self.idle_timeout.is_some_and(|t| self.fs.idle_seconds() >= t);
            if !unmounted && (signals > 0 || idle) {
                unmounted = self.unmount(signals);
            }
        }
    }

    /// Tries once; true if there is nothing left to do.
    fn unmount(&self, signals: u32) -> bool {
        match self.mount.end(signals > 1) {
            Ok(()) => true,
            Err(e) => {
                log::debug!("{}; a second signal detaches it", e.report());
                // Somebody works inside without reading: ask again after another idle time.
                self.fs.touch();
                false
            }
        }
    }
}

/// The signals that unmount, from now on.
///
/// # Errors
/// The handlers cannot be installed.
pub(super) fn signals() -> Result<Signals> {
    Signals::new(SIGNALS).map_err(|e| Error::io(e, "cannot listen for signals"))
}

/// Starts a thread; `stack` bytes, or 0 for the usual.
///
/// # Errors
/// No thread can be made.
pub(super) fn start(name: &str, stack: usize, work: impl FnOnce() + Send + 'static) -> Result<()> {
    let mut builder = std::thread::Builder::new().name(name.into());
    if stack > 0 {
        builder = builder.stack_size(stack);
    }
    builder
        .spawn(work)
        .map(drop)
        .map_err(|e| Error::io(e, format!("cannot start the thread '{name}'")))
}

/// The files of open points are held open: as many as the system allows.
pub(super) fn raise_file_limit() {
    // SAFETY: plain data and valid pointers.
    unsafe {
        let mut limit: libc::rlimit = std::mem::zeroed();
        if libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) == 0 {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
        }
    }
}

/// Says so where a chain has more files than can be held open, before somebody opens its points.
fn check_file_limit(catalog: &Catalog) {
    let most = files::pin_limit() as u64;
    let (longest, count) = longest_chain(catalog);
    if count > most {
        log::warn!(
            "{}: a chain of {count} files, and only {most} can be held open: all points can be read, \
             but not after one of their files is removed while they are open; raise the hard limit \
             (ulimit -Hn, LimitNOFILE=) or consolidate the chain",
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

/// What the cache lets go of is the system's again: without this the C library keeps it, scattered over
/// the threads' heaps, and the process takes several times what `--cache-size` says.
fn give_memory_back() {
    /// Smaller than a decompressed piece.
    #[cfg(target_env = "gnu")]
    const OF_THEIR_OWN: libc::c_int = 128 << 10;
    // SAFETY: plain numbers; there is one thread.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, OF_THEIR_OWN);
    }
}

/// A panic in the background must not vanish with standard error.
fn log_panics() {
    std::panic::set_hook(Box::new(|info| log::error!("{info}")));
}
