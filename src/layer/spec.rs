//! What is known of a file before it is opened as a layer, and what it takes to open it.

use std::sync::Arc;

use crate::error::Finding;
use crate::storage::SourceFile;

/// File formats that are recognised by their contents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// QEMU's copy-on-write format, version 2 or 3.
    Qcow2,
    /// The guest's bytes, one to one.
    Raw,
    /// A Proxmox archive, compressed or not; its disks are [`LayerPart::Device`]s.
    Vma,
    /// virtnbdbackup's stream of data and zero ranges.
    SparseStream,
}

/// What [`super::probe`] finds out about a file without opening another.
#[derive(Debug, Clone)]
pub struct ImageInfo {
    /// The file's format.
    pub format: Format,
    /// Size in bytes of the virtual disk.
    pub virtual_size: u64,
    /// The backing file's name exactly as the image has it; never opened as such.
    pub backing_file: Option<String>,
    /// The backing file's format as the image has it.
    pub backing_format: Option<String>,
    /// The external data file's name exactly as the image has it (qcow2 header extension
    /// 0x44415441). `Some("")` if the feature bit is set and no name is given.
    pub data_file: Option<String>,
    /// Internal snapshots, in table order.
    pub snapshots: Vec<SnapshotInfo>,
    /// Cluster size in bytes; 0 where the format has none.
    pub cluster_size: u32,
    /// qcow2 version 2 or 3; 0 for other formats.
    pub version: u32,
    /// Whether QEMU marked the image as corrupt.
    pub marked_corrupt: bool,
    /// Odd things that do not stop reading (dirty flag, unknown autoclear bits).
    pub findings: Vec<Finding>,
}

/// An internal snapshot of a qcow2 image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Id string, which should be unique; at most 255 bytes of it.
    pub id: String,
    /// Name, as `qemu-img snapshot -l` shows it; at most 255 bytes of it.
    pub name: String,
    /// Seconds since the epoch when it was taken.
    pub time: u64,
    /// Size in bytes of the virtual disk in this snapshot.
    pub virtual_size: u64,
    /// Why it cannot be opened, if it cannot.
    pub unusable: Option<Finding>,
}

/// Which part of a file is a layer.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub enum LayerPart {
    /// All of it (of a qcow2: the active state).
    #[default]
    Whole,
    /// The internal snapshot at this place of the table: ids need not be unique.
    Snapshot(u32),
    /// The device with this number, of an archive that holds several.
    Device(u8),
}

/// Everything that is needed to open a layer.
#[derive(Debug, Clone)]
pub struct LayerSpec {
    /// The file, as the scan saw it.
    pub file: Arc<SourceFile>,
    /// Its format, as [`super::probe`] found it.
    pub format: Format,
    /// Which part of it.
    pub part: LayerPart,
    /// The external data file, resolved inside the backup directory by the caller.
    pub data_file: Option<Arc<SourceFile>>,
}
