//! What FUSE allows a server whose bytes come from a file: one `pread` and one reply for each read, with the
//! settings of `fleecefs mount`, its threads and its buffers.
//!
//! `contrib/bench` reads it beside a mount: `plain MOUNTPOINT FILE BYTES` serves eight files, `0` to `7`, of so
//! many bytes, which are those of FILE over and over, until it is unmounted.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use fleecefs::fs::buffer::Buffer;
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

thread_local! {
    static BUFFER: RefCell<Buffer> = const { RefCell::new(Buffer::new()) };
}

struct Plain {
    file: File,
    /// Bytes of `file`.
    len: u64,
    /// Bytes of what is served.
    size: u64,
}

impl Plain {
    fn fill(&self, mut buf: &mut [u8], mut at: u64) -> io::Result<()> {
        while !buf.is_empty() {
            let n = self.file.read_at(buf, at % self.len)?;
            buf = &mut buf[n..];
            at += n as u64;
        }
        Ok(())
    }

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

impl Filesystem for Plain {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        fuse::negotiate(config, false);
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
        BUFFER.with_borrow_mut(|buffer| {
            let buf = buffer.get(left.min(size as usize));
            match self.fill(buf, offset) {
                Ok(()) => reply.data(buf),
                Err(_) => reply.error(Errno::EIO),
            }
        });
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().collect();
    let [_, mountpoint, file, size] = args.as_slice() else {
        return Err("usage: plain MOUNTPOINT FILE BYTES".into());
    };
    let file = File::open(file)?;
    let plain = Plain { len: file.metadata()?.len(), file, size: size.parse()? };
    if plain.len == 0 {
        return Err("the file is empty".into());
    }
    let threads = fuse::default_threads();
    let source = "plain".into();
    let options = Options { access: Access::Owner, threads, source, writable: false };
    let session = Session::new(plain, Path::new(mountpoint), &fuse::config(&options))?;
    Ok(session.spawn()?.guard.join().map_err(|_| "a serving thread panicked")??)
}
