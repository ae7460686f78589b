//! Runs of blocks: what the map of a file says, whatever its form, and reading by it.

use std::collections::BTreeMap;
use std::ops::Range;

use super::source::Source;
use crate::error::Result;

/// Runs that are compared with each other: a folder of gigabytes may have more.
const MAX_RUNS: usize = 1 << 16;

/// Blocks of a file that all read as zeros, or are all together on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    /// How many, at least 1.
    pub count: u64,
    /// Where the first is, in blocks from the file system's begin; `None` if they read as zeros.
    pub at: Option<u64>,
}

impl Run {
    /// A hole from block `block` to before block `next`.
    pub(super) fn hole(block: u64, next: u64) -> Run {
        Run { count: next.saturating_sub(block).max(1), at: None }
    }
}

/// Fills `buf` with what is at `offset` of a file, by the runs that `find` gives for its blocks of `block_size`
/// bytes: all of it, or what is before something bad.
///
/// # Errors
/// What `find` or reading the point says, if that is at the beginning.
pub(super) fn read(
    source: &Source,
    block_size: u64,
    buf: &mut [u8],
    offset: u64,
    find: impl Fn(u64) -> Result<Run>,
) -> Result<usize> {
    let (all, mut done) = (buf.len(), 0);
    while done < all {
        let at = offset + done as u64;
        let step = find(at / block_size).and_then(|found| {
            let inside = at % block_size;
            let bytes = found.count.saturating_mul(block_size) - inside;
            let n = bytes.min((all - done) as u64) as usize;
            let part = buf.get_mut(done..done + n).unwrap_or_default();
            match found.at {
                Some(block) => source.read(part, block * block_size + inside)?,
                None => part.fill(0),
            }
            Ok(n)
        });
        match step {
            Ok(n) => done += n,
            Err(e) if done == 0 => return Err(e),
            Err(_) => break,
        }
    }
    Ok(done)
}

/// Where the `end` blocks of a folder are, in bytes, as far as that is a list to hold.
///
/// # Errors
/// What `find` says.
pub(super) fn places(
    end: u64,
    block_size: u64,
    find: impl Fn(u64) -> Result<Run>,
) -> Result<Vec<Range<u64>>> {
    let (mut places, mut block) = (Vec::new(), 0);
    while block < end && places.len() < MAX_RUNS {
        let found = find(block)?;
        let count = found.count.min(end - block);
        block = block.saturating_add(count);
        places.extend(found.at.map(|at| {
            let begin = at.saturating_mul(block_size);
            begin..begin.saturating_add(count.saturating_mul(block_size))
        }));
    }
    Ok(places)
}

/// What is wrong with a folder of `end` blocks that has the same ones twice, or more than the `all` that there are:
/// its list would have no end in sight.
///
/// # Errors
/// What `find` says.
pub(super) fn wrong_folder(
    end: u64,
    all: u64,
    find: impl Fn(u64) -> Result<Run>,
) -> Result<Option<&'static str>> {
    let (mut runs, mut block, mut sum) = (BTreeMap::new(), 0, 0u64);
    while block < end {
        let found = find(block)?;
        let count = found.count.min(end - block);
        block = block.saturating_add(count);
        let Some(at) = found.at else { continue };
        let before = runs.range(..at.saturating_add(count)).next_back();
        if before.is_some_and(|(_, other)| *other > at) {
            return Ok(Some("is a directory that uses the same blocks twice"));
        }
        if runs.len() < MAX_RUNS {
            runs.insert(at, at.saturating_add(count));
        }
        sum = sum.saturating_add(count);
        if sum > all {
            return Ok(Some("is a directory larger than its file system"));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::blocks::Blocks;
    use super::*;
    use crate::error::{Error, Kind};
    use crate::storage::MemStorage;

    /// Blocks 0 and 1 at 2, 2 to 4 a hole, 5 at 1, and nothing good behind it.
    fn map(block: u64) -> Result<Run> {
        match block {
            0 | 1 => Ok(Run { count: 2 - block, at: Some(2 + block) }),
            2..5 => Ok(Run::hole(block, 5)),
            5 => Ok(Run { count: 1, at: Some(1) }),
            _ => Err(Error::new(Kind::Corrupt, "bad")),
        }
    }

    #[test]
    fn what_is_before_something_bad_is_read() {
        let bytes: Vec<u8> = (0..4u8).flat_map(|b| [b; 16]).collect();
        let disk = Arc::new(MemStorage::new("disk", bytes));
        let source = Source::new(disk, "disk", &Blocks::new(1 << 20));
        let mut buf = [9; 100];
        assert_eq!(read(&source, 16, &mut buf, 8, map).unwrap(), 88);
        assert_eq!((buf[7], buf[8], buf[24], buf[72], buf[87], buf[88]), (2, 3, 0, 1, 1, 9));
        assert!(read(&source, 16, &mut buf, 96, map).is_err());
    }

    #[test]
    fn folders_have_each_block_once() {
        assert_eq!(wrong_folder(6, 3, map).unwrap(), None);
        assert_eq!(places(6, 16, map).unwrap(), [32..64, 16..32]);
        assert!(places(1, 16, map).unwrap() == vec![Range { start: 32, end: 48 }]);
        assert!(wrong_folder(6, 2, map).unwrap().unwrap().contains("larger"));
        let twice = |block| Ok(Run { count: 1, at: Some(7 + block % 3) });
        assert!(wrong_folder(6, 100, twice).unwrap().unwrap().contains("twice"));
        assert!(wrong_folder(7, 100, map).is_err());
    }
}
