//! The journal's file: its superblock, and its blocks by number.

use super::super::super::bytes::{be32, byte, le16, le32, part};
use super::super::super::crc::crc32c;
use super::super::inode::Inode;
use super::super::map::run;
use super::super::volume::Volume;
use crate::error::{Error, Kind, Result};

/// Begins every block of the journal's own.
pub(super) const MAGIC: u32 = 0xc03b_3998;
/// Kinds of blocks.
const SUPER_V1: u32 = 3;
const SUPER_V2: u32 = 4;

/// Incompatible features.
mod incompat {
    pub(super) const REVOKE: u32 = 0x1;
    pub(super) const BIT64: u32 = 0x2;
    pub(super) const ASYNC_COMMIT: u32 = 0x4;
    pub(super) const CSUM_V2: u32 = 0x8;
    pub(super) const CSUM_V3: u32 = 0x10;
    pub(super) const FAST_COMMIT: u32 = 0x20;
    pub(super) const KNOWN: u32 = REVOKE | BIT64 | ASYNC_COMMIT | CSUM_V2 | CSUM_V3 | FAST_COMMIT;
}

/// Runs of blocks that a journal's file may have: a kernel makes one or a few.
const MAX_RUNS: usize = 1 << 16;
/// The most blocks that mke2fs gives a journal.
const MAX_BLOCKS: u32 = 10_240_000;
/// Blocks of fast commits, where the superblock does not say.
const FAST_BLOCKS: u32 = 256;
/// The first tag of fast commits: length, features, and the transaction that they follow.
const FAST_HEAD: u16 = 9;

/// The journal of a file system.
pub(super) struct Log<'a> {
    volume: &'a Volume,
    /// Where its blocks are: the first of each run, and where that is.
    runs: Vec<(u64, u64)>,
    incompat: u32,
    /// With which its checksums begin.
    pub seed: u32,
    /// Its first block for transactions, and the one after the last.
    first: u32,
    end: u32,
    /// All its blocks, with those of fast commits.
    len: u32,
    /// The transaction with which recovery begins, and where; 0 if there is nothing to recover.
    pub sequence: u32,
    pub start: u32,
}

impl<'a> Log<'a> {
    /// Finds the journal and checks its superblock.
    pub(super) fn open(volume: &'a Volume) -> Result<Log<'a>> {
        let refused = |what: &str| volume.source.error(Kind::Unsupported, what, 0);
        if volume.sup.journal_inode == 0 {
            return Err(refused("its journal is on another device"));
        }
        let inode = volume.inode(volume.sup.journal_inode)?;
        let runs = runs(volume, &inode)?;
        let mut log = Log {
            volume,
            runs,
            incompat: 0,
            seed: 0,
            first: 1,
            end: 1,
            len: 1,
            sequence: 0,
            start: 0,
        };
        let raw = log.block(0)?;
        log.parse(&raw)?;
        Ok(log)
    }

    fn parse(&mut self, raw: &[u8]) -> Result<()> {
        let kind = be32(raw, 4);
        if be32(raw, 0) != MAGIC || ![SUPER_V1, SUPER_V2].contains(&kind) {
            return Err(self.bad("the journal has no superblock", 0));
        }
        if u64::from(be32(raw, 0xc)) != self.volume.sup.block_size {
            return Err(self.bad("the journal has a wrong block size", 0));
        }
        (self.len, self.first) = (be32(raw, 0x10), be32(raw, 0x14));
        (self.sequence, self.start) = (be32(raw, 0x18), be32(raw, 0x1c));
        self.end = self.len;
        if kind == SUPER_V2 {
            self.parse_features(raw)?;
        }
        let inside = |n: u32| (self.first..self.end).contains(&n);
        let sane = self.first > 0
            && self.first < self.end
            && u64::from(self.len) <= self.blocks()
            && self.len <= MAX_BLOCKS;
        if !sane || (self.start != 0 && !inside(self.start)) {
            return Err(self.bad("inconsistent journal superblock", 0));
        }
        Ok(())
    }

    fn parse_features(&mut self, raw: &[u8]) -> Result<()> {
        self.incompat = be32(raw, 0x28);
        let unknown = self.incompat & !incompat::KNOWN;
        if unknown != 0 {
            let what = format!("unknown journal feature {unknown:#x}");
            return Err(self.volume.source.error(Kind::Unsupported, what, 0));
        }
        self.seed = crc32c(!0, part(raw, 0x30, 16));
        if self.has_checksums() {
            let crc = crc32c(!0, part(raw, 0, 0xfc));
            let crc = crc32c(crc32c(crc, &[0; 4]), part(raw, 0x100, 0x300));
            if be32(raw, 0xfc) != crc {
                return Err(self.bad("bad checksum of the journal superblock", 0));
            }
        }
        if self.incompat & incompat::FAST_COMMIT != 0 {
            let count = match be32(raw, 0x54) {
                0 => FAST_BLOCKS,
                count => count,
            };
            self.end = self.len.saturating_sub(count);
        }
        Ok(())
    }

    fn blocks(&self) -> u64 {
        self.runs.last().map_or(0, |(end, _)| *end)
    }

    /// Where in the file system a block of the journal is.
    pub(super) fn place(&self, number: u32) -> Result<u64> {
        let number = u64::from(number);
        let index = self.runs.partition_point(|(begin, _)| *begin <= number);
        let found = index.checked_sub(1).and_then(|i| self.runs.get(i));
        match found.filter(|(_, at)| *at > 0 && number < self.blocks()) {
            Some((begin, at)) => Ok(at + (number - begin)),
            None => Err(self.bad("the journal has a hole", 0)),
        }
    }

    /// The bytes of a block of the journal.
    pub(super) fn block(&self, number: u32) -> Result<Vec<u8>> {
        self.volume.block(self.place(number)?)
    }

    /// The block after `number`: after the last comes the first.
    pub(super) fn after(&self, number: u32, count: u32) -> u32 {
        let room = u64::from(self.end - self.first);
        let at = u64::from(number.saturating_sub(self.first)) + u64::from(count);
        self.first + (at % room.max(1)) as u32
    }

    /// How many blocks it has for transactions.
    pub(super) fn block_count(&self) -> u32 {
        self.end - self.first
    }

    /// Whether its blocks have checksums.
    pub(super) fn has_checksums(&self) -> bool {
        self.incompat & (incompat::CSUM_V2 | incompat::CSUM_V3) != 0
    }

    /// Whether tags have 32 bits of checksum, as version 3 has.
    pub(super) fn has_long_tags(&self) -> bool {
        self.incompat & incompat::CSUM_V3 != 0
    }

    /// Whether blocks are numbered with 64 bits.
    pub(super) fn is_wide(&self) -> bool {
        self.incompat & incompat::BIT64 != 0
    }

    /// Bytes of a tag.
    pub(super) fn tag_len(&self) -> usize {
        match (self.has_long_tags(), self.has_checksums(), self.is_wide()) {
            (true, _, _) => 16,
            (false, false, false) => 8,
            (false, false, true) => 12,
            (false, true, false) => 10,
            (false, true, true) => 14,
        }
    }

    /// Whether fast commits follow the last transaction, `next` being the number that the next one has.
    pub(super) fn has_fast_commits(&self, next: u32) -> Result<bool> {
        if self.incompat & incompat::FAST_COMMIT == 0 || self.end >= self.len {
            return Ok(false);
        }
        let head = self.block(self.end)?;
        Ok(le16(&head, 0) == FAST_HEAD && byte(&head, 2) >= 8 && le32(&head, 8) == next)
    }

    /// Something wrong in a block of the journal.
    pub(super) fn bad(&self, what: &str, number: u32) -> Error {
        let at = self.place_or_zero(number) * self.volume.sup.block_size;
        self.volume.source.error(Kind::Corrupt, what, at)
    }

    fn place_or_zero(&self, number: u32) -> u64 {
        let first = self.runs.first().map_or(0, |(_, at)| *at);
        if number == 0 { first } else { self.place(number).unwrap_or(first) }
    }
}

/// Where the blocks of the journal's file are; the last is where it ends.
fn runs(volume: &Volume, inode: &Inode) -> Result<Vec<(u64, u64)>> {
    let end = inode.size(&volume.sup) / volume.sup.block_size;
    let (mut runs, mut block) = (Vec::new(), 0);
    while block < end && runs.len() < MAX_RUNS {
        let found = run(volume, inode, block)?;
        runs.push((block, found.at.unwrap_or(0)));
        block = block.saturating_add(found.count).min(end);
    }
    runs.push((block, 0));
    check_apart(volume, inode, &runs)?;
    Ok(runs)
}

/// Fails if a block is in the journal twice: one that revokes nothing would be read millions of times.
fn check_apart(volume: &Volume, inode: &Inode, runs: &[(u64, u64)]) -> Result<()> {
    let ends = runs.iter().skip(1).map(|(begin, _)| *begin);
    let mut places: Vec<(u64, u64)> = runs
        .iter()
        .zip(ends)
        .filter(|((_, at), _)| *at > 0)
        .map(|((begin, at), end)| (*at, at + (end - begin)))
        .collect();
    places.sort_unstable();
    let twice = places.windows(2).any(|pair| match pair {
        [(_, end), (next, _)] => end > next,
        _ => false,
    });
    match twice {
        true => Err(volume.bad(inode, "is a journal that uses the same blocks twice")),
        false => Ok(()),
    }
}
