//! What fuser calls: each operation is one small method that calls [`FileSystem`] and replies.
//!
//! A panic inside one request becomes EIO for that request (fuser answers for a reply that is
//! dropped) and a line in the log; the mount goes on. What may take long, reading from an archive
//! that has to be unpacked first or searching far for data or a hole, is done by threads of its own
//! ([`SlowPool`]): those that serve requests never wait for it. Other reads are done where they arrive, which
//! is the fastest, but by all threads but one: storage may not answer, and names and attributes need
//! none ([`Readers`]).

use std::cell::RefCell;
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fuser::{
    AccessFlags, BsdFileFlags, Errno, FileAttr, FileHandle, Filesystem, FopenFlags, Generation,
    INodeNo, KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs,
    ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};

use super::negotiate::{MAX_REQUEST, negotiate};
use super::reply::{BLOCK, dot_attr, errno, file_attr, file_type, reply_empty, reply_xattr};
use crate::fs::readers::Readers;
use crate::fs::slow_pool::SlowPool;
use crate::fs::tree::{Node, NodeKind, ROOT};
use crate::fs::{self, FileSystem, Listed, WaitsFor};

/// How long the kernel may trust a name or attributes. A refresh tells it what changed, so this
/// only bounds what a reply that crossed a refresh can do.
const TTL: Duration = Duration::from_secs(1);

/// The same for what is inside a point, which never changes: another generation has other numbers.
const TTL_INSIDE: Duration = Duration::from_secs(3600);

/// The file system as fuser sees it.
pub(super) struct Adapter {
    fs: Arc<FileSystem>,
    slow_pool: Arc<SlowPool>,
    readers: Readers,
}

thread_local! {
    /// Each serving thread's buffer; grows to the largest request and stays.
    static BUFFER: RefCell<fs::buffer::Buffer> = const { RefCell::new(fs::buffer::Buffer::new()) };
}

/// Runs one operation; a panic ends that operation only. The reply it took along is dropped on the
/// way, which answers EIO.
fn guard(fs: &FileSystem, what: &str, operation: impl FnOnce(&FileSystem)) {
    fs.touch();
    if catch_unwind(AssertUnwindSafe(|| operation(fs))).is_err() {
        log::error!(
            "internal error in a {what} request; it was answered with an input/output \
                     error"
        );
    }
}

fn read(fs: &FileSystem, handle: u64, offset: u64, size: u32, reply: ReplyData) {
    BUFFER.with_borrow_mut(|buffer| {
        let size = size.min(MAX_REQUEST) as usize;
        let buffer = buffer.get(size);
        if buffer.len() < size {
            log::error!("no memory for a read of {size} bytes");
            return reply.error(Errno::EIO);
        }
        match fs.read(handle, offset, buffer) {
            Ok(n) => reply.data(&buffer[..n]),
            Err(e) => reply.error(errno(e)),
        }
    });
}

/// Where a search begins, by handle and offset, and what for.
type Start = (u64, i64, i32);

fn seek(fs: &FileSystem, (handle, offset, whence): Start, reply: ReplyLseek) {
    match fs.seek(handle, offset, whence) {
        Ok(at) => reply.offset(at),
        Err(e) => reply.error(errno(e)),
    }
}

/// The same where the answer is near; by another thread over a disk of millions of tables.
fn seek_near(fs: &Arc<FileSystem>, slow_pool: &Arc<SlowPool>, from: Start, reply: ReplyLseek) {
    let (handle, offset, whence) = from;
    guard(fs, "lseek", |near| match near.seek_near(handle, offset, whence) {
        Ok(Some(at)) => reply.offset(at),
        Err(e) => reply.error(errno(e)),
        Ok(None) => {
            let fs = fs.clone();
            slow_pool.run(Box::new(move || guard(&fs, "lseek", |fs| seek(fs, from, reply))));
        }
    });
}

impl Adapter {
    /// Serves `fs`; so many threads may read at a time.
    pub(super) fn new(fs: Arc<FileSystem>, readers: usize) -> Self {
        let slow_pool = Arc::<SlowPool>::default();
        Adapter { fs, slow_pool: slow_pool.clone(), readers: Readers::new(readers, slow_pool) }
    }

    fn guard(&self, what: &str, operation: impl FnOnce(&FileSystem)) {
        guard(&self.fs, what, operation);
    }

    /// The same for what asks storage: by this thread as long as another is left for names.
    fn guard_storage(
        &self,
        what: &'static str,
        operation: impl FnOnce(&FileSystem) + Send + 'static,
    ) {
        self.readers.run(&self.fs, move |fs| guard(fs, what, operation));
    }

    /// The same by a thread that may be kept waiting.
    fn guard_slow(&self, what: &'static str, operation: impl FnOnce(&FileSystem) + Send + 'static) {
        let fs = self.fs.clone();
        self.slow_pool.run(Box::new(move || guard(&fs, what, operation)));
    }

    /// By whichever of the three fits what it waits for.
    fn guard_waiting(
        &self,
        waits: WaitsFor,
        what: &'static str,
        operation: impl FnOnce(&FileSystem) + Send + 'static,
    ) {
        match waits {
            WaitsFor::No => self.guard(what, operation),
            WaitsFor::Storage => self.guard_storage(what, operation),
            WaitsFor::Long => self.guard_slow(what, operation),
        }
    }
}

fn ttl(node: &Node) -> &'static Duration {
    match node.kind {
        NodeKind::Inside(_) => &TTL_INSIDE,
        _ => &TTL,
    }
}

fn lookup(fs: &FileSystem, parent: u64, name: &OsStr, reply: ReplyEntry) {
    let node = match fs.lookup(parent, name) {
        Ok(node) => node,
        Err(e) => return reply.error(errno(e)),
    };
    match fs.named_attr(&node, name) {
        Ok(attr) => reply.entry(ttl(&node), &file_attr(&attr), Generation(0)),
        Err(e) => {
            fs.forget(node.ino, 1);
            reply.error(errno(e));
        }
    }
}

/// Adds an entry with its attributes; false if there is no space for it.
fn add_plus(fs: &FileSystem, reply: &mut ReplyDirectoryPlus, e: &Listed, next: u64) -> bool {
    // What cannot be read is listed all the same: whoever looks at it asks again, and is told why. The kernel lists a name
    // with the root's number, and takes it for nothing that it knows; one with 0 is not listed.
    let node = e.node.as_ref();
    let attr = node.and_then(|n| Some((n, fs.named_attr(n, &e.name).ok()?)));
    // The kernel counts each name that it gets with a number as a lookup, but `.` and `..`.
    let known = attr.filter(|(n, _)| fs.remember(n));
    let (attr, ttl) = match (&known, node) {
        (Some((n, attr)), _) => (file_attr(attr), ttl(n)),
        (None, None) => (dot_attr(e.ino), &TTL),
        (None, Some(_)) => (FileAttr { kind: file_type(e.kind), ..dot_attr(ROOT) }, &TTL),
    };
    let full = reply.add(INodeNo(e.ino), next, &e.name, ttl, &attr, Generation(0));
    if let Some((node, _)) = known.filter(|_| full) {
        fs.forget(node.ino, 1);
    }
    !full
}

impl Filesystem for Adapter {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        negotiate(config, self.fs.obeys_access_lists());
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.fs.waits_below(parent.0) {
            WaitsFor::No => self.guard("lookup", |fs| lookup(fs, parent.0, name, reply)),
            waits => {
                let name = name.to_os_string();
                let lookup = move |fs: &FileSystem| lookup(fs, parent.0, &name, reply);
                self.guard_waiting(waits, "lookup", lookup);
            }
        }
    }

    fn forget(&self, _req: &Request, ino: INodeNo, nlookup: u64) {
        let forgotten = catch_unwind(AssertUnwindSafe(|| self.fs.forget(ino.0, nlookup)));
        if forgotten.is_err() {
            log::error!("a forget request panicked");
        }
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, fh: Option<FileHandle>, reply: ReplyAttr) {
        let waits = self.fs.waits_inside(ino.0);
        let ttl = if waits == WaitsFor::No { &TTL } else { &TTL_INSIDE };
        self.guard_waiting(waits, "getattr", move |fs| match fs.getattr(ino.0, fh.map(|h| h.0)) {
            Ok(attr) => reply.attr(ttl, &file_attr(&attr)),
            Err(e) => reply.error(errno(e)),
        });
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        let waits = self.fs.waits_inside(ino.0);
        self.guard_waiting(waits, "readlink", move |fs| match fs.readlink(ino.0) {
            Ok(target) => reply.data(target.as_os_str().as_bytes()),
            Err(e) => reply.error(errno(e)),
        });
    }

    fn open(&self, _req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        // What was written by way of a map is told to us, and its errors to whoever closes it.
        let reads = flags.0 & libc::O_ACCMODE == libc::O_RDONLY;
        let flush = if reads { FopenFlags::FOPEN_NOFLUSH } else { FopenFlags::empty() };
        let open = move |fs: &FileSystem| match fs.open(ino.0, flags.0) {
            // Another generation is another inode, so cached pages are right for as long as
            // the kernel has them.
            Ok((fh, true)) => {
                reply.opened(FileHandle(fh), FopenFlags::FOPEN_KEEP_CACHE | flush);
            }
            Ok((fh, false)) => reply.opened(FileHandle(fh), FopenFlags::FOPEN_DIRECT_IO),
            Err(e) => reply.error(errno(e)),
        };
        match self.fs.opens_storage(ino.0) {
            true => self.guard_storage("open", open),
            false => self.guard_waiting(self.fs.waits_inside(ino.0), "open", open),
        }
    }

    fn read(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let read = move |fs: &FileSystem| read(fs, fh.0, offset, size, reply);
        match self.fs.waits_for(fh.0, offset, u64::from(size)) {
            WaitsFor::No => self.guard("read", read),
            WaitsFor::Storage => self.guard_storage("read", read),
            WaitsFor::Long => self.guard_slow("read", read),
        }
    }

    fn lseek(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let from = (fh.0, offset, whence);
        match self.fs.waits_for(fh.0, u64::try_from(offset).unwrap_or(0), u64::MAX) {
            WaitsFor::No => self.guard("lseek", |fs| seek(fs, from, reply)),
            WaitsFor::Long => self.guard_slow("lseek", move |fs| seek(fs, from, reply)),
            WaitsFor::Storage => {
                let slow_pool = self.slow_pool.clone();
                self.readers.run(&self.fs, move |fs| seek_near(fs, &slow_pool, from, reply));
            }
        }
    }

    fn flush(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }

    fn release(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        // Closing files may take as long as reading them.
        let release = move |fs: &FileSystem| {
            fs.release(fh.0);
            reply.ok();
        };
        match self.fs.reads_storage(fh.0) {
            true => self.guard_storage("release", release),
            false => self.guard("release", release),
        }
    }

    fn fsync(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        // A disk takes its time.
        self.guard_slow("fsync", move |fs| reply_empty(fs.sync(fh.0), reply));
    }

    fn fsyncdir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }

    fn opendir(&self, _req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let waits = self.fs.waits_below(ino.0);
        self.guard_waiting(waits, "opendir", move |fs| match fs.opendir(ino.0) {
            Ok(fh) => reply.opened(FileHandle(fh), FopenFlags::empty()),
            Err(e) => reply.error(errno(e)),
        });
    }

    fn readdir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        self.guard_waiting(self.fs.waits_for_names(fh.0), "readdir", move |fs| {
            let add =
                |e: Listed, next| !reply.add(INodeNo(e.ino), next, file_type(e.kind), &e.name);
            match fs.readdir(fh.0, offset, add) {
                Ok(()) => reply.ok(),
                Err(e) => reply.error(errno(e)),
            }
        });
    }

    fn readdirplus(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        self.guard_waiting(self.fs.waits_for_names(fh.0), "readdirplus", move |fs| {
            match fs.readdir(fh.0, offset, |e, next| add_plus(fs, &mut reply, &e, next)) {
                Ok(()) => reply.ok(),
                Err(e) => reply.error(errno(e)),
            }
        });
    }

    fn releasedir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.guard_waiting(self.fs.waits_for_names(fh.0), "releasedir", move |fs| {
            fs.releasedir(fh.0);
            reply.ok();
        });
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        let space = self.fs.space(&self.slow_pool);
        let blocks = |bytes: u64| bytes / u64::from(BLOCK);
        let (used, free) = (space.used.div_ceil(u64::from(BLOCK)), blocks(space.room.free));
        let all = used.saturating_add(free);
        reply.statfs(all, free, blocks(space.room.available), space.files, 0, BLOCK, 255, BLOCK);
    }

    fn getxattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        match self.fs.waits_inside(ino.0) {
            WaitsFor::No => {
                self.guard("getxattr", |fs| reply_xattr(fs.getxattr(ino.0, name), size, reply));
            }
            waits => {
                let name = name.to_os_string();
                let get = move |fs: &FileSystem| {
                    reply_xattr(fs.getxattr(ino.0, &name), size, reply);
                };
                self.guard_waiting(waits, "getxattr", get);
            }
        }
    }

    fn listxattr(&self, _req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        let list = move |fs: &FileSystem| reply_xattr(fs.listxattr(ino.0), size, reply);
        self.guard_waiting(self.fs.waits_inside(ino.0), "listxattr", list);
    }

    fn access(&self, _req: &Request, _ino: INodeNo, mask: AccessFlags, reply: ReplyEmpty) {
        // The kernel checks permissions itself (default_permissions); this is for safety.
        if mask.contains(AccessFlags::W_OK) {
            reply.error(errno(self.fs.unchangeable()));
        } else {
            reply.ok();
        }
    }

    fn setattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let others = mode.or(uid).or(gid).is_some();
        let times = [atime, mtime].iter().flatten().any(|t| !matches!(t, TimeOrNow::Now));
        match size.filter(|_| !others && !times) {
            Some(size) => self.guard("setattr", |fs| match fs.resize(ino.0, size) {
                Ok(attr) => reply.attr(&TTL, &file_attr(&attr)),
                Err(e) => reply.error(errno(e)),
            }),
            None => reply.error(errno(self.fs.unchangeable())),
        }
    }

    fn mknod(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EROFS);
    }

    fn mkdir(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EROFS);
    }

    fn unlink(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn rmdir(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn symlink(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _target: &Path,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EROFS);
    }

    fn rename(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _newparent: INodeNo,
        _newname: &OsStr,
        _flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EROFS);
    }

    fn link(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _newparent: INodeNo,
        _newname: &OsStr,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EROFS);
    }

    fn create(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        reply.error(Errno::EROFS);
    }

    fn write(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        // Another thread may have to do it, and this one's buffer is the next request's then.
        let data = data.to_vec();
        let waits = self.fs.write_waits_for(fh.0, offset, data.len() as u64);
        self.guard_waiting(waits, "write", move |fs| {
            match fs.write(fh.0, offset, &data, flags.0) {
                // A request has at most some megabytes.
                Ok(n) => reply.written(u32::try_from(n).unwrap_or(u32::MAX)),
                Err(e) => reply.error(errno(e)),
            }
        });
    }

    fn fallocate(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let allocate = move |fs: &FileSystem| {
            reply_empty(fs.allocate(fh.0, offset, length, mode), reply);
        };
        // A whole disk may be discarded at once.
        self.guard_slow("fallocate", allocate);
    }

    fn setxattr(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _name: &OsStr,
        _value: &[u8],
        _flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EROFS);
    }

    fn removexattr(&self, _req: &Request, _ino: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }
}
