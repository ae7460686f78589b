//! Folders of a few names, which are in the inode.

use super::super::super::bytes::{be32, be64, byte, part};
use super::super::super::tree::NodeKind;
use super::super::inode::{Fork, Inode};
use super::super::volume::Volume;
use super::entries::{Each, given};
use crate::error::Result;

/// How many entries, how many of them need eight bytes for a number, and the number of the parent.
const COUNTS: usize = 2;
/// Length of the name, and where the entry would be in a block.
const ENTRY_HEAD: usize = 3;
/// Of eight bytes the numbers take seven.
const NUMBER: u64 = 0x00ff_ffff_ffff_ffff;

/// The folder that it is in.
pub(super) fn parent(fork: &Fork<'_>) -> u64 {
    match byte(fork.bytes, 1) > 0 {
        true => be64(fork.bytes, COUNTS) & NUMBER,
        false => u64::from(be32(fork.bytes, COUNTS)),
    }
}

/// Gives the entries from `from` on.
///
/// # Errors
/// `Corrupt`; what was right before that has been given.
pub(super) fn read(
    volume: &Volume,
    inode: &Inode,
    fork: &Fork<'_>,
    from: u64,
    each: &mut Each<'_>,
) -> Result<()> {
    let bytes = part(fork.bytes, 0, usize::try_from(inode.size()).unwrap_or(usize::MAX));
    let wide = if byte(bytes, 1) > 0 { 8 } else { 4 };
    let more = usize::from(volume.sup.has_ftype);
    let mut at = COUNTS + wide;
    for _ in 0..byte(bytes, 0) {
        let name = part(bytes, at + ENTRY_HEAD, usize::from(byte(bytes, at)));
        let behind = at + ENTRY_HEAD + usize::from(byte(bytes, at));
        let number = match wide {
            8 => be64(bytes, behind + more) & NUMBER,
            _ => u64::from(be32(bytes, behind + more)),
        };
        let kind = NodeKind::of_entry(byte(bytes, behind)).filter(|_| more > 0);
        at = behind + more + wide;
        if at > bytes.len() || name.is_empty() {
            return Err(volume.bad(inode, "has invalid directory entries"));
        }
        let next = at as u64;
        if next > from
            && let Some(entry) = given(volume, inode, name, number, kind, next)
            && !each(entry)
        {
            return Ok(());
        }
    }
    Ok(())
}
