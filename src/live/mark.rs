//! A mark in the backup directory, from before the guest runs until no image needs the backup: it speaks also while no
//! command of ours lives, and whoever would take away what the VM needs is refused by it.
//!
//! Whoever owns the backup may write what he likes into a mark, or remove it. It can only refuse: nothing that it says
//! is opened or removed.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::journal::{Begun, NewDisk};
use crate::error::{Error, Kind, Result};
use crate::folder::{self, Folder};
use crate::lock::Locks;
use crate::manifest::FOLDER;
use crate::text::{json, path_text, to_text};

/// Around the id in its name.
const PREFIX: &str = "live-restore-";
const SUFFIX: &str = ".json";
/// The largest one that is read, in bytes.
const LARGEST: u64 = 1 << 20;
/// The longest path that is repeated, in bytes.
const LONGEST_PATH: usize = 4096;
const VERSION: u32 = 1;

/// What it says.
#[derive(Debug, Serialize, Deserialize)]
struct Mark {
    /// [`VERSION`].
    format_version: u32,
    /// The storage folder.
    storage: String,
    /// The host that the VM runs on.
    host: String,
    /// When it began, in seconds since the epoch.
    time: i64,
    /// Whether the VM is another than the one that was backed up.
    new_identity: bool,
    /// The points that are needed, as `list` shows them.
    points: Vec<String>,
}

fn point(disk: &NewDisk) -> String {
    to_text(Path::new(&disk.point.disk).join(&disk.point.name).as_os_str())
}

fn name(begun: &Begun) -> String {
    format!("{PREFIX}{}{SUFFIX}", begun.id)
}

/// What this host is called.
fn host() -> String {
    let name = folder::system::text(Path::new("/proc/sys/kernel/hostname")).unwrap_or_default();
    name.trim().to_string()
}

/// Whether a file in the folder for manifests is one, by its name.
fn is_mark(name: &str) -> bool {
    let id = name.strip_prefix(PREFIX).and_then(|n| n.strip_suffix(SUFFIX));
    id.is_some_and(|id| !id.is_empty() && id.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// Where the mark of `begun` is.
pub(super) fn path(begun: &Begun) -> PathBuf {
    begun.backup.root.join(FOLDER).join(name(begun))
}

/// Writes it; the same again does no harm.
///
/// # Errors
/// The directory cannot be written.
pub(super) fn write(begun: &Begun, storage: &Path) -> Result<()> {
    let failed = |e| Error::io(e, "cannot write the mark").at_path(path(begun));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let mark = Mark {
        format_version: VERSION,
        storage: to_text(storage.as_os_str()),
        host: host(),
        time: i64::try_from(now).unwrap_or(i64::MAX),
        new_identity: begun.new_identity,
        points: begun.disks.iter().map(point).collect(),
    };
    let bytes = json(&mark).map_err(|e| failed(e.into()))?;
    let side = Folder::open(&begun.backup.root).and_then(|f| f.make_folder(FOLDER));
    let side = side.map_err(failed)?;
    side.write_whole(name(begun), bytes.as_bytes()).and_then(|()| side.sync()).map_err(failed)
}

/// Removes it, if it is there.
///
/// # Errors
/// The directory cannot be written.
pub(crate) fn remove(begun: &Begun) -> Result<()> {
    let gone = || {
        let side = folder::absent_is_none(Folder::open(&begun.backup.root.join(FOLDER)))?;
        side.map_or(Ok(false), |side| side.remove_if_there(name(begun)))
    };
    gone().map(drop).map_err(|e| {
        Error::io(e, "the backup is needed no longer, but its mark cannot be removed")
            .at_path(path(begun))
            .remedy("remove that file: until then 'prune' and others are refused")
    })
}

/// The marks in a folder for manifests, with what they say, where that can be read.
fn standing(side: &Path) -> Result<Vec<(PathBuf, Option<Mark>)>> {
    let failed = |e| Error::io(e, "cannot look for live restores").at_path(side);
    let Some(side) = folder::absent_is_none(Folder::open(side)).map_err(failed)? else {
        return Ok(Vec::new());
    };
    let entries = side.entries().map_err(failed)?;
    let mut names: Vec<_> = entries.into_iter().map(|e| e.name).collect();
    names.retain(|n| n.to_str().is_some_and(is_mark));
    names.sort();
    let read = |name: &OsString| -> Option<Mark> {
        let mark: Mark = serde_json::from_slice(&side.read_small(name, LARGEST).ok()?).ok()?;
        (mark.storage.len() <= LONGEST_PATH).then_some(mark)
    };
    Ok(names.into_iter().map(|name| (side.join(&name), read(&name))).collect())
}

/// Fails while a VM needs the backups that are locked.
///
/// # Errors
/// `Busy` with the path of a mark; a folder cannot be read.
pub(crate) fn check_none(locks: &Locks) -> Result<()> {
    for side in locks.folders() {
        let Some((path, mark)) = standing(side)?.into_iter().next() else { continue };
        let what = match mark {
            Some(m) => format!(
                "a VM of 'live-restore' still needs this backup: its disks are in {} on {}",
                path_text(Path::new(&m.storage)),
                path_text(Path::new(&m.host))
            ),
            None => "a VM of 'live-restore' still needs this backup".into(),
        };
        return Err(Error::new(Kind::Busy, what).at_path(path).remedy(
            "run that live-restore again until its disks are copied; if that VM was given up, remove this file",
        ));
    }
    Ok(())
}

/// Fails if the VM of these points was started already, from another folder.
///
/// # Errors
/// `Busy` with the path of its mark; the folder cannot be read.
pub(crate) fn check_first(begun: &Begun, storage: &Path) -> Result<()> {
    if begun.new_identity {
        return Ok(());
    }
    let (own, host) = (to_text(storage.as_os_str()), host());
    let points: Vec<String> = begun.disks.iter().map(point).collect();
    for (path, mark) in standing(&begun.backup.root.join(FOLDER))? {
        let is_other = |m: &Mark| !m.new_identity && (m.storage != own || m.host != host);
        let (is_same_vm, place) = match mark {
            Some(m) => {
                let place = format!(
                    "in {} on {}",
                    path_text(Path::new(&m.storage)),
                    path_text(Path::new(&m.host))
                );
                (is_other(&m) && m.points.iter().any(|p| points.contains(p)), place)
            }
            // Whoever damaged it does not start a VM twice.
            None => (path != self::path(begun), "in a place that its mark does not tell".into()),
        };
        if is_same_vm {
            let what = format!("this VM was started already, with its disks {place}");
            return Err(Error::new(Kind::Busy, what).at_path(path).remedy(
                "--new-identity starts another VM of the same point; if that one was given up, remove this file",
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_that_are_made_here_are_marks() {
        assert!(is_mark("live-restore-0a1b.json"));
        for other in
            ["live-restore-.json", "live-restore-x.json", "live-restore-0a", "FULL-1-a.json"]
        {
            assert!(!is_mark(other), "{other}");
        }
    }

    #[test]
    fn whatever_a_mark_says_it_refuses() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let locks = Locks::take(&root).unwrap();
        check_none(&locks).unwrap();
        let file = root.join(FOLDER).join("live-restore-00.json");
        for text in ["", "{", "[1]", r#"{"storage": 3}"#] {
            std::fs::write(&file, text).unwrap();
            let e = check_none(&locks).unwrap_err();
            assert_eq!(e.kind(), Kind::Busy, "{text}");
            assert!(e.report().contains("live-restore-00.json"), "{}", e.report());
        }
        std::fs::remove_file(&file).unwrap();
        std::os::unix::fs::symlink("/dev/zero", &file).unwrap();
        assert_eq!(check_none(&locks).unwrap_err().kind(), Kind::Busy);
        std::fs::remove_file(&file).unwrap();
        check_none(&locks).unwrap();
    }
}
