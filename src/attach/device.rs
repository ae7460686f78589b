//! Block devices: their nodes, and their bytes.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::place::Place;
use crate::error::{Error, Kind, Result};
use crate::files::{Blocks, Content, Source, probe};
use crate::folder::{self, DeviceAccess, system};
use crate::storage::ReadAt;
use crate::text::path_text;

/// Where the kernel lists block devices.
const SYS: &str = "/sys/class/block";
/// Memory for looking at what is on a device.
const CACHE: u64 = 4 << 20;

/// An open file or block device that is read by position.
struct Bytes {
    file: File,
    len: u64,
    path: PathBuf,
}

impl ReadAt for Bytes {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(buf, offset)
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn name(&self) -> &Path {
        &self.path
    }
}

/// An open file or device as readers of file systems take it.
///
/// # Errors
/// What the operating system said.
pub(super) fn source(mut file: File, path: &Path) -> Result<Source> {
    let failed = |e| Error::io(e, "cannot read the size").at_path(path);
    let len = file.seek(SeekFrom::End(0)).map_err(failed)?;
    let bytes = Bytes { file, len, path: path.to_path_buf() };
    Ok(Source::new(Arc::new(bytes), &path_text(path), &Blocks::new(CACHE)))
}

/// A device as readers of file systems take it.
///
/// # Errors
/// It cannot be opened.
pub(super) fn open_source(path: &Path) -> Result<Source> {
    source(open(path, DeviceAccess::Read)?, path)
}

/// What is on a device.
///
/// # Errors
/// It cannot be read.
pub(super) fn content(path: &Path) -> Result<Content> {
    probe(&open_source(path)?)
}

/// Opens a device.
///
/// # Errors
/// What the operating system said; `Busy` if it is to be ours alone and somebody else has it.
pub(super) fn open(path: &Path, access: DeviceAccess) -> Result<File> {
    let opened = folder::open_device_with(path, access);
    opened.map_err(|e| Error::io(e, "cannot open the device").at_path(path))
}

/// The node of the block device that the kernel calls `name`: in `/dev`, or one of our own.
///
/// # Errors
/// `NotFound` if there is no such device; no node can be made.
pub(super) fn node(place: &Place, name: &str) -> Result<PathBuf> {
    let numbers = numbers(name)
        .ok_or_else(|| Error::new(Kind::NotFound, format!("the kernel has no device {name}")))?;
    existing(place, name, numbers).map_or_else(|| place.node(name, numbers), Ok)
}

fn existing(place: &Place, name: &str, numbers: (u32, u32)) -> Option<PathBuf> {
    let all = [Path::new("/dev").join(name), place.nodes().join(name)];
    all.into_iter().find(|p| is_node(p, numbers))
}

/// Where the node of a device is that there may be: the one in `/dev` if it has none.
pub(super) fn path(place: &Place, name: &str) -> PathBuf {
    let found = numbers(name).and_then(|numbers| existing(place, name, numbers));
    found.unwrap_or_else(|| Path::new("/dev").join(name))
}

/// What the kernel calls the device whose node is at `path`, if that is where nodes are.
pub(super) fn name_of<'a>(place: &Place, path: &'a Path) -> Option<&'a str> {
    let above = path.parent()?;
    let is_there = above == Path::new("/dev") || above == place.nodes();
    path.file_name().and_then(|n| n.to_str()).filter(|_| is_there)
}

/// The numbers of the block device that `path` leads to, links followed.
pub(super) fn at(path: &Path) -> Option<u64> {
    let found = folder::look(&folder::resolve(path).ok()?).ok()?;
    found.file_type().is_block_device().then(|| found.rdev())
}

/// Whether `path` is the node of the block device with these numbers.
pub(super) fn is_node(path: &Path, (major, minor): (u32, u32)) -> bool {
    let rdev = rustix::fs::makedev(major, minor);
    folder::look(path).is_ok_and(|m| m.file_type().is_block_device() && m.rdev() == rdev)
}

/// Major and minor number of the device that the kernel calls `name`.
fn numbers(name: &str) -> Option<(u32, u32)> {
    let text = setting(name, "dev")?;
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// What `/sys` says of a block device, without the line's end.
pub(super) fn setting(name: &str, what: &str) -> Option<String> {
    let text = system::text(&Path::new(SYS).join(name).join(what)).ok()?;
    Some(text.trim_end_matches('\n').to_string())
}

/// The same as a number.
pub(super) fn number(name: &str, what: &str) -> Option<u64> {
    setting(name, what)?.parse().ok()
}

/// All block devices whose names begin with `prefix`.
pub(super) fn all(prefix: &str) -> Vec<String> {
    let names = system::names(Path::new(SYS)).into_iter();
    names.filter_map(|n| n.into_string().ok()).filter(|n| n.starts_with(prefix)).collect()
}
