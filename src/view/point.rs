//! A point whose files are shown, and what is open of it.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use crate::error::{Error, Finding, Kind, Result};
use crate::files::{Blocks, Source, Tree, Volume, open_tree, volumes_of};
use crate::image::{HeldPoint, Image};
use crate::storage::ReadAt;

/// Another disk of a point's run: its name for messages, and its image.
pub type Beside = (String, Arc<Image>);

/// A point whose files are shown. It leads to no catalog, so that old ones can go.
pub struct Point {
    number: u64,
    name: String,
    image: Arc<Image>,
    /// The other disks of its run, once LVM has asked for them: what is opened again has to find the same volumes.
    beside: OnceLock<Vec<Beside>>,
}

impl Point {
    /// The point that `image` is of: `number` tells it from all others, also from another generation of itself;
    /// `name` is its disk's, for messages.
    pub fn new(number: u64, name: String, image: Arc<Image>) -> Self {
        Point { number, name, image, beside: OnceLock::new() }
    }

    /// The number that it was given.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Its bytes.
    pub fn image(&self) -> &Arc<Image> {
        &self.image
    }

    /// Its file in the backup directory.
    pub(super) fn path(&self) -> &Path {
        self.image.name()
    }

    /// Whether it takes long to read, because an archive has to be unpacked first.
    pub fn must_wait(&self) -> bool {
        self.images().any(|i| i.must_wait(0..i.size()))
    }

    fn images(&self) -> impl Iterator<Item = &Arc<Image>> {
        let beside = self.beside.get().map(Vec::as_slice).unwrap_or_default();
        std::iter::once(&self.image).chain(beside.iter().map(|(_, image)| image))
    }

    /// Holds its files open, and those of the other disks of its run as far as they are there: what is read of these
    /// alone fails.
    ///
    /// # Errors
    /// A file is gone, may not be opened, or has changed.
    pub(super) fn hold(&self) -> Result<Vec<HeldPoint>> {
        let own = HeldPoint::lingering(&self.image)?;
        let beside = self.images().skip(1).filter_map(|i| HeldPoint::lingering(i).ok());
        Ok(std::iter::once(own).chain(beside).collect())
    }
}

/// The volumes of a point, and those of its file systems that somebody has looked into.
pub(super) struct Opened {
    volumes: Vec<OpenVolume>,
    findings: Vec<Finding>,
}

struct OpenVolume {
    volume: Volume,
    tree: OnceLock<Arc<dyn Tree>>,
}

impl Opened {
    /// Finds the volumes.
    ///
    /// # Errors
    /// What reading the point says.
    pub(super) fn new(
        point: &Point,
        blocks: &Arc<Blocks>,
        beside: impl FnOnce() -> Vec<Beside>,
    ) -> Result<Opened> {
        let source = |name: &str, image: &Arc<Image>| Source::new(image.clone(), name, blocks);
        let others = || -> Vec<Source> {
            let all = point.beside.get_or_init(beside).iter();
            all.map(|(name, image)| source(name, image)).collect()
        };
        let (volumes, findings) = volumes_of(&source(&point.name, &point.image), others)?;
        let volumes: Vec<OpenVolume> = volumes
            .into_iter()
            .map(|volume| OpenVolume { volume, tree: OnceLock::new() })
            .collect();
        Ok(Opened { volumes, findings })
    }

    /// The names of those that have files.
    pub(super) fn with_files(&self) -> impl Iterator<Item = &str> {
        let shown = self.volumes.iter().filter(|v| v.volume.content.has_files());
        shown.map(|v| v.volume.name.as_str())
    }

    /// The file system in a volume, opened now if need be.
    ///
    /// # Errors
    /// As [`open_tree`]; `NotFound` if there is no such volume.
    pub(super) fn tree(&self, name: &str) -> Result<Arc<dyn Tree>> {
        let volume = self.volumes.iter().find(|v| v.volume.name == name);
        let volume = volume.ok_or_else(|| {
            Error::new(Kind::NotFound, format!("no partition or volume '{name}'"))
        })?;
        if let Some(tree) = volume.tree.get() {
            return Ok(tree.clone());
        }
        let tree = open_tree(&volume.volume)?;
        Ok(volume.tree.get_or_init(|| tree).clone())
    }

    /// What was found odd so far; and of what has files that are not shown, how to get at them.
    pub(super) fn findings(&self) -> Vec<Finding> {
        let mut all = self.findings.clone();
        for open in &self.volumes {
            if let Some(tree) = open.tree.get() {
                all.extend(tree.findings().list());
            }
            all.extend(not_shown(&open.volume));
        }
        all
    }
}

/// Says why a volume is not shown, where there may be files in it.
fn not_shown(volume: &Volume) -> Option<Finding> {
    if volume.content.has_files() {
        return None;
    }
    let error = open_tree(volume).err()?;
    let remedy = error.remedy_text()?.to_string();
    let finding = Finding::warning(error.kind(), volume.source.path(), error.message());
    Some(Finding { remedy: Some(remedy), ..finding })
}
