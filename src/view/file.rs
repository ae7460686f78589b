//! Open files and folders inside points.

use std::sync::Arc;

use super::node::{Named, Node};
use super::point::Point;
use crate::error::Result;
use crate::files::{OpenFile, Tree};
use crate::image::{HeldPoint, RangeKind};

/// An open file. As long as it lives, it can be read, also when its point was removed.
pub struct File {
    // Before what it reads from goes.
    file: Box<dyn OpenFile>,
    /// Its findings are told as long as somebody reads.
    _tree: Arc<dyn Tree>,
    point: Arc<Point>,
    _held: Vec<HeldPoint>,
}

impl File {
    pub(super) fn new(
        point: &Arc<Point>,
        tree: Arc<dyn Tree>,
        file: Box<dyn OpenFile>,
        held: Vec<HeldPoint>,
    ) -> Self {
        File { file, _tree: tree, point: point.clone(), _held: held }
    }

    /// Whose file it is.
    pub fn point(&self) -> &Arc<Point> {
        &self.point
    }

    /// Length in bytes.
    pub fn size(&self) -> u64 {
        self.file.size()
    }

    /// Fills `buf` as far as the file goes: the kernel takes a short read for its end.
    ///
    /// # Errors
    /// As [`OpenFile::read_at`]: one bad byte fails the whole call.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        let left = usize::try_from(self.size().saturating_sub(offset)).unwrap_or(usize::MAX);
        let wanted = buf.len().min(left);
        let mut done = 0;
        while let Some(rest) = buf.get_mut(done..wanted).filter(|r| !r.is_empty()) {
            match self.file.read_at(rest, offset.saturating_add(done as u64))? {
                0 => break,
                n => done += n,
            }
        }
        Ok(done)
    }

    /// Where the next data or hole begins at or after `offset`: the size if there is none. `None` if that is not among
    /// the first `most` stretches.
    ///
    /// # Errors
    /// As [`OpenFile::stretch`].
    pub fn seek(&self, offset: u64, wanted: RangeKind, most: usize) -> Result<Option<u64>> {
        let mut at = offset;
        for _ in 0..most {
            let Some(stretch) = self.file.stretch(at)? else { return Ok(Some(self.size())) };
            if stretch.hole == (wanted == RangeKind::Hole) {
                return Ok(Some(at));
            }
            // A reader that stays where it is would go on for ever.
            if stretch.end <= at {
                return Ok(Some(self.size()));
            }
            at = stretch.end;
        }
        Ok(None)
    }
}

/// An open folder.
pub struct Folder {
    node: Node,
    tree: Arc<dyn Tree>,
    _held: Vec<HeldPoint>,
}

impl Folder {
    pub(super) fn new(node: &Node, tree: Arc<dyn Tree>, held: Vec<HeldPoint>) -> Self {
        Folder { node: node.clone(), tree, _held: held }
    }

    /// Whose folder it is.
    pub fn point(&self) -> &Arc<Point> {
        self.node.point()
    }

    /// Calls `each` with its entries from `from` on, until it returns false: see [`Tree::read_folder`].
    ///
    /// # Errors
    /// As [`Tree::read_folder`].
    pub fn read(&self, from: u64, each: &mut dyn FnMut(Named) -> bool) -> Result<()> {
        let tree = &*self.tree;
        let mut last = from;
        tree.read_folder(self.node.id(tree), from, &mut |entry| {
            // A reader that goes back would go on for ever.
            let forward = entry.next > last;
            last = entry.next;
            forward && each(Named::entry(&self.node, tree, entry))
        })
    }
}
