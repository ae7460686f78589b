//! [`Buffer`]: where a serving thread puts the bytes of a reply.

use std::alloc::Layout;
use std::ptr::NonNull;

/// The size of a huge page on the common machines. Elsewhere it is just an alignment.
const HUGE_PAGE: usize = 2 << 20;

/// Memory for one reply, in huge pages where the kernel has them: it looks up each page of a reply
/// on its way to the reader, and sequential reads are about a tenth faster this way.
#[derive(Debug, Default)]
pub struct Buffer {
    memory: Option<(NonNull<u8>, Layout)>,
}

impl Buffer {
    /// A buffer that takes no memory yet.
    pub const fn new() -> Self {
        Buffer { memory: None }
    }

    /// `size` bytes of it, with any contents; it grows if it has to and stays as large. Empty if
    /// there is no memory.
    pub fn get(&mut self, size: usize) -> &mut [u8] {
        if self.memory.is_none_or(|(_, layout)| layout.size() < size) {
            self.free();
            self.memory = allocate(size);
        }
        let Some((start, _)) = self.memory else { return &mut [] };
        // SAFETY: `start` is the beginning of at least `size` initialised bytes, which live until
        // `free`; the borrow of `self` keeps everybody else away.
        unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), size) }
    }

    fn free(&mut self) {
        if let Some((start, layout)) = self.memory.take() {
            // SAFETY: allocated in `allocate` with this layout, and forgotten now.
            unsafe { std::alloc::dealloc(start.as_ptr(), layout) };
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.free();
    }
}

fn allocate(size: usize) -> Option<(NonNull<u8>, Layout)> {
    let size = size.max(1).checked_next_multiple_of(HUGE_PAGE)?;
    let layout = Layout::from_size_align(size, HUGE_PAGE).ok()?;
    // SAFETY: the size is not zero.
    let start = NonNull::new(unsafe { std::alloc::alloc(layout) })?;
    // Refused where the kernel has no huge pages, which changes nothing but the speed.
    // SAFETY: advice on memory that is ours.
    unsafe { libc::madvise(start.as_ptr().cast(), size, libc::MADV_HUGEPAGE) };
    // SAFETY: as long as was just allocated. Written after the advice, so that huge pages come.
    unsafe { std::ptr::write_bytes(start.as_ptr(), 0, size) };
    Some((start, layout))
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
        assert_eq!((first as usize % HUGE_PAGE, small.len()), (0, 4096));
        assert_eq!(buffer.get(HUGE_PAGE).as_ptr(), first);
        assert_eq!(buffer.get(100)[..], [7; 100]);
        let large = buffer.get(HUGE_PAGE + 1);
        assert_eq!(large.len(), HUGE_PAGE + 1);
        large.fill(1);
        assert_eq!(buffer.get(0).len(), 0);
    }
}
