//! The shape of a qcow2 file that is written.

use crate::error::{Error, Kind, Result};

/// How clusters are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Compression {
    /// No compression.
    #[default]
    None,
    /// Deflate; every QEMU reads it.
    Zlib,
    /// Zstandard; QEMU 5.1 and later read it.
    Zstd,
}

/// What is set aside for clusters that hold nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Preallocation {
    /// Nothing is set aside.
    #[default]
    Off,
    /// A place in the file, which stays sparse.
    Metadata,
    /// A place in the file and on the disk.
    Falloc,
    /// The same, with zeros written.
    Full,
}

/// The shape of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub(crate) struct Qcow2Options {
    /// Bytes per cluster: a power of two from 512 to 2 MiB.
    pub cluster_size: u32,
    /// Compression.
    pub compression: Compression,
    /// Preallocation.
    pub preallocation: Preallocation,
}

impl Default for Qcow2Options {
    fn default() -> Self {
        // QEMU's own default.
        let (compression, preallocation) = Default::default();
        Qcow2Options { cluster_size: 64 << 10, compression, preallocation }
    }
}

/// The largest L1 table that QEMU opens, in entries (32 MiB).
const MAX_L1: u64 = 4 << 20;

impl Qcow2Options {
    /// Fails if QEMU would not take a file of this shape.
    ///
    /// # Errors
    /// `Usage`.
    pub(crate) fn check(&self, size: u64) -> Result<()> {
        let usage = |text: &str| Err(Error::new(Kind::Usage, text));
        if !self.cluster_size.is_power_of_two() || !(512..=2 << 20).contains(&self.cluster_size) {
            return usage("the cluster size must be a power of two from 512 to 2M");
        }
        if self.compression != Compression::None && self.preallocation != Preallocation::Off {
            return usage("a compressed file cannot be preallocated");
        }
        if self.l1_entries(size) > MAX_L1 {
            return usage(
                "the cluster size is too small for a disk of this size; use a larger one",
            );
        }
        Ok(())
    }

    /// Guest bytes that one L2 table describes.
    pub(crate) fn l2_coverage(&self) -> u64 {
        u64::from(self.cluster_size) * u64::from(self.cluster_size / 8)
    }

    pub(crate) fn l1_entries(&self, size: u64) -> u64 {
        // One at least: a cluster is set aside for the table, and something must refer to it.
        size.div_ceil(self.l2_coverage()).max(1)
    }
}
