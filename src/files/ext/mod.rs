//! ext2, ext3 and ext4, with their journal replayed in memory.
//!
//! - `superblock`: sizes and features, groups; `copies`: its copies
//! - `inode`: fields and checksums of inodes
//! - `volume`: blocks and inodes
//! - `map`: where the blocks of a file are; `read`: what is in them
//! - `file`, `folder`, `xattr`: contents, names, attributes
//! - `journal`: the blocks of which the journal has a newer version
//!
//! All that has a checksum (`metadata_csum`) is read only if that is right.

mod copies;
mod file;
mod folder;
mod inode;
mod journal;
mod map;
mod read;
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
use volume::{ROOT, Volume};

/// Opens the file system in `source`.
///
/// # Errors
/// `Unsupported` for an unknown incompatible feature; `Corrupt`, or what reading the point says.
pub(super) fn open(source: Source) -> Result<Arc<dyn Tree>> {
    let mut volume = Volume::new(source)?;
    if volume.sup.needs_recovery() {
        volume = replayed(volume);
    }
    let sup = &volume.sup;
    let end = sup.blocks.saturating_mul(sup.block_size);
    if end > volume.source.size() {
        let what = "the file system is larger than the disk or partition that it is in";
        volume.findings.warn(&volume.source, Kind::Truncated, what, None);
    }
    if sup.has_errors {
        let what = "the guest's kernel noted errors in this file system";
        let remedy = "run e2fsck in the guest, or on a restored copy";
        volume.findings.warn(&volume.source, Kind::Corrupt, what, Some(remedy));
    }
    Ok(Arc::new(Ext { volume: Arc::new(volume) }))
}

/// Whether there is a file system whose superblock is gone, and a copy of it leads to a root folder.
pub(super) fn has_copy(source: &Source) -> bool {
    let volume = copies::copy(source).and_then(|_| Volume::new(source.clone()).ok());
    volume.is_some_and(|v| v.inode_of(ROOT, NodeKind::Folder).is_ok())
}

/// The same as it is after its journal was replayed; as it is, with a finding, where that cannot be.
fn replayed(base: Volume) -> Volume {
    let opened = journal::replayed(&base).and_then(|(source, findings)| {
        let volume = Volume::new(source)?;
        findings.list().into_iter().for_each(|f| volume.findings.note(f));
        Ok(volume)
    });
    opened.unwrap_or_else(|e| {
        let what = format!(
            "its journal cannot be replayed, and what is only there is missing or old: {}",
            e.message()
        );
        let remedy = "start the guest from this point: its kernel says what is wrong with it";
        base.findings.warn(&base.source, e.kind(), &what, Some(remedy));
        base
    })
}

/// An open file system.
struct Ext {
    volume: Arc<Volume>,
}

impl Ext {
    fn noted<T>(&self, result: Result<T>) -> Result<T> {
        self.volume.noted(result)
    }

    fn number(node: NodeId) -> Result<u32> {
        let number = u32::try_from(node.number).ok().filter(|_| node.tree == 0);
        number.ok_or_else(|| Error::new(Kind::NotFound, "no such inode"))
    }

    fn inode(&self, node: NodeId) -> Result<Inode> {
        self.noted(self.volume.inode(Self::number(node)?))
    }

    fn inode_of(&self, node: NodeId, kind: NodeKind) -> Result<Inode> {
        self.noted(self.volume.inode_of(Self::number(node)?, kind))
    }
}

impl Tree for Ext {
    fn statistics(&self) -> Statistics {
        let sup = &self.volume.sup;
        Statistics {
            kind: sup.kind().into(),
            label: sup.label.clone(),
            uuid: sup.uuid.clone(),
            block_size: sup.block_size,
            total: sup.blocks.saturating_mul(sup.block_size),
            free: sup.free_blocks.saturating_mul(sup.block_size),
            nodes: Some(u64::from(sup.inodes.saturating_sub(sup.free_inodes))),
            free_nodes: Some(u64::from(sup.free_inodes)),
            features: sup.features(),
        }
    }

    fn findings(&self) -> &Findings {
        &self.volume.findings
    }

    fn root(&self) -> NodeId {
        NodeId { tree: 0, number: u64::from(ROOT) }
    }

    fn attributes(&self, node: NodeId) -> Result<Attributes> {
        let inode = self.inode(node)?;
        let found = inode.attributes(&self.volume.sup);
        self.noted(found.ok_or_else(|| self.volume.bad(&inode, "has an invalid file type")))
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
