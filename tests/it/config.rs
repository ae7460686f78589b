//! `fleecefs config`: what QEMU was is in the manifests of a real backup.

use std::process::Command;

use serde_json::Value;

use crate::support::qemu::two_disks::{Machine, TOOLS};
use crate::support::tools::have;

fn config(target: &std::path::Path, more: &[&str]) -> std::process::Output {
    Command::new(env!("CARGO_BIN_EXE_fleecefs"))
        .arg("config")
        .arg(target)
        .args(more)
        .output()
        .unwrap()
}

#[test]
fn a_backup_tells_what_its_vm_was() {
    if !have("a_backup_tells_what_its_vm_was", TOOLS) {
        return;
    }
    let more = [
        "-machine",
        "q35",
        "-smp",
        "2",
        "-cpu",
        "qemu64,+ssse3",
        "-name",
        "vm1",
        "-uuid",
        "9a8b0c00-1111-2222-3333-444455556666",
        "-fw_cfg",
        "name=opt/secret,string=hunter2",
        "-device",
        "e1000,mac=52:54:00:12:34:99",
    ];
    let mut m = Machine::launch(&more);
    m.write(0, 0, 4096);
    let caller = m.caller();
    let out = caller.run("full");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let out = config(&caller.target, &["--json"]);
    let told: Value = serde_json::from_slice(&out.stdout).unwrap();
    let machine = &told["machine"];
    assert_eq!(machine["chipset"], "q35");
    assert!(machine["machine"].as_str().unwrap().starts_with("pc-q35-"), "{machine}");
    assert_eq!((&machine["cpus"], &machine["memory"]), (&2.into(), &(32 << 20).into()));
    assert_eq!((&machine["cpu"], &machine["name"]), (&"qemu64".into(), &"vm1".into()));
    assert_eq!(machine["uuid"], "9a8b0c00-1111-2222-3333-444455556666");
    assert_eq!((&machine["uefi"], &machine["tpm"]), (&false.into(), &Value::Null));
    assert_eq!(machine["nets"][0]["mac"], "52:54:00:12:34:99");
    let drives = told["drives"].as_array().unwrap();
    assert_eq!(drives.len(), 2, "{told}");
    for (drive, restored) in drives.iter().zip(["a.qcow2", "o.qcow2"]) {
        assert_eq!((&drive["bus"], &drive["restored_as"]), (&"virtio".into(), &restored.into()));
        assert!(drive["address"].as_str().unwrap().ends_with(".0"), "{drive}");
    }
    // Who may read the command line of another user's QEMU, a test cannot know; it is this user's.
    let options = machine["options"].to_string();
    assert!(options.contains("qemu64,+ssse3") && !options.contains("hunter2"), "{options}");
    // Nowhere else either.
    let manifests =
        Command::new("grep").args(["-rl", "hunter2"]).arg(&caller.target).output().unwrap();
    assert!(manifests.stdout.is_empty(), "{manifests:?}");
    let text = String::from_utf8(config(&caller.target, &["latest"]).stdout).unwrap();
    assert!(text.contains("e1000 52:54:00:12:34:99") && text.contains("BIOS"), "{text}");
    assert_eq!(config(&caller.target, &["nothing"]).status.code(), Some(3));
}
