//! [`LazyLayer`]: a layer that is opened when it is first needed.
//!
//! State: the layer once it is open; or else why it cannot be, where trying again would only take
//! as long and say the same. A file that changes becomes another `LazyLayer` with the next look at
//! the backup directory. One thread opens while others wait for it, so that an archive is never
//! unpacked twice.

use std::sync::{Arc, Mutex, OnceLock};

use crate::error::{Error, Finding, Kind, Result};
use crate::layer::{self, Format, Layer, LayerSpec};
use crate::storage::files::Slot;
use crate::storage::{ReadAt, SourceFile};

/// A layer that is opened when it is first needed.
pub(super) struct LazyLayer {
    /// Names it in the cache.
    pub id: u64,
    /// How to open it.
    pub spec: LayerSpec,
    layer: OnceLock<Arc<dyn Layer>>,
    failed: OnceLock<Finding>,
    opening: Mutex<()>,
}

impl LazyLayer {
    /// Opens nothing yet.
    pub(super) fn new(id: u64, spec: LayerSpec) -> Self {
        let (layer, failed, opening) = (OnceLock::new(), OnceLock::new(), Mutex::new(()));
        LazyLayer { id, spec, layer, failed, opening }
    }

    /// The layer, opened now if need be.
    ///
    /// # Errors
    /// As [`layer::open`], the same again where it cannot get better; `Changed` if the file is
    /// another than the one that was scanned.
    pub(super) fn get(&self) -> Result<&dyn Layer> {
        if let Some(l) = self.layer.get() {
            return Ok(&**l);
        }
        let _one = self.opening.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(l) = self.layer.get() {
            return Ok(&**l);
        }
        if let Some(finding) = self.failed.get() {
            return Err(finding.to_error());
        }
        let opened = layer::open(&self.spec).map_err(|e| self.failure(e))?;
        Ok(&**self.layer.get_or_init(|| opened))
    }

    /// Remembers what lasts. What a file says while it is being changed does not.
    fn failure(&self, error: Error) -> Error {
        for file in self.files() {
            if let Err(changed) = file.check_unchanged()
                && changed.kind() == Kind::Changed
            {
                return changed;
            }
        }
        if error.kind().is_lasting() {
            let path = self.spec.file.path();
            self.failed.get_or_init(|| Finding::from_error(&error, path));
        }
        error
    }

    fn files(&self) -> impl Iterator<Item = &Arc<SourceFile>> {
        [Some(&self.spec.file), self.spec.data_file.as_ref()].into_iter().flatten()
    }

    /// Where the descriptors of its files are.
    pub(super) fn slots(&self) -> impl Iterator<Item = &Arc<Slot>> + Clone {
        [Some(&self.spec.file), self.spec.data_file.as_ref()]
            .into_iter()
            .flatten()
            .map(|f| f.slot())
    }

    /// Opens the file(s) and reads nothing.
    ///
    /// # Errors
    /// The file is gone, may not be opened, or has changed.
    pub(super) fn open_files(&self) -> Result<()> {
        self.files().try_for_each(|f| f.file().map(drop))
    }

    /// Whether opening such a layer may take long: some formats are read from end to end.
    pub(super) fn is_slow(spec: &LayerSpec) -> bool {
        match spec.format {
            Format::Vma | Format::SparseStream => true,
            Format::Qcow2 | Format::Raw => false,
        }
    }

    /// Whether [`Self::get`] may take long now.
    pub(super) fn opens_slowly(&self) -> bool {
        Self::is_slow(&self.spec) && self.layer.get().is_none() && self.failed.get().is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::LayerPart;

    fn lazy(path: &std::path::Path, format: Format) -> LazyLayer {
        let file = Arc::new(SourceFile::look(path).unwrap());
        LazyLayer::new(1, LayerSpec { file, format, part: LayerPart::Device(1), data_file: None })
    }

    #[test]
    fn a_damaged_archive_is_read_once() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), [7; 65536]).unwrap();
        let layer = lazy(file.path(), Format::Vma);
        assert!(layer.opens_slowly());
        let first = layer.get().err().unwrap();
        assert!(!layer.opens_slowly(), "it is known now");
        let again = layer.get().err().unwrap();
        assert_eq!((first.kind(), first.report()), (again.kind(), again.report()));
    }

    #[test]
    fn only_what_lasts_is_remembered() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        std::fs::write(&path, b"QFI\xfb").unwrap();
        let layer = lazy(&path, Format::Qcow2);
        std::fs::rename(&path, dir.path().join("b")).unwrap();
        assert_eq!(layer.get().err().unwrap().kind(), Kind::NotFound);
        assert!(layer.failed.get().is_none());
        // What is there now is another file, whose damage says nothing about the one meant.
        std::fs::write(&path, b"QFI\xfb with more").unwrap();
        assert_eq!(layer.get().err().unwrap().kind(), Kind::Changed);
        assert!(layer.failed.get().is_none());
    }
}
