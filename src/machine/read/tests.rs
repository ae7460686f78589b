use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::machine::ScsiModel;

/// What QEMU 10 says of a VM with disks on all buses, as far as it is read.
fn told() -> Value {
    let disk = |path: &str, kind: &str, more: Value| json!({"path": path, "type": kind, "properties": more});
    json!({
        "query-name": {"name": "vm1"},
        "query-uuid": {"UUID": "9A8B0C00-1111-2222-3333-444455556666"},
        "machine": "pc-q35-10.0-machine",
        "query-cpus-fast": [{"qom-path": "/a"}, {"qom-path": "/b"}],
        "query-memory-size-summary": {"base-memory": 512 << 20},
        "query-tpm": [{"id": "tpm0", "model": "tpm-crb", "options": {"type": "emulator"}}],
        "query-block": [
            {"qdev": "/machine/peripheral/v0/virtio-backend", "device": ""},
            {"qdev": "s0", "device": "drive-s0"},
            {"qdev": "/machine/unattached/device[22]", "device": "ide0-hd0"},
            {"qdev": "/machine/peripheral-anon/device[1]", "device": ""},
            {"qdev": "/machine/system.flash1", "device": "pflash1"},
            {"qdev": "cd", "device": "ide1-cd0"},
        ],
        "hardware": {
            "cpu": "Skylake-Server-x86_64-cpu",
            "machine": {"smm": "auto", "pflash0": "code"},
            "options": ["-machine", "q35", "-cpu", "Skylake-Server,+x", "-global",
                "driver=cfi.pflash01,property=secure,value=on"],
            "devices": [
                disk("/machine/peripheral/v0", "virtio-blk-pci",
                    json!({"serial": "root", "bootindex": 1, "addr": 32, "parent_bus": "/machine/q35/pcihost/pcie.0"})),
                disk("/machine/peripheral/scsi", "virtio-scsi-pci", json!({})),
                disk("/machine/peripheral/s0", "scsi-hd", json!({"lun": 3, "bootindex": -1,
                    "parent_bus": "/machine/peripheral/scsi/virtio-backend/scsi.0"})),
                disk("/machine/unattached/device[22]", "ide-hd",
                    json!({"serial": "QM00001", "parent_bus": "/machine/unattached/device[21]/ide.0"})),
                disk("/machine/peripheral-anon/device[1]", "nvme", json!({"serial": "a,b"})),
                disk("/machine/peripheral/cd", "ide-cd", json!({})),
                disk("/machine/peripheral/net0", "virtio-net-pci", json!({"mac": "52:54:00:AA:bb:cc"})),
                disk("/machine/peripheral/net1", "weird-net", json!({"mac": "53:54:00:aa:bb:cc"})),
            ],
        },
    })
}

#[test]
fn all_that_qemu_tells_is_understood() {
    let m = Machine::read(&told());
    assert_eq!(m.machine.as_deref(), Some("pc-q35-10.0"));
    assert_eq!((m.chipset, m.cpus, m.memory), (Some(Chipset::Q35), Some(2), Some(512 << 20)));
    assert_eq!(m.cpu.as_deref(), Some("Skylake-Server"));
    assert_eq!(m.uuid.as_deref(), Some("9a8b0c00-1111-2222-3333-444455556666"));
    assert!(m.uefi && m.smm && m.tpm.as_deref() == Some("tpm-crb"));
    let buses: Vec<_> = m.disks.iter().map(|d| d.bus).collect();
    let wanted =
        [Bus::Virtio, Bus::Scsi(ScsiModel::Virtio), Bus::Sata, Bus::Nvme, Bus::Flash].map(Some);
    assert_eq!(buses, wanted);
    let first = m.disk("v0").unwrap();
    assert_eq!((first.serial.as_deref(), first.boot_index), (Some("root"), Some(1)));
    assert_eq!(first.address.as_deref(), Some("04.0"));
    assert_eq!(m.disk("/machine/peripheral/s0").unwrap().address.as_deref(), Some("3"));
    // -1 is none, and a comma is no part of a serial number.
    assert_eq!((m.disks[1].boot_index, m.disks[3].serial.as_deref()), (None, None));
    assert_eq!(m.nets[0].mac.as_deref(), Some("52:54:00:aa:bb:cc"));
    // An address of many is no device's.
    assert_eq!((m.nets[1].model, m.nets[1].mac.as_deref()), (None, None));
    assert!(m.disk("").is_none() && m.disk("v").is_none());
}

#[test]
fn a_pc_has_ide_where_q35_has_sata() {
    let mut vm = told();
    vm["machine"] = "pc-i440fx-9.2-machine".into();
    let m = Machine::read(&vm);
    assert_eq!((m.chipset, m.disks[2].bus), (Some(Chipset::Pc), Some(Bus::Ide)));
    vm["machine"] = "virt-9.2-machine".into();
    vm["hardware"]["options"] = json!([]);
    assert_eq!(Machine::read(&vm).cpu.as_deref(), Some("Skylake-Server"), "its type says it, too");
    assert_eq!(Machine::read(&vm).chipset, None);
}

#[test]
fn nothing_is_a_machine_of_which_nothing_is_known() {
    assert_eq!(Machine::read(&Value::Null), Machine::default());
    assert_eq!(
        Machine::read(&json!({"hardware": [], "query-block": {"a": 1}})),
        Machine::default()
    );
}

/// JSON with anything in it.
fn anything() -> impl Strategy<Value = Value> {
    let text = prop_oneof![".{0,40}", "[,'\"<>&\n\0;$`=]{1,8}", "\\PC{0,90}"];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        text.prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 24, 5, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            prop::collection::vec((".{0,9}", inner), 0..5)
                .prop_map(|m| Value::Object(m.into_iter().collect())),
        ]
    })
}

/// Replaces what is at one place of `value`.
fn replaced(value: &mut Value, mut at: usize, with: &Value) -> usize {
    if at == 0 {
        *value = with.clone();
        return usize::MAX;
    }
    at -= 1;
    let inner: Vec<&mut Value> = match value {
        Value::Array(a) => a.iter_mut().collect(),
        Value::Object(o) => o.values_mut().collect(),
        _ => Vec::new(),
    };
    for v in inner {
        at = replaced(v, at, with);
        if at == usize::MAX {
            break;
        }
    }
    at
}

proptest! {
    /// Whatever stands in a manifest: what comes out has characters that no option and no XML minds.
    #[test]
    fn what_is_passed_on_is_of_few_characters(at in 1_usize..90, with in anything()) {
        let mut vm = told();
        replaced(&mut vm, at, &with);
        let m = Machine::read(&vm);
        let is = |c: char| c.is_ascii_alphanumeric() || "-_.+:".contains(c);
        let disks = m.disks.iter().flat_map(|d| [d.serial.as_ref(), d.address.as_ref(), Some(&d.kind)]);
        let nets = m.nets.iter().flat_map(|n| [n.mac.as_ref(), n.address.as_ref(), Some(&n.kind)]);
        let own = [m.uuid.as_ref(), m.machine.as_ref(), m.cpu.as_ref(), m.tpm.as_ref()];
        for text in own.into_iter().chain(disks).chain(nets).flatten() {
            prop_assert!(text.len() <= LONGEST_WORD && text.chars().all(is), "{text:?}");
        }
        prop_assert!(m.memory.is_none_or(|n| MEMORY.contains(&n)));
        prop_assert!(m.cpus.is_none_or(|n| CPUS.contains(&n)));
    }
}
