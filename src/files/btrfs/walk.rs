//! [`Walk`]: the items of a tree, in the order of their keys.
//!
//! Each node has to be one level below the one that leads to it, to begin with the key that is said there, and to
//! end before the next one: so no walk goes round in a circle, or sees a node twice.

use super::node::{Key, Node};
use super::superblock::Root;
use super::volume::Volume;
use crate::error::Result;

/// An item.
pub(super) struct Item {
    pub key: Key,
    node: Node,
    index: usize,
}

impl Item {
    pub(super) fn data(&self) -> &[u8] {
        self.node.data(self.index)
    }
}

/// A node on the way to an item.
struct Step {
    node: Node,
    /// The pointer that was followed; in a leaf, the next item.
    index: usize,
    /// All its keys are below this one.
    end: Key,
}

/// A place between the items of a tree.
pub(super) struct Walk<'a> {
    volume: &'a Volume,
    tree: u64,
    steps: Vec<Step>,
}

impl<'a> Walk<'a> {
    /// A walk that begins with the last item at or before `key`, if there is one, else with the first behind it.
    ///
    /// # Errors
    /// `Corrupt`, or what reading the point says.
    pub(super) fn at_or_before(volume: &'a Volume, root: Root, key: Key) -> Result<Walk<'a>> {
        let mut walk = Walk { volume, tree: root.id, steps: Vec::new() };
        walk.down(root, None, Key::MAX, key)?;
        Ok(walk)
    }

    /// A walk that begins with the first item at or behind `key`.
    ///
    /// # Errors
    /// `Corrupt`, or what reading the point says.
    pub(super) fn from(volume: &'a Volume, root: Root, key: Key) -> Result<Walk<'a>> {
        let mut walk = Walk::at_or_before(volume, root, key)?;
        if let Some(leaf) = walk.steps.last_mut() {
            let is_before = leaf.index < leaf.node.count() && leaf.node.key(leaf.index) < key;
            leaf.index += usize::from(is_before);
        }
        Ok(walk)
    }

    /// Goes down from a node, which should begin with `begin` and end before `end`, to where `key` is.
    fn down(&mut self, mut at: Root, mut begin: Option<Key>, mut end: Key, key: Key) -> Result<()> {
        loop {
            let node = self.volume.node(at)?;
            let count = node.count();
            let first = begin.is_none_or(|b| count > 0 && node.key(0) == b);
            let last = count == 0 || node.key(count - 1) < end || end == Key::MAX;
            if !first || !last || (count == 0 && node.level() > 0) {
                return Err(self.volume.bad(at.at, "its keys contradict those above it"));
            }
            let index = node.upper_bound(key).saturating_sub(1);
            let level = node.level();
            let step_end = end;
            if level > 0 {
                let (child, generation) = node.child(index);
                begin = Some(node.key(index));
                end = if index + 1 < count { node.key(index + 1) } else { end };
                at = Root { id: self.tree, at: child, level: level - 1, generation };
            }
            self.steps.push(Step { node, index, end: step_end });
            if level == 0 {
                return Ok(());
            }
        }
    }

    /// The next item.
    ///
    /// # Errors
    /// `Corrupt`, or what reading the point says.
    pub(super) fn next(&mut self) -> Result<Option<Item>> {
        loop {
            let Some(leaf) = self.steps.last_mut() else { return Ok(None) };
            if leaf.node.level() == 0 && leaf.index < leaf.node.count() {
                let (node, index) = (leaf.node.clone(), leaf.index);
                leaf.index += 1;
                return Ok(Some(Item { key: node.key(index), node, index }));
            }
            if leaf.node.level() > 0 && leaf.index + 1 < leaf.node.count() {
                leaf.index += 1;
                let (index, node, end) = (leaf.index, leaf.node.clone(), leaf.end);
                let (child, generation) = node.child(index);
                let end = if index + 1 < node.count() { node.key(index + 1) } else { end };
                let at = Root { id: self.tree, at: child, level: node.level() - 1, generation };
                self.down(at, Some(node.key(index)), end, Key::MIN)?;
                continue;
            }
            self.steps.pop();
        }
    }

    /// The next item, if it is of this object and kind.
    ///
    /// # Errors
    /// As [`Walk::next`].
    pub(super) fn next_of(&mut self, object: u64, kind: u8) -> Result<Option<Item>> {
        Ok(self.next()?.filter(|i| i.key.object == object && i.key.kind == kind))
    }
}

/// The item with exactly this key.
///
/// # Errors
/// `Corrupt`, or what reading the point says.
pub(super) fn find(volume: &Volume, root: Root, key: Key) -> Result<Option<Item>> {
    Ok(Walk::from(volume, root, key)?.next()?.filter(|i| i.key == key))
}
