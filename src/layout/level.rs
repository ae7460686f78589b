//! [`Level`]: what kind of backup an image is.

/// What kind of backup made a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// The root of a chain.
    Full,
    /// The changes since the last FULL or INC.
    Inc,
    /// The changes since the FULL.
    Diff,
    /// A full copy outside any chain.
    Copy,
    /// An image that fits no backup layout: a disk of its own with one point.
    Image,
    /// An internal snapshot of a FULL.
    Snapshot,
}
