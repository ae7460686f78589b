//! What `qemu-img info --output=json` said of a disk, as other programs keep it beside backups.

use crate::storage::{ReadAt, SourceFile};

/// The part that is needed here.
#[derive(Debug, serde::Deserialize)]
pub(in crate::chain) struct DiskInfo {
    /// The disk's format.
    pub format: Option<String>,
    /// Its size in bytes.
    #[serde(rename = "virtual-size")]
    pub virtual_size: Option<u64>,
}

/// `qemu-img info` says a few KiB; with many snapshots, more.
const LARGEST: u64 = 4 << 20;

/// Reads such a file; `None` if it is none. By a descriptor that is not kept.
pub(in crate::chain) fn read(file: &SourceFile) -> Option<DiskInfo> {
    let file = SourceFile::with_identity(file.path().into(), file.identity());
    if file.len() > LARGEST {
        return None;
    }
    let mut text = vec![0; usize::try_from(file.len()).ok()?];
    file.read_exact_at(&mut text, 0).ok()?;
    serde_json::from_slice(&text).ok()
}
