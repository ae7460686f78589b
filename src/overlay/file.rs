//! [`ScratchFile`]: a file that overlays are written to.
//!
//! One that has a name is opened when it is needed, and closed when others need its descriptor
//! ([`crate::storage::files`]); one without a name stays open. State: where it is; the slot of its descriptor; what
//! is known of its way to disk ([`OnDisk`]).
//!
//! The kernel tells of a write that failed in the background at the next `fsync` through a descriptor that was open
//! by then, and may forget it where there was none. So what was written is written to disk before a descriptor goes,
//! and a failure is remembered for good.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::folder::{Access, FileId, Folder, Temp};
use crate::storage::files::{BeforeClose, Opened, Slot, open_with_room};
use crate::text::path_text;

/// A file that overlays are written to.
#[derive(Debug)]
pub(super) struct ScratchFile {
    /// What it is opened by again; `None` if it stays open.
    name: Option<Name>,
    slot: Arc<Slot>,
    on_disk: Arc<OnDisk>,
    /// What removes the name of one that stays open, if it has one.
    _temp: Option<Temp>,
}

#[derive(Debug)]
struct Name {
    folder: Arc<Folder>,
    name: OsString,
    id: FileId,
}

/// What is known of what was written.
#[derive(Debug)]
struct OnDisk {
    /// What to call the file in messages.
    path: PathBuf,
    /// Held while it is written to disk: whoever comes later sees if that failed.
    syncing: Mutex<()>,
    /// Whether something was written since.
    unsynced: AtomicBool,
    /// Whether it failed once: then nobody knows what is on disk.
    failed: AtomicBool,
    /// Whether nobody needs it any more.
    given_up: AtomicBool,
}

impl OnDisk {
    fn new(path: PathBuf) -> Self {
        OnDisk {
            path,
            syncing: Mutex::default(),
            unsynced: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            given_up: AtomicBool::new(false),
        }
    }

    fn sync(&self, file: &File, all: bool) -> io::Result<()> {
        let _one = self.syncing.lock().unwrap_or_else(PoisonError::into_inner);
        self.check()?;
        // Before: what is written meanwhile may not be among it.
        self.unsynced.store(false, Ordering::SeqCst);
        let synced = if all { file.sync_all() } else { file.sync_data() };
        synced.inspect_err(|_| self.failed.store(true, Ordering::SeqCst))
    }

    fn check(&self) -> io::Result<()> {
        match self.failed.load(Ordering::SeqCst) {
            true => Err(io::Error::other("an earlier write to disk failed")),
            false => Ok(()),
        }
    }
}

impl BeforeClose for OnDisk {
    fn before_close(&self, file: &File) {
        let needed = !self.given_up.load(Ordering::SeqCst) && self.unsynced.load(Ordering::SeqCst);
        if needed && let Err(e) = self.sync(file, false) {
            let path = path_text(&self.path);
            log::error!("{path}: cannot write the overlay to disk before it is closed: {e}");
        }
    }
}

impl ScratchFile {
    /// One that stays open, and goes with `temp`; `path` is what to call it.
    pub(super) fn held(file: File, path: PathBuf, temp: Option<Temp>) -> Self {
        let on_disk = Arc::new(OnDisk::new(path));
        ScratchFile { name: None, slot: Slot::fixed(file), on_disk, _temp: temp }
    }

    /// The file `name`, which is opened now, and again whenever it is needed.
    ///
    /// # Errors
    /// What the operating system said.
    pub(super) fn open(folder: &Arc<Folder>, name: &str) -> io::Result<Self> {
        let file = open_with_room(|| folder.open_with(name, Access::ReadWrite))?;
        Self::named(folder, name, file)
    }

    /// A new file `name`.
    ///
    /// # Errors
    /// What the operating system said, `AlreadyExists` among it.
    pub(super) fn create(folder: &Arc<Folder>, name: &str) -> io::Result<Self> {
        let file = open_with_room(|| folder.create_new(name))?;
        Self::named(folder, name, file)
    }

    fn named(folder: &Arc<Folder>, name: &str, file: File) -> io::Result<Self> {
        let id = FileId::of(&file.metadata()?);
        let on_disk = Arc::new(OnDisk::new(folder.join(name)));
        let slot = Slot::with(Some(on_disk.clone()));
        drop(slot.put(file));
        let name = Some(Name { folder: folder.clone(), name: OsStr::new(name).into(), id });
        Ok(ScratchFile { name, slot, on_disk, _temp: None })
    }

    /// As the list of open files does to make room.
    #[cfg(test)]
    pub(super) fn close(&self) {
        if self.name.is_some() {
            self.slot.close();
        }
    }

    /// Where it is, for messages.
    pub(super) fn path(&self) -> &Path {
        &self.on_disk.path
    }

    /// Calls `act` with the open file, which it does not write to. Takes no lock and allocates nothing if it is open.
    ///
    /// # Errors
    /// It cannot be opened again; those of `act`.
    pub(super) fn with<T>(&self, act: impl FnOnce(&File) -> io::Result<T>) -> io::Result<T> {
        match self.slot.get().as_ref() {
            Some(opened) => act(opened),
            None => act(&*self.opened()?),
        }
    }

    /// The same where `act` may write.
    ///
    /// # Errors
    /// As [`ScratchFile::with`].
    pub(super) fn change<T>(&self, act: impl FnOnce(&File) -> io::Result<T>) -> io::Result<T> {
        self.with(|file| {
            let done = act(file);
            // Before the descriptor goes, and also of what failed half-way.
            self.on_disk.unsynced.store(true, Ordering::SeqCst);
            done
        })
    }

    fn opened(&self) -> io::Result<Arc<Opened>> {
        if let Some(opened) = self.slot.get().as_ref() {
            return Ok(opened.clone());
        }
        let Some(Name { folder, name, id }) = &self.name else {
            return Err(io::Error::other("it is closed"));
        };
        let file = open_with_room(|| folder.open_with(name, Access::ReadWrite))?;
        match FileId::of(&file.metadata()?) == *id {
            true => Ok(self.slot.put(file)),
            false => Err(io::Error::other("another file has taken its place")),
        }
    }

    /// Fills `buf` with the bytes at `offset`.
    ///
    /// # Errors
    /// What the operating system said; `UnexpectedEof` past the end.
    pub(super) fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.with(|file| file.read_exact_at(buf, offset))
    }

    /// Writes `data` at `offset`.
    ///
    /// # Errors
    /// What the operating system said.
    pub(super) fn write_all_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.change(|file| file.write_all_at(data, offset))
    }

    /// Has all that was written survive a power cut, as far as the file itself does; with `all` its length, too.
    ///
    /// # Errors
    /// What the operating system said, now or at an earlier time: what is on disk is not known since.
    pub(super) fn sync(&self, all: bool) -> io::Result<()> {
        // Held beyond the lock: closing a file may take it.
        let opened = self.opened()?;
        self.on_disk.sync(&opened, all)
    }

    /// Whether all that was said to be on disk is.
    ///
    /// # Errors
    /// An earlier [`ScratchFile::sync`] failed, or what was written before it was closed.
    pub(super) fn check(&self) -> io::Result<()> {
        self.on_disk.check()
    }

    /// Says that nobody needs what is in it any more.
    pub(super) fn give_up(&self) {
        self.on_disk.given_up.store(true, Ordering::SeqCst);
    }
}

impl Drop for ScratchFile {
    fn drop(&mut self) {
        self.slot.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(dir: &tempfile::TempDir) -> Arc<Folder> {
        Arc::new(Folder::open(&dir.path().canonicalize().unwrap()).unwrap())
    }

    #[test]
    fn what_was_written_is_on_disk_before_it_is_closed_and_a_failure_there_lasts() {
        // It takes all writes and fails each fdatasync, as a disk may.
        let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null").unwrap();
        let on_disk = Arc::new(OnDisk::new("null".into()));
        // Nothing was written: nothing is to be done.
        on_disk.before_close(&null);
        on_disk.check().unwrap();
        on_disk.unsynced.store(true, Ordering::SeqCst);
        let slot = Slot::with(Some(on_disk.clone()));
        drop(slot.put(null));
        slot.close();
        // Also where the next one would succeed.
        on_disk.sync(&tempfile::tempfile().unwrap(), false).unwrap_err();
        on_disk.check().unwrap_err();
    }

    #[test]
    fn it_is_opened_again_and_another_file_is_never_taken_for_it() {
        let dir = tempfile::tempdir().unwrap();
        let file = ScratchFile::create(&folder(&dir), "a").unwrap();
        file.write_all_at(b"bytes", 7).unwrap();
        file.close();
        let mut got = [0; 5];
        file.read_exact_at(&mut got, 7).unwrap();
        assert_eq!(&got, b"bytes");
        file.close();
        std::fs::rename(dir.path().join("a"), dir.path().join("b")).unwrap();
        std::fs::copy(dir.path().join("b"), dir.path().join("a")).unwrap();
        file.read_exact_at(&mut got, 7).unwrap_err();
        file.write_all_at(b"other", 7).unwrap_err();
    }
}
