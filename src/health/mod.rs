//! Whether all is well with backup directories: for whoever watches many of them, by eye, by Nagios or by Prometheus.
//!
//! - `survey`: what is known of a directory and its disks; `judge`: what of that is trouble
//! - `nagios`, `metrics`: the same in the words of these programs
//!
//! Nothing of a point's data is read: headers and manifests as `list` does, what `verify` and `boot --check` found (see
//! `last_verified`), the history, and journals of runs that were killed.

mod judge;
pub(crate) mod metrics;
pub(crate) mod nagios;
pub(crate) mod report;
mod survey;

pub(crate) use report::{DirectoryHealth, DiskHealth, Status, worst};
pub(crate) use survey::{Known, survey};
