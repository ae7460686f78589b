//! Folders: in the inode (`short`), or in blocks of entries (`entries`), with a hash index behind them (`index`)
//! where they are more than one.

mod entries;
mod index;
mod short;

use super::super::runs::wrong_folder;
use super::super::tree::NodeId;
use super::blocks::logical;
use super::inode::{Fork, Form, Inode};
use super::map::run;
use super::volume::Volume;
use crate::error::{Error, Result};
use entries::{Each, HEADER, Listed, list};
use index::INDEX_AT;

/// Damaged blocks of a folder that are passed over before the rest is given up.
const MAX_BAD: usize = 1024;

/// Gives the entries of a folder from `from` on: see [`super::super::Tree::read_folder`]. A block that is wrong
/// does not hide those behind it: it is told at the end.
///
/// # Errors
/// `Corrupt`, or what reading the point says.
pub(super) fn read(volume: &Volume, inode: &Inode, from: u64, each: &mut Each<'_>) -> Result<()> {
    let fork = fork(volume, inode)?;
    if fork.form == Form::Local {
        return short::read(volume, inode, &fork, from, each);
    }
    let mut reading = Reading { volume, inode, fork, from, each, error: None, bad: 0 };
    reading.blocks()?;
    reading.error.map_or(Ok(()), Err)
}

fn fork<'a>(volume: &Volume, inode: &'a Inode) -> Result<Fork<'a>> {
    let fork = inode.data().filter(|f| f.form != Form::Device);
    fork.ok_or_else(|| volume.bad(inode, "is a directory with an invalid form"))
}

/// The node that a folder has under this name: by its index, and where that has none by all its entries.
///
/// # Errors
/// As [`read`].
pub(super) fn lookup(volume: &Volume, inode: &Inode, name: &[u8]) -> Result<Option<NodeId>> {
    let ignores_case = volume.sup.ignores_case;
    let fork = fork(volume, inode)?;
    if !ignores_case && fork.form != Form::Local {
        // What is wrong with the index is no reason not to look.
        if let Ok(Some(found)) = index::find(volume, inode, &fork, name) {
            return Ok(Some(found));
        }
    }
    let mut found = None;
    let is_it = |other: &[u8]| match ignores_case {
        true => name.eq_ignore_ascii_case(other),
        false => name == other,
    };
    let all = read(volume, inode, 0, &mut |entry| {
        if is_it(&entry.name) {
            found = Some(entry.node);
        }
        found.is_none()
    });
    match found {
        Some(node) => Ok(Some(node)),
        None => all.map(|()| None),
    }
}

struct Reading<'a, 'b> {
    volume: &'a Volume,
    inode: &'a Inode,
    fork: Fork<'a>,
    from: u64,
    each: &'a mut Each<'b>,
    /// The first error of a block, and how many had one.
    error: Option<Error>,
    bad: usize,
}

impl Reading<'_, '_> {
    fn blocks(&mut self) -> Result<()> {
        let (volume, inode, fork) = (self.volume, self.inode, self.fork);
        let (log, step) = (volume.sup.block_log, 1 << volume.sup.dir_log);
        let find = |block| run(volume, inode, &fork, block);
        let end = INDEX_AT >> log;
        let mut block = (self.from >> log) / step * step;
        if block == 0
            && let Some(what) = wrong_folder(end, volume.sup.blocks, find)?
        {
            return Err(volume.bad(inode, what));
        }
        while block < end && self.bad < MAX_BAD {
            let found = find(block)?;
            if found.at.is_none() {
                // A block that begins with a hole ends with one.
                block = block.saturating_add(found.count).saturating_add(step - 1) / step * step;
                continue;
            }
            if !self.block(block)? {
                return Ok(());
            }
            block += step;
        }
        Ok(())
    }

    /// The entries of the folder's block that begins with block `block`. Whether more is wanted.
    fn block(&mut self, block: u64) -> Result<bool> {
        let (volume, inode, from) = (self.volume, self.inode, self.from);
        let read = logical(volume, inode, &self.fork, block, 1 << volume.sup.dir_log, HEADER);
        let listed = read.and_then(|(bytes, at)| {
            let offset = block << volume.sup.block_log;
            list(volume, inode, &bytes, Listed { offset, at, from }, self.each)
        });
        match listed {
            Ok(more) => Ok(more),
            Err(e) if e.kind().is_lasting() => {
                self.bad += 1;
                self.error.get_or_insert(e);
                Ok(true)
            }
            Err(e) => Err(e),
        }
    }
}
