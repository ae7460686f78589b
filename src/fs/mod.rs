//! The file system behind the mount point, without FUSE itself.
//!
//! State:
//! - the current [`Tree`], swapped as a whole by [`FileSystem::install`];
//! - `known`: inodes that the kernel holds, each with its node, so that an inode of an earlier tree
//!   works until the kernel forgets it;
//! - open files and folders ([`handle::Handles`]), each holding what it was opened on.
//!
//! A read goes from its handle to the image: it takes no lock, allocates nothing here and never
//! looks at the tree. So a refresh cannot disturb it, and its file stays the generation that was
//! opened. `known` is locked briefly by lookups and forgets, and by nobody for longer.

pub mod attr;
pub mod buffer;
pub(crate) mod control;
mod guest_files;
pub(crate) mod handle;
mod idle_threads;
mod inside;
pub(crate) mod names;
mod node;
mod number;
mod open_point;
pub(crate) mod point;
pub mod readers;
mod root_watch;
mod seek;
pub(crate) mod slow_pool;
pub(crate) mod space;
pub mod tree;
pub mod watch;
mod writing;

use std::collections::HashMap;
use std::ffi::OsStr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use arc_swap::ArcSwap;

use crate::chain::Catalog;
use crate::error::{Error, Kind};
use crate::image::{Cache, Image};
use crate::overlay::Overlays;
use crate::view;
use attr::{Attr, Owner};
use control::{Running, Writable};
use handle::Handles;
pub use inside::Inside;
use open_point::OpenPoint;
use slow_pool::SlowPool;
use space::{DiskSpace, Free};
use tree::{Changes, EntryKind, Node, NodeKind, ROOT, Tree};
use watch::{Mode, Waker};

/// An errno, as the kernel wants it.
pub type Errno = i32;

/// Statistics for `statfs`.
#[derive(Debug, Clone, Copy)]
pub struct Space {
    /// Bytes that the backups take on disk.
    pub used: u64,
    /// Bytes that are free there.
    pub room: DiskSpace,
    /// Inodes.
    pub files: u64,
}

/// What an open file reads from.
enum OpenFile {
    Point(OpenPoint),
    Status(Vec<u8>),
    Inside(view::File),
}

/// What a read has to wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WaitsFor {
    /// Nothing.
    No,
    /// Storage, which may not answer.
    Storage,
    /// Something that takes minutes, such as an archive that has to be unpacked first.
    Long,
}

/// An open folder: its entries as they were when it was opened.
enum OpenDir {
    Listed { tree: Arc<Tree>, node: Arc<Node> },
    Inside(inside::OpenFolder),
}

/// An inode that the kernel holds.
struct KnownInode {
    lookups: u64,
    node: Arc<Node>,
}

/// One name of a folder listing.
pub struct Listed {
    /// The name.
    pub name: std::ffi::OsString,
    /// Its inode.
    pub ino: u64,
    /// Its type.
    pub kind: EntryKind,
    /// The node, unless it is `.` or `..`.
    pub node: Option<Arc<Node>>,
}

/// The file system.
pub struct FileSystem {
    tree: ArcSwap<Tree>,
    known: Mutex<HashMap<u64, KnownInode>>,
    files: Handles<OpenFile>,
    dirs: Handles<OpenDir>,
    cache: Arc<Cache>,
    owner: Owner,
    watch: Arc<Mode>,
    generation: AtomicU64,
    last_use: AtomicU64,
    waker: Arc<Waker>,
    free: Arc<Free>,
    inside: Option<Inside>,
    overlays: Option<Arc<Overlays>>,
}

impl FileSystem {
    /// A file system that shows `catalog`, and with `inside` the files of its points. `watch` says in
    /// `status.json` how changes are noticed; `waker` is told when a read runs into a changed file.
    pub fn new(
        catalog: Catalog,
        cache: Arc<Cache>,
        owner: Owner,
        watch: Arc<Mode>,
        waker: Arc<Waker>,
        inside: Option<Inside>,
    ) -> Self {
        let tree = Tree::build(catalog, None, &cache, inside.is_some(), |_| false);
        let free = Arc::new(Free::default());
        free.ask(|| space::of_folder(&tree.catalog.root));
        FileSystem {
            tree: ArcSwap::from_pointee(tree),
            known: Mutex::default(),
            files: Handles::default(),
            dirs: Handles::default(),
            cache,
            owner,
            watch,
            generation: AtomicU64::new(0),
            last_use: AtomicU64::new(now()),
            waker,
            free,
            inside,
            overlays: None,
        }
    }

    /// Replaces the tree. The result is what the kernel has to be told to forget; tell it from a
    /// thread that serves no requests.
    pub fn install(&self, catalog: Catalog) -> Changes {
        let old = self.tree.load_full();
        let in_use = |ino| self.known().contains_key(&ino);
        let with_files = self.inside.is_some();
        let new = Arc::new(Tree::build(catalog, Some(&old), &self.cache, with_files, in_use));
        // Old images are marked before anybody can see the new ones.
        let mut changes = old.replaced_by(&new);
        self.tree.store(new.clone());
        self.renew_known(&new);
        self.forget_inside(&new, &mut changes);
        self.forget_overlays(&new);
        self.generation.fetch_add(1, Ordering::Relaxed);
        changes
    }

    /// The current tree.
    pub fn tree(&self) -> Arc<Tree> {
        self.tree.load_full()
    }

    fn known(&self) -> MutexGuard<'_, HashMap<u64, KnownInode>> {
        self.known.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Lets what the kernel knows be the new tree's. A node leads to the whole catalog that it was
    /// made from: one kept per name that somebody once looked up would keep all catalogs for ever.
    fn renew_known(&self, new: &Tree) {
        let mut old = Vec::new();
        for (ino, known) in self.known().iter_mut() {
            if let Some(node) = new.node(*ino) {
                old.push(std::mem::replace(&mut known.node, node.clone()));
            }
        }
        // Only now, without the lock: dropping a catalog takes its time.
        drop(old);
    }

    fn node(&self, ino: u64) -> Result<Arc<Node>, Errno> {
        if let Some(node) = self.tree.load().node(ino) {
            return Ok(node.clone());
        }
        self.known().get(&ino).map(|k| k.node.clone()).ok_or(libc::ESTALE)
    }

    /// Attributes of a node.
    ///
    /// # Errors
    /// EIO and its like for a node inside a point that cannot be read.
    pub fn attr(&self, node: &Node) -> Result<Attr, Errno> {
        if let NodeKind::Inside(inside) = &node.kind {
            return self.inside_attr(node.ino, inside);
        }
        let size = || self.status_text().len() as u64;
        let attr = attr::attr(node, &self.tree.load(), self.owner, size);
        Ok(self.written_attr(node, attr))
    }

    /// Attributes by inode number, or of an open file.
    ///
    /// # Errors
    /// ESTALE if there is no such inode (any more).
    pub fn getattr(&self, ino: u64, handle: Option<u64>) -> Result<Attr, Errno> {
        let node = self.node(ino)?;
        let open = handle.and_then(|h| self.files.get(h));
        if let (NodeKind::Status, Some(OpenFile::Status(text))) =
            (&node.kind, open.as_ref().and_then(|g| g.as_deref()))
        {
            let size = text.len() as u64;
            return Ok(attr::attr(&node, &self.tree.load(), self.owner, || size));
        }
        self.attr(&node)
    }

    /// Finds `name` in the folder `parent`; the kernel holds the result until [`Self::forget`]. `.` is
    /// `parent` itself, which need not be a folder, and `..` what it is in: so a number that the
    /// kernel has forgotten and somebody else, an NFS client, has not, is found again.
    ///
    /// # Errors
    /// ENOENT, ENOTDIR, ESTALE.
    pub fn lookup(&self, parent: u64, name: &OsStr) -> Result<Arc<Node>, Errno> {
        if name == "." || name == ".." {
            let node = self.node(parent)?;
            let node = if name == "." { node } else { self.node(node.parent)? };
            self.remember(&node);
            return Ok(node);
        }
        let tree = self.tree.load();
        let folder = match tree.node(parent) {
            Some(node) => node.clone(),
            None => self.node(parent)?,
        };
        let NodeKind::Dir(entries) = &folder.kind else { return self.lookup_inside(&folder, name) };
        let entry = tree::find(entries, name).ok_or(libc::ENOENT)?;
        let node = tree.node(entry.ino).ok_or(libc::ENOENT)?.clone();
        self.remember(&node);
        Ok(node)
    }

    /// Counts one more reference of the kernel's to `node`; false if its number is another's by now, which can only be
    /// inside points.
    pub fn remember(&self, node: &Arc<Node>) -> bool {
        let mut known = self.known();
        let entry =
            known.entry(node.ino).or_insert_with(|| KnownInode { lookups: 0, node: node.clone() });
        if let (NodeKind::Inside(old), NodeKind::Inside(new)) = (&entry.node.kind, &node.kind)
            && !old.is_same(new)
        {
            return false;
        }
        entry.lookups = entry.lookups.saturating_add(1);
        entry.node = node.clone();
        true
    }

    /// The kernel gives back `count` references.
    pub fn forget(&self, ino: u64, count: u64) {
        let mut known = self.known();
        let Some(entry) = known.get_mut(&ino) else { return };
        entry.lookups = entry.lookups.saturating_sub(count);
        let gone = if entry.lookups == 0 { known.remove(&ino) } else { None };
        // Dropping a node may drop an image and all its windows: not under the lock.
        drop(known);
        drop(gone);
    }

    /// The target of a symbolic link.
    ///
    /// # Errors
    /// EINVAL if it is none, ESTALE.
    pub fn readlink(&self, ino: u64) -> Result<PathBuf, Errno> {
        match &self.node(ino)?.kind {
            NodeKind::Link(target) => Ok(target.clone()),
            NodeKind::Inside(node) => self.inside_link(node),
            _ => Err(libc::EINVAL),
        }
    }

    /// Whether opening this file asks the storage of the backups, which may not answer.
    pub fn opens_storage(&self, ino: u64) -> bool {
        matches!(self.node(ino).map(|n| matches!(n.kind, NodeKind::File(_))), Ok(true))
    }

    /// Whether reading from this handle does.
    pub fn reads_storage(&self, handle: u64) -> bool {
        let open = self.files.get(handle);
        let open = open.as_ref().and_then(|g| g.as_deref());
        matches!(open, Some(OpenFile::Point(_) | OpenFile::Inside(_)))
    }

    /// What reading `len` bytes at `offset`, or as far as there are any, has to wait for.
    pub fn waits_for(&self, handle: u64, offset: u64, len: u64) -> WaitsFor {
        let open = self.files.get(handle);
        let file = match open.as_ref().and_then(|g| g.as_deref()) {
            Some(OpenFile::Point(open)) => &open.file,
            Some(OpenFile::Inside(file)) => return WaitsFor::of(file.point()),
            _ => return WaitsFor::No,
        };
        let end = offset.saturating_add(len).min(file.image.size());
        if file.image.must_wait(offset..end) { WaitsFor::Long } else { WaitsFor::Storage }
    }

    /// Opens a file. The result is the handle, and whether the kernel may keep cached pages.
    ///
    /// # Errors
    /// EROFS for anything but reading, unless it is a point of a writable file system; EISDIR, ESTALE; ENOENT if a file
    /// that the point is made of is gone, EIO if it cannot be opened, ENFILE if there are too many; EPERM where it is to
    /// be truncated.
    pub fn open(&self, ino: u64, flags: i32) -> Result<(u64, bool), Errno> {
        let node = self.node(ino)?;
        let writes = self.check_flags(&node, flags)?;
        let (file, keep) = match &node.kind {
            NodeKind::File(file) => (OpenFile::Point(self.open_point(&node, file, writes)?), true),
            NodeKind::Status => (OpenFile::Status(self.status_text()), false),
            NodeKind::Inside(node) => (OpenFile::Inside(self.open_inside(node)?), true),
            NodeKind::Dir(_) | NodeKind::Files(..) => return Err(libc::EISDIR),
            NodeKind::Link(_) => return Err(libc::ELOOP),
        };
        Ok((self.files.insert(Arc::new(file)), keep))
    }

    /// Closes, for ever, the files of points that nobody has open any more.
    pub fn close_files(&self) {
        self.cache.holds().run();
    }

    /// Closes a file.
    pub fn release(&self, handle: u64) {
        self.let_go(self.files.remove(handle));
    }

    /// Reads into `buf` what there is of it; 0 at the end.
    ///
    /// # Errors
    /// EBADF; else EIO, whose reason is in the log and in the findings.
    pub fn read(&self, handle: u64, offset: u64, buf: &mut [u8]) -> Result<usize, Errno> {
        let open = self.files.get(handle).ok_or(libc::EBADF)?;
        match open.as_deref().ok_or(libc::EBADF)? {
            OpenFile::Point(open) => {
                let rest = open.file.image.size().saturating_sub(offset);
                let n = usize::try_from(rest).unwrap_or(usize::MAX).min(buf.len());
                open.read(&mut buf[..n], offset).map_err(|e| self.failed_point(open, &e))?;
                Ok(n)
            }
            OpenFile::Inside(file) => {
                file.read_at(buf, offset).map_err(|e| self.inside_failed(file.point(), &e))
            }
            OpenFile::Status(text) => {
                let start = usize::try_from(offset).unwrap_or(usize::MAX).min(text.len());
                let n = buf.len().min(text.len() - start);
                buf[..n].copy_from_slice(&text[start..start + n]);
                Ok(n)
            }
        }
    }

    /// The errno of a failed read or seek: EIO whatever the kind, since those calls know no other
    /// that says "this cannot be read" and nothing else. The image has logged the reason, once.
    fn failed(&self, image: &Arc<Image>, error: &Error) -> Errno {
        log::debug!("{}", error.report());
        if error.kind() == Kind::Changed {
            self.look_again(image);
        }
        libc::EIO
    }

    /// The errno of a failed open.
    fn not_opened(&self, image: &Arc<Image>, error: &Error) -> Errno {
        log::debug!("{}", error.report());
        if matches!(error.os_code(), Some(libc::EMFILE | libc::ENFILE)) {
            return libc::ENFILE;
        }
        // Something is gone or another, and the next look will say what.
        self.look_again(image);
        if error.kind() == Kind::NotFound { libc::ENOENT } else { libc::EIO }
    }

    /// Has the backup directory looked at. Once `image` is replaced in the tree, there is nothing new.
    fn look_again(&self, image: &Arc<Image>) {
        if self.tree.load().files().any(|f| Arc::ptr_eq(&f.image, image)) {
            self.waker.wake();
        }
    }

    /// Opens a folder.
    ///
    /// # Errors
    /// ENOTDIR, ESTALE; EIO and its like inside a point.
    pub fn opendir(&self, ino: u64) -> Result<u64, Errno> {
        let tree = self.tree.load_full();
        let node = match tree.node(ino) {
            Some(node) => node.clone(),
            None => self.node(ino)?,
        };
        let open = match &node.kind {
            NodeKind::Dir(_) => OpenDir::Listed { tree, node },
            NodeKind::Files(..) | NodeKind::Inside(_) => {
                OpenDir::Inside(self.open_inside_folder(&node)?)
            }
            _ => return Err(libc::ENOTDIR),
        };
        Ok(self.dirs.insert(Arc::new(open)))
    }

    /// Calls `f` with the entries of an open folder from `offset` on, together with the offset of
    /// the next one, until it returns false.
    ///
    /// # Errors
    /// EBADF; EIO and its like inside a point.
    pub fn readdir(
        &self,
        handle: u64,
        offset: u64,
        mut f: impl FnMut(Listed, u64) -> bool,
    ) -> Result<(), Errno> {
        let open = self.dirs.get(handle).ok_or(libc::EBADF)?;
        let (tree, node) = match open.as_deref().ok_or(libc::EBADF)? {
            OpenDir::Listed { tree, node } => (tree, node),
            OpenDir::Inside(folder) => return self.read_inside(folder, offset, &mut f),
        };
        let mut at = offset;
        while let Some(listed) = entry(tree, node, at) {
            at += 1;
            if !f(listed, at) {
                break;
            }
        }
        Ok(())
    }

    /// Closes a folder.
    pub fn releasedir(&self, handle: u64) {
        drop(self.dirs.remove(handle));
    }

    /// One extended attribute.
    ///
    /// # Errors
    /// ENODATA if there is none of that name, ESTALE.
    pub fn getxattr(&self, ino: u64, name: &OsStr) -> Result<Vec<u8>, Errno> {
        let node = self.node(ino)?;
        match &node.kind {
            NodeKind::Inside(inside) => self.inside_xattr(inside, name),
            _ => attr::xattr(&node, name).ok_or(libc::ENODATA),
        }
    }

    /// The names of all extended attributes, each ended by a zero byte.
    ///
    /// # Errors
    /// ESTALE.
    pub fn listxattr(&self, ino: u64) -> Result<Vec<u8>, Errno> {
        let node = self.node(ino)?;
        match &node.kind {
            NodeKind::Inside(inside) => self.inside_xattr_names(inside),
            _ => Ok(attr::xattr_names(&node)),
        }
    }

    /// Figures for `statfs`; the backups' file system is asked by a thread of `slow_pool`.
    pub fn space(&self, slow_pool: &Arc<SlowPool>) -> Space {
        if let Some(overlays) = &self.overlays {
            return self.scratch_space(overlays, slow_pool);
        }
        let tree = self.tree.load();
        let root = tree.catalog.root.clone();
        let room = self.free.free_space(move || space::of_folder(&root), slow_pool);
        Space { used: tree.own_bytes, room, files: tree.len() as u64 }
    }

    fn status_text(&self) -> Vec<u8> {
        let running = Running {
            generation: self.generation.load(Ordering::Relaxed),
            open_files: self.files.len(),
            watch: self.watch.word(),
            cache: self.cache.figures(),
            writable: self.overlays.as_deref().map(Writable::of),
        };
        let mut found = self.inside_findings();
        found.extend(self.overlays.iter().flat_map(|o| o.findings()));
        control::render(&self.tree.load(), running, found)
    }

    /// Notes that somebody uses the file system.
    pub fn touch(&self) {
        let now = now();
        // Reading first: the line stays shared between the threads' caches.
        if self.last_use.load(Ordering::Relaxed) != now {
            self.last_use.store(now, Ordering::Relaxed);
        }
    }

    /// Seconds since it was last used; 0 as long as something is open.
    pub fn idle_seconds(&self) -> u64 {
        if !self.files.is_empty() || !self.dirs.is_empty() {
            self.touch();
        }
        now().saturating_sub(self.last_use.load(Ordering::Relaxed))
    }
}

/// Entry number `index` of a folder of the tree.
fn entry(tree: &Tree, node: &Node, index: u64) -> Option<Listed> {
    match index {
        0 => return Some(Listed::dots(".", node.ino)),
        1 => return Some(Listed::dots("..", if node.ino == ROOT { ROOT } else { node.parent })),
        _ => {}
    }
    let NodeKind::Dir(entries) = &node.kind else { return None };
    let entry = entries.get(usize::try_from(index - 2).ok()?)?;
    Some(Listed {
        name: entry.name.clone(),
        ino: entry.ino,
        kind: entry.kind,
        node: tree.node(entry.ino).cloned(),
    })
}

impl Listed {
    /// `.` or `..`.
    fn dots(name: &str, ino: u64) -> Self {
        Listed { name: name.into(), ino, kind: EntryKind::Dir, node: None }
    }
}

/// Seconds of a clock that never jumps; cheap enough to be read at each request.
fn now() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is valid for the call.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_COARSE, &mut time) };
    time.tv_sec as u64
}
