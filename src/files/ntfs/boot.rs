//! The boot sector: sizes, and where the master file table begins.

use super::super::bytes::{byte, le16, le64, part};
use super::super::source::Source;
use crate::error::{Kind, Result};

/// Bytes that are looked at.
const LEN: usize = 512;
/// Clusters are at most 2 MiB: Windows formats no larger ones.
const MAX_CLUSTER: u64 = 2 << 20;
/// Records and index blocks: 1 and 4 KiB as Windows makes them.
const MAX_RECORD: u64 = 64 << 10;
/// What update sequence arrays protect, whatever the sector size.
pub(super) const STRIDE: usize = 512;

/// What is needed of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Boot {
    /// Bytes of a sector.
    pub sector: u64,
    /// Bytes of a cluster.
    pub cluster: u64,
    /// Whole clusters of the volume.
    pub clusters: u64,
    /// Bytes of a record of the master file table.
    pub record: usize,
    /// Bytes of an index block, for folders that do not say it.
    pub index: usize,
    /// The cluster with which the master file table begins.
    pub mft: u64,
    /// And the one with which the copy of its first records begins.
    pub mirror: u64,
    /// The serial number.
    pub serial: u64,
}

impl Boot {
    /// Reads and checks it.
    ///
    /// # Errors
    /// `Corrupt`, or what reading the point says.
    pub(super) fn read(source: &Source) -> Result<Boot> {
        let raw = source.meta(0, LEN)?;
        Boot::parse(&raw).map_err(|what| source.error(Kind::Corrupt, what, 0))
    }

    /// The copy in the sector behind the volume, which is the last of its partition, and where it is.
    pub(super) fn copy(source: &Source) -> Option<(u64, Boot)> {
        let size = source.size();
        let first = source.meta(0, LEN).ok()?;
        let noted = le64(&first, 0x28).checked_mul(u64::from(le16(&first, 0x0b)));
        let last = [512, 1024, 2048, 4096]
            .map(|sector| (size / sector).checked_sub(1).map(|n| n * sector));
        noted.into_iter().chain(last.into_iter().flatten()).find_map(|at| {
            source.check(at, LEN as u64).ok().filter(|()| at > 0)?;
            let raw = source.meta(at, LEN).ok()?;
            let boot = Boot::parse(&raw).ok()?;
            // It is there where the volume ends.
            (le64(&raw, 0x28).checked_mul(boot.sector) == Some(at)).then_some((at, boot))
        })
    }

    fn parse(raw: &[u8]) -> Result<Boot, &'static str> {
        if part(raw, 3, 8) != b"NTFS    " {
            return Err("no NTFS boot sector");
        }
        let sector = u64::from(le16(raw, 0x0b));
        if !(512..=4096).contains(&sector) || !sector.is_power_of_two() {
            return Err("invalid sector size in the boot sector");
        }
        // From 0xf4 on it is the negative power of two: clusters of more than 128 sectors.
        let per_cluster = match byte(raw, 0x0d) {
            n @ 0xf4..=0xff => 1 << (256 - u64::from(n)),
            n => u64::from(n),
        };
        let cluster = sector * per_cluster;
        if !per_cluster.is_power_of_two() || cluster > MAX_CLUSTER {
            return Err("invalid cluster size in the boot sector");
        }
        let clusters = le64(raw, 0x28) / per_cluster;
        if clusters == 0 || clusters.checked_mul(cluster).is_none_or(|n| n > i64::MAX as u64) {
            return Err("invalid number of sectors in the boot sector");
        }
        let record = size(byte(raw, 0x40), cluster).ok_or("invalid MFT record size")?;
        let index = size(byte(raw, 0x44), cluster).ok_or("invalid index block size")?;
        let (mft, mirror) = (le64(raw, 0x30), le64(raw, 0x38));
        if mft >= clusters {
            return Err("the MFT begins beyond the end of the volume");
        }
        let serial = le64(raw, 0x48);
        Ok(Boot { sector, cluster, clusters, record, index, mft, mirror, serial })
    }

    /// Bytes of the whole volume.
    pub(super) fn total(&self) -> u64 {
        self.clusters.saturating_mul(self.cluster)
    }
}

/// A size in clusters, or as the negative power of two in bytes.
fn size(stored: u8, cluster: u64) -> Option<usize> {
    let bytes = match stored.cast_signed() {
        n @ 1.. => u64::from(n.unsigned_abs()) * cluster,
        n => 1u64.checked_shl(u32::from(n.unsigned_abs()))?,
    };
    is_block(bytes).then_some(bytes as usize)
}

/// Whether a record or index block may have this size.
pub(super) fn is_block(bytes: u64) -> bool {
    bytes.is_power_of_two() && (STRIDE as u64..=MAX_RECORD).contains(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A boot sector of 512-byte sectors, `per` of them to a cluster.
    fn sector(per: u8, record: u8) -> Vec<u8> {
        let mut raw = vec![0; 512];
        raw[3..11].copy_from_slice(b"NTFS    ");
        raw[0x0b..0x0d].copy_from_slice(&512u16.to_le_bytes());
        raw[0x0d] = per;
        raw[0x28..0x30].copy_from_slice(&100_000u64.to_le_bytes());
        raw[0x30] = 4;
        raw[0x40] = record;
        raw[0x44] = 0xf4;
        raw
    }

    #[test]
    fn sizes_are_numbers_or_powers() {
        let boot = Boot::parse(&sector(8, 0xf6)).unwrap();
        assert_eq!((boot.cluster, boot.record, boot.index), (4096, 1024, 4096));
        assert_eq!(boot.clusters, 12_500);
        assert_eq!(Boot::parse(&sector(1, 2)).unwrap().record, 1024);
        // 2^12 sectors are 2 MiB.
        assert_eq!(Boot::parse(&sector(0xf4, 0xf6)).unwrap().cluster, 2 << 20);
        assert_eq!(Boot::parse(&sector(0xf8, 0xf6)).unwrap().cluster, 128 << 10);
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for (per, record) in [(0, 0xf6), (3, 0xf6), (0xf3, 0xf6), (8, 0), (8, 0x80), (8, 0xee)] {
            assert!(Boot::parse(&sector(per, record)).is_err(), "{per} {record}");
        }
        let mut raw = sector(8, 0xf6);
        raw[0x30..0x38].copy_from_slice(&12_500u64.to_le_bytes());
        assert!(Boot::parse(&raw).is_err());
        raw[0x28..0x30].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(Boot::parse(&raw).is_err());
    }
}
