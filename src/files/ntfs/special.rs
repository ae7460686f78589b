//! What is more than a file or folder: reparse points ([MS-FSCC], 2.1.2), and the special files of Interix.

use super::super::bytes::{le16, le32, le64, part};
use super::super::tree::{Device, NodeKind};
use super::info::{Info, Wsl, attribute};
use super::names::to_bytes;
use super::node::Node;
use super::record::kind;
use super::stream::Stream;
use super::volume::Volume;
use crate::error::{Error, Kind, Result};

/// Reparse points are at most 16 KiB; the text of a link may be as long as all of that.
const MAX_REPARSE: u64 = 64 << 10;
/// An Interix link: its magic number and a path of Windows.
const INTERIX_LINK: &[u8] = b"IntxLNK\x01";
/// Devices: a magic number and two numbers.
const INTERIX_DEVICES: [(&[u8], NodeKind); 2] =
    [(b"IntxCHR\0", NodeKind::CharDevice), (b"IntxBLK\0", NodeKind::BlockDevice)];
const INTERIX_DEVICE: u64 = 24;

/// Tags of reparse points.
mod tag {
    pub(super) const MOUNT_POINT: u32 = 0xa000_0003;
    pub(super) const SYMLINK: u32 = 0xa000_000c;
    pub(super) const LX_SYMLINK: u32 = 0xa000_001d;
    pub(super) const AF_UNIX: u32 = 0x8000_0023;
    pub(super) const LX_FIFO: u32 = 0x8000_0024;
    pub(super) const LX_CHR: u32 = 0x8000_0025;
    pub(super) const LX_BLK: u32 = 0x8000_0026;
    pub(super) const WOF: u32 = 0x8000_0017;
    pub(super) const CLOUD: u32 = 0x9000_001a;
    /// All of OneDrive's differ here.
    pub(super) const CLOUD_MASK: u32 = 0xffff_0fff;
}

/// Whose contents are elsewhere: with these tags the file's own bytes are not what Windows shows.
const ELSEWHERE: [(u32, &str); 9] = [
    (0x8000_0013, "Data Deduplication"),
    (0xc000_0004, "a storage manager (HSM)"),
    (0x8000_0006, "a storage manager (HSM2)"),
    (0x8000_0007, "Single Instance Storage"),
    (0x8000_0008, "a mounted WIM image"),
    (0x8000_0018, "a Windows container"),
    (0x9000_1018, "a Windows container"),
    (0x9000_001c, "a projected file system (ProjFS)"),
    (0x8000_0021, "OneDrive"),
];

/// What a node is beside what its record says.
pub(super) enum Special {
    /// Nothing else.
    Plain,
    /// A symbolic link with this text.
    Link(Vec<u8>),
    /// A pipe or socket.
    Other(NodeKind),
    /// A device; its numbers, unless WSL has noted them.
    Device(NodeKind, Option<Device>),
    /// Compressed by Windows for its own files ("compact /exe"), with this method.
    System(u32),
    /// Something that has the contents.
    Elsewhere(&'static str),
    /// A tag that is not known.
    Unknown(u32),
}

impl Special {
    /// Reads what it is.
    ///
    /// # Errors
    /// `Corrupt`, or what reading the point says.
    pub(super) fn of(volume: &Volume, node: &Node, info: &Info) -> Result<Special> {
        if info.has(attribute::REPARSE)
            && let Some(stream) = Stream::open(&volume.table, node, kind::REPARSE, &[])?
        {
            let point = stream.read_all(MAX_REPARSE)?;
            let found = reparse(&point, info);
            return found.ok_or_else(|| volume.bad(node, "has an invalid reparse point"));
        }
        if info.has(attribute::SYSTEM) && !node.record.is_folder() {
            return interix(volume, node, info);
        }
        Ok(Special::Plain)
    }

    /// What kind of node that makes.
    pub(super) fn kind(&self, node: &Node) -> NodeKind {
        match self {
            Special::Link(_) => NodeKind::Link,
            Special::Other(kind) | Special::Device(kind, _) => *kind,
            _ if node.record.is_folder() => NodeKind::Folder,
            _ => NodeKind::File,
        }
    }

    /// The numbers of a device.
    ///
    /// # Errors
    /// `Corrupt`, or what reading the point says.
    pub(super) fn device(&self, wsl: &Wsl) -> Option<Device> {
        match self {
            Special::Device(_, own) => own.or(wsl.device).or(Some(Device::default())),
            _ => None,
        }
    }

    /// Notes a tag that is not known; fails for contents that are elsewhere.
    ///
    /// # Errors
    /// `Unsupported`.
    pub(super) fn check(&self, volume: &Volume, node: &Node) -> Result<()> {
        match self {
            Special::Unknown(tag) => {
                let what = format!(
                    "has a reparse point of an unknown kind ({tag:#010x}): a program of the guest may \
                    show something else here"
                );
                volume.odd(Kind::Unsupported, node, &what, None);
                Ok(())
            }
            Special::Elsewhere(who) => {
                Err(unsupported(volume, node, &format!("has its contents with {who}")))
            }
            _ => Ok(()),
        }
    }
}

/// Something that only the guest can read.
pub(super) fn unsupported(volume: &Volume, node: &Node, what: &str) -> Error {
    let number = node.record.number;
    let text = format!("MFT record {number} {what}");
    let error = volume.source().error(Kind::Unsupported, text, volume.table.place(number));
    error.remedy("start the guest from this point and copy the file there")
}

/// What a reparse point makes of its file; `None` if it is invalid.
fn reparse(point: &[u8], info: &Info) -> Option<Special> {
    if point.len() < 8 {
        return None;
    }
    let tag = le32(point, 0);
    let data = part(point, 8, usize::from(le16(point, 4)));
    Some(match tag {
        tag::SYMLINK => Special::Link(link(data, 12, le32(data, 8) & 1 != 0)?),
        tag::MOUNT_POINT => Special::Link(link(data, 8, false)?),
        tag::LX_SYMLINK => {
            Special::Link(data.get(4..).filter(|t| !t.is_empty() && !t.contains(&0))?.to_vec())
        }
        tag::AF_UNIX => Special::Other(NodeKind::Socket),
        tag::LX_FIFO => Special::Other(NodeKind::Pipe),
        tag::LX_CHR => Special::Device(NodeKind::CharDevice, None),
        tag::LX_BLK => Special::Device(NodeKind::BlockDevice, None),
        // Version and provider (2 is for files), and that one's version and method.
        tag::WOF if (le32(data, 0), le32(data, 4)) == (1, 2) => Special::System(le32(data, 12)),
        tag::WOF => Special::Elsewhere("a WIM image (Windows Overlay Filter)"),
        _ if tag & tag::CLOUD_MASK == tag::CLOUD => {
            let away = info.has(attribute::RECALL | attribute::OFFLINE);
            if away { Special::Elsewhere("OneDrive") } else { Special::Plain }
        }
        _ => match ELSEWHERE.iter().find(|(known, _)| *known == tag) {
            Some((_, who)) => Special::Elsewhere(who),
            None => Special::Unknown(tag),
        },
    })
}

/// The text of a link of Windows: the name that it leads to, or, for one that is not relative, the one that people
/// are shown. Names begin behind `head` bytes.
fn link(data: &[u8], head: usize, relative: bool) -> Option<Vec<u8>> {
    let name = |at: usize| {
        let (from, len) = (usize::from(le16(data, at)), usize::from(le16(data, at + 2)));
        let found = part(data, head + from, len);
        (found.len() == len && len.is_multiple_of(2)).then(|| to_bytes(found))
    };
    let (target, shown) = (name(0)?, name(4)?);
    let text = if relative || shown.is_empty() { target } else { shown };
    let text = text.strip_prefix(br"\??\").unwrap_or(&text);
    slashes(text)
}

fn slashes(text: &[u8]) -> Option<Vec<u8>> {
    let made = text.iter().map(|b| if *b == b'\\' { b'/' } else { *b }).collect();
    (!text.is_empty() && !text.contains(&0)).then_some(made)
}

/// What a file is that has the system flag: Interix (and ntfs-3g) keep links and devices so.
fn interix(volume: &Volume, node: &Node, info: &Info) -> Result<Special> {
    let size = node.first(&volume.table, kind::DATA, &[], |a| a.size())?.unwrap_or(0);
    if !(INTERIX_LINK.len() as u64 + 1..=MAX_REPARSE).contains(&size)
        || info.has(attribute::ENCRYPTED)
    {
        return Ok(Special::Plain);
    }
    let Some(stream) = Stream::open(&volume.table, node, kind::DATA, &[])? else {
        return Ok(Special::Plain);
    };
    let mut head = [0; INTERIX_LINK.len()];
    stream.fill(&mut head, 0)?;
    if head == INTERIX_LINK {
        let text =
            to_bytes(part(&stream.read_all(MAX_REPARSE)?, INTERIX_LINK.len(), size as usize));
        let right = !text.is_empty() && !text.contains(&0);
        return Ok(if right { Special::Link(text) } else { Special::Plain });
    }
    match INTERIX_DEVICES.iter().find(|(magic, _)| head == *magic) {
        Some((_, kind)) if size == INTERIX_DEVICE => {
            let all = stream.read_all(INTERIX_DEVICE)?;
            let number = |at| u32::try_from(le64(&all, at)).ok();
            let numbers = number(8).zip(number(16));
            let numbers = numbers.map(|(major, minor)| Device { major, minor });
            Ok(numbers.map_or(Special::Plain, |n| Special::Device(*kind, Some(n))))
        }
        _ => Ok(Special::Plain),
    }
}

#[cfg(test)]
mod tests {
    use super::super::names::on_disk;
    use super::*;

    fn info(attributes: u32) -> Info {
        let t = Default::default();
        Info { crtime: t, mtime: t, ctime: t, atime: t, attributes }
    }

    fn point(tag: u32, data: &[u8]) -> Vec<u8> {
        let mut point = tag.to_le_bytes().to_vec();
        point.extend_from_slice(&(data.len() as u16).to_le_bytes());
        point.extend_from_slice(&[0, 0]);
        point.extend_from_slice(data);
        point
    }

    fn names(target: &str, shown: &str, flags: Option<u32>) -> Vec<u8> {
        let (target, shown) = (on_disk(target), on_disk(shown));
        let numbers = [0, target.len(), target.len(), shown.len()];
        let mut data: Vec<u8> = numbers.iter().flat_map(|n| (*n as u16).to_le_bytes()).collect();
        data.extend(flags.map(u32::to_le_bytes).into_iter().flatten());
        [data, target, shown].concat()
    }

    fn text(point: &[u8]) -> Option<String> {
        match reparse(point, &info(0)) {
            Some(Special::Link(text)) => Some(String::from_utf8(text).unwrap()),
            _ => None,
        }
    }

    #[test]
    fn links_of_windows_read_as_paths() {
        let text = |tag, data: Vec<u8>| text(&point(tag, &data));
        let relative = names(r"..\a\b", r"..\a\b", Some(1));
        assert_eq!(text(tag::SYMLINK, relative).unwrap(), "../a/b");
        let absolute = names(r"\??\C:\Users\All", r"C:\Users\All", Some(0));
        assert_eq!(text(tag::SYMLINK, absolute).unwrap(), "C:/Users/All");
        let junction = names(r"\??\D:\data", "", None);
        assert_eq!(text(tag::MOUNT_POINT, junction).unwrap(), "D:/data");
        assert_eq!(text(tag::LX_SYMLINK, b"\x02\0\0\0/etc/x".to_vec()).unwrap(), "/etc/x");
        assert_eq!(text(tag::SYMLINK, names("", "", Some(1))), None);
        // A name that is not all there.
        let mut cut = names("abc", "abc", Some(1));
        cut.pop();
        assert_eq!(text(tag::SYMLINK, cut), None);
    }

    #[test]
    fn other_tags_say_what_they_are() {
        let of = |tag, data: &[u8], flags| reparse(&point(tag, data), &info(flags)).unwrap();
        let wof = [1, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 3, 0, 0, 0];
        assert!(matches!(of(tag::WOF, &wof, 0), Special::System(3)));
        assert!(matches!(of(tag::WOF, &[1; 16], 0), Special::Elsewhere(_)));
        assert!(matches!(of(0x8000_0013, &[], 0), Special::Elsewhere(_)));
        assert!(matches!(of(0x9000_601a, &[], 0), Special::Plain));
        assert!(matches!(of(0x9000_601a, &[], 0x40_0000), Special::Elsewhere(_)));
        assert!(matches!(of(0x1234, &[], 0), Special::Unknown(0x1234)));
        assert!(matches!(of(tag::LX_FIFO, &[], 0), Special::Other(NodeKind::Pipe)));
        assert!(reparse(&[1, 2, 3], &info(0)).is_none());
    }
}
