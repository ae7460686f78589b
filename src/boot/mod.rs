//! Booting a run as a test VM: over throw-away overlays, confined, and with nothing written to the backup.
//!
//! QEMU opens no image. This process reads the points as a mount does, keeps what the guest writes in overlays
//! ([`crate::overlay`]: unnamed files, gone with the process however it ends), and serves each disk to QEMU over a
//! socket pair (`disk`). QMP, the guest agent and the serial port are socket pairs as well. So QEMU runs with no rights
//! to any file of the user's ([`crate::qemu_img::guest`]), and ends when this process ends.
//!
//! - `vm`: what is to be started: out of what the VM was ([`crate::machine`]), what its disks hold, and what the user
//!   wants; `firmware`: UEFI or BIOS, and where UEFI is installed; `content`: what a disk says of how it is booted
//! - `command`: QEMU's arguments; `nodes`: disks as QEMU's block graph over the layer files themselves, and `libvirt`:
//!   the same as domain XML, both for copying
//! - `disk`: what QEMU reads and writes; `running`: the process, its sockets, its end
//! - `serial`: what the guest writes to its serial port; `check`: whether it came up
//! - `ports`: whether a TCP port of the guest answers

mod check;
mod command;
mod content;
mod disk;
mod firmware;
mod libvirt;
mod nodes;
mod ports;
mod running;
mod serial;
mod vm;

pub(crate) use check::{Checked, Criteria, check};
pub(crate) use command::{argument, machine_arguments, node_name, printed};
pub(crate) use content::{Boots, look};
pub(crate) use disk::{Disks, PointToBoot};
pub(crate) use firmware::FirmwareFiles;
pub(crate) use libvirt::domain;
pub(crate) use nodes::graph;
pub(crate) use running::{Outputs, Running};
pub(crate) use vm::{Accel, Disk, Kernel, Net, Vm, Wanted, WantedBus};
