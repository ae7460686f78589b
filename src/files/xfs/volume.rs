//! [`Volume`]: a file system's blocks and inodes.

use std::sync::Arc;

use super::super::findings::Findings;
use super::super::source::Source;
use super::super::tree::{MAX_SIZE, NodeKind};
use super::copies::superblock;
use super::header::Header;
use super::inode::Inode;
use super::superblock::Super;
use crate::error::{Error, Kind, Result};

/// The cache's own kind for blocks of maps, whose checksum was found right.
const CHECKED: u8 = 1;

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

    /// An inode that is in use.
    ///
    /// # Errors
    /// `NotFound` if it is not; `Corrupt`, or what reading the point says.
    pub(super) fn inode(&self, number: u64) -> Result<Inode> {
        let place = self.sup.inode_place(number).filter(|_| !self.sup.is_own(number));
        let at = place.ok_or_else(|| self.no_inode(number))?;
        let raw = self.source.meta(at, 1 << self.sup.inode_log)?;
        let inode = Inode::new(number, at, raw);
        if let Some(what) = inode.wrong(&self.sup) {
            return Err(self.bad(&inode, what));
        }
        match () {
            () if !inode.is_used() => Err(self.no_inode(number)),
            () if inode.kind().is_none() => Err(self.bad(&inode, "has an invalid file type")),
            () if inode.size() > MAX_SIZE => Err(self.bad(&inode, "has an invalid size")),
            () => Ok(inode),
        }
    }

    /// An inode of this kind.
    pub(super) fn inode_of(&self, number: u64, kind: NodeKind) -> Result<Inode> {
        let inode = self.inode(number)?;
        kind.only(inode.kind(), format_args!("inode {number}"))?;
        Ok(inode)
    }

    /// Fails unless a block of metadata of version 5, at byte `at`, has the checksum and belongs to the inode.
    pub(super) fn check(
        &self,
        header: Header,
        bytes: &[u8],
        at: u64,
        inode: &Inode,
        what: &str,
    ) -> Result<()> {
        if !self.sup.v5 {
            return Ok(());
        }
        match header.wrong(bytes, &self.sup.meta_uuid, at, inode.number) {
            None => Ok(()),
            Some(why) => {
                let text = format!("{what} of inode {}: {why}", inode.number);
                Err(self.source.error(Kind::Corrupt, text, at))
            }
        }
    }

    /// A block of an inode's map: its checksum is looked at once.
    pub(super) fn map_block(&self, header: Header, block: u64, inode: &Inode) -> Result<Arc<[u8]>> {
        let at = block << self.sup.block_log;
        let len = 1 << self.sup.block_log;
        // A block that is in the cache has an owner; whether that is this one, the caller sees.
        self.source.unit(CHECKED, block, || {
            let bytes = self.source.meta(at, len)?;
            self.check(header, &bytes, at, inode, "the extent tree")?;
            Ok(bytes)
        })
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

    fn no_inode(&self, number: u64) -> Error {
        Error::new(Kind::NotFound, format!("{}: no inode {number}", self.source.label()))
            .at_path(self.source.path())
    }
}

#[cfg(test)]
mod tests {
    use super::super::made::{FILE, Made, OWNER, Parts, raw_inode};
    use super::*;

    #[test]
    fn only_inodes_in_use_are_there() {
        let mut made = Made::new(true);
        made.put(4608, &raw_inode(true, OWNER, FILE));
        made.put(5120, &raw_inode(true, 10, Parts { mode: 0, ..FILE }));
        made.put(5632, &raw_inode(true, 12, FILE));
        made.put(6144, &raw_inode(true, 12, Parts { size: u64::MAX, ..FILE }));
        made.put(6656, &raw_inode(true, 13, Parts { mode: 0o170_644, ..FILE }));
        made.put(10240, &raw_inode(true, 20, FILE));
        let volume = made.volume();
        let kind = |number| volume.inode(number).map(|i| i.number).map_err(|e| e.kind());
        assert_eq!(kind(OWNER), Ok(OWNER));
        // Free; the file system's own; outside, in a gap between groups.
        for number in [10, 20, 0, 1, 1 << 9, 400, u64::MAX] {
            assert_eq!(kind(number), Err(Kind::NotFound), "{number}");
        }
        // Another's number, a size and a type that cannot be, and none.
        for number in [11, 12, 13, 14] {
            assert_eq!(kind(number), Err(Kind::Corrupt), "{number}");
        }
        let folder = volume.inode_of(OWNER, NodeKind::Folder).map(drop);
        assert_eq!(folder.unwrap_err().kind(), Kind::Usage);
    }
}
