//! Access lists: XFS has them as attributes of root, Linux shows them as `system.posix_acl_*`.

use super::super::bytes::{be16, be32};

/// Names on disk, and those that getxattr(2) has.
const NAMES: [(&[u8], &[u8]); 2] = [
    (b"SGI_ACL_FILE", b"system.posix_acl_access"),
    (b"SGI_ACL_DEFAULT", b"system.posix_acl_default"),
];
/// The count, and each entry: tag, id, permissions, padding.
const HEAD: usize = 4;
const ENTRY: usize = 12;
/// Tags of entries that name a user or group.
const NAMED: [u32; 2] = [0x2, 0x8];
/// What entries without a name have for it.
const NOBODY: u32 = u32::MAX;

/// What Linux calls an attribute of root that is an access list; `None` if it is none.
pub(super) fn name(stored: &[u8]) -> Option<&'static [u8]> {
    NAMES.iter().find(|(name, _)| *name == stored).map(|(_, shown)| *shown)
}

/// The list as getxattr(2) gives it; `None` if it is none.
pub(super) fn shown(stored: &[u8]) -> Option<Vec<u8>> {
    let (list, rest) = stored.get(HEAD..)?.as_chunks::<ENTRY>();
    if !rest.is_empty() || be32(stored, 0) as usize != list.len() {
        return None;
    }
    let mut made = 2u32.to_le_bytes().to_vec();
    for entry in list {
        let tag = be32(entry, 0);
        let id = if NAMED.contains(&tag) { be32(entry, 4) } else { NOBODY };
        made.extend_from_slice(&u16::try_from(tag).ok()?.to_le_bytes());
        made.extend_from_slice(&be16(entry, 8).to_le_bytes());
        made.extend_from_slice(&id.to_le_bytes());
    }
    Some(made)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_as_linux_shows_them() {
        assert_eq!(name(b"SGI_ACL_DEFAULT").unwrap(), b"system.posix_acl_default");
        assert_eq!(name(b"SGI_ACL"), None);
        let mut stored = vec![0, 0, 0, 2];
        stored.extend([0, 0, 0, 1, 9, 9, 9, 9, 0, 6, 0, 0]);
        stored.extend([0, 0, 0, 2, 0, 0, 3, 0xe8, 0, 4, 0, 0]);
        let list = shown(&stored).unwrap();
        assert_eq!(list[..12], [2, 0, 0, 0, 1, 0, 6, 0, 255, 255, 255, 255]);
        assert_eq!(list[12..], [2, 0, 4, 0, 0xe8, 3, 0, 0]);
        assert_eq!(shown(&stored[..27]), None);
        stored[3] = 3;
        assert_eq!(shown(&stored), None);
        assert_eq!(shown(&[]), None);
    }
}
