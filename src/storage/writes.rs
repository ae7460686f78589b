//! [`Writes`]: whether anything was written to a file, as the kernel tells of each write (inotify).
//!
//! A write can hide its modification time, and a name that comes or goes explains the change time: then
//! nothing but this tells. State, once in a process: the queue of the kernel, and for each file that is
//! watched how many users it has and how often it was written to. The queue is bounded by the kernel; where it
//! ran over nobody knows, and so all files count as written to. What another machine writes to a share
//! is not told, nor a write through a memory map.

use std::collections::HashMap;
use std::fs::File;
use std::sync::{Mutex, MutexGuard, PoisonError};

use inotify::{EventMask, Inotify, WatchDescriptor, WatchMask, Watches};

use crate::folder;

/// Files that are watched at a time. Each costs the kernel about a kilobyte, and it allows so many to all
/// processes of a user together: the watches of folders need some.
const MOST: usize = 4096;

/// A file that is watched until this is dropped.
#[derive(Debug)]
pub(super) struct Writes {
    file: WatchDescriptor,
    /// What had been written to it when this began.
    before: u64,
    /// How often the queue had run over.
    lost: u64,
}

#[derive(Debug)]
struct Queue {
    inotify: Inotify,
    files: HashMap<WatchDescriptor, Watched>,
    /// How many are being added just now: none is removed meanwhile, for it may be one of these.
    adding: usize,
    /// Whether there are some that nobody uses any more.
    spare: bool,
    lost: u64,
}

#[derive(Debug, Default)]
struct Watched {
    users: u64,
    writes: u64,
}

static QUEUE: Mutex<Option<Queue>> = Mutex::new(None);

fn queue() -> MutexGuard<'static, Option<Queue>> {
    QUEUE.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Writes {
    /// From now on; `None` where the system does not tell, or too many are watched. The lock is not held
    /// while the storage is asked, which may not answer.
    pub(super) fn of(file: &File) -> Option<Self> {
        let mut watches = begin()?;
        let added = watches.add(folder::path_of(file), WatchMask::MODIFY);
        let mut queue = queue();
        let queue = queue.as_mut()?;
        queue.adding = queue.adding.saturating_sub(1);
        // What is in the queue came before.
        queue.drain();
        let file = added.ok()?;
        let entry = queue.files.entry(file.clone()).or_default();
        entry.users = entry.users.saturating_add(1);
        Some(Writes { file, before: entry.writes, lost: queue.lost })
    }

    /// Whether nothing was written to it since then.
    pub(super) fn are_none(&self) -> bool {
        let mut queue = queue();
        let Some(queue) = queue.as_mut() else { return false };
        queue.drain();
        let writes = queue.files.get(&self.file).map(|w| w.writes);
        writes == Some(self.before) && queue.lost == self.lost
    }
}

/// Where to add one more.
fn begin() -> Option<Watches> {
    let mut queue = queue();
    if queue.is_none() {
        let inotify = Inotify::init().ok()?;
        *queue = Some(Queue { inotify, files: HashMap::new(), adding: 0, spare: false, lost: 0 });
    }
    let queue = queue.as_mut()?;
    if queue.files.len().saturating_add(queue.adding) >= MOST {
        return None;
    }
    queue.adding = queue.adding.saturating_add(1);
    Some(queue.inotify.watches())
}

impl Drop for Writes {
    fn drop(&mut self) {
        let mut queue = queue();
        let Some(queue) = queue.as_mut() else { return };
        let Some(watched) = queue.files.get_mut(&self.file) else { return };
        watched.users = watched.users.saturating_sub(1);
        match watched.users == 0 && queue.adding == 0 {
            true => queue.remove(&self.file),
            // Another may be added to it just now: it goes with the next one.
            false => queue.spare |= watched.users == 0,
        }
        queue.sweep();
    }
}

impl Queue {
    /// One is gone by itself with a file that nobody has any more.
    fn remove(&mut self, file: &WatchDescriptor) {
        self.files.remove(file);
        let _ = self.inotify.watches().remove(file.clone());
    }

    /// Removes those that nobody uses any more.
    fn sweep(&mut self) {
        if !self.spare || self.adding > 0 {
            return;
        }
        self.spare = false;
        let mut watches = self.inotify.watches();
        self.files.retain(|file, watched| {
            // One is gone by itself with a file that nobody has any more.
            let _ = (watched.users == 0).then(|| watches.remove(file.clone()));
            watched.users > 0
        });
    }

    fn drain(&mut self) {
        let mut buffer = [0; 4096];
        while let Ok(events) = self.inotify.read_events(&mut buffer) {
            for event in events {
                if event.mask.contains(EventMask::Q_OVERFLOW) {
                    self.lost = self.lost.saturating_add(1);
                } else if event.mask.contains(EventMask::MODIFY)
                    && let Some(watched) = self.files.get_mut(&event.wd)
                {
                    watched.writes = watched.writes.saturating_add(1);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_are_told_and_names_are_none() {
        let dir = tempfile::tempdir().unwrap();
        let (path, other) = (dir.path().join("a"), dir.path().join("b"));
        std::fs::write(&path, "x").unwrap();
        let file = File::open(&path).unwrap();
        let first = Writes::of(&file).unwrap();
        std::fs::hard_link(&path, &other).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert!(first.are_none());
        std::fs::write(&other, "y").unwrap();
        assert!(!first.are_none() && !first.are_none());
        // What looks at it now has seen that.
        let second = Writes::of(&file).unwrap();
        assert!(second.are_none());
        drop(first);
        assert!(second.are_none());
        std::fs::write(&other, "z").unwrap();
        assert!(!second.are_none());
    }
}
