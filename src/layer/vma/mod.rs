//! Proxmox VMA archives: each disk of a virtual machine as a layer that depends on nothing.
//!
//! Its modules: `header` (devices, names, sums), `index` (one pass over the extents), `unpack`
//! (archives compressed by vzdump: zstd, gzip, lzop) with `lzop` and `lzo1x`. An archive's files are
//! recognised by name, not by contents: a guest decides what a raw image begins with.

mod header;
mod index;
pub(crate) mod lzo1x;
mod lzop;
mod unpack;

use std::ops::Range;
use std::sync::{Arc, LazyLock, Mutex, PoisonError, Weak};

use super::{Layer, LayerMap};
use crate::error::{Error, Kind, Result};
use crate::storage::{ReadAt, Section, SourceFile};
pub use header::{Device, Header};
use index::Index;

/// How an archive begins.
#[derive(Debug)]
pub struct Beginning {
    /// What it says of itself.
    pub header: Header,
    /// That it ends inside its first extent, if it does.
    pub cut: Option<Error>,
    /// The numbers of the devices of which nothing is there then.
    pub absent: Vec<u8>,
}

/// Reads the header of an archive, compressed or not, and looks at its first extent (at most 4 MiB): a copy that was cut short at
/// its begin shows it there. All others are looked through when a point is opened.
///
/// # Errors
/// The header or the extent is damaged or cut, or the archive is compressed in a way that is not known;
/// `Truncated` also where a compressed one ends inside its first extent.
pub fn read_beginning(storage: &dyn ReadAt) -> Result<Beginning> {
    let named = |e: Error| e.at_path(storage.name());
    let mut reader = unpack::reader(storage)?;
    let header = Header::read(&mut *reader).map_err(named)?;
    let is_empty = header.devices.iter().all(|d| d.is_state());
    if is_empty {
        return Ok(Beginning { header, cut: None, absent: Vec::new() });
    }
    if unpack::is_packed(storage)? {
        index::skip_first(&mut *reader, &header).map_err(named)?;
        return Ok(Beginning { header, cut: None, absent: Vec::new() });
    }
    let cut = index::first_cut(storage, &header).map_err(named)?;
    let mut absent = Vec::new();
    if cut.is_some() {
        // It has no more than that extent.
        let index = Index::build(storage, &header).map_err(named)?;
        let devices = header.devices.iter().enumerate();
        absent.extend(devices.filter(|(i, _)| !index.has_any(*i)).map(|(_, d)| d.id));
    }
    Ok(Beginning { header, cut: cut.map(named), absent })
}

/// An archive with the index of its clusters, shared by the layers of its devices.
pub struct Archive {
    storage: Arc<dyn ReadAt>,
    header: Header,
    index: Index,
}

impl Archive {
    /// Reads the whole structure of an archive. A compressed one is unpacked to a scratch file
    /// first, because nothing but its beginning could be found otherwise.
    ///
    /// # Errors
    /// The archive is damaged anywhere in its structure, or cannot be read (one that only ends too
    /// early can, if it is not compressed: there only sums at its end prove what was unpacked); `NoSpace` if the
    /// scratch file would fill its file system.
    pub fn open(storage: Arc<dyn ReadAt>) -> Result<Self> {
        let storage = unpack::plain(storage)?;
        let named = |e: Error| e.at_path(storage.name());
        let header = Header::read(&mut Section::new(&*storage, 0, storage.len())).map_err(named)?;
        let index = Index::build(&*storage, &header).map_err(named)?;
        Ok(Archive { storage, header, index })
    }
}

/// One device of an archive.
pub struct VmaLayer {
    archive: Arc<Archive>,
    /// Its position among the header's devices.
    position: usize,
    size: u64,
}

impl VmaLayer {
    /// The layer of device number `id`.
    ///
    /// # Errors
    /// `NotFound` if there is no such disk; `Truncated` if nothing of it is there.
    pub fn new(archive: Arc<Archive>, id: u8) -> Result<Self> {
        let found = archive.header.devices.iter().position(|d| d.id == id && !d.is_state());
        let position = found.ok_or_else(|| {
            Error::new(Kind::NotFound, format!("the archive has no disk with number {id}"))
                .at_path(archive.storage.name())
        })?;
        // With nothing of it there, it is no disk that lacks something.
        if let Some(error) = archive.index.cut().filter(|_| !archive.index.has_any(position)) {
            return Err(error.at_path(archive.storage.name()));
        }
        let size = archive.header.devices[position].size;
        Ok(VmaLayer { archive, position, size })
    }
}

/// Opens a device of the archive in `file`. Devices of one archive share its index.
///
/// # Errors
/// See [`Archive::open`] and [`VmaLayer::new`].
pub(super) fn open(file: &Arc<SourceFile>, id: u8) -> Result<VmaLayer> {
    let slot = shared_slot(file);
    let mut shared = slot.lock().unwrap_or_else(PoisonError::into_inner);
    let archive = match shared.upgrade() {
        Some(archive) => archive,
        None => {
            let archive = Arc::new(Archive::open(file.clone())?);
            *shared = Arc::downgrade(&archive);
            archive
        }
    };
    VmaLayer::new(archive, id)
}

/// Holds the archive of one file while a layer of it is open; locked while it is being read.
type Slot = Arc<Mutex<Weak<Archive>>>;
/// The slots of all files that are in use.
type Slots = Vec<(Weak<SourceFile>, Slot)>;

fn shared_slot(file: &Arc<SourceFile>) -> Slot {
    static OPEN: LazyLock<Mutex<Slots>> = LazyLock::new(Mutex::default);
    let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
    open.retain(|(owner, _)| owner.strong_count() > 0);
    let this = Arc::downgrade(file);
    if let Some((_, slot)) = open.iter().find(|(owner, _)| owner.ptr_eq(&this)) {
        return slot.clone();
    }
    let slot = Slot::default();
    open.push((this, slot.clone()));
    slot
}

impl Layer for VmaLayer {
    fn size(&self) -> u64 {
        self.size
    }

    fn map(&self, range: Range<u64>) -> LayerMap {
        let Archive { storage, header, index } = &*self.archive;
        let mut map = LayerMap::new(range.start);
        let done = index.map(&**storage, header, self.position, range.clone(), &mut map);
        if let Err(e) = done {
            map.push_bad(range.end - map.extents.end(), &e, storage.name());
        }
        map
    }

    fn decompress(&self, host: u64, _len: u32, _out: &mut [u8]) -> Result<()> {
        Err(Error::new(Kind::Corrupt, "an archive has no compressed clusters")
            .at_path(self.path())
            .at_offset(host))
    }

    fn storage(&self, _file: u8) -> &dyn ReadAt {
        &*self.archive.storage
    }
}

#[cfg(test)]
mod tests;
