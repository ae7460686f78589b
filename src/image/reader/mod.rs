//! [`Image`]: a point's bytes by position.
//!
//! State: the layers, shared with the images of the points below and opened on first use; one
//! atomic slot per window of guest offsets. A read loads its window's slot, walks the extents that
//! it needs and preads each; it takes no lock and allocates nothing unless a unit has to be
//! decompressed. A missing window is merged under a lock of its own (striped), starting from the
//! nearest parent point that still has the same window.
//!
//! Once one layer is seen to have changed, every further read fails: bytes of two generations are
//! never mixed.

mod changes;
mod differences;
mod lookahead;
mod range_kind;
mod read;
mod search;
mod stack;

pub use self::changes::{Change, RangeContent};
pub use self::range_kind::RangeKind;
use stack::{Chunk, Stack};

use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use super::cache::{Cache, SlotGroup};
use super::lazy::LazyLayer;
use super::map::{KnownParent, LayerMerge, MergedExtent};
use super::window::Window;
use crate::error::{Error, Finding, Kind, Result};
use crate::job::each::each;
use crate::layer::LayerSpec;
use crate::storage::{ReadAt, SourceFile};

/// Guest bytes that are merged at once. 64 MiB of 64 KiB clusters are at most 1,024 extents.
const WINDOW: u64 = 64 << 20;
/// More windows than this are never made: a hostile image may claim exabytes.
const MAX_WINDOWS: u64 = 1 << 20;
/// Locks that keep two threads from merging the same window at the same time.
const MERGE_LOCKS: usize = 16;
/// Findings kept per image.
const MAX_FINDINGS: usize = 256;
/// No image format that is read maps less than a sector in one piece.
const SMALLEST_UNIT: u64 = 512;

/// One point of one disk as a readable image.
pub struct Image {
    id: u64,
    size: u64,
    window_size: u64,
    /// Number of layers, with those below.
    depth: usize,
    /// The point this one depends on; its layers come below ours.
    pub(super) below: Option<Arc<Image>>,
    /// The layers this point adds, bottom first.
    pub(super) own: Vec<Arc<LazyLayer>>,
    /// Whether one of all layers may take long to open.
    slow: bool,
    /// Number of files, with those below.
    pub(super) files: usize,
    /// How many hold the files open, and whether all are open for them: see [`super::held_point`].
    pub(super) holders: AtomicUsize,
    pub(super) files_open: AtomicBool,
    /// All layers, bottom first; gathered on first use.
    stack: OnceLock<Stack>,
    /// The chunks of all stacks above that end with the own layers.
    chunks: OnceLock<Box<[Chunk]>>,
    /// Allocated on first use: thousands of points may each claim exabytes.
    groups: OnceLock<Box<[OnceLock<Arc<SlotGroup>>]>>,
    merge_locks: [Mutex<()>; MERGE_LOCKS],
    pub(super) cache: Arc<Cache>,
    changed: AtomicBool,
    findings: Mutex<Vec<Finding>>,
    /// Whether whoever reads it tells of each range that is bad.
    is_told_elsewhere: AtomicBool,
}

impl Image {
    /// An image of `size` bytes made of `own` layers (bottom first) over the point `below`. No
    /// file is opened before the first read.
    ///
    /// # Errors
    /// `Unsupported` if there are more than 65,535 layers, `Incomplete` if there is none.
    pub fn new(
        size: u64,
        own: &[LayerSpec],
        below: Option<Arc<Image>>,
        cache: &Arc<Cache>,
    ) -> Result<Arc<Self>> {
        let lazy = |spec: &LayerSpec| Arc::new(LazyLayer::new(cache.new_id(), spec.clone()));
        let depth = below.as_ref().map_or(0, |b| b.depth()) + own.len();
        if depth == 0 {
            return Err(Error::new(Kind::Incomplete, "a point needs at least one layer"));
        }
        if depth > usize::from(u16::MAX) {
            return Err(Error::new(Kind::Unsupported, "a chain of more than 65,535 layers")
                .remedy("consolidate the chain"));
        }
        let window_size = size.div_ceil(MAX_WINDOWS).next_power_of_two().max(WINDOW);
        Ok(Arc::new(Image {
            id: cache.new_id(),
            size,
            window_size,
            depth,
            own: own.iter().map(lazy).collect(),
            slow: own.iter().any(LazyLayer::is_slow) || below.as_ref().is_some_and(|b| b.slow),
            files: own.iter().map(|l| 1 + usize::from(l.data_file.is_some())).sum::<usize>()
                + below.as_ref().map_or(0, |b| b.files),
            holders: AtomicUsize::new(0),
            files_open: AtomicBool::new(false),
            below,
            stack: OnceLock::new(),
            chunks: OnceLock::new(),
            groups: OnceLock::new(),
            merge_locks: Default::default(),
            cache: cache.clone(),
            changed: AtomicBool::new(false),
            findings: Mutex::new(Vec::new()),
            is_told_elsewhere: AtomicBool::new(false),
        }))
    }

    /// Size in bytes of the virtual disk.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Number of layers.
    pub fn depth(&self) -> usize {
        self.depth
    }

    /// The file behind layer `index` (counted from the bottom), for messages and `map`.
    pub fn layer_path(&self, index: u16) -> &Path {
        self.stack()[usize::from(index)].spec.file.path()
    }

    /// The same for file number `file` of the layer (its external data file is 1).
    pub fn file_path(&self, index: u16, file: u8) -> &Path {
        let spec = &self.stack()[usize::from(index)].spec;
        match (&spec.data_file, file) {
            (Some(data), 1) => data.path(),
            _ => spec.file.path(),
        }
    }

    /// The file that [`super::Source::Data`] of layer `index` and file number `file` gives offsets in, for
    /// cloning ranges of it; `None` if they are offsets in something else (an archive's unpacked
    /// copy).
    ///
    /// # Errors
    /// The layer cannot be opened.
    pub fn source_file(&self, index: u16, file: u8) -> Result<Option<&SourceFile>> {
        match self.stack().get(usize::from(index)) {
            Some(lazy) => Ok(lazy.get()?.storage(file).as_file()),
            None => Ok(None),
        }
    }

    /// Opens all layers, and checks of each what leads to everything else: header and first-level
    /// table, and no more.
    ///
    /// # Errors
    /// A layer cannot be opened, or is bad there.
    pub fn open_layers(&self) -> Result<()> {
        let open = |lazy: &&Arc<LazyLayer>| {
            lazy.get()?.check_top()?;
            self.check_layer(lazy)
        };
        let layers: Vec<_> = self.stack().from(0).collect();
        each(&layers, open).into_iter().collect()
    }

    /// Whether reading in `range` has to wait until a layer is opened that takes long, such as an
    /// archive that has to be unpacked first.
    pub fn must_wait(&self, range: Range<u64>) -> bool {
        if !self.slow || range.is_empty() {
            return false;
        }
        let last = (range.end - 1) / self.window_size;
        let mut windows = range.start / self.window_size..=last;
        self.stack().from(0).any(|l| l.opens_slowly())
            && windows.any(|w| self.cached_window(w).is_none())
    }

    /// Marks the image as one of an old generation: every later read fails with `Changed`.
    pub fn mark_changed(&self) {
        self.changed.store(true, Ordering::Release);
    }

    /// What was found bad so far, each once.
    pub fn findings(&self) -> Vec<Finding> {
        self.findings.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// Logs no findings from now on: whoever reads tells of each range that is bad, and nobody wants to read it twice.
    pub fn log_no_findings(&self) {
        self.is_told_elsewhere.store(true, Ordering::Relaxed);
    }

    /// Why the range that begins at `start`, which is [`super::Source::Bad`] by layer `index`, cannot be read.
    pub fn why_bad(&self, index: u16, start: u64) -> Option<Finding> {
        let layer = self.stack().get(usize::from(index))?.get().ok()?;
        let end = layer.size().min(start.saturating_add(SMALLEST_UNIT));
        if start >= end {
            return None;
        }
        layer.map(start..end).findings.into_iter().next()
    }

    /// Bytes that are not holes, or `None` as long as not every window has been merged once.
    pub fn data_bytes(&self) -> Option<u64> {
        let mut total = 0;
        for index in 0..self.size.div_ceil(self.window_size) {
            let group = self.groups.get()?.get((index / 64) as usize)?.get()?;
            let window = group.slots[(index % 64) as usize].load();
            let data = window.as_ref()?.extents().iter().filter(|e| !e.content.is_hole());
            total += data.map(|e| e.len).sum::<u64>();
        }
        Some(total)
    }

    /// Fills `buf` with the bytes at `offset`, which must be inside the disk.
    ///
    /// # Errors
    /// One bad byte fails the whole call, with the file and offset to blame; `Changed` if a layer
    /// is no longer what it was.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.check_inside(offset, buf.len() as u64)?;
        let end = offset + buf.len() as u64;
        let mut rest = buf;
        let mut at = offset;
        while at < end {
            let index = at / self.window_size;
            let stop = end.min((index + 1).saturating_mul(self.window_size));
            let (part, tail) = rest.split_at_mut((stop - at) as usize);
            self.with_window(index, |w| self.read_window(w, part, at))??;
            rest = tail;
            at = stop;
        }
        Ok(())
    }

    fn check_inside(&self, offset: u64, len: u64) -> Result<()> {
        if self.changed.load(Ordering::Acquire) {
            return Err(self.changed_error());
        }
        match offset.checked_add(len) {
            Some(end) if end <= self.size => Ok(()),
            _ => Err(Error::new(Kind::Usage, "reading past the end of the disk")),
        }
    }

    fn changed_error(&self) -> Error {
        Error::new(Kind::Changed, "a file of this point changed while it was open")
            .at_path(self.own.last().map_or(Path::new(""), |l| l.spec.file.path()))
            .remedy("open the point again")
    }

    /// What to report for a failed read: a file that was cut or rewritten meanwhile fails in many
    /// ways, and all of them mean that it changed.
    fn blame(&self, lazy: &LazyLayer, error: Error) -> Error {
        let error =
            self.check_layer(lazy).err().filter(|e| e.kind() == Kind::Changed).unwrap_or(error);
        self.note_error(&error);
        error
    }

    fn check_layer(&self, lazy: &LazyLayer) -> Result<()> {
        let spec = &lazy.spec;
        spec.file
            .check_unchanged()
            .and_then(|()| spec.data_file.as_ref().map_or(Ok(()), |d| d.check_unchanged()))
            .inspect_err(|e| self.note_error(e))
    }

    pub(super) fn note_error(&self, error: &Error) {
        if error.kind() == Kind::Changed {
            // Nothing is wrong with the backup: the next look at it makes another image.
            if !self.changed.swap(true, Ordering::AcqRel) {
                log::warn!("{}", error.report());
            }
            return;
        }
        self.note(Finding::from_error(error, self.layer_path(0)));
    }

    fn note(&self, finding: Finding) {
        let mut findings = self.findings.lock().unwrap_or_else(|e| e.into_inner());
        if findings.len() < MAX_FINDINGS && !findings.contains(&finding) {
            if !self.is_told_elsewhere.load(Ordering::Relaxed) {
                log::error!("{finding}");
            }
            findings.push(finding);
        }
    }

    /// Calls `f` with window `index`, merged now if need be.
    fn with_window<T>(&self, index: u64, f: impl FnOnce(&Window) -> T) -> Result<T> {
        let group = self.group(index);
        let slot = &group.slots[index as usize % SlotGroup::LEN];
        if let Some(window) = &*slot.load() {
            window.touch();
            return Ok(f(window));
        }
        let window = self.merge_window(index, group).inspect_err(|e| self.note_error(e))?;
        Ok(f(&window))
    }

    fn group(&self, index: u64) -> &Arc<SlotGroup> {
        let groups = self.groups.get_or_init(|| {
            let count = self.size.div_ceil(self.window_size).div_ceil(SlotGroup::LEN as u64);
            (0..count).map(|_| OnceLock::new()).collect()
        });
        groups[index as usize / SlotGroup::LEN].get_or_init(Arc::default)
    }

    fn cached_window(&self, index: u64) -> Option<Arc<Window>> {
        let group = self.groups.get()?.get(index as usize / SlotGroup::LEN)?.get()?;
        group.slots[index as usize % SlotGroup::LEN].load_full()
    }

    fn merge_window(&self, index: u64, group: &Arc<SlotGroup>) -> Result<Arc<Window>> {
        let lock = &self.merge_locks[index as usize % MERGE_LOCKS];
        let _guard = lock.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(window) = group.slots[index as usize % SlotGroup::LEN].load_full() {
            return Ok(window);
        }
        let start = index * self.window_size;
        let range = start..self.size.min(start.saturating_add(self.window_size));
        let extents = self.merge_layers(range, index)?;
        let window = Arc::new(Window::new(extents));
        self.cache.insert_window(self.id, index, &window, group);
        Ok(window)
    }

    fn merge_layers(&self, range: Range<u64>, index: u64) -> Result<Box<[MergedExtent]>> {
        let stack = self.stack();
        let mut merge = LayerMerge::new(range);
        let mut asked = stack.len();
        let mut below = self.below.as_deref();
        let mut bottom = stack.len() - self.own.len();
        while asked > 0 && !merge.is_covered() {
            if asked == bottom
                && let Some(image) = below
            {
                if image.window_size == self.window_size
                    && let Some(window) = image.cached_window(index)
                {
                    let known = KnownParent { size: image.size, extents: window.extents() };
                    merge.add_known(&known);
                    break;
                }
                bottom -= image.own.len();
                below = image.below.as_deref();
            }
            asked -= 1;
            merge.add_layer(asked as u16, stack[asked].get()?);
            // Tables read while a file was being changed must not be used, now or through a parent.
            self.check_layer(&stack[asked])?;
        }
        let merged = merge.finish().map_err(|e| e.at_path(self.name()))?;
        merged.findings.into_iter().for_each(|f| self.note(f));
        Ok(merged.extents.into_boxed())
    }

    fn stack(&self) -> &Stack {
        self.stack.get_or_init(|| self.gather())
    }

    /// All layers, from the nearest image below that knows its own.
    fn gather(&self) -> Stack {
        let mut ancestors = vec![self];
        let mut at = self.below.as_deref();
        let mut stack = loop {
            let Some(image) = at else { break Stack::default() };
            if let Some(known) = image.stack.get() {
                break known.clone();
            }
            ancestors.push(image);
            at = image.below.as_deref();
        };
        ancestors.into_iter().rev().for_each(|image| stack.add(&image.own, &image.chunks));
        stack.shrink();
        stack
    }
}

impl ReadAt for Image {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<usize> {
        let n = (buf.len() as u64).min(self.size.saturating_sub(offset)) as usize;
        Image::read_at(self, &mut buf[..n], offset).map_err(std::io::Error::other)?;
        Ok(n)
    }

    fn len(&self) -> u64 {
        self.size
    }

    fn name(&self) -> &Path {
        self.own.last().map_or(Path::new("point"), |l| l.spec.file.path())
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        for (g, group) in self.groups.get().into_iter().flatten().enumerate() {
            let Some(group) = group.get() else { continue };
            for (s, slot) in group.slots.iter().enumerate() {
                if slot.load().is_some() {
                    self.cache.remove_window(self.id, (g * SlotGroup::LEN + s) as u64);
                }
            }
        }
        // A chain of ten thousand points must not be dropped by recursion.
        let mut below = self.below.take();
        while let Some(mut image) = below.and_then(Arc::into_inner) {
            below = image.below.take();
        }
    }
}

#[cfg(test)]
mod tests;
