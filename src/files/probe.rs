//! What a range holds, by its content.

use super::bytes::{be16, byte, le16, le32, part};
use super::source::Source;
use crate::error::Result;

/// What a partition or volume holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// ext2, ext3 or ext4.
    Ext,
    /// XFS.
    Xfs,
    /// NTFS.
    Ntfs,
    /// FAT12, FAT16 or FAT32.
    Fat,
    /// exFAT.
    Exfat,
    /// btrfs.
    Btrfs,
    /// A physical volume of LVM2.
    LvmPv,
    /// Something with a name that has no files to read, or is not read, and what to do about it.
    Other {
        /// `swap`, `LUKS2`, `BitLocker`.
        name: &'static str,
        /// How to get at what is inside, where there is something.
        remedy: Option<&'static str>,
        /// Whether it is encrypted.
        encrypted: bool,
    },
    /// Nothing that is known.
    Unknown,
}

impl Content {
    /// What people call it.
    pub fn name(&self) -> &'static str {
        match self {
            Content::Ext => "ext4",
            Content::Xfs => "xfs",
            Content::Ntfs => "ntfs",
            Content::Fat => "fat",
            Content::Exfat => "exfat",
            Content::Btrfs => "btrfs",
            Content::LvmPv => "LVM",
            Content::Other { name, .. } => name,
            Content::Unknown => "unknown",
        }
    }

    /// Whether a reader is there for it.
    pub fn has_files(&self) -> bool {
        match self {
            Content::Ext
            | Content::Xfs
            | Content::Ntfs
            | Content::Fat
            | Content::Exfat
            | Content::Btrfs => true,
            Content::LvmPv | Content::Other { .. } | Content::Unknown => false,
        }
    }
}

/// What all but btrfs and swap on large pages is told by.
const START: usize = 64 << 10;

const LUKS: &str = "'fleecefs attach --key-file' opens it; by hand: mount the backups; \
    'losetup -r -P -f --show POINT.raw' makes a device of the point; then 'cryptsetup open --readonly /dev/loopNpM \
    NAME', and mount /dev/mapper/NAME";
const BITLOCKER: &str = "'fleecefs attach --key-file' opens it; by hand: mount the backups; \
    'losetup -r -P -f --show POINT.raw' makes a device of the point; then 'cryptsetup open --type bitlk --readonly \
    /dev/loopNpM NAME', and mount /dev/mapper/NAME";
const RAID: &str = "'fleecefs attach --run --no-replay' makes devices of all its disks; then 'mdadm --assemble \
    --readonly'";
const LOOP: &str = "'fleecefs attach --no-replay' makes a device of it; then mount that read-only";

/// Says what `source` holds.
///
/// # Errors
/// What reading the point says.
pub fn probe(source: &Source) -> Result<Content> {
    let len = usize::try_from(source.size()).unwrap_or(START).min(START);
    let start = source.meta(0, len)?;
    let known = by_start(&start).map(Ok);
    known.or_else(|| further(source).transpose()).unwrap_or(Ok(Content::Unknown))
}

fn by_start(start: &[u8]) -> Option<Content> {
    let is = |at: usize, magic: &[u8]| part(start, at, magic.len()) == magic;
    Some(match () {
        () if is(0, b"LUKS\xba\xbe") => {
            let name = if be16(start, 6) == 1 { "LUKS1" } else { "LUKS2" };
            Content::Other { name, remedy: Some(LUKS), encrypted: true }
        }
        () if is(3, b"-FVE-FS-") => {
            Content::Other { name: "BitLocker", remedy: Some(BITLOCKER), encrypted: true }
        }
        () if (0..4).any(|s| is(s * 512, b"LABELONE") && is(s * 512 + 24, b"LVM2 001")) => {
            Content::LvmPv
        }
        () if is_swap(start) => Content::Other { name: "swap", remedy: None, encrypted: false },
        () if [0, 4096].iter().any(|at| le32(start, *at) == 0xa92b_4efc) => {
            Content::Other { name: "Linux RAID", remedy: Some(RAID), encrypted: false }
        }
        () if le16(start, 0x438) == 0xef53 && le32(start, 0x418) <= 6 => Content::Ext,
        () if is(0, b"XFSB") => Content::Xfs,
        () if is(3, b"NTFS    ") => Content::Ntfs,
        () if is(3, b"EXFAT   ") => Content::Exfat,
        () => return other(start),
    })
}

/// The name at the end of the first page, whatever its size.
fn is_swap(start: &[u8]) -> bool {
    let names: [&[u8]; 2] = [b"SWAPSPACE2", b"SWAP-SPACE"];
    let pages = [4096, 8192, 16384, 32768, 65536];
    pages.iter().any(|page| names.contains(&part(start, page - 10, 10)))
}

/// A file system that has no reader here.
fn unread(name: &'static str) -> Content {
    Content::Other { name, remedy: Some(LOOP), encrypted: false }
}

/// File systems that have no reader, and FAT, which has no magic number.
fn other(start: &[u8]) -> Option<Content> {
    let is = |at: usize, magic: &[u8]| part(start, at, magic.len()) == magic;
    let known: [(usize, &[u8], &'static str); 8] = [
        (1024, b"\x10\x20\xf5\xf2", "F2FS"),
        (1024, b"\xe2\xe1\xf5\xe0", "EROFS"),
        (0, b"hsqs", "squashfs"),
        (32769, b"CD001", "ISO 9660"),
        (32, b"NXSB", "APFS"),
        (1024, b"H+", "HFS+"),
        (1024, b"HX", "HFS+"),
        (3, b"ReFS", "ReFS"),
    ];
    let named = known.iter().find(|(at, magic, _)| is(*at, magic)).map(|(_, _, name)| *name);
    if let Some(name) = named {
        return Some(unread(name));
    }
    is_fat(start).then_some(Content::Fat)
}

/// Whether this is a boot sector of FAT: each of its numbers is one that can be.
pub(super) fn is_fat(start: &[u8]) -> bool {
    let (sector, cluster) = (le16(start, 11), byte(start, 13));
    le16(start, 510) == 0xaa55
        && [0xeb, 0xe9].contains(&byte(start, 0))
        && (512..=4096).contains(&sector)
        && sector.is_power_of_two()
        && cluster.is_power_of_two()
        && le16(start, 14) > 0
        && [1, 2].contains(&byte(start, 16))
        && (byte(start, 21) >= 0xf8 || byte(start, 21) == 0xf0)
        && (le16(start, 19) > 0 || le32(start, 32) > 0)
}

/// What is told by something behind the start.
fn further(source: &Source) -> Result<Option<Content>> {
    /// btrfs's superblock, and its magic number in it.
    const BTRFS: (u64, &[u8]) = (0x1_0040, b"_BHRfS_M");
    if source.check(BTRFS.0, 8).is_ok() && source.meta(BTRFS.0, 8)? == BTRFS.1 {
        return Ok(Some(Content::Btrfs));
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::blocks::Blocks;
    use super::*;
    use crate::storage::MemStorage;

    fn probed(set: &[(usize, &[u8])]) -> &'static str {
        let mut bytes = vec![0; 128 << 10];
        for (at, value) in set {
            bytes[*at..at + value.len()].copy_from_slice(value);
        }
        let disk = Arc::new(MemStorage::new("d", bytes));
        probe(&Source::new(disk, "d", &Blocks::new(1 << 20))).unwrap().name()
    }

    #[test]
    fn contents_have_names() {
        assert_eq!(probed(&[]), "unknown");
        assert_eq!(probed(&[(0x438, b"\x53\xef")]), "ext4");
        assert_eq!(probed(&[(0, b"XFSB")]), "xfs");
        assert_eq!(probed(&[(3, b"NTFS    ")]), "ntfs");
        assert_eq!(probed(&[(0x10040, b"_BHRfS_M")]), "btrfs");
        assert_eq!(probed(&[(0, b"LUKS\xba\xbe\0\x02")]), "LUKS2");
        assert_eq!(probed(&[(3, b"-FVE-FS-")]), "BitLocker");
        assert_eq!(probed(&[(4086, b"SWAPSPACE2")]), "swap");
        assert_eq!(probed(&[(512, b"LABELONE"), (536, b"LVM2 001")]), "LVM");
        let boot: &[u8] = b"\xeb\x3c\x90mkfs.fat\0\x02\x04\x04\0\x02\0\x02\0\x10\xf8\x10\0";
        assert_eq!(probed(&[(0, boot), (510, b"\x55\xaa")]), "fat");
        // A boot sector of a partitioned disk is none.
        assert_eq!(probed(&[(0, b"\xeb\x63\x90"), (510, b"\x55\xaa")]), "unknown");
    }

    #[test]
    fn a_disk_of_no_bytes_is_nothing() {
        let disk = Arc::new(MemStorage::new("d", Vec::new()));
        assert_eq!(
            probe(&Source::new(disk, "d", &Blocks::new(1 << 20))).unwrap(),
            Content::Unknown
        );
    }
}
