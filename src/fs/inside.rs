//! What the file system keeps for the files inside points.

use std::sync::atomic::AtomicI32;

use crate::error::Kind;
use crate::view::{Folder, Named, View};

/// That files inside points are shown, and how.
pub struct Inside {
    /// What is open of them.
    pub view: View,
    /// Whether all of them belong to the mount's owner.
    pub squash: bool,
}

/// An open folder inside a point, or the one that has its volumes.
pub(super) struct OpenFolder {
    pub ino: u64,
    pub parent: u64,
    pub names: Names,
    /// The first error, told after the names that are right; 0 if there is none.
    pub failed: AtomicI32,
}

/// Where its names come from.
pub(super) enum Names {
    Volumes(Vec<Named>),
    Folder(Folder),
}

/// The errno of a file inside a point: as the guest's kernel says it, where it has a word for it. Other than
/// for points, whose readers take EOPNOTSUPP for "try another way".
pub(super) fn errno(kind: Kind) -> i32 {
    match kind {
        Kind::Encrypted => libc::ENOKEY,
        Kind::Unsupported => libc::EOPNOTSUPP,
        // A name leads there: so the file system is damaged, or a file of the backup is gone.
        Kind::NotFound => libc::EIO,
        Kind::Usage => libc::ENOTDIR,
        Kind::Exists
        | Kind::Permission
        | Kind::Busy
        | Kind::NoSpace
        | Kind::Io
        | Kind::Corrupt
        | Kind::Truncated
        | Kind::Incomplete
        | Kind::Changed
        | Kind::Peer
        | Kind::Timeout
        | Kind::Interrupted
        | Kind::Partial
        | Kind::Skipped
        | Kind::Unsound
        | Kind::Unproven => libc::EIO,
    }
}
