//! Loop devices with partitions: attached to a file of the private mount, and detached again.
//!
//! Partitions come from the table as `files` reads it: where the kernel knows the kind of table, it finds the same;
//! where it does not, it is told (as partx does). A device is only ever detached if it is ours: attached to the file
//! that the journal names, under the name of the attachment. (Not by LO_FLAGS_AUTOCLEAR: a device of which somebody
//! unmounts the only file system by hand is still wanted.)

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::device;
use super::ioctl;
use super::place::Place;
use crate::error::{Error, Kind, Result};
use crate::failpoint::step;
use crate::files::Partition;
use crate::folder::{DeviceAccess, FileId};
use crate::text::path_text;

/// How often another program may take the free device away.
const TRIES: usize = 64;
/// How long somebody who just looks at devices (udev) may have one open.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often it is looked at.
const LOOK: Duration = Duration::from_millis(10);

/// A loop device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Loop {
    /// Of `/dev/loopN`.
    pub number: u32,
    /// Its node.
    pub path: PathBuf,
}

/// A partition of one: its number, and its node or why it has none.
pub(super) type Part = (u32, Result<PathBuf>);

/// Attaches a free device to `file`; `announce` writes down which one before it is attached.
///
/// # Errors
/// There is none, or it cannot be attached.
pub(super) fn attach(
    place: &Place,
    file: &File,
    (sector, read_only): (u32, bool),
    mut announce: impl FnMut(u32) -> Result<()>,
) -> Result<Loop> {
    for _ in 0..TRIES {
        let number = ioctl::free_loop().map_err(no_control)?;
        announce(number)?;
        let path = device::node(place, &format!("loop{number}"))?;
        let open = device::open(&path, open_access(read_only));
        let made = open.and_then(|device| {
            let name = ioctl::loop_name(&place.name());
            ioctl::attach_loop(&device, file, name, (sector, read_only))
                .map_err(|e| Error::io(e, "cannot attach a loop device").at_path(&path))
        });
        match made {
            Ok(()) => {
                step("loop");
                return Ok(Loop { number, path });
            }
            // Somebody else has it by now.
            Err(e) if e.kind() == Kind::Busy => {}
            Err(e) => return Err(e),
        }
    }
    Err(Error::new(Kind::Busy, "other programs take all free loop devices"))
}

/// A device that was read-only last may only be opened for reading.
fn open_access(read_only: bool) -> DeviceAccess {
    if read_only { DeviceAccess::Alone } else { DeviceAccess::WriteAlone }
}

fn no_control(e: io::Error) -> Error {
    Error::io(e, "cannot get a loop device").at_path("/dev/loop-control").remedy(
        "'modprobe loop'; a container needs /dev/loop-control and the right to use loop devices",
    )
}

impl Loop {
    /// The partitions of its table, each with its node.
    ///
    /// # Errors
    /// The device cannot be opened.
    pub(super) fn partitions(&self, place: &Place, wanted: &[Partition]) -> Result<Vec<Part>> {
        let disk = device::open(&self.path, DeviceAccess::Read)?;
        let one = |p: &Partition| (p.number, self.partition(place, &disk, p));
        Ok(wanted.iter().map(one).collect())
    }

    fn partition(&self, place: &Place, disk: &File, wanted: &Partition) -> Result<PathBuf> {
        const SECTOR: u64 = 512;
        let name = format!("loop{}p{}", self.number, wanted.number);
        let is_it = || {
            let (start, size) = (device::number(&name, "start"), device::number(&name, "size"));
            start == Some(wanted.start / SECTOR) && size == Some(wanted.len / SECTOR)
        };
        if !is_it() {
            let failed = |e| {
                Error::io(e, format!("cannot make partition {}", wanted.number)).at_path(&self.path)
            };
            if device::number(&name, "start").is_some() {
                ioctl::remove_partition(disk, wanted.number).map_err(failed)?;
            }
            ioctl::add_partition(disk, wanted.number, wanted.start, wanted.len).map_err(failed)?;
        }
        if !is_it() {
            let what = format!("partition {} is not what its table says", wanted.number);
            return Err(Error::new(Kind::Corrupt, what).at_path(&self.path));
        }
        device::node(place, &name)
    }
}

/// Detaches the device if it is still ours, and waits until it is.
///
/// # Errors
/// `Busy` if somebody has it open, or something is on it.
pub(super) fn undo(place: &Place, number: u32, file: FileId) -> Result<()> {
    let name = format!("loop{number}");
    if device::setting(&name, "dev").is_none() {
        return Ok(());
    }
    let path = device::node(place, &name)?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        if !is_ours(place, &path, number, file)? {
            return Ok(());
        }
        let detached = device::open(&path, DeviceAccess::Alone).and_then(|device| {
            ioctl::detach_loop(&device)
                .map_err(|e| Error::io(e, "cannot detach the loop device").at_path(&path))
        });
        match detached {
            Ok(()) if !is_ours(place, &path, number, file)? => return Ok(()),
            Err(e) if e.kind() != Kind::Busy => return Err(e),
            _ if Instant::now() >= deadline => return Err(busy(&path)),
            _ => std::thread::sleep(LOOK),
        }
    }
}

fn busy(path: &Path) -> Error {
    Error::new(Kind::Busy, "the loop device is still in use").at_path(path).remedy(format!(
        "unmount or close what uses it ('lsblk {0}', 'fuser -v {0}'), and detach again",
        path_text(path)
    ))
}

/// Whether the device is attached to our file, by us.
fn is_ours(place: &Place, path: &Path, number: u32, file: FileId) -> Result<bool> {
    // Without a question to who serves the file: he may be dead, or hang.
    if backing(number).is_none() {
        return Ok(false);
    }
    if is_attached(place, number) {
        return Ok(true);
    }
    // Where the mount was detached lazily its files have no whole path any more.
    let opened = device::open(path, DeviceAccess::Read)?;
    let status = ioctl::loop_status(&opened)
        .map_err(|e| Error::io(e, "cannot check the loop device").at_path(path))?;
    Ok(status.is_some_and(|s| s.file == file && s.name == ioctl::loop_name(&place.name())))
}

/// Whether loop device `number` is attached to a file that `place` serves.
pub(super) fn is_attached(place: &Place, number: u32) -> bool {
    backing(number).is_some_and(|file| file.starts_with(place.mount()))
}

/// Whether loop device `number` is still attached to `file` by us.
///
/// # Errors
/// It cannot be looked at.
pub(super) fn is_still_ours(place: &Place, number: u32, file: FileId) -> Result<bool> {
    let name = format!("loop{number}");
    if device::setting(&name, "dev").is_none() {
        return Ok(false);
    }
    is_ours(place, &device::node(place, &name)?, number, file)
}

/// The file that loop device `number` is attached to, as the kernel calls it; `None` if it is not attached.
pub(super) fn backing(number: u32) -> Option<PathBuf> {
    device::setting(&format!("loop{number}"), "loop/backing_file").map(PathBuf::from)
}
