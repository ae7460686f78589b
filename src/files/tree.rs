//! [`Tree`]: what every reader of a file system implements.
//!
//! Rules for readers:
//! - `&self` throughout, shared by threads; no lock is held while something is read.
//! - A [`NodeId`] comes back from callers later, or is made up by them (a mount's inode numbers outlive what is
//!   known of them): each call checks it anew. What is no node is `NotFound`.
//! - Names are bytes, as they are on disk (UTF-16 becomes UTF-8; half surrogates the three bytes that UTF-8 would
//!   give them). A reader gives no name that is empty, `.`, `..`, or has `/` or NUL: such an entry is a finding
//!   and omitted. ([`is_name`]). Names that are there twice are both given; [`Tree::lookup`] finds the first.
//! - A wrong checksum, a pointer that leads outside or round in a circle is a finding and an error of kind
//!   `Corrupt` for that file or folder; all others go on. What is encrypted is `Encrypted`; an unknown
//!   incompatible feature refuses the whole file system, by name, with `Unsupported`.
//! - What is not written (a hole, a preallocated extent) reads as zeros.
//! - Each call is bounded in time and memory by what the source has, not by what it says: a folder of 2^60 bytes
//!   without blocks ends at once.

use std::fmt;
use std::ops::Range;

use super::findings::Findings;
use crate::error::{Error, Kind, Result};

/// A file or folder: the number that the file system has for it. Two names of one file (hard links) have the
/// same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId {
    /// Which tree it is in, where a file system has several (subvolumes of btrfs, streams of NTFS); else 0.
    pub tree: u64,
    /// Its number: an inode number; where there are none, where its entry is.
    pub number: u64,
}

/// What a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum NodeKind {
    /// A plain file.
    File,
    /// A folder.
    Folder,
    /// A symbolic link.
    Link,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A named pipe.
    Pipe,
    /// A socket.
    Socket,
}

impl NodeKind {
    /// From the upper bits of a Unix mode; `None` if they are none of the seven.
    pub fn of_mode(mode: u32) -> Option<NodeKind> {
        Some(match mode & 0o170_000 {
            0o100_000 => NodeKind::File,
            0o040_000 => NodeKind::Folder,
            0o120_000 => NodeKind::Link,
            0o020_000 => NodeKind::CharDevice,
            0o060_000 => NodeKind::BlockDevice,
            0o010_000 => NodeKind::Pipe,
            0o140_000 => NodeKind::Socket,
            _ => return None,
        })
    }

    /// The upper bits of a Unix mode.
    pub fn mode(self) -> u32 {
        match self {
            NodeKind::File => 0o100_000,
            NodeKind::Folder => 0o040_000,
            NodeKind::Link => 0o120_000,
            NodeKind::CharDevice => 0o020_000,
            NodeKind::BlockDevice => 0o060_000,
            NodeKind::Pipe => 0o010_000,
            NodeKind::Socket => 0o140_000,
        }
    }

    /// From what an entry of a folder has for it on Unix (`d_type`, as ext4, XFS and btrfs store it); `None` if it
    /// says nothing.
    pub(super) fn of_entry(byte: u8) -> Option<NodeKind> {
        Some(match byte {
            1 => NodeKind::File,
            2 => NodeKind::Folder,
            3 => NodeKind::CharDevice,
            4 => NodeKind::BlockDevice,
            5 => NodeKind::Pipe,
            6 => NodeKind::Socket,
            7 => NodeKind::Link,
            _ => return None,
        })
    }

    /// Fails unless something is of this kind, where only this kind will do. `found` is what it is, `named` how
    /// its file system calls it: `inode 12`.
    ///
    /// # Errors
    /// `Usage`.
    pub(super) fn only(self, found: Option<NodeKind>, named: fmt::Arguments<'_>) -> Result<()> {
        if found == Some(self) {
            return Ok(());
        }
        let what = match self {
            NodeKind::Folder => "no folder",
            NodeKind::Link => "not a symbolic link",
            _ => "not a regular file",
        };
        Err(Error::new(Kind::Usage, format!("{named} is {what}")))
    }

    /// As `ls -l` begins a line.
    pub fn letter(self) -> char {
        match self {
            NodeKind::File => '-',
            NodeKind::Folder => 'd',
            NodeKind::Link => 'l',
            NodeKind::CharDevice => 'c',
            NodeKind::BlockDevice => 'b',
            NodeKind::Pipe => 'p',
            NodeKind::Socket => 's',
        }
    }
}

/// The longest that a file can be: beyond that no program has an offset.
pub(super) const MAX_SIZE: u64 = i64::MAX as u64;

/// A time, before or after 1970.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time {
    /// Seconds since the epoch.
    pub seconds: i64,
    /// And nanoseconds, below 1,000,000,000.
    pub nanos: u32,
}

/// The numbers of a device node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Device {
    /// Which driver.
    pub major: u32,
    /// Which of its devices.
    pub minor: u32,
}

/// What else a file system says of a node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Flags {
    /// Contents (of a folder: names) are encrypted, and are not given.
    pub encrypted: bool,
    /// Contents are compressed on disk; they are given as they were written.
    pub compressed: bool,
    /// It cannot be changed (`chattr +i`).
    pub immutable: bool,
    /// It can only be appended to (`chattr +a`).
    pub append_only: bool,
    /// Its contents are sealed with fs-verity.
    pub verity: bool,
    /// Windows' read-only, hidden and system attributes.
    pub read_only: bool,
    /// See [`Flags::read_only`].
    pub hidden: bool,
    /// See [`Flags::read_only`].
    pub system: bool,
}

/// All that is known about a node but its contents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attributes {
    /// What it is.
    pub kind: NodeKind,
    /// Length in bytes.
    pub size: u64,
    /// Bytes that it takes on its disk.
    pub allocated: u64,
    /// Permissions with setuid, setgid and sticky: the lower 12 bits of a Unix mode. File systems without have
    /// 0755 for folders and 0644 for files (0444 for read-only ones).
    pub mode: u32,
    /// Its owner; 0 where there is none.
    pub uid: u32,
    /// Its group; 0 where there is none.
    pub gid: u32,
    /// How many names it has; 1 where that is not known.
    pub links: u64,
    /// When it was last read.
    pub atime: Time,
    /// When its contents were last changed.
    pub mtime: Time,
    /// When anything about it was last changed.
    pub ctime: Time,
    /// When it was made, where the file system knows.
    pub crtime: Option<Time>,
    /// The numbers of a device node.
    pub device: Option<Device>,
    /// What else is said.
    pub flags: Flags,
}

/// One name of a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The name: see the rules above.
    pub name: Vec<u8>,
    /// What it leads to.
    pub node: NodeId,
    /// What that is, where the folder says so.
    pub kind: Option<NodeKind>,
    /// Where reading goes on after it: for [`Tree::read_folder`]. Never 0, and larger than that of each
    /// entry before.
    pub next: u64,
}

/// An extended attribute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Xattr {
    /// Its name with its prefix: `user.comment`, `security.selinux`, `system.posix_acl_access` (then the value is
    /// what getxattr(2) gives).
    pub name: Vec<u8>,
    /// Its value.
    pub value: Vec<u8>,
}

/// A stretch of a file that is either data or a hole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stretch {
    /// How far it goes: an offset after the one that was asked about, at most the file's size.
    pub end: u64,
    /// Whether it reads as zeros and takes no space.
    pub hole: bool,
}

/// The contents of a plain file, opened: what a reader knows of it is kept for the next read.
pub trait OpenFile: Send + Sync {
    /// Length in bytes.
    fn size(&self) -> u64;

    /// Reads at most `buf.len()` bytes at `offset`; less only at the end of the file, or where something bad
    /// follows: the next read then fails.
    ///
    /// # Errors
    /// `Corrupt`, `Encrypted`, `Unsupported`, or what reading the point says.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize>;

    /// What is at `offset`, and how far it goes; `None` at the end of the file. Neighbouring stretches may be of
    /// the same kind.
    ///
    /// # Errors
    /// As [`OpenFile::read_at`].
    fn stretch(&self, offset: u64) -> Result<Option<Stretch>>;
}

/// What a file system says of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct Statistics {
    /// `ext4`, `xfs`, `ntfs`.
    pub kind: String,
    /// Its name, if it has one.
    pub label: String,
    /// Its UUID or serial number.
    pub uuid: String,
    /// Bytes of a block.
    pub block_size: u64,
    /// Bytes in all.
    pub total: u64,
    /// Bytes that are free.
    pub free: u64,
    /// Files and folders, where that is known.
    pub nodes: Option<u64>,
    /// How many more there may be, where that is known.
    pub free_nodes: Option<u64>,
    /// Features that the superblock names.
    pub features: Vec<String>,
}

/// A file system, open for reading.
pub trait Tree: Send + Sync {
    /// What it says of itself.
    fn statistics(&self) -> Statistics;

    /// What was found odd so far.
    fn findings(&self) -> &Findings;

    /// Its root folder.
    fn root(&self) -> NodeId;

    /// All that is known about a node.
    ///
    /// # Errors
    /// `NotFound` if there is none of this number; `Corrupt`, or what reading the point says.
    fn attributes(&self, node: NodeId) -> Result<Attributes>;

    /// The node that a folder has under this name, by its bytes; where the file system does not tell case, in any
    /// case. `None` if there is none.
    ///
    /// # Errors
    /// As [`Tree::read_folder`].
    fn lookup(&self, folder: NodeId, name: &[u8]) -> Result<Option<NodeId>> {
        let mut found = None;
        self.read_folder(folder, 0, &mut |entry| {
            if entry.name == name {
                found = Some(entry.node);
            }
            found.is_none()
        })?;
        Ok(found)
    }

    /// Calls `each` with the entries of a folder (without `.` and `..`), from `from` on, until it returns false:
    /// 0, or the `next` of the last entry that is not wanted again.
    ///
    /// # Errors
    /// `Usage` if it is no folder; `Encrypted`, `Corrupt`, or what reading the point says. What was right before
    /// that has been given.
    fn read_folder(
        &self,
        folder: NodeId,
        from: u64,
        each: &mut dyn FnMut(Entry) -> bool,
    ) -> Result<()>;

    /// Where a folder has its entries, in bytes of the file system: two folders that share some are not two. Nothing
    /// where that cannot be, as each block is checked to be its folder's.
    ///
    /// # Errors
    /// As [`Tree::read_folder`].
    fn folder_places(&self, folder: NodeId) -> Result<Vec<Range<u64>>> {
        let _ = folder;
        Ok(Vec::new())
    }

    /// Whether a folder itself says that it is in `parent`, and in no other. `None` where the file system notes no such
    /// thing: then only who goes through all of it can tell.
    ///
    /// # Errors
    /// As [`Tree::read_folder`].
    fn is_parent(&self, folder: NodeId, parent: NodeId) -> Result<Option<bool>> {
        let _ = (folder, parent);
        Ok(None)
    }

    /// Opens a plain file.
    ///
    /// # Errors
    /// `Usage` if it is none; `Encrypted`, `Corrupt`, or what reading the point says.
    fn open(&self, file: NodeId) -> Result<Box<dyn OpenFile>>;

    /// The text of a symbolic link: at most 64 KiB, and not followed.
    ///
    /// # Errors
    /// `Usage` if it is none; `Encrypted`, `Corrupt`, or what reading the point says.
    fn read_link(&self, link: NodeId) -> Result<Vec<u8>>;

    /// Its extended attributes: each value at most 64 KiB.
    ///
    /// # Errors
    /// `Corrupt`, or what reading the point says.
    fn xattrs(&self, node: NodeId) -> Result<Vec<Xattr>> {
        let _ = node;
        Ok(Vec::new())
    }
}

/// Whether these bytes are a name that a folder may have. Lengths are up to the file system.
pub(super) fn is_name(name: &[u8]) -> bool {
    !name.is_empty() && name != b"." && name != b".." && !name.iter().any(|b| matches!(b, b'/' | 0))
}
