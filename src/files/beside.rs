//! Two points read beside each other: what is the same in both is read once.

use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use super::source::Source;
use crate::storage::ReadAt;

/// A source as a device: all reads go through its cache.
pub struct Cached(Source);

impl Cached {
    /// Takes the source.
    pub fn new(source: Source) -> Arc<Self> {
        Arc::new(Cached(source))
    }
}

impl ReadAt for Cached {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let n = (buf.len() as u64).min(self.len().saturating_sub(offset)) as usize;
        let part = buf.get_mut(..n).unwrap_or_default();
        self.0.read_meta(part, offset).map_err(io::Error::other)?;
        Ok(n)
    }

    fn len(&self) -> u64 {
        self.0.size()
    }

    fn name(&self) -> &Path {
        self.0.path()
    }
}

/// Says whether a range of bytes is the same in two devices.
pub type IsSame = dyn Fn(Range<u64>) -> bool + Send + Sync;

/// A device of which what is the same in another is read from that one.
pub struct Beside {
    first: Arc<Cached>,
    own: Source,
    is_same: Box<IsSame>,
}

impl Beside {
    /// `own`, read by way of `first` where `is_same` says so.
    pub fn new(first: Arc<Cached>, own: Source, is_same: Box<IsSame>) -> Arc<Self> {
        Arc::new(Beside { first, own, is_same })
    }
}

impl ReadAt for Beside {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let n = (buf.len() as u64).min(self.len().saturating_sub(offset)) as usize;
        let part = buf.get_mut(..n).unwrap_or_default();
        let end = offset.saturating_add(n as u64);
        if end <= self.first.len() && (self.is_same)(offset..end) {
            return self.first.read_at(part, offset);
        }
        self.own.read(part, offset).map_err(io::Error::other)?;
        Ok(n)
    }

    fn len(&self) -> u64 {
        self.own.size()
    }

    fn name(&self) -> &Path {
        self.own.path()
    }
}

#[cfg(test)]
mod tests {
    use super::super::blocks::Blocks;
    use super::*;
    use crate::storage::MemStorage;

    #[test]
    fn what_is_the_same_comes_from_the_first_and_all_else_from_its_own() {
        let blocks = Blocks::new(1 << 20);
        let source = |byte: u8, len: usize| {
            Source::new(Arc::new(MemStorage::new("d", vec![byte; len])), "d", &blocks)
        };
        let first = Cached::new(source(1, 100_000));
        let both = Beside::new(first, source(2, 120_000), Box::new(|r| r.end <= 50_000));
        let byte = |at: u64, len: usize| {
            let mut buf = vec![0; len];
            let n = both.read_at(&mut buf, at).unwrap();
            (n, buf.first().copied(), buf.get(n.saturating_sub(1)).copied())
        };
        assert_eq!(byte(0, 50_000), (50_000, Some(1), Some(1)));
        assert_eq!(byte(10, 50_000), (50_000, Some(2), Some(2)));
        assert_eq!(byte(119_999, 10), (1, Some(2), Some(2)));
    }
}
