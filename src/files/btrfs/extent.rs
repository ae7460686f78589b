//! Extents: what is at an offset of a file.

use std::sync::Arc;

use super::super::bytes::{byte, le64};
use super::inode::{Inode, kind};
use super::node::Key;
use super::unpack::{MAX, Packing};
use super::volume::{EXTENTS, Volume};
use super::walk::Walk;
use crate::error::Result;

/// Bytes of an item before the data that is in it, and of one whose data is elsewhere.
const INLINE: usize = 21;
const LEN: usize = 53;

/// What there is.
pub(super) enum Data {
    /// Zeros.
    Hole,
    /// These bytes, then zeros.
    Inside(Vec<u8>),
    /// At a logical address.
    Plain(u64),
    /// In a compressed extent.
    Packed(Packed),
}

/// A compressed extent.
#[derive(Debug, Clone, Copy)]
pub(super) struct Packed {
    at: u64,
    len: u64,
    unpacked: u64,
    /// Where in it the part of the file begins.
    pub from: u64,
    packing: Packing,
}

/// A stretch of a file.
pub(super) struct Extent {
    /// Where it begins and ends.
    pub begin: u64,
    pub end: u64,
    pub data: Data,
}

/// The stretch at `offset`.
///
/// # Errors
/// `Corrupt` if it contradicts itself; what reading the point says.
pub(super) fn extent(volume: &Volume, inode: &Inode, offset: u64) -> Result<Extent> {
    let key = Key { object: inode.number, kind: kind::EXTENT, offset };
    let mut walk = Walk::at_or_before(volume, inode.root, key)?;
    let mut found = None;
    // Up to the first one behind the offset.
    let next = loop {
        match walk.next()? {
            Some(item) if (item.key.object, item.key.kind) != (key.object, key.kind) => {
                if item.key > key {
                    break u64::MAX;
                }
            }
            Some(item) if item.key.offset > offset => break item.key.offset,
            Some(item) => found = Some(item),
            None => break u64::MAX,
        }
    };
    let hole = |begin| Extent { begin, end: next, data: Data::Hole };
    let Some(item) = found else { return Ok(hole(offset)) };
    let parsed = parse(volume, item.key.offset, item.data());
    let bad = |what: &'static str| volume.bad_inode(inode.root.id, inode.number, what);
    let extent = parsed.map_err(bad)?;
    match extent.end {
        end if end <= offset => Ok(hole(end)),
        end if end > next => Err(bad("has extents that overlap")),
        _ => Ok(extent),
    }
}

fn parse(volume: &Volume, begin: u64, item: &[u8]) -> Result<Extent, &'static str> {
    let (unpacked, kind) = (le64(item, 8), byte(item, 20));
    if byte(item, 17) > 0 || byte(item, 18) > 0 || byte(item, 19) > 0 {
        return Err("has an extent in an unknown encoding");
    }
    let packing = match byte(item, 16) {
        0 => None,
        number => Some(Packing::of(number).ok_or("has an extent with an unknown compression")?),
    };
    let sector = volume.sup.sector;
    if kind == 0 {
        let data = inside(begin, item, packing, sector)?;
        return Ok(Extent { begin, end: unpacked.next_multiple_of(sector), data });
    }
    let (at, len, from, count) = (le64(item, 21), le64(item, 29), le64(item, 37), le64(item, 45));
    let end = begin.checked_add(count).filter(|_| count > 0 && item.len() >= LEN);
    let end = end.ok_or("has an invalid extent")?;
    let aligned = [begin, at, len, from, count].iter().all(|n| n.is_multiple_of(sector));
    let used = from.checked_add(count).ok_or("has an invalid extent")?;
    let data = match (kind, at, packing) {
        (1 | 2, _, _) if !aligned => return Err("has an extent that is not aligned"),
        (1, 0, _) | (2, _, _) => Data::Hole,
        (1, _, None) if used <= len => {
            at.checked_add(used).ok_or("has an invalid extent")?;
            Data::Plain(at + from)
        }
        (1, _, Some(packing)) if len <= MAX && unpacked <= MAX && used <= unpacked => {
            Data::Packed(Packed { at, len, unpacked, from, packing })
        }
        _ => return Err("has an invalid extent"),
    };
    Ok(Extent { begin, end, data })
}

/// Data that is in the item.
fn inside(
    begin: u64,
    item: &[u8],
    packing: Option<Packing>,
    sector: u64,
) -> Result<Data, &'static str> {
    let len = le64(item, 8);
    let bytes = item.get(INLINE..).unwrap_or_default();
    if begin != 0 || len == 0 || len > MAX {
        return Err("has an invalid inline extent");
    }
    let data = match packing {
        None if bytes.len() as u64 == len => bytes.to_vec(),
        None => return Err("has an inline extent of another length"),
        Some(packing) => {
            let unpacked = packing.unpack(bytes, len, sector);
            unpacked.map_err(|_| "has an inline extent that cannot be decompressed")?
        }
    };
    Ok(Data::Inside(data))
}

/// Checksums of `count` sectors from a logical address on.
///
/// # Errors
/// `Corrupt`, also if one is missing; or what reading the point says.
pub(super) fn sums(volume: &Volume, logical: u64, count: usize) -> Result<Vec<Vec<u8>>> {
    /// The object that all checksums of data belong to.
    const OBJECT: u64 = u64::MAX - 9;
    let missing = |at| volume.bad_data(at, "it should have a checksum, and has none");
    let mut sums = vec![None; count];
    let root = volume.sums.ok_or_else(|| missing(logical))?;
    let (sector, len) = (volume.sup.sector, volume.sup.checksum.len());
    let key = Key { object: OBJECT, kind: kind::SUMS, offset: logical };
    let end = logical.saturating_add(count as u64 * sector);
    let mut walk = Walk::at_or_before(volume, root, key)?;
    while let Some(item) = walk.next()? {
        let begin = item.key.offset;
        if (item.key.object, item.key.kind) != (key.object, key.kind) {
            if item.key < key {
                continue;
            }
            break;
        }
        if begin >= end {
            break;
        }
        let there = (item.data().len() / len) as u64;
        // From the first sector that is asked for, as far as both go.
        let from = logical.saturating_sub(begin).div_ceil(sector);
        for index in from..there {
            let at = begin.saturating_add(index * sector);
            let place = at.checked_sub(logical).map(|a| (a / sector) as usize);
            match place.and_then(|p| sums.get_mut(p)) {
                Some(to) => *to = Some(volume.sum(item.data(), index as usize).to_vec()),
                None => break,
            }
        }
    }
    let places = (0..).map(|i| logical.saturating_add(i * sector));
    sums.into_iter().zip(places).map(|(sum, at)| sum.ok_or_else(|| missing(at))).collect()
}

/// What is in a compressed extent, as it was unpacked, behind what it was unpacked by.
pub(super) struct Unpacked(Arc<[u8]>);

impl Unpacked {
    pub(super) fn bytes(&self) -> &[u8] {
        self.0.get(HEAD..).unwrap_or_default()
    }
}

/// Bytes of what [`Packed::head`] gives.
const HEAD: usize = 18;

impl Packed {
    /// All by which the extent is unpacked, beside its place.
    fn head(&self, checked: bool) -> [u8; HEAD] {
        let mut head = [0; HEAD];
        let numbers = [self.len.to_le_bytes(), self.unpacked.to_le_bytes()];
        let all = numbers.into_iter().flatten().chain([self.packing as u8, u8::from(checked)]);
        head.iter_mut().zip(all).for_each(|(to, from)| *to = from);
        head
    }
}

/// What is in a compressed extent.
///
/// # Errors
/// `Corrupt` if its checksum is wrong or it cannot be decompressed; what reading the point says.
pub(super) fn unpacked(volume: &Volume, packed: &Packed, checked: bool) -> Result<Unpacked> {
    let head = packed.head(checked);
    let make = || {
        let mut bytes = vec![0; packed.len as usize];
        let count = (packed.len / volume.sup.sector) as usize;
        let sums = if checked { sums(volume, packed.at, count)? } else { Vec::new() };
        volume.data(&mut bytes, packed.at, &sums)?;
        let found = packed.packing.unpack(&bytes, packed.unpacked, volume.sup.sector);
        let found = found.map_err(|why| {
            volume.bad_data(packed.at, &format!("it cannot be decompressed: {why}"))
        })?;
        Ok([head.as_slice(), &found].concat())
    };
    let made = volume.source.unit(EXTENTS, packed.at, make)?;
    // Files may contradict each other about the same place: then what is kept there is the other's.
    match made.starts_with(&head) {
        true => Ok(Unpacked(made)),
        false => Ok(Unpacked(Arc::from(make()?))),
    }
}
