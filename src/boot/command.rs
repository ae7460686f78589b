//! QEMU's arguments.
//!
//! Devices and nodes are JSON, in which no text can be more than a text. What else there is, is of our own words, of
//! numbers, and of what [`crate::machine`] lets through: letters, digits, and marks that mean nothing to QEMU.

use std::ffi::OsString;

use serde_json::{Value, json};

use super::firmware::FirmwareFiles;
use super::vm::{Accel, Net, Nic, Vm, VmDisk};
use crate::error::{Error, Kind, Result};
use crate::machine::{Bus, Chipset};
use crate::qemu_img::shown;

/// Ports that the machine's own controllers have.
const OWN_SATA: usize = 6;
const OWN_IDE: usize = 4;

/// The longest serial number that can stand for a SCSI disk's id.
const SHORT_SERIAL: usize = 20;

/// The nodes behind a VM's disks.
#[derive(Debug, Clone, Default)]
pub(super) struct Nodes {
    /// Of each disk, called `disk0` and so on.
    pub disks: Vec<Value>,
    /// The firmware and its variables, called `code` and `vars`.
    pub flash: Option<(Value, Value)>,
    /// The words for a kernel: `-kernel FILE` and so on.
    pub kernel: Vec<OsString>,
}

/// The name of a disk's node.
pub(crate) fn node_name(disk: usize) -> String {
    format!("disk{disk}")
}

/// The arguments for the machine; sockets are the caller's.
///
/// # Errors
/// `Unsupported` if there are more disks than a bus has places.
pub(super) fn arguments(vm: &Vm, nodes: &Nodes) -> Result<Vec<OsString>> {
    let mut args = Args::default();
    args.add(&["-nodefaults", "-no-user-config"]);
    args.two("-name", &format!("guest={}", vm.name));
    args.two("-machine", &machine(vm));
    args.two("-accel", if vm.accel == Accel::Kvm { "kvm" } else { "tcg" });
    args.two("-cpu", &vm.cpu);
    args.two("-smp", &vm.cpus.to_string());
    args.two("-m", &format!("{}M", vm.memory >> 20));
    args.two("-uuid", &vm.uuid);
    args.add(&["-vga", "std"]);
    if let Some((code, vars)) = &nodes.flash {
        args.json("-blockdev", code);
        args.json("-blockdev", vars);
    }
    if vm.uefi.as_ref().is_some_and(|u| u.smm) {
        args.two("-global", "driver=cfi.pflash01,property=secure,value=on");
    }
    for node in &nodes.disks {
        args.json("-blockdev", node);
    }
    for device in controllers(vm)? {
        args.json("-device", &device);
    }
    for (number, disk) in vm.disks.iter().enumerate() {
        args.json("-device", &device(vm, number, disk));
    }
    for (number, nic) in vm.nics.iter().enumerate() {
        args.json("-device", &nic_device(number, nic));
    }
    args.0.extend(nodes.kernel.iter().cloned());
    Ok(args.0)
}

/// A `-netdev` for each network device; `ports` of the guest are forwarded to ports of 127.0.0.1 that are free.
pub(super) fn networks(vm: &Vm, ports: &[u16]) -> Vec<OsString> {
    let mut args = Args::default();
    for number in 0..vm.nics.len() {
        let mut text = format!("user,id=net{number}");
        if vm.net == Net::Isolated {
            text += ",restrict=on";
        }
        // The first has them.
        for port in ports.iter().filter(|_| number == 0) {
            text += &format!(",hostfwd=tcp:127.0.0.1:0-:{port}");
        }
        args.two("-netdev", &text);
    }
    args.0
}

#[derive(Default)]
struct Args(Vec<OsString>);

impl Args {
    fn add(&mut self, words: &[&str]) {
        self.0.extend(words.iter().map(OsString::from));
    }

    fn two(&mut self, option: &str, value: &str) {
        self.add(&[option, value]);
    }

    fn json(&mut self, option: &str, value: &Value) {
        self.two(option, &argument(value));
    }
}

/// JSON for QEMU, in which no character does anything to a terminal.
pub(crate) fn argument(value: &Value) -> String {
    crate::text::json(value).unwrap_or_default()
}

fn machine(vm: &Vm) -> String {
    let mut text = vm.chipset.name().to_string();
    if let Some(uefi) = &vm.uefi {
        text += ",pflash0=code,pflash1=vars";
        if uefi.smm {
            text += ",smm=on";
        }
    }
    text
}

/// What disks need beside what the machine has.
fn controllers(vm: &Vm) -> Result<Vec<Value>> {
    let count = |bus: fn(&Bus) -> bool| vm.disks.iter().filter(|d| bus(&d.bus)).count();
    let (sata, ide) = (count(|b| *b == Bus::Sata), count(|b| *b == Bus::Ide));
    let (most, named) = match vm.chipset {
        Chipset::Q35 => (OWN_SATA, sata + ide),
        Chipset::Pc => (OWN_IDE, ide),
    };
    if named > most || sata > OWN_SATA {
        let what = format!("more SATA or IDE disks than the machine has ports ({most})");
        return Err(Error::new(Kind::Unsupported, what).remedy("use another bus: --bus"));
    }
    let mut all = Vec::new();
    let mut models = Vec::new();
    for disk in &vm.disks {
        if let Bus::Scsi(model) = disk.bus
            && !models.contains(&model)
        {
            models.push(model);
            all.push(json!({"driver": model.name(), "id": format!("scsi-{}", model.name())}));
        }
    }
    if sata > 0 && vm.chipset == Chipset::Pc {
        all.push(json!({"driver": "ich9-ahci", "id": "sata"}));
    }
    if count(|b| *b == Bus::Usb) > 0 {
        all.push(json!({"driver": "qemu-xhci", "id": "usb"}));
    }
    Ok(all)
}

fn device(vm: &Vm, number: usize, disk: &VmDisk) -> Value {
    let mut device = json!({"drive": node_name(number), "id": format!("drive{number}")});
    device["driver"] = match disk.bus {
        Bus::Virtio | Bus::Flash => "virtio-blk-pci",
        Bus::Scsi(_) => "scsi-hd",
        Bus::Sata | Bus::Ide => "ide-hd",
        Bus::Nvme => "nvme",
        Bus::Usb => "usb-storage",
    }
    .into();
    let before = |bus: fn(&Bus) -> bool| vm.disks[..number].iter().filter(|d| bus(&d.bus)).count();
    match disk.bus {
        Bus::Scsi(model) if disk.serial.as_ref().is_some_and(|s| s.len() > SHORT_SERIAL) => {
            device["bus"] = format!("scsi-{}.0", model.name()).into();
            // Without one QEMU makes it of the serial number, which is too long for that.
            device["device_id"] = format!("drive{number}").into();
        }
        Bus::Scsi(model) => device["bus"] = format!("scsi-{}.0", model.name()).into(),
        Bus::Sata if vm.chipset == Chipset::Pc => {
            device["bus"] = format!("sata.{}", before(|b| *b == Bus::Sata)).into();
        }
        // One a port, whatever they are called.
        Bus::Sata | Bus::Ide if vm.chipset == Chipset::Q35 => {
            let port = before(|b| matches!(b, Bus::Sata | Bus::Ide));
            device["bus"] = format!("ide.{port}").into();
        }
        Bus::Ide => {
            let place = before(|b| *b == Bus::Ide);
            device["bus"] = format!("ide.{}", place / 2).into();
            device["unit"] = (place % 2).into();
        }
        Bus::Usb => device["bus"] = "usb.0".into(),
        _ => {}
    }
    match &disk.serial {
        // Where it would be the device's id, as here, QEMU takes no longer one.
        Some(serial) if disk.bus == Bus::Usb && serial.len() > SHORT_SERIAL => {}
        Some(serial) => device["serial"] = serial.as_str().into(),
        // It must have one.
        None if disk.bus == Bus::Nvme => device["serial"] = format!("disk{number}").into(),
        None => {}
    }
    // NVMe has no such choice.
    if vm.stop_on_errors && disk.bus != Bus::Nvme {
        device["rerror"] = "stop".into();
        device["werror"] = "stop".into();
    }
    // QEMU gives a kernel the first place, whatever disks have.
    if vm.kernel.is_none() {
        device["bootindex"] = disk.boot_index.into();
    }
    device
}

fn nic_device(number: usize, nic: &Nic) -> Value {
    json!({
        "driver": nic.model.name(),
        "netdev": format!("net{number}"),
        "id": format!("nic{number}"),
        "mac": nic.mac,
    })
}

/// What a person types to start the VM over the layer files themselves: the making of an overlay for each disk, then
/// QEMU, a line each. `graphs` are the disks, in the order of [`Vm::sources`].
///
/// # Errors
/// As [`arguments`].
pub(crate) fn printed(vm: &Vm, graphs: &[Value]) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    let mut create = |name: &str, size: u64| {
        let words = ["qemu-img", "create", "-q", "-f", "qcow2", name, &size.to_string()];
        lines.push(shown(&words.map(OsString::from)));
    };
    let mut nodes = Nodes::default();
    for (number, (disk, below)) in vm.disks.iter().zip(graphs).enumerate() {
        let name = overlay_name(number);
        create(&name, disk.size);
        nodes.disks.push(overlay(&name, &node_name(number), below));
    }
    if let Some(uefi) = &vm.uefi {
        let code = code_node(&uefi.files);
        let vars = match (uefi.vars, graphs.get(vm.disks.len())) {
            (Some((_, size)), Some(below)) => {
                create("fleecefs-boot-vars.qcow2", size);
                overlay("fleecefs-boot-vars.qcow2", "vars", below)
            }
            _ => {
                let words =
                    ["cp".into(), uefi.files.vars.clone().into(), "fleecefs-boot-vars.fd".into()];
                lines.push(shown(&words));
                let file = json!({"driver": "file", "filename": "fleecefs-boot-vars.fd"});
                json!({"driver": "raw", "node-name": "vars", "file": file})
            }
        };
        nodes.flash = Some((code, vars));
    }
    nodes.kernel = kernel_words(vm);
    let mut words: Vec<OsString> = vec!["qemu-system-x86_64".into()];
    words.extend(arguments(vm, &nodes)?);
    words.extend(networks(vm, &[]));
    lines.push(shown(&words));
    Ok(lines)
}

/// The firmware itself, out of the file that is installed.
fn code_node(files: &FirmwareFiles) -> Value {
    let file = json!({"driver": "file", "filename": files.code.to_string_lossy()});
    json!({"driver": "raw", "node-name": "code", "read-only": true, "file": file})
}

/// The words for a kernel that QEMU opens itself.
fn kernel_words(vm: &Vm) -> Vec<OsString> {
    let mut words = Vec::new();
    if let Some(kernel) = &vm.kernel {
        words.extend(["-kernel".into(), kernel.kernel.clone().into()]);
        if let Some(initrd) = &kernel.initrd {
            words.extend(["-initrd".into(), initrd.clone().into()]);
        }
        words.extend(["-append".into(), OsString::from(&kernel.append)]);
    }
    words
}

/// The arguments for a machine that opens its own files, but for the nodes `disk0` and so on, and `vars`, which are the
/// caller's; with `networks`, those of QEMU's own.
///
/// # Errors
/// As [`arguments`].
pub(crate) fn machine_arguments(vm: &Vm, with_networks: bool) -> Result<Vec<OsString>> {
    let mut words = arguments(vm, &Nodes { kernel: kernel_words(vm), ..Nodes::default() })?;
    if let Some(uefi) = &vm.uefi {
        words.extend(["-blockdev".into(), argument(&code_node(&uefi.files)).into()]);
    }
    if with_networks {
        words.extend(networks(vm, &[]));
    }
    Ok(words)
}

/// The file of a disk's overlay.
pub(super) fn overlay_name(number: usize) -> String {
    format!("fleecefs-boot-{number}.qcow2")
}

fn overlay(file: &str, name: &str, below: &Value) -> Value {
    let mut below = below.clone();
    // Its name is that of what is above.
    if let Some(fields) = below.as_object_mut() {
        fields.remove("node-name");
    }
    json!({
        "driver": "qcow2",
        "node-name": name,
        "discard": "unmap",
        "file": {"driver": "file", "filename": file},
        "backing": below,
    })
}

#[cfg(test)]
mod tests {
    use super::super::vm::tests::plain;
    use super::*;
    use crate::machine::ScsiModel;

    fn words(vm: &Vm) -> Vec<String> {
        let nodes = Nodes { disks: vec![json!({}); vm.disks.len()], ..Nodes::default() };
        let args = arguments(vm, &nodes).unwrap();
        args.into_iter().map(|a| a.into_string().unwrap()).collect()
    }

    fn devices(vm: &Vm) -> Vec<Value> {
        let words = words(vm);
        let after = words.windows(2).filter(|w| w[0] == "-device");
        after.map(|w| serde_json::from_str(&w[1]).unwrap()).collect()
    }

    #[test]
    fn each_bus_has_its_devices() {
        let buses = [
            Bus::Virtio,
            Bus::Scsi(ScsiModel::Virtio),
            Bus::Scsi(ScsiModel::Virtio),
            Bus::Sata,
            Bus::Nvme,
            Bus::Usb,
        ];
        let mut vm = plain(buses.len());
        vm.disks.iter_mut().zip(buses).for_each(|(d, bus)| d.bus = bus);
        vm.disks[0].serial = Some("root".into());
        let all = devices(&vm);
        let drivers: Vec<&str> = all.iter().map(|d| d["driver"].as_str().unwrap()).collect();
        let wanted = [
            "virtio-scsi-pci",
            "qemu-xhci",
            "virtio-blk-pci",
            "scsi-hd",
            "scsi-hd",
            "ide-hd",
            "nvme",
            "usb-storage",
        ];
        assert_eq!(drivers, wanted);
        assert_eq!((&all[2]["serial"], &all[2]["bootindex"]), (&json!("root"), &json!(0)));
        assert_eq!(all[3]["bus"], "scsi-virtio-scsi-pci.0");
        assert!(all[6]["serial"].is_string(), "NVMe has to have one");
        vm.chipset = Chipset::Pc;
        assert!(devices(&vm).iter().any(|d| d["bus"] == "sata.0"));
    }

    /// QEMU itself takes what is made of them. (It makes the machine, and is told to end at once.)
    #[test]
    fn qemu_takes_all_buses() {
        let Ok(program) = crate::qemu_img::guest::program() else { return };
        let sata = [Bus::Sata, Bus::Sata, Bus::Ide];
        let ide = [Bus::Ide, Bus::Ide, Bus::Ide];
        let mixed = [Bus::Sata, Bus::Sata, Bus::Virtio];
        let scsi = [Bus::Scsi(ScsiModel::Virtio), Bus::Nvme, Bus::Usb];
        for (chipset, buses) in [
            (Chipset::Q35, sata),
            (Chipset::Q35, ide),
            (Chipset::Q35, mixed),
            (Chipset::Q35, scsi),
            (Chipset::Pc, ide),
            (Chipset::Pc, mixed),
            (Chipset::Pc, scsi),
        ] {
            let mut vm = plain(buses.len());
            (vm.chipset, vm.accel) = (chipset, Accel::Tcg);
            for (disk, bus) in vm.disks.iter_mut().zip(buses) {
                disk.bus = bus;
                disk.serial =
                    (bus != Bus::Nvme).then(|| "a-serial-of-36-letters-0123456789abcd".into());
                let short = matches!(bus, Bus::Sata | Bus::Ide);
                disk.serial =
                    disk.serial.take().map(|s: String| s[..if short { 20 } else { 36 }].into());
            }
            let node = |n| json!({"driver": "null-co", "node-name": node_name(n), "size": 1 << 20});
            let nodes = Nodes { disks: (0..buses.len()).map(node).collect(), ..Nodes::default() };
            let mut command = std::process::Command::new(&program);
            command
                .args(arguments(&vm, &nodes).unwrap())
                .args(["-display", "none", "-S", "-qmp", "stdio"]);
            command.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
            let mut child = command.stderr(std::process::Stdio::piped()).spawn().unwrap();
            let words = b"{\"execute\":\"qmp_capabilities\"}{\"execute\":\"quit\"}";
            let _ = std::io::Write::write_all(&mut child.stdin.take().unwrap(), words);
            let out = child.wait_with_output().unwrap();
            let said = String::from_utf8_lossy(&out.stderr);
            assert!(out.status.success(), "{chipset:?} {buses:?}: {said}");
        }
    }

    #[test]
    fn more_disks_than_places_are_refused() {
        let mut vm = plain(7);
        vm.disks.iter_mut().for_each(|d| d.bus = Bus::Sata);
        let nodes = Nodes::default();
        assert_eq!(arguments(&vm, &nodes).unwrap_err().kind(), Kind::Unsupported);
        vm.disks.truncate(6);
        assert!(arguments(&vm, &nodes).is_ok());
    }

    /// No text of a file's name gets out of its place, whatever it has.
    #[test]
    fn a_hostile_name_stays_a_name() {
        let name = "/b/x,read-only=off,\"}]' $(reboot)`\n-device evil";
        let below = json!({"driver": "raw", "node-name": "disk0", "file": {"driver": "file", "filename": name}});
        let vm = plain(1);
        let lines = printed(&vm, &[below]).unwrap();
        let script = lines
            .join("\n")
            .replace("qemu-img create", "true")
            .replace("qemu-system-x86_64 ", "printf '%s\\0' ");
        let out = std::process::Command::new("sh").args(["-c", &script]).output().unwrap();
        let words = String::from_utf8(out.stdout).unwrap();
        let words: Vec<&str> = words.split('\0').collect();
        let at = words.iter().position(|w| *w == "-blockdev").unwrap();
        let node: Value = serde_json::from_str(words[at + 1]).unwrap();
        assert_eq!(node["backing"]["file"]["filename"], name);
        assert!(!words.contains(&"evil"));
    }
}
