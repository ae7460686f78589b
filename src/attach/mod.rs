//! Attaching: the disks of a point as block devices, and their file systems mounted, as the kernel does it.
//!
//! A point is served by a private mount (`serve`), a loop device is attached to it (`loops`, with nodes and bytes of
//! devices in `device`, the kernel's calls in `ioctl`), what is on it is found by content, encrypted volumes are opened
//! (`crypt`), volume groups are activated under names of ours (`lvm`, `mapper`), and file systems mounted (`mounts`).
//! udev is kept away (`udev`). `setup` does all that; programs of others are run by `tools`.
//!
//! Each step is written down before it is done (`record`, in the folders of `place`) and undone by `undo`, in reverse
//! order: where a later step fails, by `detach`, and after a crash at any moment by the `detach` that comes then. `list`
//! tells what is attached.
//!
//! What is mounted was written by a guest, and the kernel reads it with all its rights: who does not trust the guest
//! uses [`crate::files`], or a VM.

mod crypt;
mod device;
mod ioctl;
mod list;
mod loops;
mod lvm;
mod mapper;
mod mounts;
mod place;
mod record;
mod serve;
mod setup;
mod tools;
mod udev;
mod undo;

pub(crate) use list::{Listed, State, list};
pub(crate) use record::Volume;
pub(crate) use setup::{Attached, Disk, Options, attach};
pub(crate) use undo::{What, detach};
