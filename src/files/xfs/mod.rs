//! XFS, versions 4 and 5: as it is on disk. The log is not replayed; whether it would have to be is told.
//!
//! The format is that of "XFS Algorithms & Data Structures" (the XFS developers' book), as `xfs_db` shows it.
//!
//! - `superblock`: sizes and features, allocation groups; `copies`: its copies; `header`: the checksum and owner of metadata
//! - `inode`: fields and forks of inodes
//! - `volume`: blocks and inodes
//! - `map`: where the blocks of a fork are; `blocks`, `hashed`: metadata in them
//! - `file`, `folder`, `xattr`, `acl`: contents, names, attributes
//! - `log`: whether the guest had anything in it that is nowhere else
//!
//! All that has a checksum (version 5) is read only if that is right, and if it says that it belongs there.

mod acl;
mod blocks;
mod copies;
mod file;
mod folder;
mod hashed;
mod header;
mod inode;
mod log;
#[cfg(test)]
mod made;
mod map;
mod superblock;
mod volume;
mod xattr;

use std::ops::Range;
use std::sync::Arc;

use super::findings::Findings;
use super::source::Source;
use super::tree::{Attributes, Entry, NodeId, NodeKind, OpenFile, Statistics, Tree, Xattr};
use crate::error::{Error, Kind, Result};
use inode::Inode;
use volume::Volume;

/// Opens the file system in `source`.
///
/// # Errors
/// `Unsupported` for an unknown incompatible feature, or one that xfs_repair did not finish with; `Corrupt`, or
/// what reading the point says.
pub(super) fn open(source: Source) -> Result<Arc<dyn Tree>> {
    let volume = Volume::new(source)?;
    let sup = &volume.sup;
    if sup.blocks.saturating_mul(sup.block_size()) > volume.source.size() {
        let what = "the file system is larger than the disk or partition that it is in";
        volume.findings.warn(&volume.source, Kind::Truncated, what, None);
    }
    log::tell(&volume);
    Ok(Arc::new(Xfs { volume: Arc::new(volume) }))
}

/// Whether there is a file system whose superblock is gone, and a copy of it leads to a root folder.
pub(super) fn has_copy(source: &Source) -> bool {
    let volume = copies::copy(source).and_then(|_| Volume::new(source.clone()).ok());
    volume.is_some_and(|v| v.inode_of(v.sup.root, NodeKind::Folder).is_ok())
}

/// An open file system.
struct Xfs {
    volume: Arc<Volume>,
}

impl Xfs {
    fn noted<T>(&self, result: Result<T>) -> Result<T> {
        self.volume.noted(result)
    }

    fn number(node: NodeId) -> Result<u64> {
        match node.tree {
            0 => Ok(node.number),
            _ => Err(Error::new(Kind::NotFound, "no such inode")),
        }
    }

    fn inode(&self, node: NodeId) -> Result<Inode> {
        self.noted(self.volume.inode(Self::number(node)?))
    }

    fn inode_of(&self, node: NodeId, kind: NodeKind) -> Result<Inode> {
        self.noted(self.volume.inode_of(Self::number(node)?, kind))
    }
}

impl Tree for Xfs {
    fn statistics(&self) -> Statistics {
        let sup = &self.volume.sup;
        Statistics {
            kind: "xfs".into(),
            label: sup.label.clone(),
            uuid: sup.uuid_text(),
            block_size: sup.block_size(),
            total: sup.blocks.saturating_mul(sup.block_size()),
            free: sup.free_blocks.saturating_mul(sup.block_size()),
            nodes: Some(sup.inodes.saturating_sub(sup.free_inodes)),
            // More are made as they are needed.
            free_nodes: None,
            features: sup.features(),
        }
    }

    fn findings(&self) -> &Findings {
        &self.volume.findings
    }

    fn root(&self) -> NodeId {
        NodeId { tree: 0, number: self.volume.sup.root }
    }

    fn attributes(&self, node: NodeId) -> Result<Attributes> {
        let inode = self.inode(node)?;
        let found = inode.attributes(&self.volume.sup);
        self.noted(found.ok_or_else(|| self.volume.bad(&inode, "has an invalid file type")))
    }

    fn lookup(&self, folder: NodeId, name: &[u8]) -> Result<Option<NodeId>> {
        let inode = self.inode_of(folder, NodeKind::Folder)?;
        self.noted(folder::lookup(&self.volume, &inode, name))
    }

    fn read_folder(
        &self,
        folder: NodeId,
        from: u64,
        each: &mut dyn FnMut(Entry) -> bool,
    ) -> Result<()> {
        let inode = self.inode_of(folder, NodeKind::Folder)?;
        self.noted(folder::read(&self.volume, &inode, from, each))
    }

    fn folder_places(&self, folder: NodeId) -> Result<Vec<Range<u64>>> {
        let inode = self.inode_of(folder, NodeKind::Folder)?;
        self.noted(folder::places(&self.volume, &inode))
    }

    fn is_parent(&self, folder: NodeId, parent: NodeId) -> Result<Option<bool>> {
        let inode = self.inode_of(folder, NodeKind::Folder)?;
        self.noted(folder::is_parent(&self.volume, &inode, parent.number)).map(Some)
    }

    fn open(&self, file: NodeId) -> Result<Box<dyn OpenFile>> {
        let inode = self.inode_of(file, NodeKind::File)?;
        Ok(Box::new(self.noted(file::File::new(&self.volume, inode))?))
    }

    fn read_link(&self, link: NodeId) -> Result<Vec<u8>> {
        let inode = self.inode_of(link, NodeKind::Link)?;
        self.noted(file::link(&self.volume, &inode))
    }

    fn xattrs(&self, node: NodeId) -> Result<Vec<Xattr>> {
        let inode = self.inode(node)?;
        self.noted(xattr::all(&self.volume, &inode))
    }
}
