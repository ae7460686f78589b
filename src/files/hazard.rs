//! What a file system says that reaches beyond it, where a kernel mounts it instead of a reader here.

use super::btrfs;
use super::bytes::{le32, part, until_nul};
use super::probe::Content;
use super::source::Source;
use crate::error::{Error, Kind, Result};

/// Where ext has its superblock, and its length.
const EXT: (u64, usize) = (1024, 1024);
const EXT_HAS_JOURNAL: u32 = 0x4;

/// Why the kernel must not be given this file system, if it must not: its journal or a part of it is on another
/// device, which the kernel would look for among the host's; or it brings mount options of its own.
///
/// # Errors
/// What reading the point says.
pub fn kernel_hazard(content: &Content, source: &Source) -> Result<Option<Error>> {
    match content {
        Content::Ext => ext(source),
        Content::Btrfs => btrfs::check_alone(source),
        _ => Ok(None),
    }
}

fn ext(source: &Source) -> Result<Option<Error>> {
    let raw = source.meta(EXT.0, EXT.1)?;
    let refused = |what: &str| {
        let remedy = "'fleecefs files' reads it, and takes neither from there";
        source.error(Kind::Unsupported, what, EXT.0).remedy(remedy)
    };
    let (journal, device) = (le32(&raw, 0xe0), le32(&raw, 0xe4));
    let outside = le32(&raw, 0x5c) & EXT_HAS_JOURNAL > 0 && journal == 0;
    Ok(match () {
        () if outside || device != 0 => Some(refused("the journal is on another device")),
        () if !until_nul(part(&raw, 0x200, 64)).is_empty() => {
            Some(refused("the superblock has mount options of its own"))
        }
        () => None,
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::blocks::Blocks;
    use super::*;
    use crate::storage::MemStorage;

    #[test]
    fn a_journal_elsewhere_and_options_of_its_own_keep_ext_from_the_kernel() {
        let hazard = |set: &[(usize, u8)]| {
            let mut bytes = vec![0; 8192];
            set.iter().for_each(|(at, value)| bytes[1024 + at] = *value);
            let disk = Arc::new(MemStorage::new("d", bytes));
            let source = Source::new(disk, "d", &Blocks::new(1 << 20));
            kernel_hazard(&Content::Ext, &source).unwrap().map(|e| e.message().to_string())
        };
        assert_eq!(hazard(&[]), None);
        assert_eq!(hazard(&[(0x5c, 4), (0xe0, 8)]), None);
        assert!(hazard(&[(0x5c, 4)]).unwrap().contains("journal"));
        assert!(hazard(&[(0x5c, 4), (0xe0, 8), (0xe4, 1)]).unwrap().contains("journal"));
        assert!(hazard(&[(0x200, b'j')]).unwrap().contains("options"));
    }
}
