//! [`Image`]: a point's bytes by position.
//!
//! State: the layers, shared with the images of the points below and opened on first use; one
//! atomic slot per window of guest offsets. A read loads its window's slot, walks the extents that
//! it needs and preads each; it takes no lock and allocates nothing unless a unit has to be
//! decompressed. A missing window is folded under a lock of its own (striped), starting from the
//! nearest parent point that still has the same window.
//!
//! Once one layer is seen to have changed, every further read fails: bytes of two generations are
//! never mixed.

mod ahead;
mod search;

pub use search::Wanted;

use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use super::cache::{Cache, SlotGroup};
use super::lazy::LazyLayer;
use super::map::{Fold, FoldedExtent, Known, Source};
use super::window::Window;
use crate::error::{Error, Finding, Kind, Result};
use crate::layer::LayerSpec;
use crate::storage::{ReadAt, SourceFile};

/// Guest bytes that are folded at once. 64 MiB of 64 KiB clusters are at most 1,024 extents.
const WINDOW: u64 = 64 << 20;
/// More windows than this are never made: a hostile image may claim exabytes.
const MAX_WINDOWS: u64 = 1 << 20;
/// Locks that keep two threads from folding the same window at the same time.
const FOLD_LOCKS: usize = 16;
/// Descriptors that opening a point leaves to everything else.
const SPARE_FILES: u64 = 24;
/// Findings kept per image.
const MAX_FINDINGS: usize = 256;

/// The layers that a read has taken bytes from, each once. Reads go back and forth between a FULL
/// and what lies on it; looking at a file after each piece would cost a tenth of the time.
#[derive(Default)]
struct LayersRead {
    layers: [u16; LayersRead::MOST],
    len: usize,
}

impl LayersRead {
    /// The mount reads 256 KiB at a time: 5 clusters of 64 KiB at most.
    const MOST: usize = 24;

    /// Adds a layer; false if there is no room for it.
    fn add(&mut self, layer: u16) -> bool {
        if self.layers[..self.len].contains(&layer) {
            return true;
        }
        let Some(free) = self.layers.get_mut(self.len) else { return false };
        *free = layer;
        self.len += 1;
        true
    }

    fn iter(&self) -> impl Iterator<Item = u16> {
        self.layers[..self.len].iter().copied()
    }
}

/// One point of one disk as a readable image.
pub struct Image {
    id: u64,
    size: u64,
    window_size: u64,
    /// Number of layers, with those below.
    depth: usize,
    /// The point this one lies on; its layers come below ours.
    below: Option<Arc<Image>>,
    /// The layers this point adds, bottom first.
    own: Vec<Arc<LazyLayer>>,
    /// Whether one of all layers may take long to open.
    slow: bool,
    /// Whether all files are open.
    pinned: AtomicBool,
    /// All layers, bottom first; gathered on first use.
    stack: OnceLock<Box<[Arc<LazyLayer>]>>,
    /// Allocated on first use: thousands of points may each claim exabytes.
    groups: OnceLock<Box<[OnceLock<Arc<SlotGroup>>]>>,
    fold_locks: [Mutex<()>; FOLD_LOCKS],
    cache: Arc<Cache>,
    changed: AtomicBool,
    findings: Mutex<Vec<Finding>>,
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
            pinned: AtomicBool::new(false),
            below,
            stack: OnceLock::new(),
            groups: OnceLock::new(),
            fold_locks: Default::default(),
            cache: cache.clone(),
            changed: AtomicBool::new(false),
            findings: Mutex::new(Vec::new()),
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

    /// The file that [`Source::Data`] of layer `index` and file number `file` gives offsets in, for
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

    /// Opens the files of all layers, without reading them: from now on it does not matter whether
    /// they are removed. Each is opened once, however many images it is part of.
    ///
    /// # Errors
    /// A file is gone, may not be opened, or has changed; or there are more than may be open at a
    /// time, which is said.
    pub fn open_files(&self) -> Result<()> {
        if self.pinned.load(Ordering::Acquire) {
            return Ok(());
        }
        let stack = self.stack();
        let unopened = stack.iter().map(|l| l.unopened()).sum();
        room_for(unopened)
            .map_err(|e| e.at_path(self.name()))
            .and_then(|()| stack.iter().try_for_each(|l| l.open_files()))
            .inspect_err(|e| self.note_error(e))?;
        self.pinned.store(true, Ordering::Release);
        Ok(())
    }

    /// Opens all layers, and checks of each what leads to everything else: header and first-level
    /// table, and no more.
    ///
    /// # Errors
    /// A layer cannot be opened, or is bad there.
    pub fn open_layers(&self) -> Result<()> {
        let open = |lazy: &Arc<LazyLayer>| {
            lazy.get()?.check_top()?;
            self.check_layer(lazy)
        };
        self.stack().iter().try_for_each(open)
    }

    /// Whether reading in `range` has to wait until a layer is opened that takes long, such as an
    /// archive that has to be unpacked first.
    pub fn must_wait(&self, range: Range<u64>) -> bool {
        if !self.slow || range.is_empty() {
            return false;
        }
        let last = (range.end - 1) / self.window_size;
        let mut windows = range.start / self.window_size..=last;
        self.stack().iter().any(|l| l.opens_slowly())
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

    /// Bytes that are not holes, or `None` as long as not every window has been folded once.
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

    /// Fills `buf` with the bytes at `offset`, which must lie inside the disk.
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

    fn read_window(&self, window: &Window, buf: &mut [u8], offset: u64) -> Result<()> {
        let stack = self.stack();
        let mut read_from = LayersRead::default();
        for e in window.clipped(offset..offset + buf.len() as u64) {
            let from = (e.start - offset) as usize;
            let part = &mut buf[from..from + e.len as usize];
            let layer = match e.content {
                Source::Unallocated | Source::Zero { .. } => {
                    part.fill(0);
                    continue;
                }
                Source::Data { layer, .. } | Source::Compressed { layer, .. } => layer,
                Source::Bad { layer } => return Err(self.bad_range(layer, e.start)),
            };
            if !read_from.add(layer) {
                self.check_layers(&read_from)?;
                read_from = LayersRead::default();
                read_from.add(layer);
            }
            let lazy = &stack[usize::from(layer)];
            self.read_extent(lazy, e.content, part).map_err(|err| self.blame(lazy, err))?;
        }
        self.check_layers(&read_from)
    }

    /// After the last read from a layer: makes sure that it was still the same file.
    fn check_layers(&self, read_from: &LayersRead) -> Result<()> {
        let stack = self.stack();
        read_from.iter().try_for_each(|layer| self.check_layer(&stack[usize::from(layer)]))
    }

    fn read_extent(&self, lazy: &LazyLayer, source: Source, part: &mut [u8]) -> Result<()> {
        let layer = lazy.get()?;
        match source {
            Source::Data { file, host, .. } => layer.read_data(file, host, part),
            Source::Compressed { host, len, unit, skip, .. } => {
                let data = self.cache.unit(lazy.id, host, || {
                    let mut out = vec![0; unit as usize];
                    layer.decompress(host, len, &mut out)?;
                    // Bytes of a file that changed meanwhile must not get into the cache.
                    layer.check_unchanged()?;
                    Ok::<_, Error>(Arc::from(out))
                })?;
                let skip = skip as usize;
                let bytes = data.get(skip..skip + part.len()).ok_or_else(|| {
                    Error::new(Kind::Corrupt, "a compressed unit is shorter than its extent")
                        .at_path(layer.path())
                        .at_offset(host)
                })?;
                part.copy_from_slice(bytes);
                Ok(())
            }
            Source::Unallocated | Source::Zero { .. } | Source::Bad { .. } => Ok(()),
        }
    }

    /// What to report for a failed read: a file that was cut or rewritten meanwhile fails in many
    /// ways, and all of them mean that it changed.
    fn blame(&self, lazy: &LazyLayer, error: Error) -> Error {
        let error = self.check_layer(lazy).err().unwrap_or(error);
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

    fn bad_range(&self, layer: u16, at: u64) -> Error {
        // The finding, logged when the window was folded, has file, offset and reason.
        Error::new(Kind::Corrupt, format!("guest offset {at:#x} cannot be read; see the findings"))
            .at_path(self.layer_path(layer))
    }

    fn note_error(&self, error: &Error) {
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
            log::error!("{finding}");
            findings.push(finding);
        }
    }

    /// Calls `f` with window `index`, folded now if need be.
    fn with_window<T>(&self, index: u64, f: impl FnOnce(&Window) -> T) -> Result<T> {
        let group = self.group(index);
        let slot = &group.slots[index as usize % SlotGroup::LEN];
        if let Some(window) = &*slot.load() {
            window.touch();
            return Ok(f(window));
        }
        let window = self.fold_window(index, group).inspect_err(|e| self.note_error(e))?;
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

    fn fold_window(&self, index: u64, group: &Arc<SlotGroup>) -> Result<Arc<Window>> {
        let lock = &self.fold_locks[index as usize % FOLD_LOCKS];
        let _guard = lock.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(window) = group.slots[index as usize % SlotGroup::LEN].load_full() {
            return Ok(window);
        }
        let start = index * self.window_size;
        let range = start..self.size.min(start.saturating_add(self.window_size));
        let extents = self.fold(range, index)?;
        let window = Arc::new(Window::new(extents));
        self.cache.insert_window(self.id, index, &window, group);
        Ok(window)
    }

    fn fold(&self, range: Range<u64>, index: u64) -> Result<Box<[FoldedExtent]>> {
        let stack = self.stack();
        let mut fold = Fold::new(range);
        let mut asked = stack.len();
        let mut below = self.below.as_deref();
        let mut bottom = stack.len() - self.own.len();
        while asked > 0 && !fold.is_covered() {
            if asked == bottom
                && let Some(image) = below
            {
                if image.window_size == self.window_size
                    && let Some(window) = image.cached_window(index)
                {
                    let known = Known { size: image.size, extents: window.extents() };
                    fold.add_known(&known);
                    break;
                }
                bottom -= image.own.len();
                below = image.below.as_deref();
            }
            asked -= 1;
            fold.add_layer(asked as u16, stack[asked].get()?);
        }
        // Tables read while a file was being changed must not be used, now or through a parent.
        for lazy in stack {
            self.check_layer(lazy)?;
        }
        let folded = fold.finish().map_err(|e| e.at_path(self.name()))?;
        folded.findings.into_iter().for_each(|f| self.note(f));
        Ok(folded.extents.into_boxed())
    }

    fn stack(&self) -> &[Arc<LazyLayer>] {
        self.stack.get_or_init(|| {
            let mut parts = vec![&self.own];
            let mut at = self.below.as_deref();
            while let Some(image) = at {
                parts.push(&image.own);
                at = image.below.as_deref();
            }
            parts.into_iter().rev().flatten().cloned().collect()
        })
    }
}

/// Fails if `files` more are too many to be open at a time. Asked before, since what was opened
/// stays open: using up the last descriptors would stop everything else.
fn room_for(files: usize) -> Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: a valid pointer.
    let known = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) } == 0;
    if !known || files == 0 {
        return Ok(());
    }
    let open = crate::folder::system::names(Path::new("/proc/self/fd"));
    let needed = (open.len() as u64).saturating_add(files as u64).saturating_add(SPARE_FILES);
    if needed <= limit.rlim_cur {
        return Ok(());
    }
    let text = format!(
        "this point needs {files} more open files than there are, and the limit is {}",
        limit.rlim_cur
    );
    let error = Error::io(std::io::Error::from_raw_os_error(libc::EMFILE), text);
    Err(error.remedy(
        "raise the hard limit of open files (ulimit -Hn, LimitNOFILE=) and mount again, or \
         consolidate the chain",
    ))
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
mod tests {
    use super::*;
    use crate::layer::{Format, Part};
    use std::os::unix::fs::FileExt;

    fn spec(path: &Path, format: Format) -> LayerSpec {
        let file = Arc::new(SourceFile::look(path).unwrap());
        LayerSpec { file, format, part: Part::Whole, data_file: None }
    }

    pub fn image(path: &Path, format: Format, size: u64, below: Option<Arc<Image>>) -> Arc<Image> {
        Image::new(size, &[spec(path, format)], below, &Cache::new(1 << 24)).unwrap()
    }

    /// A qcow2 of version 2 with this L1 table and, at 0x20000, this L2 table.
    pub fn qcow2(cluster_bits: u8, size: u64, l1: &[u64], l2: &[u64]) -> tempfile::NamedTempFile {
        let l1_at = 0x10000u64.max(1 << cluster_bits);
        let mut header = b"QFI\xfb\0\0\0\x02".to_vec();
        header.resize(72, 0);
        header[23] = cluster_bits;
        header[24..32].copy_from_slice(&size.to_be_bytes());
        header[36..40].copy_from_slice(&(l1.len() as u32).to_be_bytes());
        header[40..48].copy_from_slice(&l1_at.to_be_bytes());
        let words = |w: &[u64]| w.iter().flat_map(|w| w.to_be_bytes()).collect::<Vec<u8>>();
        let f = tempfile::NamedTempFile::new().unwrap();
        f.as_file().write_all_at(&header, 0).unwrap();
        f.as_file().write_all_at(&words(l1), l1_at).unwrap();
        f.as_file().write_all_at(&words(l2), 0x20000).unwrap();
        f.as_file().set_len(0x40000.max(l1_at + l1.len() as u64 * 8)).unwrap();
        f
    }

    #[test]
    fn a_hole_is_not_taken_from_a_table_that_is_being_rewritten() {
        let f = qcow2(16, 1 << 30, &[0x20000, 0x20000], &[0x30000]);
        let image = image(f.path(), Format::Qcow2, 1 << 30, None);
        image.read_at(&mut [0], 0).unwrap();
        // An in-place rebase or commit begins by writing tables.
        f.as_file().write_all_at(&[0; 16], 0x10000).unwrap();
        f.as_file().set_len(0x40200).unwrap();
        assert_eq!(image.seek_data(512 << 20).unwrap_err().kind(), Kind::Changed);
        assert_eq!(image.read_at(&mut [0], 0).unwrap_err().kind(), Kind::Changed);
    }

    #[test]
    fn opening_layers_checks_first_level_tables_and_no_others() {
        const GIB: u64 = 1 << 30;
        let good = qcow2(16, GIB, &[0x20000, 0], &[0x30000]);
        // Beyond the file's end, in the header, with reserved bits.
        for bad in [0x50000, 0x100, 0x20200] {
            let first_level = qcow2(16, GIB, &[0, bad], &[]);
            let second_level = qcow2(16, GIB, &[0x20000, 0], &[0, bad]);
            for (below, sound) in [(first_level, false), (second_level, true)] {
                let below = image(below.path(), Format::Qcow2, GIB, None);
                let top = image(good.path(), Format::Qcow2, GIB, Some(below));
                assert_eq!(top.open_layers().is_ok(), sound, "{bad:#x}");
            }
        }
        let gone = qcow2(16, GIB, &[0, 0], &[]);
        let below = image(gone.path(), Format::Qcow2, GIB, None);
        drop(gone);
        let top = image(good.path(), Format::Qcow2, GIB, Some(below));
        assert_eq!(top.open_layers().unwrap_err().kind(), Kind::NotFound);
    }

    #[test]
    fn a_file_cut_in_place_has_changed_whatever_the_read_says() {
        let f = tempfile::NamedTempFile::new().unwrap();
        f.as_file().write_all_at(&[7; 1 << 20], 0).unwrap();
        let image = image(f.path(), Format::Raw, 1 << 20, None);
        image.read_at(&mut [0; 4096], 900 << 10).unwrap();
        f.as_file().set_len(512 << 10).unwrap();
        assert_eq!(image.read_at(&mut [0; 4096], 900 << 10).unwrap_err().kind(), Kind::Changed);
    }

    #[test]
    fn a_huge_disk_over_tiny_clusters_does_not_fill_the_memory() {
        // 512-byte clusters, all L1 entries one L2 table, in which every other cluster is data.
        let (spans, span) = (1u64 << 13, 1u64 << 15);
        let l2: Vec<u64> = (0..64).map(|i| (i % 2) * 0x30000).collect();
        let bottom = qcow2(9, spans * span, &vec![0x20000; spans as usize], &l2);
        let top = qcow2(21, 1 << 61, &[0; 1 << 22], &[]);
        let below = image(bottom.path(), Format::Qcow2, spans * span, None);
        below.read_at(&mut [0; 512], 0).unwrap();
        let top = image(top.path(), Format::Qcow2, 1 << 61, Some(below.clone()));
        let error = top.read_at(&mut [0], spans * span - 1).unwrap_err();
        assert_eq!(error.kind(), Kind::Corrupt, "{error}");
        assert!(top.findings()[0].message.contains("too many pieces"));
        // The same bytes are fine where windows are small.
        below.read_at(&mut [0], spans * span - 1).unwrap();
    }

    #[test]
    fn a_read_from_more_layers_than_are_remembered_looks_at_each() {
        // 512-byte clusters; layer n has cluster n and nothing else.
        let (count, size) = (LayersRead::MOST as u64 + 8, 64 * 512);
        let l2 = |n| (0..64).map(|i| if i == n { 0x30000 } else { 0 }).collect::<Vec<u64>>();
        for rewritten in [0, 1, LayersRead::MOST - 1, LayersRead::MOST, count as usize - 1] {
            let files: Vec<_> = (0..count).map(|n| qcow2(9, size, &[0x20000], &l2(n))).collect();
            let chain = files.iter().fold(None, |below, f| {
                f.as_file().write_all_at(&[7; 512], 0x30000).unwrap();
                Some(image(f.path(), Format::Qcow2, size, below))
            });
            let chain = chain.unwrap();
            let mut bytes = vec![0; size as usize];
            chain.read_at(&mut bytes, 0).unwrap();
            assert_eq!(bytes.iter().position(|b| *b != 7), Some(count as usize * 512));
            files[rewritten].as_file().set_len(0x50000).unwrap();
            let error = chain.read_at(&mut bytes, 0).unwrap_err();
            assert_eq!(error.kind(), Kind::Changed, "layer {rewritten}");
        }
    }

    #[test]
    fn nothing_is_allocated_for_windows_that_nobody_reads() {
        let f = qcow2(16, 1 << 30, &[0, 0], &[]);
        let image = image(f.path(), Format::Qcow2, i64::MAX as u64, None);
        assert!(image.groups.get().is_none());
    }
}
