//! What a guest's machine was, as far as the manifests of its disks tell.
//!
//! A manifest may be anybody's work. So nothing of it is passed on as it is: types become one of those that are known
//! here, numbers are inside their ranges, ids have the form that they must have, and texts are of few characters. What
//! is not so is as if it were not there. No file that it names is opened.
//!
//! - `read`: the same out of what a manifest has; what QEMU told is in [`crate::manifest::VmConfig`]
//! - `known`: the types that are known

mod known;
mod read;

use serde::Serialize;

pub use self::known::{Bus, Chipset, NetModel, ScsiModel};

/// The most memory that a guest may have had, in bytes, and the least.
pub const MEMORY: std::ops::RangeInclusive<u64> = 16 << 20..=64 << 40;
/// How many processors a guest may have had.
pub const CPUS: std::ops::RangeInclusive<u32> = 1..=4096;
/// The longest serial number: SCSI and SATA have 20 characters, virtio-blk too, NVMe as well; SCSI's page has more.
const LONGEST_SERIAL: usize = 36;
/// The longest name of a type, or of a machine, that is shown.
const LONGEST_WORD: usize = 64;

/// A guest's machine. What is not known is `None`, or empty.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Machine {
    /// The VM's name, for people only.
    pub name: Option<String>,
    /// Its UUID.
    pub uuid: Option<String>,
    /// The type of machine as QEMU calls it, such as `pc-q35-10.0`.
    pub machine: Option<String>,
    /// What kind of machine that is, if this program can start one.
    pub chipset: Option<Chipset>,
    /// The model of the processor, such as `host` or `Skylake-Server`.
    pub cpu: Option<String>,
    /// Number of processors.
    pub cpus: Option<u32>,
    /// Bytes of memory.
    pub memory: Option<u64>,
    /// Whether firmware of its own was in flash memory: UEFI.
    pub uefi: bool,
    /// Whether that firmware was protected by the system management mode: Secure Boot.
    pub smm: bool,
    /// The model of a TPM, if there was one.
    pub tpm: Option<String>,
    /// Disks.
    pub disks: Vec<DiskDevice>,
    /// Network devices.
    pub nets: Vec<NetDevice>,
    /// Options of QEMU's command line that say what the machine was, for people only.
    pub options: Vec<String>,
}

/// A disk of the guest, as its device was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DiskDevice {
    /// QEMU's name of the device: an id, or a path of its object tree. Compared with what manifests say, no more.
    pub device: String,
    /// What it was attached to.
    pub bus: Option<Bus>,
    /// The type of its device, for people.
    #[serde(rename = "type")]
    pub kind: String,
    /// Where on the bus it was (PCI's slot and function, SCSI's LUN), for people.
    pub address: Option<String>,
    /// Its serial number.
    pub serial: Option<String>,
    /// When it was tried at boot: the lowest first.
    pub boot_index: Option<u32>,
}

/// A network device of the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NetDevice {
    /// Its model, if it is one that is known.
    pub model: Option<NetModel>,
    /// The type of its device, for people.
    #[serde(rename = "type")]
    pub kind: String,
    /// Its hardware address: six bytes in hexadecimal, with colons.
    pub mac: Option<String>,
    /// Where on the bus it was.
    pub address: Option<String>,
}

impl Machine {
    /// The device of the disk that manifests call `qdev`.
    pub fn disk(&self, qdev: &str) -> Option<&DiskDevice> {
        let wanted = tail(qdev);
        self.disks.iter().find(|d| !wanted.is_empty() && tail(&d.device) == wanted)
    }
}

/// The part of a device's path that a manifest may have instead of it: an id.
fn tail(qdev: &str) -> &str {
    let path = qdev.trim_end_matches("/virtio-backend");
    path.strip_prefix("/machine/peripheral/").unwrap_or(path)
}

/// Which flash memory a device is, counted from 0: the first has the firmware, the second its variables.
pub fn flash_unit(qdev: &str, device: &str) -> Option<u32> {
    let digits = qdev
        .strip_prefix("/machine/system.flash")
        .or_else(|| qdev.rsplit_once("system.flash").map(|(_, d)| d))
        .or_else(|| device.strip_prefix("pflash"))?;
    digits.parse().ok().filter(|unit| *unit < 2)
}
