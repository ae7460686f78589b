//! The promise: a read costs what its bytes do. What is counted here does not depend on the machine: memory
//! that is allocated, system calls that read, and threads. A program of its own, since the allocator that counts is one
//! for all, and what is measured is wrong beside others.

#[path = "support/foreign.rs"]
#[allow(dead_code)]
mod foreign;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::{Cell, RefCell};
use std::ffi::OsStr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use fleecefs::chain::scan::{ScanOptions, scan};
use fleecefs::folder::Folder;
use fleecefs::fs::attr::Owner;
use fleecefs::fs::buffer::Buffer;
use fleecefs::fs::readers::Readers;
use fleecefs::fs::tree::ROOT;
use fleecefs::fs::watch::Waker;
use fleecefs::fs::{FileSystem, WaitsFor};
use fleecefs::image::Cache;
use fleecefs::overlay::{Overlays, Scratch};

/// Counts what each thread allocates.
struct Counting;

thread_local! {
    static ALLOCATED: Cell<usize> = const { Cell::new(0) };
    static BUFFER: RefCell<Buffer> = const { RefCell::new(Buffer::new()) };
}

// SAFETY: the system's allocator does it all.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATED.set(ALLOCATED.get() + layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const PART: usize = 64 << 10;
const PARTS: usize = 32;

/// Streams of a FULL, which has every second part, and of nine that depend on it, of one part each.
fn chain(dir: &Path) {
    std::fs::create_dir(dir.join("vm")).unwrap();
    for number in 0..10 {
        let parts: Vec<(usize, Vec<u8>)> = match number {
            0 => (0..PARTS).step_by(2).map(|p| (p * PART, vec![1; PART])).collect(),
            n => vec![(3 * n as usize * PART, vec![n as u8 + 1; PART])],
        };
        let kind = if number == 0 { "full".into() } else { format!("inc.virtnbdbackup.{number}") };
        let stream = foreign::stream("sda", number, PARTS * PART, &parts);
        std::fs::write(dir.join(format!("vm/sda.{kind}.data")), stream).unwrap();
    }
}

/// What all bytes of a part are.
fn byte(part: usize) -> usize {
    (1..10).find(|n| 3 * n == part).map_or(1 - part % 2, |n| n + 1)
}

fn file_system(dir: &Path, scratch: Option<&Path>) -> FileSystem {
    let (catalog, _) = scan(dir, &ScanOptions::default(), None).unwrap();
    let owner = Owner { uid: 0, gid: 0, mode: 0o400 };
    let waker = Arc::new(Waker::new().unwrap());
    let fs = FileSystem::new(catalog, Cache::new(1 << 20), owner, Arc::default(), waker, None);
    let Some(scratch) = scratch else { return fs };
    let folder = Folder::open(&scratch.canonicalize().unwrap()).unwrap();
    let scratch = Scratch { folder, keep: false, limit: 1 << 30, named: true };
    fs.writable(Overlays::new(scratch, dir, Path::new("/mnt")).unwrap())
}

/// A handle of the newest point.
fn newest(fs: &FileSystem, flags: i32) -> u64 {
    let tree = fs.tree();
    let points = tree.paths().into_iter().map(|(path, _)| path);
    let newest = points.filter(|p| p.to_string_lossy().contains("virtnbdbackup.9")).min().unwrap();
    let ino = newest.iter().fold(ROOT, |ino, name: &OsStr| fs.lookup(ino, name).unwrap().ino);
    fs.open(ino, flags).unwrap().0
}

/// Calls of this thread that read, so far.
fn read_calls() -> usize {
    let text = std::fs::read_to_string("/proc/thread-self/io").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("syscr: ")).unwrap();
    line.parse().unwrap()
}

/// Reads of 4 KiB all over the disk, as a serving thread does them.
fn read_all(fs: &Arc<FileSystem>, readers: &Readers, handle: u64, here: &Arc<AtomicUsize>) {
    let thread = std::thread::current().id();
    for offset in (0..PARTS * PART).step_by(4096) {
        assert_eq!(fs.waits_for(handle, offset as u64, 4096), WaitsFor::Storage);
        let here = here.clone();
        readers.run(fs, move |fs| {
            BUFFER.with_borrow_mut(|buffer| {
                let bytes = buffer.get(4096);
                assert_eq!(fs.read(handle, offset as u64, bytes), Ok(4096));
                let part = offset / PART;
                assert!(bytes.iter().all(|b| usize::from(*b) == byte(part)), "{offset}");
            });
            if std::thread::current().id() == thread {
                here.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
}

#[test]
fn a_read_is_one_call_and_allocates_nothing_and_stays_with_its_thread() {
    let dir = tempfile::tempdir().unwrap();
    chain(dir.path());
    costs_its_bytes(&Arc::new(file_system(dir.path(), None)), libc::O_RDONLY, |_, _| ());
    // Of what was not written to, on a file system that can be written to, also where something else was.
    let scratch = tempfile::tempdir().unwrap();
    let writable = || Arc::new(file_system(dir.path(), Some(scratch.path())));
    costs_its_bytes(&writable(), libc::O_RDONLY, |_, _| ());
    costs_its_bytes(&writable(), libc::O_RDWR, |fs, handle| {
        // A hole becomes data, and data a hole: as many calls as before.
        fs.write(handle, PART as u64, &[0; PART], 0).unwrap();
        fs.allocate(handle, 0, PART as u64, libc::FALLOC_FL_ZERO_RANGE).unwrap();
        fs.write(handle, 0, &[1; PART], 0).unwrap();
        fs.allocate(handle, PART as u64, PART as u64, libc::FALLOC_FL_ZERO_RANGE).unwrap();
    });
}

/// Checks reads through a handle that was opened with `flags`, after `first`.
fn costs_its_bytes(fs: &Arc<FileSystem>, flags: i32, first: impl Fn(&FileSystem, u64)) {
    let handle = newest(fs, flags);
    first(fs, handle);
    let readers = Readers::new(4, Arc::default());
    let here = Arc::new(AtomicUsize::new(0));
    // The first read opens the streams and merges the window, the next gets the buffer.
    assert_eq!(fs.read(handle, 2 * PART as u64, &mut [0; 4096]), Ok(4096));
    read_all(fs, &readers, handle, &here);
    here.store(0, Ordering::Relaxed);
    let asking = read_calls().abs_diff(read_calls());
    let (calls, allocated) = (read_calls(), ALLOCATED.get());
    read_all(fs, &readers, handle, &here);
    let allocated = ALLOCATED.get() - allocated;
    let calls = read_calls() - calls - asking;
    assert_eq!(allocated, 0);
    let reads = PARTS * PART / 4096;
    assert_eq!(here.load(Ordering::Relaxed), reads);
    // Holes need none: of the odd parts, those that an increment has are read.
    let with_data = (0..PARTS).filter(|part| byte(*part) > 0).count();
    assert_eq!(calls, with_data * PART / 4096);
}
