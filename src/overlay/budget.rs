//! How much all overlays of a mount may take together, and how much memory the maps of all in this process.

use std::iter::Sum;
use std::ops::Add;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Memory for the maps of all overlays of a process, in bytes. Whoever writes or discards one block in each 16 MiB of a
/// disk has it grow by some 1 KiB each time, and by nothing if he comes there again: it is enough for 2 TiB in which
/// every 16 MiB were touched.
const MOST_MAPS: u64 = 128 << 20;

static MAPS: Limit = Limit::new(MOST_MAPS);

/// What a change takes, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Cost {
    /// On disk: of data and of the map.
    pub disk: u64,
    /// In memory: of the map.
    pub memory: u64,
}

impl Cost {
    /// Of data, which takes no memory.
    pub(super) fn of_data(disk: u64) -> Self {
        Cost { disk, memory: 0 }
    }

    /// What is left of it.
    pub(super) fn less(self, other: Cost) -> Self {
        Cost {
            disk: self.disk.saturating_sub(other.disk),
            memory: self.memory.saturating_sub(other.memory),
        }
    }
}

impl Add for Cost {
    type Output = Cost;

    fn add(self, other: Cost) -> Cost {
        Cost { disk: self.disk + other.disk, memory: self.memory + other.memory }
    }
}

impl Sum for Cost {
    fn sum<I: Iterator<Item = Cost>>(all: I) -> Cost {
        all.fold(Cost::default(), Cost::add)
    }
}

/// Of what there is no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Full {
    /// Room that overlays may take on disk.
    Disk,
    /// Memory for their maps.
    Memory,
}

/// The limits of a mount. What is taken before anything is written is never more than they are.
#[derive(Debug)]
pub(crate) struct Budget {
    disk: Limit,
    maps: &'static Limit,
    /// Whether somebody was told that there is no more memory for maps.
    told: AtomicBool,
}

impl Budget {
    /// So many bytes on disk; the memory for maps is shared with all others of the process.
    pub(crate) fn new(limit: u64) -> Self {
        Budget { disk: Limit::new(limit), maps: &MAPS, told: AtomicBool::new(false) }
    }

    /// With so much memory for maps of its own.
    #[cfg(test)]
    pub(super) fn with_memory(limit: u64, memory: u64) -> Self {
        Budget { maps: Box::leak(Box::new(Limit::new(memory))), ..Budget::new(limit) }
    }

    /// The limit on disk in bytes.
    pub(crate) fn limit(&self) -> u64 {
        self.disk.most
    }

    /// Bytes that are taken on disk.
    pub(crate) fn used(&self) -> u64 {
        self.disk.used()
    }

    /// Bytes that maps may take in memory, and those that they take.
    pub(super) fn memory(&self) -> (u64, u64) {
        (self.maps.most, self.maps.used())
    }

    /// Takes so much, if there is as much.
    ///
    /// # Errors
    /// Of what there is less; then nothing was taken.
    pub(super) fn take(&self, cost: Cost) -> Result<(), Full> {
        if !self.maps.take(cost.memory) {
            return Err(Full::Memory);
        }
        if !self.disk.take(cost.disk) {
            self.maps.give(cost.memory);
            return Err(Full::Disk);
        }
        Ok(())
    }

    /// Takes what is there already, whatever the limits: then there is no room for more.
    pub(super) fn take_anyway(&self, cost: Cost) {
        self.disk.take_anyway(cost.disk);
        self.maps.take_anyway(cost.memory);
    }

    /// Gives so much back.
    pub(super) fn give(&self, cost: Cost) {
        self.disk.give(cost.disk);
        self.maps.give(cost.memory);
    }

    /// Whether this is the first time that somebody asks: what holds for each write is told once.
    pub(super) fn tells_first(&self) -> bool {
        !self.told.swap(true, Ordering::SeqCst)
    }
}

/// A limit, and how much of it is taken.
#[derive(Debug)]
struct Limit {
    most: u64,
    used: AtomicU64,
}

impl Limit {
    const fn new(most: u64) -> Self {
        Limit { most, used: AtomicU64::new(0) }
    }

    fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    fn take(&self, bytes: u64) -> bool {
        // What takes nothing is no matter of a limit that was passed.
        let fits = |all: &u64| bytes == 0 || *all <= self.most;
        let more = |used: u64| used.checked_add(bytes).filter(fits);
        self.used.fetch_update(Ordering::SeqCst, Ordering::SeqCst, more).is_ok()
    }

    fn take_anyway(&self, bytes: u64) {
        let more = |used: u64| Some(used.saturating_add(bytes));
        let _ = self.used.fetch_update(Ordering::SeqCst, Ordering::SeqCst, more);
    }

    fn give(&self, bytes: u64) {
        let less = |used: u64| Some(used.saturating_sub(bytes));
        let _ = self.used.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less);
    }
}
