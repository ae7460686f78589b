//! Disks and VMs that are copies of others.

use super::*;

#[test]
fn a_cloned_vm_gets_a_chain_of_its_own() {
    let t = chain();
    let as_vm = |digit: &'static str, d: GuestDisk| {
        let uuid: &'static str = if digit == "1" { "11111111" } else { "22222222" };
        let level = RequestedLevel::Auto(None);
        let p = plan_with(t.path(), level, vec![d], |i| i.vm = Some(uuid));
        (p.disks[0].level, p.disks[0].dir.clone())
    };
    let own = (Level::Inc, t.path().join("d"));
    assert_eq!(as_vm("1", disk("/vm/d", both())), own);
    assert_eq!(as_vm("1", disk("/moved/d", both())), own);
    let other = (Level::Full, t.path().join("d-2"));
    assert_eq!(as_vm("2", disk("/clone/d", both())), other);
    assert_eq!(as_vm("2", disk("/vm/d", both())), other);
    // Without UUIDs what is recorded of the device must fit.
    let mut d = disk("/clone/d", both());
    d.identity.qdev = "/m/v7".into();
    assert_eq!(auto(t.path(), d.clone()).dir, t.path().join("d-2"));
    assert_eq!(as_vm("1", d), own);
}

/// A copy carries the bitmaps of its original; where that is still there, nothing has moved.
#[test]
fn a_copy_beside_its_original_is_a_new_disk() {
    let t = tempfile::tempdir().unwrap();
    let at = |name: &str| t.path().join(name).to_str().unwrap().to_string();
    let d = t.path().join("T/d");
    put(&d, "FULL-1-d", Level::Full, None, FIRST);
    let mut m = manifest::read(&d, "FULL-1-d".as_ref()).unwrap().unwrap();
    (m.disk.file, m.vm) = (at("d"), Default::default());
    manifest::write(&d, &m).unwrap();
    std::fs::write(at("copy"), "x").unwrap();
    // As an image of a VM that is off: nothing is known of its device.
    let copy = || GuestDisk {
        identity: DiskIdentity { file: at("copy"), format: "qcow2".into(), ..Default::default() },
        ..disk("", vec![recording(bitmap(FIRST))])
    };
    let base = t.path().join("T");
    let p = auto(&base, copy());
    assert_eq!((p.level, &p.dir, &p.copy_of), (Level::Inc, &d, &None), "it moved");
    std::fs::write(at("d"), "x").unwrap();
    let p = auto(&base, copy());
    assert_eq!((p.level, &p.dir, p.copy_of), (Level::Full, &base.join("copy"), Some(at("d"))));
    assert_eq!(p.moved_from, None);
    // Beside its original, which goes on.
    let original = disk(&at("d"), vec![recording(bitmap(FIRST))]);
    let p = plan(&base, RequestedLevel::Auto(None), vec![original, copy()], 100);
    let of = |p: &DiskPlan| (p.level, p.copy_of.clone());
    assert_eq!(of(&p.disks[0]), (Level::Inc, None));
    assert_eq!(of(&p.disks[1]), (Level::Full, Some(at("d"))));
    // The user says that it is that disk.
    let named =
        Options { names: vec![(at("copy"), "d".into())], ..options(&base, RequestedLevel::Inc) };
    assert_eq!(plan_as(&named, vec![copy()], |_| {}).disks[0].dir, d);
    // A running VM has mirrored its disk, and the old file is still there.
    m.vm = vm("1").into();
    manifest::write(&d, &m).unwrap();
    let mut mirrored = disk(&at("copy"), vec![recording(bitmap(FIRST))]);
    mirrored.identity.qdev = "/m/v7".into();
    let level = RequestedLevel::Auto(None);
    let p = plan_with(&base, level, vec![mirrored], |i| i.vm = Some("11111111"));
    assert_eq!((p.disks[0].level, &p.disks[0].dir), (Level::Inc, &d));
}
