//! The BLAKE3 of a whole file, computed by several threads.
//!
//! BLAKE3 is a tree over blocks of the file. Each thread takes the next block, reads it by
//! position and hashes its subtree, so reading runs in parallel too and no memory map (a SIGBUS on
//! a file that shrinks) is needed. Finished subtrees are joined as soon as they can be: memory does
//! not grow with the file.
//!
//! Holes are not read; their zeros are hashed all the same. (There is no shortcut: BLAKE3 hashes the
//! place of each KiB along with it, so that subtrees of zeros differ from each other.)
//!
//! Subtrees of a file that still grows can be hashed ahead, see [`subtrees`].

pub(crate) mod subtrees;

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};

use blake3::hazmat::{self, ChainingValue, HasherExt, Mode};

use self::subtrees::{KnownSubtrees, PIECE};
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::storage::{ReadAt, SourceFile};
/// Subtrees whose values are kept at a time: a power of two.
const GROUP: u64 = 1024;
/// What a hole reads as.
static ZEROS: [u8; PIECE as usize] = [0; PIECE as usize];

/// The same with `jobs` threads, which call `check` before each block.
///
/// # Errors
/// It cannot be read, or changed meanwhile; the first error of `check`.
pub(crate) fn whole_with(
    file: &SourceFile,
    jobs: usize,
    progress: &dyn Progress,
    check: &Check,
) -> Result<String> {
    let hash = hash_with(file, &KnownSubtrees::default(), jobs, progress, check)?;
    file.check_unchanged()?;
    Ok(hash.to_hex().to_string())
}

/// The same, but what is `known` already is not read.
///
/// # Errors
/// As [`whole_with()`].
pub(crate) fn rest_with(
    file: &SourceFile,
    known: &KnownSubtrees,
    jobs: usize,
    check: &Check,
) -> Result<String> {
    let hash = hash_with(file, known, jobs, &(), check)?;
    file.check_unchanged()?;
    Ok(hash.to_hex().to_string())
}

/// Hashes the zeros that a hole of this length reads as.
pub(crate) fn zeros(hasher: &mut blake3::Hasher, len: u64) {
    let mut left = len;
    while left > 0 {
        let n = left.min(PIECE);
        hasher.update(&ZEROS[..n as usize]);
        left -= n;
    }
}

/// What is asked before each block; an error ends the work.
pub(crate) type Check<'a> = dyn Fn() -> Result<()> + Sync + 'a;

/// BLAKE3 of all of `storage`, with `jobs` threads. Whoever must know that it did not change
/// meanwhile asks afterwards.
///
/// # Errors
/// Reading failed, or the file became shorter.
pub(crate) fn hash(
    storage: &dyn ReadAt,
    jobs: usize,
    progress: &dyn Progress,
) -> Result<blake3::Hash> {
    hash_with(storage, &KnownSubtrees::default(), jobs, progress, &|| Ok(()))
}

fn hash_with(
    storage: &dyn ReadAt,
    known: &KnownSubtrees,
    jobs: usize,
    progress: &dyn Progress,
    check: &Check,
) -> Result<blake3::Hash> {
    let len = storage.len();
    let holes = Holes::of(storage);
    let unit = known.unit();
    let blocks = len.div_ceil(unit).max(1);
    let mut tree = Tree::default();
    let mut first = 0;
    while first < blocks {
        let count = GROUP.min(blocks - first);
        let values: Vec<OnceLock<ChainingValue>> = (0..count).map(|_| OnceLock::new()).collect();
        let root = OnceLock::new();
        let work = |i: u64, buf: &mut Vec<u8>| -> Result<()> {
            check()?;
            let start = (first + i) * unit;
            let end = len.min(start.saturating_add(unit));
            // The root of a tree is no subtree; the last one of a file may be a smaller one.
            let value = known.value(first + i).filter(|_| blocks > 1 && end - start == unit);
            let mut hashed = || hasher_of(&holes, start..end, buf);
            let _ = match value {
                Some(value) => values[i as usize].set(*value).map_err(drop),
                None if blocks == 1 => root.set(hashed()?.finalize()).map_err(drop),
                None => values[i as usize].set(hashed()?.finalize_non_root()).map_err(drop),
            };
            progress.advance(end - start);
            Ok(())
        };
        in_parallel(count, jobs, Vec::new, work)?;
        if let Some(hash) = root.into_inner() {
            return Ok(hash);
        }
        let values: Vec<_> = values.into_iter().filter_map(OnceLock::into_inner).collect();
        if count == blocks {
            return Ok(root_of(&values));
        }
        tree.push(join(&values));
        first += count;
    }
    Ok(tree.root())
}

/// Hashes `range`, which is a subtree.
fn hasher_of(holes: &Holes<'_>, range: Range<u64>, buf: &mut Vec<u8>) -> Result<blake3::Hasher> {
    let mut hasher = blake3::Hasher::new();
    hasher.set_input_offset(range.start);
    for_each_piece(holes, range, buf, |bytes| {
        hasher.update(bytes);
    })?;
    Ok(hasher)
}

/// Calls `f` with all bytes of `range`, in pieces; those of holes are not read.
fn for_each_piece(
    holes: &Holes<'_>,
    range: Range<u64>,
    buf: &mut Vec<u8>,
    mut f: impl FnMut(&[u8]),
) -> Result<()> {
    let mut at = range.start;
    while at < range.end {
        let (hole, end) = holes.stretch(at, range.end);
        while at < end {
            let n = (end - at).min(PIECE) as usize;
            if hole {
                f(&ZEROS[..n]);
            } else {
                buf.resize(n, 0);
                holes.storage.read_exact_at(buf, at)?;
                f(buf);
            }
            at += n as u64;
        }
    }
    Ok(())
}

/// Where a file has holes, for those who read it from the beginning to the end, perhaps with several
/// threads. Each stretch is asked for once, however many pieces it is read in: on some file systems
/// (tmpfs) a question takes as long as the stretch.
pub(crate) struct Holes<'a> {
    storage: &'a dyn ReadAt,
    /// Dense files have none, and are not asked.
    sparse: bool,
    /// The stretch that was found last, and whether it is a hole.
    known: Mutex<(Range<u64>, bool)>,
}

impl<'a> Holes<'a> {
    /// Nothing is known yet.
    pub(crate) fn of(storage: &'a dyn ReadAt) -> Self {
        let sparse = storage.unallocated() > 0;
        Holes { storage, sparse, known: Mutex::new((0..0, false)) }
    }

    /// Whether there is a hole at `at`, and where that or the data ends, at the latest at `limit`.
    /// Where the file system does not tell, all is data.
    pub(crate) fn stretch(&self, at: u64, limit: u64) -> (bool, u64) {
        if !self.sparse {
            return (false, limit);
        }
        let (range, hole) = self.known.lock().unwrap_or_else(|p| p.into_inner()).clone();
        if range.contains(&at) {
            return (hole, range.end.min(limit));
        }
        let (hole, end) = self.ask(at);
        *self.known.lock().unwrap_or_else(|p| p.into_inner()) = (at..end, hole);
        (hole, end.min(limit))
    }

    fn ask(&self, at: u64) -> (bool, u64) {
        let len = self.storage.len();
        match self.storage.seek_data(at) {
            Ok(Some(data)) if data <= at => {
                let hole = self.storage.seek_hole(at).unwrap_or(len);
                // A file that is being changed: reading will tell.
                (false, if hole > at { hole } else { u64::MAX })
            }
            Ok(data) => (true, data.unwrap_or(u64::MAX)),
            Err(_) => (false, u64::MAX),
        }
    }
}

/// Subtrees of [`GROUP`] blocks, joined as far as it is certain that more follows: at most one of
/// each size, the largest first.
#[derive(Default)]
struct Tree {
    values: Vec<ChainingValue>,
    count: u64,
}

impl Tree {
    /// Adds the next subtree; only the last may be of fewer blocks.
    fn push(&mut self, value: ChainingValue) {
        for _ in 0..self.count.trailing_zeros().min(self.values.len() as u32) {
            let (Some(right), Some(left)) = (self.values.pop(), self.values.pop()) else { break };
            self.values.push(hazmat::merge_subtrees_non_root(&left, &right, Mode::Hash));
        }
        self.values.push(value);
        self.count += 1;
    }

    /// The root over at least two subtrees.
    fn root(mut self) -> blake3::Hash {
        let mut right = self.values.pop().unwrap_or_default();
        while self.values.len() > 1 {
            let left = self.values.pop().unwrap_or_default();
            right = hazmat::merge_subtrees_non_root(&left, &right, Mode::Hash);
        }
        let left = self.values.pop().unwrap_or_default();
        hazmat::merge_subtrees_root(&left, &right, Mode::Hash)
    }
}

/// Joins subtrees of at least two blocks.
fn root_of(values: &[ChainingValue]) -> blake3::Hash {
    let (left, right) = values.split_at(left_len(values.len()));
    hazmat::merge_subtrees_root(&join(left), &join(right), Mode::Hash)
}

fn join(values: &[ChainingValue]) -> ChainingValue {
    match values {
        [one] => *one,
        _ => {
            let (left, right) = values.split_at(left_len(values.len()));
            hazmat::merge_subtrees_non_root(&join(left), &join(right), Mode::Hash)
        }
    }
}

/// The left subtree is the largest power of two that leaves something for the right one.
fn left_len(n: usize) -> usize {
    n.div_ceil(2).next_power_of_two()
}

/// Calls `work` for each of `0..count` on `jobs` threads, each with a scratch value of its own.
/// The first error stops the rest.
///
/// # Errors
/// The first that `work` returned.
pub(crate) fn in_parallel<S>(
    count: u64,
    jobs: usize,
    scratch: impl Fn() -> S + Sync,
    work: impl Fn(u64, &mut S) -> Result<()> + Sync,
) -> Result<()> {
    let next = AtomicU64::new(0);
    let failed: Mutex<Option<Error>> = Mutex::new(None);
    let run = || {
        let mut scratch = scratch();
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= count {
                return;
            }
            if let Err(e) = work(i, &mut scratch) {
                next.store(count, Ordering::Relaxed);
                failed.lock().unwrap_or_else(|p| p.into_inner()).get_or_insert(e);
                return;
            }
        }
    };
    let threads = (jobs.max(1) as u64).min(count);
    std::thread::scope(|s| {
        for _ in 1..threads {
            s.spawn(run);
        }
        run();
    });
    failed.into_inner().unwrap_or_else(|p| p.into_inner()).map_or(Ok(()), Err)
}

#[cfg(test)]
// Lists of ranges, some of which have one.
#[allow(clippy::single_range_in_vec_init)]
mod tests {
    use std::path::Path;

    use super::subtrees::BLOCK;
    use super::*;
    use crate::error::Kind;
    use crate::storage::{FaultyStorage, MemStorage};

    #[test]
    fn hashes_are_blake3s() {
        for len in [0, 1, 1024, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK + 7, 5 * BLOCK, 8 * BLOCK] {
            let bytes: Vec<u8> = (0..len).map(|i| (i ^ (i >> 9)) as u8).collect();
            let expected = blake3::hash(&bytes);
            let storage = MemStorage::new("m", bytes);
            for jobs in [1, 3] {
                assert_eq!(hash(&storage, jobs, &()).unwrap(), expected, "{len} {jobs}");
            }
        }
    }

    /// A file of which only `data` can be read, and all else is a hole; counts what is read, and how
    /// often it is asked for holes.
    struct Sparse {
        len: u64,
        data: Vec<Range<u64>>,
        read: AtomicU64,
        asked: AtomicU64,
    }

    impl Sparse {
        fn new(len: u64, data: &[Range<u64>]) -> Self {
            let (read, asked) = Default::default();
            Sparse { len, data: data.to_vec(), read, asked }
        }
    }

    impl ReadAt for Sparse {
        fn read_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<usize> {
            let here = self.data.iter().find(|d| d.contains(&offset));
            let Some(here) = here else { panic!("a hole is read at {offset}") };
            let n = (here.end - offset).min(buf.len() as u64) as usize;
            buf[..n].fill(7);
            self.read.fetch_add(n as u64, Ordering::Relaxed);
            Ok(n)
        }

        fn len(&self) -> u64 {
            self.len
        }

        fn name(&self) -> &Path {
            Path::new("sparse")
        }

        fn seek_data(&self, offset: u64) -> std::io::Result<Option<u64>> {
            self.asked.fetch_add(1, Ordering::Relaxed);
            Ok(self.data.iter().find(|d| d.end > offset).map(|d| d.start.max(offset)))
        }

        fn seek_hole(&self, offset: u64) -> std::io::Result<u64> {
            let here = self.data.iter().find(|d| d.contains(&offset));
            Ok(here.map_or(offset, |d| d.end))
        }

        fn unallocated(&self) -> u64 {
            self.len - self.data.iter().map(|d| d.end - d.start).sum::<u64>()
        }
    }

    #[test]
    fn holes_are_hashed_as_zeros_and_not_read() {
        for (len, data) in [
            (5 * BLOCK + 3, vec![]),
            (3 * BLOCK, vec![0..1, 7..4096, BLOCK - 1..BLOCK + 1, 3 * BLOCK - 5..3 * BLOCK]),
            (2 * BLOCK + 9, vec![2 * BLOCK + 1..2 * BLOCK + 9]),
            (100, vec![50..60]),
        ] {
            let mut bytes = vec![0; len as usize];
            data.iter().for_each(|d| bytes[d.start as usize..d.end as usize].fill(7));
            let storage = Sparse::new(len, &data);
            assert_eq!(hash(&storage, 2, &()).unwrap(), blake3::hash(&bytes), "{len} {data:?}");
            let wanted: u64 = data.iter().map(|d| d.end - d.start).sum();
            assert_eq!(storage.read.load(Ordering::Relaxed), wanted);
        }
    }

    /// On tmpfs a question takes as long as the stretch is: one for each piece would be quadratic.
    #[test]
    fn each_stretch_is_asked_for_once() {
        let storage = Sparse::new(50 * BLOCK, &[0..20 * BLOCK + 5, 30 * BLOCK..49 * BLOCK]);
        hash(&storage, 1, &()).unwrap();
        assert_eq!(storage.asked.load(Ordering::Relaxed), 4);
    }

    #[test]
    fn subtrees_are_joined_as_all_at_once() {
        let value = |i: usize| *blake3::hash(&i.to_le_bytes()).as_bytes();
        for count in (2..70).chain([127, 128, 129, 1000]) {
            let values: Vec<ChainingValue> = (0..count).map(value).collect();
            let mut tree = Tree::default();
            for value in &values {
                tree.push(*value);
                assert!(tree.values.len() <= 12, "memory grows");
            }
            assert_eq!(tree.root(), root_of(&values), "{count}");
        }
    }

    #[test]
    fn a_file_of_several_groups_is_hashed_as_one() {
        // Reading is what costs time: all but a little is a hole.
        let len = GROUP * BLOCK + 2 * BLOCK + 17;
        let data = [GROUP * BLOCK - 3..GROUP * BLOCK + 3];
        let mut expected = blake3::Hasher::new();
        let mut at = 0;
        while at < len {
            let n = BLOCK.min(len - at);
            let mut bytes = vec![0; n as usize];
            let ours = data[0].start.max(at)..data[0].end.min(at + n);
            if !ours.is_empty() {
                bytes[(ours.start - at) as usize..(ours.end - at) as usize].fill(7);
            }
            expected.update(&bytes);
            at += n;
        }
        assert_eq!(hash(&Sparse::new(len, &data), 3, &()).unwrap(), expected.finalize());
    }

    #[test]
    fn whoever_is_asked_before_each_block_ends_it() {
        let storage = MemStorage::new("m", vec![1; 6 << 20]);
        let asked = AtomicU64::new(0);
        let check = || match asked.fetch_add(1, Ordering::Relaxed) {
            0..3 => Ok(()),
            _ => Err(Error::new(Kind::Interrupted, "stopped")),
        };
        let e = hash_with(&storage, &KnownSubtrees::default(), 1, &(), &check).unwrap_err();
        assert_eq!((e.kind(), asked.into_inner()), (Kind::Interrupted, 4));
    }

    #[test]
    fn a_read_error_is_told() {
        let bad = 3 * BLOCK..3 * BLOCK + 1;
        let storage = FaultyStorage::new(MemStorage::new("m", vec![1; 6 << 20]), bad);
        let e = hash(&storage, 2, &()).unwrap_err();
        assert_eq!((e.kind(), e.offset()), (Kind::Io, Some(3 * BLOCK)));
    }
}
