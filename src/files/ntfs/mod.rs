//! NTFS, as Windows NT and all after it write it; written from what Microsoft ([MS-FSCC], [MS-XCA]) and the
//! documentation of the Linux-NTFS project say of it. (The crate ntfs 0.4 reads neither compressed files nor
//! reparse points, wants `&mut` and Seek, and has no bounds of ours.)
//!
//! - `boot`: the boot sector; `fixup`: what tells torn records
//! - `runs`: where the clusters of an attribute are
//! - `record`, `table`, `node`: records of the master file table, and files, which may have several
//! - `names`: UTF-16, and letters in another case
//! - `stream`: the bytes of an attribute; `lznt1`: compressed ones
//! - `logfile`: whether the guest closed the volume
//! - `volume`: what all parts share
//! - `info`, `special`: times, flags, links, devices
//! - `index`: folders
//! - `system`: files that Windows has compressed for itself, by `xpress` and `lzx`, which share `bits`
//! - `file`: contents
//!
//! The log is not replayed: its records have no published format. Where it is not empty, that is a finding. Alternate
//! data streams are extended attributes, `user.NAME`, and files with the name `FILE:NAME` for whoever asks for
//! that. Windows' access lists and other extended attributes are not given, but for those of WSL.

mod bits;
mod boot;
mod file;
mod fixup;
mod index;
mod info;
mod logfile;
mod lznt1;
mod lzx;
mod names;
mod node;
mod record;
mod runs;
mod special;
mod stream;
mod system;
mod table;
mod volume;
mod xpress;

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use super::findings::Findings;
use super::source::Source;
use super::tree::{Attributes, Entry, NodeId, NodeKind, OpenFile, Statistics, Tree, Xattr};
use super::utf16;
use super::xattrs::Xattrs;
use crate::error::{Error, Kind, Result};
use info::{Info, Wsl, attribute};
use node::Node;
use record::kind;
use special::Special;
pub(super) use volume::has_copy;
use volume::{Volume, number};

/// Values of extended attributes, as [`Tree::xattrs`] bounds them.
const MAX_XATTR: u64 = 64 << 10;
/// Names have at most 255 units.
const MAX_NAME: usize = 255;
/// Bits of [`NodeId::tree`] for the sequence number; above them is which stream of the file it is.
const SEQUENCE_BITS: u32 = 16;

/// Opens the file system in `source`.
///
/// # Errors
/// `Corrupt` if there is no master file table; what reading the point says.
pub(super) fn open(source: Source) -> Result<Arc<dyn Tree>> {
    let volume = Volume::open(source)?;
    let root = volume.noted(volume.node(number::ROOT))?;
    let root = NodeId { tree: u64::from(root.record.sequence()), number: number::ROOT };
    let ntfs = Ntfs { volume: Arc::new(volume), root, free: OnceLock::new() };
    ntfs.check_hibernation()?;
    Ok(Arc::new(ntfs))
}

/// An open file system.
struct Ntfs {
    volume: Arc<Volume>,
    root: NodeId,
    /// Free clusters, and records in use: counted when somebody asks.
    free: OnceLock<(u64, Option<u64>)>,
}

/// Something that a [`NodeId`] leads to.
struct Found {
    node: Node,
    /// The name of a stream of it, in UTF-16; empty for the file or folder itself.
    stream: Vec<u8>,
}

impl Ntfs {
    fn found(&self, id: NodeId) -> Result<Found> {
        let volume = &self.volume;
        let missing = || {
            let text =
                format!("{}: MFT record {} is another file", volume.source().label(), id.number);
            Error::new(Kind::NotFound, text).at_path(volume.source().path())
        };
        let node = volume.node(id.number)?;
        let (sequence, stream) = (id.tree & 0xffff, id.tree >> SEQUENCE_BITS);
        if u64::from(node.record.sequence()) != sequence || node.record.base() != 0 {
            return Err(missing());
        }
        let stream = match stream.checked_sub(1) {
            None => Vec::new(),
            Some(index) => {
                let name = node.streams().into_iter().nth(index as usize);
                name.ok_or_else(missing)?
            }
        };
        Ok(Found { node, stream })
    }

    /// A node of this kind.
    fn found_of(&self, id: NodeId, wanted: NodeKind) -> Result<(Found, Special)> {
        let found = self.found(id)?;
        let special = self.special(&found)?;
        let is_stream = !found.stream.is_empty();
        let kind = if is_stream { NodeKind::File } else { special.kind(&found.node) };
        wanted.only(Some(kind), format_args!("MFT record {}", id.number))?;
        Ok((found, special))
    }

    fn special(&self, found: &Found) -> Result<Special> {
        match found.stream.is_empty() {
            true => {
                let info = Info::of(&self.volume, &found.node)?;
                Special::of(&self.volume, &found.node, &info)
            }
            false => Ok(Special::Plain),
        }
    }

    fn attributes_of(&self, id: NodeId) -> Result<Attributes> {
        let (volume, found) = (&self.volume, self.found(id)?);
        let node = &found.node;
        let info = Info::of(volume, node)?;
        let (special, wsl) = match found.stream.is_empty() {
            true => (Special::of(volume, node, &info)?, Wsl::of(volume, node)?),
            false => (Special::Plain, Wsl::default()),
        };
        let kind = if found.stream.is_empty() { special.kind(node) } else { NodeKind::File };
        let (size, allocated) = file::sizes(volume, node, &special, kind, &found.stream)?;
        let usual = match kind {
            NodeKind::Folder => 0o755,
            NodeKind::Link => 0o777,
            _ if info.has(attribute::READ_ONLY) => 0o444,
            _ => 0o644,
        };
        let mut flags = info.flags();
        flags.encrypted &= kind != NodeKind::Folder;
        flags.compressed |= matches!(special, Special::System(_));
        Ok(Attributes {
            kind,
            size,
            allocated,
            mode: wsl.mode.unwrap_or(usual) & 0o7777,
            uid: wsl.uid.unwrap_or(0),
            gid: wsl.gid.unwrap_or(0),
            links: info::links(volume, node)?,
            atime: info.atime,
            mtime: info.mtime,
            ctime: info.ctime,
            crtime: Some(info.crtime),
            device: special.device(&wsl),
            flags,
        })
    }

    fn lookup_in(&self, folder: NodeId, name: &[u8]) -> Result<Option<NodeId>> {
        let (found, _) = self.found_of(folder, NodeKind::Folder)?;
        let look = |name: &[u8]| match utf16::from_bytes(name) {
            Some(units) if (1..=MAX_NAME).contains(&units.len()) => {
                index::lookup(&self.volume, &found.node, &units)
            }
            _ => Ok(None),
        };
        if let Some(node) = look(name)? {
            return Ok(Some(node));
        }
        let Some(colon) = name.iter().position(|b| *b == b':') else { return Ok(None) };
        let (file, stream) = (name.get(..colon), name.get(colon + 1..));
        let (Some(file), Some(stream)) = (file, stream.and_then(utf16::from_bytes)) else {
            return Ok(None);
        };
        let Some(node) = look(file)? else { return Ok(None) };
        let streams = self.found(node)?.node.streams();
        let same = |n: &Vec<u8>| self.volume.upcase.compare(n, &stream).is_eq();
        let index = streams.iter().position(same);
        Ok(index.map(|i| NodeId { tree: node.tree | (i as u64 + 1) << SEQUENCE_BITS, ..node }))
    }

    /// Streams beside the contents.
    fn xattrs_of(&self, id: NodeId) -> Result<Vec<Xattr>> {
        let (volume, found) = (&self.volume, self.found(id)?);
        if !found.stream.is_empty() {
            return Ok(Vec::new());
        }
        let streams = found.node.streams();
        if streams.is_empty() {
            return Ok(Vec::new());
        }
        let is_system = matches!(self.special(&found)?, Special::System(_));
        let whose = format!("MFT record {}", id.number);
        let mut all = Xattrs::new(volume.source(), &volume.findings, whose);
        for name in streams {
            if is_system && name == names::on_disk(system::STREAM) {
                continue;
            }
            let shown = names::to_bytes(&name);
            if let Some(value) = file::value(volume, &found.node, &name, MAX_XATTR)? {
                all.add("user.", &shown, value)?;
            }
        }
        Ok(all.into_list())
    }

    /// Windows that is hibernated, or was shut down with "fast startup", has the newest of its files in memory.
    fn check_hibernation(&self) -> Result<()> {
        let volume = &self.volume;
        let read = || -> Result<[u8; 4]> {
            let mut magic = [0; 4];
            if let Some(node) = self.lookup_in(self.root, b"hiberfil.sys")? {
                file::File::new(volume, &self.found(node)?.node, &Special::Plain, &[])?
                    .read_at(&mut magic, 0)?;
            }
            Ok(magic)
        };
        match read() {
            Ok(magic) if magic.eq_ignore_ascii_case(b"hibr") => {
                let what = "Windows is hibernated or was shut down with fast startup: what it had not written \
                    is missing or old";
                volume.findings.warn(volume.source(), Kind::Unproven, what, Some(volume::REPLAY));
                Ok(())
            }
            Err(e) if !e.kind().is_lasting() && e.kind() != Kind::NotFound => Err(e),
            _ => Ok(()),
        }
    }

    /// Clusters that are free, and records in use.
    fn counted(&self) -> (u64, Option<u64>) {
        *self.free.get_or_init(|| {
            let (volume, table) = (&self.volume, &self.volume.table);
            let used = file::count(volume, number::BITMAP, kind::DATA, table.boot.clusters);
            let records = table.initialized / table.boot.record as u64;
            let nodes = file::count(volume, number::MFT, kind::BITMAP, records);
            let clusters = used.unwrap_or(table.boot.clusters);
            (table.boot.clusters.saturating_sub(clusters), nodes)
        })
    }
}

impl Tree for Ntfs {
    fn statistics(&self) -> Statistics {
        let volume = &self.volume;
        let (boot, (free, nodes)) = (&volume.table.boot, self.counted());
        Statistics {
            kind: "ntfs".into(),
            label: volume.label.clone(),
            uuid: format!("{:016X}", boot.serial),
            block_size: boot.cluster,
            total: boot.total(),
            free: free.saturating_mul(boot.cluster),
            nodes,
            free_nodes: None,
            features: vec![format!("version {}.{}", volume.version.0, volume.version.1)],
        }
    }

    fn findings(&self) -> &Findings {
        &self.volume.findings
    }

    fn root(&self) -> NodeId {
        self.root
    }

    fn attributes(&self, node: NodeId) -> Result<Attributes> {
        self.volume.noted(self.attributes_of(node))
    }

    fn lookup(&self, folder: NodeId, name: &[u8]) -> Result<Option<NodeId>> {
        self.volume.noted(self.lookup_in(folder, name))
    }

    fn read_folder(
        &self,
        folder: NodeId,
        from: u64,
        each: &mut dyn FnMut(Entry) -> bool,
    ) -> Result<()> {
        let read = self.found_of(folder, NodeKind::Folder).and_then(|(found, special)| {
            special.check(&self.volume, &found.node)?;
            index::read(&self.volume, &found.node, from, each)
        });
        self.volume.noted(read)
    }

    fn folder_places(&self, folder: NodeId) -> Result<Vec<Range<u64>>> {
        let found = self.found_of(folder, NodeKind::Folder);
        self.volume.noted(found.and_then(|(found, _)| index::places(&self.volume, &found.node)))
    }

    fn is_parent(&self, folder: NodeId, parent: NodeId) -> Result<Option<bool>> {
        let found = self.found_of(folder, NodeKind::Folder);
        let said = found.and_then(|(found, _)| info::is_parent(&self.volume, &found.node, parent));
        self.volume.noted(said).map(Some)
    }

    fn open(&self, file: NodeId) -> Result<Box<dyn OpenFile>> {
        let opened = self.found_of(file, NodeKind::File).and_then(|(found, special)| {
            special.check(&self.volume, &found.node)?;
            file::File::new(&self.volume, &found.node, &special, &found.stream)
        });
        Ok(Box::new(self.volume.noted(opened)?))
    }

    fn read_link(&self, link: NodeId) -> Result<Vec<u8>> {
        match self.volume.noted(self.found_of(link, NodeKind::Link))? {
            (_, Special::Link(text)) => Ok(text),
            _ => Err(Error::new(Kind::Usage, format!("MFT record {} is no link", link.number))),
        }
    }

    fn xattrs(&self, node: NodeId) -> Result<Vec<Xattr>> {
        self.volume.noted(self.xattrs_of(node))
    }
}
