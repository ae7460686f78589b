//! The files inside points: names, attributes and contents by way of [`View`].
//!
//! All of this reads from storage, which may not answer; who asks has to find out before ([`FileSystem::waits_inside`],
//! [`FileSystem::waits_below`]), without asking storage.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

use super::attr::{self, Attr};
use super::inside::{Names, OpenFolder, errno};
use super::point::PointFile;
use super::tree::{Changes, EntryKind, Node, NodeKind, Tree};
use super::{Errno, FileSystem, Listed, WaitsFor};
use crate::chain::beside;
use crate::error::{Error, Finding, Kind};
use crate::text::path_text;
use crate::view::{self, Beside, INSIDE, Named, View};

/// Offsets in a folder before those of its file system: of `.` and `..`.
const DOTS: u64 = 2;

/// How the names of extended attributes begin that nobody obeys. Capabilities and labels mean something to this machine
/// that they should not, and are not shown.
const SHOWN: &[u8] = b"user.";
/// Access lists, which the kernel obeys as the guest's does.
const ACCESS_LISTS: &[u8] = b"system.posix_acl_";

impl WaitsFor {
    /// What reading from a point waits for.
    pub(super) fn of(point: &view::Point) -> Self {
        if point.must_wait() { WaitsFor::Long } else { WaitsFor::Storage }
    }
}

impl FileSystem {
    /// What asking about a node itself waits for: nothing, unless it is inside a point.
    pub fn waits_inside(&self, ino: u64) -> WaitsFor {
        self.waits(ino, false)
    }

    /// What looking for names in a folder waits for.
    pub fn waits_below(&self, ino: u64) -> WaitsFor {
        self.waits(ino, true)
    }

    fn waits(&self, ino: u64, below: bool) -> WaitsFor {
        if ino & INSIDE == 0 {
            return WaitsFor::No;
        }
        match self.node(ino).as_ref().map(|n| &n.kind) {
            Ok(NodeKind::Inside(node)) => WaitsFor::of(node.point()),
            Ok(NodeKind::Files(point, _)) if below => WaitsFor::of(point),
            _ => WaitsFor::No,
        }
    }

    /// What reading an open folder waits for.
    pub fn waits_for_names(&self, handle: u64) -> WaitsFor {
        let open = self.dirs.get(handle);
        match open.as_ref().and_then(|g| g.as_deref()) {
            Some(super::OpenDir::Inside(OpenFolder { names: Names::Folder(folder), .. })) => {
                WaitsFor::of(folder.point())
            }
            // With their attributes: those of the roots of file systems.
            Some(super::OpenDir::Inside(OpenFolder { names: Names::Volumes(volumes), .. })) => {
                volumes.first().map_or(WaitsFor::No, |v| WaitsFor::of(v.node.point()))
            }
            _ => WaitsFor::No,
        }
    }

    /// Whether access lists of guests are to be obeyed.
    pub fn obeys_access_lists(&self) -> bool {
        self.inside.as_ref().is_some_and(|i| !i.squash)
    }

    fn view(&self) -> Result<&View, Errno> {
        self.inside.as_ref().map(|i| &i.view).ok_or(libc::ESTALE)
    }

    /// Finds `name` in a folder inside a point, or among the volumes of one.
    pub(super) fn lookup_inside(&self, folder: &Node, name: &OsStr) -> Result<Arc<Node>, Errno> {
        let view = self.view();
        let found = match &folder.kind {
            NodeKind::Files(point, file) => {
                let volumes = self.volumes(point, file)?.into_iter();
                volumes.map(|v| (v.name, v.node)).find(|(n, _)| n == name.as_bytes()).map(|v| v.1)
            }
            NodeKind::Inside(node) => {
                let found = view?.lookup(node, name.as_bytes());
                found.map_err(|e| self.inside_failed(node.point(), &e))?
            }
            _ => return Err(libc::ENOTDIR),
        };
        let found = found.ok_or(libc::ENOENT)?;
        loop {
            let node = self.inside_node(folder.ino, found.clone());
            if self.remember(&node) {
                return Ok(node);
            }
        }
    }

    fn volumes(
        &self,
        point: &Arc<view::Point>,
        file: &Arc<PointFile>,
    ) -> Result<Vec<Named>, Errno> {
        let volumes = self.view()?.volumes(point, || self.beside(file));
        volumes.map_err(|e| self.inside_failed(point, &e))
    }

    /// The points of the other disks of a run.
    fn beside(&self, file: &PointFile) -> Vec<Beside> {
        let tree = self.tree();
        let (_, point) = file.index();
        let found = beside(file.catalog(), file.disk(), point).into_iter();
        let served = |(disk, point): (&crate::chain::Disk, usize)| {
            let name = &disk.points.get(point)?.name;
            let is = |f: &&Arc<PointFile>| f.disk().path == disk.path && &f.point().name == name;
            Some((path_text(&disk.path), tree.files().find(is)?.image.clone()))
        };
        found.filter_map(served).collect()
    }

    /// A node with a number that no other one has.
    fn inside_node(&self, parent: u64, node: view::Node) -> Arc<Node> {
        let (mut ino, tree) = (node.number(), self.tree.load());
        let known = self.known();
        let is_other = |ino| match known.get(&ino).map(|k| &k.node.kind) {
            Some(NodeKind::Inside(other)) => !other.is_same(&node),
            Some(_) => true,
            None => tree.node(ino).is_some(),
        };
        while is_other(ino) {
            ino = ino.wrapping_add(1) | INSIDE;
        }
        drop(known);
        Arc::new(Node { ino, parent, time: 0, kind: NodeKind::Inside(node) })
    }

    /// Attributes.
    pub(super) fn inside_attr(&self, ino: u64, node: &view::Node) -> Result<Attr, Errno> {
        let inside = self.inside.as_ref().ok_or(libc::ESTALE)?;
        let found = inside.view.attributes(node);
        let found = found.map_err(|e| self.inside_failed(node.point(), &e))?;
        Ok(attr::inside(ino, &found, self.owner, inside.squash))
    }

    /// Attributes of what was found as `name`; a folder has to be in that one, and by that name, alone.
    ///
    /// # Errors
    /// As [`FileSystem::attr`]; EIO for a folder that is somewhere else.
    pub fn named_attr(&self, node: &Node, name: &OsStr) -> Result<Attr, Errno> {
        let attr = self.attr(node)?;
        if let NodeKind::Inside(inside) = &node.kind
            && attr.kind == EntryKind::Dir
            && name != "."
            && name != ".."
            && let NodeKind::Inside(parent) = &self.node(node.parent)?.kind
        {
            let entered = self.view()?.enter(parent, name.as_bytes(), inside);
            entered.map_err(|e| self.inside_failed(inside.point(), &e))?;
        }
        Ok(attr)
    }

    /// The text of a symbolic link.
    pub(super) fn inside_link(&self, node: &view::Node) -> Result<PathBuf, Errno> {
        let text = self.view()?.read_link(node).map_err(|e| match e.kind() {
            Kind::Usage => libc::EINVAL,
            _ => self.inside_failed(node.point(), &e),
        })?;
        Ok(OsString::from_vec(text).into())
    }

    /// Opens a file.
    pub(super) fn open_inside(&self, node: &view::Node) -> Result<view::File, Errno> {
        self.view()?.open(node).map_err(|e| self.inside_failed(node.point(), &e))
    }

    /// Opens a folder.
    pub(super) fn open_inside_folder(&self, node: &Node) -> Result<OpenFolder, Errno> {
        let names = match &node.kind {
            NodeKind::Files(point, file) => Names::Volumes(self.volumes(point, file)?),
            NodeKind::Inside(inside) => {
                let failed = |e| self.inside_failed(inside.point(), &e);
                let attr = self.inside_attr(node.ino, inside)?;
                if attr.kind != EntryKind::Dir {
                    return Err(libc::ENOTDIR);
                }
                Names::Folder(self.view()?.open_folder(inside).map_err(failed)?)
            }
            _ => return Err(libc::ENOTDIR),
        };
        Ok(OpenFolder { ino: node.ino, parent: node.parent, names, failed: AtomicI32::new(0) })
    }

    /// Calls `each` with the entries of an open folder from `offset` on. What is wrong is told after what is right.
    pub(super) fn read_inside(
        &self,
        folder: &OpenFolder,
        offset: u64,
        each: &mut dyn FnMut(Listed, u64) -> bool,
    ) -> Result<(), Errno> {
        if offset == 0 {
            folder.failed.store(0, Ordering::Relaxed);
        }
        let dots = [(0, ".", folder.ino), (1, "..", folder.parent)];
        let mut given = false;
        for (_, name, ino) in dots.into_iter().filter(|(at, ..)| *at >= offset) {
            let next = if name == "." { 1 } else { DOTS };
            if !each(Listed::dots(name, ino), next) {
                return Ok(());
            }
            given = true;
        }
        let from = offset.saturating_sub(DOTS);
        let mut full = false;
        let mut entry = |named: Named| {
            let next = named.next.saturating_add(DOTS);
            full = !each(self.listed(folder.ino, named), next);
            given |= !full;
            !full
        };
        let read = match &folder.names {
            Names::Volumes(volumes) => {
                list_volumes(volumes, from, &mut entry);
                Ok(())
            }
            Names::Folder(open) => {
                open.read(from, &mut entry).map_err(|e| self.inside_failed(open.point(), &e))
            }
        };
        if let Err(errno) = read {
            folder.failed.store(errno, Ordering::Relaxed);
        }
        match folder.failed.load(Ordering::Relaxed) {
            errno if errno != 0 && !given && !full => Err(errno),
            _ => Ok(()),
        }
    }

    fn listed(&self, parent: u64, named: Named) -> Listed {
        let kind = match named.kind {
            Some(kind) => EntryKind::of(kind),
            // Where a folder does not say: of what cannot be read, nothing depends on it.
            None => {
                let asked = self.view().ok().and_then(|v| v.attributes(&named.node).ok());
                asked.map_or(EntryKind::File, |a| EntryKind::of(a.kind))
            }
        };
        let node = self.inside_node(parent, named.node);
        Listed { name: OsString::from_vec(named.name), ino: node.ino, kind, node: Some(node) }
    }

    /// One extended attribute.
    pub(super) fn inside_xattr(&self, node: &view::Node, name: &OsStr) -> Result<Vec<u8>, Errno> {
        // Asked for security.* at every turn.
        if !self.is_shown(name.as_bytes()) {
            return Err(libc::ENODATA);
        }
        let all = self.view()?.xattrs(node);
        let all = all.map_err(|e| self.inside_failed(node.point(), &e))?;
        let found = all.into_iter().find(|x| x.name == name.as_bytes());
        found.map(|x| x.value).ok_or(libc::ENODATA)
    }

    /// The names of all extended attributes, each ended by a zero byte.
    pub(super) fn inside_xattr_names(&self, node: &view::Node) -> Result<Vec<u8>, Errno> {
        let all = self.view()?.xattrs(node);
        let all = all.map_err(|e| self.inside_failed(node.point(), &e))?;
        let mut names = Vec::new();
        for x in all.iter().filter(|x| self.is_shown(&x.name) && !x.name.contains(&0)) {
            names.extend_from_slice(&x.name);
            names.push(0);
        }
        Ok(names)
    }

    /// Access lists where they are obeyed only: with another owner they would let others in wherever they are copied.
    fn is_shown(&self, name: &[u8]) -> bool {
        name.starts_with(SHOWN) || name.starts_with(ACCESS_LISTS) && self.obeys_access_lists()
    }

    /// What was found odd inside points.
    pub(super) fn inside_findings(&self) -> Vec<Finding> {
        self.inside.as_ref().map(|i| i.view.findings()).unwrap_or_default()
    }

    /// Lets go of points that are not in the tree any more, and of what the kernel has cached of their files.
    pub(super) fn forget_inside(&self, new: &Tree, changes: &mut Changes) {
        let Some(inside) = &self.inside else { return };
        let is_there = |number| new.node(number).is_some();
        inside.view.retain(is_there);
        let gone = |node: &Node| match &node.kind {
            NodeKind::Inside(inside) => !is_there(inside.point().number()),
            _ => false,
        };
        let known = self.known();
        changes.inodes.extend(known.iter().filter(|(_, k)| gone(&k.node)).map(|(ino, _)| *ino));
    }

    /// The errno of something inside a point that failed; where it lasts, the reason is a finding.
    pub(super) fn inside_failed(&self, point: &view::Point, error: &Error) -> Errno {
        log::debug!("{}", error.report());
        if matches!(error.os_code(), Some(libc::EMFILE | libc::ENFILE)) {
            return libc::ENFILE;
        }
        if matches!(error.kind(), Kind::Changed | Kind::NotFound) {
            self.look_again(point.image());
        }
        errno(error.kind())
    }
}

/// Volumes have no offsets of their own: they count from 1.
fn list_volumes(volumes: &[Named], from: u64, each: &mut dyn FnMut(Named) -> bool) {
    let from = usize::try_from(from).unwrap_or(usize::MAX);
    for (i, volume) in volumes.iter().enumerate().skip(from) {
        let (name, node, kind) = (volume.name.clone(), volume.node.clone(), volume.kind);
        if !each(Named { name, node, kind, next: i as u64 + 1 }) {
            return;
        }
    }
}
