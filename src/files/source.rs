//! [`Source`]: what a reader reads from: a range of a point, or of volumes made of points, with the cache.
//!
//! Two ways to read: [`Source::read_meta`] and [`Source::meta`] go through the cache, in blocks of [`BLOCK`]
//! bytes; [`Source::read`] does not, and is for the contents of files. An error names the point's file, the offset
//! in the source, and the source's label (`partition 2`).

use std::path::Path;
use std::sync::Arc;

use super::blocks::{Blocks, Key};
use crate::error::{Error, Kind, Result};
use crate::storage::ReadAt;

/// Bytes that are read and cached at once.
pub(super) const BLOCK: u64 = 16 << 10;
/// The most that [`Source::meta`] gives at once: nothing that is parsed as a whole is larger.
const MAX_META: usize = 16 << 20;

/// A range of something readable. Cheap to clone; clones share what is cached.
#[derive(Clone)]
pub struct Source {
    device: Arc<dyn ReadAt>,
    /// The device's, for its blocks.
    id: u64,
    /// Its own, for units.
    own: u64,
    start: u64,
    len: u64,
    label: Arc<str>,
    blocks: Arc<Blocks>,
}

impl Source {
    /// All of `device`.
    pub fn new(device: Arc<dyn ReadAt>, label: &str, blocks: &Arc<Blocks>) -> Self {
        let len = device.len();
        let id = blocks.new_id();
        Source {
            device,
            id,
            own: id,
            start: 0,
            len,
            label: Arc::from(label),
            blocks: blocks.clone(),
        }
    }

    /// A part of it with a label of its own.
    ///
    /// # Errors
    /// `Corrupt` if it is not inside.
    pub fn part(&self, start: u64, len: u64, label: &str) -> Result<Source> {
        self.check(start, len)?;
        let (start, own) = (self.start + start, self.blocks.new_id());
        Ok(Source { own, start, len, label: Arc::from(label), ..self.clone() })
    }

    /// The same range read by way of `device`, such as one over which a journal is replayed; offsets stay.
    pub(super) fn through(&self, device: Arc<dyn ReadAt>) -> Source {
        Source { label: self.label.clone(), ..Source::new(device, "", &self.blocks) }
    }

    /// The same with another label.
    pub(super) fn named(self, label: &str) -> Source {
        Source { label: Arc::from(label), ..self }
    }

    /// Its length in bytes.
    pub fn size(&self) -> u64 {
        self.len
    }

    /// What messages call it: `partition 2`.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// The point's file.
    pub fn path(&self) -> &Path {
        self.device.name()
    }

    /// The cache, to count what a reader holds beside it.
    pub fn blocks(&self) -> &Arc<Blocks> {
        &self.blocks
    }

    /// Fills `buf` with the bytes at `offset`, past the cache.
    ///
    /// # Errors
    /// `Corrupt` if it is not inside; what reading the point says.
    pub fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.check(offset, buf.len() as u64)?;
        read_exact(&*self.device, buf, self.start + offset)
    }

    /// Fills `buf` with the bytes at `offset`, from the cache where they are there.
    ///
    /// # Errors
    /// As [`Source::read`].
    pub fn read_meta(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.check(offset, buf.len() as u64)?;
        let (mut at, mut rest) = (self.start + offset, buf);
        while !rest.is_empty() {
            // A block that is bad in part has something right in it, too.
            let Ok(block) = self.block(at / BLOCK) else {
                return read_exact(&*self.device, rest, at);
            };
            let inside = (at % BLOCK) as usize;
            let n = rest.len().min(block.len().saturating_sub(inside));
            let (part, tail) = rest.split_at_mut(n);
            match block.get(inside..inside + n) {
                Some(bytes) if n > 0 => part.copy_from_slice(bytes),
                _ => return Err(self.outside(offset)),
            }
            (at, rest) = (at + n as u64, tail);
        }
        Ok(())
    }

    /// `len` bytes at `offset`, as [`Source::read_meta`].
    ///
    /// # Errors
    /// As [`Source::read`]; `Corrupt` if that is more than any such thing takes.
    pub fn meta(&self, offset: u64, len: usize) -> Result<Vec<u8>> {
        self.check(offset, len as u64)?;
        if len > MAX_META {
            return Err(self.error(Kind::Corrupt, "invalid length", offset));
        }
        let mut bytes = vec![0; len];
        self.read_meta(&mut bytes, offset)?;
        Ok(bytes)
    }

    /// What `make` makes, kept in the cache as the reader's own entry `number` of kind `space` (not 0): a
    /// decompressed extent, say.
    ///
    /// # Errors
    /// What `make` says.
    pub fn unit(
        &self,
        space: u8,
        number: u64,
        make: impl FnOnce() -> Result<Vec<u8>>,
    ) -> Result<Arc<[u8]>> {
        let key = Key { source: self.own, space, number };
        if let Some(found) = self.blocks.get(key) {
            return Ok(found);
        }
        let made: Arc<[u8]> = Arc::from(make()?);
        self.blocks.put(key, &made);
        Ok(made)
    }

    /// An error about what is at `offset`: names the point's file, the label, and the offset in the source.
    pub fn error(&self, kind: Kind, message: impl AsRef<str>, offset: u64) -> Error {
        let text = format!("{}: {}", self.label, message.as_ref());
        Error::new(kind, text).at_path(self.path()).at_offset(offset)
    }

    /// Fails unless a range is inside.
    ///
    /// # Errors
    /// `Corrupt`.
    pub fn check(&self, offset: u64, len: u64) -> Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len => Ok(()),
            _ => Err(self.outside(offset)),
        }
    }

    fn outside(&self, offset: u64) -> Error {
        self.error(Kind::Corrupt, "offset beyond the end of the volume", offset)
    }

    fn block(&self, number: u64) -> Result<Arc<[u8]>> {
        let key = Key { source: self.id, space: 0, number };
        if let Some(found) = self.blocks.get(key) {
            return Ok(found);
        }
        let start = number * BLOCK;
        let len = self.device.len().saturating_sub(start).min(BLOCK);
        let mut bytes = vec![0; len as usize];
        read_exact(&*self.device, &mut bytes, start)?;
        let made: Arc<[u8]> = Arc::from(bytes);
        self.blocks.put(key, &made);
        Ok(made)
    }
}

/// Reads all of `buf`; the error is what was below, where that was one of ours.
pub(super) fn read_exact(device: &dyn ReadAt, buf: &mut [u8], offset: u64) -> Result<()> {
    let mut done = 0;
    while let Some(rest) = buf.get_mut(done..).filter(|r| !r.is_empty()) {
        let at = offset.saturating_add(done as u64);
        match device.read_at(rest, at) {
            Ok(0) => {
                let error = Error::new(Kind::Truncated, "the disk ends before the data");
                return Err(error.at_path(device.name()).at_offset(at));
            }
            Ok(n) => done += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(unwrapped(e, device.name(), at)),
        }
    }
    Ok(())
}

fn unwrapped(error: std::io::Error, path: &Path, at: u64) -> Error {
    match error.downcast::<Error>() {
        Ok(own) => own,
        Err(e) => Error::io(e, "reading failed").at_path(path).at_offset(at),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemStorage;

    #[test]
    fn parts_read_the_same_with_and_without_the_cache_and_nothing_beyond() {
        let bytes: Vec<u8> = (0..100_000u32).map(|i| (i % 251) as u8).collect();
        let disk = Arc::new(MemStorage::new("disk", bytes.clone()));
        let whole = Source::new(disk, "disk", &Blocks::new(1 << 20));
        let part = whole.part(10_001, 60_000, "partition 1").unwrap();
        let inner = part.part(1, 40_000, "volume").unwrap();
        let mut buf = vec![0; 40_000];
        for _ in 0..2 {
            inner.read_meta(&mut buf, 0).unwrap();
            assert!(buf == bytes[10_002..50_002]);
            buf.fill(0);
        }
        inner.read(&mut buf, 0).unwrap();
        assert!(buf == bytes[10_002..50_002]);
        let e = inner.read(&mut buf, 1).unwrap_err();
        assert_eq!((e.kind(), e.offset()), (Kind::Corrupt, Some(1)));
        assert!(inner.meta(39_999, 2).is_err() && part.part(1, u64::MAX, "x").is_err());
        assert_eq!(whole.meta(99_999, 1).unwrap(), bytes[99_999..]);
    }

    #[test]
    fn units_are_made_once_for_each_part() {
        let disk = Arc::new(MemStorage::new("disk", vec![0; 4096]));
        let whole = Source::new(disk, "disk", &Blocks::new(1 << 20));
        let part = whole.part(512, 512, "p").unwrap();
        let made = |s: &Source, n, b| s.unit(1, n, || Ok(vec![b])).unwrap()[0];
        assert_eq!((made(&whole, 0, 1), made(&part, 0, 2)), (1, 2));
        assert_eq!((made(&whole, 0, 3), made(&part, 0, 4)), (1, 2));
    }
}
