//! The files inside points, for a mount: nothing is opened before somebody looks.
//!
//! - `point`: [`Point`], whose files these are, and what is open of it
//! - `node`: [`Node`], a file or folder inside a point, and its inode number
//! - `file`: [`File`] and [`Folder`], opened
//! - `index`: where names are in large folders
//! - `claims`: which name a folder has, and which contents, where a disk says it has several
//! - `found`: what was found odd, for as long as the point is there
//!
//! Rules:
//! - `ls` of a disk opens no point. The volumes of a point are found when a name in its folder is looked for; a
//!   file system is opened when something in it is.
//! - What is open is in a list of [`MOST_OPEN`] points, the one that was used longest ago leaves first. A [`Node`]
//!   needs nothing of it: what it belongs to is opened again, and its number is the same.
//! - Blocks and tables of file systems share one bounded cache ([`Blocks`]).
//! - Whatever reads holds the files of its point meanwhile and a moment longer ([`crate::image::HeldPoint::lingering`]); an open
//!   file or folder holds them until it is closed.
//! - No lock is held while something is read: two who open the same point both read, and one of them is kept.

mod claims;
mod file;
mod found;
mod index;
mod node;
mod point;

use std::ffi::OsStr;
use std::num::NonZeroUsize;
use std::os::unix::ffi::OsStrExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lru::LruCache;

use crate::error::{Error, Finding, Kind, Result};
use crate::files::{Attributes, Blocks, Flags, NodeKind, Time, Tree, Xattr};
use crate::text::path_text;
use claims::Claims;
pub use file::{File, Folder};
use found::Found;
use index::Indexes;
pub(crate) use node::INSIDE;
pub use node::{Named, Node};
use point::Opened;
pub use point::{Beside, Point};

/// Points whose volumes and file systems stay open. Each takes some kilobytes beside what the cache counts.
const MOST_OPEN: NonZeroUsize = NonZeroUsize::new(32).unwrap();

/// All that is open of points, and what was found in them.
pub struct View {
    blocks: Arc<Blocks>,
    opened: Mutex<LruCache<u64, Arc<Opened>>>,
    indexes: Indexes,
    claims: Claims,
    found: Found,
}

impl View {
    /// Nothing open yet; blocks and tables will take at most `cache_size` bytes.
    pub fn new(cache_size: u64) -> Self {
        let opened = Mutex::new(LruCache::new(MOST_OPEN));
        let (indexes, claims) = (Indexes::default(), Claims::default());
        let (blocks, found) = (Blocks::new(cache_size), Found::default());
        View { blocks, opened, indexes, claims, found }
    }

    /// The volumes of a point that have files, by their names in `fleecefs files ls`. `beside` gives the other
    /// disks of the point's run; it is asked for them once, and only if LVM needs them.
    ///
    /// # Errors
    /// What reading the point says.
    pub fn volumes(
        &self,
        point: &Arc<Point>,
        beside: impl FnOnce() -> Vec<Beside>,
    ) -> Result<Vec<Named>> {
        let _held = point.hold()?;
        let opened = self.opened(point, beside)?;
        let names = opened.with_files();
        Ok(names.map(|name| Named::volume(Node::volume(point, name))).collect())
    }

    /// All that is known about a node. A file system that cannot be opened has an empty root that nobody can change.
    ///
    /// # Errors
    /// As [`Tree::attributes`].
    pub fn attributes(&self, node: &Node) -> Result<Attributes> {
        let _held = node.point().hold()?;
        match self.tree(node) {
            Ok(tree) => tree.attributes(node.id(&*tree)),
            Err(e) if node.is_root() && e.kind().is_lasting() => Ok(refused_root()),
            Err(e) => Err(e),
        }
    }

    /// What a folder has under this name. If it is a folder, [`View::enter`] has to be asked as well.
    ///
    /// # Errors
    /// As [`Tree::lookup`]; `Corrupt` if the contents are those of another folder.
    pub fn lookup(&self, folder: &Node, name: &[u8]) -> Result<Option<Node>> {
        let _held = folder.point().hold()?;
        let tree = self.tree(folder)?;
        self.own_contents(&*tree, folder)?;
        let found = self.indexes.lookup(&*tree, folder, name, &self.blocks)?;
        Ok(found.map(|(id, listed)| match folder.other(&*tree, id) {
            node if listed => node,
            node => node.by_alias(),
        }))
    }

    /// Whether `folder`, which was found in `parent` as `name`, may be entered there: a folder has one name.
    ///
    /// # Errors
    /// `Corrupt` if it has another one.
    pub fn enter(&self, parent: &Node, name: &[u8], folder: &Node) -> Result<()> {
        let _held = folder.point().hold()?;
        let tree = self.tree(folder)?;
        let named = self.claims.name(&*tree, (parent, name), folder, &self.blocks);
        named.map_err(|e| {
            noted(&*tree, folder, &format!("'{}'", path_text(OsStr::from_bytes(name))), e)
        })
    }

    /// Opens a plain file; it is read also when its point is removed meanwhile.
    ///
    /// # Errors
    /// As [`Tree::open`]; a file of the backup is gone.
    pub fn open(&self, node: &Node) -> Result<File> {
        let held = node.point().hold()?;
        let tree = self.tree(node)?;
        let file = tree.open(node.id(&*tree))?;
        Ok(File::new(node.point(), tree, file, held))
    }

    /// Opens a folder.
    ///
    /// # Errors
    /// As [`View::open`].
    pub fn open_folder(&self, node: &Node) -> Result<Folder> {
        let held = node.point().hold()?;
        let tree = self.tree(node)?;
        self.own_contents(&*tree, node)?;
        Ok(Folder::new(node, tree, held))
    }

    /// The text of a symbolic link.
    ///
    /// # Errors
    /// As [`Tree::read_link`].
    pub fn read_link(&self, node: &Node) -> Result<Vec<u8>> {
        let _held = node.point().hold()?;
        let tree = self.tree(node)?;
        tree.read_link(node.id(&*tree))
    }

    /// Extended attributes.
    ///
    /// # Errors
    /// As [`Tree::xattrs`].
    pub fn xattrs(&self, node: &Node) -> Result<Vec<Xattr>> {
        let _held = node.point().hold()?;
        let tree = self.tree(node)?;
        tree.xattrs(node.id(&*tree))
    }

    /// What was found odd in points so far, each once.
    pub fn findings(&self) -> Vec<Finding> {
        let open: Vec<_> = self.lock().iter().map(|(n, o)| (*n, o.clone())).collect();
        open.iter().for_each(|(number, opened)| self.found.add(*number, opened.findings()));
        self.found.list()
    }

    /// Lets go of all but the points for which `keep` says so, by their numbers. What somebody has open stays open.
    pub fn retain(&self, keep: impl Fn(u64) -> bool) {
        let mut list = self.lock();
        let gone: Vec<u64> = list.iter().map(|(n, _)| *n).filter(|n| !keep(*n)).collect();
        let gone: Vec<_> = gone.iter().map(|n| list.pop(n)).collect();
        drop(list);
        self.indexes.clear();
        self.claims.retain(&keep);
        self.found.retain(keep);
        drop(gone);
    }

    /// Fails if what a folder has is another's.
    fn own_contents(&self, tree: &dyn Tree, folder: &Node) -> Result<()> {
        let own = self.claims.contents(tree, folder, &self.blocks);
        own.map_err(|e| noted(tree, folder, &folder.id(tree).number.to_string(), e))
    }

    /// The file system that a node is in.
    fn tree(&self, node: &Node) -> Result<Arc<dyn Tree>> {
        let point = node.point();
        // Its first lookup has asked for the other disks.
        let opened = self.opened(point, Vec::new)?;
        let first = opened.tree(node.volume_name());
        let result = match first {
            Err(e) if e.kind() == Kind::Unsupported && self.blocks.is_tight() => {
                self.retain_open(point.number());
                opened.tree(node.volume_name())
            }
            other => other,
        };
        result.inspect_err(|e| self.note(point, e))
    }

    /// Closes all points but one, so that there is memory for its tables.
    fn retain_open(&self, number: u64) {
        let mut list = self.lock();
        let kept = list.pop(&number);
        let mut gone = Vec::new();
        while let Some(old) = list.pop_lru() {
            gone.push(old);
        }
        kept.into_iter().for_each(|k| drop(list.put(number, k)));
        drop(list);
        self.indexes.clear();
        self.claims.retain(|n| n == number);
        gone.iter().for_each(|(n, o)| self.found.add(*n, o.findings()));
    }

    fn opened(
        &self,
        point: &Arc<Point>,
        beside: impl FnOnce() -> Vec<Beside>,
    ) -> Result<Arc<Opened>> {
        if let Some(open) = self.lock().get(&point.number()) {
            return Ok(open.clone());
        }
        let opened = Opened::new(point, &self.blocks, beside);
        let opened = Arc::new(opened.inspect_err(|e| self.note(point, e))?);
        let mut list = self.lock();
        if let Some(other) = list.get(&point.number()) {
            return Ok(other.clone());
        }
        let old = list.push(point.number(), opened.clone());
        drop(list);
        self.found.add(point.number(), opened.findings());
        // Dropped here, without the lock.
        old.into_iter().for_each(|(number, old)| self.found.add(number, old.findings()));
        Ok(opened)
    }

    /// Keeps what would be the same the next time.
    fn note(&self, point: &Point, error: &Error) {
        if error.kind().is_lasting() {
            self.found.add(point.number(), vec![Finding::from_error(error, point.path())]);
        }
    }

    fn lock(&self) -> MutexGuard<'_, LruCache<u64, Arc<Opened>>> {
        self.opened.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps what is wrong with one folder among what was found in its file system, whose findings are bounded.
fn noted(tree: &dyn Tree, folder: &Node, which: &str, error: Error) -> Error {
    if error.kind().is_lasting() {
        let finding = Finding::from_error(&error, folder.point().path());
        let message = format!("{}: directory {which}: {}", folder.volume_name(), finding.message);
        tree.findings().note(Finding { message, ..finding });
    }
    error
}

/// What is told of the root of a file system that cannot be opened: a folder in which nothing is found.
fn refused_root() -> Attributes {
    Attributes {
        kind: NodeKind::Folder,
        size: 0,
        allocated: 0,
        mode: 0o555,
        uid: 0,
        gid: 0,
        links: 2,
        atime: Time::default(),
        mtime: Time::default(),
        ctime: Time::default(),
        crtime: None,
        device: None,
        flags: Flags::default(),
    }
}
