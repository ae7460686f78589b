//! What a node has of which nothing is said.

use super::super::tree::{Attributes, Flags, NodeKind};
use super::{Stamp, time};

/// The attributes of a file or folder that says nothing of itself: no owner, and the first time that there is.
pub(in super::super) fn plain(kind: NodeKind, size: u64, allocated: u64) -> Attributes {
    let long_ago = time(Stamp::default());
    Attributes {
        kind,
        size,
        allocated,
        mode: if kind == NodeKind::Folder { 0o755 } else { 0o644 },
        uid: 0,
        gid: 0,
        links: 1,
        atime: long_ago,
        mtime: long_ago,
        ctime: long_ago,
        crtime: None,
        device: None,
        flags: Flags::default(),
    }
}
