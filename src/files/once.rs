//! [`Once`]: whether a walk was in a folder before. A folder has one name: with several, or with the contents of
//! another, a walk would have no end in sight.

use std::collections::HashSet;

use super::places::Places;
use super::tree::{NodeId, Tree};
use crate::error::{Error, Kind, Result};

/// Places that are remembered: more are forgotten together, and a loop is found one round later.
const MAX_PLACES: usize = 1 << 18;

/// The folders that a walk was in.
#[derive(Default)]
pub(super) struct Once {
    seen: HashSet<NodeId>,
    /// Where they have their entries.
    places: Places,
}

impl Once {
    /// Notes a folder that is about to be read.
    ///
    /// # Errors
    /// `Corrupt` if that was done before, or another one has the same contents.
    pub(super) fn enter(&mut self, tree: &dyn Tree, folder: NodeId) -> Result<()> {
        if !self.seen.insert(folder) {
            return Err(named_twice());
        }
        if self.places.len() > MAX_PLACES {
            self.places.clear();
        }
        // What is wrong with its places is told when it is read.
        match self.places.take(tree.folder_places(folder).unwrap_or_default()) {
            true => Ok(()),
            false => Err(shared_contents()),
        }
    }
}

/// A folder has two names.
pub fn named_twice() -> Error {
    Error::new(Kind::Corrupt, "directory loop: already visited under another name")
}

/// Two folders are in the same bytes.
pub fn shared_contents() -> Error {
    let what = "directory loop: its contents are also those of another directory";
    Error::new(Kind::Corrupt, what)
}
