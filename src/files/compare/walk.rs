//! Both trees at once: folders are read whole, and their names sorted and joined. Nothing recurses.

use super::types::{Side, Trees};
use crate::error::{Error, Kind, Result};
use crate::files::once::Once;
use crate::files::tree::{NodeId, NodeKind, Tree};

/// Folders inside each other.
const MAX_DEPTH: usize = 2048;
/// Names of all folders that a walk is in: some 400 MiB of them.
const MAX_NAMES: usize = 1 << 22;

/// A place in the trees: a path in each, and what is there.
#[derive(Debug, Default)]
pub(super) struct Met {
    pub from: Option<(Vec<u8>, Side)>,
    pub to: Option<(Vec<u8>, Side)>,
}

impl Met {
    fn path(&self) -> &[u8] {
        let both = self.to.as_ref().or(self.from.as_ref());
        both.map(|(path, _)| path.as_slice()).unwrap_or_default()
    }
}

/// Who looks at what is met.
pub(super) trait Look {
    /// Something is there; gives the folders to go into, as pairs or one by one.
    fn met(&mut self, met: Met) -> Result<Vec<Met>>;

    /// Something cannot be read.
    fn failed(&mut self, path: &[u8], error: Error) -> Result<()>;
}

/// A name of a folder, or of two.
struct Name {
    name: Vec<u8>,
    from: Option<NodeId>,
    to: Option<NodeId>,
}

/// A folder, or two, that the walk is in.
struct Frame {
    from: Vec<u8>,
    to: Vec<u8>,
    /// Those to come, the next one last.
    names: Vec<Name>,
    size: usize,
}

pub(super) fn walk(trees: &Trees<'_>, look: &mut dyn Look) -> Result<()> {
    let side = |(tree, node): (&dyn Tree, NodeId)| -> Result<(Vec<u8>, Side)> {
        Ok((Vec::new(), Side { node, attributes: tree.attributes(node)? }))
    };
    let start = Met { from: Some(side(trees.from)?), to: Some(side(trees.to)?) };
    let mut walk = Walk { trees, look, frames: Vec::new(), held: 0, once: Default::default() };
    walk.visit(start)?;
    while let Some(frame) = walk.frames.last_mut() {
        match frame.names.pop() {
            Some(name) => {
                let met = (join(&frame.from, &name.name), join(&frame.to, &name.name));
                walk.name(name, met)?;
            }
            None => {
                walk.held -= frame.size;
                walk.frames.pop();
            }
        }
    }
    Ok(())
}

struct Walk<'a> {
    trees: &'a Trees<'a>,
    look: &'a mut dyn Look,
    frames: Vec<Frame>,
    held: usize,
    /// Folders of each tree that it was in.
    once: [Once; 2],
}

impl Walk<'_> {
    fn name(&mut self, name: Name, (from, to): (Vec<u8>, Vec<u8>)) -> Result<()> {
        let mut met = Met::default();
        for (node, path, tree, out) in [
            (name.from, from, self.trees.from.0, &mut met.from),
            (name.to, to, self.trees.to.0, &mut met.to),
        ] {
            let Some(node) = node else { continue };
            match tree.attributes(node) {
                Ok(attributes) => *out = Some((path, Side { node, attributes })),
                // Of what cannot be read on one side nothing can be said.
                Err(e) => return self.look.failed(&path, e),
            }
        }
        self.visit(met)
    }

    fn visit(&mut self, met: Met) -> Result<()> {
        let mut folders = self.look.met(met)?;
        // The last one is the next.
        folders.reverse();
        folders.into_iter().try_for_each(|met| self.enter(met))
    }

    fn enter(&mut self, met: Met) -> Result<()> {
        let path = met.path().to_vec();
        if self.frames.len() >= MAX_DEPTH {
            let error = Error::new(Kind::Corrupt, "directories nested too deep");
            return self.look.failed(&path, error);
        }
        let (mut names, mut failed) = (Vec::new(), false);
        let trees = [self.trees.from.0, self.trees.to.0];
        for (i, side) in [&met.from, &met.to].into_iter().enumerate() {
            let Some((path, side)) = side.as_ref() else { continue };
            let (Some(tree), Some(once)) = (trees.get(i).copied(), self.once.get_mut(i)) else {
                continue;
            };
            let entered = once.enter(tree, side.node);
            let listed = entered.and_then(|()| self.list(tree, side.node, i == 0, &mut names));
            if let Err(e) = listed {
                if e.kind() == Kind::Unsupported && names.len() + self.held > MAX_NAMES {
                    return Err(e);
                }
                failed = true;
                self.look.failed(path, e)?;
            }
        }
        let mut names = joined(names);
        if failed && met.from.is_some() && met.to.is_some() {
            // What is missing in a list that is not whole may be there.
            names.retain(|n| n.from.is_some() && n.to.is_some());
        }
        self.held += names.len();
        let path = |side: Option<(Vec<u8>, Side)>| side.map(|(path, _)| path).unwrap_or_default();
        let (from, to) = (path(met.from), path(met.to));
        self.frames.push(Frame { from, to, size: names.len(), names });
        Ok(())
    }

    fn list(
        &self,
        tree: &dyn Tree,
        folder: NodeId,
        is_first: bool,
        names: &mut Vec<Name>,
    ) -> Result<()> {
        let mut is_full = false;
        tree.read_folder(folder, 0, &mut |entry| {
            let (from, to) = match is_first {
                true => (Some(entry.node), None),
                false => (None, Some(entry.node)),
            };
            names.push(Name { name: entry.name, from, to });
            is_full = names.len() + self.held > MAX_NAMES;
            !is_full
        })?;
        match is_full {
            true => Err(Error::new(Kind::Unsupported, "too many files in one directory")),
            false => Ok(()),
        }
    }
}

/// The names of both, each once, the first one last.
fn joined(mut names: Vec<Name>) -> Vec<Name> {
    names.sort_by(|a, b| b.name.cmp(&a.name));
    names.dedup_by(|next, kept| {
        let same = next.name == kept.name;
        if same {
            kept.from = kept.from.or(next.from);
            kept.to = kept.to.or(next.to);
        }
        same
    });
    names
}

fn join(folder: &[u8], name: &[u8]) -> Vec<u8> {
    let between: &[u8] = if folder.is_empty() { b"" } else { b"/" };
    [folder, between, name].concat()
}

/// Whether this is a folder.
pub(super) fn is_folder(side: &Side) -> bool {
    side.attributes.kind == NodeKind::Folder
}
