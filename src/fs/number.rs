//! Inode numbers: names become nodes.
//!
//! A number is a hash of the path and of what is there, so it is the same after a remount, and that
//! of another generation of a point is another. See [`super::tree`]. The highest bit is set in the numbers of
//! what is inside points, and of the folders that lead there: so one look tells what may have to wait for storage.

use std::collections::HashMap;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use super::names::{Child, Folder};
use super::node::{Entry, EntryKind, Node, NodeKind, ROOT};
use super::point::PointFile;
use crate::image::Image;
use crate::text::path_text;
use crate::view;

/// Gives out inode numbers.
pub(super) struct Numbering<'a> {
    /// What has its number.
    pub nodes: HashMap<u64, Arc<Node>>,
    /// Images of the tree before, by address, and their numbers.
    pub old: HashMap<*const Image, u64>,
    /// The same of the points whose files are shown.
    pub old_files: HashMap<*const Image, Arc<view::Point>>,
    /// Numbers that the kernel knows already.
    pub taken: &'a dyn Fn(u64) -> bool,
}

impl Numbering<'_> {
    /// Adds a folder and all below it; says how new its newest point is.
    pub(super) fn folder(&mut self, ino: u64, parent: u64, path: &Path, folder: Folder) -> i64 {
        let mut entries = Vec::with_capacity(folder.children.len());
        // Taken at once, so that nothing below gets it.
        self.insert(ino, parent, 0, NodeKind::Dir(Vec::new()));
        let mut newest = 0;
        for (name, child) in folder.children {
            let (child, kind, time) = self.child(ino, &path.join(&name), child);
            newest = newest.max(time);
            entries.push(Entry { name, ino: child, kind });
        }
        self.insert(ino, parent, newest, NodeKind::Dir(entries));
        newest
    }

    fn child(&mut self, parent: u64, path: &Path, child: Child) -> (u64, EntryKind, i64) {
        match child {
            Child::Dir(folder) => {
                let ino = self.number(path, b"dir");
                let time = self.folder(ino, parent, path, folder);
                (ino, EntryKind::Dir, time)
            }
            Child::File(file) => {
                let (ino, time) = (self.file_number(path, &file), file.point().time);
                self.insert(ino, parent, time, NodeKind::File(file));
                (ino, EntryKind::File, time)
            }
            Child::Link { target, time } => {
                let ino = self.number(path, target.as_os_str().as_bytes());
                self.insert(ino, parent, time, NodeKind::Link(target));
                (ino, EntryKind::Link, time)
            }
            Child::Files(file) => {
                let (point, time) = (self.files_point(path, &file), file.point().time);
                let ino = point.number();
                self.insert(ino, parent, time, NodeKind::Files(point, file));
                (ino, EntryKind::Dir, time)
            }
            Child::Status => {
                let ino = self.number(path, b"status");
                self.insert(ino, parent, 0, NodeKind::Status);
                (ino, EntryKind::File, 0)
            }
        }
    }

    fn insert(&mut self, ino: u64, parent: u64, time: i64, kind: NodeKind) {
        self.nodes.insert(ino, Arc::new(Node { ino, parent, time, kind }));
    }

    fn number(&self, path: &Path, identity: &[u8]) -> u64 {
        let mut ino = inode_hash(path, identity);
        while ino <= ROOT || self.nodes.contains_key(&ino) {
            ino = next(ino);
        }
        ino
    }

    /// An image that was there before keeps its number. A new one gets none that the kernel knows:
    /// a file rewritten with its old size and time must not inherit cached pages.
    fn file_number(&self, path: &Path, file: &PointFile) -> u64 {
        let kept = self.old.get(&Arc::as_ptr(&file.image));
        if let Some(&ino) = kept.filter(|i| !self.nodes.contains_key(i)) {
            return ino;
        }
        let mut ino = self.number(path, file.digest.as_bytes());
        while ino <= ROOT || self.nodes.contains_key(&ino) || (self.taken)(ino) {
            ino = next(ino);
        }
        ino
    }

    /// The same for the folder of a point's files, whose numbers follow from this one.
    fn files_point(&self, path: &Path, file: &PointFile) -> Arc<view::Point> {
        let kept = self.old_files.get(&Arc::as_ptr(&file.image));
        if let Some(point) = kept.filter(|p| !self.nodes.contains_key(&p.number())) {
            return point.clone();
        }
        let mut ino = inode_hash(path, file.digest.as_bytes()) | view::INSIDE;
        while self.nodes.contains_key(&ino) || (self.taken)(ino) {
            ino = next(ino) | view::INSIDE;
        }
        let name = path_text(&file.disk().path);
        Arc::new(view::Point::new(ino, name, file.image.clone()))
    }
}

/// The number after this one; never one of what is inside points.
fn next(ino: u64) -> u64 {
    ino.wrapping_add(1) & !view::INSIDE
}

fn inode_hash(path: &Path, identity: &[u8]) -> u64 {
    let mut hash = blake3::Hasher::new();
    hash.update(path.as_os_str().as_bytes());
    hash.update(&[0]);
    hash.update(identity);
    let mut eight = [0; 8];
    eight.copy_from_slice(&hash.finalize().as_bytes()[..8]);
    u64::from_le_bytes(eight) & !view::INSIDE
}
