//! [`File`]: the contents of a file.

use std::sync::Arc;

use super::super::tree::{OpenFile, Stretch};
use super::{Chain, Clusters};
use crate::error::Result;

/// A plain file.
pub(in super::super) struct File {
    pub clusters: Arc<Clusters>,
    pub chain: Chain,
    /// Length in bytes.
    pub size: u64,
    /// How many of them were written; those behind read as zeros.
    pub valid: u64,
}

impl File {
    fn read(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        let left = self.size.saturating_sub(offset);
        let all = (buf.len() as u64).min(left) as usize;
        let mut done = 0;
        while let Some(rest) = buf.get_mut(done..all).filter(|r| !r.is_empty()) {
            match self.step(rest, offset + done as u64) {
                Ok(n) => done += n,
                Err(e) if done == 0 => return Err(e),
                Err(_) => break,
            }
        }
        Ok(done)
    }

    /// Fills the beginning of `buf`; how much.
    fn step(&self, buf: &mut [u8], at: u64) -> Result<usize> {
        let valid = self.valid.saturating_sub(at);
        if valid == 0 {
            buf.fill(0);
            return Ok(buf.len());
        }
        let place = self.chain.place(&self.clusters, at)?;
        let (place, there) =
            place.ok_or_else(|| self.clusters.bad(0, "the file ends before its length"))?;
        let n = valid.min(there).min(buf.len() as u64) as usize;
        self.clusters.source.read(buf.get_mut(..n).unwrap_or_default(), place)?;
        Ok(n)
    }
}

impl OpenFile for File {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        self.clusters.noted(self.read(buf, offset))
    }

    fn stretch(&self, offset: u64) -> Result<Option<Stretch>> {
        Ok(match offset {
            o if o < self.valid.min(self.size) => {
                Some(Stretch { end: self.valid.min(self.size), hole: false })
            }
            o if o < self.size => Some(Stretch { end: self.size, hole: true }),
            _ => None,
        })
    }
}
