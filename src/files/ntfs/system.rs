//! Files that Windows has compressed for itself ("compact /exe", Windows Overlay Filter): a stream of its own has a
//! table of offsets, and chunks that are compressed each for itself; the contents are a hole.

use std::sync::Arc;

use super::super::bytes::{le32, le64};
use super::super::source::Source;
use super::super::tree::MAX_SIZE;
use super::lzx;
use super::names::on_disk;
use super::node::Node;
use super::record::kind;
use super::special::unsupported;
use super::stream::{Stream, TOO_LARGE};
use super::volume::Volume;
use super::xpress;
use crate::error::{Error, Kind, Result};

/// Where the compressed bytes are.
pub(super) const STREAM: &str = "WofCompressedData";
/// Unpacked chunks in the cache.
const SPACE: u8 = 3;

/// Such a file, opened.
pub(super) struct System {
    /// With units of its own.
    source: Source,
    number: u64,
    packed: Stream,
    pub size: u64,
    /// Bytes of a chunk, but for the last.
    chunk: u64,
    is_lzx: bool,
}

impl System {
    /// Opens it.
    ///
    /// # Errors
    /// `Unsupported` for an unknown method; `Corrupt`, or what reading the point says.
    pub(super) fn open(volume: &Volume, node: &Node, method: u32) -> Result<System> {
        let (chunk, is_lzx) = match method {
            0 => (4 << 10, false),
            1 => (lzx::CHUNK as u64, true),
            2 => (8 << 10, false),
            3 => (16 << 10, false),
            _ => {
                let what = format!("is compressed by Windows with an unknown method ({method})");
                return Err(unsupported(volume, node, &what));
            }
        };
        let packed = Stream::open(&volume.table, node, kind::DATA, &on_disk(STREAM))?;
        let packed = packed.ok_or_else(|| {
            volume.bad(node, "is compressed by Windows, but has no compressed data")
        })?;
        let size = node.first(&volume.table, kind::DATA, &[], |a| a.size())?.unwrap_or(0);
        if size > MAX_SIZE {
            return Err(volume.bad(node, TOO_LARGE));
        }
        let all = volume.source();
        let source = all.part(0, all.size(), all.label())?;
        let system = System { source, number: node.record.number, packed, size, chunk, is_lzx };
        match system.table() <= system.packed.size {
            true => Ok(system),
            false => Err(system.bad()),
        }
    }

    fn bad(&self) -> Error {
        let what = format!("MFT record {} has compressed data that is damaged", self.number);
        self.source.error(Kind::Corrupt, what, self.packed.place())
    }

    /// Bytes of an offset, and of the table of them: the first chunk has none.
    fn width(&self) -> u64 {
        if self.size > u64::from(u32::MAX) { 8 } else { 4 }
    }

    fn table(&self) -> u64 {
        self.size.div_ceil(self.chunk).saturating_sub(1).saturating_mul(self.width())
    }

    /// Where chunk `index` begins in the stream; behind the last one, where the stream ends.
    fn begin(&self, index: u64) -> Result<u64> {
        let chunks = self.size.div_ceil(self.chunk);
        let offset = match index {
            0 => 0,
            _ if index >= chunks => return Ok(self.packed.size),
            _ => {
                let mut bytes = [0; 8];
                let at = (index - 1) * self.width();
                let part = bytes.get_mut(..self.width() as usize).unwrap_or_default();
                self.packed.fill(part, at)?;
                if self.width() == 8 { le64(&bytes, 0) } else { u64::from(le32(&bytes, 0)) }
            }
        };
        offset.checked_add(self.table()).ok_or_else(|| self.bad())
    }

    /// A chunk as it was written.
    fn unpacked(&self, index: u64) -> Result<Arc<[u8]>> {
        self.source.unit(SPACE, index, || {
            let len = self.chunk.min(self.size - index * self.chunk);
            let (begin, end) = (self.begin(index)?, self.begin(index + 1)?);
            let packed = end.checked_sub(begin).filter(|n| (1..=len).contains(n));
            let mut bytes = vec![0; packed.ok_or_else(|| self.bad())? as usize];
            self.packed.fill(&mut bytes, begin)?;
            let len = len as usize;
            let made = match self.is_lzx {
                // Stored where compression did not help.
                _ if bytes.len() == len => Some(bytes),
                true => lzx::decompress(&bytes, len),
                false => xpress::decompress(&bytes, len),
            };
            made.ok_or_else(|| self.bad())
        })
    }

    /// Reads at most `buf.len()` bytes at `offset`; less at the end, or where something bad follows.
    ///
    /// # Errors
    /// `Corrupt`, or what reading the point says.
    pub(super) fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        let all = self.size.saturating_sub(offset).min(buf.len() as u64) as usize;
        let mut done = 0;
        while let Some(rest) = buf.get_mut(done..all).filter(|r| !r.is_empty()) {
            let at = offset + done as u64;
            let chunk = match self.unpacked(at / self.chunk) {
                Ok(chunk) => chunk,
                Err(e) if done == 0 => return Err(e),
                Err(_) => break,
            };
            let found = chunk.get((at % self.chunk) as usize..).unwrap_or_default();
            let n = found.len().min(rest.len());
            rest.iter_mut().zip(found).for_each(|(to, from)| *to = *from);
            done += n.max(1);
        }
        Ok(done)
    }
}
