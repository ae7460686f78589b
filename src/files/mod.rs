//! The files inside a point: partitions, volumes, and file systems, read without root, mount or VM.
//!
//! - `bytes`, `utf16`, `crc`: numbers, names and checksums as they are on disk
//! - `blocks`: one bounded cache of blocks for all that is read here
//! - `source`: what a reader reads from: a range of a point, with that cache
//! - `findings`: what readers find odd, each once
//! - `tree`: [`Tree`], what every reader of a file system implements
//! - `runs`: reading by the map of a file; `xattrs`: extended attributes while they are collected
//! - `ext`, `xfs`, `ntfs`: the readers of ext2, ext3 and ext4, of XFS, and of NTFS
//! - `fat`, `exfat`: the readers of FAT12, FAT16, FAT32 and of exFAT; `clusters`: what they have in common
//! - `btrfs`: the reader of btrfs
//! - `probe`: what a range holds, by its content
//! - `hazard`: what a file system says that reaches beyond it, where a kernel mounts it
//! - `partition`, `lvm`: where the file systems of a disk are
//! - `volumes`: all of them together: from images of disks to named [`Volume`]s
//! - `walk`: paths in a tree; `once`: each folder of it once; `places`: where the entries of folders are
//! - `beside`: two points, of which what is the same is read once; [`compare`]: what is different in two trees
//! - [`copy`]: out of a tree, into a folder or an archive
//!
//! Nothing that is read here is to be believed: a guest wrote it. Each offset and length is checked against the
//! source before it is used; nothing recurses by what the data says; each loop over data has a bound; each list
//! that data can make long is bounded by the cache's size ([`Blocks::hold`]) or is read on in steps.

mod beside;
mod blocks;
mod btrfs;
mod bytes;
mod clusters;
pub mod compare;
pub mod copy;
mod crc;
mod exfat;
mod ext;
mod fat;
mod findings;
mod hazard;
mod lvm;
mod ntfs;
mod once;
mod partition;
mod places;
mod probe;
mod runs;
mod source;
mod tree;
mod utf16;
mod volumes;
mod walk;
mod xattrs;
mod xfs;

pub use beside::{Beside, Cached, IsSame};
pub use blocks::{Blocks, Holding};
pub use btrfs::with_id as btrfs_with_id;
pub use findings::{Findings, log_once};
pub use hazard::kernel_hazard;
pub use lvm::volumes as lvm_volumes;
pub use once::{named_twice, shared_contents};
pub use partition::{Partition, Table, TableKind, partitions};
pub use places::Places;
pub use probe::{Content, probe};
pub use source::Source;
pub use tree::{
    Attributes, Device, Entry, Flags, NodeId, NodeKind, OpenFile, Statistics, Stretch, Time, Tree,
    Xattr,
};
pub use volumes::{Volume, open_tree, volumes_of};
pub use walk::{At, Visitor, resolve, walk};
