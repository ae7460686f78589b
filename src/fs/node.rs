//! The inodes of a [`super::tree::Tree`].

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::sync::Arc;

use super::point::PointFile;
use crate::{files, view};

/// The root's inode number, fixed by the FUSE protocol.
pub const ROOT: u64 = 1;

/// One inode.
pub struct Node {
    /// Its number.
    pub ino: u64,
    /// The folder it is in; the root is its own.
    pub parent: u64,
    /// Modification time in seconds since the epoch.
    pub time: i64,
    /// What it is.
    pub kind: NodeKind,
}

/// What an inode is.
pub enum NodeKind {
    /// A folder with its entries, sorted by name.
    Dir(Vec<Entry>),
    /// A point's merged image.
    File(Arc<PointFile>),
    /// A symbolic link and its target.
    Link(PathBuf),
    /// `status.json`, whose text is made when it is looked at.
    Status,
    /// The folder of a point's files, which are found when somebody looks.
    Files(Arc<view::Point>, Arc<PointFile>),
    /// A file or folder inside a point.
    Inside(view::Node),
}

/// A name in a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The name.
    pub name: OsString,
    /// Its inode.
    pub ino: u64,
    /// The inode's type.
    pub kind: EntryKind,
}

/// The file types that exist here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryKind {
    /// A folder.
    Dir,
    /// A plain file.
    File,
    /// A symbolic link.
    Link,
    /// A character device of a guest's.
    CharDevice,
    /// A block device of a guest's.
    BlockDevice,
    /// A named pipe of a guest's.
    Pipe,
    /// A socket of a guest's.
    Socket,
}

impl EntryKind {
    /// What a node inside a point is.
    pub(super) fn of(kind: files::NodeKind) -> Self {
        match kind {
            files::NodeKind::File => EntryKind::File,
            files::NodeKind::Folder => EntryKind::Dir,
            files::NodeKind::Link => EntryKind::Link,
            files::NodeKind::CharDevice => EntryKind::CharDevice,
            files::NodeKind::BlockDevice => EntryKind::BlockDevice,
            files::NodeKind::Pipe => EntryKind::Pipe,
            files::NodeKind::Socket => EntryKind::Socket,
        }
    }
}

/// The entry with this name in a sorted list.
pub fn find<'a>(entries: &'a [Entry], name: &OsStr) -> Option<&'a Entry> {
    entries.binary_search_by(|e| e.name.as_os_str().cmp(name)).ok().map(|i| &entries[i])
}
