//! Layers: what one backup file says about guest ranges, and the bytes it holds.
//!
//! A layer knows its own file(s) only. It never opens another file: a name found inside an image
//! (backing file, data file) is reported by [`probe`] and resolved by `chain`, which passes the
//! result in through [`LayerSpec`]. Mapping is data ([`Mapping`], in `map`); reading happens elsewhere. What all
//! formats can do is in `traits`, what is known of a file before it is opened in `spec`.

mod map;
pub mod qcow2;
pub(crate) mod raw;
pub mod sparsestream;
mod spec;
#[cfg(test)]
mod testing;
mod traits;
pub mod vma;

use std::sync::Arc;

pub use map::{Kinds, KnownTables, LayerMap, MAX_EXTENTS, Mapping};
pub use spec::{Format, ImageInfo, LayerPart, LayerSpec, SnapshotInfo};
pub use traits::{Layer, PIECE, Piece, Unit};

use crate::error::{Error, Kind, Result};
use crate::storage::ReadAt;

/// Looks into a file: format, size, and the names it mentions. Reads the header and, for qcow2,
/// the snapshot table; checks that the L1 table lies inside the file.
///
/// Archives and streams are not looked for here: a guest decides what a raw image begins with, and
/// must not be able to make it something else. They are recognised by their names, and
/// [`vma::read_beginning`] and [`sparsestream::probe`] look into them.
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
            LayerPart::Device(id) => Ok(Arc::new(vma::open(&spec.file, id)?)),
            _ => Err(Error::new(Kind::Usage, "an archive is read device by device")
                .at_path(spec.file.path())),
        },
    }
}
