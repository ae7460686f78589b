//! The contents of files and the texts of symbolic links.

use std::sync::Arc;

use super::super::tree::{OpenFile, Stretch};
use super::extent::{Data, extent, sums, unpacked};
use super::inode::Inode;
use super::volume::Volume;
use crate::error::Result;

/// The longest text of a link.
const MAX_LINK: u64 = 65536;
/// Bytes that are read and checked at once, where they do not begin or end with a sector.
const STEP: u64 = 256 << 10;

/// A plain file.
pub(super) struct File {
    pub volume: Arc<Volume>,
    pub inode: Inode,
}

impl OpenFile for File {
    fn size(&self) -> u64 {
        self.inode.size()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        self.volume.noted(read(&self.volume, &self.inode, buf, offset))
    }

    fn stretch(&self, offset: u64) -> Result<Option<Stretch>> {
        let size = self.inode.size();
        if offset >= size {
            return Ok(None);
        }
        let found = self.volume.noted(extent(&self.volume, &self.inode, offset))?;
        let hole = matches!(found.data, Data::Hole);
        Ok(Some(Stretch { end: found.end.min(size), hole }))
    }
}

/// Fills `buf` with what is at `offset`: all of it, or what is before something bad.
fn read(volume: &Volume, inode: &Inode, buf: &mut [u8], offset: u64) -> Result<usize> {
    let left = inode.size().saturating_sub(offset);
    let all = (buf.len() as u64).min(left) as usize;
    let mut done = 0;
    while let Some(rest) = buf.get_mut(done..all).filter(|r| !r.is_empty()) {
        match step(volume, inode, rest, offset + done as u64) {
            Ok(n) => done += n,
            Err(e) if done == 0 => return Err(e),
            Err(_) => break,
        }
    }
    Ok(done)
}

/// Fills the beginning of `buf`; how much.
fn step(volume: &Volume, inode: &Inode, buf: &mut [u8], at: u64) -> Result<usize> {
    let found = extent(volume, inode, at)?;
    let n = (found.end - at).min(buf.len() as u64) as usize;
    let inside = at - found.begin;
    let (to, _) = buf.split_at_mut(n);
    match &found.data {
        Data::Hole => to.fill(0),
        Data::Inside(bytes) => copy(bytes, inside, to),
        Data::Packed(packed) => {
            let bytes = unpacked(volume, packed, inode.has_sums())?;
            copy(bytes.bytes(), packed.from + inside, to);
        }
        Data::Plain(logical) => return plain(volume, inode, logical + inside, to),
    }
    Ok(n)
}

/// The bytes from `from` on, then zeros.
fn copy(bytes: &[u8], from: u64, to: &mut [u8]) {
    let found = usize::try_from(from).ok().and_then(|f| bytes.get(f..)).unwrap_or_default();
    let n = found.len().min(to.len());
    let (data, zeros) = to.split_at_mut(n);
    data.copy_from_slice(found.get(..n).unwrap_or_default());
    zeros.fill(0);
}

/// Reads data at a logical address, whole sectors at a time: those are what has checksums.
fn plain(volume: &Volume, inode: &Inode, logical: u64, to: &mut [u8]) -> Result<usize> {
    let sector = volume.sup.sector;
    let before = logical % sector;
    let n = (to.len() as u64).min(STEP - before);
    let first = logical - before;
    let len = (before + n).next_multiple_of(sector);
    let sums = match inode.has_sums() {
        true => sums(volume, first, (len / sector) as usize)?,
        false => Vec::new(),
    };
    let mut bytes = vec![0; len as usize];
    let to = to.get_mut(..n as usize).unwrap_or_default();
    volume.data(&mut bytes, first, &sums)?;
    copy(&bytes, before, to);
    Ok(n as usize)
}

/// The text of a symbolic link.
///
/// # Errors
/// `Corrupt`, or what reading the point says.
pub(super) fn link(volume: &Volume, inode: &Inode) -> Result<Vec<u8>> {
    if inode.size() > MAX_LINK {
        let what = "is a symbolic link with a target that is too long";
        return Err(volume.bad_inode(inode.root.id, inode.number, what));
    }
    let mut text = vec![0; inode.size() as usize];
    let n = read(volume, inode, &mut text, 0)?;
    if n < text.len() {
        let what = "is a symbolic link whose target cannot be read";
        return Err(volume.bad_inode(inode.root.id, inode.number, what));
    }
    Ok(text)
}
