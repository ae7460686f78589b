//! Whether there is room, before anything is begun.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::StatVfs;

use crate::error::{Error, Kind, Result};
use crate::folder::{Folder, absent_is_none};
use crate::units::human_bytes;

/// The least that must be free for a fleece, whatever the guest writes.
const FLEECE_MIN: u64 = 16 << 20;

/// The most that fleeces must leave free where they are. QEMU writes at most a few hundred MiB
/// between two looks.
const RESERVE_MAX: u64 = 1 << 30;

/// The space on one file system, by an open file or folder on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Space {
    /// Which file system it is.
    device: u64,
    /// Bytes that an unprivileged user may still write.
    free: u64,
    /// All bytes.
    all: u64,
    /// What was looked at, for messages.
    path: PathBuf,
}

impl Space {
    /// Where `path` (or the closest folder above it that is there) is.
    ///
    /// # Errors
    /// What the operating system said.
    pub fn at(path: &Path) -> Result<Self> {
        let failed = |e| Error::io(e, "cannot see the free space").at_path(path);
        let path = std::path::absolute(path).map_err(failed)?;
        for dir in path.ancestors() {
            if let Some(folder) = absent_is_none(Folder::open(dir)).map_err(failed)? {
                let device = folder.metadata().map_err(failed)?.dev();
                return Ok(Self::new(device, folder.space().map_err(failed)?, dir));
            }
        }
        Err(failed(std::io::ErrorKind::NotFound.into()))
    }

    /// Where an open file is; `path` is for messages.
    ///
    /// # Errors
    /// What the operating system said.
    pub fn of(file: &File, path: &Path) -> Result<Self> {
        let failed = |e| Error::io(e, "cannot see the free space").at_path(path);
        let device = file.metadata().map_err(failed)?.dev();
        let space = rustix::fs::fstatvfs(file).map_err(|e| failed(e.into()))?;
        Ok(Self::new(device, space, path))
    }

    fn new(device: u64, s: StatVfs, path: &Path) -> Self {
        let bytes = |blocks: u64| blocks.saturating_mul(s.f_frsize);
        let (free, all) = (bytes(s.f_bavail), bytes(s.f_blocks));
        Space { device, free, all, path: path.to_path_buf() }
    }
}

/// What a run is going to write, file system by file system.
#[derive(Debug, Default)]
pub(crate) struct Budget {
    claimed: HashMap<u64, u64>,
}

impl Budget {
    /// Claims space for one disk, in all places or in none: where, bytes, and what for.
    ///
    /// # Errors
    /// `NoSpace` if it is not free, or is claimed already; or what the operating system said.
    pub(crate) fn take(&mut self, claims: &[(Space, u64, &str)]) -> Result<()> {
        let mut claimed = self.claimed.clone();
        for (space, need, what) in claims {
            let sum = claimed.entry(space.device).or_default();
            let before = *sum;
            *sum = sum.saturating_add(*need);
            require(space, *need, before, what)?;
        }
        self.claimed = claimed;
        Ok(())
    }
}

/// What must stay free where fleece images are, file system by file system.
#[derive(Debug, Default)]
pub(crate) struct Reserves {
    of: HashMap<u64, u64>,
}

impl Reserves {
    /// A fleece will be made: fixes the reserve of its file system, a twentieth of it, if that has
    /// none yet. Where less than twice that is free the user wants it so, and it is half of that.
    pub(crate) fn note(&mut self, fleece: &Space) {
        let reserve = (fleece.all / 20).min(RESERVE_MAX).min(fleece.free / 2);
        self.of.entry(fleece.device).or_insert(reserve);
    }

    /// Whether the file system of a fleece has fallen below its reserve.
    pub(crate) fn is_short(&self, fleece: &Space) -> bool {
        self.of.get(&fleece.device).is_some_and(|reserve| fleece.free < *reserve)
    }
}

/// Fails with `NoSpace` if fewer than `need` bytes are free for `what` beside `others`.
fn require(space: &Space, need: u64, others: u64, what: &str) -> Result<()> {
    let free = space.free;
    if free >= need.saturating_add(others) {
        return Ok(());
    }
    let mut text =
        format!("{what} needs about {} and {} are free", human_bytes(need), human_bytes(free));
    if others > 0 {
        text.push_str(&format!(", of which this run needs {} elsewhere", human_bytes(others)));
    }
    Err(Error::new(Kind::NoSpace, text)
        .at_path(&space.path)
        .remedy("--no-space-check begins anyway"))
}

/// What an image of `copied` bytes takes compressed: half, by experience. It is not known before,
/// and guessing too high would refuse what fits.
pub(crate) fn compressed(copied: u64) -> u64 {
    copied / 2
}

/// What a fleece needs at least when `copied` bytes are to be copied: a twentieth of it.
pub(crate) fn fleece_need(copied: u64) -> u64 {
    (copied / 20).max(FLEECE_MIN).min(copied.max(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_needs_of_all_disks_on_one_file_system_are_added_up() {
        let d = tempfile::tempdir().unwrap();
        let dir = d.path().canonicalize().unwrap();
        let a = || Space::at(&dir.join("not/yet/there")).unwrap();
        let b = || Space::of(&tempfile::tempfile_in(&dir).unwrap(), &dir).unwrap();
        // Other processes use the file system too: a third and two halves leave room for that.
        let free = a().free;
        let mut budget = Budget::default();
        budget.take(&[(a(), free / 3, "a"), (b(), free / 3, "b")]).unwrap();
        let e = budget.take(&[(b(), free / 6, "c"), (a(), free / 2, "d")]).unwrap_err();
        assert!(e.kind() == Kind::NoSpace && e.report().contains("d needs about"), "{e}");
        // What did not fit claims nothing.
        budget.take(&[(b(), free / 6, "e")]).unwrap();
    }

    #[test]
    fn a_file_system_below_its_reserve_is_short() {
        let space = |free| Space { device: 1, free, all: 1 << 30, path: PathBuf::new() };
        let mut r = Reserves::default();
        assert!(!r.is_short(&space(0)));
        r.note(&space(1 << 29));
        r.note(&space(0));
        assert!(!r.is_short(&space((1 << 30) / 20)) && r.is_short(&space((1 << 30) / 20 - 1)));
        let other = Space { device: 2, ..space(10) };
        r.note(&other);
        assert!(!r.is_short(&other) && r.is_short(&Space { free: 4, ..other }));
    }
}
