//! What prune and consolidate were about to remove from a folder when they were broken off:
//! `.fleecefs/removal.journal`, written before the first file goes, removed after the last.
//!
//! A manifest whose image is gone speaks of a lost point, unless its name is listed here.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::manifest::{FOLDER, Manifest};

/// The journal of one folder.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Removal {
    /// A new image that takes the place of what is removed.
    #[serde(default)]
    pub publish: Option<Publish>,
    /// Image files to remove, in this order.
    pub remove: Vec<String>,
}

/// A new image on its way in.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Publish {
    /// Its temporary name, in `.fleecefs/`.
    pub temporary: String,
    /// Its manifest, with its final name.
    pub manifest: Manifest,
    /// The images that lie on it from now on; their manifests name it as their parent.
    pub children: Vec<String>,
}

/// Where the journal of `dir` is.
pub fn journal_path(dir: &Path) -> PathBuf {
    dir.join(FOLDER).join("removal.journal")
}

/// Reads the journal of `dir`; `None` if there is none that can be read. A half-written one never
/// got its name, so one that cannot be parsed is no journal of ours.
pub fn read(dir: &Path) -> Option<Removal> {
    serde_json::from_slice(&std::fs::read(journal_path(dir)).ok()?).ok()
}

/// The images that are on their way out of `dir`.
pub fn pending(dir: &Path) -> Vec<String> {
    read(dir).map(|r| r.remove).unwrap_or_default()
}
