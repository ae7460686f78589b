//! Layers: what one backup file says about guest ranges, and the bytes it holds.
//!
//! A layer knows its own file(s) only. It never opens another file: a name found inside an image
//! (backing file, data file) is reported by [`probe`] and resolved by `chain`, which passes the
//! result in through [`LayerSpec`]. Mapping is data ([`Mapping`]); reading happens elsewhere.

pub mod qcow2;
pub mod raw;
pub mod sparsestream;
#[cfg(test)]
mod testing;
pub mod vma;

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, Finding, Kind, Result};
use crate::extent::{Content, ExtentList};
use crate::storage::{ReadAt, SourceFile};

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

/// What a caller of [`Layer::outline`] keeps between calls: what is in each table that was read.
pub type KnownTables = HashMap<u64, Kinds>;

/// Bytes of which an outline says that anything may be there, where a layer has nothing better.
const UNKNOWN_STRETCH: u64 = 64 << 20;

/// The result of [`Layer::map`]: a list that covers exactly the range asked for, and what was
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

/// Findings kept per call of [`Layer::map`]: a table full of garbage has thousands, and the first
/// few say all there is to say.
const MAX_FINDINGS: usize = 8;

/// Extents kept per call of [`Layer::map`]. Twice what a window of 64 MiB in pieces of 512 bytes
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

/// Bytes of a [`Piece`] where a unit has several.
pub const PIECE: u32 = 256 << 10;

/// A decompressed unit, or a part of a large one.
#[derive(Debug, PartialEq, Eq)]
pub struct Piece {
    /// Its bytes.
    pub bytes: Box<[u8]>,
    /// Where in the file decompression goes on after it, if that can be told.
    pub next: Option<u64>,
}

/// A compressed unit, as [`Mapping::Compressed`] names it.
#[derive(Debug, Clone, Copy)]
pub struct Unit {
    /// Where it starts in file 0.
    pub host: u64,
    /// An upper limit of its compressed length.
    pub len: u32,
    /// Its length when decompressed.
    pub size: u32,
}

/// One file's contribution to the points of a disk. Immutable once opened.
pub trait Layer: Send + Sync {
    /// Size in bytes of the virtual disk that this layer describes.
    fn size(&self) -> u64;

    /// What this layer says about `range`, which lies inside `0..size()`. The answer covers the
    /// range exactly. A part that cannot be mapped is `Bad`, with a finding.
    fn map(&self, range: Range<u64>) -> LayerMap;

    /// Fails if the table that leads to all others is bad somewhere. Looks at no other.
    ///
    /// # Errors
    /// `Corrupt`, `Truncated` or `Io`, with file and offset.
    fn check_top(&self) -> Result<()> {
        Ok(())
    }

    /// A guest offset at or after `from` before which everything is certainly `Below`: a coarse
    /// and cheap hint that lets sparse disks be skipped over. `size()` if nothing follows.
    fn next_mapped(&self, from: u64) -> u64 {
        from
    }

    /// The same for everything that is `Below` or `Zero`.
    fn next_data(&self, from: u64) -> u64 {
        self.next_mapped(from)
    }

    /// Which kinds of content occur from `from` on, which lies inside `0..size()`: a short list of
    /// long stretches that begins there, is not empty and need not reach the end. Every kind that
    /// occurs in a stretch is among its kinds; where a stretch has one kind only, all of it is so.
    fn outline(&self, from: u64, known: &mut KnownTables) -> ExtentList<Kinds> {
        let _ = known;
        let data = self.next_data(from).clamp(from, self.size());
        let mapped = self.next_mapped(from).clamp(from, data);
        let mut list = ExtentList::new(from);
        list.push(mapped - from, Kinds::BELOW);
        list.push(data - mapped, Kinds::BELOW.with(Kinds::ZERO));
        list.push((self.size() - data).min(UNKNOWN_STRETCH), Kinds::ANY);
        list
    }

    /// Reads plain bytes that [`Mapping::Data`] named.
    ///
    /// # Errors
    /// `Io`, `Truncated` or `Changed`, with file and offset.
    fn read_data(&self, file: u8, host: u64, buf: &mut [u8]) -> Result<()> {
        self.storage(file).read_exact_at(buf, host)
    }

    /// Decompresses the unit at `host` into `out`, whose length is the unit's.
    ///
    /// # Errors
    /// `Corrupt`, `Io` or `Truncated`, with file and offset.
    fn decompress(&self, host: u64, len: u32, out: &mut [u8]) -> Result<()>;

    /// The length of `unit`'s pieces, of which the last may be shorter; at least 1.
    fn piece_size(&self, unit: Unit) -> u32 {
        unit.size.max(1)
    }

    /// Bytes that decompressing pieces of `unit` takes at a time, what comes out included.
    ///
    /// # Errors
    /// As [`decompress`](Self::decompress).
    fn room(&self, unit: Unit) -> Result<u64> {
        Ok(unit.size.into())
    }

    /// Decompresses `unit` piece by piece, up to piece number `last` and a little further at most, and
    /// gives each to `keep` with its number. Begins after the piece `after`, which has a `next`, or at the start.
    ///
    /// # Errors
    /// As [`decompress`](Self::decompress), and what `keep` says. Pieces that were kept are right.
    fn decompress_pieces(
        &self,
        unit: Unit,
        after: Option<(u32, &Piece)>,
        last: u32,
        keep: &mut dyn FnMut(u32, Piece) -> Result<()>,
    ) -> Result<()> {
        let _ = (after, last);
        let mut bytes = vec![0; unit.size as usize].into_boxed_slice();
        self.decompress(unit.host, unit.len, &mut bytes)?;
        keep(0, Piece { bytes, next: None })
    }

    /// The storage behind [`Mapping::Data`]'s file number.
    fn storage(&self, file: u8) -> &dyn ReadAt;

    /// Fails with `Changed` if one of the layer's files may have other bytes than when it was
    /// opened.
    fn check_unchanged(&self) -> Result<()> {
        self.storage(0).check_unchanged()
    }

    /// The file to name in messages.
    fn path(&self) -> &Path {
        self.storage(0).name()
    }
}

/// File formats that are recognised by their contents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// QEMU's copy-on-write format, version 2 or 3.
    Qcow2,
    /// The guest's bytes, one to one.
    Raw,
    /// A Proxmox archive, compressed or not; its disks are [`Part::Device`]s.
    Vma,
    /// virtnbdbackup's stream of data and zero ranges.
    SparseStream,
}

/// What [`probe`] finds out about a file without opening another.
#[derive(Debug, Clone)]
pub struct ImageInfo {
    /// The file's format.
    pub format: Format,
    /// Size in bytes of the virtual disk.
    pub virtual_size: u64,
    /// The backing file's name exactly as the image has it; never opened as such.
    pub backing_file: Option<String>,
    /// The backing file's format as the image has it.
    pub backing_format: Option<String>,
    /// The external data file's name exactly as the image has it (qcow2 header extension
    /// 0x44415441). `Some("")` if the feature bit is set and no name is given.
    pub data_file: Option<String>,
    /// Internal snapshots, in table order.
    pub snapshots: Vec<SnapshotInfo>,
    /// Cluster size in bytes; 0 where the format has none.
    pub cluster_size: u32,
    /// qcow2 version 2 or 3; 0 for other formats.
    pub version: u32,
    /// Whether QEMU marked the image as corrupt.
    pub marked_corrupt: bool,
    /// Odd things that do not stop reading (dirty flag, unknown autoclear bits).
    pub findings: Vec<Finding>,
}

/// An internal snapshot of a qcow2 image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Id string, which should be unique; at most 255 bytes of it.
    pub id: String,
    /// Name, as `qemu-img snapshot -l` shows it; at most 255 bytes of it.
    pub name: String,
    /// Seconds since the epoch when it was taken.
    pub time: u64,
    /// Size in bytes of the virtual disk in this snapshot.
    pub virtual_size: u64,
    /// Why it cannot be opened, if it cannot.
    pub unusable: Option<Finding>,
}

/// Which part of a file is a layer.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub enum Part {
    /// All of it (of a qcow2: the active state).
    #[default]
    Whole,
    /// The internal snapshot at this place of the table: ids need not be unique.
    Snapshot(u32),
    /// The device with this number, of an archive that holds several.
    Device(u8),
}

/// Everything that is needed to open a layer.
#[derive(Debug, Clone)]
pub struct LayerSpec {
    /// The file, as the scan saw it.
    pub file: Arc<SourceFile>,
    /// Its format, as [`probe`] found it.
    pub format: Format,
    /// Which part of it.
    pub part: Part,
    /// The external data file, resolved inside the backup directory by the caller.
    pub data_file: Option<Arc<SourceFile>>,
}

/// Looks into a file: format, size, and the names it mentions. Reads the header and, for qcow2,
/// the snapshot table; checks that the L1 table lies inside the file.
///
/// Archives and streams are not looked for here: a guest decides what a raw image begins with, and
/// must not be able to make it something else. They are recognised by their names, and
/// [`vma::read_header`] and [`sparsestream::probe`] look into them.
///
/// # Errors
/// The header is corrupt, truncated, encrypted or needs an unknown feature; or reading failed.
pub fn probe(storage: &dyn ReadAt) -> Result<ImageInfo> {
    if qcow2::has_magic(storage)? { qcow2::probe(storage) } else { raw::probe(storage) }
}

/// The format a file has by its magic bytes, or `None` if it has no magic that we know.
pub fn sniff(storage: &dyn ReadAt) -> Result<Option<Format>> {
    Ok(qcow2::has_magic(storage)?.then_some(Format::Qcow2))
}

/// Whether a file without magic looks like a qcow2 image whose first bytes are damaged, or like what
/// is left of one that was cut to less than its magic. No guest's disk begins so by chance.
///
/// # Errors
/// Reading failed.
pub fn is_damaged_qcow2(storage: &dyn ReadAt) -> Result<bool> {
    qcow2::is_damaged(storage)
}

/// Opens a layer.
///
/// # Errors
/// As [`probe`]; also `NotFound` for a snapshot that the image does not have, and `Incomplete`
/// where the image needs an external data file and none was passed in.
pub fn open(spec: &LayerSpec) -> Result<Arc<dyn Layer>> {
    let storage: Arc<dyn ReadAt> = spec.file.clone();
    let data: Option<Arc<dyn ReadAt>> = spec.data_file.clone().map(|f| f as Arc<dyn ReadAt>);
    match spec.format {
        Format::Qcow2 => Ok(Arc::new(qcow2::Qcow2Layer::open(storage, data, &spec.part)?)),
        Format::Raw => Ok(Arc::new(raw::RawLayer::new(storage))),
        Format::SparseStream => Ok(Arc::new(sparsestream::StreamLayer::open(storage)?)),
        Format::Vma => match spec.part {
            Part::Device(id) => Ok(Arc::new(vma::open(&spec.file, id)?)),
            _ => Err(Error::new(Kind::Usage, "an archive is read device by device")
                .at_path(spec.file.path())),
        },
    }
}
