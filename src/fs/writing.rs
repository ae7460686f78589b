//! Writing to points of a writable file system: everything goes to overlays ([`crate::overlay`]).

use std::path::PathBuf;
use std::sync::Arc;

use super::attr::Attr;
use super::open_point::OpenPoint;
use super::point::PointFile;
use super::slow_pool::SlowPool;
use super::space::DiskSpace;
use super::tree::{Node, NodeKind, ROOT, Tree};
use super::{Errno, FileSystem, OpenFile, Space, WaitsFor};
use crate::error::{Error, Kind};
use crate::image::HeldPoint;
use crate::overlay::kept::PointName;
use crate::overlay::{BLOCK, Overlays};

impl FileSystem {
    /// The same with points that can be written to; what is written goes to `overlays`.
    pub fn writable(mut self, overlays: Overlays) -> Self {
        self.free.ask(|| overlays.folder().space());
        self.overlays = Some(Arc::new(overlays));
        self
    }

    /// Whether somebody who opens `node` with `flags` wants to write, and may.
    pub(super) fn check_flags(&self, node: &Node, flags: i32) -> Result<bool, Errno> {
        let (writes, truncates) =
            (flags & libc::O_ACCMODE != libc::O_RDONLY, flags & libc::O_TRUNC != 0);
        let can = self.overlays.is_some() && matches!(node.kind, NodeKind::File(_));
        match () {
            () if (writes || truncates) && !can => Err(libc::EROFS),
            () if truncates => Err(libc::EPERM),
            () => Ok(writes),
        }
    }

    /// Opens a point.
    pub(super) fn open_point(
        &self,
        node: &Node,
        file: &Arc<PointFile>,
        writes: bool,
    ) -> Result<OpenPoint, Errno> {
        // Whoever has a point open keeps it, even if its files are removed before a read.
        let held = HeldPoint::new(&file.image).map_err(|e| self.not_opened(&file.image, &e))?;
        let Some(overlays) = &self.overlays else {
            return Ok(OpenPoint::new(file.clone(), held, None, false));
        };
        let slot = overlays.slot(file.name(), &file.image, || file.identity());
        let slot = slot.map_err(|e| self.not_opened(&file.image, &e))?;
        if writes {
            let shown = self.path_of(node);
            overlays
                .prepare(&slot, file.image.size(), &shown, || file.identity())
                .map_err(|e| self.not_prepared(overlays, &file.image, &e))?;
        }
        Ok(OpenPoint::new(file.clone(), held, Some(slot), writes))
    }

    fn not_prepared(
        &self,
        overlays: &Overlays,
        image: &Arc<crate::image::Image>,
        error: &Error,
    ) -> Errno {
        match error.kind() {
            Kind::NoSpace => libc::ENOSPC,
            Kind::Changed => self.not_opened(image, error),
            _ => {
                overlays.note(error);
                self.not_opened(image, error)
            }
        }
    }

    /// The path of a node below the mount point.
    fn path_of(&self, node: &Node) -> PathBuf {
        let tree = self.tree();
        let (mut names, mut ino, mut parent) = (Vec::new(), node.ino, node.parent);
        while ino != ROOT {
            let Some(folder) = tree.node(parent) else { break };
            if let NodeKind::Dir(entries) = &folder.kind {
                names.extend(entries.iter().find(|e| e.ino == ino).map(|e| e.name.clone()));
            }
            (ino, parent) = (folder.ino, folder.parent);
        }
        names.into_iter().rev().collect()
    }

    fn opened<T>(
        &self,
        handle: u64,
        act: impl FnOnce(&OpenPoint) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let open = self.files.get(handle).ok_or(libc::EBADF)?;
        match open.as_deref() {
            Some(OpenFile::Point(open)) => act(open),
            _ => Err(libc::EBADF),
        }
    }

    /// What writing `len` bytes at `offset` has to wait for: blocks may have to be filled up from the point.
    pub fn write_waits_for(&self, handle: u64, offset: u64, len: u64) -> WaitsFor {
        let start = offset / BLOCK * BLOCK;
        let end = offset.saturating_add(len).checked_next_multiple_of(BLOCK).unwrap_or(u64::MAX);
        self.waits_for(handle, start, end - start)
    }

    /// Writes what is inside the disk of `data` at `offset`, by a file that is open with `flags`: with O_DSYNC as
    /// [`FileSystem::sync`] does, with O_DIRECT all or nothing. How much.
    ///
    /// # Errors
    /// EBADF if it is not open for writing; EFBIG past the end; ENOSPC where the scratch is full; EIO, whose reason
    /// is in the log and in the findings.
    pub fn write(&self, handle: u64, offset: u64, data: &[u8], flags: i32) -> Result<usize, Errno> {
        self.opened(handle, |open| {
            let overlay = open.writes().ok_or(libc::EBADF)?;
            let rest = open.file.image.size().saturating_sub(offset);
            let n = usize::try_from(rest).unwrap_or(usize::MAX).min(data.len());
            // Of a direct write the kernel takes a part for a failure (EIO), whatever that part is.
            let is_direct = flags & libc::O_DIRECT != 0;
            if n < data.len() && (n == 0 || is_direct) {
                return Err(libc::EFBIG);
            }
            let sync = flags & libc::O_DSYNC != 0;
            let written = open.write(&data[..n], offset);
            let written = written.and_then(|()| if sync { overlay.sync() } else { Ok(()) });
            written.map_err(|e| self.not_written(open, &e)).map(|()| n)
        })
    }

    /// `fallocate`: holes are punched and ranges made zeros. Nothing is set aside.
    ///
    /// # Errors
    /// EOPNOTSUPP for another mode; as [`FileSystem::write`].
    pub fn allocate(&self, handle: u64, offset: u64, len: u64, mode: i32) -> Result<(), Errno> {
        const KEEP: i32 = libc::FALLOC_FL_KEEP_SIZE;
        const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE;
        const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE;
        self.opened(handle, |open| {
            open.writes().ok_or(libc::EBADF)?;
            let size = open.file.image.size();
            let end = offset.checked_add(len).ok_or(libc::EFBIG)?;
            match mode & !KEEP {
                PUNCH if mode & KEEP != 0 => {}
                // It would grow.
                ZERO if mode & KEEP == 0 && end > size => return Err(libc::EFBIG),
                ZERO => {}
                _ => return Err(libc::EOPNOTSUPP),
            }
            let len = end.min(size).saturating_sub(offset);
            open.zero(offset, len).map_err(|e| self.not_written(open, &e))
        })
    }

    /// Has all that was written to the point survive a power cut, as far as its overlay does.
    ///
    /// # Errors
    /// EIO, ENOSPC.
    pub fn sync(&self, handle: u64) -> Result<(), Errno> {
        let open = self.files.get(handle).ok_or(libc::EBADF)?;
        match open.as_deref() {
            Some(OpenFile::Point(open)) => match open.overlay() {
                Some(overlay) => overlay.sync().map_err(|e| self.not_written(open, &e)),
                None => Ok(()),
            },
            _ => Ok(()),
        }
    }

    /// `truncate`, which changes nothing.
    ///
    /// # Errors
    /// EPERM for another size than a point has: its disk has that size. EROFS for all else.
    pub fn resize(&self, ino: u64, size: u64) -> Result<Attr, Errno> {
        let node = self.node(ino)?;
        self.check_flags(&node, libc::O_WRONLY)?;
        let attr = self.attr(&node)?;
        if attr.size == size { Ok(attr) } else { Err(libc::EPERM) }
    }

    /// The errno for what cannot be changed about a file: owner, mode, times.
    pub fn unchangeable(&self) -> Errno {
        if self.overlays.is_some() { libc::EPERM } else { libc::EROFS }
    }

    /// The end: what is to be kept is written down.
    ///
    /// # Errors
    /// Something could not be written.
    pub fn finish(&self) -> Result<(), Error> {
        self.overlays.as_ref().map_or(Ok(()), |o| o.finish())
    }

    /// Lets go of what was written over a point that is gone, once nobody has it open any more.
    pub(super) fn let_go(&self, open: Option<Arc<OpenFile>>) {
        let is_gone = matches!(open.as_deref(), Some(OpenFile::Point(open)) if open.is_gone());
        drop(open);
        self.overlays.iter().filter(|_| is_gone).for_each(|o| o.forget_gone());
    }

    /// The errno of a failed read of a point, or of what was written over it.
    pub(super) fn failed_point(&self, open: &OpenPoint, error: &Error) -> Errno {
        // What the point has noted by itself says which file of the backup it is.
        let is_own = open.overlay().is_some_and(|o| Some(o.path()) == error.path());
        self.overlays.iter().filter(|_| is_own).for_each(|o| o.note(error));
        self.failed(&open.file.image, error)
    }

    fn not_written(&self, open: &OpenPoint, error: &Error) -> Errno {
        match (error.kind(), error.os_code()) {
            (Kind::NoSpace, _) => {
                log::debug!("{}", error.report());
                libc::ENOSPC
            }
            (_, Some(libc::EFBIG)) => libc::EFBIG,
            _ => self.failed_point(open, error),
        }
    }

    /// Attributes of what was written to.
    pub(super) fn written_attr(&self, node: &Node, attr: Attr) -> Attr {
        let (NodeKind::File(file), Some(overlays)) = (&node.kind, &self.overlays) else {
            return attr;
        };
        match overlays.find(&file.name(), &file.image) {
            Some(overlay) => attr.written(overlay.data_bytes(), overlay.modified()),
            None => attr,
        }
    }

    /// Lets go of what was written over points that are gone.
    pub(super) fn forget_overlays(&self, new: &Tree) {
        let Some(overlays) = &self.overlays else { return };
        let there: std::collections::HashSet<PointName> = new.files().map(|f| f.name()).collect();
        overlays.forget(|of| there.contains(of));
    }

    /// Figures for `statfs`: what was written, and the room for more.
    pub(super) fn scratch_space(
        &self,
        overlays: &Arc<Overlays>,
        slow_pool: &Arc<SlowPool>,
    ) -> Space {
        let asked = overlays.clone();
        let room = self.free.free_space(move || asked.folder().space(), slow_pool);
        let (used, limit) = (overlays.budget().used(), overlays.budget().limit());
        let left = limit.saturating_sub(used);
        let room = DiskSpace { free: room.free.min(left), available: room.available.min(left) };
        Space { used, room, files: self.tree.load().len() as u64 }
    }
}
