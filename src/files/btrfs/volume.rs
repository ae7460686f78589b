//! [`Volume`]: nodes and data by their logical addresses, each from the first copy that is right.

use super::super::bytes::part;
use super::super::findings::Findings;
use super::super::source::Source;
use super::chunk::Chunks;
use super::node::{Node, is_files};
use super::superblock::{Root, Super};
use crate::error::{Error, Kind, Result};

/// The cache's entries: nodes, and decompressed extents.
const NODES: u8 = 1;
pub(super) const EXTENTS: u8 = 2;

/// What all parts of the reader share.
pub(super) struct Volume {
    pub source: Source,
    pub sup: Super,
    pub chunks: Chunks,
    pub findings: Findings,
    /// The tree of the checksums of data, if it can be read.
    pub sums: Option<Root>,
}

impl Volume {
    /// The node at a logical address, which is one of this tree, with this level and generation.
    ///
    /// # Errors
    /// `Corrupt` if no copy of it is; `Unsupported` if it is on another device; what reading the point says.
    pub(super) fn node(&self, at: Root) -> Result<Node> {
        let node = Node::trusted(self.source.unit(NODES, at.at, || self.read_node(at.at))?);
        let owner = node.owner();
        let owned = owner == at.id || (is_files(owner) && is_files(at.id));
        if node.level() != at.level || node.generation() != at.generation || !owned {
            return Err(self.bad(at.at, "it is of another tree, level or generation"));
        }
        Ok(node)
    }

    fn read_node(&self, logical: u64) -> Result<Vec<u8>> {
        let len = self.sup.node;
        let (places, there) = self.chunks.places(&self.source, logical)?;
        if there < len {
            return Err(self.bad(logical, "it reaches over the end of its chunk"));
        }
        let mut first = None;
        for place in places {
            let mut bytes = vec![0; len as usize];
            let read = self.source.read(&mut bytes, place);
            let checked = read.and_then(|()| {
                let found = Node::check(&bytes, &self.sup, logical);
                found.map_err(|why| self.bad(logical, why))
            });
            match checked {
                Ok(()) => {
                    if let Some(error) = first {
                        self.other_copy(&error);
                    }
                    return Ok(bytes);
                }
                Err(e) => first = first.or(Some(e)),
            }
        }
        Err(first.unwrap_or_else(|| self.bad(logical, "it is nowhere")))
    }

    /// An error about a node.
    pub(super) fn bad(&self, logical: u64, why: &str) -> Error {
        let place = self.chunks.places(&self.source, logical).ok();
        let place = place.and_then(|(places, _)| places.first().copied()).unwrap_or(0);
        let what = format!("the tree block with the logical address {logical} is damaged: {why}");
        self.source.error(Kind::Corrupt, what, place)
    }

    fn other_copy(&self, error: &Error) {
        let what = format!("{} (another copy is right, and was used)", error.message());
        let remedy = "run 'btrfs scrub' in the guest";
        self.findings.warn(&self.source, Kind::Corrupt, &what, Some(remedy));
    }

    /// Fills `buf`, which is whole sectors, with data. `sums` has the checksum of each sector; without any, nothing
    /// tells whether the data is right, and that is told.
    ///
    /// # Errors
    /// `Corrupt` if all copies of a sector are wrong; what reading the point says.
    pub(super) fn data(&self, buf: &mut [u8], logical: u64, sums: &[Vec<u8>]) -> Result<()> {
        if sums.is_empty() {
            let what = "some of its files have data without checksums (nodatasum, nodatacow): if that is damaged, \
                nothing tells";
            self.findings.tell(&self.source, Kind::Unproven, what);
        }
        let (mut at, mut rest, mut sums) = (logical, buf, sums);
        let sector = self.sup.sector as usize;
        while !rest.is_empty() {
            let (places, there) = self.chunks.places(&self.source, at)?;
            let n = there.min(rest.len() as u64) as usize;
            if !n.is_multiple_of(sector) {
                return Err(self.bad_data(at, "it reaches over the end of its chunk"));
            }
            let (now, later) = rest.split_at_mut(n);
            let (these, others) = sums.split_at_checked(n / sector).unwrap_or((sums, &[]));
            self.piece(now, at, &places, these)?;
            (at, rest, sums) = (at + n as u64, later, others);
        }
        Ok(())
    }

    /// Data that is together in one chunk.
    fn piece(&self, buf: &mut [u8], at: u64, places: &[u64], sums: &[Vec<u8>]) -> Result<()> {
        let sector = self.sup.sector as usize;
        let is_right = |bytes: &[u8], sum: Option<&Vec<u8>>| {
            sum.is_none_or(|sum| self.sup.checksum.is_right(bytes, sum))
        };
        let (first, others) =
            places.split_first().ok_or_else(|| self.bad_data(at, "it is nowhere"))?;
        let read = self.source.read(buf, *first);
        if read.is_err() && others.is_empty() {
            return read;
        }
        for (i, bytes) in buf.chunks_mut(sector).enumerate() {
            if read.is_ok() && is_right(bytes, sums.get(i)) {
                continue;
            }
            let from = (i * sector) as u64;
            let found = others.iter().any(|place| {
                self.source.read(bytes, place + from).is_ok() && is_right(bytes, sums.get(i))
            });
            let error = self.bad_data(at + from, "bad checksum");
            if !found {
                return Err(error);
            }
            self.other_copy(&error);
        }
        Ok(())
    }

    /// Makes a lasting error a finding, and hands it on.
    pub(super) fn noted<T>(&self, result: Result<T>) -> Result<T> {
        self.findings.noted(&self.source, result)
    }

    /// An error about data.
    pub(super) fn bad_data(&self, logical: u64, why: &str) -> Error {
        let place = self.chunks.places(&self.source, logical).ok();
        let place = place.and_then(|(places, _)| places.first().copied()).unwrap_or(0);
        let what = format!("the data with the logical address {logical} is damaged: {why}");
        self.source.error(Kind::Corrupt, what, place)
    }

    /// Something wrong with an inode.
    pub(super) fn bad_inode(&self, tree: u64, inode: u64, what: &str) -> Error {
        let text = format!("inode {inode} of subvolume {tree} {what}");
        self.source.error(Kind::Corrupt, text, 0)
    }

    /// The first bytes of a checksum's field.
    pub(super) fn sum<'a>(&self, bytes: &'a [u8], index: usize) -> &'a [u8] {
        let len = self.sup.checksum.len();
        part(bytes, index * len, len)
    }
}
