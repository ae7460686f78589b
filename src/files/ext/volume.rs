//! [`Volume`]: a file system's blocks and inodes, as they are after its journal was replayed.

use super::super::findings::Findings;
use super::super::source::Source;
use super::super::tree::{MAX_SIZE, NodeKind};
use super::copies::superblock;
use super::inode::Inode;
use super::superblock::{Group, Super, wrong};
use crate::error::{Error, Kind, Result};

/// The root folder's inode.
pub(super) const ROOT: u32 = 2;

/// What all parts of the reader share.
pub(super) struct Volume {
    pub source: Source,
    pub sup: Super,
    pub findings: Findings,
}

impl Volume {
    /// Reads the superblock.
    ///
    /// # Errors
    /// As [`superblock`].
    pub(super) fn new(source: Source) -> Result<Volume> {
        let findings = Findings::default();
        let sup = superblock(&source, &findings)?;
        Ok(Volume { source, sup, findings })
    }

    /// Where a block is, in bytes, if `count` blocks from there are inside the file system.
    pub(super) fn place(&self, block: u64, count: u64) -> Result<u64> {
        let inside = block.checked_add(count).is_some_and(|end| end <= self.sup.blocks);
        let at = block.checked_mul(self.sup.block_size).filter(|_| inside && block > 0);
        at.ok_or_else(|| {
            let what = format!("block {block} is beyond the end of the file system");
            self.source.error(Kind::Corrupt, what, 0)
        })
    }

    /// The bytes of a block of metadata.
    pub(super) fn block(&self, block: u64) -> Result<Vec<u8>> {
        let at = self.place(block, 1)?;
        self.source.meta(at, self.sup.block_size as usize)
    }

    /// An inode that is in use.
    ///
    /// # Errors
    /// `NotFound` if it is not; `Corrupt`, or what reading the point says.
    pub(super) fn inode(&self, number: u32) -> Result<Inode> {
        let inode = self.any_inode(number)?;
        if inode.links() == 0 || inode.mode() == 0 {
            return Err(self.no_inode(number));
        }
        if inode.kind().is_none() {
            return Err(self.bad(&inode, "has an invalid file type"));
        }
        if inode.size(&self.sup) > MAX_SIZE {
            return Err(self.bad(&inode, "has an invalid size"));
        }
        Ok(inode)
    }

    /// An inode, in use or not; with its checksum checked.
    pub(super) fn any_inode(&self, number: u32) -> Result<Inode> {
        let sup = &self.sup;
        let index = number.checked_sub(1).filter(|i| *i < sup.inodes);
        let index = index.ok_or_else(|| self.no_inode(number))?;
        let group = Group::read(&self.source, sup, u64::from(index / sup.inodes_per_group))?;
        if group.has_none {
            return Err(self.no_inode(number));
        }
        let inside = u64::from(index % sup.inodes_per_group) * sup.inode_size as u64;
        let at = self.place(group.inodes_at, 1 + inside / sup.block_size)? + inside;
        let raw = self.source.meta(at, sup.inode_size)?;
        // One that was never used has no checksum.
        let unused = raw.iter().all(|b| *b == 0);
        let inode = Inode::new(sup, number, at, raw);
        if sup.has_checksums() && !unused && !inode.is_right() {
            return Err(wrong(&self.source, &format!("inode {number}"), at));
        }
        Ok(inode)
    }

    /// An inode of this kind.
    pub(super) fn inode_of(&self, number: u32, kind: NodeKind) -> Result<Inode> {
        let inode = self.inode(number)?;
        kind.only(inode.kind(), format_args!("inode {number}"))?;
        Ok(inode)
    }

    /// Makes a lasting error a finding, and hands it on.
    pub(super) fn noted<T>(&self, result: Result<T>) -> Result<T> {
        self.findings.noted(&self.source, result)
    }

    /// Something wrong with an inode.
    pub(super) fn bad(&self, inode: &Inode, what: &str) -> Error {
        let text = format!("inode {} {what}", inode.number);
        self.source.error(Kind::Corrupt, text, inode.at)
    }

    /// That contents are encrypted.
    pub(super) fn encrypted(&self, inode: &Inode) -> Error {
        let what = match inode.kind() {
            Some(NodeKind::Folder) => "is an encrypted folder: its names cannot be read",
            _ => "is encrypted: its contents cannot be read",
        };
        let text = format!("inode {} {what}", inode.number);
        let error = self.source.error(Kind::Encrypted, text, inode.at);
        error.remedy("start the guest from this point and unlock it there (fscrypt unlock)")
    }

    fn no_inode(&self, number: u32) -> Error {
        Error::new(Kind::NotFound, format!("{}: no inode {number}", self.source.label()))
            .at_path(self.source.path())
    }
}
