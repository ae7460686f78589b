//! Backups of running guests by image fleecing over QMP.
//!
//! A folder for each subject, in the order in which they build on each other:
//!
//! - `names`: of runs, nodes, jobs, bitmaps and images; `watch`: how a run reports; `options`: its options
//! - `state`: what outlives a killed run: its journal, fleece images that are left; locks, the control socket
//! - `target`: the backup directory: whose it is, what it holds for a disk, who shares it
//! - `graph`: QEMU's block graph round a disk, and what it has to be; bitmaps
//! - `disks`: which disks QEMU has, and which of them a backup takes
//! - `plan`: what each disk gets, and why; what a size watermark proves. Pure
//! - `fleece`: nodes, exports and filters: adding them to QEMU and removing them
//! - `freeze`: the freeze point, and the process that ends it if this one dies
//! - `publish`: a finished image becomes a point
//! - `recover`: what a killed run left is undone
//! - `run`: a run from its beginning to its end: `session` is what it has, `work` its phases, `disk` the steps
//!   of one disk, `interference` looks what other programs do in the same QEMU
//! - `info`: what `info` and `cleanup` show; `offline`: all that on a daemon of ours, for VMs that are shut off
//!
//! Two rules carry everything: no bitmap is ever cleared, and every object we add to QEMU carries
//! the run's id in its name, so that whatever dies whenever, the old bitmap still records and what
//! is left over can be told and removed.

pub mod disks;
pub mod fleece;
pub(crate) mod freeze;
pub(crate) mod graph;
pub(crate) mod info;
pub(crate) mod names;
pub(crate) mod offline;
mod options;
pub(crate) mod plan;
pub(crate) mod publish;
pub mod recover;
pub(crate) mod run;
pub mod state;
pub(crate) mod target;
mod watch;

pub use options::{
    Compression, CopyOptions, FreezeOptions, FullEvery, GuestCommands, Layout, Options,
    RequestedLevel, StopMode,
};
pub(crate) use watch::Stopping;
pub(in crate::backup) use watch::now_exactly;
pub use watch::{Quiet, Watch, now};
