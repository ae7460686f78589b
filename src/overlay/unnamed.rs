//! Files for overlays that are not kept.
//!
//! Such a file has no name (or a random one, where the file system has no others), so nothing could open it again:
//! it stays open. There is a bounded number of them. As long as that is not reached each overlay has one of its own;
//! then overlays share them, each with a stretch that is as long as its disk: a sparse file costs what is in it.

use std::io;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::file::ScratchFile;
use super::map::BLOCK;
use crate::error::{Error, Result};
use crate::folder::{Folder, Temp};
use crate::storage::files;

/// Files at most: more than writers that are at work at a time, who would wait for each other in one.
const MOST: usize = 64;

/// The files of a mount.
#[derive(Debug)]
pub(super) struct Unnamed {
    /// How many there may be.
    most: usize,
    files: Mutex<Vec<Shared>>,
}

#[derive(Debug)]
struct Shared {
    /// The overlays have it.
    file: Weak<ScratchFile>,
    /// Where the next stretch begins.
    end: u64,
}

impl Unnamed {
    /// None yet; where there will be `any`, descriptors are taken out of what the files of backups may have.
    pub(super) fn new(any: bool) -> Self {
        let most = if any { files::set_aside(MOST) } else { 0 };
        Unnamed { most, files: Mutex::default() }
    }

    /// A file in `folder`, and where in it is room for a disk of `size` bytes.
    ///
    /// # Errors
    /// What the operating system said; `ENFILE` if no more files may be open, and none can be long enough.
    pub(super) fn place(&self, folder: &Folder, size: u64) -> Result<(Arc<ScratchFile>, u64)> {
        let failed = |e| Error::io(e, "cannot make an overlay").at_path(folder.path());
        let mut all = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|shared| shared.file.strong_count() > 0);
        if all.len() < self.most {
            let file = Arc::new(make(folder).map_err(failed)?);
            all.push(Shared { file: Arc::downgrade(&file), end: stretch(0, size) });
            return Ok((file, 0));
        }
        // Those that the fewest have come first.
        all.sort_by_key(|shared| shared.file.strong_count());
        for shared in all.iter_mut() {
            let Some(file) = shared.file.upgrade() else { continue };
            let (base, end) = (shared.end, stretch(shared.end, size));
            if is_long_enough(&file, end).map_err(failed)? {
                shared.end = end;
                return Ok((file, base));
            }
        }
        Err(failed(io::Error::from_raw_os_error(libc::ENFILE)).remedy(
            "raise the limit of open files (ulimit -n), or name a scratch folder on a file system with larger files, \
             such as XFS",
        ))
    }
}

/// The end of a stretch.
fn stretch(base: u64, size: u64) -> u64 {
    base.saturating_add(size.next_multiple_of(BLOCK))
}

/// Makes a file reach as far as `end`; false where the file system has none so long.
fn is_long_enough(file: &ScratchFile, end: u64) -> io::Result<bool> {
    if i64::try_from(end).is_err() {
        return Ok(false);
    }
    match file.change(|file| file.set_len(end)) {
        Ok(()) => Ok(true),
        Err(e) if e.raw_os_error() == Some(libc::EFBIG) => Ok(false),
        Err(e) => Err(e),
    }
}

/// A file that is gone with this process, or with the next mount.
fn make(folder: &Folder) -> io::Result<ScratchFile> {
    let path = folder.path().to_path_buf();
    if let Some(file) = files::open_with_room(|| folder.create_unnamed())? {
        return Ok(ScratchFile::held(file, path, None));
    }
    let temp = Temp::create_named(folder.try_clone()?)?;
    let file = temp.file().try_clone()?;
    Ok(ScratchFile::held(file, path, Some(temp)))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::super::budget::Budget;
    use super::super::one::{Files, Overlay};
    use super::*;

    const SIZE: u64 = 10 * BLOCK + 100;

    #[test]
    fn beyond_a_number_of_files_overlays_share_them_and_never_a_byte() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::open(&dir.path().canonicalize().unwrap()).unwrap();
        let (budget, unnamed) =
            (Arc::new(Budget::new(u64::MAX)), Unnamed { most: 2, files: Mutex::default() });
        let below = |buf: &mut [u8], _: u64| {
            buf.fill(1);
            Ok(())
        };
        let make = || {
            let (data, base) = unnamed.place(&folder, SIZE).unwrap();
            let file = data.clone();
            let files = Files { data, base, map: None };
            (Overlay::new(SIZE, files, &budget).unwrap(), file, base)
        };
        let mut all: Vec<_> = (0..7).map(|_| make()).collect();
        for (i, (overlay, ..)) in all.iter().enumerate() {
            // To the last byte, and zeros that are holes.
            overlay.write(below, &[10 + i as u8; SIZE as usize - 50], 50).unwrap();
            overlay.zero(below, (1 + i as u64) * BLOCK, BLOCK).unwrap();
        }
        let check = |all: &[(Overlay, Arc<ScratchFile>, u64)], first: usize| {
            for (i, (overlay, ..)) in (first..).zip(all) {
                let mut want = vec![10 + i as u8; SIZE as usize];
                want[..50].fill(1);
                want[(1 + i) * BLOCK as usize..][..BLOCK as usize].fill(0);
                let mut got = vec![0; SIZE as usize];
                overlay.read_at(below, &mut got, 0).unwrap();
                assert!(got == want, "{i}");
            }
        };
        check(&all, 0);
        assert_eq!(unnamed.files.lock().unwrap().len(), 2);
        // The space of one that goes is had back, and the others are as they were.
        let (blocks, used) = (blocks_of(&all[0].1), budget.used());
        let (gone, file, _) = all.remove(0);
        drop(gone);
        let left = blocks_of(&file);
        assert!(left + 10 * BLOCK / 512 <= blocks, "{left} {blocks}");
        assert!(budget.used() + 10 * BLOCK <= used);
        drop(file);
        check(&all, 1);
        all.push(make());
        check(&all[..6], 1);
        drop(all);
        assert_eq!(budget.used(), 0);
    }

    fn blocks_of(file: &ScratchFile) -> u64 {
        file.with(|f| Ok(f.metadata()?.blocks())).unwrap()
    }
}
