//! Noticing that the backup directory changed: inotify, and polling where that is not enough.
//!
//! One thread waits for several things at once: events of any folder below the backup directory, another
//! folder in its place (`RootWatch`: the backup disk is mounted late), the end of the polling interval,
//! and [`Waker::wake`]. What exactly happened does not matter: after
//! a short quiet time everything is looked at again, which is cheap because unchanged files are
//! not opened. Watches are set anew *before* that look whenever folders came or went, so nothing
//! can slip in between. A flood of events delays the look by two seconds at most, and long
//! looks are spaced out.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use inotify::{EventMask, Inotify, WatchMask};

use super::root_watch::RootWatch;
use crate::folder;
use crate::folder::{EntryKind, Folder};
use crate::text::path_text;

/// Events that follow each other more closely than this are taken together.
const QUIET: Duration = Duration::from_millis(200);
/// No change waits longer than this, however busy the directory is.
const BOUND: Duration = Duration::from_secs(2);
/// How often a network file system is looked at when the user does not say.
pub const NETWORK_INTERVAL: Duration = Duration::from_secs(10);
/// After a look, this many times its duration passes before the next.
const REST: u32 = 5;

/// Wakes the watching thread from any other. Backed by an eventfd, so waking never blocks.
#[derive(Debug)]
pub struct Waker(OwnedFd);

impl Waker {
    /// A new one.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn new() -> io::Result<Self> {
        // SAFETY: no pointers; the result is checked and owned by nobody else.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a fresh descriptor, checked above.
        Ok(Waker(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Asks for a look at the backup directory.
    pub fn wake(&self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: eight valid bytes. If the counter is full, a wake-up is pending anyway.
        unsafe { libc::write(self.0.as_raw_fd(), one.as_ptr().cast(), one.len()) };
    }

    fn drain(&self) {
        let mut count = [0u8; 8];
        // SAFETY: eight writable bytes; the descriptor does not block.
        unsafe { libc::read(self.0.as_raw_fd(), count.as_mut_ptr().cast(), count.len()) };
    }
}

/// How changes are noticed at the moment; shared with whoever tells it.
#[derive(Debug, Default)]
pub struct Mode(AtomicU8);

impl Mode {
    const WORDS: [&'static str; 3] = ["inotify", "inotify and polling", "polling"];

    /// In a word, for `status.json`.
    pub fn word(&self) -> &'static str {
        Self::WORDS[usize::from(self.0.load(Ordering::Relaxed)).min(2)]
    }

    fn set(&self, inotify: bool, polling: bool) {
        let mode = match (inotify, polling) {
            (true, false) => 0,
            (true, true) => 1,
            (false, _) => 2,
        };
        self.0.store(mode, Ordering::Relaxed);
    }
}

/// Watches one backup directory.
pub struct Watch {
    /// As the user calls it, absolute.
    root: PathBuf,
    skip: PathBuf,
    /// How often to look in any case.
    interval: Option<Duration>,
    /// `None` while watches cannot be set; it is tried again with each look.
    inotify: Option<Inotify>,
    place: RootWatch,
    mode: Arc<Mode>,
}

impl Watch {
    /// Sets the watches below `root`, which is what the user calls it and may be a link, but not in the
    /// folder `skip` (the mount point, if it is inside). With `interval`, or on a network file system, the directory is also looked at in
    /// regular intervals.
    pub fn new(root: &Path, skip: &Path, interval: Option<Duration>) -> Self {
        let remote = || open(root).is_ok_and(|f| is_remote(&f));
        let interval = interval.or_else(|| remote().then_some(NETWORK_INTERVAL));
        let (root, skip) = (root.to_path_buf(), skip.to_path_buf());
        let place = RootWatch::new(&root);
        let mut watch = Watch { root, skip, interval, inotify: None, place, mode: Arc::default() };
        watch.renew(true);
        watch
    }

    /// How changes are noticed, now and later.
    pub fn mode(&self) -> Arc<Mode> {
        self.mode.clone()
    }

    /// The time between two looks: where nothing can be watched there must be one.
    fn polling(&self) -> Option<Duration> {
        self.interval.or_else(|| self.inotify.is_none().then_some(NETWORK_INTERVAL))
    }

    /// Watches all folders anew. Where that fails, polling takes over. Says so when it begins and
    /// when it is over, not each time.
    fn renew(&mut self, watched: bool) {
        self.place.renew();
        let renewed = Inotify::init().and_then(|inotify| {
            let mut remote = false;
            watch_below(&inotify, &self.root, &self.skip, &mut remote)?;
            if remote && self.interval.is_none() {
                self.interval = Some(NETWORK_INTERVAL);
            }
            Ok(inotify)
        });
        self.inotify = match renewed {
            Ok(inotify) => Some(inotify),
            Err(e) => {
                let every = self.interval.unwrap_or(NETWORK_INTERVAL).as_secs();
                let text =
                    format!("cannot watch for changes, looking every {every} s instead: {e}");
                let level = if watched { log::Level::Warn } else { log::Level::Debug };
                log::log!(level, "{}: {text}", path_text(&self.root));
                None
            }
        };
        if !watched && self.inotify.is_some() {
            log::warn!("{}: watching for changes again", path_text(&self.root));
        }
        self.mode.set(self.inotify.is_some(), self.polling().is_some());
    }

    /// Calls `look` after each change, for ever.
    pub fn run(mut self, waker: &Waker, mut look: impl FnMut()) {
        loop {
            let deadline = self.polling().map(|i| Instant::now() + i);
            let Some(folders_changed) = self.wait(waker, deadline) else { continue };
            if folders_changed || self.inotify.is_none() {
                self.renew(self.inotify.is_some());
            }
            let began = Instant::now();
            look();
            std::thread::sleep(began.elapsed().saturating_mul(REST).min(BOUND * 5));
        }
    }

    /// Waits for a reason to look, and then until it is quiet. Says whether folders came or went;
    /// `None` if it was nothing after all.
    fn wait(&mut self, waker: &Waker, deadline: Option<Instant>) -> Option<bool> {
        let (mut events, mut folders) = (false, false);
        let mut first: Option<Instant> = None;
        loop {
            let quiet = first.map(|f| (f + BOUND).min(Instant::now() + QUIET));
            let ready = self.poll(waker, quiet.or(deadline));
            let now = Instant::now();
            match ready {
                Ready::Nothing if first.is_some() || deadline.is_some_and(|d| d <= now) => {
                    return Some(folders);
                }
                Ready::Nothing => return None,
                Ready::Woken => events = true,
                Ready::Events => {
                    let summary = self.read_events();
                    events |= summary.relevant;
                    folders |= summary.folders;
                }
                Ready::RootWatch { mounts } => {
                    let changed = match mounts {
                        true => self.place.mounts_changed(),
                        false => self.place.folder_changed(),
                    };
                    events |= changed;
                    folders |= changed;
                }
            }
            if events {
                let first = *first.get_or_insert(now);
                if now.duration_since(first) >= BOUND {
                    return Some(folders);
                }
            }
        }
    }

    fn poll(&self, waker: &Waker, until: Option<Instant>) -> Ready {
        let watched = self.inotify.as_ref().map_or(-1, |i| i.as_raw_fd());
        let entry = |fd, events| libc::pollfd { fd, events, revents: 0 };
        let mut fds = [
            entry(waker.0.as_raw_fd(), libc::POLLIN),
            entry(self.place.list_fd(), libc::POLLPRI),
            entry(self.place.above_fd(), libc::POLLIN),
            entry(watched, libc::POLLIN),
        ];
        let wait = until.map_or(-1, |u| {
            let left = u.saturating_duration_since(Instant::now()).as_millis();
            // One more, or the last fraction of a millisecond is spent spinning.
            i32::try_from(left).map_or(i32::MAX, |ms| ms.saturating_add(1))
        });
        // SAFETY: four valid entries; a negative descriptor is ignored.
        let n = unsafe { libc::poll(fds.as_mut_ptr(), 4, wait) };
        if n <= 0 {
            return Ready::Nothing;
        }
        match fds.map(|f| f.revents != 0) {
            [true, ..] => {
                waker.drain();
                Ready::Woken
            }
            // To have been told is enough: it is ready for the next change then.
            [_, true, ..] => Ready::RootWatch { mounts: true },
            [_, _, true, _] => Ready::RootWatch { mounts: false },
            _ => Ready::Events,
        }
    }

    fn read_events(&mut self) -> EventSummary {
        let mut summary = EventSummary::default();
        let Some(inotify) = &mut self.inotify else { return summary };
        let mut buffer = [0; 16384];
        match inotify.read_events(&mut buffer) {
            Ok(events) => events.for_each(|e| summary.add(e.mask, e.name)),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            // Start afresh rather than miss something.
            Err(_) => summary = EventSummary { relevant: true, folders: true },
        }
        summary
    }
}

enum Ready {
    Nothing,
    Woken,
    Events,
    /// Of the list of mounts, or of the folders above.
    RootWatch {
        mounts: bool,
    },
}

/// What a batch of events means.
#[derive(Debug, Default, PartialEq, Eq)]
struct EventSummary {
    relevant: bool,
    folders: bool,
}

impl EventSummary {
    fn add(&mut self, mask: EventMask, name: Option<&OsStr>) {
        let folders = EventMask::ISDIR
            | EventMask::Q_OVERFLOW
            | EventMask::DELETE_SELF
            | EventMask::MOVE_SELF
            | EventMask::UNMOUNT;
        let moved = EventMask::MOVED_FROM | EventMask::MOVED_TO;
        // A backup being written is none of our business until it gets its name.
        let unfinished = name.is_some_and(|n| n.as_bytes().ends_with(b".partial"));
        if (unfinished && !mask.intersects(moved)) || mask.contains(EventMask::IGNORED) {
            return;
        }
        self.relevant = true;
        self.folders |= mask.intersects(folders);
    }
}

/// What `root` means now.
fn open(root: &Path) -> io::Result<Folder> {
    Folder::open(&folder::resolve(root)?)
}

/// Watches what `root` means now and all folders below it, never through a symlink there. Each is watched by a descriptor
/// of it, which nobody can exchange.
fn watch_below(inotify: &Inotify, root: &Path, skip: &Path, remote: &mut bool) -> io::Result<()> {
    let mask = WatchMask::CREATE
        | WatchMask::DELETE
        | WatchMask::MOVE
        | WatchMask::MODIFY
        | WatchMask::CLOSE_WRITE
        | WatchMask::ATTRIB
        | WatchMask::DELETE_SELF
        | WatchMask::MOVE_SELF
        | WatchMask::ONLYDIR;
    let top = open(root)?;
    if top.path().starts_with(skip) {
        return Err(io::Error::other("it leads to the mount itself"));
    }
    let mut todo = vec![(PathBuf::new(), top.metadata()?.dev())];
    while let Some((relative, above)) = todo.pop() {
        // Removed, forbidden or exchanged meanwhile: its parent's events or the scan will tell.
        let Ok(dir) = top.beneath(&relative) else { continue };
        let dev = dir.metadata().map_or(above, |m| m.dev());
        *remote |= dev != above && is_remote(&dir);
        match inotify.watches().add(dir.proc_path(), mask) {
            Ok(_) => {}
            // The limit of watches is reached, or the directory itself is gone.
            Err(e) if relative.as_os_str().is_empty() || e.raw_os_error() == Some(libc::ENOSPC) => {
                return Err(e);
            }
            Err(_) => continue,
        }
        let folders = dir.entries().unwrap_or_default();
        for entry in folders.into_iter().filter(|e| e.kind == EntryKind::Folder) {
            if dir.join(&entry.name) != skip {
                todo.push((relative.join(entry.name), dev));
            }
        }
    }
    Ok(())
}

/// Whether a folder is on a file system that others may change without our kernel noticing.
fn is_remote(folder: &Folder) -> bool {
    rustix::fs::fstatfs(folder.as_fd()).is_ok_and(|s| is_remote_magic(s.f_type as u32))
}

fn is_remote_magic(magic: u32) -> bool {
    // NFS, SMB, CIFS, SMB2, FUSE, 9P, Ceph, AFS, Coda, GFS2, OCFS2, Lustre, GPFS, vboxsf
    const REMOTE: [u32; 14] = [
        0x6969,
        0x517b,
        0xff53_4d42,
        0xfe53_4d42,
        0x6573_5546,
        0x0102_1997,
        0x00c3_6400,
        0x5346_414f,
        0x7375_7245,
        0x0116_1970,
        0x7461_636f,
        0x0bd0_0bd0,
        0x4750_4653,
        0x786f_4256,
    ];
    REMOTE.contains(&magic)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unfinished_backups_are_ignored_until_they_are_renamed() {
        let mut summary = EventSummary::default();
        let partial = Some(OsStr::new("INC-1-sda.partial"));
        summary.add(EventMask::MODIFY, partial);
        summary.add(EventMask::CREATE, partial);
        assert_eq!(summary, EventSummary::default());
        summary.add(EventMask::MOVED_FROM, partial);
        assert_eq!(summary, EventSummary { relevant: true, folders: false });
        summary.add(EventMask::CREATE | EventMask::ISDIR, Some(OsStr::new("sdb")));
        assert!(summary.folders);
    }

    #[test]
    fn an_overflow_renews_all_watches() {
        let mut summary = EventSummary::default();
        summary.add(EventMask::Q_OVERFLOW, None);
        assert_eq!(summary, EventSummary { relevant: true, folders: true });
    }

    #[test]
    fn network_file_systems_are_known_and_local_ones_are_not() {
        assert!(is_remote_magic(0x6969) && is_remote_magic(0x6573_5546));
        assert!(!is_remote_magic(0xef53) && !is_remote_magic(0x0102_1994));
    }

    #[test]
    fn what_cannot_be_watched_is_polled_until_it_can() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("backups");
        let mut watch = Watch::new(&root, Path::new("/none"), None);
        let mode = watch.mode();
        assert_eq!((mode.word(), watch.polling()), ("polling", Some(NETWORK_INTERVAL)));
        std::fs::create_dir(&root).unwrap();
        watch.renew(false);
        assert_eq!((mode.word(), watch.polling()), ("inotify", None));
    }

    #[test]
    fn folders_are_watched_and_what_links_lead_to_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let (root, other) = (dir.path().join("backups"), dir.path().join("other"));
        std::fs::create_dir_all(root.join("disk/below")).unwrap();
        std::fs::create_dir(&other).unwrap();
        std::os::unix::fs::symlink(&other, root.join("link")).unwrap();
        let mut watch = Watch::new(&root, Path::new("/none"), None);
        std::fs::write(other.join("a"), "x").unwrap();
        assert_eq!(watch.read_events(), EventSummary::default());
        std::fs::write(root.join("disk/below/a"), "x").unwrap();
        assert!(watch.read_events().relevant);
        // The top is what its path means now.
        std::fs::rename(&root, dir.path().join("moved")).unwrap();
        std::os::unix::fs::symlink(&other, &root).unwrap();
        watch.renew(true);
        assert_eq!(watch.mode().word(), "inotify");
        std::fs::write(other.join("b"), "x").unwrap();
        assert!(watch.read_events().relevant);
        // But never the mount itself.
        let watch = Watch::new(&root, &other, None);
        assert_eq!(watch.mode().word(), "polling");
    }

    #[test]
    fn new_files_and_files_in_new_folders_are_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let waker = std::sync::Arc::new(Waker::new().unwrap());
        let watch = Watch::new(dir.path(), Path::new("/none"), None);
        let (tell, receive) = std::sync::mpsc::channel();
        let root = dir.path().to_path_buf();
        std::thread::spawn(move || {
            watch.run(&waker, || {
                let _ = tell.send(());
            })
        });
        let wait = || receive.recv_timeout(Duration::from_secs(20)).unwrap();
        std::fs::create_dir(root.join("disk")).unwrap();
        wait();
        std::fs::write(root.join("disk/FULL-1-sda"), "x").unwrap();
        wait();
    }
}
