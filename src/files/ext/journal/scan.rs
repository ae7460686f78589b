//! Which transactions in the journal are complete, and which block of it is the newest version of which block of
//! the file system.
//!
//! As Linux recovers: transactions follow each other by number from the one that the superblock names; the first
//! block that is not what must come next ends the log. A transaction counts with its commit block. What one
//! revokes is not written from it or from those before.

use std::collections::BTreeMap;

use super::super::super::blocks::Holding;
use super::super::super::bytes::{be16, be32, be64, part};
use super::super::super::crc::crc32c;
use super::super::volume::Volume;
use super::log::{Log, MAGIC};
use crate::error::Result;

/// Kinds of blocks.
const DESCRIPTOR: u32 = 1;
const COMMIT: u32 = 2;
const REVOKE: u32 = 5;
/// Bytes of a block's head, and of the checksum at the end of it.
const HEAD: usize = 12;
const TAIL: usize = 4;
/// Flags of tags.
const ESCAPED: u32 = 1;
const SAME_UUID: u32 = 2;
const LAST: u32 = 8;
/// What an entry of the map takes, roughly.
const ENTRY_BYTES: u64 = 64;
/// Entries that are counted against the cache at once.
const STEP: usize = 4096;

/// The newest version of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Version {
    /// The journal's block that has it.
    pub number: u32,
    /// Whether its first four bytes were taken away, for they looked like a block of the journal's own.
    pub escaped: bool,
    /// Its checksum, where there is one.
    pub checksum: Option<u32>,
    /// The transaction, which its checksum counts in.
    pub sequence: u32,
}

/// What recovery would write.
pub(super) struct Scanned {
    /// By the file system's blocks.
    pub versions: BTreeMap<u64, Version>,
    /// The number that the transaction after the last would have.
    pub next: u32,
    /// Whether a transaction, which should come next, has a wrong checksum.
    pub is_broken: bool,
    /// The memory of the map.
    pub held: Vec<Holding>,
}

/// Goes over the log once.
///
/// # Errors
/// `Corrupt` if a complete transaction is wrong; `Unsupported` if its map takes too much memory; what reading
/// the point says.
pub(super) fn scan(log: &Log<'_>, volume: &Volume) -> Result<Scanned> {
    let versions = BTreeMap::new();
    let mut scanned = Scanned { versions, next: log.sequence, is_broken: false, held: Vec::new() };
    if log.start == 0 {
        return Ok(scanned);
    }
    let mut open = Transaction::default();
    let (mut at, mut left) = (log.start, log.block_count());
    while left > 0 {
        let block = log.block(at)?;
        if be32(&block, 0) != MAGIC || be32(&block, 8) != scanned.next {
            break;
        }
        let kind = be32(&block, 4);
        let right = match kind {
            DESCRIPTOR | REVOKE => is_right(log, &block),
            COMMIT => is_commit(log, &block),
            _ => break,
        };
        if !right {
            scanned.is_broken = true;
            break;
        }
        let used = match kind {
            DESCRIPTOR => open.tags(log, &block, at, scanned.next),
            REVOKE => open.revokes(log, &block),
            _ => {
                std::mem::take(&mut open).commit(&mut scanned.versions);
                scanned.next = scanned.next.wrapping_add(1);
                0
            }
        };
        let memory = (scanned.held.len() + 1) * STEP;
        if scanned.versions.len() + open.writes.len() + open.revoked.len() > memory {
            scanned.held.push(volume.source.blocks().hold(STEP as u64 * ENTRY_BYTES)?);
        }
        // One that goes all around would come to where it began.
        let Some(rest) = left.checked_sub(1 + used) else { break };
        (at, left) = (log.after(at, 1 + used), rest);
    }
    Ok(scanned)
}

/// What a transaction writes and revokes; nothing counts before its commit block.
#[derive(Default)]
struct Transaction {
    writes: Vec<(u64, Version)>,
    revoked: Vec<u64>,
}

impl Transaction {
    /// Takes the tags of a descriptor block; how many blocks follow it.
    fn tags(&mut self, log: &Log<'_>, block: &[u8], at: u32, sequence: u32) -> u32 {
        let end = block.len() - if log.has_checksums() { TAIL } else { 0 };
        let (mut tag, mut count) = (HEAD, 0);
        while tag + log.tag_len() <= end {
            let bytes = part(block, tag, log.tag_len());
            let (flags, checksum) = match (log.has_long_tags(), log.has_checksums()) {
                (true, _) => (be32(bytes, 4), Some(be32(bytes, 12))),
                (false, true) => (u32::from(be16(bytes, 6)), Some(u32::from(be16(bytes, 4)))),
                (false, false) => (u32::from(be16(bytes, 6)), None),
            };
            let high = if log.is_wide() { u64::from(be32(bytes, 8)) << 32 } else { 0 };
            count += 1;
            let number = log.after(at, count);
            let escaped = flags & ESCAPED != 0;
            let version = Version { number, escaped, checksum, sequence };
            self.writes.push((u64::from(be32(bytes, 0)) | high, version));
            tag += log.tag_len() + if flags & SAME_UUID == 0 { 16 } else { 0 };
            if flags & LAST != 0 {
                break;
            }
        }
        count
    }

    /// Takes what a block revokes; no blocks follow it.
    fn revokes(&mut self, log: &Log<'_>, block: &[u8]) -> u32 {
        let end = (be32(block, HEAD) as usize).min(block.len());
        let step = if log.is_wide() { 8 } else { 4 };
        let mut at = HEAD + 4;
        while at + step <= end {
            self.revoked.push(match log.is_wide() {
                true => be64(block, at),
                false => u64::from(be32(block, at)),
            });
            at += step;
        }
        0
    }

    fn commit(self, versions: &mut BTreeMap<u64, Version>) {
        versions.extend(self.writes);
        for block in &self.revoked {
            versions.remove(block);
        }
    }
}

/// Whether the checksum at the end of a block is right.
fn is_right(log: &Log<'_>, block: &[u8]) -> bool {
    let tail = block.len() - TAIL;
    !log.has_checksums() || {
        let crc = crc32c(crc32c(log.seed, part(block, 0, tail)), &[0; TAIL]);
        be32(block, tail) == crc
    }
}

/// Whether the checksum of a commit block is right.
fn is_commit(log: &Log<'_>, block: &[u8]) -> bool {
    const AT: usize = 16;
    !log.has_checksums() || {
        let crc = crc32c(crc32c(log.seed, part(block, 0, AT)), &[0; 4]);
        be32(block, AT) == crc32c(crc, part(block, AT + 4, block.len()))
    }
}
