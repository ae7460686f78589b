//! What replies are made of, in fuser's types.

use std::time::SystemTime;

use fuser::{Errno, FileAttr, FileType, INodeNo, ReplyEmpty, ReplyXattr};

use crate::fs;
use crate::fs::attr::{Attr, Times};
use crate::fs::tree::EntryKind;

/// The block size in `statfs`.
pub(super) const BLOCK: u32 = 4096;

pub(super) fn errno(e: fs::Errno) -> Errno {
    Errno::from_i32(e)
}

pub(super) fn file_type(kind: EntryKind) -> FileType {
    match kind {
        EntryKind::Dir => FileType::Directory,
        EntryKind::File => FileType::RegularFile,
        EntryKind::Link => FileType::Symlink,
        EntryKind::CharDevice => FileType::CharDevice,
        EntryKind::BlockDevice => FileType::BlockDevice,
        EntryKind::Pipe => FileType::NamedPipe,
        EntryKind::Socket => FileType::Socket,
    }
}

pub(super) fn file_attr(a: &Attr) -> FileAttr {
    FileAttr {
        ino: INodeNo(a.ino),
        size: a.size,
        blocks: a.blocks,
        atime: a.times.access,
        mtime: a.times.modification,
        ctime: a.times.change,
        crtime: a.times.modification,
        kind: file_type(a.kind),
        perm: a.perm,
        nlink: a.nlink,
        uid: a.uid,
        gid: a.gid,
        rdev: a.rdev,
        blksize: BLOCK,
        flags: 0,
    }
}

/// Answers that it was done, or why not.
pub(super) fn reply_empty(done: Result<(), fs::Errno>, reply: ReplyEmpty) {
    match done {
        Ok(()) => reply.ok(),
        Err(e) => reply.error(errno(e)),
    }
}

/// Answers with the value, its length, or ERANGE, as `getxattr` and `listxattr` want it.
pub(super) fn reply_xattr(value: Result<Vec<u8>, fs::Errno>, size: u32, reply: ReplyXattr) {
    match value {
        Err(e) => reply.error(errno(e)),
        Ok(v) if size == 0 => reply.size(u32::try_from(v.len()).unwrap_or(u32::MAX)),
        Ok(v) if v.len() > size as usize => reply.error(Errno::ERANGE),
        Ok(v) => reply.data(&v),
    }
}

/// `.` and `..` in a listing: the kernel looks at number and type alone. With number 0 it asks again, for an entry whose
/// attributes cannot be read.
pub(super) fn dot_attr(ino: u64) -> FileAttr {
    file_attr(&Attr {
        ino,
        size: 0,
        blocks: 0,
        times: Times::all(SystemTime::UNIX_EPOCH),
        kind: EntryKind::Dir,
        perm: 0o500,
        nlink: 2,
        uid: 0,
        gid: 0,
        rdev: 0,
    })
}
