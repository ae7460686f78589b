//! [`Buffer`]: where a serving thread puts the bytes of a reply.
//!
//! State: the huge pages that buffers are in, each shared by `PARTS` threads and freed with the last of
//! them. A huge page for each thread would be mostly air.

use std::alloc::Layout;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// The size of a huge page on the common machines. Elsewhere it is just an alignment.
const HUGE_PAGE: usize = 2 << 20;
/// Buffers in one of them.
const PARTS: usize = 8;
/// What a mount's kernel asks for at most at a time.
const PART: usize = HUGE_PAGE / PARTS;

/// Memory for one reply, in huge pages where the kernel has them: it looks up each page of a reply
/// on its way to the reader, and sequential reads are about a tenth faster this way.
#[derive(Debug, Default)]
pub struct Buffer {
    part: Option<Part>,
    /// For what is larger than a part.
    large: Option<Memory>,
}

impl Buffer {
    /// A buffer that takes no memory yet.
    pub const fn new() -> Self {
        Buffer { part: None, large: None }
    }

    /// `size` bytes of it, with any contents; it grows if it has to and stays as large. Empty if
    /// there is no memory.
    pub fn get(&mut self, size: usize) -> &mut [u8] {
        let start = if size <= PART { self.part() } else { self.large(size) };
        let Some(start) = start else { return &mut [] };
        // SAFETY: `start` is the beginning of at least `size` initialised bytes, which are this
        // buffer's alone for as long as it lives; the borrow of `self` keeps everybody else away.
        unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), size) }
    }

    fn part(&mut self) -> Option<NonNull<u8>> {
        if self.part.is_none() {
            self.part = Part::take();
        }
        self.part.as_ref().map(Part::start)
    }

    fn large(&mut self, size: usize) -> Option<NonNull<u8>> {
        if self.large.as_ref().is_none_or(|m| m.layout.size() < size) {
            self.large = None;
            self.large = Memory::new(size);
        }
        self.large.as_ref().map(|m| m.start)
    }
}

/// A part of a huge page that nobody else has.
#[derive(Debug)]
struct Part {
    page: Arc<Page>,
    index: usize,
}

/// A huge page; which of its parts are taken is changed under the lock of [`PAGES`] only, but given
/// back without it.
#[derive(Debug)]
struct Page {
    memory: Memory,
    taken: AtomicU8,
}

static PAGES: Mutex<Vec<Weak<Page>>> = Mutex::new(Vec::new());

impl Part {
    fn take() -> Option<Self> {
        let mut pages = PAGES.lock().unwrap_or_else(PoisonError::into_inner);
        pages.retain(|page| page.strong_count() > 0);
        if let Some(part) = pages.iter().filter_map(Weak::upgrade).find_map(Part::of) {
            return Some(part);
        }
        let memory = Memory::new(HUGE_PAGE)?;
        let page = Arc::new(Page { memory, taken: AtomicU8::new(0) });
        pages.push(Arc::downgrade(&page));
        Part::of(page)
    }

    /// One of `page`, unless all are taken.
    fn of(page: Arc<Page>) -> Option<Self> {
        // What the one before wrote there is seen, or nothing of it.
        let taken = page.taken.load(Ordering::Acquire);
        let index = (!taken).trailing_zeros() as usize;
        if index >= PARTS {
            return None;
        }
        page.taken.fetch_or(1 << index, Ordering::Acquire);
        Some(Part { page, index })
    }

    fn start(&self) -> NonNull<u8> {
        // SAFETY: there are `PARTS` parts in the memory of a page, and `index` is below that.
        unsafe { self.page.memory.start.add(self.index * PART) }
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        self.page.taken.fetch_and(!(1 << self.index), Ordering::Release);
    }
}

/// Memory that begins at a huge page.
#[derive(Debug)]
struct Memory {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: it is plain memory, which `Part` gives to one buffer at a time.
unsafe impl Send for Memory {}
// SAFETY: the same.
unsafe impl Sync for Memory {}

impl Memory {
    fn new(size: usize) -> Option<Self> {
        let size = size.max(1).checked_next_multiple_of(HUGE_PAGE)?;
        let layout = Layout::from_size_align(size, HUGE_PAGE).ok()?;
        // SAFETY: the size is not zero.
        let start = NonNull::new(unsafe { std::alloc::alloc(layout) })?;
        // Refused where the kernel has no huge pages, which changes nothing but the speed.
        // SAFETY: advice on memory that is ours.
        unsafe { libc::madvise(start.as_ptr().cast(), size, libc::MADV_HUGEPAGE) };
        // SAFETY: as long as was just allocated. Written after the advice, so that huge pages come.
        unsafe { std::ptr::write_bytes(start.as_ptr(), 0, size) };
        Some(Memory { start, layout })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout, and not used any more.
        unsafe { std::alloc::dealloc(self.start.as_ptr(), self.layout) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_grows_and_keeps_its_memory_for_smaller_requests() {
        let mut buffer = Buffer::new();
        let small = buffer.get(4096);
        small.fill(7);
        let first = small.as_ptr();
        assert_eq!((first as usize % PART, small.len()), (0, 4096));
        assert_eq!(buffer.get(PART).as_ptr(), first);
        assert_eq!(buffer.get(100)[..], [7; 100]);
        for size in [HUGE_PAGE, HUGE_PAGE + 1] {
            let large = buffer.get(size);
            assert_eq!((large.as_ptr() as usize % HUGE_PAGE, large.len()), (0, size));
            large.fill(1);
        }
        assert_eq!(buffer.get(0).len(), 0);
        assert_eq!(buffer.get(100)[..], [7; 100]);
    }

    #[test]
    fn no_two_buffers_have_the_same_memory_and_eight_share_a_huge_page() {
        let mut buffers: Vec<Buffer> = (0..20).map(|_| Buffer::new()).collect();
        for (i, buffer) in buffers.iter_mut().enumerate() {
            buffer.get(PART).fill(i as u8);
        }
        let pages = |buffers: &[Buffer]| -> std::collections::HashSet<usize> {
            let page = |b: &Buffer| b.part.as_ref().unwrap().page.memory.start.as_ptr() as usize;
            buffers.iter().map(page).collect()
        };
        for (i, buffer) in buffers.iter_mut().enumerate() {
            assert!(buffer.get(PART).iter().all(|b| *b == i as u8));
        }
        // Other tests may have a part of the first and of the last.
        assert!(pages(&buffers).len() <= 5, "{}", pages(&buffers).len());
        let page = Arc::downgrade(&buffers[10].part.as_ref().unwrap().page);
        drop(buffers);
        let others = page.upgrade().map_or(0, |p| p.taken.load(Ordering::SeqCst).count_ones());
        assert!(others <= 1, "of other tests: {others}");
    }
}
