use super::*;
use crate::backup::disks::Insertion;
use crate::backup::graph::{Path as NodePath, Root};
use crate::backup::target::target_id::TargetId;
use crate::backup::target::targets::Folders;
use crate::backup::{
    CopyOptions, FreezeOptions, FullEvery, GuestCommands, Layout, RequestedLevel, StopMode,
};
use crate::manifest;
use crate::manifest::tests::example;
use crate::manifest::{BitmapInfo, Consistency, DiskIdentity, Manifest, fingerprint};
use crate::qmp::Address;
use crate::qmp::types::Bitmap;
use serde_json::{Value, json};
use std::ffi::OsStr;
use std::path::Path;
use std::time::Duration;

static NONE: Folders = Folders::new();
const TARGET: &str = "0a1b2c3d";
const FIRST: &str = "000000000001";

fn options(target: &Path, level: RequestedLevel) -> Options {
    Options {
        init: false,
        share: crate::folder::FileMode::default(),
        more_state: Vec::new(),
        names: Vec::new(),
        shared: false,
        qmp: Address::Unix("/q".into()),
        agent: None,
        target: target.into(),
        level,
        include: Vec::new(),
        exclude: Vec::new(),
        layout: Layout::default(),
        freeze_point: FreezeOptions {
            stop: StopMode::FreezePoint,
            quiesce: false,
            mountpoints: Vec::new(),
            deadline: Duration::from_secs(1),
            agent_timeout: Duration::from_secs(1),
            commands: GuestCommands::default(),
        },
        copy: CopyOptions {
            fleece_dir: None,
            cbw_timeout: 20,
            speed: 0,
            compress: None,
            workers: None,
            aio: None,
            direct: false,
            remove_delay: Duration::ZERO,
            no_space_check: false,
        },
        no_diff: false,
        no_hash: false,
        strict: false,
        allow_plaintext: false,
        config: Vec::new(),
        state_dir: "/s".into(),
        dry_run: false,
        nbd: None,
        offline: None,
        wait: Duration::ZERO,
    }
}

fn bitmap(run: &str) -> String {
    names::bitmap(TARGET, FIRST, run, 0)
}

fn recording(name: String) -> Bitmap {
    Bitmap {
        name: Some(name),
        recording: true,
        persistent: true,
        granularity: 65536,
        ..Default::default()
    }
}

fn disk(file: &str, bitmaps: Vec<Bitmap>) -> GuestDisk {
    GuestDisk {
        named: None,
        identity: DiskIdentity {
            qdev: "/m/v0".into(),
            node: "n".into(),
            file: file.into(),
            format: "qcow2".into(),
            ..Default::default()
        },
        node: "n".into(),
        top: "n".into(),
        insertion: Insertion::Device("/m/v0".into()),
        path: NodePath {
            root: Root::Device("/m/v0".into()),
            nodes: vec!["n".into()],
            unused: vec![],
        },
        busy: None,
        size: 1 << 20,
        cluster_size: 65536,
        extended_l2: false,
        lazy_refcounts: false,
        persistent: true,
        encrypted: false,
        regrows_zeros: true,
        has_backing: false,
        backing: Vec::new(),
        process: String::new(),
        pflash: false,
        throwaway: false,
        by_rule: None,
        bitmaps,
        allocated: 4096,
        info: Value::Null,
    }
}

fn put(dir: &Path, image: &str, level: Level, parent: Option<&str>, run: &str) {
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join(image), image).unwrap();
    let mut m = example(image, level, parent);
    m.run = run.into();
    m.disk = disk("/vm/d", Vec::new()).identity;
    m.file_size = image.len() as u64;
    m.fingerprint = Some(fingerprint(&dir.join(image)).unwrap());
    let info = |r: &str| BitmapInfo {
        name: bitmap(r),
        node: "n".into(),
        granularity: 65536,
        persistent: true,
        watermark: false,
    };
    m.bitmap = Some(info(run));
    m.diff_bitmap = Some(info(FIRST));
    m.vm = vm("1").into();
    manifest::write(dir, &m).unwrap();
}

/// What QEMU says of a VM whose UUID is made of this digit.
fn vm(digit: &str) -> Value {
    json!({"query-uuid": {"UUID": digit.repeat(8)}})
}

/// A FULL and an INC of `/vm/d` in a target.
fn chain() -> tempfile::TempDir {
    let t = tempfile::tempdir().unwrap();
    let d = t.path().join("d");
    put(&d, "FULL-1-d", Level::Full, None, FIRST);
    put(&d, "INC-2-d", Level::Inc, Some("FULL-1-d"), "000000000002");
    t
}

fn both() -> Vec<Bitmap> {
    vec![recording(bitmap(FIRST)), recording(bitmap("000000000002"))]
}

fn plan(t: &Path, level: RequestedLevel, disks: Vec<GuestDisk>, now: i64) -> Plan {
    plan_with(t, level, disks, |i| i.now = now)
}

fn plan_with(
    t: &Path,
    level: RequestedLevel,
    disks: Vec<GuestDisk>,
    change: impl FnOnce(&mut Inputs<'_>),
) -> Plan {
    plan_as(&options(t, level), disks, change)
}

fn plan_as(options: &Options, disks: Vec<GuestDisk>, change: impl FnOnce(&mut Inputs<'_>)) -> Plan {
    let target = TargetId::new(TARGET);
    let mut inputs = Inputs {
        seen: Survey { disks, ..Default::default() },
        run: "00000000000f",
        target: &target,
        base: &options.target,
        now: 100,
        vm: None,
        vm_name: None,
        newcomer: false,
        renamed: &NONE,
        no_inc: None,
        unsound: &[],
    };
    change(&mut inputs);
    make(options, inputs).unwrap()
}

fn auto(t: &Path, d: GuestDisk) -> DiskPlan {
    plan(t, RequestedLevel::Auto(None), vec![d], 100).disks.remove(0)
}

#[test]
fn an_inc_depends_on_the_tip_and_removes_the_tips_bitmap_only() {
    let t = chain();
    let stray = names::bitmap(TARGET, FIRST, "0000000000aa", 0);
    let other = names::bitmap("ffffffff", FIRST, FIRST, 0);
    let mut bitmaps = both();
    bitmaps.extend([recording(stray.clone()), recording(other), recording("x".into())]);
    let p = auto(t.path(), disk("/vm/d", bitmaps));
    assert_eq!((p.level, p.image.as_str()), (Level::Inc, "INC-100-d"));
    assert_eq!(p.parent().unwrap().image, "INC-2-d");
    assert_eq!(p.since.unwrap().name, bitmap("000000000002"));
    assert_eq!(p.diff_bitmap.unwrap().name, bitmap(FIRST));
    assert_eq!(p.obsolete, [bitmap("000000000002"), stray]);
    assert_eq!(p.chain, FIRST);
}

#[test]
fn what_a_raw_disk_has_grown_by_is_copied_whole() {
    let t = chain();
    let size = 1 << 20;
    let grown = || GuestDisk { size: 3 * size, ..disk("/vm/d", both()) };
    let d = auto(t.path(), grown());
    // qcow2 gives zeros there,
    assert!(d.level == Level::Inc && d.grown().is_none() && d.estimate() == 0);
    // but in the cluster of the old end.
    let large = GuestDisk { cluster_size: 2 * size, ..grown() };
    assert_eq!(auto(t.path(), large).grown(), Some(size..2 * size));
    for m in ["FULL-1-d", "INC-2-d"] {
        let mut m = manifest::read(&t.path().join("d"), m.as_ref()).unwrap().unwrap();
        m.disk.format = "raw".into();
        manifest::write(&t.path().join("d"), &m).unwrap();
    }
    let mut raw = grown();
    raw.identity.format = "raw".into();
    let d = auto(t.path(), raw.clone());
    assert_eq!(d.demoted, None);
    assert_eq!((d.grown(), d.estimate()), (Some(size..3 * size), 2 * size));
    // A volume may have been smaller in between.
    let volume = GuestDisk { regrows_zeros: false, ..raw.clone() };
    assert!(auto(t.path(), volume).demoted.unwrap().contains("grew"));
    assert_eq!(auto(t.path(), raw.clone()).unproved(), None);
    raw.size = size;
    assert_eq!(auto(t.path(), raw).grown(), None);
}

#[test]
fn a_volume_gets_an_inc_of_what_its_watermark_does_not_prove() {
    let t = chain();
    let tip = "000000000002";
    let mut m = manifest::read(&t.path().join("d"), "INC-2-d".as_ref()).unwrap().unwrap();
    m.disk.format = "raw".into();
    m.bitmap.as_mut().unwrap().watermark = true;
    manifest::write(&t.path().join("d"), &m).unwrap();
    let size = 1 << 20;
    let volume = |size: u64, left: u64| {
        let watermark = |run: &str| Bitmap {
            recording: false,
            count: left,
            ..recording(names::watermark(&bitmap(run)))
        };
        let bitmaps = both().into_iter().chain([watermark(tip), watermark(FIRST)]).collect();
        let mut d = GuestDisk { regrows_zeros: false, size, ..disk("/vm/d", bitmaps) };
        d.identity.format = "raw".into();
        d
    };
    let d = auto(t.path(), volume(size, size));
    assert_eq!(
        (d.level, d.unproved(), d.estimate()),
        (Level::Inc, Some(size - 65536..size), 65536)
    );
    assert!(d.wants_watermark() && !d.new_bitmap.as_ref().unwrap().watermark);
    // The watermark goes with its bitmap; the FULL's stays.
    assert_eq!(d.obsolete, [bitmap(tip), names::watermark(&bitmap(tip))]);
    let d = auto(t.path(), volume(size, 3 * 65536));
    assert_eq!((d.unproved(), d.estimate()), (Some(2 * 65536..size), size - 2 * 65536));
    let d = auto(t.path(), volume(2 * size, 0));
    assert_eq!(
        (d.level, d.grown(), d.unproved()),
        (Level::Inc, Some(size..2 * size), Some(0..size))
    );
    assert_eq!(d.estimate(), 2 * size);
    // It is gone, or is none.
    for change in [|b: &mut Bitmap| b.name = None, |b: &mut Bitmap| b.recording = true] {
        let mut d = volume(2 * size, size);
        change(&mut d.bitmaps[2]);
        assert!(auto(t.path(), d.clone()).demoted.unwrap().contains("grew"));
        d.size = size;
        assert_eq!(auto(t.path(), d).unproved(), None);
    }
}

#[test]
fn what_a_watermark_proves_for_qcow2() {
    let t = chain();
    let tip = "000000000002";
    let mut m = manifest::read(&t.path().join("d"), "INC-2-d".as_ref()).unwrap().unwrap();
    let size = m.virtual_size;
    let given = |change: &dyn Fn(&mut Bitmap), size: u64, cluster: u64| {
        let name = names::watermark(&bitmap(tip));
        let mut mark = Bitmap { recording: false, count: size, ..recording(name) };
        change(&mut mark);
        let bitmaps = both().into_iter().chain([mark]).collect();
        auto(t.path(), GuestDisk { size, cluster_size: cluster, ..disk("/vm/d", bitmaps) })
    };
    let all = |b: &mut Bitmap| b.count = size;
    // The manifest knows of none.
    let d = given(&all, size, 65536);
    assert!(d.needs_walk() && d.tail().is_none() && d.unproved().is_none());
    m.bitmap.as_mut().unwrap().watermark = true;
    manifest::write(&t.path().join("d"), &m).unwrap();
    let d = given(&all, size, 65536);
    assert!(!d.needs_walk() && d.tail() == Some(size - 65536..size));
    // A disk that has grown: the whole granule in which the old end lay.
    let d = given(&all, size + 512, 65536);
    assert!(!d.needs_walk() && d.tail() == Some(size - 65536..size));
    let d = given(&|b| b.count = 3 * 65536, size, 65536);
    assert_eq!((d.needs_walk(), d.unproved()), (false, Some(2 * 65536..size)));
    let d = given(&|b| b.count = 0, size, 65536);
    assert_eq!((d.needs_walk(), d.unproved()), (false, Some(0..size)));
    let nothing: [&dyn Fn(&mut Bitmap); 6] = [
        &|b| b.name = None,
        &|b| b.recording = true,
        &|b| b.inconsistent = true,
        &|b| b.persistent = false,
        &|b| b.granularity = 4096,
        &|b| b.count = size + 65536,
    ];
    for change in nothing {
        let d = given(change, size, 65536);
        assert!(d.level == Level::Inc && d.needs_walk() && d.tail().is_none());
    }
    // More than a granule may come back with a cluster.
    assert!(given(&all, size, 131072).needs_walk());
    // A FULL builds on nothing.
    assert!(
        !plan(t.path(), RequestedLevel::Full, vec![disk("/vm/d", both())], 100).disks[0]
            .needs_walk()
    );
}

#[test]
fn a_diff_depends_on_the_full_and_changes_nothing() {
    let t = chain();
    let p = plan(t.path(), RequestedLevel::Diff, vec![disk("/vm/d", both())], 100).disks.remove(0);
    assert_eq!(p.parent().unwrap().image, "FULL-1-d");
    assert_eq!(p.since.unwrap().name, bitmap(FIRST));
    assert!(p.new_bitmap.is_none() && p.obsolete.is_empty());
}

#[test]
fn names_are_later_than_all_that_is_there() {
    let t = chain();
    let p = plan(t.path(), RequestedLevel::Full, vec![disk("/vm/d", both())], 1).disks.remove(0);
    assert_eq!(p.image, "FULL-3-d");
    assert_eq!(p.obsolete.len(), 2);
}

#[test]
fn whatever_cannot_be_proved_is_a_full() {
    type Change = fn(&mut GuestDisk);
    let cases: [(&str, Change); 8] = [
        ("is not on the disk", |d| drop(d.bitmaps.pop())),
        ("inconsistent", |d| d.bitmaps[1].inconsistent = true),
        ("does not record", |d| d.bitmaps[1].recording = false),
        ("in use", |d| d.bitmaps[1].busy = true),
        ("granularity", |d| d.bitmaps[1].granularity = 4096),
        ("persistent", |d| d.bitmaps[1].persistent = false),
        ("bytes at", |d| d.size = 65536),
        ("is raw now", |d| d.identity.format = "raw".into()),
    ];
    for (why, change) in cases {
        let t = chain();
        let mut d = disk("/vm/d", both());
        change(&mut d);
        let p = auto(t.path(), d.clone());
        assert_eq!(p.level, Level::Full, "{why}");
        assert!(p.demoted.unwrap().contains(why), "{why}");
        let mut p = plan(t.path(), RequestedLevel::Inc, vec![d], 100);
        assert_eq!(p.refused.remove(0).1.kind(), Kind::Incomplete, "{why}");
    }
}

#[test]
fn disks_of_one_name_keep_their_folders() {
    let t = chain();
    // The stranger comes first and must not take the folder.
    let list = vec![disk("/other/d", Vec::new()), disk("/vm/d", both())];
    let p = plan(t.path(), RequestedLevel::Auto(None), list, 100);
    assert_eq!(p.disks[0].dir, t.path().join("d-2"));
    assert_eq!((p.disks[1].dir.clone(), p.disks[1].level), (t.path().join("d"), Level::Inc));
    // Moved elsewhere, its bitmap proves that it is the same disk.
    let p = auto(t.path(), disk("/moved/d", both()));
    assert_eq!((p.dir.clone(), p.level), (t.path().join("d"), Level::Inc));
}

#[test]
fn a_folder_whose_manifests_were_made_afterwards_goes_on() {
    let t = chain();
    let d = t.path().join("d");
    for (image, parent) in [("FULL-1-d", None), ("INC-2-d", Some("FULL-1-d"))] {
        let level = if parent.is_none() { Level::Full } else { Level::Inc };
        let m = Manifest {
            disk: DiskIdentity::default(),
            vm: Default::default(),
            consistency: Consistency::unknown(),
            bitmap: None,
            ..example(image, level, parent)
        };
        manifest::write(&d, &m).unwrap();
    }
    let p = auto(t.path(), disk("/vm/d", Vec::new()));
    assert_eq!((p.level, p.dir), (Level::Full, d));
}

#[test]
fn disks_of_one_file_name_are_told_apart_by_their_devices() {
    let t = chain();
    for image in ["FULL-1-d", "INC-2-d"] {
        let dir = t.path().join("d");
        let mut m = manifest::read(&dir, image.as_ref()).unwrap().unwrap();
        (m.disk.file, m.disk.qdev) = ("rbd:p/d".into(), "vda".into());
        manifest::write(&dir, &m).unwrap();
    }
    let at = |qdev: &str, bitmaps| {
        let mut d = disk("rbd:p/d", bitmaps);
        d.identity.qdev = qdev.into();
        d
    };
    // Whatever their order.
    let p = plan(
        t.path(),
        RequestedLevel::Auto(None),
        vec![at("vdb", Vec::new()), at("vda", both())],
        9,
    );
    let dirs: Vec<_> = p.disks.iter().map(|d| d.dir.file_name().unwrap().to_owned()).collect();
    assert_eq!(dirs, ["d-2", "d"]);
}

#[test]
fn encrypted_disks_are_refused_and_unknown_names_are_errors() {
    let t = chain();
    let mut d = disk("/vm/d", both());
    d.encrypted = true;
    let p = plan(t.path(), RequestedLevel::Full, vec![d], 100);
    assert_eq!(p.refused[0].1.kind(), Kind::Encrypted);
    let mut o = options(t.path(), RequestedLevel::Full);
    o.include = vec!["nobody".into()];
    let inputs = Inputs {
        seen: Survey::default(),
        run: "r",
        target: &TargetId::new(TARGET),
        base: t.path(),
        now: 1,
        vm: None,
        vm_name: None,
        newcomer: false,
        renamed: &NONE,
        no_inc: None,
        unsound: &[],
    };
    assert_eq!(make(&o, inputs).unwrap_err().kind(), Kind::NotFound);
}

#[test]
fn a_full_is_due_by_number_or_by_age() {
    let t = chain();
    let due = |e, now| {
        let list = vec![disk("/vm/d", both())];
        plan(t.path(), RequestedLevel::Auto(Some(e)), list, now).disks[0].level
    };
    let time = example("x", Level::Full, None).time;
    assert_eq!(due(FullEvery::Points(2), 100), Level::Full);
    assert_eq!(due(FullEvery::Points(3), 100), Level::Inc);
    assert_eq!(due(FullEvery::Age(Duration::from_secs(60)), time + 60), Level::Full);
    assert_eq!(due(FullEvery::Age(Duration::from_secs(60)), time + 59), Level::Inc);
}

#[test]
fn a_damaged_manifest_costs_its_own_disk_a_full_and_no_other_anything() {
    let t = chain();
    std::fs::write(t.path().join("d/.fleecefs/INC-2-d.json"), "{").unwrap();
    put(&t.path().join("e"), "FULL-1-e", Level::Full, None, FIRST);
    let mut m = manifest::read(&t.path().join("e"), "FULL-1-e".as_ref()).unwrap().unwrap();
    m.disk.file = "/vm/e".into();
    manifest::write(&t.path().join("e"), &m).unwrap();
    let list = || vec![disk("/vm/d", both()), disk("/vm/e", both())];
    let p = plan(t.path(), RequestedLevel::Auto(None), list(), 100);
    assert_eq!((p.disks[0].level, p.disks[1].level), (Level::Full, Level::Inc));
    assert!(p.disks[0].demoted.as_ref().unwrap().contains("manifest of INC-2-d"));
    assert_eq!(p.disks[0].dir, t.path().join("d"));
    let p = plan(t.path(), RequestedLevel::Inc, list(), 100);
    assert_eq!((p.refused.len(), p.disks.len()), (1, 1));
    // Not even the FULL says anything any more: the folder stays the disk's.
    std::fs::write(t.path().join("d/.fleecefs/FULL-1-d.json"), "{").unwrap();
    let p = plan(t.path(), RequestedLevel::Auto(None), list(), 100);
    assert_eq!((p.disks[0].level, &p.disks[0].dir), (Level::Full, &t.path().join("d")));
}

#[test]
fn a_diff_needs_no_inc() {
    let t = chain();
    std::fs::remove_file(t.path().join("d/INC-2-d")).unwrap();
    put(&t.path().join("d"), "INC-3-d", Level::Inc, Some("INC-2-d"), "000000000003");
    let p = plan(t.path(), RequestedLevel::Diff, vec![disk("/vm/d", both())], 100).disks.remove(0);
    assert_eq!((p.level, p.parent().unwrap().image.as_str()), (Level::Diff, "FULL-1-d"));
    assert_eq!(auto(t.path(), disk("/vm/d", both())).level, Level::Full);
}

#[test]
fn an_unsound_chain_demotes_no_other_disk_of_its_folder() {
    let t = tempfile::tempdir().unwrap();
    let mut list = Vec::new();
    for name in ["d", "e"] {
        let image = format!("FULL-1-{name}");
        put(t.path(), &image, Level::Full, None, FIRST);
        let mut m = manifest::read(t.path(), image.as_ref()).unwrap().unwrap();
        m.disk.file = format!("/vm/{name}");
        manifest::write(t.path(), &m).unwrap();
        list.push(disk(&format!("/vm/{name}"), both()));
    }
    let mut o = options(t.path(), RequestedLevel::Auto(None));
    o.layout.no_subdir = true;
    let unsound = [(t.path().to_path_buf(), "FULL-1-d".to_string(), "bad".to_string())];
    let inputs = Inputs {
        seen: Survey { disks: list, ..Default::default() },
        run: "00000000000f",
        target: &TargetId::new(TARGET),
        base: t.path(),
        now: 100,
        vm: None,
        vm_name: None,
        newcomer: false,
        renamed: &NONE,
        no_inc: None,
        unsound: &unsound,
    };
    let p = make(&o, inputs).unwrap();
    assert_eq!((p.disks[0].level, p.disks[1].level), (Level::Full, Level::Inc));
    assert_eq!(p.disks[0].demoted.as_deref(), Some("bad"));
}

#[test]
fn the_first_run_of_a_month_removes_last_months_bitmaps() {
    let t = tempfile::tempdir().unwrap();
    let (old, new) = (t.path().join("2026-11"), t.path().join("2026-12"));
    put(&old.join("d"), "FULL-1-d", Level::Full, None, FIRST);
    std::fs::create_dir(&new).unwrap();
    std::fs::write(t.path().join("uuid"), format!("{TARGET}-0000-4000-8000-000000000000")).unwrap();
    // November had an id of its own once.
    std::fs::write(old.join("uuid"), "eeeeeeee-0000-4000-8000-000000000000").unwrap();
    let earlier = names::bitmap("eeeeeeee", FIRST, FIRST, 0);
    let foreign = names::bitmap("ffffffff", FIRST, FIRST, 0);
    let target = TargetId::of(t.path(), &new, true).unwrap();
    let list = vec![bitmap(FIRST), earlier.clone(), foreign].into_iter().map(recording);
    let d = disk("/vm/d", list.collect());
    let p = make(
        &options(t.path(), RequestedLevel::Auto(None)),
        Inputs {
            seen: Survey { disks: vec![d], ..Default::default() },
            run: "00000000000f",
            target: &target,
            base: &new,
            now: 100,
            vm: None,
            vm_name: None,
            newcomer: false,
            renamed: &NONE,
            no_inc: None,
            unsound: &[],
        },
    )
    .unwrap();
    let p = &p.disks[0];
    assert_eq!((p.level, &p.dir), (Level::Full, &new.join("d")));
    assert_eq!(p.obsolete, [bitmap(FIRST), earlier]);
    assert!(target.owns(&p.new_bitmap.as_ref().unwrap().name));
}

mod backing;
mod copies;
mod exchanged;
mod guards;
