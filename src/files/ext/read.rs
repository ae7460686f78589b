//! Reading what is in an inode's blocks.

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
    let block_size = volume.sup.block_size;
    let (all, mut done) = (buf.len(), 0);
    while done < all {
        let at = offset + done as u64;
        let step = run(volume, inode, at / block_size).and_then(|found| {
            let inside = at % block_size;
            let bytes = found.count.saturating_mul(block_size) - inside;
            let n = bytes.min((all - done) as u64) as usize;
            let part = buf.get_mut(done..done + n).unwrap_or_default();
            match found.at {
                Some(block) => volume.source.read(part, block * block_size + inside)?,
                None => part.fill(0),
            }
            Ok(n)
        });
        match step {
            Ok(n) => done += n,
            Err(e) if done == 0 => return Err(e),
            Err(_) => break,
        }
    }
    Ok(done)
}
