//! The contents of files and the texts of symbolic links.

use std::sync::Arc;

use super::super::bytes::{be32, part};
use super::super::runs::read;
use super::super::tree::{OpenFile, Stretch};
use super::header::OUTSIDE;
use super::inode::{Fork, Form, Inode};
use super::map::run;
use super::volume::Volume;
use crate::error::{Error, Kind, Result};

/// The longest text of a link.
const MAX_LINK: u64 = 1024;
/// What is before a part of it in version 5.
const LINK_HEAD: usize = 56;

/// A plain file.
pub(super) struct File {
    volume: Arc<Volume>,
    inode: Inode,
}

impl File {
    /// Opens it.
    ///
    /// # Errors
    /// `Unsupported` if its contents are on another device; `Corrupt`.
    pub(super) fn new(volume: &Arc<Volume>, inode: Inode) -> Result<File> {
        if inode.is_realtime() {
            let what = format!("inode {} has its contents on the realtime device", inode.number);
            let error = volume.source.error(Kind::Unsupported, what, inode.at);
            return Err(error.remedy("mount both disks' points with -o rtdev="));
        }
        match inode.data().map(|f| f.form) {
            Some(Form::Extents | Form::Tree) => Ok(File { volume: volume.clone(), inode }),
            _ => Err(volume.bad(&inode, "is a file with an invalid form")),
        }
    }

    fn fork(&self) -> Result<Fork<'_>> {
        self.inode.data().ok_or_else(|| self.volume.bad(&self.inode, "has an invalid form"))
    }

    fn noted(&self, error: Error) -> Error {
        self.volume.findings.failed(&self.volume.source, error)
    }
}

impl OpenFile for File {
    fn size(&self) -> u64 {
        self.inode.size()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        let left = self.size().saturating_sub(offset);
        let n = (buf.len() as u64).min(left) as usize;
        let (volume, part) = (&self.volume, buf.get_mut(..n).unwrap_or_default());
        let fork = self.fork()?;
        let find = |block| run(volume, &self.inode, &fork, block);
        let done = read(&volume.source, volume.sup.block_size(), part, offset, find);
        done.map_err(|e| self.noted(e))
    }

    fn stretch(&self, offset: u64) -> Result<Option<Stretch>> {
        if offset >= self.size() {
            return Ok(None);
        }
        let log = self.volume.sup.block_log;
        let block = offset >> log;
        let found = run(&self.volume, &self.inode, &self.fork()?, block);
        let found = found.map_err(|e| self.noted(e))?;
        let end = block.saturating_add(found.count).saturating_mul(1 << log);
        Ok(Some(Stretch { end: end.min(self.size()), hole: found.at.is_none() }))
    }
}

/// The text of a symbolic link.
///
/// # Errors
/// `Corrupt`, or what reading the point says.
pub(super) fn link(volume: &Volume, inode: &Inode) -> Result<Vec<u8>> {
    let size = inode.size();
    let bad = |what| volume.bad(inode, what);
    if size == 0 || size > MAX_LINK {
        return Err(bad("is a symbolic link with an invalid length"));
    }
    let fork = inode.data().ok_or_else(|| bad("has an invalid form"))?;
    let text = match fork.form {
        Form::Local => part(fork.bytes, 0, size as usize).to_vec(),
        _ => outside(volume, inode, &fork, size as usize)?,
    };
    match text.len() as u64 == size {
        true => Ok(text),
        false => Err(bad("is a symbolic link without its whole text")),
    }
}

/// The text that is in blocks: in version 5 each extent of them begins with a header.
fn outside(volume: &Volume, inode: &Inode, fork: &Fork<'_>, size: usize) -> Result<Vec<u8>> {
    let (mut text, mut block) = (Vec::new(), 0);
    let head = if volume.sup.v5 { LINK_HEAD } else { 0 };
    // As many blocks as the text can take; each run is one of them at least.
    while text.len() < size && block < 2 * MAX_LINK / 512 {
        let found = run(volume, inode, fork, block)?;
        let Some(place) = found.at else { break };
        let (at, all) = (place << volume.sup.block_log, found.count << volume.sup.block_log);
        if all > 2 * MAX_LINK.max(volume.sup.block_size()) {
            return Err(volume.bad(inode, "is a symbolic link with too many blocks"));
        }
        let bytes = volume.source.meta(at, all as usize)?;
        if head > 0 {
            volume.check(OUTSIDE, &bytes, at, inode, "the symbolic link")?;
            if part(&bytes, 0, 4) != b"XSLM" || be32(&bytes, 4) as usize != text.len() {
                return Err(volume.bad(inode, "is a symbolic link with an invalid block"));
            }
        }
        text.extend_from_slice(part(&bytes, head, size - text.len()));
        block = block.saturating_add(found.count);
    }
    Ok(text)
}
