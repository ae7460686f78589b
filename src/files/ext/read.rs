//! Reading what is in an inode's blocks.

use super::super::runs::read;
use super::inode::Inode;
use super::map::run;
use super::volume::Volume;
use crate::error::Result;

/// Fills `buf` with what is in an inode's blocks from `offset` on: all of it, or what is before something bad.
///
/// # Errors
/// `Corrupt` if that is at the beginning, or what reading the point says.
pub(super) fn read_blocks(
    volume: &Volume,
    inode: &Inode,
    buf: &mut [u8],
    offset: u64,
) -> Result<usize> {
    read(&volume.source, volume.sup.block_size, buf, offset, |block| run(volume, inode, block))
}
