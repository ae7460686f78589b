//! Paths in a tree: from a path to its node, and through all that is below one.
//!
//! Nothing recurses: a walk holds one frame per folder that it is in, and of each a bounded number of names. A
//! folder that comes up twice (a loop, a second name for it, or one with the same contents) is entered once.

use super::once::Once;
use super::tree::{Attributes, Entry, NodeId, NodeKind, Tree, is_name};
use crate::error::{Error, Kind, Result};
use crate::text::path_text;

/// Links that are followed on a path, as in Linux.
const MAX_LINKS: usize = 40;
/// Folders inside each other: deeper than any path that Linux takes by itself.
const MAX_DEPTH: usize = 2048;
/// Names that are held at once: of one folder, and shared by all that a walk is in.
const BATCH: usize = 4096;
const NAMES: usize = 65_536;

/// The node that `path` leads to from the root, links on the way followed inside the tree; one at the end only if
/// `follow`.
///
/// # Errors
/// `NotFound`, naming the part that is not there; what reading says.
pub fn resolve(tree: &dyn Tree, path: &[u8], follow: bool) -> Result<NodeId> {
    let mut todo: Vec<Vec<u8>> = parts(path).rev().map(<[u8]>::to_vec).collect();
    let (mut parents, mut links) = (vec![tree.root()], 0);
    let here = |parents: &[NodeId]| parents.last().copied().unwrap_or(tree.root());
    while let Some(name) = todo.pop() {
        if name == b".." {
            parents.truncate(parents.len().saturating_sub(1).max(1));
            continue;
        }
        let missing =
            || Error::new(Kind::NotFound, format!("no '{}' in this file system", shown(path)));
        if !is_name(&name) || tree.attributes(here(&parents))?.kind != NodeKind::Folder {
            return Err(missing());
        }
        let node = tree.lookup(here(&parents), &name)?.ok_or_else(missing)?;
        let is_link = tree.attributes(node)?.kind == NodeKind::Link;
        if !is_link || (todo.is_empty() && !follow) {
            parents.push(node);
            continue;
        }
        links += 1;
        if links > MAX_LINKS {
            let what = format!("too many symbolic links on the way to '{}'", shown(path));
            return Err(Error::new(Kind::Usage, what));
        }
        let text = tree.read_link(node)?;
        if text.first() == Some(&b'/') {
            parents.truncate(1);
        }
        todo.extend(parts(&text).rev().map(<[u8]>::to_vec));
    }
    Ok(here(&parents))
}

fn parts(path: &[u8]) -> impl DoubleEndedIterator<Item = &[u8]> {
    path.split(|b| *b == b'/').filter(|p| !p.is_empty() && *p != b".")
}

fn shown(path: &[u8]) -> String {
    path_text(<std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(path))
}

/// Something that a walk comes by.
pub struct At<'a> {
    /// Its path from where the walk began; empty for that itself.
    pub path: &'a [u8],
    /// Its name; empty for where the walk began.
    pub name: &'a [u8],
    /// The node.
    pub node: NodeId,
    /// What is known about it.
    pub attributes: &'a Attributes,
}

/// Who is told what a walk comes by. An error from here ends the walk.
pub trait Visitor {
    /// A folder, before what is in it; whether to go in. Unless it says otherwise, a folder is one more node, and
    /// all of it is visited.
    ///
    /// # Errors
    /// Whatever should end the walk.
    fn enter(&mut self, at: &At<'_>) -> Result<bool> {
        self.node(at).map(|()| true)
    }

    /// A folder that was entered, after what is in it.
    ///
    /// # Errors
    /// Whatever should end the walk.
    fn leave(&mut self, at: &At<'_>) -> Result<()> {
        let _ = at;
        Ok(())
    }

    /// Anything else.
    ///
    /// # Errors
    /// Whatever should end the walk.
    fn node(&mut self, at: &At<'_>) -> Result<()>;

    /// Something that cannot be read: the rest of a folder, or what a name stands for.
    ///
    /// # Errors
    /// Whatever should end the walk.
    fn failed(&mut self, path: &[u8], error: Error) -> Result<()>;
}

/// A folder that a walk is in.
struct Frame {
    node: NodeId,
    attributes: Attributes,
    /// Where its own name begins in the path, and where the path ends.
    name_at: usize,
    path_len: usize,
    /// Names that were read and not yet visited, the next one last.
    names: Vec<Entry>,
    /// Where reading goes on; `None` at the end.
    next: Option<u64>,
}

/// Goes through `start` and all that is below it, each folder before what is in it, in the order of the file
/// system.
///
/// # Errors
/// What the visitor says; what reading `start` itself says.
pub fn walk(tree: &dyn Tree, start: NodeId, visitor: &mut dyn Visitor) -> Result<()> {
    let attributes = tree.attributes(start)?;
    let mut walk = Walk { tree, path: Vec::new(), frames: Vec::new(), once: Once::default() };
    walk.visit(start, attributes, 0, visitor)?;
    while let Some(step) = walk.step() {
        match step {
            Step::Visit(entry) => walk.entry(entry, visitor)?,
            Step::Failed(error) => visitor.failed(&walk.path, error)?,
            Step::Leave(frame) => {
                let name = walk.path.get(frame.name_at..).unwrap_or_default();
                let (node, attributes) = (frame.node, &frame.attributes);
                visitor.leave(&At { path: &walk.path, name, node, attributes })?;
                walk.path.truncate(frame.name_at.saturating_sub(1));
            }
        }
    }
    Ok(())
}

enum Step {
    Visit(Entry),
    Leave(Frame),
    Failed(Error),
}

struct Walk<'a> {
    tree: &'a dyn Tree,
    path: Vec<u8>,
    frames: Vec<Frame>,
    once: Once,
}

impl Walk<'_> {
    fn step(&mut self) -> Option<Step> {
        let batch = (NAMES / (self.frames.len() + 16)).clamp(16, BATCH);
        let frame = self.frames.last_mut()?;
        self.path.truncate(frame.path_len);
        if let Some(entry) = frame.names.pop() {
            return Some(Step::Visit(entry));
        }
        let Some(from) = frame.next else {
            return self.frames.pop().map(Step::Leave);
        };
        let mut names = Vec::new();
        let read = self.tree.read_folder(frame.node, from, &mut |entry| {
            names.push(entry);
            names.len() < batch
        });
        // A reader that goes back would go on for ever.
        let last = names.last().map(|e| e.next).filter(|next| *next > from);
        frame.next = last.filter(|_| names.len() >= batch);
        names.reverse();
        frame.names = names;
        match read {
            Err(error) => Some(Step::Failed(error)),
            Ok(()) => self.step(),
        }
    }

    fn entry(&mut self, entry: Entry, visitor: &mut dyn Visitor) -> Result<()> {
        if !self.path.is_empty() {
            self.path.push(b'/');
        }
        let name_at = self.path.len();
        self.path.extend_from_slice(&entry.name);
        match self.tree.attributes(entry.node) {
            Ok(attributes) => self.visit(entry.node, attributes, name_at, visitor),
            Err(error) => visitor.failed(&self.path, error),
        }
    }

    fn visit(
        &mut self,
        node: NodeId,
        attributes: Attributes,
        name_at: usize,
        visitor: &mut dyn Visitor,
    ) -> Result<()> {
        let name = self.path.get(name_at..).unwrap_or_default();
        let at = At { path: &self.path, name, node, attributes: &attributes };
        if attributes.kind != NodeKind::Folder {
            return visitor.node(&at);
        }
        let entered = match self.frames.len() >= MAX_DEPTH {
            true => Err(Error::new(Kind::Corrupt, "directories nested too deep")),
            false => self.once.enter(self.tree, node),
        };
        if let Err(error) = entered {
            return visitor.failed(&self.path, error);
        }
        if visitor.enter(&at)? {
            let path_len = self.path.len();
            let (names, next) = (Vec::new(), Some(0));
            self.frames.push(Frame { node, attributes, name_at, path_len, names, next });
        }
        Ok(())
    }
}
