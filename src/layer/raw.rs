//! Raw files: the guest's bytes one to one, holes found with SEEK_DATA and SEEK_HOLE.

use std::ops::Range;
use std::sync::Arc;

use super::{Format, ImageInfo, Kinds, KnownTables, Layer, LayerMap, Mapping};
use crate::error::{Error, Kind, Result};
use crate::extent::ExtentList;
use crate::storage::ReadAt;

/// A raw image. A raw file has no way to say "ask below": its holes are zeros.
pub(crate) struct RawLayer {
    storage: Arc<dyn ReadAt>,
}

impl RawLayer {
    /// A raw layer over `storage`.
    pub(crate) fn new(storage: Arc<dyn ReadAt>) -> Self {
        RawLayer { storage }
    }
}

/// Other disk image formats, by their first bytes. Taking one of them for a raw disk would serve
/// wrong bytes; no guest's disk starts like this.
const OTHER_FORMATS: [(&[u8], &str); 10] = [
    (b"KDMV", "a VMDK image"),
    (b"COWD", "a VMDK image"),
    (b"# Disk DescriptorFile", "a VMDK description"),
    (b"vhdxfile", "a VHDX image"),
    (b"conectix", "a VHD image"),
    (b"QED\0", "a QED image"),
    (b"<<< ", "a VDI image"),
    (b"WithoutFreeSpace", "a Parallels image"),
    (b"WithouFreSpacExt", "a Parallels image"),
    (b"Bochs Virtual HD Image", "a Bochs image"),
];

/// Bytes that [`other_format`] wants to see.
pub(crate) const START: usize = 32;

/// What a file that begins with `start` is, if it is an image of a format that is not read.
pub(crate) fn other_format(start: &[u8]) -> Option<&'static str> {
    OTHER_FORMATS.iter().find(|(magic, _)| start.starts_with(magic)).map(|(_, name)| *name)
}

/// A raw file's size is its length.
pub(super) fn probe(storage: &dyn ReadAt) -> Result<ImageInfo> {
    let mut start = [0; START];
    let n = (storage.len().min(START as u64)) as usize;
    storage.read_exact_at(&mut start[..n], 0)?;
    if let Some(name) = other_format(&start[..n]) {
        return Err(Error::new(Kind::Unsupported, format!("{name}, not a raw disk"))
            .at_path(storage.name())
            .remedy("convert it with 'qemu-img convert -O qcow2'"));
    }
    Ok(ImageInfo {
        format: Format::Raw,
        virtual_size: storage.len(),
        backing_file: None,
        backing_format: None,
        data_file: None,
        snapshots: Vec::new(),
        cluster_size: 0,
        version: 0,
        marked_corrupt: false,
        findings: Vec::new(),
    })
}

impl Layer for RawLayer {
    fn size(&self) -> u64 {
        self.storage.len()
    }

    fn map(&self, range: Range<u64>) -> LayerMap {
        let mut map = LayerMap::new(range.start);
        if let Err(e) = push_raw(&mut map, &*self.storage, 0, range.start, range.end - range.start)
        {
            let rest = range.end - map.extents.end();
            map.push_bad(rest, &e, self.storage.name());
        }
        map
    }

    fn next_data(&self, from: u64) -> u64 {
        // Where the file system does not tell, reading will.
        self.storage.seek_data(from).map_or(from, |at| at.unwrap_or(self.size()).max(from))
    }

    fn outline(&self, from: u64, _known: &mut KnownTables) -> ExtentList<Kinds> {
        let size = self.size();
        let mut list = ExtentList::new(from);
        let data = self.next_data(from).clamp(from, size);
        list.push(data - from, Kinds::ZERO);
        if data < size {
            match self.storage.seek_hole(data) {
                Ok(hole) if hole > data => list.push(hole.min(size) - data, Kinds::DATA),
                // It shrinks, or the file system does not tell.
                _ => list.push(size - data, Kinds::ANY),
            }
        }
        list
    }

    fn decompress(&self, host: u64, _len: u32, _out: &mut [u8]) -> Result<()> {
        Err(Error::new(Kind::Corrupt, "a raw file has no compressed data")
            .at_path(self.storage.name())
            .at_offset(host))
    }

    fn storage(&self, _file: u8) -> &dyn ReadAt {
        &*self.storage
    }
}

/// Appends `len` bytes at `host` of file number `file`: data where the file system has data, zero
/// where it has a hole. The bytes must be inside the file.
///
/// # Errors
/// The file system would not tell; what was appended so far stays.
pub(super) fn push_raw(
    map: &mut LayerMap,
    storage: &dyn ReadAt,
    file: u8,
    host: u64,
    len: u64,
) -> Result<()> {
    let failed = |e, at| {
        Error::io(e, "cannot find the holes of the file").at_path(storage.name()).at_offset(at)
    };
    let end = host + len;
    let mut at = host;
    while at < end {
        map.check_room(storage.name())?;
        let data = storage.seek_data(at).map_err(|e| failed(e, at))?.unwrap_or(end).clamp(at, end);
        map.extents.push(data - at, Mapping::Zero);
        at = data;
        if at == end {
            break;
        }
        let hole = storage.seek_hole(at).map_err(|e| failed(e, at))?.clamp(at, end);
        // A file that shrinks meanwhile reports a hole where it just had data: call it data, so
        // that the loop goes on and the read reports the change.
        let hole = if hole == at { end } else { hole };
        map.extents.push(hole - at, Mapping::Data { file, host: at });
        at = hole;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::extent::clipped;
    use crate::storage::SourceFile;
    use std::os::unix::fs::FileExt;

    #[test]
    fn holes_are_zero_and_data_is_data() {
        let f = tempfile::NamedTempFile::new().unwrap();
        f.as_file().set_len(1 << 20).unwrap();
        f.as_file().write_all_at(&[1; 4096], 256 << 10).unwrap();
        let layer = RawLayer::new(Arc::new(SourceFile::look(f.path()).unwrap()));
        let map = layer.map(4096..1 << 20);
        map.extents.check(&(4096..1 << 20)).unwrap();
        let at = |o: u64| clipped(map.extents.as_slice(), o..o + 1).next().unwrap().content;
        assert_eq!(at(8192), Mapping::Zero);
        assert_eq!(at(256 << 10), Mapping::Data { file: 0, host: 256 << 10 });
        assert_eq!(at(900 << 10), Mapping::Zero);
    }
}
