//! [`Vm`]: what is to be started. A value, which is printed or started.

use super::content::Boots;
use super::firmware::FirmwareFiles;
use crate::error::{Error, Kind, Result};
use crate::folder;
use crate::folder::system;
use crate::machine::{Bus, Chipset, DiskDevice, Machine, NetModel, ScsiModel};

/// Memory where nobody says how much, in bytes.
const MEMORY: u64 = 2 << 30;
/// The least that a guest gets, in bytes.
const LEAST_MEMORY: u64 = 32 << 20;
/// Processors where nobody says how many.
const CPUS: u32 = 2;
/// Network devices that a VM gets at most.
const MOST_NETS: usize = 8;
const MIB: u64 = 1 << 20;
/// What a VM is called that is another than the original.
const NAME: &str = "fleecefs-boot";

/// How QEMU runs the guest's processors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Accel {
    /// Hardware virtualization (/dev/kvm)
    Kvm,
    /// Emulation, which is slow
    Tcg,
}

/// What network the guest gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Net {
    /// No network device
    None,
    /// A network of its own behind QEMU, from which nothing can be reached
    Isolated,
    /// This machine's network, behind QEMU (NAT)
    User,
}

/// A bus that the user wants for all disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum WantedBus {
    Virtio,
    Scsi,
    Sata,
    Ide,
    Nvme,
    Usb,
}

/// A kernel that is started without a boot loader, by files of the user's.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Kernel {
    /// The kernel.
    pub kernel: std::path::PathBuf,
    /// Its initial file system.
    pub initrd: Option<std::path::PathBuf>,
    /// Its command line.
    pub append: String,
}

/// What the user wants.
#[derive(Debug, Clone, Default)]
pub(crate) struct Wanted {
    /// The most memory in bytes.
    pub memory: Option<u64>,
    /// The most processors.
    pub cpus: Option<u32>,
    /// How processors are made.
    pub accel: Option<Accel>,
    /// The network; none if omitted.
    pub net: Option<Net>,
    /// Whether UUID, MACs and disk serials are those of the original: serials always are.
    pub same_identity: bool,
    /// The bus of all disks.
    pub bus: Option<WantedBus>,
    /// BIOS (false) or UEFI (true), whatever else is known.
    pub uefi: Option<bool>,
    /// Files of UEFI.
    pub firmware: Option<FirmwareFiles>,
    /// A kernel to start.
    pub kernel: Option<Kernel>,
    /// Whether the guest stops where a disk cannot be read or written, instead of being told.
    pub stop_on_errors: bool,
}

/// A disk that was found, to make a VM of.
#[derive(Debug, Clone)]
pub(crate) struct Disk<'a> {
    /// Its device, if that is known.
    pub device: Option<&'a DiskDevice>,
    /// Which flash memory it is of, if it is.
    pub flash: Option<u32>,
    /// Its size in bytes.
    pub size: u64,
    /// How it can be booted.
    pub boots: Boots,
}

/// A disk of the VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct VmDisk {
    /// Its place among the disks that were found.
    pub source: usize,
    /// What it is attached to.
    pub bus: Bus,
    /// Its serial number.
    pub serial: Option<String>,
    /// When it is tried at boot.
    pub boot_index: usize,
    /// Its size in bytes.
    pub size: u64,
}

/// A network device of the VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Nic {
    /// Its model.
    pub model: NetModel,
    /// Its hardware address.
    pub mac: String,
}

/// UEFI, and its variables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Uefi {
    /// Its files.
    pub files: FirmwareFiles,
    /// The disk that has its variables, by its place, and how large that is; without one they are empty.
    pub vars: Option<(usize, u64)>,
    /// Whether it needs the system management mode.
    pub smm: bool,
}

/// A VM that can be started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Vm {
    /// What it is called.
    pub name: String,
    /// What kind of PC it is.
    pub chipset: Chipset,
    /// How its processors are made.
    pub accel: Accel,
    /// Their model.
    pub cpu: String,
    /// Their number.
    pub cpus: u32,
    /// Its memory in bytes, whole MiB.
    pub memory: u64,
    /// Its UUID.
    pub uuid: String,
    /// UEFI; `None` for BIOS.
    pub uefi: Option<Uefi>,
    /// Its disks.
    pub disks: Vec<VmDisk>,
    /// Its network devices.
    pub nics: Vec<Nic>,
    /// Its network.
    pub net: Net,
    /// A kernel to start.
    pub kernel: Option<Kernel>,
    /// Whether it stops where a disk cannot be read or written.
    pub stop_on_errors: bool,
}

impl Vm {
    /// Decides.
    ///
    /// # Errors
    /// `Unsupported` for other machines than PCs; `NotFound` if UEFI is not installed; no disk.
    pub(crate) fn plan(machine: &Machine, disks: &[Disk<'_>], wanted: &Wanted) -> Result<Self> {
        let chipset = chipset(machine)?;
        let net = wanted.net.unwrap_or(Net::None);
        let accel = wanted.accel.unwrap_or_else(accel);
        let own = disks.iter().enumerate().filter(|(_, d)| d.flash.is_none());
        let own: Vec<(usize, &Disk<'_>)> = own.collect();
        if own.is_empty() {
            return Err(Error::new(Kind::NotFound, "there is no disk to boot"));
        }
        Ok(Vm {
            name: name(machine, wanted.same_identity),
            chipset,
            accel,
            cpu: cpu(machine, accel),
            cpus: cpus(machine, wanted),
            memory: memory(machine, wanted),
            uuid: match machine.uuid.as_ref().filter(|_| wanted.same_identity) {
                Some(uuid) => uuid.clone(),
                None => new_uuid()?,
            },
            uefi: uefi(machine, disks, wanted)?,
            disks: vm_disks(&own, wanted),
            nics: nics(machine, net, wanted.same_identity)?,
            net,
            kernel: wanted.kernel.clone(),
            stop_on_errors: wanted.stop_on_errors,
        })
    }

    /// The places of the disks that it uses: those of the VM, then the variables of UEFI.
    pub(crate) fn sources(&self) -> Vec<usize> {
        let vars = self.uefi.iter().filter_map(|u| u.vars).map(|(source, _)| source);
        self.disks.iter().map(|d| d.source).chain(vars).collect()
    }
}

/// As the original, where it is to be that again, and its name has no characters that mean something elsewhere.
fn name(machine: &Machine, same: bool) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.+:".contains(c);
    let known = machine.name.as_ref().filter(|n| same && !n.is_empty() && n.chars().all(plain));
    known.cloned().unwrap_or_else(|| NAME.to_string())
}

fn chipset(machine: &Machine) -> Result<Chipset> {
    match (&machine.machine, machine.chipset) {
        (_, Some(known)) => Ok(known),
        (None, None) => Ok(Chipset::Q35),
        (Some(other), None) => {
            let what = format!("the VM is of type {other}: only PCs (x86) can be started");
            let remedy = "start it by hand over a mount ('fleecefs mount --writable')";
            Err(Error::new(Kind::Unsupported, what).remedy(remedy))
        }
    }
}

/// What is there.
fn accel() -> Accel {
    match system::device(std::path::Path::new("/dev/kvm")) {
        Ok(_) => Accel::Kvm,
        Err(_) => Accel::Tcg,
    }
}

/// TCG has no `host`, and of what the original had it has as much as there is.
fn cpu(machine: &Machine, accel: Accel) -> String {
    match accel {
        Accel::Kvm => machine.cpu.clone().unwrap_or_else(|| "host".into()),
        Accel::Tcg => "max".into(),
    }
}

fn cpus(machine: &Machine, wanted: &Wanted) -> u32 {
    let here = std::thread::available_parallelism().map_or(1, |n| n.get());
    let most = wanted.cpus.unwrap_or_else(|| u32::try_from(here).unwrap_or(1));
    machine.cpus.unwrap_or(CPUS).min(most).max(1)
}

fn memory(machine: &Machine, wanted: &Wanted) -> u64 {
    let most = wanted.memory.unwrap_or_else(half_of_memory);
    let bytes = machine.memory.unwrap_or(MEMORY).min(most).max(LEAST_MEMORY);
    bytes / MIB * MIB
}

/// Half of what this machine has: it has other work, too.
fn half_of_memory() -> u64 {
    // SAFETY: plain numbers; -1 where it is not known.
    let (pages, size) =
        unsafe { (libc::sysconf(libc::_SC_PHYS_PAGES), libc::sysconf(libc::_SC_PAGESIZE)) };
    let number = |n: libc::c_long| u64::try_from(n).unwrap_or(0);
    match number(pages).saturating_mul(number(size)) / 2 {
        0 => MEMORY,
        half => half,
    }
}

/// What the user says, else what the VM had, else what its disks say.
fn uefi(machine: &Machine, disks: &[Disk<'_>], wanted: &Wanted) -> Result<Option<Uefi>> {
    let known = machine.machine.is_some().then_some(machine.uefi);
    let first = disks.iter().find(|d| d.boots.any());
    let by_disk = first.is_some_and(|d| d.boots.uefi && !d.boots.bios);
    let asked = wanted.uefi.or(wanted.firmware.as_ref().map(|_| true));
    if wanted.kernel.is_some() && asked.is_none() && known != Some(true) {
        return Ok(None);
    }
    if !asked.or(known).unwrap_or(by_disk) {
        return Ok(None);
    }
    let vars = disks.iter().position(|d| d.flash == Some(1)).map(|i| (i, disks[i].size));
    let files = match &wanted.firmware {
        Some(files) => files.clone(),
        None => FirmwareFiles::installed(vars.map(|(_, size)| size), machine.smm)?,
    };
    Ok(Some(Uefi { files, vars, smm: machine.smm }))
}

fn vm_disks(found: &[(usize, &Disk<'_>)], wanted: &Wanted) -> Vec<VmDisk> {
    // Those that had a place in the order, then those that look as if they can be booted, then the others.
    let rank = |d: &Disk<'_>| match d.device.and_then(|d| d.boot_index) {
        Some(index) => (0, index),
        None => (if d.boots.any() { 1 } else { 2 }, 0),
    };
    let mut order: Vec<usize> = (0..found.len()).collect();
    order.sort_by_key(|i| rank(found[*i].1));
    let index = |i: usize| order.iter().position(|o| *o == i).unwrap_or(i);
    let disk = |(i, (source, d)): (usize, &(usize, &Disk<'_>))| VmDisk {
        source: *source,
        bus: bus(d.device, wanted.bus),
        serial: d.device.and_then(|d| d.serial.clone()),
        boot_index: index(i),
        size: d.size,
    };
    found.iter().enumerate().map(disk).collect()
}

fn bus(device: Option<&DiskDevice>, wanted: Option<WantedBus>) -> Bus {
    match wanted {
        Some(WantedBus::Virtio) => Bus::Virtio,
        Some(WantedBus::Scsi) => Bus::Scsi(ScsiModel::Virtio),
        Some(WantedBus::Sata) => Bus::Sata,
        Some(WantedBus::Ide) => Bus::Ide,
        Some(WantedBus::Nvme) => Bus::Nvme,
        Some(WantedBus::Usb) => Bus::Usb,
        None => device.and_then(|d| d.bus).filter(|b| *b != Bus::Flash).unwrap_or(Bus::Virtio),
    }
}

fn nics(machine: &Machine, net: Net, same: bool) -> Result<Vec<Nic>> {
    if net == Net::None {
        return Ok(Vec::new());
    }
    let had = machine.nets.iter().take(MOST_NETS).map(|n| (n.model, n.mac.clone()));
    let mut had: Vec<_> = had.collect();
    if had.is_empty() {
        had.push((None, None));
    }
    let nic = |(model, mac): (Option<NetModel>, Option<String>)| {
        let mac = match mac.filter(|_| same) {
            Some(mac) => mac,
            None => new_mac()?,
        };
        Ok(Nic { model: model.unwrap_or(NetModel::Virtio), mac })
    };
    had.into_iter().map(nic).collect()
}

fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    folder::random(&mut bytes).map_err(|e| Error::io(e, "cannot choose an identity"))?;
    Ok(bytes)
}

/// Of version 4 (RFC 9562).
fn new_uuid() -> Result<String> {
    let mut b = random::<16>()?;
    b[6] = b[6] & 0x0f | 0x40;
    b[8] = b[8] & 0x3f | 0x80;
    let hex = |part: &[u8]| part.iter().map(|b| format!("{b:02x}")).collect::<String>();
    let parts = [&b[..4], &b[4..6], &b[6..8], &b[8..10], &b[10..]];
    Ok(parts.map(hex).join("-"))
}

/// In the range of QEMU's own.
fn new_mac() -> Result<String> {
    let [a, b, c] = random()?;
    Ok(format!("52:54:00:{a:02x}:{b:02x}:{c:02x}"))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    fn disk(boots: Boots) -> Disk<'static> {
        Disk { device: None, flash: None, size: 1 << 20, boots }
    }

    pub(in crate::boot) fn plain(disks: usize) -> Vm {
        let all = vec![disk(Boots { bios: true, uefi: false }); disks];
        let wanted = Wanted { accel: Some(Accel::Tcg), ..Wanted::default() };
        Vm::plan(&Machine::default(), &all, &wanted).unwrap()
    }

    #[test]
    fn without_a_manifest_the_disks_decide() {
        let bios = Boots { bios: true, uefi: false };
        let vm = plain(2);
        assert_eq!((vm.chipset, vm.uefi.is_none(), vm.nics.len()), (Chipset::Q35, true, 0));
        assert!(vm.disks.iter().all(|d| d.bus == Bus::Virtio));
        // What can be booted is tried first.
        let all = [disk(Boots::default()), disk(bios)];
        let vm = Vm::plan(&Machine::default(), &all, &Wanted::default()).unwrap();
        assert_eq!(vm.disks.iter().map(|d| d.boot_index).collect::<Vec<_>>(), [1, 0]);
        // A disk for both is booted by BIOS; one for UEFI alone needs that.
        let files = FirmwareFiles { code: "/c".into(), vars: "/v".into() };
        for (boots, is_uefi) in [
            (Boots { bios: true, uefi: true }, false),
            (Boots { bios: false, uefi: true }, true),
            (Boots::default(), false),
        ] {
            let found = uefi(&Machine::default(), &[disk(boots)], &Wanted::default());
            let needs = match found {
                Ok(found) => found.is_some(),
                Err(e) => e.kind() == Kind::NotFound,
            };
            assert_eq!(needs, is_uefi, "{boots:?}");
        }
        let wanted = Wanted { firmware: Some(files.clone()), ..Wanted::default() };
        let vm = Vm::plan(&Machine::default(), &[disk(bios)], &wanted).unwrap();
        assert_eq!(vm.uefi.unwrap().files, files);
        let none = Vm::plan(&Machine::default(), &[], &Wanted::default());
        assert_eq!(none.unwrap_err().kind(), Kind::NotFound);
    }

    #[test]
    fn memory_and_processors_are_what_the_vm_had_within_limits() {
        let machine = Machine { memory: Some(64 << 30), cpus: Some(64), ..Machine::default() };
        let wanted = Wanted { memory: Some((1 << 30) + 77), cpus: Some(3), ..Wanted::default() };
        assert_eq!((memory(&machine, &wanted), cpus(&machine, &wanted)), (1 << 30, 3));
        assert!(memory(&machine, &Wanted::default()) <= half_of_memory());
        let small = Wanted { memory: Some(1), cpus: Some(0), ..Wanted::default() };
        assert_eq!((memory(&machine, &small), cpus(&machine, &small)), (LEAST_MEMORY, 1));
    }

    #[test]
    fn it_is_another_machine_unless_it_is_to_be_the_same() {
        let uuid = "9a8b0c00-1111-2222-3333-444455556666";
        let net = crate::machine::NetDevice {
            model: Some(NetModel::E1000),
            kind: "e1000".into(),
            mac: Some("52:54:00:aa:bb:cc".into()),
            address: None,
        };
        let machine = Machine { uuid: Some(uuid.into()), nets: vec![net], ..Machine::default() };
        let mut machine = machine;
        machine.name = Some("vm-1.example".into());
        let plan = |same_identity| {
            let wanted = Wanted { same_identity, net: Some(Net::Isolated), ..Wanted::default() };
            Vm::plan(&machine, &[disk(Boots::default())], &wanted).unwrap()
        };
        let (same, other, third) = (plan(true), plan(false), plan(false));
        assert_eq!((same.uuid.as_str(), same.nics[0].mac.as_str()), (uuid, "52:54:00:aa:bb:cc"));
        assert_eq!((same.name.as_str(), other.name.as_str()), ("vm-1.example", NAME));
        // What means something to QEMU gets nowhere.
        for hostile in ["a,debug-threads=on", "a b", "", "\u{e9}"] {
            let machine = Machine { name: Some(hostile.into()), ..Machine::default() };
            assert_eq!(name(&machine, true), NAME, "{hostile}");
        }
        assert!(other.uuid != uuid && other.uuid != third.uuid && other.uuid.len() == 36);
        assert_eq!(other.uuid.as_bytes()[14], b'4');
        assert!(other.nics[0].mac != third.nics[0].mac && other.nics[0].model == NetModel::E1000);
    }

    #[test]
    fn what_is_no_pc_is_refused() {
        let machine = Machine { machine: Some("virt-9.2".into()), ..Machine::default() };
        let e = Vm::plan(&machine, &[disk(Boots::default())], &Wanted::default()).unwrap_err();
        assert_eq!(e.kind(), Kind::Unsupported);
    }
}
