//! A served point: its image, and what tells it from another generation of itself.

use std::sync::Arc;

use crate::chain::{Catalog, Disk, Point};
use crate::error::{Error, Kind, Result};
use crate::image::{Cache, Image};
use crate::layer::{LayerPart, LayerSpec};
use crate::manifest::fingerprint_of;
use crate::overlay::kept::PointName;
use crate::storage::ReadAt;

/// A served point: its image and where the catalog describes it.
pub struct PointFile {
    /// The merged image.
    pub image: Arc<Image>,
    /// Bytes that the layers' files take on disk: the estimate of allocated bytes.
    pub estimate: u64,
    /// The image of the point that this one depends on.
    below: Option<Arc<Image>>,
    catalog: Arc<Catalog>,
    disk: usize,
    point: usize,
    /// Identity of all layers, merged from the bottom up.
    pub digest: blake3::Hash,
}

impl PointFile {
    /// Point `point` of disk `disk`, on top of `below`. The image is `old`'s where the layers are
    /// the very same; otherwise it is set up anew.
    ///
    /// # Errors
    /// `Incomplete` if the point depends on another and `below` is missing; as [`Image::new`].
    pub fn new(
        catalog: &Arc<Catalog>,
        (disk, point): (usize, usize),
        below: Option<&PointFile>,
        old: Option<&PointFile>,
        cache: &Arc<Cache>,
    ) -> Result<Self> {
        let p = &catalog.disks[disk].points[point];
        if p.parent.is_some() && below.is_none() {
            let text = "its parent point is not available";
            return Err(Error::new(Kind::Incomplete, text).at_path(&p.source));
        }
        let seed = below.map_or(blake3::hash(b"fleecefs layers"), |b| b.digest);
        let digest = p.layers.iter().fold(seed, layer_digest);
        let estimate = p.own_bytes.saturating_add(below.map_or(0, |b| b.estimate));
        let below = below.map(|b| b.image.clone());
        let same = |o: &&PointFile| {
            o.image.size() == p.size
                && same_layers(&o.point().layers, &p.layers)
                && same_image(o.below.as_ref(), below.as_ref())
        };
        let image = match old.filter(same) {
            Some(old) => old.image.clone(),
            None => Image::new(p.size, &p.layers, below.clone(), cache)?,
        };
        Ok(PointFile { image, below, estimate, catalog: catalog.clone(), disk, point, digest })
    }

    /// The catalog's description.
    pub fn point(&self) -> &Point {
        &self.catalog.disks[self.disk].points[self.point]
    }

    /// The disk it belongs to.
    pub fn disk(&self) -> &Disk {
        &self.catalog.disks[self.disk]
    }

    /// Index of the disk in the catalog and of the point in the disk.
    pub fn index(&self) -> (usize, usize) {
        (self.disk, self.point)
    }

    /// What the overlays of a mount call it.
    pub(super) fn name(&self) -> PointName {
        PointName::new(&self.disk().path, &self.point().name)
    }

    /// What tells the contents of this point from others: of each file, from the bottom up, format, length, time, and
    /// the bytes of both ends. A copy that keeps the times has the same.
    ///
    /// # Errors
    /// A file cannot be read, or has changed.
    pub(super) fn identity(&self) -> Result<String> {
        let points = &self.disk().points;
        let chain = std::iter::successors(Some(self.point()), |p| points.get(p.parent?));
        let mut layers: Vec<&LayerSpec> = chain.flat_map(|p| p.layers.iter().rev()).collect();
        layers.reverse();
        let mut hash = blake3::Hasher::new();
        hash.update(&self.image.size().to_le_bytes());
        for layer in layers {
            hash.update(format!("{:?} {:?}", layer.format, layer.part).as_bytes());
            for file in [Some(&layer.file), layer.data_file.as_ref()].into_iter().flatten() {
                let print = fingerprint_of(&*file.file()?);
                let failed = |e| Error::io(e, "cannot read the image").at_path(file.path());
                hash.update(print.map_err(failed)?.as_bytes());
                hash.update(&file.identity().mtime.to_le_bytes());
                file.check_unchanged()?;
            }
        }
        Ok(hash.finalize().to_hex().to_string())
    }

    /// The catalog it comes from.
    pub fn catalog(&self) -> &Catalog {
        &self.catalog
    }
}

fn same_layer(a: &LayerSpec, b: &LayerSpec) -> bool {
    let data = match (&a.data_file, &b.data_file) {
        (Some(a), Some(b)) => Arc::ptr_eq(a, b),
        (None, None) => true,
        _ => false,
    };
    Arc::ptr_eq(&a.file, &b.file) && a.format == b.format && a.part == b.part && data
}

fn same_layers(a: &[LayerSpec], b: &[LayerSpec]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same_layer(a, b))
}

fn same_image(a: Option<&Arc<Image>>, b: Option<&Arc<Image>>) -> bool {
    match (a, b) {
        (Some(a), Some(b)) => Arc::ptr_eq(a, b),
        (None, None) => true,
        _ => false,
    }
}

/// Adds a layer's identity. The device number is omitted: it may differ after a reboot.
fn layer_digest(below: blake3::Hash, layer: &LayerSpec) -> blake3::Hash {
    let mut hash = blake3::Hasher::new();
    hash.update(below.as_bytes());
    for file in [Some(&layer.file), layer.data_file.as_ref()].into_iter().flatten() {
        let id = file.identity();
        hash.update(&id.ino.to_le_bytes());
        hash.update(&id.size.to_le_bytes());
        hash.update(&id.mtime.to_le_bytes());
    }
    if let LayerPart::Snapshot(index) = &layer.part {
        hash.update(&index.to_le_bytes());
    }
    hash.finalize()
}
