//! What a layer says about guest ranges.

use std::collections::HashMap;
use std::path::Path;

use crate::error::{Error, Finding, Kind, Result};
use crate::extent::{Content, ExtentList};

/// What a layer says about a guest range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mapping {
    /// Nothing: ask the layer below.
    Below,
    /// Reads as zeros, whatever is below.
    Zero,
    /// Plain bytes in one of the layer's files.
    Data {
        /// Which of the layer's files: 0 is the image itself, 1 its external data file.
        file: u8,
        /// Offset of the extent's first byte in that file.
        host: u64,
    },
    /// Part of a unit that has to be decompressed as a whole.
    Compressed {
        /// Where the compressed unit starts in file 0.
        host: u64,
        /// An upper limit of its compressed length in bytes.
        len: u32,
        /// Its length when decompressed.
        unit: u32,
        /// Where in the decompressed unit this extent starts.
        skip: u32,
    },
    /// The range cannot be read: EIO there and nowhere else.
    Bad,
}

impl Content for Mapping {
    fn advanced(self, by: u64) -> Self {
        match self {
            Mapping::Data { file, host } => Mapping::Data { file, host: host.wrapping_add(by) },
            Mapping::Compressed { host, len, unit, skip } => {
                Mapping::Compressed { host, len, unit, skip: skip.wrapping_add(by as u32) }
            }
            other => other,
        }
    }
}

/// Which kinds of content occur somewhere in a stretch of a layer: a set of [`Mapping`]'s cases, in
/// which all that is not `Below` or `Zero` counts as data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kinds(u8);

impl Kinds {
    /// Nothing at all.
    pub const NONE: Kinds = Kinds(0);
    /// [`Mapping::Below`].
    pub const BELOW: Kinds = Kinds(1);
    /// [`Mapping::Zero`].
    pub const ZERO: Kinds = Kinds(2);
    /// Anything that is no hole; also what cannot be read.
    pub const DATA: Kinds = Kinds(4);
    /// All of them may occur: nothing is known.
    pub const ANY: Kinds = Kinds(7);

    /// Whether one of `others` may occur.
    pub fn has(self, others: Kinds) -> bool {
        self.0 & others.0 != 0
    }

    /// These and `others`.
    pub fn with(self, others: Kinds) -> Kinds {
        Kinds(self.0 | others.0)
    }

    /// Those that occur in a map.
    pub fn of(map: &LayerMap) -> Kinds {
        let kind = |e: &crate::extent::Extent<Mapping>| match e.content {
            Mapping::Below => Kinds::BELOW,
            Mapping::Zero => Kinds::ZERO,
            Mapping::Data { .. } | Mapping::Compressed { .. } | Mapping::Bad => Kinds::DATA,
        };
        map.extents.as_slice().iter().map(kind).fold(Kinds::NONE, Kinds::with)
    }
}

impl Content for Kinds {
    fn advanced(self, _by: u64) -> Self {
        self
    }
}

/// What a caller of [`super::Layer::outline`] keeps between calls: what is in each table that was read.
pub type KnownTables = HashMap<u64, Kinds>;

/// The result of [`super::Layer::map`]: a list that covers exactly the range asked for, and what was
/// found wrong on the way (each such range is [`Mapping::Bad`]).
#[derive(Debug)]
pub struct LayerMap {
    /// What is where.
    pub extents: ExtentList<Mapping>,
    /// Why ranges are bad.
    pub findings: Vec<Finding>,
    /// How many findings more there would have been.
    pub suppressed: u64,
}

/// Findings kept per call of [`super::Layer::map`]: a table full of garbage has thousands, and the first
/// few say all there is to say.
const MAX_FINDINGS: usize = 8;

/// Extents kept per call of [`super::Layer::map`]. Twice what a window of 64 MiB in pieces of 512 bytes
/// takes. Only disks of more than 64 TiB have larger windows, and only a hostile image, in which
/// thousands of table entries share a cluster, fills one of those with so many.
pub const MAX_EXTENTS: usize = 1 << 18;

impl LayerMap {
    /// An empty map beginning at guest offset `start`.
    pub fn new(start: u64) -> Self {
        LayerMap { extents: ExtentList::new(start), findings: Vec::new(), suppressed: 0 }
    }

    /// Fails if no more extents may be appended but one that cannot be read.
    ///
    /// # Errors
    /// `Unsupported`.
    pub fn check_room(&self, path: &Path) -> Result<()> {
        if self.extents.as_slice().len() < MAX_EXTENTS {
            return Ok(());
        }
        Err(Error::new(Kind::Unsupported, "too many pieces for a disk of this size").at_path(path))
    }

    /// Appends a range that cannot be read, with its reason.
    pub fn push_bad(&mut self, len: u64, error: &Error, path: &Path) {
        self.extents.push(len, Mapping::Bad);
        if self.findings.len() < MAX_FINDINGS {
            self.findings.push(Finding::from_error(error, path));
        } else {
            self.suppressed += 1;
        }
    }
}
