//! The descriptors of all [`super::SourceFile`]s of the process: so many at a time, however many
//! files there are.
//!
//! State: `pinned`, how many files somebody has asked to be kept open (until they let go of them);
//! and a least-recently-used list of those that are open for nobody in particular, which are closed
//! to make room. A file that was read since it came to the head of the list gets a second chance.
//! Pinned files leave room for a working set, so that reading goes on whatever is pinned.
//!
//! Readers find an open file without a lock (`Slot::get`). The lock is never held while a file is
//! opened or closed: the storage may not answer. (What is about to be closed counts until it is: [`super::closing`].) What was written to a file, and may not be on disk, is
//! seen to before it is closed ([`BeforeClose`]).

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use arc_swap::{ArcSwapOption, Guard};
use lru::LruCache;

use super::closing::{self, CLOSING};

/// Descriptors for everything that is not in here: the kernel's side of the mount, watches, folders
/// that are being looked at.
const SPARE: u64 = 64;
/// More than this are never kept open: each costs the kernel memory.
const MOST: u64 = 1 << 20;
/// Of a limit this small everybody gets a half.
const FEWEST: u64 = 8;

/// What is to be done with a file before its descriptor goes.
pub(crate) trait BeforeClose: std::fmt::Debug + Send + Sync {
    /// Called without any lock of the list's, by whoever lets go of the file last.
    fn before_close(&self, file: &File);
}

/// An open file.
#[derive(Debug)]
pub struct Opened {
    file: File,
    used: AtomicBool,
    last: Option<Arc<dyn BeforeClose>>,
}

impl Drop for Opened {
    fn drop(&mut self) {
        if let Some(last) = &self.last {
            last.before_close(&self.file);
        }
    }
}

impl Deref for Opened {
    type Target = File;

    fn deref(&self) -> &File {
        // Reading first: the line stays shared between the threads' caches.
        if !self.used.load(Ordering::Relaxed) {
            self.used.store(true, Ordering::Relaxed);
        }
        &self.file
    }
}

/// Where one file's descriptor is while it is open.
#[derive(Debug)]
pub struct Slot {
    id: u64,
    open: ArcSwapOption<Opened>,
    /// How often it is pinned; changed under the pool's lock only.
    pins: AtomicU64,
    last: Option<Arc<dyn BeforeClose>>,
}

impl Slot {
    /// Of a file that is not open.
    pub(super) fn new() -> Arc<Self> {
        Self::with(None)
    }

    /// Of a file that is not open, and with which `last` has something to do each time before it is closed.
    pub(crate) fn with(last: Option<Arc<dyn BeforeClose>>) -> Arc<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        Arc::new(Slot { id, open: ArcSwapOption::empty(), pins: AtomicU64::new(0), last })
    }

    /// Of a file that is open and stays so: nothing says how to open it again.
    pub(crate) fn fixed(file: File) -> Arc<Self> {
        let slot = Self::new();
        slot.open.store(Some(slot.opened(file)));
        // Pinned by itself, so that nobody is the last.
        slot.pins.store(1, Ordering::Relaxed);
        slot
    }

    /// The file, if it is open.
    pub(crate) fn get(&self) -> Guard<Option<Arc<Opened>>> {
        self.open.load()
    }

    /// Takes in a file that was just opened. If another thread was faster, the result is its own.
    pub(crate) fn put(self: &Arc<Self>, file: File) -> Arc<Opened> {
        let mut pool = pool();
        if let Some(other) = self.open.load_full() {
            drop(pool);
            return other;
        }
        let opened = self.opened(file);
        self.open.store(Some(opened.clone()));
        if self.pins.load(Ordering::Relaxed) == 0 {
            pool.list.put(self.id, self.clone());
        }
        let closed = pool.make_room();
        drop(pool);
        drop(closed);
        opened
    }

    /// Closes it, whoever pins it.
    pub(crate) fn close(&self) {
        let mut pool = pool();
        pool.list.pop(&self.id);
        let mut closed = Closed::default();
        self.take_to(&mut closed);
        drop(pool);
        drop(closed);
    }

    /// Takes the file out, if it is open.
    fn take_to(&self, closed: &mut Closed) {
        if let Some(file) = self.open.swap(None) {
            closed.push(file);
        }
    }

    fn opened(&self, file: File) -> Arc<Opened> {
        Arc::new(Opened { file, used: AtomicBool::new(false), last: self.last.clone() })
    }
}

/// Files that are out of their slots, and closed where this is dropped.
pub(crate) type Closed = closing::Closed<Arc<Opened>>;

struct Pool {
    /// All files together.
    limit: usize,
    pinned: usize,
    /// Open and not pinned.
    list: LruCache<u64, Arc<Slot>>,
}

fn pool() -> MutexGuard<'static, Pool> {
    static POOL: LazyLock<Mutex<Pool>> = LazyLock::new(|| {
        Mutex::new(Pool { limit: limit(0), pinned: 0, list: LruCache::unbounded() })
    });
    POOL.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How many files of backups may be open, if `others` descriptors more are needed for other things.
fn limit(others: u64) -> usize {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: a valid pointer.
    let known = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) } == 0;
    let all = if known { limit.rlim_cur.min(MOST) } else { 1024 };
    let files = all.saturating_sub(SPARE.saturating_add(others)).max(all / 2).max(FEWEST);
    usize::try_from(files).unwrap_or(usize::MAX)
}

/// What all pinned files leave to the others.
fn working_set(limit: usize) -> usize {
    (limit / 4).min(64)
}

impl Pool {
    fn pin_limit(&self) -> usize {
        self.limit - working_set(self.limit)
    }

    /// Takes the files that are too many out of their slots.
    fn make_room(&mut self) -> Closed {
        let room = self.limit.saturating_sub(self.pinned).max(working_set(self.limit));
        let mut closed = Closed::default();
        // Each gets at most one second chance per call, so this ends.
        let mut chances = self.list.len();
        while self.list.len() > room
            && let Some((id, slot)) = self.list.pop_lru()
        {
            let used = |o: &Arc<Opened>| o.used.swap(false, Ordering::Relaxed);
            if chances > 0 && slot.open.load().as_ref().is_some_and(used) {
                chances -= 1;
                self.list.put(id, slot);
                continue;
            }
            slot.take_to(&mut closed);
        }
        closed
    }
}

/// Takes note of the limit of open files as it is now, and that `others` descriptors are needed for
/// other things than the files of backups.
pub(crate) fn set_limit(others: u64) {
    pool().limit = limit(others);
}

/// Takes descriptors out of what the files of backups may have, for files that stay open: an eighth, and no more than
/// `most`, for as long as the limit is what it is. How many, at least 1.
pub(crate) fn set_aside(most: usize) -> usize {
    let mut pool = pool();
    let part = (pool.limit / 8).clamp(1, most.max(1));
    pool.limit -= part;
    part
}

/// Waits until what is pinned can be opened: what was pinned before may not be closed yet. Not for ever, since its
/// storage may not answer.
pub(crate) fn wait_for_room() {
    let (pinned, limit) = {
        let pool = pool();
        (pool.pinned, pool.pin_limit())
    };
    CLOSING.wait(|closing| closing == 0 || pinned + closing <= limit);
}

/// Opens a file. Where there are no descriptors left, some files that nobody pins are closed, or those that others
/// are closing waited for.
///
/// # Errors
/// Those of `open`.
pub(crate) fn open_with_room<T>(open: impl Fn() -> io::Result<T>) -> io::Result<T> {
    loop {
        match open() {
            Err(e) if is_too_many(&e) && (shed() || CLOSING.wait_for_one()) => {}
            result => return result,
        }
    }
}

/// Whether a file could not be opened because there are no descriptors left.
pub(crate) fn is_too_many(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EMFILE | libc::ENFILE))
}

/// How many files can be pinned at a time.
pub(crate) fn pin_limit() -> usize {
    pool().pin_limit()
}

/// Pins all of `slots` or, if `false`, none: they would be more than may be pinned. What is pinned
/// stays open from the next time on that it is opened, until [`unpin`].
pub(crate) fn pin<'a>(slots: impl Iterator<Item = &'a Arc<Slot>> + Clone) -> bool {
    let mut pool = pool();
    let mut new = 0;
    for slot in slots.clone() {
        new += usize::from(slot.pins.fetch_add(1, Ordering::Relaxed) == 0);
    }
    if pool.pinned + new > pool.pin_limit() {
        for slot in slots {
            slot.pins.fetch_sub(1, Ordering::Relaxed);
        }
        return false;
    }
    pool.pinned += new;
    for slot in slots {
        pool.list.pop(&slot.id);
    }
    let closed = pool.make_room();
    drop(pool);
    drop(closed);
    true
}

/// Undoes [`pin`]. Files that nobody pins any more are to be closed: drop the result.
pub(crate) fn unpin<'a>(slots: impl Iterator<Item = &'a Arc<Slot>>) -> Closed {
    let mut pool = pool();
    let mut closed = Closed::default();
    for slot in slots {
        if slot.pins.fetch_sub(1, Ordering::Relaxed) == 1 {
            pool.pinned -= 1;
            slot.take_to(&mut closed);
        }
    }
    closed
}

/// Closes all files that nobody pins.
pub(crate) fn close_unpinned() {
    drop(take_unpinned(usize::MAX));
}

/// Closes some that nobody pins, because there are no descriptors left; whether there was one.
fn shed() -> bool {
    const SOME: usize = 8;
    !take_unpinned(SOME).is_empty()
}

fn take_unpinned(most: usize) -> Closed {
    let mut pool = pool();
    let mut closed = Closed::default();
    for _ in 0..most.min(pool.list.len()) {
        if let Some((_, slot)) = pool.list.pop_lru() {
            slot.take_to(&mut closed);
        }
    }
    closed
}
