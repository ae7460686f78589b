//! A machine out of the answers of QEMU that a manifest has.

use serde_json::Value;

use super::{
    Bus, CPUS, Chipset, DiskDevice, LONGEST_SERIAL, LONGEST_WORD, MEMORY, Machine, NetDevice,
    NetModel, flash_unit,
};
use crate::manifest::{vm_name, vm_uuid};

/// Devices that are looked at, of each kind.
const DEVICES: usize = 128;
/// Options that are shown.
const OPTIONS: usize = 128;
/// The longest name of a device, and the longest option, in bytes.
const LONGEST_TEXT: usize = 512;
/// Types of devices that are disks.
const DISKS: [&str; 9] = [
    "scsi-hd",
    "scsi-disk",
    "scsi-block",
    "ide-hd",
    "ide-drive",
    "nvme",
    "nvme-ns",
    "usb-storage",
    "floppy",
];

impl Machine {
    /// What `vm`, of a manifest, tells. What it does not tell, or what cannot be, is as if it were not there.
    pub fn read(vm: &Value) -> Self {
        let hardware = &vm["hardware"];
        let machine = word(&vm["machine"]).map(|w| w.trim_end_matches("-machine").to_string());
        let chipset = machine.as_deref().and_then(Chipset::of);
        let options = options(hardware);
        let flash = |prop: &str| hardware["machine"][prop].as_str().is_some_and(|t| !t.is_empty());
        let drives = || list(&vm["query-block"]).take(DEVICES);
        let has_flash =
            drives().any(|d| flash_unit(text(&d["qdev"]), text(&d["device"])).is_some());
        Machine {
            name: vm_name(vm).map(|n| clipped(n).to_string()),
            uuid: vm_uuid(vm).filter(|u| is_uuid(u)).map(str::to_lowercase),
            chipset,
            machine,
            cpu: cpu(vm, &options),
            cpus: cpus(vm),
            memory: number(&vm["query-memory-size-summary"]["base-memory"])
                .filter(|m| MEMORY.contains(m)),
            uefi: has_flash || flash("pflash0"),
            smm: is_on(&hardware["machine"]["smm"]) && secure_flash(&options),
            tpm: list(&vm["query-tpm"]).find_map(|t| word(&t["model"])),
            disks: disks(vm, chipset),
            nets: list(&hardware["devices"]).take(DEVICES).filter_map(net).collect(),
            options,
        }
    }
}

/// The processor's model: as it was given, or as its type is called.
fn cpu(vm: &Value, options: &[String]) -> Option<String> {
    let given = options.iter().position(|o| o == "-cpu").and_then(|i| options.get(i + 1));
    let given = given.and_then(|o| o.split(',').next()).filter(|m| is_word(m));
    let kind = word(&vm["hardware"]["cpu"]);
    given.map(str::to_string).or_else(|| kind.map(|k| k.trim_end_matches("-x86_64-cpu").into()))
}

fn cpus(vm: &Value) -> Option<u32> {
    let count = vm["query-cpus-fast"].as_array().map(Vec::len)?;
    u32::try_from(count).ok().filter(|n| CPUS.contains(n))
}

/// Options in pairs, as far as they are few and short.
fn options(hardware: &Value) -> Vec<String> {
    let all = list(&hardware["options"]).take(OPTIONS).filter_map(Value::as_str);
    all.filter(|o| o.len() <= LONGEST_TEXT).map(str::to_string).collect()
}

fn secure_flash(options: &[String]) -> bool {
    let is = |o: &String| o.contains("cfi.pflash01") && o.contains("secure") && o.contains("on");
    options.iter().any(is)
}

/// The devices of all drives; what else is a disk and has none is no disk of a backup.
fn disks(vm: &Value, chipset: Option<Chipset>) -> Vec<DiskDevice> {
    let devices = || list(&vm["hardware"]["devices"]).take(DEVICES);
    let mut found = Vec::new();
    for drive in list(&vm["query-block"]).take(DEVICES) {
        let (qdev, device) = (text(&drive["qdev"]), text(&drive["device"]));
        if qdev.is_empty() || qdev.len() > LONGEST_TEXT {
            continue;
        }
        let own = devices().find(|d| super::tail(text(&d["path"])) == super::tail(qdev));
        let kind = own.and_then(|d| word(&d["type"])).unwrap_or_default();
        let is_flash = flash_unit(qdev, device).is_some();
        let known = is_flash || kind.starts_with("virtio-blk") || DISKS.contains(&kind.as_str());
        if own.is_some() && !known {
            continue;
        }
        let properties = own.map_or(&Value::Null, |d| &d["properties"]);
        let parent = text(&properties["parent_bus"]);
        let controller = controller(devices(), parent);
        let bus = match is_flash {
            true => Some(Bus::Flash),
            false => Bus::of(&kind, controller.as_deref(), chipset),
        };
        found.push(DiskDevice {
            device: qdev.to_string(),
            bus,
            kind,
            address: address(properties),
            serial: serial(&properties["serial"]),
            boot_index: boot_index(properties),
        });
    }
    found
}

/// The type of the device whose bus is at the path `parent`.
fn controller<'a>(devices: impl Iterator<Item = &'a Value>, parent: &str) -> Option<String> {
    let above = |d: &&Value| {
        let path = text(&d["path"]);
        !path.is_empty() && parent.strip_prefix(path).is_some_and(|rest| rest.starts_with('/'))
    };
    devices.filter(above).max_by_key(|d| text(&d["path"]).len()).and_then(|d| word(&d["type"]))
}

fn net(device: &Value) -> Option<NetDevice> {
    let kind = word(&device["type"])?;
    let properties = &device["properties"];
    let mac = text(&properties["mac"]).to_lowercase();
    let model = NetModel::of(&kind);
    if model.is_none() && mac.is_empty() {
        return None;
    }
    Some(NetDevice { model, kind, mac: is_mac(&mac).then_some(mac), address: address(properties) })
}

/// PCI's slot and function, which QEMU tells as one number, or the number on a bus.
fn address(properties: &Value) -> Option<String> {
    let number = |k: &str| properties[k].as_u64().filter(|n| *n < 1 << 16);
    let pci = number("addr").filter(|n| *n < 256).map(|n| format!("{:02x}.{}", n >> 3, n & 7));
    pci.or_else(|| number("lun").or_else(|| number("unit")).map(|n| n.to_string()))
}

fn boot_index(properties: &Value) -> Option<u32> {
    number(&properties["bootindex"]).and_then(|n| u32::try_from(n).ok()).filter(|n| *n < 1 << 30)
}

/// A serial number as disks have them: of letters, digits, and a few marks.
fn serial(value: &Value) -> Option<String> {
    let is = |c: char| c.is_ascii_alphanumeric() || "-_.+:".contains(c);
    let text = value.as_str()?;
    (!text.is_empty() && text.len() <= LONGEST_SERIAL && text.chars().all(is)).then(|| text.into())
}

fn is_uuid(text: &str) -> bool {
    let is = |(i, b): (usize, u8)| match i {
        8 | 13 | 18 | 23 => b == b'-',
        _ => b.is_ascii_hexdigit(),
    };
    text.len() == 36 && text.bytes().enumerate().all(is)
}

/// Six bytes, and not an address of many: a device with such a one would not work.
fn is_mac(text: &str) -> bool {
    let parts: Vec<&str> = text.split(':').collect();
    let byte = |p: &&str| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit());
    let first = parts.first().and_then(|p| u8::from_str_radix(p, 16).ok());
    parts.len() == 6 && parts.iter().all(byte) && first.is_some_and(|b| b & 1 == 0)
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// A number that is none below zero.
fn number(value: &Value) -> Option<u64> {
    value.as_u64().or_else(|| value.as_str()?.parse().ok())
}

fn is_on(value: &Value) -> bool {
    matches!(value.as_str(), Some("on" | "auto")) || value.as_bool() == Some(true)
}

fn is_word(text: &str) -> bool {
    let is = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    !text.is_empty() && text.len() <= LONGEST_WORD && text.chars().all(is)
}

/// A name of QEMU's: of letters, digits, and a few marks.
fn word(value: &Value) -> Option<String> {
    value.as_str().filter(|t| is_word(t)).map(str::to_string)
}

fn clipped(text: &str) -> &str {
    let end = text.char_indices().map(|(i, c)| i + c.len_utf8()).take_while(|e| *e <= LONGEST_TEXT);
    &text[..end.last().unwrap_or(0)]
}

#[cfg(test)]
mod tests;
