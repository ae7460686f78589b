//! FUSE: the only file that names `fuser`.
//!
//! Each operation is one small method that calls [`FileSystem`] and replies. A panic inside one
//! request becomes EIO for that request (fuser answers for a reply that is dropped) and a line in
//! the log; the mount goes on. Notifications to the kernel are sent by [`Notify`] from a thread
//! that serves no requests, because the kernel may wait for a request while it handles one.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use fuser::{
    AccessFlags, BackgroundSession, BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType,
    Filesystem, FopenFlags, Generation, INodeNo, InitFlags, KernelConfig, LockOwner, MountOption,
    Notifier, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory,
    ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite,
    ReplyXattr, Request, Session, SessionACL, TimeOrNow, WriteFlags,
};

use crate::error::{Error, Kind, Result};
use crate::fs::attr::Attr;
use crate::fs::tree::{Changes, EntryKind, Node};
use crate::fs::{self, FileSystem, Listed};

/// How long the kernel may trust a name or attributes. A refresh tells it what changed, so this
/// only bounds what a reply that crossed a refresh can do.
const TTL: Duration = Duration::from_secs(1);
/// The largest request; also the most that current kernels send at once.
const MAX_REQUEST: u32 = 1 << 20;
/// Read-ahead and other background requests in flight.
const MAX_BACKGROUND: u16 = 64;
/// The block size in `statfs`.
const BLOCK: u32 = 4096;

/// Who may use the mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Only the user who mounts.
    Owner,
    /// That user and root.
    Root,
    /// Everybody whom the permission bits let.
    Everybody,
}

/// How to mount.
#[derive(Debug, Clone)]
pub struct Options {
    /// Who may use it.
    pub access: Access,
    /// Threads that serve requests, at least 1.
    pub threads: usize,
    /// What `mount` shows as the source.
    pub source: String,
}

/// A mounted file system. It ends when it is unmounted.
pub struct Mounted {
    session: BackgroundSession,
}

/// Tells the kernel what to forget.
pub struct Notify(Notifier);

/// Mounts `fs` at `mountpoint` and serves it in background threads.
///
/// # Errors
/// The kernel or fusermount refuses.
pub fn mount(fs: Arc<FileSystem>, mountpoint: &Path, options: &Options) -> Result<Mounted> {
    let failed = |e: io::Error| mount_error(e, mountpoint);
    let adapter = Adapter { fs };
    let session = Session::new(adapter, mountpoint, &config(options)).map_err(failed)?;
    Ok(Mounted { session: session.spawn().map_err(failed)? })
}

fn config(options: &Options) -> Config {
    let mut config = Config::default();
    // Only the direct way of mounting takes the name as it is; fusermount splits at commas.
    let escaped = options.source.replace('\\', "\\\\").replace(',', "\\,");
    // SAFETY: geteuid cannot fail.
    let root = unsafe { libc::geteuid() } == 0;
    config.mount_options = vec![
        MountOption::FSName(if root { options.source.clone() } else { escaped }),
        // Not `Subtype`, which the direct way of mounting drops.
        MountOption::CUSTOM("subtype=fleecefs".into()),
        MountOption::DefaultPermissions,
        MountOption::RO,
        MountOption::NoDev,
        MountOption::NoSuid,
        MountOption::NoAtime,
    ];
    config.acl = match options.access {
        Access::Owner => SessionACL::Owner,
        Access::Root => SessionACL::RootAndOwner,
        Access::Everybody => SessionACL::All,
    };
    config.n_threads = Some(options.threads.max(1));
    config.clone_fd = true;
    config
}

fn mount_error(e: io::Error, mountpoint: &Path) -> Error {
    let kind = e.raw_os_error();
    let error = Error::io(e, "cannot mount here").at_path(mountpoint);
    match kind {
        Some(libc::ENOENT | libc::ENODEV) => {
            error.remedy("is the fuse module loaded, and is there a /dev/fuse?")
        }
        Some(libc::EACCES | libc::EPERM) => {
            error.remedy("users need fusermount3 (package fuse3) and access to /dev/fuse")
        }
        _ => error,
    }
}

impl Mounted {
    /// What tells the kernel about changes.
    pub fn notifier(&self) -> Notify {
        Notify(self.session.notifier())
    }

    /// Whether all is over.
    pub fn has_ended(&self) -> bool {
        self.session.guard.is_finished()
    }

    /// Waits until it is unmounted.
    ///
    /// # Errors
    /// The connection to the kernel broke in an unforeseen way.
    pub fn wait(self) -> Result<()> {
        let guard: JoinHandle<io::Result<()>> = self.session.guard;
        match guard.join() {
            Ok(ended) => ended.map_err(|e| Error::io(e, "serving the mount failed")),
            Err(_) => Err(Error::new(Kind::Io, "a thread that served the mount panicked")),
        }
    }
}

impl Notify {
    /// Tells the kernel. What it does not know it cannot forget: such errors mean nothing.
    pub fn tell(&self, changes: &Changes) {
        for ino in &changes.inodes {
            let _ = self.0.inval_inode(INodeNo(*ino), 0, 0);
        }
        for (parent, name) in &changes.entries {
            let _ = self.0.inval_entry(INodeNo(*parent), name);
        }
    }
}

/// What fuser calls.
struct Adapter {
    fs: Arc<FileSystem>,
}

thread_local! {
    /// Each serving thread's buffer; grows to the largest request and stays.
    static BUFFER: RefCell<fs::buffer::Buffer> = const { RefCell::new(fs::buffer::Buffer::new()) };
}

fn errno(e: fs::Errno) -> Errno {
    Errno::from_i32(e)
}

fn file_type(kind: EntryKind) -> FileType {
    match kind {
        EntryKind::Dir => FileType::Directory,
        EntryKind::File => FileType::RegularFile,
        EntryKind::Link => FileType::Symlink,
    }
}

fn file_attr(a: &Attr) -> FileAttr {
    FileAttr {
        ino: INodeNo(a.ino),
        size: a.size,
        blocks: a.blocks,
        atime: a.time,
        mtime: a.time,
        ctime: a.time,
        crtime: a.time,
        kind: file_type(a.kind),
        perm: a.perm,
        nlink: a.nlink,
        uid: a.uid,
        gid: a.gid,
        rdev: 0,
        blksize: BLOCK,
        flags: 0,
    }
}

impl Adapter {
    /// Runs one operation; a panic ends that operation only. The reply it took along is dropped
    /// on the way, which answers EIO.
    fn guard(&self, what: &str, operation: impl FnOnce(&FileSystem)) {
        self.fs.touch();
        if catch_unwind(AssertUnwindSafe(|| operation(&self.fs))).is_err() {
            log::error!("a {what} request panicked; it was answered with an input/output error");
        }
    }

    fn node_attr(&self, node: &Node) -> FileAttr {
        file_attr(&self.fs.attr(node))
    }
}

/// Answers with the value, its length, or ERANGE, as `getxattr` and `listxattr` want it.
fn reply_xattr(value: fs_result::Bytes, size: u32, reply: ReplyXattr) {
    match value {
        Err(e) => reply.error(errno(e)),
        Ok(v) if size == 0 => reply.size(u32::try_from(v.len()).unwrap_or(u32::MAX)),
        Ok(v) if v.len() > size as usize => reply.error(Errno::ERANGE),
        Ok(v) => reply.data(&v),
    }
}

mod fs_result {
    pub type Bytes = std::result::Result<Vec<u8>, super::fs::Errno>;
}

impl Filesystem for Adapter {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Each is a wish: an older kernel goes without.
        for wish in [
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_READDIRPLUS_AUTO,
            InitFlags::FUSE_CACHE_SYMLINKS,
        ] {
            let _ = config.add_capabilities(wish);
        }
        let _ = config.set_max_write(MAX_REQUEST);
        if let Err(most) = config.set_max_readahead(4 * MAX_REQUEST) {
            let _ = config.set_max_readahead(most);
        }
        let _ = config.set_max_background(MAX_BACKGROUND);
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        self.guard("lookup", |fs| match fs.lookup(parent.0, name) {
            Ok(node) => reply.entry(&TTL, &self.node_attr(&node), Generation(0)),
            Err(e) => reply.error(errno(e)),
        });
    }

    fn forget(&self, _req: &Request, ino: INodeNo, nlookup: u64) {
        let forgotten = catch_unwind(AssertUnwindSafe(|| self.fs.forget(ino.0, nlookup)));
        if forgotten.is_err() {
            log::error!("a forget request panicked");
        }
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, fh: Option<FileHandle>, reply: ReplyAttr) {
        self.guard("getattr", |fs| match fs.getattr(ino.0, fh.map(|h| h.0)) {
            Ok(attr) => reply.attr(&TTL, &file_attr(&attr)),
            Err(e) => reply.error(errno(e)),
        });
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        self.guard("readlink", |fs| match fs.readlink(ino.0) {
            Ok(target) => reply.data(target.as_os_str().as_bytes()),
            Err(e) => reply.error(errno(e)),
        });
    }

    fn open(&self, _req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        self.guard("open", |fs| match fs.open(ino.0, flags.0) {
            // Another generation is another inode, so cached pages are right for as long as
            // the kernel has them.
            Ok((fh, true)) => reply
                .opened(FileHandle(fh), FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_NOFLUSH),
            Ok((fh, false)) => reply.opened(FileHandle(fh), FopenFlags::FOPEN_DIRECT_IO),
            Err(e) => reply.error(errno(e)),
        });
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
        self.guard("read", |fs| {
            BUFFER.with_borrow_mut(|buffer| {
                let size = size.min(MAX_REQUEST) as usize;
                let buffer = buffer.get(size);
                if buffer.len() < size {
                    return reply.error(errno(libc::ENOMEM));
                }
                match fs.read(fh.0, offset, buffer) {
                    Ok(n) => reply.data(&buffer[..n]),
                    Err(e) => reply.error(errno(e)),
                }
            });
        });
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
        self.guard("lseek", |fs| match fs.seek(fh.0, offset, whence) {
            Ok(at) => reply.offset(at),
            Err(e) => reply.error(errno(e)),
        });
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
        self.guard("release", |fs| {
            fs.release(fh.0);
            reply.ok();
        });
    }

    fn fsync(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        reply.ok();
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
        self.guard("opendir", |fs| match fs.opendir(ino.0) {
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
        self.guard("readdir", |fs| {
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
        self.guard("readdirplus", |fs| {
            let add = |e: Listed, next| {
                let attr = match &e.node {
                    Some(node) => self.node_attr(node),
                    None => dot_attr(e.ino),
                };
                let ino = INodeNo(e.ino);
                let full = reply.add(ino, next, &e.name, &TTL, &attr, Generation(0));
                // The kernel counts each name that it gets as a lookup, but `.` and `..`.
                if let Some(node) = e.node.as_ref().filter(|_| !full) {
                    fs.remember(node);
                }
                !full
            };
            match fs.readdir(fh.0, offset, add) {
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
        self.guard("releasedir", |fs| {
            fs.releasedir(fh.0);
            reply.ok();
        });
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        let space = self.fs.space();
        let blocks = space.used.div_ceil(u64::from(BLOCK));
        reply.statfs(blocks, 0, 0, space.files, 0, BLOCK, 255, BLOCK);
    }

    fn getxattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        self.guard("getxattr", |fs| reply_xattr(fs.getxattr(ino.0, name), size, reply));
    }

    fn listxattr(&self, _req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        self.guard("listxattr", |fs| reply_xattr(fs.listxattr(ino.0), size, reply));
    }

    fn access(&self, _req: &Request, _ino: INodeNo, mask: AccessFlags, reply: ReplyEmpty) {
        // The kernel checks permissions itself (default_permissions); this is for safety.
        if mask.contains(AccessFlags::W_OK) {
            reply.error(Errno::EROFS);
        } else {
            reply.ok();
        }
    }

    fn setattr(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        _size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        reply.error(Errno::EROFS);
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
        _fh: FileHandle,
        _offset: u64,
        _data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        reply.error(Errno::EROFS);
    }

    fn fallocate(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _offset: u64,
        _length: u64,
        _mode: i32,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EROFS);
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

/// `.` and `..` in a listing: the kernel looks at number and type alone.
fn dot_attr(ino: u64) -> FileAttr {
    file_attr(&Attr {
        ino,
        size: 0,
        blocks: 0,
        time: SystemTime::UNIX_EPOCH,
        kind: EntryKind::Dir,
        perm: 0o500,
        nlink: 2,
        uid: 0,
        gid: 0,
    })
}
