//! Whether there is room, before anything is begun.

use std::collections::HashMap;
use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Kind, Result};
use crate::units::human_bytes;

/// The least that must be free for a fleece, whatever the guest writes.
const FLEECE_MIN: u64 = 16 << 20;

/// The most that fleeces must leave free where they are. QEMU writes at most a few hundred MiB
/// between two looks.
const RESERVE_MAX: u64 = 1 << 30;

/// Bytes that an unprivileged user may still write where `path` (or its closest existing folder)
/// is.
///
/// # Errors
/// What the operating system said.
pub fn available(path: &Path) -> Result<u64> {
    Ok(room(path)?.0)
}

fn existing(path: &Path) -> &Path {
    path.ancestors().find(|p| p.exists()).unwrap_or(Path::new("/"))
}

/// Free bytes, and all bytes.
fn room(path: &Path) -> Result<(u64, u64)> {
    let dir = existing(path);
    let name = CString::new(dir.as_os_str().as_bytes())
        .map_err(|_| Error::new(Kind::Usage, "a NUL byte in a file name").at_path(dir))?;
    // SAFETY: all zeros is a valid statvfs; name is a C string.
    let mut s: libc::statvfs = unsafe { std::mem::zeroed() };
    if unsafe { libc::statvfs(name.as_ptr(), &mut s) } != 0 {
        return Err(
            Error::io(std::io::Error::last_os_error(), "cannot see the free space").at_path(dir)
        );
    }
    Ok((s.f_bavail.saturating_mul(s.f_frsize), s.f_blocks.saturating_mul(s.f_frsize)))
}

/// Which file system a path (or its closest existing folder) is on.
fn device(path: &Path) -> Result<u64> {
    let dir = existing(path);
    let meta = std::fs::metadata(dir);
    Ok(meta.map_err(|e| Error::io(e, "cannot see the file system").at_path(dir))?.dev())
}

/// What a run is going to write, file system by file system.
#[derive(Debug, Default)]
pub struct Budget {
    claimed: HashMap<u64, u64>,
}

impl Budget {
    /// Claims room for one disk, in all places or in none: folder, bytes, and what for.
    ///
    /// # Errors
    /// `NoSpace` if it is not free, or is claimed already; or what the operating system said.
    pub fn take(&mut self, claims: &[(&Path, u64, &str)]) -> Result<()> {
        let mut claimed = self.claimed.clone();
        for (dir, need, what) in claims {
            let sum = claimed.entry(device(dir)?).or_default();
            let before = *sum;
            *sum = sum.saturating_add(*need);
            require(dir, *need, before, what)?;
        }
        self.claimed = claimed;
        Ok(())
    }
}

/// What must stay free where fleece images are, file system by file system.
#[derive(Debug, Default)]
pub struct Reserves {
    of: HashMap<u64, u64>,
}

impl Reserves {
    /// A fleece will be made: fixes the reserve of its file system, a twentieth of it, if that has
    /// none yet. Where less than twice that is free the user wants it so, and it is half of that.
    ///
    /// # Errors
    /// What the operating system said.
    pub fn note(&mut self, fleece: &Path) -> Result<()> {
        let dir = fleece.parent().unwrap_or(Path::new("/"));
        let (free, all) = room(dir)?;
        self.of.entry(device(dir)?).or_insert((all / 20).min(RESERVE_MAX).min(free / 2));
        Ok(())
    }

    /// The largest of the fleeces on a file system that has fallen below its reserve.
    ///
    /// # Errors
    /// What the operating system said.
    pub fn worst<'a>(&self, fleeces: impl Iterator<Item = &'a Path>) -> Result<Option<PathBuf>> {
        let mut worst: Option<(u64, &Path)> = None;
        for f in fleeces {
            let Some(reserve) = self.of.get(&device(f)?) else { continue };
            if available(f)? < *reserve {
                let size = std::fs::metadata(f).map_or(0, |m| m.blocks());
                worst = worst.max(Some((size, f)));
            }
        }
        Ok(worst.map(|(_, f)| f.to_path_buf()))
    }
}

/// Fails with `NoSpace` if fewer than `need` bytes are free for `what` beside `others`.
fn require(dir: &Path, need: u64, others: u64, what: &str) -> Result<()> {
    let free = available(dir)?;
    if free >= need.saturating_add(others) {
        return Ok(());
    }
    let mut text =
        format!("{what} needs about {} and {} are free", human_bytes(need), human_bytes(free));
    if others > 0 {
        text.push_str(&format!(", of which this run needs {} elsewhere", human_bytes(others)));
    }
    Err(Error::new(Kind::NoSpace, text).at_path(dir).remedy("--no-space-check begins anyway"))
}

/// What an image of `copied` bytes takes compressed: half, by experience. It is not known before,
/// and guessing too high would refuse what fits.
pub fn compressed(copied: u64) -> u64 {
    copied / 2
}

/// What a fleece needs at least when `copied` bytes are to be copied: a twentieth of it.
pub fn fleece_need(copied: u64) -> u64 {
    (copied / 20).max(FLEECE_MIN).min(copied.max(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_needs_of_all_disks_on_one_file_system_are_added_up() {
        let d = tempfile::tempdir().unwrap();
        let (a, b) = (d.path().join("not/yet/there"), d.path().to_path_buf());
        // Other processes use the file system too: a third and two halves leave room for that.
        let free = available(&b).unwrap();
        let mut budget = Budget::default();
        budget.take(&[(&a, free / 3, "a"), (&b, free / 3, "b")]).unwrap();
        let e = budget.take(&[(&b, free / 6, "c"), (&a, free / 2, "d")]).unwrap_err();
        assert!(e.kind() == Kind::NoSpace && e.report().contains("d needs about"), "{e}");
        // What did not fit claims nothing.
        budget.take(&[(&b, free / 6, "e")]).unwrap();
    }

    #[test]
    fn the_largest_fleece_is_given_up_below_the_reserve() {
        let d = tempfile::tempdir().unwrap();
        let (small, large) = (d.path().join("s"), d.path().join("l"));
        std::fs::write(&small, "x").unwrap();
        std::fs::write(&large, vec![1; 1 << 20]).unwrap();
        let list = || [large.as_path(), small.as_path()].into_iter();
        let mut r = Reserves::default();
        r.note(&small).unwrap();
        assert_eq!(r.worst(list()).unwrap(), None);
        r.of.values_mut().for_each(|v| *v = u64::MAX);
        assert_eq!(r.worst(list()).unwrap(), Some(large.clone()));
    }
}
