//! The calls of the kernel that std does not wrap: loop devices, partitions, btrfs's list of devices.
//!
//! Structures and numbers are those of linux/loop.h, linux/blkpg.h and linux/btrfs.h.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use crate::folder::{FileId, system};

const LOOP_CLR_FD: libc::c_ulong = 0x4c01;
const LOOP_GET_STATUS64: libc::c_ulong = 0x4c05;
const LOOP_CONFIGURE: libc::c_ulong = 0x4c0a;
const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4c82;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_PARTSCAN: u32 = 8;
const BLKPG: libc::c_ulong = 0x1269;
const BLKPG_ADD_PARTITION: libc::c_int = 1;
const BLKPG_DEL_PARTITION: libc::c_int = 2;
/// `_IOW(BTRFS_IOCTL_MAGIC, 5, struct btrfs_ioctl_vol_args)`.
const BTRFS_IOC_FORGET_DEV: libc::c_ulong = 0x5000_9405;
/// `BTRFS_PATH_NAME_MAX`, with the zero behind it.
const BTRFS_NAME: usize = 4088;

/// `struct loop_info64`.
#[repr(C)]
#[derive(Clone, Copy)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config`.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

/// `struct blkpg_partition`.
#[repr(C)]
struct BlkpgPartition {
    start: i64,
    length: i64,
    number: libc::c_int,
    names: [u8; 128],
}

/// `struct blkpg_ioctl_arg`.
#[repr(C)]
struct BlkpgArg {
    op: libc::c_int,
    flags: libc::c_int,
    len: libc::c_int,
    data: *mut BlkpgPartition,
}

/// `struct btrfs_ioctl_vol_args`.
#[repr(C)]
struct BtrfsName {
    fd: i64,
    name: [u8; BTRFS_NAME],
}

/// What a loop device is attached to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LoopStatus {
    /// The file.
    pub file: FileId,
    /// The name that it was given, ended by zeros.
    pub name: [u8; 64],
}

fn empty_info() -> LoopInfo {
    LoopInfo {
        device: 0,
        inode: 0,
        rdevice: 0,
        offset: 0,
        size_limit: 0,
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        flags: 0,
        file_name: [0; 64],
        crypt_name: [0; 64],
        encrypt_key: [0; 32],
        init: [0; 2],
    }
}

/// Calls ioctl with a pointer that the caller vouches for, or a number.
fn call<T>(file: &File, request: libc::c_ulong, arg: *mut T) -> io::Result<libc::c_int> {
    // SAFETY: the descriptor is open; `arg` is null or points to the structure that `request` takes, which lives
    // through the call: the callers are all in this file.
    match unsafe { libc::ioctl(file.as_raw_fd(), request as _, arg) } {
        -1 => Err(io::Error::last_os_error()),
        n => Ok(n),
    }
}

/// The number of a loop device that is free just now.
///
/// # Errors
/// What the operating system said.
pub(super) fn free_loop() -> io::Result<u32> {
    let control = system::device(Path::new("/dev/loop-control"))?;
    let number = call::<u8>(&control, LOOP_CTL_GET_FREE, std::ptr::null_mut())?;
    u32::try_from(number).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// A name as loop devices have it.
pub(super) fn loop_name(text: &str) -> [u8; 64] {
    let mut name = [0; 64];
    // The last byte ends it.
    name.iter_mut().take(63).zip(text.bytes()).for_each(|(to, from)| *to = from);
    name
}

/// Attaches `device` to `backing`, with partitions and sectors of `sector` bytes.
///
/// # Errors
/// What the operating system said; `ResourceBusy` if somebody was faster.
pub(super) fn attach_loop(
    device: &File,
    backing: &File,
    name: [u8; 64],
    (sector, read_only): (u32, bool),
) -> io::Result<()> {
    let only = if read_only { LO_FLAGS_READ_ONLY } else { 0 };
    let info = LoopInfo { flags: LO_FLAGS_PARTSCAN | only, file_name: name, ..empty_info() };
    let fd = u32::try_from(backing.as_raw_fd()).map_err(io::Error::other)?;
    let mut config = LoopConfig { fd, block_size: sector, info, reserved: [0; 8] };
    call(device, LOOP_CONFIGURE, &raw mut config).map(drop)
}

/// What `device` is attached to; `None` if to nothing.
///
/// # Errors
/// What the operating system said. (A device whose file cannot be asked for its size says EIO or the like.)
pub(super) fn loop_status(device: &File) -> io::Result<Option<LoopStatus>> {
    let mut info = empty_info();
    match call(device, LOOP_GET_STATUS64, &raw mut info) {
        Ok(_) => Ok(Some(LoopStatus {
            file: FileId { dev: unpacked(info.device), ino: info.inode },
            name: info.file_name,
        })),
        Err(e) if e.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        Err(e) => Err(e),
    }
}

/// The kernel's packed device number (`huge_encode_dev`) as stat(2) has it.
fn unpacked(dev: u64) -> u64 {
    let major = (dev >> 8) & 0xfff;
    let minor = (dev & 0xff) | ((dev >> 12) & 0xf_ff00);
    rustix::fs::makedev(major as u32, minor as u32)
}

/// Detaches `device`; while somebody else has it open, when he closes it.
///
/// # Errors
/// What the operating system said.
pub(super) fn detach_loop(device: &File) -> io::Result<()> {
    call::<u8>(device, LOOP_CLR_FD, std::ptr::null_mut()).map(drop)
}

/// Tells the kernel of a partition of `disk`: its number, and start and length in bytes.
///
/// # Errors
/// What the operating system said.
pub(super) fn add_partition(disk: &File, number: u32, start: u64, len: u64) -> io::Result<()> {
    partition(disk, BLKPG_ADD_PARTITION, (number, start, len))
}

/// Takes partition `number` away again.
///
/// # Errors
/// What the operating system said.
pub(super) fn remove_partition(disk: &File, number: u32) -> io::Result<()> {
    partition(disk, BLKPG_DEL_PARTITION, (number, 0, 0))
}

fn partition(
    disk: &File,
    op: libc::c_int,
    (number, start, len): (u32, u64, u64),
) -> io::Result<()> {
    let fits = |n: u64| i64::try_from(n).map_err(io::Error::other);
    let mut data = BlkpgPartition {
        start: fits(start)?,
        length: fits(len)?,
        number: libc::c_int::try_from(number).map_err(io::Error::other)?,
        names: [0; 128],
    };
    let len = libc::c_int::try_from(size_of::<BlkpgPartition>()).map_err(io::Error::other)?;
    let mut arg = BlkpgArg { op, flags: 0, len, data: &raw mut data };
    call(disk, BLKPG, &raw mut arg).map(drop)
}

/// Has btrfs forget a device that is not mounted.
///
/// # Errors
/// What the operating system said.
pub(super) fn forget_btrfs(device: &Path) -> io::Result<()> {
    use std::os::unix::ffi::OsStrExt;
    let control = system::device(Path::new("/dev/btrfs-control"))?;
    let mut arg = Box::new(BtrfsName { fd: 0, name: [0; BTRFS_NAME] });
    let bytes = device.as_os_str().as_bytes();
    if bytes.len() >= BTRFS_NAME {
        return Err(io::ErrorKind::InvalidFilename.into());
    }
    arg.name.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
    call(&control, BTRFS_IOC_FORGET_DEV, &raw mut *arg).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_are_as_large_as_the_kernels() {
        assert_eq!((size_of::<LoopInfo>(), size_of::<LoopConfig>()), (232, 304));
        assert_eq!((size_of::<BlkpgPartition>(), size_of::<BtrfsName>()), (152, 4096));
    }

    #[test]
    fn device_numbers_are_those_of_stat() {
        assert_eq!(unpacked(0x0033), rustix::fs::makedev(0, 0x33));
        assert_eq!(unpacked(0x1234_0801 & 0xfff | 0x10_0000), rustix::fs::makedev(8, 0x101));
        assert_eq!(loop_name(&"x".repeat(80))[63], 0);
    }
}
