//! What QEMU reads and writes: points under throw-away overlays, and bytes in memory.

use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::error::{Error, Kind, Result};
use crate::image::{HeldPoint, Image};
use crate::overlay::kept::PointName;
use crate::overlay::{Overlay, Overlays, Scratch, Slot};
use crate::qemu_img::nbd::{Device, whole_sectors};

/// A point that is to be booted.
pub(crate) struct PointToBoot {
    /// Its bytes.
    pub image: Arc<Image>,
    /// Its disk's path, and its name.
    pub name: PointName,
}

/// The points of a VM, each under its overlay.
pub(crate) struct Disks {
    pub(super) all: Vec<Arc<dyn Device + Send + Sync>>,
}

impl Disks {
    /// Holds the files of all points open, and makes their overlays in `scratch`.
    ///
    /// # Errors
    /// A file is gone or has changed, or may not be opened; no overlay can be made.
    pub(crate) fn new(points: Vec<PointToBoot>, scratch: Scratch, backups: &Path) -> Result<Self> {
        let overlays = Arc::new(Overlays::new(scratch, backups, Path::new("/"))?);
        let mut all: Vec<Arc<dyn Device + Send + Sync>> = Vec::new();
        for point in points {
            let none = || Err(Error::new(Kind::Io, "nothing is kept of a test VM"));
            let slot = overlays.slot(point.name, &point.image, none)?;
            overlays.prepare(&slot, point.image.size(), Path::new(""), none)?;
            let _held = HeldPoint::new(&point.image)?;
            all.push(Arc::new(PointDevice {
                image: point.image,
                _held,
                slot,
                _of: overlays.clone(),
            }));
        }
        Ok(Disks { all })
    }
}

/// A point under its overlay.
struct PointDevice {
    image: Arc<Image>,
    _held: HeldPoint,
    slot: Arc<Slot>,
    _of: Arc<Overlays>,
}

impl PointDevice {
    fn overlay(&self) -> io::Result<&Overlay> {
        self.slot.overlay().ok_or_else(|| io::Error::other("the overlay is gone"))
    }

    fn below(&self) -> impl Fn(&mut [u8], u64) -> Result<()> + '_ {
        |buf, offset| self.image.read_at(buf, offset)
    }
}

/// As the operating system would say it.
fn told(e: Error) -> io::Error {
    match e.kind() {
        Kind::NoSpace => io::Error::from_raw_os_error(libc::ENOSPC),
        _ => io::Error::other(e.report()),
    }
}

impl Device for PointDevice {
    fn size(&self) -> u64 {
        whole_sectors(self.image.size())
    }

    fn is_writable(&self) -> bool {
        true
    }

    fn patience(&self) -> Option<Duration> {
        None
    }

    fn read(&self, from: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut buf = vec![0; len];
        // The rest of a last sector that is not whole are zeros.
        let there = usize::try_from(self.image.size().saturating_sub(from)).unwrap_or(usize::MAX);
        let part = &mut buf[..len.min(there)];
        self.overlay()?.read_at(self.below(), part, from).map_err(told)?;
        Ok(buf)
    }

    fn write(&self, data: &[u8], from: u64) -> io::Result<()> {
        let there = usize::try_from(self.image.size().saturating_sub(from)).unwrap_or(usize::MAX);
        let part = &data[..data.len().min(there)];
        self.overlay()?.write(self.below(), part, from).map_err(told)
    }

    fn zero(&self, range: Range<u64>) -> io::Result<()> {
        let end = range.end.min(self.image.size());
        let len = end.saturating_sub(range.start);
        self.overlay()?.zero_over(&self.image, range.start, len).map_err(told)
    }
}

/// Firmware, or an empty store of its variables.
pub(super) struct MemoryDevice {
    bytes: Mutex<Vec<u8>>,
    writable: bool,
}

impl MemoryDevice {
    /// Of these bytes, filled up to whole sectors.
    pub(super) fn new(mut bytes: Vec<u8>, writable: bool) -> Self {
        let len = whole_sectors(bytes.len() as u64);
        bytes.resize(usize::try_from(len).unwrap_or(bytes.len()), 0);
        MemoryDevice { bytes: Mutex::new(bytes), writable }
    }

    fn at<T>(&self, from: u64, len: usize, act: impl FnOnce(&mut [u8]) -> T) -> io::Result<T> {
        let mut bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let from = usize::try_from(from).unwrap_or(usize::MAX);
        let end = from.checked_add(len);
        let part = end.and_then(|end| bytes.get_mut(from..end));
        part.map(act).ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }
}

impl Device for MemoryDevice {
    fn size(&self) -> u64 {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner).len() as u64
    }

    fn is_writable(&self) -> bool {
        self.writable
    }

    fn patience(&self) -> Option<Duration> {
        None
    }

    fn read(&self, from: u64, len: usize) -> io::Result<Vec<u8>> {
        self.at(from, len, |part| part.to_vec())
    }

    fn write(&self, data: &[u8], from: u64) -> io::Result<()> {
        self.at(from, data.len(), |part| part.copy_from_slice(data))
    }

    fn zero(&self, range: Range<u64>) -> io::Result<()> {
        let len = usize::try_from(range.end.saturating_sub(range.start)).unwrap_or(usize::MAX);
        self.at(range.start, len, |part| part.fill(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::folder::Folder;
    use crate::image::Cache;
    use crate::layer::{Format, LayerPart, LayerSpec};
    use crate::storage::SourceFile;

    /// The size is no multiple of a sector: what is written behind it goes nowhere, and comes back as zeros.
    #[test]
    fn a_guest_writes_to_the_overlay_and_the_point_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().canonicalize().unwrap().join("a.raw");
        std::fs::write(&path, [7; 10_000]).unwrap();
        let file = Arc::new(SourceFile::look(&path).unwrap());
        let layer =
            LayerSpec { file, format: Format::Raw, part: LayerPart::Whole, data_file: None };
        let image = Image::new(10_000, &[layer], None, &Cache::new(1 << 20)).unwrap();
        let scratch = tempfile::tempdir().unwrap();
        let folder = Folder::open(&scratch.path().canonicalize().unwrap()).unwrap();
        let scratch = Scratch { folder, keep: false, limit: 1 << 20, named: false };
        let point = PointToBoot { image, name: PointName::new(Path::new("a"), "a.raw") };
        let disks = Disks::new(vec![point], scratch, dir.path()).unwrap();
        let disk = &disks.all[0];
        assert_eq!(disk.size(), 10_240);
        disk.write(&[9; 1024], 9_216).unwrap();
        disk.zero(0..4096).unwrap();
        let read = disk.read(0, 10_240).unwrap();
        assert!(read[..4096].iter().all(|b| *b == 0) && read[4096..9216].iter().all(|b| *b == 7));
        assert!(
            read[9216..10_000].iter().all(|b| *b == 9) && read[10_000..].iter().all(|b| *b == 0)
        );
        assert!(std::fs::read(&path).unwrap() == [7; 10_000]);
    }

    #[test]
    fn memory_is_of_whole_sectors_and_has_an_end() {
        let d = MemoryDevice::new(vec![1; 700], true);
        assert_eq!(d.size(), 1024);
        d.write(&[2; 24], 1000).unwrap();
        assert!(d.write(&[2; 25], 1000).is_err() && d.read(u64::MAX, 1).is_err());
        assert_eq!(d.read(699, 2).unwrap(), [1, 0]);
        d.zero(0..10).unwrap();
        assert_eq!(d.read(9, 2).unwrap(), [0, 1]);
    }
}
