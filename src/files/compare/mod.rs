//! Two trees side by side: what was added, removed, modified and renamed from one to the other.
//!
//! `walk` goes through both at once, folder by folder and in the order of names. It goes twice: first `renames`
//! notes files that have left a path and files that have come to one, and are one file by number and time of
//! making; then `changes` tells. What is held in memory is the names of the folders that the walk is in, the numbers
//! of folders that it has been in, and a bounded list of renames; see [`MAX_RENAMES`]. `types` are those of what is
//! reported, `content` compares bytes.

mod changes;
mod content;
mod renames;
mod types;
mod walk;

use crate::error::Result;

pub use renames::MAX_RENAMES;
pub use types::{Different, Event, Observer, Side, Trees};

/// Tells all that is different, sorted by path. Whether all renames could be told: of more than
/// [`MAX_RENAMES`] some are told as removed and added.
///
/// # Errors
/// What `told` says; what reading the start says; `Unsupported` if folders are larger than memory allows.
pub fn compare(trees: &Trees<'_>, observer: &mut dyn Observer) -> Result<bool> {
    let renames = renames::find(trees)?;
    let is_all = renames.is_all;
    changes::tell(trees, &renames, observer)?;
    Ok(is_all)
}
