//! [`Stream`]: the bytes of an attribute: in its record, in runs, sparse, or compressed.

use std::ops::Range;

use super::super::source::Source;
use super::super::tree::{MAX_SIZE, Stretch};
use super::lznt1;
use super::node::Node;
use super::record::{Attribute, COMPRESSED, ENCRYPTED, kind};
use super::runs::Runs;
use super::table::Table;
use crate::error::{Error, Kind, Result};

/// Bytes that are compressed together: at most 16 clusters of 4 KiB.
const MAX_UNIT: u64 = 64 << 10;
/// The one method of compression: LZNT1.
const LZNT1: u16 = 1;
/// Unpacked units in the cache.
const SPACE: u8 = 2;
/// Units that are looked at for one stretch.
const LOOK: u64 = 1024;

/// What is wrong with a length that no file can have.
pub(super) const TOO_LARGE: &str = "has a size that is too large";

/// The bytes of an attribute.
pub(super) struct Stream {
    /// With units of its own.
    source: Source,
    cluster: u64,
    /// Whose it is, and where that is.
    number: u64,
    place: u64,
    /// Whether it is read by way of the cache: all but contents.
    cached: bool,
    /// Length in bytes.
    pub size: u64,
    body: Body,
}

enum Body {
    /// In the record.
    Inside(Vec<u8>),
    Runs(Mapped),
}

#[derive(Default)]
struct Mapped {
    runs: Runs,
    /// Zeros are behind.
    initialized: u64,
    /// Clusters that are compressed together.
    unit: Option<u64>,
}

/// What a unit of a compressed stream is.
enum Unit {
    Hole,
    /// Not compressed.
    Plain,
    /// So many clusters with what becomes the unit.
    Packed(u64),
}

impl Stream {
    /// Opens an attribute; `None` if there is none of this type and name.
    ///
    /// # Errors
    /// `Encrypted`; `Unsupported` if its runs do not fit into the cache; `Corrupt`, or what reading the point says.
    pub(super) fn open(
        table: &Table,
        node: &Node,
        kind: u32,
        name: &[u8],
    ) -> Result<Option<Stream>> {
        let mut found: Option<Stream> = None;
        node.each_part(table, kind, name, &mut |a| {
            let stream = match &mut found {
                None => found.insert(Stream::begin(table, node, a)?),
                Some(stream) => stream,
            };
            let Body::Runs(mapped) = &mut stream.body else { return Ok(false) };
            let (clusters, blocks) = (table.boot.clusters, table.source.blocks());
            let added = mapped.runs.add(a.mapping(), a.span(), clusters, blocks)?;
            added.map_err(|what| node.bad(table, what))?;
            Ok(true)
        })?;
        Ok(found)
    }

    /// A stream without its runs.
    fn begin(table: &Table, node: &Node, a: &Attribute<'_>) -> Result<Stream> {
        if a.kind() == kind::DATA && a.flags() & ENCRYPTED != 0 {
            return Err(encrypted(table, node));
        }
        let body = match a.resident() {
            Some(value) => Body::Inside(value.to_vec()),
            None => Body::Runs(Mapped {
                initialized: a.initialized(),
                unit: unit(table, node, a)?,
                ..Mapped::default()
            }),
        };
        if a.size() > MAX_SIZE {
            return Err(node.bad(table, TOO_LARGE));
        }
        let all = &table.source;
        let packs = matches!(&body, Body::Runs(m) if m.unit.is_some());
        let source = match packs {
            true => all.part(0, all.size(), all.label())?,
            false => all.clone(),
        };
        let number = node.record.number;
        Ok(Stream {
            source,
            cluster: table.boot.cluster,
            number,
            place: table.place(number),
            cached: a.kind() != kind::DATA,
            size: a.size(),
            body,
        })
    }

    /// Where the record of its file is, for messages.
    pub(super) fn place(&self) -> u64 {
        self.place
    }

    fn bad(&self, what: &str) -> Error {
        self.source.error(Kind::Corrupt, format!("MFT record {} {what}", self.number), self.place)
    }

    /// Reads at most `buf.len()` bytes at `offset`; less at the end, or where something bad follows.
    ///
    /// # Errors
    /// `Corrupt` if that is at the beginning, or what reading the point says.
    pub(super) fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        let all = self.size.saturating_sub(offset).min(buf.len() as u64) as usize;
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

    /// All of it.
    ///
    /// # Errors
    /// `Corrupt` if it is longer than `max`; as [`Stream::read_at`].
    pub(super) fn read_all(&self, max: u64) -> Result<Vec<u8>> {
        if self.size > max {
            return Err(self.bad("has an attribute that is too long"));
        }
        let mut bytes = vec![0; self.size as usize];
        self.fill(&mut bytes, 0)?;
        Ok(bytes)
    }

    /// Fills all of `buf`.
    ///
    /// # Errors
    /// `Corrupt` if that is not all inside, or what reading the point says.
    pub(super) fn fill(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let mut done = 0;
        while let Some(rest) = buf.get_mut(done..).filter(|r| !r.is_empty()) {
            match self.read_at(rest, offset.saturating_add(done as u64))? {
                0 => return Err(self.bad("has an attribute that is too short")),
                n => done += n,
            }
        }
        Ok(())
    }

    /// Reads something at `at`, which is before the end; how many bytes.
    fn step(&self, buf: &mut [u8], at: u64) -> Result<usize> {
        let mapped = match &self.body {
            Body::Inside(value) => {
                let found = value.get(at as usize..).unwrap_or_default();
                buf.iter_mut().zip(found).for_each(|(to, from)| *to = *from);
                return Ok(buf.len());
            }
            Body::Runs(mapped) => mapped,
        };
        let written = mapped.initialized.saturating_sub(at).min(buf.len() as u64) as usize;
        let buf = match written {
            0 => {
                buf.fill(0);
                return Ok(buf.len());
            }
            _ => buf.get_mut(..written).unwrap_or_default(),
        };
        let Some(unit) = mapped.unit else { return self.plain(mapped, buf, at) };
        let bytes = unit * self.cluster;
        let inside = at % bytes;
        let n = (bytes - inside).min(written as u64) as usize;
        let buf = buf.get_mut(..n).unwrap_or_default();
        match self.unit(mapped, at / bytes * unit, unit)? {
            Unit::Hole => buf.fill(0),
            Unit::Plain => return self.plain(mapped, buf, at),
            Unit::Packed(clusters) => {
                let all = self.unpacked(mapped, at / bytes, clusters, bytes)?;
                let found = all.get(inside as usize..).unwrap_or_default();
                buf.iter_mut().zip(found).for_each(|(to, from)| *to = *from);
            }
        }
        Ok(n)
    }

    /// What is not compressed, up to the end of its run.
    fn plain(&self, mapped: &Mapped, buf: &mut [u8], at: u64) -> Result<usize> {
        let run = mapped.runs.at(at / self.cluster).ok_or_else(|| self.bad(SHORT))?;
        let inside = at % self.cluster;
        let left = run.count.saturating_mul(self.cluster) - inside;
        let n = left.min(buf.len() as u64) as usize;
        let buf = buf.get_mut(..n).unwrap_or_default();
        match run.lcn {
            Some(lcn) if self.cached => {
                self.source.read_meta(buf, lcn * self.cluster + inside)?;
            }
            Some(lcn) => self.source.read(buf, lcn * self.cluster + inside)?,
            None => buf.fill(0),
        }
        Ok(n)
    }

    /// What the unit is that begins with cluster `vcn`.
    fn unit(&self, mapped: &Mapped, vcn: u64, unit: u64) -> Result<Unit> {
        let (mut at, mut full, mut hole) = (vcn, 0, false);
        while at < vcn + unit {
            let Some(run) = mapped.runs.at(at) else { break };
            let count = run.count.min(vcn + unit - at);
            match run.lcn {
                None => hole = true,
                Some(_) if hole => return Err(self.bad("has an invalid compression unit")),
                Some(_) => full += count,
            }
            at += count;
        }
        match (full, hole) {
            (0, true) => Ok(Unit::Hole),
            (0, false) => Err(self.bad(SHORT)),
            // Also where the runs end early: only a whole unit is plain.
            (_, true) => Ok(Unit::Packed(full)),
            (_, false) if full < unit => Ok(Unit::Packed(full)),
            (_, false) => Ok(Unit::Plain),
        }
    }

    /// The bytes of unit number `index`, which takes so many clusters on disk.
    fn unpacked(
        &self,
        mapped: &Mapped,
        index: u64,
        clusters: u64,
        bytes: u64,
    ) -> Result<std::sync::Arc<[u8]>> {
        self.source.unit(SPACE, index, || {
            let mut packed = vec![0; (clusters * self.cluster) as usize];
            let (mut done, begin) = (0, index * bytes);
            while let Some(rest) = packed.get_mut(done..).filter(|r| !r.is_empty()) {
                done += self.plain(mapped, rest, begin + done as u64)?;
            }
            let made = lznt1::decompress(&packed, bytes as usize);
            made.ok_or_else(|| self.bad("has compressed data that is damaged"))
        })
    }

    /// Where it is in the volume, in bytes.
    pub(super) fn places(&self) -> Vec<Range<u64>> {
        match &self.body {
            Body::Inside(_) => Vec::new(),
            Body::Runs(mapped) => mapped.runs.places(self.cluster).collect(),
        }
    }

    /// What is at `offset`, and how far it goes; `None` at the end.
    ///
    /// # Errors
    /// `Corrupt`.
    pub(super) fn stretch(&self, offset: u64) -> Result<Option<Stretch>> {
        if offset >= self.size {
            return Ok(None);
        }
        let whole = |hole| Ok(Some(Stretch { end: self.size, hole }));
        let Body::Runs(mapped) = &self.body else { return whole(false) };
        if offset >= mapped.initialized {
            return whole(true);
        }
        let (end, hole) = match mapped.unit {
            None => {
                let vcn = offset / self.cluster;
                let run = mapped.runs.at(vcn).ok_or_else(|| self.bad(SHORT))?;
                (vcn.saturating_add(run.count).saturating_mul(self.cluster), run.lcn.is_none())
            }
            Some(unit) => self.units(mapped, offset, unit)?,
        };
        Ok(Some(Stretch { end: end.min(mapped.initialized).min(self.size), hole }))
    }

    /// Where the stretch of units ends that `offset` is in, and whether it is a hole.
    fn units(&self, mapped: &Mapped, offset: u64, unit: u64) -> Result<(u64, bool)> {
        let bytes = unit * self.cluster;
        let first = offset / bytes;
        let is_hole =
            |i: u64| Ok::<bool, Error>(matches!(self.unit(mapped, i * unit, unit)?, Unit::Hole));
        let hole = is_hole(first)?;
        let run = mapped.runs.at(first * unit);
        if let Some(run) = run.filter(|run| hole && run.lcn.is_none()) {
            let units = (run.count / unit).max(1);
            return Ok((first.saturating_add(units).saturating_mul(bytes), true));
        }
        let mut end = first + 1;
        while end < first + LOOK && end.saturating_mul(bytes) < self.size {
            match is_hole(end) {
                Ok(false) => end += 1,
                _ => break,
            }
        }
        Ok((end.saturating_mul(bytes), hole))
    }
}

const SHORT: &str = "has extents that end before its size";

/// Clusters that are compressed together; `None` if the attribute is not compressed.
fn unit(table: &Table, node: &Node, a: &Attribute<'_>) -> Result<Option<u64>> {
    if a.kind() != kind::DATA || a.flags() & COMPRESSED == 0 {
        return Ok(None);
    }
    if a.flags() & COMPRESSED != LZNT1 {
        let what =
            format!("MFT record {} is compressed with an unknown method", node.record.number);
        let error = table.source.error(Kind::Unsupported, what, table.place(node.record.number));
        return Err(error.remedy("start the guest from this point and copy the file there"));
    }
    let unit = 1u64.checked_shl(u32::from(a.unit())).filter(|_| a.unit() > 0);
    let fits = |u: &u64| u.checked_mul(table.boot.cluster).is_some_and(|b| b <= MAX_UNIT);
    let unit = unit.filter(fits);
    unit.map(Some).ok_or_else(|| node.bad(table, "has an invalid compression unit"))
}

/// That contents are encrypted.
pub(super) fn encrypted(table: &Table, node: &Node) -> Error {
    let number = node.record.number;
    let what = format!("MFT record {number} is encrypted (EFS): its contents cannot be read");
    let error = table.source.error(Kind::Encrypted, what, table.place(number));
    error.remedy("start the guest from this point and copy the file there, logged in as its owner")
}
