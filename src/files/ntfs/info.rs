//! What a record says of its file: times, flags, names, and WSL's owner and permissions.

use super::super::bytes::{byte, le16, le32, le64, part};
use super::super::tree::{Device, Flags, NodeId, Time};
use super::node::Node;
use super::record::kind;
use super::stream::Stream;
use super::volume::Volume;
use crate::error::Result;

/// File attributes.
pub(super) mod attribute {
    pub(in super::super) const READ_ONLY: u32 = 0x1;
    pub(in super::super) const HIDDEN: u32 = 0x2;
    pub(in super::super) const SYSTEM: u32 = 0x4;
    pub(in super::super) const REPARSE: u32 = 0x400;
    pub(in super::super) const COMPRESSED: u32 = 0x800;
    pub(in super::super) const OFFLINE: u32 = 0x1000;
    pub(in super::super) const ENCRYPTED: u32 = 0x4000;
    /// Somebody else has the contents, and gives them when the file is opened, or read.
    pub(in super::super) const RECALL: u32 = 0x44_0000;
}

/// From 1601 to 1970, in seconds, and what NTFS counts.
const EPOCH: i64 = 11_644_473_600;
const TICKS: i64 = 10_000_000;
/// The most that Windows has of extended attributes of a file.
const MAX_EA: u64 = 64 << 10;
/// The short name of a file that has another one.
const DOS: u8 = 2;

/// $STANDARD_INFORMATION.
pub(super) struct Info {
    pub crtime: Time,
    pub mtime: Time,
    pub ctime: Time,
    pub atime: Time,
    /// See [`attribute`].
    pub attributes: u32,
}

impl Info {
    /// Reads it.
    ///
    /// # Errors
    /// `Corrupt` if there is none, or what reading the point says.
    pub(super) fn of(volume: &Volume, node: &Node) -> Result<Info> {
        let read = |value: &[u8]| Info {
            crtime: time(le64(value, 0)),
            mtime: time(le64(value, 8)),
            ctime: time(le64(value, 0x10)),
            atime: time(le64(value, 0x18)),
            attributes: le32(value, 0x20),
        };
        let found = node.first(&volume.table, kind::STANDARD, &[], |a| a.resident().map(read))?;
        found.flatten().ok_or_else(|| volume.bad(node, "has no standard information"))
    }

    pub(super) fn has(&self, flag: u32) -> bool {
        self.attributes & flag != 0
    }

    pub(super) fn flags(&self) -> Flags {
        Flags {
            encrypted: self.has(attribute::ENCRYPTED),
            compressed: self.has(attribute::COMPRESSED),
            read_only: self.has(attribute::READ_ONLY),
            hidden: self.has(attribute::HIDDEN),
            system: self.has(attribute::SYSTEM),
            ..Flags::default()
        }
    }
}

fn time(ticks: u64) -> Time {
    let ticks = ticks.cast_signed();
    let nanos = ticks.rem_euclid(TICKS) as u32 * 100;
    Time { seconds: ticks.div_euclid(TICKS) - EPOCH, nanos }
}

/// How many names it has; short ones are not counted, though its record counts them.
///
/// # Errors
/// `Corrupt`, or what reading the point says.
pub(super) fn links(volume: &Volume, node: &Node) -> Result<u64> {
    if node.record.is_folder() || node.record.links() <= 1 {
        return Ok(1);
    }
    let mut count = 0;
    node.each_part(&volume.table, kind::FILE_NAME, &[], &mut |a| {
        count += u64::from(byte(a.resident().unwrap_or_default(), 0x41) != DOS);
        Ok(true)
    })?;
    Ok(count.max(1))
}

/// Whether all names of a folder are in `parent`: see [`super::super::Tree::is_parent`].
///
/// # Errors
/// `Corrupt`, or what reading the point says.
pub(super) fn is_parent(volume: &Volume, node: &Node, parent: NodeId) -> Result<bool> {
    /// Bits of a reference that are the number of a record; above them is its sequence number.
    const NUMBER_BITS: u32 = 48;
    let wanted = parent.number | (parent.tree & 0xffff) << NUMBER_BITS;
    let (mut any, mut all) = (false, true);
    node.each_part(&volume.table, kind::FILE_NAME, &[], &mut |a| {
        (any, all) = (true, a.resident().is_some_and(|value| le64(value, 0) == wanted));
        Ok(all)
    })?;
    Ok(any && all)
}

/// What WSL has noted of a file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Wsl {
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub mode: Option<u32>,
    pub device: Option<Device>,
}

impl Wsl {
    /// Reads it from the extended attributes.
    ///
    /// # Errors
    /// `Corrupt`, or what reading the point says.
    pub(super) fn of(volume: &Volume, node: &Node) -> Result<Wsl> {
        match Stream::open(&volume.table, node, kind::EA, &[])? {
            Some(stream) => Ok(Wsl::parse(&stream.read_all(MAX_EA)?)),
            None => Ok(Wsl::default()),
        }
    }

    /// From a list of names and values, each with the length to the next.
    fn parse(list: &[u8]) -> Wsl {
        let (mut found, mut at) = (Wsl::default(), 0);
        while at + 8 < list.len() {
            let name_len = usize::from(byte(list, at + 5));
            let name = part(list, at + 8, name_len);
            let value = part(list, at + 9 + name_len, usize::from(le16(list, at + 6)));
            let number = (value.len() >= 4).then(|| le32(value, 0));
            match name {
                b"$LXUID" => found.uid = number,
                b"$LXGID" => found.gid = number,
                b"$LXMOD" => found.mode = number,
                b"$LXDEV" if value.len() >= 8 => {
                    found.device = Some(Device { major: le32(value, 0), minor: le32(value, 4) });
                }
                _ => {}
            }
            match le32(list, at) as usize {
                0 => break,
                step => at = at.saturating_add(step),
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_of_windows_before_and_after_1970() {
        assert_eq!(time(0), Time { seconds: -EPOCH, nanos: 0 });
        assert_eq!(time(116_444_736_000_000_001), Time { seconds: 0, nanos: 100 });
        assert_eq!(time(116_444_735_999_999_999), Time { seconds: -1, nanos: 999_999_900 });
        // What no Windows writes ends nothing.
        assert!(time(u64::MAX).seconds < 0 && time(1 << 63).nanos < 1_000_000_000);
    }

    #[test]
    fn wsl_s_notes_are_found_among_others() {
        let entry = |name: &str, value: &[u8], last: bool| {
            let len = (9 + name.len() + value.len()).next_multiple_of(4);
            let mut raw = vec![0; len];
            raw[0] = if last { 0 } else { len as u8 };
            raw[5] = name.len() as u8;
            raw[6] = value.len() as u8;
            raw[8..8 + name.len()].copy_from_slice(name.as_bytes());
            raw[9 + name.len()..9 + name.len() + value.len()].copy_from_slice(value);
            raw
        };
        let list = [
            entry("$LXUID", &[0xe8, 3, 0, 0], false),
            entry("OTHER", b"x", false),
            entry("$LXMOD", &[0xa4, 0x81, 0, 0], false),
            entry("$LXDEV", &[8, 0, 0, 0, 1, 0, 0, 0], true),
            entry("$LXGID", &[1, 0, 0, 0], true),
        ];
        let found = Wsl::parse(&list.concat());
        assert_eq!((found.uid, found.mode, found.gid), (Some(1000), Some(0o100_644), None));
        assert_eq!(found.device, Some(Device { major: 8, minor: 1 }));
        for len in 0..list.concat().len() {
            Wsl::parse(&list.concat()[..len]);
        }
    }
}
