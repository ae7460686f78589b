//! The contents of files and the texts of symbolic links.

use std::sync::Arc;

use super::super::bytes::{be32, part};
use super::super::runs::read;
use super::super::tree::{OpenFile, Stretch};
use super::header::OUTSIDE;
use super::inode::{Fork, Form, Inode};
use super::map::run;
use super::volume::Volume;
use crate::error::{Kind, Result};

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
        volume.noted(read(&volume.source, volume.sup.block_size(), part, offset, find))
    }

    fn stretch(&self, offset: u64) -> Result<Option<Stretch>> {
        if offset >= self.size() {
            return Ok(None);
        }
        let log = self.volume.sup.block_log;
        let block = offset >> log;
        let found = self.volume.noted(run(&self.volume, &self.inode, &self.fork()?, block))?;
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

#[cfg(test)]
mod tests {
    use super::super::made::{FILE, Made, Parts, extent, inode};
    use super::*;

    const LINK: Parts<'static> = Parts { mode: 0o120_777, ..FILE };

    #[test]
    fn contents_have_holes_and_an_end() {
        let mut made = Made::new(true);
        made.put(50 << 10, &[7; 2048]);
        let volume = Arc::new(made.volume());
        let list = [extent(1, 50, 2, true), extent(3, 60, 2, false)].concat();
        let parts = Parts { data: &list, extents: [2, 0], size: 3000, ..FILE };
        let file = File::new(&volume, inode(true, parts)).unwrap();
        let mut buf = [9; 5000];
        assert_eq!(file.read_at(&mut buf, 1000).unwrap(), 2000);
        assert!(buf[..24] == [0; 24] && buf[24..2000] == [7; 1976] && buf[2000] == 9);
        assert_eq!(file.stretch(0).unwrap(), Some(Stretch { end: 1024, hole: true }));
        assert_eq!(file.stretch(1030).unwrap(), Some(Stretch { end: 3000, hole: false }));
        assert_eq!((file.stretch(3000).unwrap(), file.read_at(&mut buf, 3000).unwrap()), (None, 0));
        // Exabytes of nothing, and what is preallocated.
        let huge = Parts { size: i64::MAX as u64, ..parts };
        let file = File::new(&volume, inode(true, huge)).unwrap();
        assert!(file.stretch(4000).unwrap().unwrap().hole);
        assert_eq!(file.stretch(1 << 20).unwrap().unwrap().end, i64::MAX as u64);
        assert_eq!(file.read_at(&mut buf, (1 << 62) + 5).unwrap(), 5000);
        assert!(buf.iter().all(|b| *b == 0));
        assert!(File::new(&volume, inode(true, Parts { forms: [1, 2], ..FILE })).is_err());
    }

    #[test]
    fn links_are_in_the_inode_or_in_blocks_with_headers() {
        for v5 in [true, false] {
            let mut made = Made::new(v5);
            let text: Vec<u8> = (0..1000).map(|i| b'a' + (i % 26) as u8).collect();
            let head = if v5 { LINK_HEAD } else { 0 };
            let part = |offset: usize, text: &[u8]| {
                let mut bytes = vec![0; 1024];
                if v5 {
                    bytes[..4].copy_from_slice(b"XSLM");
                    bytes[4..8].copy_from_slice(&(offset as u32).to_be_bytes());
                }
                bytes[head..head + text.len()].copy_from_slice(text);
                bytes
            };
            let first = (1024 - head).min(text.len());
            made.block(50, OUTSIDE, part(0, &text[..first]));
            made.block(52, OUTSIDE, part(first, &text[first..]));
            let volume = made.volume();
            let list = [extent(0, 50, 1, true), extent(1, 52, 1, true)].concat();
            let whole = Parts { data: &list, extents: [2, 0], size: 1000, ..LINK };
            assert_eq!(link(&volume, &inode(v5, whole)).unwrap(), text);
            let bad = |parts| link(&volume, &inode(v5, parts)).is_err();
            assert!(bad(Parts { size: 0, ..whole }) && bad(Parts { size: 1025, ..whole }));
            assert!(bad(Parts { extents: [0, 0], ..whole }));
            assert!(!v5 || bad(Parts { extents: [1, 0], ..whole }));
            let long = extent(0, 50, 9, true);
            assert!(bad(Parts { data: &long, extents: [1, 0], ..whole }));
            let short = Parts { forms: [1, 2], data: b"there", size: 5, ..LINK };
            assert_eq!(link(&volume, &inode(v5, short)).unwrap(), b"there");
            assert!(bad(Parts { size: 500, ..short }));
        }
    }
}
