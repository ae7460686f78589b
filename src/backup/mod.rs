//! Backups of running guests by image fleecing over QMP.
//!
//! A run: `seen` (which disks there are), `folders` and `history` (what the target holds) give a
//! `plan` (whose parts are in `planned`), in which `level` decides what each disk gets;
//! `run` executes it, with all that a run has in `session`, in steps that `work` calls: `bitmap` adds the next recording bitmap, `fleece` puts files and nodes in
//! place, `moment` takes the one frozen moment under the eyes of `guardian`, `zeros` finds what a
//! bitmap cannot know, `barrier` and `early` hash an image while it is written, `publish` makes a
//! finished image a point; `beside` looks what other programs do (`neighbours`). `journal` and `recover` undo what a killed run left (`leftover`: which
//! fleece images may go, `reach`: targets that do not answer). `offline` runs all that on a daemon of ours. `lock` keeps two runs apart,
//! `control` reaches a running one.
//!
//! Two rules carry everything: no bitmap is ever cleared, and every object we add to QEMU carries
//! the run's id in its name, so that whatever dies whenever, the old bitmap still records and what
//! is left over can be told and removed.

pub mod disks;
pub mod fleece;
pub mod freeze;
pub mod graph;
pub mod info;
pub mod names;
pub mod offline;
pub mod plan;
pub mod publish;
pub mod recover;
pub mod run;
pub mod state;
pub mod target;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::error::{Error, Kind, Result};
use crate::progress::Progress;
use crate::qmp::Address;

/// What the user wants of a run.
#[derive(Debug, Clone)]
pub struct Options {
    /// QEMU's QMP socket.
    pub qmp: Address,
    /// The guest agent's socket.
    pub agent: Option<Address>,
    /// The backup directory.
    pub target: PathBuf,
    /// Other VMs may be backed up to it too.
    pub shared: bool,
    /// What disks are called: a disk as in `include`, and its name.
    pub names: Vec<(String, String)>,
    /// It may be a new one, although another was there before.
    pub init: bool,
    /// What kind of points to make.
    pub level: LevelWish,
    /// Only these disks (by node, device, qdev or file name); empty for all.
    pub include: Vec<String>,
    /// Not these disks.
    pub exclude: Vec<String>,
    /// Names and folders.
    pub layout: Layout,
    /// How the frozen moment is taken.
    pub moment: MomentOptions,
    /// How bytes are copied.
    pub copy: CopyOptions,
    /// Do not keep the FULL's bitmap for DIFFs.
    pub no_diff: bool,
    /// Leave the BLAKE3 of the image out of the manifest.
    pub no_hash: bool,
    /// A skipped disk is an error.
    pub strict: bool,
    /// Write an encrypted disk in plain text.
    pub allow_plaintext: bool,
    /// Files to keep with the backup.
    pub config: Vec<PathBuf>,
    /// Where journals and locks are.
    pub state_dir: PathBuf,
    /// State folders of others, in which lists of targets are looked at too.
    pub more_state: Vec<PathBuf>,
    /// How long to wait for other programs' jobs to end before anything is begun.
    pub wait: Duration,
    /// Only say what would be done.
    pub dry_run: bool,
    /// Who besides the user may read what is made.
    pub share: crate::folder::Share,
    /// An NBD server that QEMU runs already: only one is possible.
    pub nbd: Option<Address>,
    /// The VM is shut off, and QMP is that of a daemon of ours.
    pub offline: Option<Arc<offline::Known>>,
}

/// Which level is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LevelWish {
    /// A new chain.
    Full,
    /// Since the last FULL or INC; an error where that is impossible.
    Inc,
    /// Since the FULL; an error where that is impossible.
    Diff,
    /// A full copy beside the chains.
    Copy,
    /// INC where it is possible, FULL elsewhere, and FULL when due.
    Auto(Option<Every>),
}

/// When `auto` takes a new FULL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Every {
    /// When the chain has this many points.
    Points(u64),
    /// When the FULL is older than this.
    Age(Duration),
}

/// Names and folders as in qmpbackup.
#[derive(Debug, Clone, Default)]
pub struct Layout {
    /// A folder per month.
    pub monthly: bool,
    /// All disks in one folder.
    pub no_subdir: bool,
    /// FULL and COPY carry the disk's name alone.
    pub no_timestamp: bool,
    /// No link beside an image without timestamp.
    pub no_symlink: bool,
}

/// How the frozen moment is taken.
#[derive(Debug, Clone)]
pub struct MomentOptions {
    /// Whether the guest is stopped.
    pub stop: StopWish,
    /// Freeze the guest's file systems.
    pub quiesce: bool,
    /// Only these mount points.
    pub mountpoints: Vec<String>,
    /// The longest time that the guest may be frozen or stopped by us.
    pub deadline: Duration,
    /// How long to wait for the agent.
    pub agent_timeout: Duration,
}

/// Whether and how long the guest is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopWish {
    /// For the frozen moment: tens of milliseconds.
    Moment,
    /// Not at all: one moment per disk.
    Never,
    /// For the whole backup.
    Whole,
}

/// How bytes are copied.
#[derive(Debug, Clone)]
pub struct CopyOptions {
    /// Where fleece images go; to the file system of each disk if `None`, see [`fleece`].
    pub fleece_dir: Option<PathBuf>,
    /// How long a guest write may wait for the fleece, in seconds.
    pub cbw_timeout: u32,
    /// Bytes per second; 0 for no limit.
    pub speed: u64,
    /// Compress the images.
    pub compress: Option<Compression>,
    /// Parallel requests.
    pub workers: Option<u32>,
    /// QEMU's `aio` for the target: threads, native, io_uring.
    pub aio: Option<String>,
    /// Open the target without the host's page cache.
    pub direct: bool,
    /// Wait this long before the fleece is removed.
    pub remove_delay: Duration,
    /// Begin even where space looks short.
    pub no_space_check: bool,
}

/// Compression of image clusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Deflate: read by every QEMU.
    Zlib,
    /// Zstandard: QEMU 5.1 and newer.
    Zstd,
}

/// Receives what a run has to tell; the front end decides how it looks.
pub trait Watch: Send + Sync {
    /// A receiver for the progress of one disk.
    fn disk(&self, name: &str) -> Arc<dyn Progress>;
    /// A line for the user.
    fn say(&self, line: &str);
    /// A line that the user must not miss.
    fn warn(&self, line: &str);
    /// Fails if long work that can be done later is to be given up.
    ///
    /// # Errors
    /// `Interrupted`.
    fn check_stop(&self) -> Result<()> {
        Ok(())
    }
}

/// Another one, with the flag that a signal sets.
pub(crate) struct Stopping<'a> {
    /// Receives the lines.
    pub watch: &'a dyn Watch,
    /// Set by a signal or by `cancel`.
    pub flag: &'a std::sync::atomic::AtomicBool,
}

impl Watch for Stopping<'_> {
    fn disk(&self, name: &str) -> Arc<dyn Progress> {
        self.watch.disk(name)
    }
    fn say(&self, line: &str) {
        self.watch.say(line);
    }
    fn warn(&self, line: &str) {
        self.watch.warn(line);
    }
    fn check_stop(&self) -> Result<()> {
        match self.flag.load(std::sync::atomic::Ordering::SeqCst) {
            true => Err(Error::new(Kind::Interrupted, "interrupted")),
            false => Ok(()),
        }
    }
}

/// Tells nothing, but logs.
#[derive(Debug, Clone, Copy, Default)]
pub struct Quiet;

impl Watch for Quiet {
    fn disk(&self, _name: &str) -> Arc<dyn Progress> {
        Arc::new(())
    }
    fn say(&self, line: &str) {
        log::info!("{line}");
    }
    fn warn(&self, line: &str) {
        log::warn!("{line}");
    }
}

/// Seconds since the epoch.
pub fn now() -> i64 {
    now_exactly().0
}

/// The same, and nanoseconds.
fn now_exactly() -> (i64, u32) {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let exact = |d: Duration| (i64::try_from(d.as_secs()).unwrap_or(i64::MAX), d.subsec_nanos());
    since.map_or((0, 0), exact)
}
