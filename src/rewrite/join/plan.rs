//! Planning it.

use super::images::Images;
use super::planned::{JoinPlan, no_files};
use super::refuse::{check_device, check_times, check_vm};
use crate::chain::Disk;
use crate::error::{Error, Kind, Result};
use crate::folder::FileId;
use crate::journal::linking::Linking;
use crate::text::to_text;
use std::ffi::OsStr;

/// Plans to join the points of `old` with those of `new`.
///
/// # Errors
/// `Usage` if they are not for certain one disk's, or nobody could tell afterwards; `Exists` if a name
/// is taken; `Unsupported` for what another program keeps there.
pub(crate) fn plan(old: &Disk, new: &Disk, other_vm: bool, force: bool) -> Result<JoinPlan> {
    let (from, to) = (Images::of(old)?, Images::of(new)?);
    if old.path == new.path {
        return Err(Error::new(Kind::Usage, "both names are the same disk's"));
    }
    if !other_vm {
        check_vm(&from, &to)?;
    }
    let mut points = Vec::new();
    for p in &from.points {
        points.push(from.moved(p, &to)?);
    }
    check_times(&from, &to, &points)?;
    check_device(&from, &to, force)?;
    from.check_images()?;
    points.extend(from.lost(&to)?);
    for p in &points {
        let there = to.folder.look(&p.to).ok().map(|m| FileId::of(&m));
        if there.is_some() && there != p.id {
            let what = format!("{} would be called {}, which is another file", p.from, p.to);
            return Err(Error::new(Kind::Exists, what).at_path(to.folder.path()));
        }
    }
    let arriving = points.iter().filter(|p| p.id.is_some()).map(|p| p.to.clone()).collect();
    let [o, n] = [old, new].map(|d| to_text(d.path.as_os_str()));
    Ok(JoinPlan {
        old: old.path.clone(),
        new: new.path.clone(),
        points,
        left: no_files(&from.folder, Some(OsStr::new(&from.tail)))?,
        linking: Linking { old: o, new: n, arriving, other_vm, force, arrived: false },
        from: from.folder.path().to_path_buf(),
        to: to.folder.path().to_path_buf(),
    })
}
