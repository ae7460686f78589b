//! Files and folders inside points, and their inode numbers.

use std::sync::Arc;

use super::point::Point;
use crate::files::{Entry, NodeId, NodeKind, Tree};

/// Set in the numbers of all that is inside points, and in no others.
pub(crate) const INSIDE: u64 = 1 << 63;

/// A file or folder inside a point.
#[derive(Clone)]
pub struct Node {
    point: Arc<Point>,
    volume: Arc<str>,
    /// `None` for the root of the volume, whose number is known without opening it.
    id: Option<NodeId>,
    /// It was found by a name that its folder does not list: in another case, or in the short form of DOS.
    alias: bool,
}

/// A name in a folder inside a point.
pub struct Named {
    /// The name.
    pub name: Vec<u8>,
    /// What it leads to.
    pub node: Node,
    /// What that is, where the folder says so.
    pub kind: Option<NodeKind>,
    /// Where reading goes on after it.
    pub next: u64,
}

impl Node {
    /// The root of a volume.
    pub(super) fn volume(point: &Arc<Point>, name: &str) -> Node {
        Node { point: point.clone(), volume: Arc::from(name), id: None, alias: false }
    }

    /// Another node of the same file system.
    pub(super) fn other(&self, tree: &dyn Tree, id: NodeId) -> Node {
        let id = Some(id).filter(|id| *id != tree.root());
        Node { point: self.point.clone(), volume: self.volume.clone(), id, alias: false }
    }

    /// The same, found by a name that its folder does not list.
    pub(super) fn by_alias(self) -> Node {
        Node { alias: true, ..self }
    }

    /// Whether it was found by a name that its folder does not list.
    pub(super) fn is_alias(&self) -> bool {
        self.alias
    }

    /// Whose file it is.
    pub fn point(&self) -> &Arc<Point> {
        &self.point
    }

    /// The name of its volume.
    pub(super) fn volume_name(&self) -> &Arc<str> {
        &self.volume
    }

    /// Whether it is the root of its volume.
    pub(super) fn is_root(&self) -> bool {
        self.id.is_none()
    }

    /// What its file system calls it.
    pub(super) fn id(&self, tree: &dyn Tree) -> NodeId {
        self.id.unwrap_or_else(|| tree.root())
    }

    /// Its inode number: always the same for a file of a point. Two may have the same one only if a guest has gone to
    /// great lengths for it; whoever gives out numbers has to look.
    pub fn number(&self) -> u64 {
        let mut hash = blake3::Hasher::new();
        hash.update(&self.point.number().to_le_bytes());
        hash.update(&[u8::from(self.id.is_some())]);
        if let Some(id) = self.id {
            hash.update(&id.tree.to_le_bytes());
            hash.update(&id.number.to_le_bytes());
        }
        // Last, since only its length is not known.
        hash.update(self.volume.as_bytes());
        let mut eight = [0; 8];
        eight.copy_from_slice(&hash.finalize().as_bytes()[..8]);
        u64::from_le_bytes(eight) | INSIDE
    }

    /// Whether it is the same file.
    pub fn is_same(&self, other: &Node) -> bool {
        self.point.number() == other.point.number()
            && self.volume == other.volume
            && self.id == other.id
    }
}

impl Named {
    /// A volume in the folder of its point.
    pub(super) fn volume(node: Node) -> Named {
        let name = node.volume.as_bytes().to_vec();
        Named { name, node, kind: Some(NodeKind::Folder), next: 0 }
    }

    /// A name in `folder`.
    pub(super) fn entry(folder: &Node, tree: &dyn Tree, entry: Entry) -> Named {
        let node = folder.other(tree, entry.node);
        Named { name: entry.name, node, kind: entry.kind, next: entry.next }
    }
}
