//! A file system's bytes with the journal's newer blocks in their places.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use super::super::super::blocks::Holding;
use super::super::super::crc::crc32c;
use super::super::super::source::Source;
use super::super::volume::Volume;
use super::log::{Log, MAGIC};
use super::scan::{Scanned, Version};
use crate::error::{Error, Kind, Result};
use crate::storage::ReadAt;

/// Where a newer version is.
#[derive(Clone, Copy)]
struct Newer {
    /// In bytes.
    at: u64,
    version: Version,
}

/// What is read instead of the partition.
pub(super) struct Replayed {
    base: Source,
    block_size: u64,
    newer: BTreeMap<u64, Newer>,
    seed: u32,
    /// Whether checksums of blocks are whole.
    long: bool,
    _held: Vec<Holding>,
}

impl Replayed {
    /// Finds the journal's blocks in the file system.
    pub(super) fn new(base: &Volume, log: &Log<'_>, scanned: Scanned) -> Result<Replayed> {
        let block_size = base.sup.block_size;
        let mut newer = BTreeMap::new();
        for (block, version) in scanned.versions {
            if block >= base.sup.blocks {
                return Err(
                    log.bad("the journal names a block beyond the end of the file system", 0)
                );
            }
            let at = log.place(version.number)? * block_size;
            newer.insert(block, Newer { at, version });
        }
        let (seed, long) = (log.seed, log.has_long_tags());
        let base = base.source.clone();
        Ok(Replayed { base, block_size, newer, seed, long, _held: scanned.held })
    }

    /// The newer version of a block.
    fn block(&self, newer: Newer) -> Result<Vec<u8>> {
        let mut bytes = self.base.meta(newer.at, self.block_size as usize)?;
        if let Some(stored) = newer.version.checksum {
            let crc = crc32c(self.seed, &newer.version.sequence.to_be_bytes());
            let crc = crc32c(crc, &bytes);
            if stored != if self.long { crc } else { crc & 0xffff } {
                let what = "bad checksum of a journal block";
                return Err(self.base.error(Kind::Corrupt, what, newer.at));
            }
        }
        if newer.version.escaped {
            let magic = MAGIC.to_be_bytes();
            bytes.iter_mut().zip(magic).for_each(|(to, from)| *to = from);
        }
        Ok(bytes)
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let (end, block_size) = (offset + buf.len() as u64, self.block_size);
        let (mut at, mut rest) = (offset, buf);
        for (block, newer) in self.newer.range(offset / block_size..end.div_ceil(block_size)) {
            let begin = block * block_size;
            let (older, tail) = rest.split_at_mut(begin.saturating_sub(at) as usize);
            self.base.read(older, at)?;
            at = at.max(begin);
            let bytes = self.block(*newer)?;
            let inside = (at - begin) as usize;
            let n = tail.len().min(bytes.len() - inside);
            let (part, tail) = tail.split_at_mut(n);
            part.iter_mut().zip(bytes.iter().skip(inside)).for_each(|(to, from)| *to = *from);
            (at, rest) = (at + n as u64, tail);
        }
        self.base.read(rest, at)
    }
}

impl ReadAt for Replayed {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let n = (buf.len() as u64).min(self.len().saturating_sub(offset)) as usize;
        let part = buf.get_mut(..n).unwrap_or_default();
        let failed = |e: Error| io::Error::other(e);
        self.read(part, offset).map_err(failed)?;
        Ok(n)
    }

    fn len(&self) -> u64 {
        self.base.size()
    }

    fn name(&self) -> &Path {
        self.base.path()
    }
}
