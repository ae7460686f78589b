//! btrfs.

use std::sync::Arc;

use super::source::Source;
use super::tree::Tree;
use crate::error::{Kind, Result};

/// Opens the file system in `source`.
///
/// # Errors
/// `Unsupported` for an unknown incompatible feature; `Corrupt`, or what reading the point says.
pub(super) fn open(source: Source) -> Result<Arc<dyn Tree>> {
    Err(source.error(Kind::Unsupported, "btrfs is not read yet", 0))
}
