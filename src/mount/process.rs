//! What a serving process sets up for itself: signals, threads, limits.

use std::os::fd::RawFd;
use std::time::Duration;

use rustix::io::fcntl_dupfd_cloexec;
use rustix::process::{Resource, getrlimit};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::error::{Error, Result};

/// How often is looked whether there is something to do.
pub(super) const TICK: Duration = Duration::from_millis(500);

/// What unmounts.
pub(super) const SIGNALS: [i32; 3] = [SIGTERM, SIGINT, SIGHUP];

/// The signals that unmount, from now on.
///
/// # Errors
/// The handlers cannot be installed.
pub(super) fn signals() -> Result<Signals> {
    Signals::new(SIGNALS).map_err(|e| Error::io(e, "cannot listen for signals"))
}

/// Starts a thread; `stack` bytes, or 0 for the usual.
///
/// # Errors
/// No thread can be made.
pub(super) fn start(name: &str, stack: usize, work: impl FnOnce() + Send + 'static) -> Result<()> {
    let mut builder = std::thread::Builder::new().name(name.into());
    if stack > 0 {
        builder = builder.stack_size(stack);
    }
    builder
        .spawn(work)
        .map(drop)
        .map_err(|e| Error::io(e, format!("cannot start the thread '{name}'")))
}

/// The files of open points are held open: as many as the system allows.
pub(crate) fn raise_file_limit() {
    // SAFETY: plain data and valid pointers.
    unsafe {
        let mut limit: libc::rlimit = std::mem::zeroed();
        if libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) == 0 {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
        }
    }
    make_descriptor_table();
}

/// Lets the kernel make its table of descriptors as large as it will be for long chains. To be called
/// while there is one thread, and again after a fork, which gives the child a small one.
///
/// The table begins with 64 entries and doubles when it is full. With several threads the kernel then
/// waits until no processor can be using the old one, which takes as long as reading some hundred layers.
pub(super) fn make_descriptor_table() {
    /// 64 KiB of the kernel's memory.
    const ENTRIES: u64 = 8192;
    let most = getrlimit(Resource::Nofile).current.unwrap_or(ENTRIES).clamp(1, ENTRIES);
    let Ok(last) = RawFd::try_from(most - 1) else { return };
    // Any descriptor will do. Without one, all works, only not as fast.
    if let Ok((any, _)) = std::io::pipe() {
        drop(fcntl_dupfd_cloexec(&any, last));
    }
}

/// What the cache lets go of is the system's again: without this the C library keeps it, scattered over
/// the threads' heaps, and the process takes several times what `--cache-size` says.
pub(super) fn give_memory_back() {
    /// Smaller than a decompressed piece.
    #[cfg(target_env = "gnu")]
    const OF_THEIR_OWN: libc::c_int = 128 << 10;
    // SAFETY: plain numbers; there is one thread.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, OF_THEIR_OWN);
    }
}

/// A panic in the background must not vanish with standard error.
pub(super) fn log_panics() {
    std::panic::set_hook(Box::new(|info| log::error!("{info}")));
}
