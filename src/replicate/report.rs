//! What a run did, for people and for JSON.

use std::path::PathBuf;

use serde::Serialize;

use super::plan::Action;

/// What became of one file of the source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct PointReport {
    /// Its path below the backup directory.
    #[serde(rename = "file", serialize_with = "crate::text::as_text")]
    pub path: PathBuf,
    /// What was done.
    pub action: Action,
    /// Its length in bytes if it was sent.
    pub bytes: u64,
    /// Why it was not sent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

/// What the target's rules of retention deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) struct Pruned {
    /// How many points.
    pub points: u64,
    /// Bytes.
    pub bytes: u64,
}

/// What a run did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Report {
    /// Whether nothing was changed.
    pub dry_run: bool,
    /// The files, in the order of the chains.
    pub images: Vec<PointReport>,
    /// How many were sent.
    pub sent: u64,
    /// How many should have been sent and could not.
    pub left: u64,
    /// Bytes of images that were sent.
    pub bytes: u64,
    /// What was deleted there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pruned: Option<Pruned>,
    /// Why the run ended before its end, if it did, as JSON has errors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<serde_json::Value>,
}

impl Report {
    /// Adds a file, and counts it.
    pub(crate) fn add(&mut self, image: PointReport) {
        match image.action {
            Action::Sent => {
                self.sent += 1;
                self.bytes = self.bytes.saturating_add(image.bytes);
            }
            Action::Left => self.left += 1,
            Action::Recorded | Action::Present | Action::Merged | Action::Older => {}
        }
        self.images.push(image);
    }
}
