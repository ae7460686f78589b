//! The guest's devices, as far as it takes to start the VM again: which there are, where each is, and what the guest
//! knows it by. It is asked of QEMU's object tree (QOM), and of the command line, of which only options are kept that
//! hold no secrets and name no files.
//!
//! QEMU may say what it likes: the number of devices and the length of all that is kept are bounded, and whoever reads
//! it ([`crate::machine`]) takes it for no more than a claim.

use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use crate::error::Result;
use crate::qmp::Client;
use crate::qmp::peer;

/// Devices that are described: a PCI bus has 32 slots, and few guests more than a handful of disks.
const DEVICES: usize = 128;
/// The longest text that is kept, in bytes; those of QEMU's own have a few dozen.
const LONGEST: usize = 512;
/// Options of the command line that are kept.
const OPTIONS: usize = 64;
/// Where devices are that were given on the command line, or added later.
const PLACES: [&str; 2] = ["/machine/peripheral", "/machine/peripheral-anon"];
/// What is asked of a disk, and of a network device.
const OF_DISK: [&str; 6] = ["serial", "bootindex", "addr", "lun", "unit", "parent_bus"];
const OF_NET: [&str; 4] = ["mac", "bootindex", "addr", "parent_bus"];
/// What is asked of the machine itself.
const OF_MACHINE: [&str; 4] = ["smp", "smm", "pflash0", "pflash1"];
/// Options that say what the machine is, with one value each, and that have no secrets: kernel command lines, SMBIOS
/// texts, `-fw_cfg`, `-object`, `-global` and devices may have.
const KEPT: [&str; 11] =
    ["machine", "M", "cpu", "smp", "m", "boot", "rtc", "accel", "vga", "name", "uuid"];
/// Of `-global` what says that firmware is guarded by the chipset.
const SECURE_FLASH: &str = "driver=cfi.pflash01,property=secure,value=on";
/// What is kept of the values of options that could hold more than that: `-machine append=…` is a kernel's command line,
/// and a picture for `-boot` is a file.
const KEPT_KEYS: [(&[&str], &[&str]); 2] = [
    (
        &["machine", "M"],
        &[
            "type",
            "accel",
            "smm",
            "usb",
            "vmport",
            "hpet",
            "kernel-irqchip",
            "graphics",
            "i8042",
            "sata",
            "smbus",
            "acpi",
            "nvdimm",
            "hmat",
            "q35-pcihost",
            "pcspk-audiodev",
            "mem-merge",
            "dump-guest-core",
            "pit",
            "pic",
        ],
    ),
    (&["boot"], &["order", "once", "menu", "strict", "reboot-timeout"]),
];
/// How long QEMU is asked for all that: it is told beside a backup, and not worth waiting for.
const PATIENCE: Duration = Duration::from_secs(20);

/// A device that is asked about.
struct Device {
    path: String,
    kind: String,
}

/// What QEMU tells of the machine's devices; `told` has its answers to `query-block` and `query-cpus-fast`.
///
/// # Errors
/// QEMU is gone or does not answer, or a signal ends it.
pub(super) fn describe(client: &mut Client, told: &Value) -> Result<Value> {
    let mut hardware = json!({});
    let end = Instant::now() + PATIENCE;
    if client.has_guest() && client.has("qom-list") && client.has("qom-get") {
        let drives = &told["query-block"];
        hardware["machine"] = asked(client, "/machine", &OF_MACHINE)?.into();
        let first = told["query-cpus-fast"][0]["qom-path"].as_str().filter(|p| p.len() < LONGEST);
        if let Some(path) = first
            && let Some(kind) = asked(client, path, &["type"])?.remove("type")
        {
            hardware["cpu"] = kind;
        }
        let mut all = Vec::new();
        for device in devices(client, drives, end)? {
            if Instant::now() >= end {
                log::warn!("QEMU takes long to describe its devices: the rest is not recorded");
                break;
            }
            all.push(described(client, &device)?);
        }
        hardware["devices"] = all.into();
    }
    if let Some(options) = client.process().and_then(|p| command_line(&p)) {
        hardware["options"] = options.into();
    }
    Ok(hardware)
}

/// The devices that were given, and those that drives are on: `-drive if=ide` makes one that is nowhere else.
fn devices(client: &mut Client, drives: &Value, end: Instant) -> Result<Vec<Device>> {
    let mut found: Vec<Device> = Vec::new();
    for place in PLACES {
        let asked = client.ask("qom-list", json!({"path": place}))?;
        let Ok(list) = client.answer(asked)? else { continue };
        for child in list.as_array().into_iter().flatten() {
            let text = |k: &str| child.get(k).and_then(Value::as_str).filter(|t| t.len() < LONGEST);
            let kind = text("type").and_then(|t| t.strip_prefix("child<")?.strip_suffix('>'));
            if let (Some(name), Some(kind)) = (text("name"), kind) {
                found.push(Device { path: format!("{place}/{name}"), kind: kind.into() });
            }
        }
    }
    let drives = drives.as_array().into_iter().flatten();
    for qdev in drives.filter_map(|d| d.get("qdev")?.as_str()) {
        let path = qdev.trim_end_matches("/virtio-backend");
        let is_new = !found.iter().any(|d| d.path == path || d.path.ends_with(&format!("/{path}")));
        if !is_new || path.len() >= LONGEST || found.len() >= DEVICES || Instant::now() >= end {
            continue;
        }
        let asked = client.ask("qom-get", json!({"path": path, "property": "type"}))?;
        if let Ok(Value::String(kind)) = client.answer(asked)? {
            found.push(Device { path: path.into(), kind });
        }
    }
    found.truncate(DEVICES);
    Ok(found)
}

fn described(client: &mut Client, device: &Device) -> Result<Value> {
    let Device { path, kind } = device;
    let ends = |names: &[&str]| names.iter().any(|n| kind.contains(n));
    let properties: &[&str] = match () {
        () if ends(&["-blk", "scsi-hd", "scsi-disk", "ide-hd", "nvme", "usb-storage"]) => &OF_DISK,
        () if ends(&["-net", "e1000", "rtl8139", "vmxnet3", "i825", "pcnet", "ne2k", "igb"]) => {
            &OF_NET
        }
        () => &[],
    };
    let told = asked(client, path, properties)?;
    Ok(json!({"path": path, "type": clipped(kind), "properties": told}))
}

/// The properties of an object, as far as it has them.
fn asked(client: &mut Client, path: &str, properties: &[&str]) -> Result<Map<String, Value>> {
    let mut pending = Vec::new();
    for property in properties {
        let arguments = json!({"path": path, "property": property});
        pending.push((*property, client.ask("qom-get", arguments)?));
    }
    let mut told = Map::new();
    for (property, asked) in pending {
        if let Ok(value) = client.answer(asked)?
            && is_short(&value)
        {
            told.insert(property.into(), value);
        }
    }
    Ok(told)
}

fn is_short(value: &Value) -> bool {
    match value {
        Value::String(text) => !text.is_empty() && text.len() <= LONGEST,
        Value::Object(o) => o.len() <= 32 && o.values().all(|v| v.is_number() || v.is_boolean()),
        Value::Array(_) | Value::Null => false,
        _ => true,
    }
}

fn clipped(text: &str) -> &str {
    text.get(..LONGEST).unwrap_or(text)
}

/// The options of QEMU's own command line that are kept. A hint, and no more: who the process at the other end is, a
/// socket tells only as long as nobody has handed it on. `None` where it may not be read.
fn command_line(process: &str) -> Option<Vec<String>> {
    let words = peer::command_line(process)?;
    Some(kept_options(&words))
}

/// Of `words` the options of [`KEPT`] with their values, flattened.
fn kept_options(words: &[String]) -> Vec<String> {
    let mut kept = Vec::new();
    let mut words = words.iter().peekable();
    while let Some(word) = words.next() {
        let name = word.strip_prefix("--").or_else(|| word.strip_prefix('-'));
        let Some(name) = name.filter(|n| KEPT.contains(n) || *n == "global") else { continue };
        // What a monitor or a debugger is told may follow where nothing was given.
        if let Some(value) = words.next_if(|v| !v.starts_with('-') && v.len() <= LONGEST)
            && kept.len() < 2 * OPTIONS
        {
            let value = without_secrets(name, value);
            if !value.is_empty() {
                kept.extend([format!("-{name}"), value]);
            }
        }
    }
    kept
}

/// The value of an option without what may be secret, or a file.
fn without_secrets(name: &str, value: &str) -> String {
    if name == "global" {
        let normal = match value {
            "cfi.pflash01.secure=on" => SECURE_FLASH,
            other => other,
        };
        return if normal == SECURE_FLASH { SECURE_FLASH.into() } else { String::new() };
    }
    let Some((_, keys)) = KEPT_KEYS.iter().find(|(names, _)| names.contains(&name)) else {
        return value.into();
    };
    // `,,` is a comma in a value: none that is kept has one.
    let parts = value.split(',').enumerate();
    let kept = parts.filter(|(i, part)| match part.split_once('=') {
        Some((key, _)) => keys.contains(&key),
        None => *i == 0 && !part.is_empty(),
    });
    kept.map(|(_, part)| part).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(line: &str) -> String {
        kept_options(&line.split(' ').map(str::to_string).collect::<Vec<_>>()).join(" ")
    }

    #[test]
    fn of_the_command_line_nothing_is_kept_that_may_be_secret() {
        let line = "qemu -machine q35,smm=on --m 512 -object secret,id=s,data=hunter2 -smp 2 \
            -fw_cfg name=opt/x,string=hunter2 -smbios type=11,value=hunter2 -append hunter2 -cpu host \
            -chardev socket,path=/run/hunter2 -vnc :0,password=on -kernel /hunter2 -global a.b=c -m";
        assert_eq!(kept(line), "-machine q35,smm=on -m 512 -smp 2 -cpu host");
        let line = "qemu -M append=hunter2,type=q35,kernel=/h,initrd=/h,dtb=/h,firmware=/h,smm=on \
            -boot order=c,splash=/root/hunter2.jpg,menu=on -boot splash=/h -machine pc,x=a,,smm=b \
            -global driver=cfi.pflash01,property=secure,value=on -global x.password=hunter2";
        let wanted = "-M type=q35,smm=on -boot order=c,menu=on -machine pc,smm=b \
            -global driver=cfi.pflash01,property=secure,value=on";
        assert_eq!(kept(line), wanted);
        assert_eq!(kept("qemu -m -smp 4"), "-smp 4");
        assert_eq!(kept(&format!("qemu -cpu {}", "x".repeat(LONGEST + 1))), "");
        assert_eq!(kept(&"-m 1 ".repeat(1000)).split(' ').count(), 2 * OPTIONS);
    }

    #[test]
    fn what_is_long_or_nested_is_not_kept() {
        assert!(is_short(&json!("x")) && is_short(&json!(7)) && is_short(&json!({"cpus": 4})));
        for long in [json!("x".repeat(LONGEST + 1)), json!({"a": {"b": 1}}), json!([1]), json!("")]
        {
            assert!(!is_short(&long), "{long}");
        }
    }
}
