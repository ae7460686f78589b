//! What each run did: one line of JSON per run in the state folder, oldest first, whatever became of the run.
//!
//! - `entry`: what is known of a run; `store`: the files, their rotation, and reading what is there
//!
//! It is for whoever watches (`history`, `health`, metrics) and decides nothing: a run whose line cannot be written is
//! no worse, and a line that cannot be read is as if it were not there.

pub(crate) mod entry;
mod store;

pub(crate) use entry::{DiskEntry, Entry};
pub(crate) use store::{History, append, read};
