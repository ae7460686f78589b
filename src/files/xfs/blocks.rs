//! Blocks of metadata in a fork: of folders, of their index, of attributes.

use super::header::Header;
use super::inode::{Fork, Inode};
use super::map::run;
use super::volume::Volume;
use crate::error::{Kind, Result};

/// The `count` blocks of a fork from block `block` on, which are one to the file system, and where the first is in
/// bytes; with their checksum looked at.
///
/// # Errors
/// `Corrupt`, also if some of them are not there; or what reading the point says.
pub(super) fn logical(
    volume: &Volume,
    inode: &Inode,
    fork: &Fork<'_>,
    block: u64,
    count: u64,
    header: Header,
) -> Result<(Vec<u8>, u64)> {
    let log = volume.sup.block_log;
    let (mut bytes, mut first, mut done) = (Vec::new(), None, 0);
    while done < count {
        let found = run(volume, inode, fork, block.saturating_add(done))?;
        let n = found.count.min(count - done);
        let Some(place) = found.at else {
            return Err(volume.bad(inode, "has metadata in a hole"));
        };
        first.get_or_insert(place << log);
        bytes.extend(volume.source.meta(place << log, (n << log) as usize)?);
        done += n;
    }
    let at = first.unwrap_or_default();
    volume.check(header, &bytes, at, inode, "a metadata block")?;
    Ok((bytes, at))
}

/// That something in a block at byte `at` cannot be.
pub(super) fn invalid(volume: &Volume, inode: &Inode, what: &str, at: u64) -> crate::error::Error {
    let text = format!("inode {}: {what}", inode.number);
    volume.source.error(Kind::Corrupt, text, at)
}
