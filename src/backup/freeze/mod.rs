//! The freeze point of a run, and the process that ends it if the run can't.

pub(crate) mod after;
pub(crate) mod commands;
pub(crate) mod context;
pub(crate) mod freeze_point;
pub(crate) mod watchdog;
