//! Inodes: their fields, and their two forks: where data and attributes are.

use super::super::bytes::{be16, be32, be64, byte, part};
use super::super::tree::{Attributes, Device, Flags, NodeKind, Time};
use super::header::checksum_is_right;
use super::superblock::Super;

/// Bytes of the fields of versions 1 and 2, and of version 3; the forks are behind them.
const OLD_LEN: usize = 100;
const LEN: usize = 176;
/// Where version 3 has its checksum.
const CRC_AT: usize = 100;

/// Flags of `di_flags`.
mod flags {
    pub(super) const REALTIME: u16 = 0x1;
    pub(super) const IMMUTABLE: u16 = 0x8;
    pub(super) const APPEND: u16 = 0x10;
}

/// Flags of `di_flags2`, which version 3 has.
mod flags2 {
    pub(super) const BIGTIME: u64 = 0x8;
    pub(super) const NREXT64: u64 = 0x10;
    /// Kept by the file system for itself.
    pub(super) const METADATA: u64 = 0x20;
}

/// How a fork has what it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// The numbers of a device.
    Device,
    /// The bytes themselves.
    Local,
    /// A list of extents.
    Extents,
    /// The root of a tree of extents.
    Tree,
}

/// One of the two forks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fork<'a> {
    pub form: Form,
    /// All its bytes in the inode.
    pub bytes: &'a [u8],
    /// How many extents it says that it has.
    pub extents: u64,
}

/// An inode as it is on disk.
#[derive(Debug, Clone)]
pub(super) struct Inode {
    /// Its number.
    pub number: u64,
    /// Where it is, for messages.
    pub at: u64,
    raw: Vec<u8>,
}

impl Inode {
    /// Takes its bytes, all of them.
    pub(super) fn new(number: u64, at: u64, raw: Vec<u8>) -> Inode {
        Inode { number, at, raw }
    }

    /// Whether it is in use: one that is free has no mode.
    pub(super) fn is_used(&self) -> bool {
        self.mode() != 0 && self.links() != 0 && self.flags2() & flags2::METADATA == 0
    }

    /// What is wrong with it: its own fields that say what it is; `None` if they are right.
    pub(super) fn wrong(&self, sup: &Super) -> Option<&'static str> {
        let raw = &self.raw;
        match (sup.v5, self.version()) {
            _ if be16(raw, 0) != 0x494e => Some("is no inode"),
            (true, 3) if !checksum_is_right(raw, CRC_AT) => Some("has a bad checksum"),
            (true, 3) if part(raw, 160, 16) != sup.meta_uuid => {
                Some("has another file system's UUID")
            }
            (true, 3) if be64(raw, 152) != self.number => Some("has another inode's number"),
            (true, 3) | (false, 1 | 2) => None,
            _ => Some("has an invalid version"),
        }
    }

    fn version(&self) -> u8 {
        byte(&self.raw, 4)
    }

    /// The whole mode.
    pub(super) fn mode(&self) -> u32 {
        u32::from(be16(&self.raw, 2))
    }

    /// What it is.
    pub(super) fn kind(&self) -> Option<NodeKind> {
        NodeKind::of_mode(self.mode())
    }

    /// How many names it has.
    pub(super) fn links(&self) -> u32 {
        match self.version() {
            1 => u32::from(be16(&self.raw, 6)),
            _ => be32(&self.raw, 16),
        }
    }

    /// Length in bytes; no more than a file can have.
    pub(super) fn size(&self) -> u64 {
        be64(&self.raw, 56)
    }

    /// Whether its contents are on the realtime device.
    pub(super) fn is_realtime(&self) -> bool {
        be16(&self.raw, 90) & flags::REALTIME != 0 && self.kind() == Some(NodeKind::File)
    }

    fn flags2(&self) -> u64 {
        if self.version() >= 3 { be64(&self.raw, 120) } else { 0 }
    }

    /// The bytes behind the fields: of data, and of attributes.
    fn forks(&self) -> (&[u8], &[u8]) {
        let begin = if self.version() >= 3 { LEN } else { OLD_LEN };
        let all = part(&self.raw, begin, self.raw.len());
        match 8 * usize::from(byte(&self.raw, 82)) {
            0 => (all, &[]),
            at => all.split_at(at.min(all.len())),
        }
    }

    /// Where its contents are; `None` if the form is none that can be.
    pub(super) fn data(&self) -> Option<Fork<'_>> {
        let wide = self.flags2() & flags2::NREXT64 != 0;
        let extents = if wide { be64(&self.raw, 24) } else { u64::from(be32(&self.raw, 76)) };
        Some(Fork { form: form(byte(&self.raw, 5))?, bytes: self.forks().0, extents })
    }

    /// Where its attributes are; `None` if it has none, or the form is none that can be.
    pub(super) fn attributes_fork(&self) -> Option<Fork<'_>> {
        let wide = self.flags2() & flags2::NREXT64 != 0;
        let count = if wide { be32(&self.raw, 76) } else { u32::from(be16(&self.raw, 80)) };
        let bytes = self.forks().1;
        let form = form(byte(&self.raw, 83)).filter(|_| !bytes.is_empty())?;
        Some(Fork { form, bytes, extents: u64::from(count) })
    }

    fn time(&self, at: usize) -> Time {
        /// What the seconds of bigtime count from: 2^31 before the epoch.
        const BIG_ZERO: i64 = 1 << 31;
        const NANOS: u64 = 1_000_000_000;
        if self.flags2() & flags2::BIGTIME != 0 {
            let all = be64(&self.raw, at);
            let seconds = (all / NANOS).cast_signed() - BIG_ZERO;
            return Time { seconds, nanos: (all % NANOS) as u32 };
        }
        let seconds = i64::from(be32(&self.raw, at).cast_signed());
        Time { seconds, nanos: be32(&self.raw, at + 4).min(999_999_999) }
    }

    /// All that it says; `None` if it is nothing that can be.
    pub(super) fn attributes(&self, sup: &Super) -> Option<Attributes> {
        let kind = self.kind()?;
        let raw = &self.raw;
        let device = self.data().filter(|f| f.form == Form::Device).map(|f| be32(f.bytes, 0));
        let is_device = matches!(kind, NodeKind::CharDevice | NodeKind::BlockDevice);
        let has = |flag| be16(raw, 90) & flag != 0;
        Some(Attributes {
            kind,
            size: self.size(),
            allocated: be64(raw, 64).saturating_mul(sup.block_size()),
            mode: self.mode() & 0o7777,
            uid: be32(raw, 8),
            gid: be32(raw, 12),
            links: u64::from(self.links()),
            atime: self.time(32),
            mtime: self.time(40),
            ctime: self.time(48),
            crtime: (self.version() >= 3).then(|| self.time(144)),
            device: device
                .filter(|_| is_device)
                .map(|d| Device { major: d >> 18, minor: d & 0x3_ffff }),
            flags: Flags {
                immutable: has(flags::IMMUTABLE),
                append_only: has(flags::APPEND),
                ..Flags::default()
            },
        })
    }
}

fn form(number: u8) -> Option<Form> {
    Some(match number {
        0 => Form::Device,
        1 => Form::Local,
        2 => Form::Extents,
        3 => Form::Tree,
        _ => return None,
    })
}
