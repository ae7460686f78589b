//! What is told of each path.

use super::content::same_content;
use super::renames::Renames;
use super::types::{Different, Event, Observer, Side, Trees};
use super::walk::{Look, Met, is_folder, walk};
use crate::error::{Error, Result};
use crate::files::tree::NodeKind;

/// Goes through both trees and tells what is different.
pub(super) fn tell(
    trees: &Trees<'_>,
    renames: &Renames,
    observer: &mut dyn Observer,
) -> Result<()> {
    walk(trees, &mut ChangeReporter { trees, renames, observer })
}

struct ChangeReporter<'a> {
    trees: &'a Trees<'a>,
    renames: &'a Renames,
    observer: &'a mut dyn Observer,
}

impl ChangeReporter<'_> {
    /// Something that only the first tree has at this path.
    fn removed(&mut self, path: Vec<u8>, side: Side) -> Result<Vec<Met>> {
        if self.renames.has_gone(&path, side.node) {
            // It is reported, and looked into, where it is now.
            return Ok(Vec::new());
        }
        self.observer.event(Event::Removed(&path, side))?;
        let met = Met { from: Some((path, side)), to: None };
        Ok(if is_folder(&side) { vec![met] } else { Vec::new() })
    }

    /// Something that only the second tree has at this path.
    fn added(&mut self, path: Vec<u8>, side: Side) -> Result<Vec<Met>> {
        let Some((before, old)) = self.renames.before(&path, side.node) else {
            self.observer.event(Event::Added(&path, side))?;
            let met = Met { from: None, to: Some((path, side)) };
            return Ok(if is_folder(&side) { vec![met] } else { Vec::new() });
        };
        let different = match self.different(old, &side) {
            // Renaming changes the ctime.
            Ok(found) => found.filter(|d| *d == Different::Content || rights(old) != rights(&side)),
            Err(e) => return self.observer.failed(&path, e).map(|()| Vec::new()),
        };
        self.observer.event(Event::Renamed(before, &path, *old, side, different))?;
        let met = Met { from: Some((before.clone(), *old)), to: Some((path, side)) };
        Ok(if is_folder(&side) { vec![met] } else { Vec::new() })
    }

    /// Something that both have at this path.
    fn both(&mut self, from: (Vec<u8>, Side), to: (Vec<u8>, Side)) -> Result<Vec<Met>> {
        let (a, b) = (from.1, to.1);
        let is_start = to.0.is_empty();
        let moved = !a.is_one_with(&b)
            && (self.renames.has_gone(&from.0, a.node)
                || self.renames.before(&to.0, b.node).is_some());
        if !is_start && (moved || a.attributes.kind != b.attributes.kind) {
            let mut folders = self.removed(from.0, a)?;
            folders.extend(self.added(to.0, b)?);
            return Ok(folders);
        }
        match self.different(&a, &b) {
            Ok(Some(what)) => self.observer.event(Event::Modified(&to.0, a, b, what))?,
            Ok(None) => {}
            Err(e) => self.observer.failed(&to.0, e)?,
        }
        let both = Met { from: Some(from), to: Some(to) };
        Ok(match (is_folder(&a), is_folder(&b)) {
            (true, true) => vec![both],
            _ => Vec::new(),
        })
    }

    /// What is different in two that have one path.
    fn different(&self, a: &Side, b: &Side) -> Result<Option<Different>> {
        let (x, y) = (&a.attributes, &b.attributes);
        let ctime_alone = x.ctime != y.ctime && x.mtime == y.mtime;
        let other_file = !a.is_one_with(b) || x.links != y.links;
        let content = match x.kind {
            // What is in a folder is told by itself.
            NodeKind::Folder => {
                let is_other = rights(a) != rights(b) || ctime_alone;
                return Ok(is_other.then_some(Different::Attributes));
            }
            _ if x.kind != y.kind => true,
            NodeKind::File if x.size != y.size => true,
            NodeKind::File if self.trees.content => !same_content(self.trees, a.node, b.node)?,
            NodeKind::File => x.mtime != y.mtime,
            NodeKind::Link => {
                self.trees.from.0.read_link(a.node)? != self.trees.to.0.read_link(b.node)?
            }
            _ => x.device != y.device,
        };
        let times = (x.mtime, x.ctime) != (y.mtime, y.ctime);
        Ok(match content {
            true => Some(Different::Content),
            false if times || other_file || rights(a) != rights(b) => Some(Different::Attributes),
            false => None,
        })
    }
}

/// Owner, permissions and flags.
fn rights(side: &Side) -> (u32, u32, u32, crate::files::Flags) {
    let a = &side.attributes;
    (a.mode, a.uid, a.gid, a.flags)
}

impl Look for ChangeReporter<'_> {
    fn met(&mut self, met: Met) -> Result<Vec<Met>> {
        match (met.from, met.to) {
            (Some(from), Some(to)) => self.both(from, to),
            (Some((path, side)), None) => self.removed(path, side),
            (None, Some((path, side))) => self.added(path, side),
            (None, None) => Ok(Vec::new()),
        }
    }

    fn failed(&mut self, path: &[u8], error: Error) -> Result<()> {
        self.observer.failed(path, error)
    }
}
