//! The BLAKE3 of a whole file, computed by several threads.
//!
//! BLAKE3 is a tree over blocks of the file. Each thread takes the next block, reads it by
//! position and hashes its subtree, so reading runs in parallel too and no memory map (a SIGBUS on
//! a file that shrinks) is needed.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};

use blake3::hazmat::{self, ChainingValue, HasherExt, Mode};

use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::storage::{ReadAt, SourceFile};

/// Bytes hashed as one subtree: a power of two.
const BLOCK: u64 = 1 << 20;
/// Bytes read at once: a power of two, small enough to be in the processor's own cache still when they
/// are hashed.
const PIECE: u64 = 128 << 10;

/// BLAKE3 of the file at `path` in hexadecimal, with a thread per processor.
///
/// # Errors
/// It cannot be read, or changed meanwhile.
pub fn file(path: &Path) -> Result<String> {
    whole(&SourceFile::look(path)?)
}

/// As [`file`], of a file that was looked at already.
///
/// # Errors
/// As [`file`].
pub fn whole(file: &SourceFile) -> Result<String> {
    let jobs = std::thread::available_parallelism().map_or(1, |n| n.get());
    let hash = hash(file, jobs, &())?;
    file.check_unchanged()?;
    Ok(hash.to_hex().to_string())
}

/// BLAKE3 of all of `storage`, with `jobs` threads.
///
/// # Errors
/// Reading failed, or the file became shorter.
pub fn hash(storage: &dyn ReadAt, jobs: usize, progress: &dyn Progress) -> Result<blake3::Hash> {
    let len = storage.len();
    if len <= BLOCK {
        let mut bytes = vec![0; len as usize];
        storage.read_exact_at(&mut bytes, 0)?;
        progress.advance(len);
        return Ok(blake3::hash(&bytes));
    }
    let blocks = len.div_ceil(BLOCK);
    let values: Vec<OnceLock<ChainingValue>> = (0..blocks).map(|_| OnceLock::new()).collect();
    let work = |i: u64, buf: &mut Vec<u8>| -> Result<()> {
        let (start, end) = (i * BLOCK, len.min((i + 1) * BLOCK));
        let mut hasher = blake3::Hasher::new();
        hasher.set_input_offset(start);
        let mut at = start;
        while at < end {
            buf.resize((end - at).min(PIECE) as usize, 0);
            storage.read_exact_at(buf, at)?;
            hasher.update(buf);
            at += buf.len() as u64;
        }
        let _ = values[i as usize].set(hasher.finalize_non_root());
        progress.advance(end - start);
        Ok(())
    };
    in_parallel(blocks, jobs, Vec::new, work)?;
    let values: Vec<ChainingValue> = values.into_iter().filter_map(OnceLock::into_inner).collect();
    Ok(root(&values))
}

/// Joins subtrees of at least two blocks.
fn root(values: &[ChainingValue]) -> blake3::Hash {
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
pub fn in_parallel<S>(
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
mod tests {
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

    #[test]
    fn a_read_error_is_told() {
        let bad = 3 * BLOCK..3 * BLOCK + 1;
        let storage = FaultyStorage::new(MemStorage::new("m", vec![1; 6 << 20]), bad);
        let e = hash(&storage, 2, &()).unwrap_err();
        assert_eq!((e.kind(), e.offset()), (Kind::Io, Some(3 * BLOCK)));
    }
}
