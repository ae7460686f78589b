//! Chunks: from logical addresses to places on the device.

use super::super::blocks::Holding;
use super::super::bytes::{le16, le64};
use super::super::source::Source;
use super::superblock::{MOUNT_ALL, Super};
use crate::error::{Error, Kind, Result};

/// Bytes of a chunk item before its stripes, and of a stripe.
const HEAD: usize = 48;
const STRIPE: usize = 32;
/// Chunks that are counted against the cache at once, and what one takes, roughly.
const STEP: usize = 1024;
const CHUNK_BYTES: u64 = 128;
/// Copies on one device that are used.
const MAX_COPIES: usize = 4;

/// Profiles that spread a chunk over devices in stripes.
const STRIPED: [(u64, &str); 4] =
    [(0x8, "RAID0"), (0x40, "RAID10"), (0x80, "RAID5"), (0x100, "RAID6")];

/// A stretch of logical addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Chunk {
    logical: u64,
    len: u64,
    /// Where its copies begin on this device.
    copies: Vec<u64>,
}

/// All chunks of a file system, by their addresses.
#[derive(Default)]
pub(super) struct Chunks {
    list: Vec<Chunk>,
    held: Vec<Holding>,
}

impl Chunks {
    /// Adds the chunk of this item.
    ///
    /// # Errors
    /// `Unsupported` if it is striped, or the cache is too small; `Corrupt` if it contradicts itself.
    pub(super) fn add(
        &mut self,
        source: &Source,
        sup: &Super,
        logical: u64,
        item: &[u8],
    ) -> Result<()> {
        let bad = |what: &str| source.error(Kind::Corrupt, format!("chunk {logical}: {what}"), 0);
        let (len, profile, stripes) = (le64(item, 0), le64(item, 24), usize::from(le16(item, 44)));
        if len == 0
            || stripes == 0
            || item.len() < HEAD + stripes * STRIPE
            || logical.checked_add(len).is_none()
        {
            return Err(bad("invalid item"));
        }
        if let Some((_, name)) = STRIPED.iter().find(|(bit, _)| profile & bit > 0)
            && stripes > 1
        {
            let what = format!("'files' does not read btrfs with the profile {name}");
            return Err(source.error(Kind::Unsupported, what, 0).remedy(MOUNT_ALL));
        }
        let own = item.get(HEAD..).unwrap_or_default().chunks_exact(STRIPE).take(stripes);
        let own = own.filter(|s| le64(s, 0) == sup.device).map(|s| le64(s, 8));
        let copies: Vec<u64> = own.take(MAX_COPIES).collect();
        if copies.iter().any(|at| at.checked_add(len).is_none()) {
            return Err(bad("invalid place"));
        }
        let at = self.list.partition_point(|c| c.logical < logical);
        let chunk = Chunk { logical, len, copies };
        match self.list.get(at) {
            // System chunks are in the superblock as well.
            Some(there) if *there == chunk => return Ok(()),
            Some(next) if next.logical < logical + len => return Err(bad("overlaps another one")),
            _ => {}
        }
        let before = at.checked_sub(1).and_then(|i| self.list.get(i));
        if before.is_some_and(|b| b.logical + b.len > logical) {
            return Err(bad("overlaps another one"));
        }
        if self.list.len() >= self.held.len() * STEP {
            self.held.push(source.blocks().hold(STEP as u64 * CHUNK_BYTES)?);
        }
        self.list.insert(at, chunk);
        Ok(())
    }

    /// The chunks of the list in a superblock.
    ///
    /// # Errors
    /// As [`Chunks::add`].
    pub(super) fn system(source: &Source, sup: &Super) -> Result<Chunks> {
        const KEY: usize = 17;
        let (mut chunks, mut rest) = (Chunks::default(), sup.system_chunks.as_slice());
        while let Some((key, item)) =
            rest.split_at_checked(KEY).filter(|(_, item)| item.len() >= HEAD)
        {
            let len = HEAD + usize::from(le16(item, 44)) * STRIPE;
            chunks.add(source, sup, le64(key, 9), item.get(..len).unwrap_or_default())?;
            rest = item.get(len..).unwrap_or_default();
        }
        Ok(chunks)
    }

    /// Where the bytes at a logical address are, once per copy, and how many follow in their chunk.
    ///
    /// # Errors
    /// `Corrupt` if there is no such address; `Unsupported` if it is on another device.
    pub(super) fn places(&self, source: &Source, logical: u64) -> Result<(Vec<u64>, u64)> {
        let after = self.list.partition_point(|c| c.logical <= logical);
        let chunk = after.checked_sub(1).and_then(|i| self.list.get(i));
        let Some(chunk) = chunk.filter(|c| logical - c.logical < c.len) else {
            let what = format!("no chunk has the logical address {logical}");
            return Err(source.error(Kind::Corrupt, what, 0));
        };
        if chunk.copies.is_empty() {
            return Err(elsewhere(source));
        }
        let inside = logical - chunk.logical;
        Ok((chunk.copies.iter().map(|at| at + inside).collect(), chunk.len - inside))
    }

    /// How many chunks are on this device, and how many are not.
    pub(super) fn counts(&self) -> (usize, usize) {
        let here = self.list.iter().filter(|c| !c.copies.is_empty()).count();
        (here, self.list.len() - here)
    }
}

fn elsewhere(source: &Source) -> Error {
    let what = "the data is on another disk of this btrfs";
    source.error(Kind::Unsupported, what, 0).remedy(MOUNT_ALL)
}
