//! qmprestore's verbs: the same states as QEMU's own tools make of the chain.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use crate::support::tools::{have, run};
use crate::support::verbs::{
    MIB, TOOLS, add_manifests, assert_same, chain, files, fleecefs, manifests_fit, name, ok,
    restored, s,
};
use fleecefs::lock::Locks;
use fleecefs::manifest;
use fleecefs::manifest::BitmapInfo;

#[test]
fn rebase_links_to_the_point_asked_for() {
    if !have("rebase_links_to_the_point_asked_for", &TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (chain, bytes) = chain(dir.path(), "sda", &[8 * MIB]);
    add_manifests(&chain, &[8 * MIB]);
    let times: Vec<i64> =
        chain.files.iter().map(|f| std::fs::metadata(f).unwrap().mtime()).collect();
    ok(&["rebase", s(&chain.dir), "--until", name(&chain.files[2])]);
    let image = chain.dir.join("image");
    assert_eq!(std::fs::read_link(&image).unwrap(), Path::new(name(&chain.files[2])));
    ok(&["rebase", "--absolute", s(&chain.dir)]);
    let info = run("qemu-img", &["info", "--output=json", s(&image)]);
    let info: serde_json::Value = serde_json::from_slice(&info.stdout).unwrap();
    let pointer = info["backing-filename"].as_str().unwrap();
    assert!(
        Path::new(pointer).is_absolute() && pointer.ends_with(name(&chain.files[2])),
        "{pointer}"
    );
    for (i, file) in chain.files.iter().enumerate() {
        assert_same(name(file), &restored(&chain.dir, name(file)), &bytes[i]);
    }
    ok(&["rebase", s(&chain.dir)]);
    assert_eq!(std::fs::read_link(&image).unwrap(), Path::new(name(&chain.files[3])));
    manifests_fit(&chain.dir);
    // Also where the folder has another name.
    let moved = dir.path().join("moved");
    std::fs::rename(&chain.dir, &moved).unwrap();
    let raw = dir.path().join("raw");
    run("qemu-img", &["convert", "-O", "raw", s(&moved.join("image")), s(&raw)]);
    assert_same("through the link", &std::fs::read(&raw).unwrap(), &bytes[3]);
    std::fs::remove_file(&raw).unwrap();
    for (i, file) in chain.files.iter().enumerate() {
        assert_same(name(file), &restored(&moved, name(file)), &bytes[i]);
        let time = std::fs::metadata(moved.join(name(file))).unwrap().mtime();
        assert_eq!(time, times[i], "{}", name(file));
    }
}

#[test]
fn commit_keeps_what_is_later_and_the_size() {
    if !have("commit_keeps_what_is_later_and_the_size", &TOOLS) {
        return;
    }
    for (disk, sizes, with_manifests, rebased) in [
        ("plain", vec![8 * MIB], false, false),
        ("shrink", vec![8 * MIB, 5 * MIB, 5 * MIB + 512], true, false),
        ("grow", vec![4 * MIB, 6 * MIB + 512], true, true),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (chain, bytes) = chain(dir.path(), disk, &sizes);
        if with_manifests {
            add_manifests(&chain, &sizes);
        }
        if rebased {
            ok(&["rebase", s(&chain.dir)]);
        }
        let before = files(&chain.dir);
        ok(&["commit", "--dry-run", s(&chain.dir), "--until", name(&chain.files[2])]);
        assert_eq!(files(&chain.dir), before);
        ok(&["commit", s(&chain.dir), "--until", name(&chain.files[2])]);
        let full = name(&chain.files[0]);
        assert_eq!(files(&chain.dir), [full, name(&chain.files[3])]);
        assert_same(disk, &restored(&chain.dir, full), &bytes[2]);
        assert_same(disk, &restored(&chain.dir, name(&chain.files[3])), &bytes[3]);
        // Manifests of both, and the lock.
        assert_eq!(std::fs::read_dir(chain.dir.join(".fleecefs")).unwrap().count(), 3);
        if with_manifests {
            manifests_fit(&chain.dir);
        }
        // The name is the old one, the time is that of the state.
        let times = listed_times(&chain.dir);
        assert_eq!(
            times,
            [
                (full.into(), stamp(&chain.files[2])),
                (name(&chain.files[3]).into(), stamp(&chain.files[3]))
            ]
        );
        let listed = ok(&["list", s(&chain.dir)]);
        let note = format!("has the state of {}", name(&chain.files[2]));
        assert!(String::from_utf8_lossy(&listed.stdout).contains(&note), "{listed:?}");
        ok(&["commit", s(&chain.dir)]);
        assert_eq!(files(&chain.dir), [full]);
        assert_eq!(listed_times(&chain.dir), [(full.into(), stamp(&chain.files[3]))]);
        assert_same(disk, &restored(&chain.dir, full), &bytes[3]);
        run("qemu-img", &["check", "-q", s(&chain.files[0])]);
    }
}

/// The time in a file's name.
fn stamp(file: &Path) -> i64 {
    name(file).split('-').nth(1).unwrap().parse().unwrap()
}

/// Names and times of the points of a folder with one disk, as `list` has them.
fn listed_times(dir: &Path) -> Vec<(String, i64)> {
    let listed: serde_json::Value =
        serde_json::from_slice(&ok(&["list", "--json", s(dir)]).stdout).unwrap();
    let points = listed["disks"][0]["points"].as_array().unwrap();
    let time = |p: &serde_json::Value| {
        (
            p["point"].as_str().unwrap().into(),
            fleecefs::units::parse_when(p["time"].as_str().unwrap()).unwrap(),
        )
    };
    points.iter().map(time).collect()
}

#[test]
fn states_keep_their_times_after_a_commit_and_a_snapshot_rebase() {
    if !have("states_keep_their_times_after_a_commit_and_a_snapshot_rebase", &TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (chain, bytes) = chain(dir.path(), "sda", &[8 * MIB]);
    ok(&["commit", s(&chain.dir), "--until", name(&chain.files[1])]);
    ok(&["snapshot-rebase", s(&chain.dir), "--until", name(&chain.files[2])]);
    ok(&["snapshot-rebase", s(&chain.dir)]);
    // A commit that is done already, perhaps by whoever came after a crash.
    let again = ok(&["commit", s(&chain.dir), "--until", name(&chain.files[3])]);
    assert!(String::from_utf8_lossy(&again.stdout).contains("already has that state"));
    let mut points = listed_times(&chain.dir);
    points.sort_by_key(|p| p.1);
    let times: Vec<i64> = points.iter().map(|p| p.1).collect();
    let stamps: Vec<i64> = chain.files.iter().map(|f| stamp(f)).collect();
    // The newest is there twice: as the FULL itself and as its snapshot.
    assert_eq!(times, [stamps[1], stamps[2], stamps[3], stamps[3]], "{points:?}");
    for ((point, _), state) in points.iter().zip([1, 2, 3, 3]) {
        assert_same(point, &restored(&chain.dir, point), &bytes[state]);
    }
}

/// The program in a time zone, by its name.
fn in_zone(zone: &str, args: &[&str]) -> String {
    let out =
        Command::new(env!("CARGO_BIN_EXE_fleecefs")).args(args).env("TZ", zone).output().unwrap();
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

#[test]
fn a_snapshot_rebase_read_in_another_zone_keeps_the_order() {
    let tools = [TOOLS.as_slice(), &["/usr/share/zoneinfo/Europe/Berlin"]].concat();
    if !have("a_snapshot_rebase_read_in_another_zone_keeps_the_order", &tools) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (chain, _) = chain(dir.path(), "sda", &[8 * MIB]);
    let until = name(&chain.files[1]);
    let plan =
        in_zone("Europe/Berlin", &["snapshot-rebase", "-n", s(&chain.dir), "--until", until]);
    let local = jiff::Timestamp::from_second(stamp(&chain.files[1])).unwrap();
    let local = local.to_zoned(jiff::tz::TimeZone::fixed(jiff::tz::offset(1)));
    assert!(plan.contains(&local.strftime("%Y-%m-%d-%H:%M:%S").to_string()), "{plan}");
    // As qmprestore does it: without manifests.
    in_zone("UTC", &["snapshot-rebase", s(&chain.dir), "--until", until]);
    std::fs::remove_dir_all(chain.dir.join(".fleecefs")).unwrap();
    in_zone("UTC", &["verify", "--create", s(&chain.dir)]);
    for with_manifests in [true, false] {
        if !with_manifests {
            std::fs::remove_dir_all(chain.dir.join(".fleecefs")).unwrap();
        }
        // Eight hours behind: the snapshot seems to be newer than the increments.
        let kept = in_zone(
            "America/Los_Angeles",
            &["prune", "-n", "--force", "--keep-last", "1", "--json", s(&chain.dir)],
        );
        let plan: serde_json::Value = serde_json::from_str(&kept).unwrap();
        let points = plan["disks"][0]["points"].as_array().unwrap();
        let kept = |file: &Path| {
            let p = points.iter().find(|p| p["point"] == name(file)).unwrap();
            !p["keep"].as_array().unwrap().is_empty()
        };
        assert!(kept(&chain.files[3]), "{plan}");
    }
}

#[test]
fn snapshot_rebase_keeps_every_state_inside() {
    if !have("snapshot_rebase_keeps_every_state_inside", &TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let sizes = [8 * MIB, 5 * MIB, 8 * MIB];
    let (chain, bytes) = chain(dir.path(), "sda", &sizes);
    add_manifests(&chain, &sizes);
    ok(&["snapshot-rebase", s(&chain.dir), "--until", name(&chain.files[1])]);
    ok(&["snapshot-rebase", s(&chain.dir)]);
    assert_eq!(files(&chain.dir), [name(&chain.files[0])]);
    manifests_fit(&chain.dir);
    let info = run("qemu-img", &["info", "--output=json", s(&chain.files[0])]);
    let info: serde_json::Value = serde_json::from_slice(&info.stdout).unwrap();
    let snapshots = info["snapshots"].as_array().unwrap();
    let names: Vec<&str> = snapshots.iter().map(|s| s["name"].as_str().unwrap()).collect();
    assert_eq!((names.len(), names[0]), (4, "FULL-BACKUP"));
    run("qemu-img", &["check", "-q", s(&chain.files[0])]);
    for (i, state) in names.iter().enumerate() {
        let point = format!("{}@{state}", name(&chain.files[0]));
        assert_same(state, &restored(&chain.dir, &point), &bytes[i]);
    }
    assert_same("the FULL", &restored(&chain.dir, name(&chain.files[0])), &bytes[3]);
}

#[test]
fn a_copy_that_is_newest_is_merged_but_no_chain_ends_with_it() {
    if !have("a_copy_that_is_newest_is_merged_but_no_chain_ends_with_it", &TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (chain, bytes) = chain(dir.path(), "sda", &[8 * MIB]);
    let last = name(&chain.files[3]);
    let copy = format!("COPY-{}-sda.qcow2", stamp(&chain.files[3]) + 100);
    let copy = chain.dir.join(copy);
    let raw = dir.path().join("raw");
    let copied = vec![0xc0; bytes[3].len()];
    std::fs::write(&raw, &copied).unwrap();
    run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", s(&raw), s(&copy)]);
    // The newest state of the disk is the COPY's.
    let merged = dir.path().join("merged.raw");
    ok(&["merge", "--format", "raw", s(&chain.dir), s(&merged)]);
    assert_same("merged", &std::fs::read(&merged).unwrap(), &copied);
    ok(&["rebase", s(&chain.dir)]);
    assert_eq!(std::fs::read_link(chain.dir.join("image")).unwrap(), Path::new(last));
    std::fs::remove_file(chain.dir.join("image")).unwrap();
    ok(&["commit", s(&chain.dir)]);
    assert_eq!(files(&chain.dir), [name(&copy), name(&chain.files[0])]);
    assert_same("FULL", &restored(&chain.dir, name(&chain.files[0])), &bytes[3]);
    assert_same("COPY", &restored(&chain.dir, name(&copy)), &copied);
}

#[test]
fn merge_alters_nothing_and_picks_by_filter() {
    if !have("merge_alters_nothing_and_picks_by_filter", &TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (a, bytes) = chain(dir.path(), "a", &[8 * MIB, 6 * MIB]);
    let (b, _) = chain(dir.path(), "b", &[4 * MIB]);
    for f in &b.files {
        std::fs::rename(f, a.dir.join(name(f))).unwrap();
    }
    std::fs::remove_dir(&b.dir).unwrap();
    let to = tempfile::tempdir().unwrap();
    let target = to.path().join("new/merged.qcow2");
    let out = fleecefs(&["merge", s(&a.dir), s(&target)]);
    assert_eq!(out.status.code(), Some(2), "two disks");
    let before = files(&a.dir);
    for i in [3, 1] {
        let until = name(&a.files[i]);
        let args = ["merge", s(&a.dir), s(&target), "--filter", "-a.", "--until", until, "--force"];
        ok(&args);
        run("qemu-img", &["check", "-q", "-f", "qcow2", s(&target)]);
        let raw = to.path().join("raw");
        run("qemu-img", &["convert", "-O", "raw", s(&target), s(&raw)]);
        assert_same(until, &std::fs::read(&raw).unwrap(), &bytes[i]);
    }
    assert_eq!(files(&a.dir), before);
}

#[test]
fn what_is_unsound_or_needed_is_not_touched() {
    if !have("what_is_unsound_or_needed_is_not_touched", &TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (chain, _) = chain(dir.path(), "sda", &[8 * MIB]);
    add_manifests(&chain, &[8 * MIB]);
    let mut bytes = std::fs::read(&chain.files[1]).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&chain.files[1], &bytes).unwrap();
    for verb in ["commit", "rebase", "snapshot-rebase"] {
        let out = fleecefs(&[verb, s(&chain.dir)]);
        let text = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(18), "{verb}: {text}");
        assert!(text.contains(name(&chain.files[1])), "{text}");
        assert_eq!(files(&chain.dir).len(), 4);
    }
    // A DIFF depends on the FULL: to merge an INC into that would change the DIFF's state.
    let diff = chain.dir.join("DIFF-1700004000-sda.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", s(&diff), "8M"]);
    let out = fleecefs(&["commit", "--skip-check", s(&chain.dir)]);
    assert_eq!(out.status.code(), Some(2), "{}", String::from_utf8_lossy(&out.stderr));
    assert_eq!(files(&chain.dir).len(), 5);
}

#[test]
fn what_would_harm_others_is_refused() {
    if !have("what_would_harm_others_is_refused", &TOOLS) {
        return;
    }
    let refused = |dir: &Path, code: i32, word: &str| {
        for verb in ["commit", "snapshot-rebase"] {
            let before = files(dir);
            let out = fleecefs(&[verb, s(dir)]);
            let text = String::from_utf8_lossy(&out.stderr).into_owned();
            assert_eq!(out.status.code(), Some(code), "{verb}: {text}");
            assert!(text.contains(word), "{text}");
            assert_eq!(files(dir), before, "{verb}");
        }
    };
    // A FULL and an INC of one second: the new FULL's name for a while would be the FULL's own.
    let dir = tempfile::tempdir().unwrap();
    let (chain, bytes) = chain(dir.path(), "sda", &[8 * MIB]);
    let linked = chain.dir.join(name(&chain.files[0]).replace("FULL", "INC"));
    for file in &chain.files[2..] {
        std::fs::remove_file(file).unwrap();
    }
    std::fs::rename(&chain.files[1], &linked).unwrap();
    let base = name(&chain.files[0]);
    run("qemu-img", &["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", base, s(&linked)]);
    refused(&chain.dir, 4, base);
    assert_same("INC", &restored(&chain.dir, name(&linked)), &bytes[1]);
    std::fs::rename(&linked, &chain.files[1]).unwrap();
    // An image of another kind that depends on the INC.
    let other = chain.dir.join("other.qcow2");
    let base = name(&chain.files[1]);
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, s(&other), "8M"]);
    refused(&chain.dir, 2, "other.qcow2");
    std::fs::remove_file(&other).unwrap();
    // Somebody else is writing: in this folder, above it or below it.
    for folder in [chain.dir.as_path(), dir.path()] {
        let held = Locks::take(&folder.canonicalize().unwrap()).unwrap();
        refused(&chain.dir, 6, "lock");
        let out = fleecefs(&["rebase", s(&chain.dir)]);
        assert_eq!(out.status.code(), Some(6));
        let out = fleecefs(&["verify", "--create", s(&chain.dir)]);
        assert_eq!(out.status.code(), Some(19), "{out:?}");
        drop(held);
    }
    assert!(manifest::read(&chain.dir, name(&chain.files[0]).as_ref()).unwrap().is_none());
    // Data in another file, which QEMU would write to.
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("sdb");
    std::fs::create_dir(&folder).unwrap();
    let full = folder.join("FULL-1700000000-sdb.qcow2");
    let option = format!("data_file={},data_file_raw=on", s(&folder.join("data.bin")));
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &option, s(&full), "1M"]);
    let inc = folder.join("INC-1700000001-sdb.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", s(&inc), "1M"]);
    refused(&folder, 11, name(&full));
}

#[test]
fn no_state_is_left_out_whatever_snapshots_are_called() {
    let test = "no_state_is_left_out_whatever_snapshots_are_called";
    if !have(test, &TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (chain, bytes) = chain(dir.path(), "sda", &[8 * MIB]);
    let chain = chain.finish();
    // 00:30 and 01:30 UTC of a night that has the hour from two to three twice in Berlin.
    let times = [1_761_432_000_u64, 1_761_438_600, 1_761_442_200, 1_761_450_000];
    let mut names = Vec::new();
    for (file, time) in chain.files.iter().zip(times) {
        let (level, _) = name(file).split_once('-').unwrap();
        names.push(format!("{level}-{time}-sda.qcow2"));
        std::fs::rename(file, chain.dir.join(names.last().unwrap())).unwrap();
    }
    let berlin = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
        let out = command.env("TZ", "CET-1CEST,M3.5.0,M10.5.0/3").args(args).output().unwrap();
        assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
        out.stdout
    };
    berlin(&["snapshot-rebase", s(&chain.dir), "--until", &names[2]]);
    // The FULL's state is another one now than that of any snapshot.
    berlin(&["commit", s(&chain.dir)]);
    berlin(&["snapshot-rebase", s(&chain.dir)]);
    let image = chain.dir.join(&names[0]);
    let taken = || {
        let info = run("qemu-img", &["info", "--output=json", s(&image)]);
        let info: serde_json::Value = serde_json::from_slice(&info.stdout).unwrap();
        let snapshots = info["snapshots"].as_array().unwrap();
        let name = |s: &serde_json::Value| s["name"].as_str().unwrap().to_string();
        snapshots.iter().map(name).collect::<Vec<_>>()
    };
    let all = taken();
    assert_eq!(all[..3], ["FULL-BACKUP", "2025-10-26-02:30:00", "2025-10-26-02:30:00-2"]);
    assert_eq!(all.len(), 4);
    for (i, state) in all.iter().enumerate() {
        let point = format!("{}@{state}", names[0]);
        assert_same(state, &berlin(&["restore", s(&chain.dir), &point, "-"]), &bytes[i]);
    }
    // Nothing is new, so nothing is taken again.
    berlin(&["snapshot-rebase", s(&chain.dir)]);
    assert_eq!(taken(), all);
}

#[test]
fn what_a_diff_goes_by_is_the_old_fulls_bitmap() {
    if !have("what_a_diff_goes_by_is_the_old_fulls_bitmap", &TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (chain, _) = chain(dir.path(), "sda", &[8 * MIB]);
    let chain = chain.finish();
    add_manifests(&chain, &[8 * MIB]);
    for file in &chain.files {
        let mut m = manifest::read(&chain.dir, name(file).as_ref()).unwrap().unwrap();
        let (name, node) = (format!("of-{}", m.time), String::new());
        m.bitmap =
            Some(BitmapInfo { name, node, granularity: 65536, persistent: true, watermark: false });
        manifest::write(&chain.dir, &m).unwrap();
    }
    let bitmap = |file: &Path| {
        let m = manifest::read(&chain.dir, name(file).as_ref()).unwrap().unwrap();
        m.bitmap.unwrap().name
    };
    let (first, last) = (bitmap(&chain.files[0]), bitmap(&chain.files[3]));
    ok(&["commit", s(&chain.dir), "--until", name(&chain.files[1])]);
    assert_eq!(bitmap(&chain.files[0]), first);
    // What records since the newest point goes on doing so.
    ok(&["commit", s(&chain.dir)]);
    assert_eq!(bitmap(&chain.files[0]), last);
}
