//! The contents of files and the texts of symbolic links.

use std::sync::Arc;

use super::super::tree::{OpenFile, Stretch};
use super::inode::{BLOCK_LEN, Inode, flags};
use super::map::run;
use super::read::read_blocks;
use super::volume::Volume;
use super::xattr;
use crate::error::Result;

/// The longest text of a link.
const MAX_LINK: u64 = 65536;

/// A plain file.
pub(super) struct File {
    volume: Arc<Volume>,
    inode: Inode,
    size: u64,
    /// All of it, where it is in the inode.
    inside: Option<Vec<u8>>,
}

impl File {
    /// Opens it.
    ///
    /// # Errors
    /// `Encrypted`, or `Corrupt`.
    pub(super) fn new(volume: &Arc<Volume>, inode: Inode) -> Result<File> {
        if inode.has(flags::ENCRYPT) {
            return Err(volume.encrypted(&inode));
        }
        let inside = match inode.has(flags::INLINE_DATA) {
            true => Some(xattr::inline_file(volume, &inode)?),
            false => None,
        };
        Ok(File { volume: volume.clone(), size: inode.size(&volume.sup), inode, inside })
    }
}

impl OpenFile for File {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        if let Some(data) = &self.inside {
            let from = usize::try_from(offset).unwrap_or(usize::MAX).min(data.len());
            let found = data.get(from..).unwrap_or_default();
            let n = found.len().min(buf.len());
            buf.iter_mut().zip(found).for_each(|(to, from)| *to = *from);
            return Ok(n);
        }
        let left = self.size.saturating_sub(offset);
        let n = (buf.len() as u64).min(left) as usize;
        let part = buf.get_mut(..n).unwrap_or_default();
        self.volume.noted(read_blocks(&self.volume, &self.inode, part, offset))
    }

    fn stretch(&self, offset: u64) -> Result<Option<Stretch>> {
        if offset >= self.size {
            return Ok(None);
        }
        if self.inside.is_some() {
            return Ok(Some(Stretch { end: self.size, hole: false }));
        }
        let block_size = self.volume.sup.block_size;
        let found = self.volume.noted(run(&self.volume, &self.inode, offset / block_size))?;
        let end = (offset / block_size).saturating_add(found.count).saturating_mul(block_size);
        Ok(Some(Stretch { end: end.min(self.size), hole: found.at.is_none() }))
    }
}

/// The text of a symbolic link.
///
/// # Errors
/// `Encrypted`, `Corrupt`, or what reading the point says.
pub(super) fn link(volume: &Volume, inode: &Inode) -> Result<Vec<u8>> {
    if inode.has(flags::ENCRYPT) {
        return Err(volume.encrypted(inode));
    }
    if inode.has(flags::INLINE_DATA) {
        return xattr::inline_file(volume, inode);
    }
    let size = inode.size(&volume.sup);
    if size > MAX_LINK {
        return Err(volume.bad(inode, "is a symbolic link with a target that is too long"));
    }
    let own = if inode.attribute_block() > 0 { volume.sup.block_size } else { 0 };
    let is_short = size < BLOCK_LEN as u64 && !inode.has(flags::EXTENTS);
    if is_short && inode.allocated(&volume.sup) <= own {
        return Ok(inode.block_bytes().iter().take(size as usize).copied().collect());
    }
    let mut text = vec![0; size as usize];
    let n = read_blocks(volume, inode, &mut text, 0)?;
    text.truncate(n);
    Ok(text)
}
