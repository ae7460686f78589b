//! $LogFile: whether the volume was closed cleanly. Its records are not replayed: what they mean is not published.
//!
//! It begins with two restart pages, each with the state of the log; the one written last counts.

use super::super::bytes::{le16, le32, le64, part};
use super::fixup;

/// Bytes of a restart page: a page of memory.
pub(super) const PAGE: usize = 4096;
/// No client.
const NONE: u16 = 0xffff;
/// The volume is clean, whatever the clients say.
const CLEAN: u16 = 2;

/// What the log says of the volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Clean,
    /// It was in use: what the log has is not yet where it belongs.
    Dirty,
    /// It cannot be told.
    Unknown,
}

/// Reads the first two pages of the log.
pub(super) fn state(pages: &[u8]) -> State {
    // Nothing has been written since it was made, or emptied by ntfs-3g.
    if !pages.is_empty() && pages.iter().all(|b| *b == 0xff) {
        return State::Clean;
    }
    let found = pages.chunks_exact(PAGE).filter_map(page);
    found.max_by_key(|(lsn, _)| *lsn).map_or(State::Unknown, |(_, state)| state)
}

/// The number of the last record and the state, by one page.
fn page(bytes: &[u8]) -> Option<(u64, State)> {
    let mut bytes = bytes.to_vec();
    // After chkdsk.
    let magic = if part(&bytes, 0, 4) == b"CHKD" { b"CHKD" } else { b"RSTR" };
    fixup::apply(&mut bytes, magic).ok()?;
    let area = usize::from(le16(&bytes, 0x18));
    if area + 0x30 > bytes.len() || le32(&bytes, 0x10) < PAGE as u32 {
        return None;
    }
    let (users, flags) = (le16(&bytes, area + 0xc), le16(&bytes, area + 0xe));
    let clean = users == NONE || flags & CLEAN != 0;
    Some((le64(&bytes, area), if clean { State::Clean } else { State::Dirty }))
}

#[cfg(test)]
mod tests {
    use super::super::fixup::protect;
    use super::*;

    fn page(lsn: u8, users: u16, flags: u16) -> Vec<u8> {
        let mut bytes = vec![0; PAGE];
        bytes[0x11] = 0x10;
        bytes[0x18] = 0x30;
        bytes[0x30] = lsn;
        bytes[0x3c..0x3e].copy_from_slice(&users.to_le_bytes());
        bytes[0x3e..0x40].copy_from_slice(&flags.to_le_bytes());
        protect(&mut bytes, b"RSTR", 0x1e0);
        bytes
    }

    #[test]
    fn the_later_page_counts() {
        let (clean, dirty) = (page(1, NONE, 0), page(2, 0, 0));
        assert_eq!(state(&[clean.clone(), dirty.clone()].concat()), State::Dirty);
        assert_eq!(state(&[dirty.clone(), page(3, 0, 2)].concat()), State::Clean);
        let mut torn = dirty;
        torn[511] ^= 1;
        assert_eq!(state(&[clean, torn.clone()].concat()), State::Clean);
        assert_eq!(state(&[torn.clone(), torn].concat()), State::Unknown);
    }

    #[test]
    fn an_empty_log_is_clean() {
        assert_eq!(state(&[0xff; 2 * PAGE]), State::Clean);
        assert_eq!(state(&[0; 2 * PAGE]), State::Unknown);
        assert_eq!(state(&[]), State::Unknown);
    }
}
