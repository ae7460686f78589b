//! Hashing an image while QEMU still writes to it, and what of that holds at the end.
//!
//! A [`CopyMark`] says: each guest byte below `guest` that is copied at all is in the image by now, and
//! the job will not write it again (see `barrier` for how that is known). A thread hashes the units
//! of the file, in order, and notes with each which mark was there when it began to read. When QEMU has
//! closed the image, its tables tell what each cluster is. A unit's value counts if every cluster of it
//! is plain data of a guest offset below that mark: what was read was written before, and nothing
//! writes to a cluster of the image that is in use for another guest offset. That a cluster was free for a while
//! after a write that failed, and then used again, changes nothing: it was in its present use already,
//! or its guest offset is not below the mark. All else (tables, what came late) is hashed at the end.
//!
//! A mark is needed for nothing else: a thread that reads what is not written yet, or is behind,
//! costs time alone.

use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Instant;

use crate::error::{Error, Kind, Result};
use crate::hash::subtrees::{ChainingValue, KnownSubtrees};
use crate::hash::{Check, subtrees};
use crate::layer::qcow2::plain;
use crate::layer::qcow2::plain::Cluster;
use crate::storage::{OpenFile, ReadAt};

/// The most pieces of units (clusters, if these are smaller) of which it is noted whether they were
/// seen: 32 MiB of bits.
const MOST_PIECES: u64 = 1 << 28;

/// How much longer than a disk and an eighth of it its image may be: tables take less.
const MORE: u64 = 64 << 20;

/// How much lower the priority of the hashing thread is.
const NICE: i32 = 10;

/// What is certain of an image that is being written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct CopyMark {
    /// All guest bytes below it are copied, for good.
    pub guest: u64,
    /// How long the file is.
    pub length: u64,
}

/// One image's hashing.
#[derive(Debug)]
pub(crate) struct AheadHasher {
    file: Arc<File>,
    path: PathBuf,
    unit: u64,
    /// Beyond it nothing is hashed ahead: the values of all units are kept.
    longest: u64,
    control: Arc<HasherControl>,
    thread: Option<JoinHandle<Result<Vec<Unit>>>>,
}

/// What the thread is told.
#[derive(Debug, Default)]
struct HasherControl {
    now: Mutex<HasherState>,
    changed: Condvar,
}

#[derive(Debug, Clone, Copy, Default)]
struct HasherState {
    mark: CopyMark,
    over: bool,
}

impl HasherControl {
    fn now(&self) -> MutexGuard<'_, HasherState> {
        self.now.lock().unwrap_or_else(|p| p.into_inner())
    }

    fn change(&self, change: impl FnOnce(&mut HasherState)) {
        change(&mut self.now());
        self.changed.notify_all();
    }

    /// The mark once there is a file of `length` bytes; `None` once it is over.
    fn wait(&self, length: u64) -> Option<CopyMark> {
        let short = |n: &mut HasherState| !n.over && n.mark.length < length;
        let now = self.changed.wait_while(self.now(), short).unwrap_or_else(|p| p.into_inner());
        (!now.over).then_some(now.mark)
    }
}

/// A unit that is hashed.
#[derive(Debug, Clone, Copy)]
pub(in crate::backup) struct Unit {
    value: ChainingValue,
    /// [`CopyMark::guest`] when reading began.
    guest: u64,
}

impl AheadHasher {
    /// Of the image of a disk of `size` bytes that is open as `file` and called `path`.
    pub(crate) fn new(file: Arc<File>, path: PathBuf, size: u64) -> Self {
        let longest = size.saturating_add(size / 8).saturating_add(MORE);
        let unit = subtrees::unit(longest);
        AheadHasher { file, path, unit, longest, control: Arc::default(), thread: None }
    }

    /// From now on the file may be hashed up to `mark`.
    pub(crate) fn go_on(&mut self, mark: CopyMark) {
        let mark = CopyMark { length: mark.length.min(self.longest), ..mark };
        self.control.change(|now| now.mark = mark);
        if self.thread.is_none() && mark.length >= self.unit {
            let (file, path, unit) = (self.file.clone(), self.path.clone(), self.unit);
            let control = self.control.clone();
            let work = move || hash_units(&OpenFile::new(&file, &path)?, unit, &control);
            // Without a thread all is hashed at the end.
            let thread = std::thread::Builder::new().name("hash".into()).spawn(work);
            self.thread = thread.inspect_err(|e| log::warn!("no thread to hash with: {e}")).ok();
        }
    }

    /// Ends it, and gives what holds of the complete image that QEMU has closed. Whatever is odd leads to a
    /// hash of the whole.
    ///
    /// # Errors
    /// What `stop` says.
    pub(crate) fn end(mut self, stop: &Check) -> Result<KnownSubtrees> {
        self.control.change(|now| now.over = true);
        let Some(thread) = self.thread.take() else { return Ok(KnownSubtrees::default()) };
        let crashed = |_| Err(Error::new(Kind::Io, "the thread has crashed"));
        let known = thread.join().unwrap_or_else(crashed).and_then(|units| {
            certain(&OpenFile::new(&self.file, &self.path)?, self.unit, &units, stop)
        });
        known.or_else(|e| {
            stop()?;
            log::info!(
                "hashes computed during the copy are not used: {}",
                e.at_path(&self.path).report()
            );
            Ok(KnownSubtrees::default())
        })
    }
}

impl Drop for AheadHasher {
    fn drop(&mut self) {
        // The thread is not waited for: it may be reading from a disk that does not answer.
        self.control.change(|now| now.over = true);
    }
}

/// Until it is over. Whoever copies, and the guest, go first: what is not done in time is done at the end.
fn hash_units(image: &dyn ReadAt, unit: u64, control: &HasherControl) -> Result<Vec<Unit>> {
    // SAFETY: setpriority has no preconditions. Here 0 is this thread, and a failure changes nothing.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) };
    let mut units = Vec::new();
    let mut end = unit;
    while let Some(mark) = control.wait(end) {
        let value = subtrees::hash_unit(image, unit, units.len() as u64)?;
        units.push(Unit { value, guest: mark.guest });
        end = end.saturating_add(unit);
    }
    Ok(units)
}

/// Which of the first `units` of the finished image still have the value that they were given.
fn certain(image: &dyn ReadAt, unit: u64, units: &[Unit], stop: &Check) -> Result<KnownSubtrees> {
    let mut counts = PieceCounts::default();
    plain::clusters(image, stop, |c| counts.note(c, unit, units))?;
    let whole = unit / counts.piece.max(1);
    let values = units.iter().enumerate().map(|(i, u)| {
        let count = counts.counts.get(i).copied().unwrap_or(0);
        (u64::from(count) == whole).then_some(u.value)
    });
    let known = KnownSubtrees::new(unit, values.collect());
    log::info!(
        "{} of {} hashes computed during the copy are still valid",
        known.count(),
        units.len()
    );
    Ok(known)
}

/// What the tables have shown so far.
#[derive(Default)]
struct PieceCounts {
    /// Bytes of a piece: those of a cluster, or of a unit if that is smaller.
    piece: u64,
    /// A bit for each piece: one that two claim makes all uncertain.
    claimed: Vec<u64>,
    /// How many pieces of each unit are certain.
    counts: Vec<u32>,
}

impl PieceCounts {
    fn note(&mut self, cluster: Cluster, unit: u64, units: &[Unit]) -> Result<()> {
        self.piece = cluster.len.min(unit);
        let pieces = (units.len() as u64).saturating_mul(unit / self.piece);
        if pieces > MOST_PIECES {
            return Err(Error::new(Kind::Unsupported, "too many clusters"));
        }
        self.counts.resize(units.len(), 0);
        self.claimed.resize(pieces.div_ceil(64) as usize, 0);
        let first = cluster.host / self.piece;
        (first..first + cluster.len / self.piece).try_for_each(|at| {
            let index = (at / (unit / self.piece)) as usize;
            let (Some(u), Some(count)) = (units.get(index), self.counts.get_mut(index)) else {
                return Ok(());
            };
            let Some(word) = self.claimed.get_mut((at / 64) as usize) else { return Ok(()) };
            let bit = 1 << (at % 64);
            if *word & bit != 0 {
                return Err(Error::new(Kind::Corrupt, "two guest offsets share a cluster"));
            }
            *word |= bit;
            *count += u32::from(cluster.guest_end <= u.guest);
            Ok(())
        })
    }
}

/// The barriers of a disk.
#[derive(Debug)]
pub(crate) struct Barriers {
    pub(in crate::backup) hasher: AheadHasher,
    pub(in crate::backup) every: u64,
    /// How long the image was at the last one.
    pub(in crate::backup) last: u64,
    /// The job was paused by us and is not resumed yet: until when it is waited for.
    pub(in crate::backup) paused: Option<Instant>,
}

impl Barriers {
    /// What was hashed.
    pub(in crate::backup) fn hasher(self) -> AheadHasher {
        self.hasher
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{MemStorage, SourceFile};

    const C: usize = 65536;
    const UNIT: u64 = 1 << 20;
    /// Clusters of the disk.
    const DISK: usize = 200;

    /// splitmix64.
    struct Rng(u64);

    impl Rng {
        fn below(&mut self, n: u64) -> u64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.0;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            (z ^ (z >> 31)) % n
        }
    }

    /// A QEMU that copies a disk: several writes at a time, each of which may fail, which frees its
    /// cluster; the next one that needs a cluster gets the lowest that is free, or one behind (as if it
    /// needed several in a row).
    struct Qemu {
        rng: Rng,
        file: Vec<u8>,
        free: Vec<bool>,
        /// Where each guest cluster is; 0: zeros.
        place: Vec<Option<usize>>,
        highest: usize,
        failed: u32,
    }

    impl Qemu {
        fn new(seed: u64) -> Self {
            // Header, refcounts, the L1 table.
            let (file, free) = (vec![0; 4 * C], vec![false; 4]);
            let place = vec![None; DISK];
            Qemu { rng: Rng(seed), file, free, place, highest: 0, failed: 0 }
        }

        fn take(&mut self) -> usize {
            let lowest = self.free.iter().position(|f| *f).filter(|_| self.rng.below(3) == 0);
            let at = lowest.unwrap_or(self.free.len());
            self.free.resize(self.free.len().max(at + 1), false);
            self.free[at] = false;
            at
        }

        fn fill(&mut self, at: usize) {
            self.file.resize(self.file.len().max((at + 1) * C), 0);
            let byte = self.rng.below(256) as u8;
            self.file[at * C..(at + 1) * C].fill(byte);
        }

        /// Some writes from the first byte that is missing on, which end in any order. (A table is made
        /// in between, sometimes, and is written at the end.)
        fn copy(&mut self, tables: &mut Vec<usize>) {
            let missing = (0..DISK).filter(|g| self.place[*g].is_none());
            let mut under_way: Vec<(usize, usize)> = Vec::new();
            for g in missing.take(1 + self.rng.below(8) as usize).collect::<Vec<_>>() {
                if self.rng.below(40) == 0 {
                    tables.push(self.take());
                }
                let zero = self.rng.below(16) == 0;
                under_way.push((g, if zero { 0 } else { self.take() }));
            }
            while !under_way.is_empty() {
                let i = self.rng.below(under_way.len() as u64) as usize;
                let (g, at) = under_way.swap_remove(i);
                self.highest = self.highest.max(g + 1);
                if at > 0 {
                    self.fill(at);
                }
                if self.rng.below(12) > 0 {
                    self.place[g] = Some(at);
                } else if at > 0 {
                    self.failed += 1;
                    self.free[at] = true;
                }
            }
        }

        /// What is certain now, if anything is.
        fn mark(&self) -> Option<CopyMark> {
            let copied = self.place.iter().flatten().count();
            let (guest, length) = ((copied * C) as u64, self.file.len() as u64);
            (copied == self.highest).then_some(CopyMark { guest, length })
        }

        /// Writes the tables: the image is closed.
        fn close(&mut self, tables: &[usize]) {
            tables.iter().for_each(|t| self.fill(*t));
            let l2 = tables[0];
            self.file[l2 * C..(l2 + 1) * C].fill(0);
            for (g, at) in self.place.iter().enumerate() {
                let entry = match at {
                    Some(at) if *at > 0 => (1 << 63) | (at * C) as u64,
                    _ => 1,
                };
                let to = l2 * C + g * 8;
                self.file[to..to + 8].copy_from_slice(&entry.to_be_bytes());
            }
            let mut put =
                |at: usize, v: u64| self.file[at..at + 8].copy_from_slice(&v.to_be_bytes());
            put(0, u64::from_be_bytes(*b"QFI\xfb\0\0\0\x03"));
            put(16, 16);
            put(24, (DISK * C) as u64);
            put(32, 1);
            put(40, 3 * C as u64);
            put(48, C as u64);
            put(56, 1 << 32);
            put(96, (4 << 32) | 104);
            put(3 * C, (1 << 63) | (l2 * C) as u64);
        }
    }

    /// A reader at any time, as far behind as it likes.
    fn read_some(q: &mut Qemu, mark: CopyMark, units: &mut Vec<Unit>) {
        for _ in 0..q.rng.below(3) {
            let index = units.len() as u64;
            if (index + 1) * UNIT <= mark.length {
                let now = MemStorage::new("now", q.file.clone());
                let value = subtrees::hash_unit(&now, UNIT, index).unwrap();
                units.push(Unit { value, guest: mark.guest });
            }
        }
    }

    /// The hash of the finished file with what was hashed ahead, and of how many units that was.
    fn finish(file: &[u8], units: &[Unit]) -> Result<(String, u64)> {
        let image = MemStorage::new("image", file.to_vec());
        let known = certain(&image, UNIT, units, &|| Ok(()))?;
        let on_disk = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(on_disk.path(), file).unwrap();
        let source = SourceFile::look(on_disk.path()).unwrap();
        let hash = crate::hash::rest_with(&source, &known, 2, &|| Ok(())).unwrap();
        Ok((hash, known.count()))
    }

    /// However long QEMU makes it: for each unit that is hashed something is kept.
    #[test]
    fn no_more_is_hashed_ahead_than_the_longest_image_of_the_disk() {
        let file = Arc::new(tempfile::tempfile().unwrap());
        let mut hasher = AheadHasher::new(file, "image".into(), 1 << 20);
        let longest = hasher.longest;
        hasher.go_on(CopyMark { guest: 0, length: u64::MAX });
        assert!((1 << 20..1 << 30).contains(&longest));
        assert_eq!(hasher.control.now().mark.length, longest);
    }

    #[test]
    fn whatever_qemu_does_the_hash_is_that_of_the_file() {
        let (mut used, mut failed, mut stale) = (0, 0, 0);
        for seed in 0..30 {
            let mut q = Qemu::new(seed);
            let mut tables = vec![q.take()];
            let (mut units, mut mark) = (Vec::new(), CopyMark::default());
            while q.place.iter().any(Option::is_none) {
                q.copy(&mut tables);
                if q.rng.below(3) == 0 {
                    mark = q.mark().unwrap_or(mark);
                }
                read_some(&mut q, mark, &mut units);
            }
            q.close(&tables);
            let image = MemStorage::new("image", q.file.clone());
            let changed = |(i, u): &(usize, &Unit)| {
                subtrees::hash_unit(&image, UNIT, *i as u64).unwrap() != u.value
            };
            stale += units.iter().enumerate().filter(changed).count();
            let (hash, count) = finish(&q.file, &units).unwrap();
            assert_eq!(hash, blake3::hash(&q.file).to_hex().to_string(), "seed {seed}");
            (used, failed) = (used + count, failed + q.failed);
        }
        // It was about something.
        assert!(used > 30 && failed > 30 && stale > 30, "{used} {failed} {stale}");
    }

    #[test]
    fn a_cluster_that_two_guest_offsets_share_makes_all_uncertain() {
        let mut q = Qemu::new(1);
        let mut tables = vec![q.take()];
        while q.place.iter().any(Option::is_none) {
            q.copy(&mut tables);
        }
        let units = |q: &Qemu| -> Vec<Unit> {
            let image = MemStorage::new("image", q.file.clone());
            let unit = |i| subtrees::hash_unit(&image, UNIT, i).unwrap();
            (0..q.file.len() as u64 / UNIT)
                .map(|i| Unit { value: unit(i), guest: u64::MAX })
                .collect()
        };
        q.close(&tables);
        assert!(finish(&q.file, &units(&q)).unwrap().1 > 4);
        let data: Vec<usize> = (0..DISK).filter(|g| q.place[*g] > Some(0)).collect();
        q.place[data[3]] = q.place[data[9]];
        q.close(&tables);
        assert!(finish(&q.file, &units(&q)).is_err());
    }

    /// The thread, from beginning to end, and a file that becomes shorter.
    #[test]
    fn a_thread_hashes_as_far_as_it_may() {
        let mut q = Qemu::new(2);
        let mut tables = vec![q.take()];
        while q.place.iter().any(Option::is_none) {
            q.copy(&mut tables);
        }
        q.close(&tables);
        let on_disk = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(on_disk.path(), &q.file).unwrap();
        let begin = || {
            let file = Arc::new(std::fs::File::open(on_disk.path()).unwrap());
            AheadHasher::new(file, on_disk.path().to_path_buf(), (DISK * C) as u64)
        };
        let length = q.file.len() as u64;
        let hasher = begin();
        assert_eq!(hasher.end(&|| Ok(())).unwrap().count(), 0);
        let mut hasher = begin();
        hasher.go_on(CopyMark { guest: u64::MAX, length: UNIT - 1 });
        assert!(hasher.thread.is_none());
        hasher.go_on(CopyMark { guest: u64::MAX, length: u64::MAX });
        // It comes to the end of the file, which is not that long.
        while !hasher.thread.as_ref().unwrap().is_finished() {
            std::thread::yield_now();
        }
        assert_eq!(hasher.end(&|| Ok(())).unwrap().count(), 0);
        let mut hasher = begin();
        hasher.go_on(CopyMark { guest: u64::MAX, length });
        let control = hasher.control.clone();
        drop(hasher);
        assert!(control.wait(u64::MAX).is_none());
    }
}
