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

#[cfg(test)]
mod tests {
    use super::super::header::le_checksum;
    use super::super::made::{FILE, Made, OWNER, Parts, inode, raw_inode};
    use super::*;

    /// An inode of version 3 with some of its bytes changed.
    fn changed(parts: Parts<'_>, changes: &[(usize, &[u8])]) -> Inode {
        let mut raw = raw_inode(true, OWNER, parts);
        for (at, bytes) in changes {
            raw[*at..at + bytes.len()].copy_from_slice(bytes);
        }
        let crc = le_checksum(&raw, 100);
        raw[100..104].copy_from_slice(&crc.to_le_bytes());
        Inode::new(OWNER, 0, raw)
    }

    #[test]
    fn times_are_before_and_after_what_32_bits_have() {
        let sup = Made::new(true).volume().sup;
        let time = |parts: &[(usize, &[u8])]| changed(FILE, parts).attributes(&sup).unwrap().mtime;
        assert_eq!(time(&[(40, &[0xff; 4]), (44, &[0, 0, 0, 7])]), Time { seconds: -1, nanos: 7 });
        let big: (usize, &[u8]) = (127, &[0x8]);
        let at = |seconds: i64, nanos: u64| {
            let all = (seconds + (1 << 31)) as u64 * 1_000_000_000 + nanos;
            time(&[big, (40, &all.to_be_bytes())])
        };
        assert_eq!(at(-(1 << 31), 1), Time { seconds: -(1 << 31), nanos: 1 });
        assert_eq!(
            at(9_000_000_000, 999_999_999),
            Time { seconds: 9_000_000_000, nanos: 999_999_999 }
        );
        let last = time(&[big, (40, &[0xff; 8])]);
        assert!(last.seconds > 9_000_000_000 && last.nanos < 1_000_000_000);
    }

    #[test]
    fn counts_are_where_the_inode_says() {
        let parts = Parts { extents: [3, 4], attributes: &[1; 16], ..FILE };
        let counts = |i: &Inode| (i.data().unwrap().extents, i.attributes_fork().unwrap().extents);
        assert_eq!(counts(&changed(parts, &[])), (3, 4));
        let wide: [(usize, &[u8]); 3] =
            [(127, &[0x10]), (24, &[0, 1, 0, 0, 0, 0, 0, 0]), (76, &[0, 2, 0, 0])];
        assert_eq!(counts(&changed(parts, &wide)), (1 << 48, 1 << 17));
        assert_eq!(changed(FILE, &[]).attributes_fork().map(|f| f.extents), None);
        // A fork that would begin behind the end is empty.
        assert!(changed(parts, &[(82, &[0xff])]).attributes_fork().is_none());
        assert!(changed(parts, &[(5, &[4])]).data().is_none());
    }

    #[test]
    fn what_an_inode_is_follows_from_its_fields() {
        let sup = Made::new(true).volume().sup;
        let node =
            Parts { mode: 0o020_600, forms: [0, 2], data: &[0, 0x4b, 1, 0x11], size: 0, ..FILE };
        let device = inode(true, node).attributes(&sup).unwrap();
        assert_eq!(device.device, Some(Device { major: 18, minor: 0x3_0111 }));
        let file =
            changed(FILE, &[(91, &[0x18]), (64, &[0, 0, 0, 0, 0, 0, 0, 9]), (8, &[0, 1, 0, 0])]);
        let file = file.attributes(&sup).unwrap();
        assert!(file.flags.immutable && file.flags.append_only && file.crtime.is_some());
        assert_eq!((file.allocated, file.uid, file.links, file.device), (9216, 65536, 1, None));
        assert!(changed(FILE, &[(91, &[1])]).is_realtime());
        // Version 1 has its links elsewhere, and no times of birth.
        let mut raw = raw_inode(false, OWNER, FILE);
        raw[4] = 1;
        raw[6..8].copy_from_slice(&[1, 2]);
        let old = Inode::new(OWNER, 0, raw).attributes(&Made::new(false).volume().sup).unwrap();
        assert_eq!((old.links, old.crtime), (258, None));
    }

    #[test]
    fn what_is_wrong_is_told() {
        let (new, old) = (Made::new(true).volume().sup, Made::new(false).volume().sup);
        let wrong = |changes: &[(usize, &[u8])]| changed(FILE, changes).wrong(&new);
        assert_eq!(wrong(&[]), None);
        assert_eq!(wrong(&[(0, b"XX")]), Some("is no inode"));
        assert_eq!(wrong(&[(4, &[2])]), Some("has an invalid version"));
        assert_eq!(wrong(&[(160, &[1])]), Some("has another file system's UUID"));
        assert_eq!(wrong(&[(152, &[1])]), Some("has another inode's number"));
        let mut raw = raw_inode(true, OWNER, FILE);
        raw[300] ^= 1;
        assert_eq!(Inode::new(OWNER, 0, raw).wrong(&new), Some("has a bad checksum"));
        assert_eq!(inode(false, FILE).wrong(&old), None);
        assert_eq!(changed(FILE, &[]).wrong(&old), Some("has an invalid version"));
    }
}
