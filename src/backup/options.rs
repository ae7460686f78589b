//! What a run is told by the user.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::target::known_disks;
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
    pub level: RequestedLevel,
    /// Only these disks (by node, device, qdev or file name); empty for all.
    pub include: Vec<String>,
    /// Not these disks.
    pub exclude: Vec<String>,
    /// Names and folders.
    pub layout: Layout,
    /// How the guest is frozen and stopped.
    pub freeze_point: FreezeOptions,
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
    pub share: crate::folder::FileMode,
    /// An NBD server that QEMU runs already: only one is possible.
    pub nbd: Option<Address>,
    /// The VM is shut off, and QMP is that of a daemon of ours.
    pub offline: Option<Arc<known_disks::KnownDisks>>,
}

/// Which level is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestedLevel {
    /// A new chain.
    Full,
    /// Since the last FULL or INC; an error where that is impossible.
    Inc,
    /// Since the FULL; an error where that is impossible.
    Diff,
    /// A full copy beside the chains.
    Copy,
    /// INC where it is possible, FULL elsewhere, and FULL when due.
    Auto(Option<FullEvery>),
}

/// When `auto` takes a new FULL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FullEvery {
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

/// How the guest is frozen and stopped for the freeze point.
#[derive(Debug, Clone)]
pub struct FreezeOptions {
    /// Whether the guest is stopped.
    pub stop: StopMode,
    /// Freeze the guest's file systems.
    pub quiesce: bool,
    /// Only these mount points.
    pub mountpoints: Vec<String>,
    /// The longest time that the guest may be frozen or stopped by us.
    pub deadline: Duration,
    /// How long to wait for the agent.
    pub agent_timeout: Duration,
    /// What is run in the guest round it.
    pub commands: GuestCommands,
}

/// Commands that the guest's agent runs.
#[derive(Debug, Clone, Default)]
pub struct GuestCommands {
    /// Before the file systems are frozen.
    pub before: Option<String>,
    /// After they are thawed, and wherever anything fails after `before` was begun.
    pub after: Option<String>,
    /// How long each may take.
    pub timeout: Duration,
}

/// Whether and how long the guest is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopMode {
    /// For the freeze point only: some tens of milliseconds.
    FreezePoint,
    /// Not at all: each disk has a freeze point of its own.
    Never,
    /// For the whole backup.
    WholeBackup,
}

/// How bytes are copied.
#[derive(Debug, Clone)]
pub struct CopyOptions {
    /// Where fleece images go; to the file system of each disk if `None`, see [`crate::backup::fleece`].
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
