//! No bitmap records what is written below a disk.

use std::path::PathBuf;

use serde_json::json;

use super::*;
use crate::manifest::{BackingFile, OFFLINE};

/// A backing file that was written to at this time.
fn known(mtime_ns: i64) -> BackingFile {
    BackingFile { file: "/vm/base".into(), mtime_ns, inode: 7, ..Default::default() }
}

/// A device, which nobody tells that of.
fn device() -> BackingFile {
    BackingFile { inode: BackingFile::UNKNOWN, node: "#block7".into(), ..known(0) }
}

fn on(backing: &[BackingFile], mut bitmaps: Vec<Bitmap>, open: bool) -> GuestDisk {
    if open {
        let name = names::open(&bitmap("000000000002"));
        bitmaps.push(Bitmap { persistent: false, ..recording(name) });
    }
    GuestDisk { has_backing: true, backing: backing.to_vec(), ..disk("/vm/d", bitmaps) }
}

/// The chain, whose newest point has this record.
fn recorded(backing: Option<&[BackingFile]>) -> tempfile::TempDir {
    let t = chain();
    let (d, m) = tip(&t);
    manifest::write(&d, &Manifest { backing: backing.map(<[_]>::to_vec), ..m }).unwrap();
    t
}

fn tip(t: &tempfile::TempDir) -> (PathBuf, Manifest) {
    let d = t.path().join("d");
    let m = manifest::read(&d, OsStr::new("INC-2-d")).unwrap().unwrap();
    (d, m)
}

fn refused(t: &tempfile::TempDir, disk: GuestDisk, words: &str) {
    let p = auto(t.path(), disk);
    let why = p.demoted.unwrap_or_default();
    assert!(p.level == Level::Full && why.contains(words), "{words}: {:?}: {why}", p.level);
}

#[test]
fn a_running_disk_whose_backing_file_was_changed_gets_a_full() {
    let t = recorded(Some(&[known(1)]));
    assert_eq!(auto(t.path(), on(&[known(1)], both(), false)).level, Level::Inc);
    // It was renamed.
    let moved = BackingFile { file: "/vm/other".into(), ..known(1) };
    assert_eq!(auto(t.path(), on(&[moved], both(), false)).level, Level::Inc);
    refused(&t, on(&[known(2)], both(), true), "/vm/base is not as it was at INC-2-d");
    refused(&t, on(&[], both(), true), "no longer the backing file");
    refused(&t, on(&[known(1), known(1)], both(), true), "other backing files");
    let t = recorded(Some(&[]));
    assert_eq!(auto(t.path(), on(&[], both(), false)).level, Level::Inc);
    refused(&t, on(&[known(1)], both(), true), "had none at INC-2-d");
}

#[test]
fn what_tells_of_no_writes_is_believed_while_qemu_has_the_disk_open() {
    let t = recorded(Some(&[device()]));
    assert_eq!(auto(t.path(), on(&[device()], both(), true)).level, Level::Inc);
    refused(&t, on(&[device()], both(), false), "cannot tell whether backing file /vm/base");
    // A bitmap of that name that is in the image tells nothing.
    let mut in_image = on(&[device()], both(), true);
    in_image.bitmaps.iter_mut().for_each(|b| b.persistent = true);
    refused(&t, in_image, "cannot tell whether backing file /vm/base");
    // Plugged in again, or put there by blockdev-reopen.
    let other = BackingFile { node: "#block9".into(), ..device() };
    refused(&t, on(&[other], both(), true), "/vm/base is not as it was at INC-2-d");
    // In another process, to which what QEMU had in its memory was migrated.
    let migrated = BackingFile { process: "b-2-2".into(), ..device() };
    refused(&t, on(&[migrated], both(), true), "cannot tell whether backing file /vm/base");
    // Seen by another user, or exchanged.
    refused(&t, on(&[known(1)], both(), true), "is the same file as at INC-2-d");
    let t = recorded(Some(&[known(1)]));
    refused(&t, on(&[device()], both(), true), "is the same file as at INC-2-d");
}

#[test]
fn bitmaps_that_are_in_no_image_are_proof_enough() {
    let t = recorded(Some(&[device()]));
    let (d, mut m) = tip(&t);
    m.bitmap.as_mut().unwrap().persistent = false;
    manifest::write(&d, &m).unwrap();
    let mut disk = on(&[device()], both(), false);
    disk.bitmaps.iter_mut().for_each(|b| b.persistent = false);
    assert_eq!(auto(t.path(), disk).level, Level::Inc);
}

#[test]
fn a_point_without_a_record_is_built_on_where_qemu_said_that_there_was_no_backing_file() {
    let t = recorded(None);
    let none = || on(&[], both(), true);
    refused(&t, none(), "INC-2-d does not say what the disk's backing file was");
    refused(&t, on(&[known(1)], both(), true), "does not say");
    let said = |more: serde_json::Value| {
        let mut m = tip(&t).1;
        let mut inserted = json!({"node-name": "n", "image": {"filename": "/vm/d"},
            "backing_file_depth": 0});
        inserted.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let mut vm = (*m.vm).clone();
        vm["query-block"] = json!([{"device": "x"}, {"device": "d", "inserted": inserted}]);
        m.vm = vm.into();
        m.consistency = Default::default();
        m
    };
    let d = t.path().join("d");
    manifest::write(&d, &said(json!({}))).unwrap();
    assert_eq!(auto(t.path(), none()).level, Level::Inc);
    refused(&t, on(&[known(1)], both(), true), "does not say");
    for more in [
        json!({"backing_file": "b"}),
        json!({"backing_file_depth": 1}),
        json!({"image": {"backing-image": {}}}),
        json!({"node-name": "other"}),
    ] {
        manifest::write(&d, &said(more)).unwrap();
        refused(&t, none(), "does not say");
    }
    let mut off = said(json!({}));
    off.consistency.reason = OFFLINE.into();
    manifest::write(&d, &off).unwrap();
    refused(&t, none(), "does not say");
}

#[test]
fn the_mark_of_an_open_disk_goes_with_its_bitmap() {
    let t = recorded(Some(&[device()]));
    let p = auto(t.path(), on(&[device()], both(), true));
    let gone = names::open(&bitmap("000000000002"));
    assert!(p.level == Level::Inc && p.obsolete.contains(&gone), "{:?}", p.obsolete);
    // That of the FULL stays for DIFFs.
    let mut disk = on(&[device()], both(), true);
    let full = names::open(&bitmap(FIRST));
    disk.bitmaps.push(Bitmap { persistent: false, ..recording(full.clone()) });
    assert!(!auto(t.path(), disk).obsolete.contains(&full));
}
