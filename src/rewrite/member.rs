//! [`Member`]: one file of a chain.

use std::ffi::OsStr;
use std::path::PathBuf;

use crate::folder::FileId;
use crate::layer::Format;
use crate::layout::Level;

/// One file of a line.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Member {
    /// The file.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// Size in bytes of its virtual disk.
    pub size: u64,
    /// Seconds since the epoch.
    pub time: i64,
    /// The level its name says.
    pub level: Level,
    /// Which file it was when the folder was read.
    #[serde(skip)]
    pub id: FileId,
}

impl Member {
    /// Its file name.
    pub fn name(&self) -> &OsStr {
        self.path.file_name().unwrap_or_default()
    }
}
