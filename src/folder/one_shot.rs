//! A single act on a path: its folder is opened without following links, the act is done, and the
//! folder is closed.

use std::fs::{File, Metadata};
use std::io;
use std::path::Path;

use super::{Access, DeviceAccess, Entry, FileMode, Folder, absent_is_none, open, read_bounded};

/// Opens the plain file at `path` for reading: [`Folder::open_file`] for a single act.
///
/// # Errors
/// As [`Folder::of`] and [`Folder::open_file`].
pub fn open_file(path: &Path) -> io::Result<File> {
    open_with(path, Access::Read)
}

/// [`Folder::open_with`] for a single act.
///
/// # Errors
/// As [`Folder::of`] and [`Folder::open_with`].
pub fn open_with(path: &Path, access: Access) -> io::Result<File> {
    let path = std::path::absolute(path)?;
    let probe = open::handle(&path)?;
    open::plain_file(rustix::fs::CWD, path.as_os_str(), (&probe, &probe.metadata()?), access)
}

/// Opens a block device for reading and writing, for us alone: fails if it is mounted, or held by
/// RAID, LVM or swap.
///
/// # Errors
/// As [`open_device_with`].
pub fn open_device(path: &Path) -> io::Result<File> {
    open_device_with(path, DeviceAccess::WriteAlone)
}

/// Opens a block device.
///
/// # Errors
/// As [`Folder::of`]; a refusal for anything else than a block device; `ResourceBusy`.
pub fn open_device_with(path: &Path, access: DeviceAccess) -> io::Result<File> {
    open::device(&open::handle(&std::path::absolute(path)?)?, path, access)
}

/// Metadata of `path`, of the link itself if it is one; no link on the way to it is followed.
///
/// # Errors
/// What the operating system said, `NotFound` among it.
pub fn look(path: &Path) -> io::Result<Metadata> {
    open::handle(&std::path::absolute(path)?)?.metadata()
}

/// A handle (`O_PATH`) of what is at `path`: it names it, and gives no access to it.
///
/// # Errors
/// As [`look`].
pub fn pin(path: &Path) -> io::Result<File> {
    open::handle(&std::path::absolute(path)?)
}

/// Whether there is something at `path`.
pub fn exists(path: &Path) -> bool {
    look(path).is_ok()
}

/// Whether `path` is a folder and no link.
pub fn is_folder(path: &Path) -> bool {
    look(path).is_ok_and(|m| m.is_dir())
}

/// Whether `path` is a plain file and no link.
pub fn is_file(path: &Path) -> bool {
    look(path).is_ok_and(|m| m.is_file())
}

/// [`Folder::read_small`] for a single act.
///
/// # Errors
/// As [`Folder::of`] and [`Folder::read_small`].
pub fn read_small(path: &Path, max: u64) -> io::Result<Vec<u8>> {
    read_bounded(open_file(path)?, max)
}

/// [`Folder::entries`] for a single act.
///
/// # Errors
/// As [`Folder::open`] and [`Folder::entries`].
pub fn entries(path: &Path) -> io::Result<Vec<Entry>> {
    Folder::open(path)?.entries()
}

/// [`Folder::write_shared`] for a single act.
///
/// # Errors
/// As [`Folder::of`] and [`Folder::write_shared`].
pub fn write_shared(path: &Path, bytes: &[u8], share: FileMode) -> io::Result<()> {
    let (folder, name) = Folder::of(path)?;
    folder.write_shared(name, bytes, share)
}

/// [`Folder::write_whole`] for a single act.
///
/// # Errors
/// As [`Folder::of`] and [`Folder::write_whole`].
pub fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let (folder, name) = Folder::of(path)?;
    folder.write_whole(name, bytes)
}

/// [`Folder::remove_if_there`] for a single act.
///
/// # Errors
/// As [`Folder::of`] and [`Folder::remove_if_there`].
pub fn remove_if_there(path: &Path) -> io::Result<bool> {
    let Some((folder, name)) = absent_is_none(Folder::of(path))? else { return Ok(false) };
    folder.remove_if_there(name)
}

/// Makes the folder `path` and those above it that are missing, each with mode 0700, so that they
/// survive a power cut, and gives it.
///
/// # Errors
/// What the operating system said; a refusal if there is a link on the path.
pub fn make_folders(path: &Path) -> io::Result<Folder> {
    let path = std::path::absolute(path)?;
    let there = path.ancestors().find_map(|a| match Folder::open(a) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => None,
        other => Some(other),
    });
    let mut folder = there.unwrap_or_else(|| Folder::open(Path::new("/")))?;
    let missing = path.strip_prefix(&folder.path).map(Path::to_path_buf).unwrap_or_default();
    for part in missing.components() {
        folder = folder.make_folder(part.as_os_str())?;
    }
    Ok(folder)
}
