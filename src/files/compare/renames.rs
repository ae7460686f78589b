//! Which files have another path: those that left one, and are there under another.

use std::collections::HashMap;

use super::types::{Side, Trees};
use super::walk::{Look, Met, is_folder, walk};
use crate::error::{Error, Result};
use crate::files::tree::{NodeId, NodeKind, Tree};

/// Paths that are remembered of each tree; some 40 MiB.
pub const MAX_RENAMES: usize = 1 << 18;

/// Files that were renamed.
pub(super) struct Renames {
    /// Of those that left a path: the path, and what was there.
    gone: HashMap<NodeId, (Vec<u8>, Side)>,
    /// The path that they came to.
    came: HashMap<NodeId, Vec<u8>>,
    /// Whether none was forgotten.
    pub is_all: bool,
}

impl Renames {
    /// Where the file at `path` of the second tree was before, if it is one that was renamed.
    pub(super) fn before(&self, path: &[u8], node: NodeId) -> Option<&(Vec<u8>, Side)> {
        self.came.get(&node).filter(|p| *p == path).and_then(|_| self.gone.get(&node))
    }

    /// Whether the file at `path` of the first tree is one that was renamed.
    pub(super) fn has_gone(&self, path: &[u8], node: NodeId) -> bool {
        self.came.contains_key(&node) && self.gone.get(&node).is_some_and(|(p, _)| p == path)
    }
}

/// Goes through both trees.
pub(super) fn find(trees: &Trees<'_>) -> Result<Renames> {
    let renames = Renames { gone: HashMap::new(), came: HashMap::new(), is_all: true };
    let mut noting = Noting { trees, renames };
    walk(trees, &mut noting)?;
    Ok(noting.renames)
}

struct Noting<'a> {
    trees: &'a Trees<'a>,
    renames: Renames,
}

impl Noting<'_> {
    fn gone(&mut self, path: Vec<u8>, side: Side) {
        if !is_also_in(self.trees.to.0, &side) {
            return;
        }
        match self.renames.gone.len() < MAX_RENAMES {
            true => drop(self.renames.gone.entry(side.node).or_insert((path, side))),
            false => self.renames.is_all = false,
        }
    }

    fn came(&mut self, path: Vec<u8>, side: Side) {
        if !is_also_in(self.trees.from.0, &side) {
            return;
        }
        match self.renames.came.len() < MAX_RENAMES {
            true => drop(self.renames.came.entry(side.node).or_insert(path)),
            false => self.renames.is_all = false,
        }
    }
}

/// Whether the other tree has this file, too. Where the time of making is not known, a number may be in use again:
/// then it has to be as it was.
fn is_also_in(tree: &dyn Tree, side: &Side) -> bool {
    let Ok(attributes) = tree.attributes(side.node) else { return false };
    let other = Side { attributes, ..*side };
    let stamps = |s: &Side| (s.attributes.size, s.attributes.mtime);
    let as_it_was = side.attributes.kind != NodeKind::Folder && stamps(side) == stamps(&other);
    side.is_one_with(&other) && (attributes.crtime.is_some() || as_it_was)
}

impl Look for Noting<'_> {
    fn met(&mut self, met: Met) -> Result<Vec<Met>> {
        // The start may have another name, and is no rename.
        let is_start =
            |side: &Option<(Vec<u8>, Side)>| side.as_ref().is_some_and(|s| s.0.is_empty());
        let is_one = match (&met.from, &met.to) {
            (Some((_, a)), Some((_, b))) => a.is_one_with(b),
            _ => false,
        };
        if !is_one && !is_start(&met.from) && !is_start(&met.to) {
            met.from.iter().for_each(|(path, side)| self.gone(path.clone(), *side));
            met.to.iter().for_each(|(path, side)| self.came(path.clone(), *side));
        }
        let folder = |side: Option<(Vec<u8>, Side)>| side.filter(|(_, side)| is_folder(side));
        let met = Met { from: folder(met.from), to: folder(met.to) };
        Ok(if met.from.is_some() || met.to.is_some() { vec![met] } else { Vec::new() })
    }

    fn failed(&mut self, _: &[u8], _: Error) -> Result<()> {
        // The second time it is observer.
        Ok(())
    }
}
