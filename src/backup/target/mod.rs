//! The backup directory that a run writes to: whose it is, what it holds, who shares it.

pub(crate) mod history;
pub(crate) mod known;
pub(crate) mod proof;
pub(crate) mod reach;
pub(crate) mod shared;
pub(crate) mod target_id;
pub(crate) mod targets;
