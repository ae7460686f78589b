//! What FUSE itself allows: files of zeros, served with the settings of `fleecefs mount`.
//!
//! `contrib/bench` reads them beside a mount: `zeros MOUNTPOINT BYTES` serves eight files, `0` to `7`, until it
//! is unmounted. A read costs what fuser and the kernel take, and nothing else.

use std::ffi::OsStr;
use std::io;
use std::path::Path;
use std::time::{Duration, SystemTime};

use fleecefs::fuse::{self, Access, Options};
use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEntry, ReplyOpen, Request,
    Session,
};

const TTL: Duration = Duration::from_secs(1);
/// The root's number; those of the files follow.
const ROOT: u64 = 1;
const FILES: u64 = 8;
static ZEROS: [u8; 1 << 20] = [0; 1 << 20];

struct Zeros {
    size: u64,
}

impl Zeros {
    fn attr(&self, ino: u64) -> FileAttr {
        let (kind, perm, size) = match ino {
            ROOT => (FileType::Directory, 0o555, 0),
            _ => (FileType::RegularFile, 0o444, self.size),
        };
        let time = SystemTime::UNIX_EPOCH;
        FileAttr {
            ino: INodeNo(ino),
            size,
            blocks: size / 512,
            atime: time,
            mtime: time,
            ctime: time,
            crtime: time,
            kind,
            perm,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

impl Filesystem for Zeros {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        fuse::negotiate(config);
        Ok(())
    }

    fn lookup(&self, _req: &Request, _parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match name.to_str().and_then(|n| n.parse::<u64>().ok()).filter(|n| *n < FILES) {
            Some(n) => reply.entry(&TTL, &self.attr(ROOT + 1 + n), Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &self.attr(ino.0));
    }

    fn open(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let flags = FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_NOFLUSH;
        reply.opened(FileHandle(0), flags);
    }

    fn read(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let left = usize::try_from(self.size.saturating_sub(offset)).unwrap_or(usize::MAX);
        reply.data(&ZEROS[..left.min(size as usize).min(ZEROS.len())]);
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().collect();
    let [_, mountpoint, size] = args.as_slice() else {
        return Err("usage: zeros MOUNTPOINT BYTES".into());
    };
    let threads = fuse::default_threads();
    let options = Options { access: Access::Owner, threads, source: "zeros".into() };
    let zeros = Zeros { size: size.parse()? };
    let session = Session::new(zeros, Path::new(mountpoint), &fuse::config(&options))?;
    Ok(session.spawn()?.guard.join().map_err(|_| "a serving thread panicked")??)
}
