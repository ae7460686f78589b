//! The backup directory that a run writes to: whose it is, what it holds, who shares it.

pub(crate) mod detect;
pub(crate) mod file_mode;
pub(crate) mod history;
pub(crate) mod known_disks;
pub(crate) mod reachable;
pub(crate) mod target_id;
pub(crate) mod targets;
