//! Disks of which each has got the file of another one: whose points are whose.

use super::*;

const SECOND: &str = "000000000002";

/// A disk: its file, its device, its serial number, and the run whose bitmap it carries.
fn one(file: &str, qdev: &str, serial: &str, run: Option<&str>) -> GuestDisk {
    let mut d = disk(file, run.map(|r| recording(bitmap(r))).into_iter().collect());
    d.identity.qdev = qdev.into();
    d.identity.serial = serial.into();
    d
}

/// A target with the FULLs of two disks, in the folders that their files' names give.
fn two(disks: [&GuestDisk; 2]) -> tempfile::TempDir {
    let t = tempfile::tempdir().unwrap();
    for (d, run) in disks.into_iter().zip([FIRST, SECOND]) {
        let name = d.base_name();
        let (dir, image) = (t.path().join(&name), format!("FULL-1-{name}"));
        put(&dir, &image, Level::Full, None, run);
        let m = manifest::read(&dir, OsStr::new(&image)).unwrap().unwrap();
        let m = Manifest { disk: d.identity.clone(), diff_bitmap: None, ..m };
        manifest::write(&dir, &m).unwrap();
    }
    t
}

/// The folder and the level of each disk.
fn planned(t: &tempfile::TempDir, disks: [GuestDisk; 2]) -> Vec<(String, Level)> {
    let of_vm = |i: &mut Inputs<'_>| i.vm = Some("11111111");
    let plan = plan_with(t.path(), RequestedLevel::Auto(None), disks.to_vec(), of_vm);
    let folder = |d: &DiskPlan| d.dir.file_name().unwrap().to_str().unwrap().to_string();
    plan.disks.iter().map(|d| (folder(d), d.level)).collect()
}

fn folders(names: [&str; 2], level: Level) -> Vec<(String, Level)> {
    names.iter().map(|n| (n.to_string(), level)).collect()
}

#[test]
fn bitmaps_tell_whose_points_are_whose_though_the_files_say_otherwise() {
    let t = two([&one("/vm/a", "v0", "", None), &one("/vm/b", "v1", "", None)]);
    let exchanged = [one("/vm/b", "v0", "", Some(FIRST)), one("/vm/a", "v1", "", Some(SECOND))];
    assert_eq!(planned(&t, exchanged), folders(["a", "b"], Level::Inc));
    // Only the devices were exchanged.
    let devices = [one("/vm/a", "v1", "", Some(FIRST)), one("/vm/b", "v0", "", Some(SECOND))];
    assert_eq!(planned(&t, devices), folders(["a", "b"], Level::Inc));
}

#[test]
fn serial_numbers_tell_it_where_there_are_no_bitmaps() {
    let t = two([&one("/vm/a", "v0", "A", None), &one("/vm/b", "v1", "B", None)]);
    let exchanged = || [one("/vm/b", "w0", "A", None), one("/vm/a", "w1", "B", None)];
    assert_eq!(planned(&t, exchanged()), folders(["a", "b"], Level::Full));
    // Both path and device are new.
    let moved = [one("/new/x", "w0", "A", None), one("/new/y", "w1", "B", None)];
    assert_eq!(planned(&t, moved), folders(["a", "b"], Level::Full));
    // Two disks of one number: it says nothing, and the files count.
    let [one_of_two, mut other] = exchanged();
    other.identity.serial = "A".into();
    assert_eq!(planned(&t, [one_of_two, other]), folders(["b", "a"], Level::Full));
    // Of another VM it says nothing either.
    let disks = exchanged().to_vec();
    let plan = plan_with(t.path(), RequestedLevel::Auto(None), disks, |i| i.vm = Some("22222222"));
    assert!(plan.disks.iter().all(|d| d.dir.to_str().unwrap().ends_with("-2")));
}

#[test]
fn devices_that_the_kernel_numbers_are_known_by_where_the_guest_has_them() {
    let t = two([&one("/dev/loop0", "v0", "", None), &one("/dev/loop1", "v1", "", None)]);
    let exchanged = || [one("/dev/loop1", "v0", "", None), one("/dev/loop0", "v1", "", None)];
    assert_eq!(planned(&t, exchanged()), folders(["loop0", "loop1"], Level::Full));
    // Not where the size is another one, nor where the name is one that somebody gave.
    let [mut grown, other] = exchanged();
    grown.size *= 2;
    assert_ne!(planned(&t, [grown, other])[0].0, "loop0");
    let t = two([&one("/dev/vg/a", "v0", "", None), &one("/dev/vg/b", "v1", "", None)]);
    let exchanged = [one("/dev/vg/b", "v0", "", None), one("/dev/vg/a", "v1", "", None)];
    assert_eq!(planned(&t, exchanged), folders(["b", "a"], Level::Full));
}

#[test]
fn a_copy_beside_the_disk_takes_nothing_from_it() {
    let t = two([&one("/vm/a", "v0", "", None), &one("/vm/b", "v1", "", None)]);
    // The disk was restored in its place, and the old file is there to be looked at.
    let restored = [one("/vm/a", "v0", "", None), one("/vm/a.old", "v9", "", Some(FIRST))];
    let found = planned(&t, restored);
    assert_eq!((found[0].0.as_str(), found[1].0.as_str()), ("a", "a.old"));
}
