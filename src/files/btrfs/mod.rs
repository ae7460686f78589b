//! btrfs, after its on-disk format documentation (btrfs.readthedocs.io).
//!
//! - `superblock`, `checksum`: the superblock and its copies
//! - `chunk`: from logical addresses to places on the device
//! - `node`, `volume`, `walk`: nodes of trees, where they are, and the items in them
//! - `inode`, `folder`: inodes, subvolumes, names, extended attributes
//! - `extent`, `unpack`, `file`: contents
//!
//! Each node is used only if its checksum, place, level, generation, owner and keys are right, each sector of data
//! only if its checksum is, where there is one; else another copy on the same device is tried. What a mount without options
//! shows is the root; subvolumes and snapshots are folders in it. The tree of what was synced last (the log tree) is
//! not replayed, which is a finding. Of the crates, btrfs-fs 0.x wants tokio, which has no place on the read path.

mod checksum;
mod chunk;
mod copied;
mod extent;
mod file;
mod folder;
mod inode;
mod node;
mod superblock;
mod unpack;
mod volume;
mod walk;

use std::sync::Arc;

use super::findings::Findings;
use super::source::Source;
use super::tree::{Attributes, Entry, NodeId, NodeKind, OpenFile, Statistics, Tree, Xattr};
use crate::error::{Error, Kind, Result};
use chunk::Chunks;
pub(super) use copied::check_alone;
pub use copied::with_id;
use inode::{EMPTY, Inode};
use node::{FS_TREE, Key};
use superblock::{MOUNT_ALL, Super};
use volume::Volume;
use walk::Walk;

/// Opens the file system in `source`.
///
/// # Errors
/// `Unsupported` for an unknown incompatible feature, or chunks that are striped over devices; `Corrupt`, or what
/// reading the point says.
pub(super) fn open(source: Source) -> Result<Arc<dyn Tree>> {
    let findings = Findings::default();
    let sup = Super::read(&source, &findings)?;
    let chunks = Chunks::system(&source, &sup)?;
    let mut volume = Volume { source, sup, chunks, findings, sums: None };
    volume.chunks = all_chunks(&volume)?;
    look(&volume);
    let sums = inode::root(&volume, superblock::tree::CSUM);
    match sums {
        Ok((root, _)) => volume.sums = Some(root),
        Err(e) if e.kind() == Kind::NotFound => {}
        Err(e) => return Err(e),
    }
    let id = folder::default_subvolume(&volume)?.unwrap_or(FS_TREE);
    let (_, number) = inode::root(&volume, id)?;
    Ok(Arc::new(Btrfs { volume: Arc::new(volume), root: NodeId { tree: id, number } }))
}

/// Whether there is a file system whose superblock is gone, and a copy of it is right.
pub(super) fn has_copy(source: &Source) -> bool {
    Super::copy(source).is_some()
}

/// All chunks: those of the superblock, which lead to the tree that has all.
fn all_chunks(volume: &Volume) -> Result<Chunks> {
    /// The object that all chunks belong to.
    const OBJECT: u64 = 256;
    let mut chunks = Chunks::system(&volume.source, &volume.sup)?;
    let key = Key { object: OBJECT, kind: inode::kind::CHUNK, offset: 0 };
    let mut walk = Walk::from(volume, volume.sup.chunk_root, key)?;
    while let Some(item) = walk.next_of(OBJECT, inode::kind::CHUNK)? {
        chunks.add(&volume.source, &volume.sup, item.key.offset, item.data())?;
    }
    Ok(chunks)
}

/// Says what is odd about the file system as a whole.
fn look(volume: &Volume) {
    let warn = |kind, what: &str, remedy| volume.findings.warn(&volume.source, kind, what, remedy);
    if volume.sup.device_size > volume.source.size() {
        let what = "the file system is larger than the disk or partition that it is in";
        warn(Kind::Truncated, what, None);
    }
    if volume.sup.has_log {
        let what = "its log tree is not replayed: what the guest synced (fsync) since its last commit, at most 30 \
            seconds before the point as a rule, is missing or old";
        let remedy = "start the guest from this point, or mount it with an overlay, to have that as well (README, \
            'Single files')";
        warn(Kind::Corrupt, what, Some(remedy));
    }
    let (here, elsewhere) = volume.chunks.counts();
    if elsewhere > 0 {
        let what = format!(
            "this is one of {} disks of a btrfs: {elsewhere} of {} chunks are on others, and files that have data \
             there cannot be read",
            volume.sup.devices,
            here + elsewhere
        );
        warn(Kind::Unsupported, &what, Some(MOUNT_ALL));
    }
}

/// An open file system.
struct Btrfs {
    volume: Arc<Volume>,
    root: NodeId,
}

impl Btrfs {
    fn noted<T>(&self, result: Result<T>) -> Result<T> {
        self.volume.noted(result)
    }

    fn inode(&self, node: NodeId) -> Result<Inode> {
        self.noted(Inode::read(&self.volume, node))
    }

    fn inode_of(&self, node: NodeId, kind: NodeKind) -> Result<Inode> {
        if is_empty(node) && kind != NodeKind::Folder {
            return Err(Error::new(Kind::Usage, "this is a folder"));
        }
        self.noted(Inode::of_kind(&self.volume, node, kind))
    }
}

/// Whether this stands for a subvolume that is not there.
fn is_empty(node: NodeId) -> bool {
    node::is_files(node.tree) && node.number & EMPTY > 0
}

impl Tree for Btrfs {
    fn statistics(&self) -> Statistics {
        let sup = &self.volume.sup;
        Statistics {
            kind: "btrfs".into(),
            label: sup.label.clone(),
            uuid: sup.uuid.clone(),
            block_size: sup.sector,
            total: sup.total,
            free: sup.total.saturating_sub(sup.used),
            features: sup.features(),
            ..Statistics::default()
        }
    }

    fn findings(&self) -> &Findings {
        &self.volume.findings
    }

    fn root(&self) -> NodeId {
        self.root
    }

    fn attributes(&self, node: NodeId) -> Result<Attributes> {
        match is_empty(node) {
            true => Ok(inode::empty()),
            false => Ok(self.inode(node)?.attributes()),
        }
    }

    fn lookup(&self, folder: NodeId, name: &[u8]) -> Result<Option<NodeId>> {
        if is_empty(folder) {
            return Ok(None);
        }
        let inode = self.inode_of(folder, NodeKind::Folder)?;
        self.noted(folder::lookup(&self.volume, &inode, name))
    }

    fn read_folder(
        &self,
        folder: NodeId,
        from: u64,
        each: &mut dyn FnMut(Entry) -> bool,
    ) -> Result<()> {
        if is_empty(folder) {
            return Ok(());
        }
        let inode = self.inode_of(folder, NodeKind::Folder)?;
        self.noted(folder::read(&self.volume, &inode, from, each))
    }

    fn is_parent(&self, folder: NodeId, parent: NodeId) -> Result<Option<bool>> {
        self.noted(folder::is_parent(&self.volume, folder, parent)).map(Some)
    }

    fn open(&self, file: NodeId) -> Result<Box<dyn OpenFile>> {
        let inode = self.inode_of(file, NodeKind::File)?;
        Ok(Box::new(file::File { volume: self.volume.clone(), inode }))
    }

    fn read_link(&self, link: NodeId) -> Result<Vec<u8>> {
        let inode = self.inode_of(link, NodeKind::Link)?;
        self.noted(file::link(&self.volume, &inode))
    }

    fn xattrs(&self, node: NodeId) -> Result<Vec<Xattr>> {
        if is_empty(node) {
            return Ok(Vec::new());
        }
        let inode = self.inode(node)?;
        self.noted(folder::xattrs(&self.volume, &inode))
    }
}
