//! What is compared, and what is reported of it.

use crate::error::{Error, Result};
use crate::files::tree::{Attributes, NodeId, Tree};

/// What is different in a file that is in both trees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Different {
    /// What is in it; without contents compared: size or mtime.
    Content,
    /// Owner, permissions, times, number of names, or only the file under this name.
    Attributes,
}

/// A file or folder of one of the trees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Side {
    /// Its number.
    pub node: NodeId,
    /// What is known about it.
    pub attributes: Attributes,
}

impl Side {
    /// Whether both are one file: of one number, kind, and time of making.
    pub(super) fn is_one_with(&self, other: &Side) -> bool {
        let id = |s: &Side| (s.node, s.attributes.kind, s.attributes.crtime);
        id(self) == id(other)
    }
}

/// Something that is different. Paths are from where the comparison began.
#[derive(Debug)]
pub enum Event<'a> {
    /// Only in the second.
    Added(&'a [u8], Side),
    /// Only in the first.
    Removed(&'a [u8], Side),
    /// In both, and different.
    Modified(&'a [u8], Side, Side, Different),
    /// From the first path to the second; modified or not.
    Renamed(&'a [u8], &'a [u8], Side, Side, Option<Different>),
}

/// What hears of each difference. An error from here ends the comparison.
pub trait Observer {
    /// Something is different.
    ///
    /// # Errors
    /// Whatever should end it.
    fn event(&mut self, event: Event<'_>) -> Result<()>;

    /// Something could not be read: nothing is said about it, nor about what is in it.
    ///
    /// # Errors
    /// Whatever should end it.
    fn failed(&mut self, path: &[u8], error: Error) -> Result<()>;
}

/// Two trees, and where in them to begin.
#[derive(Clone, Copy)]
pub struct Trees<'a> {
    /// The first tree and its node.
    pub from: (&'a dyn Tree, NodeId),
    /// The second tree and its node.
    pub to: (&'a dyn Tree, NodeId),
    /// Whether contents of equal size are compared; else size and times decide.
    pub content: bool,
}
