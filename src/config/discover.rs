//! VMs that no file names: their sockets are where the pattern says, in folders that nobody else may change.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::values::vm_name;
use crate::folder::{self, Folder};
use crate::text::path_text;

/// Names that are looked at in one folder.
const MOST_NAMES: usize = 10_000;

/// A socket that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    /// The VM's name: what the `*` stands for.
    pub name: String,
    /// The socket.
    pub socket: PathBuf,
}

/// The sockets that a pattern with one `*` finds. What is passed over, and why, is added to `notes`.
pub(super) fn found(pattern: &str, notes: &mut Vec<String>) -> Vec<Found> {
    let Some((before, after)) = pattern.split_once('*') else { return Vec::new() };
    // The folder, and what the name in it begins with.
    let (above, begin) = before.rsplit_once('/').unwrap_or(("", before));
    let (end, below) = match after.split_once('/') {
        Some((end, below)) => (end, Some(below)),
        None => (after, None),
    };
    let above = PathBuf::from(format!("{above}/"));
    let entries = folder::resolve(&above).and_then(|r| folder::entries(&r).map(|all| (r, all)));
    let (real, entries) = match entries {
        Ok(both) => both,
        Err(e) => {
            notes
                .push(format!("discover: {pattern}: nothing is found: {}: {e}", path_text(&above)));
            return Vec::new();
        }
    };
    let mut found = Vec::new();
    for entry in entries.into_iter().take(MOST_NAMES) {
        let bytes = entry.name.as_bytes();
        let inner = bytes.strip_prefix(begin.as_bytes());
        let inner = inner.and_then(|b| b.strip_suffix(end.as_bytes()));
        let Some(name) = inner.and_then(|b| std::str::from_utf8(b).ok()) else { continue };
        let there = real.join(&entry.name);
        let socket = below.map_or_else(|| there.clone(), |below| there.join(below));
        if !is_socket(&socket) {
            continue;
        }
        match usable(name, &socket) {
            Ok(socket) => found.push(Found { name: name.to_string(), socket }),
            Err(why) => notes.push(format!("{}: passed over: {why}", path_text(&socket))),
        }
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    found
}

/// Nothing is opened by it: what is there is only looked at.
fn is_socket(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    let real = folder::resolve(path).ok();
    real.and_then(|r| folder::look(&r).ok()).is_some_and(|m| m.file_type().is_socket())
}

/// The socket's real path, if nobody else could have put it there.
fn usable(name: &str, socket: &Path) -> Result<PathBuf, String> {
    vm_name(name)?;
    let real = folder::resolve(socket).map_err(|e| e.to_string())?;
    let folder = real.parent().unwrap_or(Path::new("/"));
    folder::check_unchangeable(folder, "name the VM in the configuration")
        .map_err(|e| e.report())?;
    let held = Folder::open(folder).map_err(|e| e.to_string())?;
    let owner = real.file_name().and_then(|n| held.look(n).ok());
    match owner {
        Some(meta) if folder::is_own(&meta) => Ok(real),
        _ => Err("it belongs to another user; name the VM in the configuration".into()),
    }
}
