//! What stays the same over the years: a disk, whatever folder the points of a month are in, and the VM that it is of.

use std::path::{Component, Path, PathBuf};

use super::Disk;
use crate::manifest::{Manifest, vm_name, vm_uuid};
use crate::text::to_text;

/// What is the same for all folders of one disk: `--monthly` puts the disk's folder into a new `YYYY-MM` each month.
pub(crate) fn timeline(disk: &Path) -> PathBuf {
    let is_month = |c: &Component| {
        let text = c.as_os_str().to_string_lossy();
        let b = text.as_bytes();
        b.len() == 7
            && b[4] == b'-'
            && b.iter().enumerate().all(|(i, c)| i == 4 || c.is_ascii_digit())
    };
    disk.components().filter(|c| !is_month(c)).collect()
}

/// What tells one VM from another: its UUID, its name, or the folder of its disks.
pub(super) fn vm_of(disk: &Disk, m: &Manifest) -> String {
    let folder = || {
        let timeline = timeline(&disk.path);
        timeline.parent().map(|p| to_text(p.as_os_str())).unwrap_or_default()
    };
    said_of(m).map_or_else(folder, str::to_string)
}

/// What the VM says of itself: its UUID, else its name.
pub(super) fn said_of(m: &Manifest) -> Option<&str> {
    vm_uuid(&m.vm).or(vm_name(&m.vm))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn months_are_one_timeline() {
        assert_eq!(timeline(Path::new("vm/2026-11/sda")), Path::new("vm/sda"));
        assert_eq!(timeline(Path::new("2026-1x/sda")), Path::new("2026-1x/sda"));
    }
}
