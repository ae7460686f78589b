//! FAT12, FAT16 and FAT32, after Microsoft's "FAT: General Overview of On-Disk Format" (fatgen103).
//!
//! - `boot`: the boot sector: sizes, and which of the three it is
//! - `name`: short and long names; `cp437`: what the bytes of short names stand for
//! - `folder`: the entries of a folder
//!
//! A node's number is the byte of the volume at which its entry begins, so that nothing needs to be kept; the root,
//! which has no entry, is 0. Whether there is an entry at such a place is checked as far as an entry can be told
//! from other bytes. Times have no zone on disk: they are taken as UTC. Of the crates, `fatfs` 0.3 wants `&mut`
//! Read and Seek, keeps its state in a `RefCell` and is not Sync, so it cannot serve several threads.

mod boot;
mod cp437;
mod folder;
mod name;

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use super::bytes::le64;
use super::clusters::{Chain, Clusters, FIRST, File, Link, SLOT, Slots, Width, plain};
use super::findings::Findings;
use super::source::Source;
use super::tree::{Attributes, Entry, NodeId, NodeKind, OpenFile, Statistics, Tree};
use crate::error::{Error, Kind, Result};
use boot::{Boot, FSCK, Root};
use folder::{Each, Item, Reading};

/// Sizes of folders in the cache.
const SIZES: u8 = 1;
/// A directory has at most 65,536 entries.
const MAX_FOLDER: u64 = 65_536 * SLOT;

/// Opens the file system in `source`.
///
/// # Errors
/// `Corrupt` if the boot sector contradicts itself, or what reading the point says.
pub(super) fn open(source: Source) -> Result<Arc<dyn Tree>> {
    let findings = Findings::default();
    let boot = Boot::read(&source, &findings)?;
    let clusters = Clusters {
        findings,
        table_at: boot.table_at,
        width: boot.width,
        size: boot.cluster_size,
        heap_at: boot.heap_at,
        count: boot.count,
        source,
    };
    let fat = Fat { clusters: Arc::new(clusters), boot, free: OnceLock::new() };
    fat.look()?;
    Ok(Arc::new(fat))
}

/// Whether there is a file system whose boot sector is gone, and which has a backup of it.
pub(super) fn has_copy(source: &Source) -> bool {
    Boot::copy(source).is_some()
}

/// An open file system.
struct Fat {
    clusters: Arc<Clusters>,
    boot: Boot,
    /// Free clusters, counted when somebody asks.
    free: OnceLock<u64>,
}

impl Fat {
    /// Says what is odd about the file system as a whole.
    fn look(&self) -> Result<()> {
        let (boot, source) = (&self.boot, &self.clusters.source);
        let warn =
            |kind, what: &str, remedy| self.clusters.findings.warn(source, kind, what, remedy);
        if boot.total > source.size() {
            let what = "the file system is larger than the disk or partition that it is in";
            warn(Kind::Truncated, what, None);
        }
        let [dirty, errors] = boot.marks(source)?;
        if dirty {
            let what = "the file system was in use and not unmounted: what the guest wrote last may be missing";
            warn(Kind::Corrupt, what, Some(FSCK));
        }
        if errors {
            warn(Kind::Corrupt, "the guest noted disk errors in this file system", Some(FSCK));
        }
        if boot.copies_differ(source)? {
            warn(Kind::Corrupt, "the two copies of the file allocation table differ", Some(FSCK));
        }
        Ok(())
    }

    fn slots(&self, folder: NodeId) -> Result<Slots<'_>> {
        let first = match folder.number {
            0 => match self.boot.root {
                Root::Fixed { at, len } => return Ok(Slots::fixed(&self.clusters, at, len)),
                Root::Cluster(first) => first,
            },
            _ => self.item_of(folder, NodeKind::Folder)?.first,
        };
        let most = u32::try_from(self.clusters.needed(MAX_FOLDER)).unwrap_or(u32::MAX);
        let chain = Chain::of_folder(&self.clusters, first, most)?;
        Ok(Slots::chain(&self.clusters, chain, u64::MAX))
    }

    /// The entry of a node that is not the root.
    fn item(&self, node: NodeId) -> Result<Item> {
        let place = node.number;
        let in_root = match self.boot.root {
            Root::Fixed { at, len } => place.checked_sub(at).is_some_and(|i| i < len),
            Root::Cluster(_) => false,
        };
        let inside = in_root || self.clusters.cluster_at(place).is_some();
        if node.tree != 0 || !place.is_multiple_of(SLOT) || !inside {
            return Err(missing());
        }
        let slot = self.clusters.source.meta(place, SLOT as usize)?;
        Item::new(&slot, self.clusters.width).ok_or_else(missing)
    }

    fn item_of(&self, node: NodeId, kind: NodeKind) -> Result<Item> {
        let item = if node == self.root() { None } else { Some(self.item(node)?) };
        let named = format_args!("the directory entry at {:#x}", node.number);
        kind.only(item.as_ref().map(Item::kind), named)?;
        item.ok_or_else(missing)
    }

    fn each(&self, folder: NodeId, from: u64, each: &mut Each<'_>) -> Result<()> {
        let slots = self.slots(folder)?;
        Reading { clusters: &self.clusters, slots, each }.read(from)
    }

    /// Bytes that a folder takes: its chain has to be followed for that, once for all its names.
    fn folder_size(&self, first: u32) -> u64 {
        let clusters = &*self.clusters;
        let most = u32::try_from(clusters.needed(MAX_FOLDER)).unwrap_or(u32::MAX);
        let size = clusters.source.unit(SIZES, u64::from(first), || {
            let bytes = Chain::of_folder(clusters, first, most)?.bytes(clusters);
            Ok(bytes.to_le_bytes().to_vec())
        });
        size.map_or(0, |bytes| le64(&bytes, 0))
    }

    fn free_clusters(&self) -> u64 {
        if let Some(free) = self.boot.noted_free {
            return u64::from(free);
        }
        if self.clusters.width == Width::Fat32 {
            return 0;
        }
        let mut links = self.clusters.links();
        let all = FIRST..FIRST + self.clusters.count;
        all.filter(|c| matches!(links.get(*c), Ok(Link::Free))).count() as u64
    }

    fn root_attributes(&self) -> Attributes {
        let size = match self.boot.root {
            Root::Fixed { len, .. } => len,
            Root::Cluster(first) => self.folder_size(first),
        };
        plain(NodeKind::Folder, size, size)
    }
}

fn missing() -> Error {
    Error::new(Kind::NotFound, "no such directory entry")
}

impl Tree for Fat {
    fn statistics(&self) -> Statistics {
        let free = *self.free.get_or_init(|| self.free_clusters());
        Statistics {
            kind: self.boot.kind().into(),
            label: self.boot.label(self.slots(self.root()).ok()),
            uuid: self.boot.serial.clone(),
            block_size: self.clusters.size,
            total: self.boot.total,
            free: free.saturating_mul(self.clusters.size),
            ..Statistics::default()
        }
    }

    fn findings(&self) -> &Findings {
        &self.clusters.findings
    }

    fn root(&self) -> NodeId {
        NodeId { tree: 0, number: 0 }
    }

    fn attributes(&self, node: NodeId) -> Result<Attributes> {
        if node == self.root() {
            return Ok(self.root_attributes());
        }
        let item = self.clusters.noted(self.item(node))?;
        let size = match item.kind() {
            NodeKind::Folder => self.folder_size(item.first),
            _ => item.size,
        };
        Ok(item.attributes(size, self.clusters.needed(size) * self.clusters.size))
    }

    fn lookup(&self, folder: NodeId, name: &[u8]) -> Result<Option<NodeId>> {
        let Some(wanted) = name::folded(name) else { return Ok(None) };
        let (mut exact, mut found) = (None, None);
        let result = self.each(folder, 0, &mut |entry, long, short| {
            if entry.name == name {
                exact = Some(entry.node);
            } else if found.is_none() && (long == wanted || short == wanted) {
                found = Some(entry.node);
            }
            exact.is_none()
        });
        self.clusters.noted(result)?;
        // A name as it is listed is that one, whatever others are alike.
        Ok(exact.or(found))
    }

    fn read_folder(
        &self,
        folder: NodeId,
        from: u64,
        each: &mut dyn FnMut(Entry) -> bool,
    ) -> Result<()> {
        self.clusters.noted(self.each(folder, from, &mut |entry, _, _| each(entry)))
    }

    fn folder_places(&self, folder: NodeId) -> Result<Vec<Range<u64>>> {
        self.clusters.noted(self.slots(folder).map(|slots| slots.places()))
    }

    fn open(&self, file: NodeId) -> Result<Box<dyn OpenFile>> {
        let item = self.clusters.noted(self.item_of(file, NodeKind::File))?;
        let chain = self.clusters.noted(Chain::of_file(&self.clusters, item.first, item.size))?;
        let (clusters, size) = (self.clusters.clone(), item.size);
        Ok(Box::new(File { clusters, chain, size, valid: size }))
    }

    fn read_link(&self, _: NodeId) -> Result<Vec<u8>> {
        Err(Error::new(Kind::Usage, "FAT has no symbolic links"))
    }
}
