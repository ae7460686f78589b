//! exFAT, after Microsoft's "exFAT file system specification".
//!
//! - `boot`: the boot region: sizes, flags, its checksum
//! - `set`: entry sets, which are what a file has in a folder
//! - `folder`: the entry sets of a folder, and what the root has beside them
//! - `upcase`: the table by which names are compared
//!
//! A node's number is the byte of the volume at which its entry set begins; its lowest bit says that its folder has
//! no chain (clusters follow each other), as the set may go on in the next cluster. The root is 0. The whole set is
//! checked by its checksum whenever it is read. Times without a zone are taken as UTC.

mod boot;
mod folder;
mod set;
mod upcase;

use std::ops::Range;
use std::sync::Arc;

use super::clusters::{Chain, Clusters, File, Link, SLOT, Slots, Width, plain};
use super::findings::Findings;
use super::source::Source;
use super::tree::{Attributes, Entry, NodeId, NodeKind, OpenFile, Statistics, Tree};
use super::utf16;
use crate::error::{Error, Kind, Result};
use boot::Boot;
use folder::{Each, MAX_FOLDER, NO_CHAIN, Reading, Root};
use set::{MAX_SET, Set};

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
        width: Width::Exfat,
        size: boot.cluster_size,
        heap_at: boot.heap_at,
        count: boot.count,
        source,
    };
    boot.look(&clusters);
    let root = folder::root(&clusters, boot.root);
    let root = root.unwrap_or_else(|e| {
        clusters.findings.failed(&clusters.source, e);
        Root::default()
    });
    Ok(Arc::new(Exfat { clusters: Arc::new(clusters), boot, root }))
}

/// Whether there is a file system whose boot region is gone, and its backup is right.
pub(super) fn has_copy(source: &Source) -> bool {
    boot::copy(source).is_some()
}

/// An open file system.
struct Exfat {
    clusters: Arc<Clusters>,
    boot: Boot,
    root: Root,
}

impl Exfat {
    /// The bytes of a folder, and whether it has no chain.
    fn slots(&self, folder: NodeId) -> Result<(Slots<'_>, bool)> {
        let clusters = &*self.clusters;
        if folder == self.root() {
            let most = u32::try_from(clusters.needed(MAX_FOLDER)).unwrap_or(u32::MAX);
            let chain = Chain::of_folder(clusters, self.boot.root, most)?;
            return Ok((Slots::chain(clusters, chain, u64::MAX), false));
        }
        let set = self.set_of(folder, NodeKind::Folder)?;
        if set.size > MAX_FOLDER {
            let what = format!("the directory at {:#x} is larger than can be", folder.number);
            return Err(clusters.source.error(Kind::Corrupt, what, folder.number));
        }
        Ok((Slots::chain(clusters, self.chain(&set)?, set.size), set.no_chain))
    }

    fn chain(&self, set: &Set) -> Result<Chain> {
        match set.size {
            0 => Ok(Chain::empty()),
            size if set.no_chain => Chain::contiguous(&self.clusters, set.first, size),
            size => Chain::of_file(&self.clusters, set.first, size),
        }
    }

    /// The entry set of a node that is not the root.
    fn set(&self, node: NodeId) -> Result<Set> {
        let clusters = &*self.clusters;
        let (place, no_chain) = (node.number & !NO_CHAIN, node.number & NO_CHAIN > 0);
        let cluster = clusters.cluster_at(place).ok_or_else(missing)?;
        if node.tree != 0 || !place.is_multiple_of(SLOT) {
            return Err(missing());
        }
        let end = clusters.place(cluster) + clusters.size;
        let mut bytes = clusters.source.meta(place, (end - place).min(MAX_SET) as usize)?;
        let len = Set::len(&bytes).ok_or_else(missing)?;
        let (mut cluster, mut links) = (cluster, clusters.links());
        // A long name takes more than one cluster of 512 bytes.
        while bytes.len() < len {
            cluster = match no_chain {
                true => cluster.saturating_add(1),
                false => match links.get(cluster)? {
                    Link::Next(next) => next,
                    _ => return Err(missing()),
                },
            };
            if !clusters.has(cluster) {
                return Err(missing());
            }
            let more = (len - bytes.len()).min(clusters.size as usize);
            bytes.extend(clusters.source.meta(clusters.place(cluster), more)?);
        }
        bytes.truncate(len);
        Set::new(&bytes).map_err(|_| missing())
    }

    fn set_of(&self, node: NodeId, kind: NodeKind) -> Result<Set> {
        let set = if node == self.root() { None } else { Some(self.set(node)?) };
        let named = format_args!("the directory entry at {:#x}", node.number);
        kind.only(set.as_ref().map(Set::kind), named)?;
        set.ok_or_else(missing)
    }

    fn each(&self, folder: NodeId, from: u64, each: &mut Each<'_>) -> Result<()> {
        let (slots, no_chain) = self.slots(folder)?;
        Reading { clusters: &self.clusters, slots, no_chain, each }.read(from)
    }
}

fn missing() -> Error {
    Error::new(Kind::NotFound, "no such directory entry")
}

impl Tree for Exfat {
    fn statistics(&self) -> Statistics {
        let free = self.root.free.map_or(0, u64::from);
        Statistics {
            kind: "exfat".into(),
            label: self.root.label.clone(),
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
            let most = u32::try_from(self.clusters.needed(MAX_FOLDER)).unwrap_or(u32::MAX);
            let chain = Chain::of_folder(&self.clusters, self.boot.root, most);
            let size = chain.map_or(0, |c| c.bytes(&self.clusters));
            return Ok(plain(NodeKind::Folder, size, size));
        }
        let set = self.clusters.noted(self.set(node))?;
        Ok(set.attributes(self.clusters.needed(set.size).saturating_mul(self.clusters.size)))
    }

    fn lookup(&self, folder: NodeId, name: &[u8]) -> Result<Option<NodeId>> {
        let Some(wanted) = utf16::from_bytes(name) else { return Ok(None) };
        let (upper, mut exact, mut found) = (&self.root.upper, None, None);
        let wanted = upper.of(&wanted);
        let result = self.each(folder, 0, &mut |entry, set| {
            if entry.name == name {
                exact = Some(entry.node);
            } else if found.is_none()
                && (set.name.len() == wanted.len() && upper.of(&set.name) == wanted)
            {
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
        self.clusters.noted(self.each(folder, from, &mut |entry, _| each(entry)))
    }

    fn folder_places(&self, folder: NodeId) -> Result<Vec<Range<u64>>> {
        self.clusters.noted(self.slots(folder).map(|(slots, _)| slots.places()))
    }

    fn open(&self, file: NodeId) -> Result<Box<dyn OpenFile>> {
        let set = self.clusters.noted(self.set_of(file, NodeKind::File))?;
        let chain = self.clusters.noted(self.chain(&set))?;
        let (clusters, size) = (self.clusters.clone(), set.size);
        Ok(Box::new(File { clusters, chain, size, valid: set.valid }))
    }

    fn read_link(&self, _: NodeId) -> Result<Vec<u8>> {
        Err(Error::new(Kind::Usage, "exFAT has no symbolic links"))
    }
}
