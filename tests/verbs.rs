//! qmprestore's verbs: the same states as QEMU's own tools make of the chain, and no state lost,
//! whenever the work is cut off.

mod qemu;

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Instant;

use fleecefs::chain::Level;
use fleecefs::chain::manifest::{self, BitmapInfo, Contents, ImageFormat, Manifest};
use fleecefs::lock::Locks;
use qemu::{Chain, Oracle, Rng, first_difference, have, run};

const MIB: u64 = 1 << 20;
const TOOLS: [&str; 2] = ["qemu-img", "qemu-io"];

fn fleecefs(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_fleecefs")).args(args).output().unwrap()
}

fn ok(args: &[&str]) -> Output {
    let out = fleecefs(args);
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    out
}

fn s(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn name(file: &Path) -> &str {
    file.file_name().unwrap().to_str().unwrap()
}

/// Four points whose sizes may differ, with every kind of cluster, and their bytes.
fn chain(dir: &Path, disk: &str, sizes: &[u64]) -> (Chain, Vec<Vec<u8>>) {
    let mut rng = Rng(disk.bytes().map(u64::from).sum());
    let mut chain = Chain::new(dir, disk);
    for i in 0..4 {
        let size = sizes[i.min(sizes.len() - 1)];
        let mut ops = vec![format!("write -c -P 8 {} 64k", i << 20)];
        for k in 0..8 {
            let (at, len) = rng.range(size, 512);
            ops.push(match k % 4 {
                3 => format!("write -z {at} {len}"),
                _ => format!("write -P {} {at} {len}", 1 + rng.below(255)),
            });
        }
        chain.point("", size, &ops);
    }
    // By name, not by time: what qmprestore goes by.
    for (i, file) in chain.files.iter().enumerate() {
        run("touch", &["-d", &format!("@{}", 1_800_000_000 - i), s(file)]);
    }
    let oracle = Oracle::new(&chain.files);
    let bytes = (0..4).map(|i| oracle.bytes(i)).collect();
    (chain, bytes)
}

/// Gives every point a manifest with its hash.
fn add_manifests(chain: &Chain, sizes: &[u64]) {
    for (i, file) in chain.files.iter().enumerate() {
        let bytes = std::fs::read(file).unwrap();
        let text = serde_json::json!({
            "format_version": manifest::FORMAT_VERSION, "run": format!("run{i}"),
            "image": name(file), "level": if i == 0 { "full" } else { "inc" },
            "time": 1_700_003_600 + 3600 * i, "format": "qcow2",
            "parent": (i > 0).then(|| name(&chain.files[i - 1])),
            "content": if i == 0 { "full" } else { "dirty-only" },
            "virtual_size": sizes[i.min(sizes.len() - 1)], "file_size": bytes.len(),
            "blake3": blake3::hash(&bytes).to_hex().to_string(),
        });
        let m: Manifest = manifest::parse(text.to_string().as_bytes()).unwrap();
        assert_eq!((m.level == Level::Full, m.content == Contents::Full), (i == 0, i == 0));
        assert_eq!(m.format, ImageFormat::Qcow2);
        manifest::write(&chain.dir, &m).unwrap();
    }
}

/// What fleecefs makes of a point.
fn restored(dir: &Path, point: &str) -> Vec<u8> {
    ok(&["restore", s(dir), point, "-"]).stdout
}

fn assert_same(what: &str, got: &[u8], want: &[u8]) {
    assert_eq!(first_difference(got, want), None, "{what}");
}

fn files(dir: &Path) -> Vec<String> {
    let plain = |e: &std::fs::DirEntry| e.file_type().unwrap().is_file();
    let entries = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap()).filter(plain);
    let mut names: Vec<String> = entries.map(|e| e.file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Every manifest fits its image, and no image is without.
fn manifests_fit(dir: &Path) {
    for name in files(dir) {
        let m = manifest::read(dir, name.as_ref()).unwrap().expect(&name);
        let bytes = std::fs::read(dir.join(&name)).unwrap();
        assert_eq!(m.file_size, bytes.len() as u64, "{name}");
        assert_eq!(m.blake3, Some(blake3::hash(&bytes).to_hex().to_string()), "{name}");
        if let Some(parent) = m.parent {
            assert!(dir.join(&parent).exists(), "{name} lies on {parent}");
        }
    }
}

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
        let note = format!("holds the state of {}", name(&chain.files[2]));
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
    let time =
        |p: &serde_json::Value| (p["name"].as_str().unwrap().into(), p["time"].as_i64().unwrap());
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
    // A DIFF lies on the FULL: to fold an INC into that would change the DIFF's state.
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
    // An image of another kind that lies on the INC.
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

/// The folder as a run leaves it that is killed when the new FULL has its interim name: `done` is
/// the same folder after the run.
fn broken_off(folder: &Path, done: &Path, chain: &Chain, last: usize) -> PathBuf {
    let full = name(&chain.files[0]);
    let interim = name(&chain.files[last]).replacen("INC", "FULL", 1);
    std::fs::copy(done.join(full), folder.join(&interim)).unwrap();
    let increments: Vec<&str> = chain.files[1..=last].iter().map(|f| name(f)).collect();
    let manifest = manifest::read(done, full.as_ref()).unwrap();
    let journal = serde_json::json!({
        "full": full, "interim": interim, "increments": increments, "raw": false,
        "manifest": manifest,
    });
    let path = folder.join(".fleecefs/fold.json");
    std::fs::write(&path, journal.to_string()).unwrap();
    path
}

#[test]
fn whoever_writes_next_finishes_a_commit_and_loses_nothing_made_since() {
    let test = "whoever_writes_next_finishes_a_commit_and_loses_nothing_made_since";
    if !have(test, &TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (chain, bytes) = chain(dir.path(), "sda", &[8 * MIB]);
    let chain = chain.finish();
    add_manifests(&chain, &[8 * MIB]);
    // The last INC is made after the kill, with and without a backing pointer.
    let work = tempfile::tempdir().unwrap();
    let (full, last) = (name(&chain.files[0]), name(&chain.files[3]));
    let done = copy_of(&chain.dir, work.path());
    std::fs::remove_file(done.join(last)).unwrap();
    manifest::remove(&done, last.as_ref()).unwrap();
    ok(&["commit", s(&done)]);
    let done_at = dir.path().join("done");
    std::fs::rename(&done, &done_at).unwrap();
    for linked in [false, true] {
        for next in [
            vec!["rebase", "DIR"],
            vec!["prune", "DIR", "--keep-last", "9"],
            vec!["consolidate", "DIR", "sda", "--until", last],
            vec!["verify", "--create", "DIR"],
            vec!["commit", "DIR", "--until", full],
        ] {
            let folder = copy_of(&chain.dir, work.path());
            let journal = broken_off(&folder, &done_at, &chain, 2);
            if linked {
                let (base, image) = (name(&chain.files[2]), folder.join(last));
                let args = ["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", base, s(&image)];
                run("qemu-img", &args);
                let mut m = manifest::read(&folder, last.as_ref()).unwrap().unwrap();
                m.blake3 = Some(blake3::hash(&std::fs::read(&image).unwrap()).to_hex().to_string());
                manifest::write(&folder, &m).unwrap();
            }
            let what = format!("{next:?}, {linked}");
            // Until then everything is there, and it is said that something is unfinished.
            assert_same(&what, &restored(&folder, last), &bytes[3]);
            let told = ok(&["list", s(&folder)]).stdout;
            assert!(String::from_utf8_lossy(&told).contains("fold.json"), "{what}");
            let args: Vec<&str> = next
                .iter()
                .map(|a| match (*a, next[0]) {
                    ("DIR", "rebase" | "commit") => s(&folder),
                    ("DIR", _) => s(work.path()),
                    (other, _) => other,
                })
                .collect();
            ok(&args);
            assert!(!journal.exists(), "{what}");
            let newest =
                if next[0] == "consolidate" { last.replace("INC", "FULL") } else { last.into() };
            assert_same(&what, &restored(&folder, &newest), &bytes[3]);
            if next[0] != "consolidate" {
                assert_eq!(files(&folder), [full, last], "{what}");
                assert_same(&what, &restored(&folder, full), &bytes[2]);
            }
            manifests_fit(&folder);
            ok(&["verify", s(&folder)]);
        }
    }
}

#[test]
fn a_full_that_was_replaced_alone_gets_its_manifest() {
    if !have("a_full_that_was_replaced_alone_gets_its_manifest", &TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (mut chain, _) = chain(dir.path(), "sda", &[8 * MIB]);
    for file in &chain.files[1..] {
        std::fs::remove_file(file).unwrap();
    }
    chain.files.truncate(1);
    add_manifests(&chain, &[8 * MIB]);
    let work = tempfile::tempdir().unwrap();
    let full = name(&chain.files[0]);
    ok(&["snapshot-rebase", s(&copy_of(&chain.dir, work.path()))]);
    let done = dir.path().join("done");
    std::fs::rename(work.path().join("sda"), &done).unwrap();
    manifests_fit(&done);
    let old = manifest::read(&chain.dir, full.as_ref()).unwrap().unwrap();
    let new = manifest::read(&done, full.as_ref()).unwrap().unwrap();
    assert_ne!(old.file_size, new.file_size);
    // Killed before the rename, and after it.
    for (from, want) in [(&chain.dir, &old), (&done, &new)] {
        let folder = copy_of(&chain.dir, work.path());
        std::fs::copy(from.join(full), folder.join(full)).unwrap();
        manifest::remove(&folder, full.as_ref()).unwrap();
        let journal = serde_json::json!({
            "full": full, "interim": full, "increments": [], "raw": false, "manifest": new,
            "old": old,
        });
        std::fs::write(folder.join(".fleecefs/fold.json"), journal.to_string()).unwrap();
        ok(&["verify", "--create", s(&folder)]);
        assert_eq!(manifest::read(&folder, full.as_ref()).unwrap().as_ref(), Some(want));
        ok(&["verify", s(&folder)]);
    }
}

#[test]
fn a_header_that_is_put_back_leaves_the_time() {
    if !have("a_header_that_is_put_back_leaves_the_time", &TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (chain, bytes) = chain(dir.path(), "sda", &[8 * MIB]);
    let chain = chain.finish();
    add_manifests(&chain, &[8 * MIB]);
    let image = &chain.files[1];
    let old = std::fs::read(image).unwrap();
    let time = std::fs::metadata(image).unwrap().modified().unwrap();
    // As a run leaves it that dies right after QEMU has changed the header.
    let saved = chain.dir.join(".fleecefs").join(format!("{}.header", name(image)));
    let m = manifest::read(&chain.dir, name(image).as_ref()).unwrap().unwrap();
    let hash = m.blake3.clone().unwrap();
    std::fs::write(&saved, [hash.as_bytes(), &old[..65536]].concat()).unwrap();
    std::fs::File::options().write(true).open(&saved).unwrap().set_modified(time).unwrap();
    manifest::write(&chain.dir, &Manifest { blake3: None, ..m }).unwrap();
    let base = name(&chain.files[3]);
    run("qemu-img", &["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", base, s(image)]);
    ok(&["verify", "--create", s(&chain.dir)]);
    assert!(!saved.exists());
    assert_eq!(std::fs::metadata(image).unwrap().modified().unwrap(), time);
    assert_same("INC", &restored(&chain.dir, name(image)), &bytes[1]);
    manifests_fit(&chain.dir);
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
        m.bitmap = Some(BitmapInfo { name, node, granularity: 65536, persistent: true });
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

/// A fresh copy of a chain's folder.
fn copy_of(folder: &Path, to: &Path) -> PathBuf {
    let copy = to.join("sda");
    let _ = std::fs::remove_dir_all(&copy);
    run("cp", &["-a", s(folder), s(&copy)]);
    copy
}

/// After a crash: every point that is there is right, and none that should be there is missing.
fn nothing_is_lost(folder: &Path, chain: &Chain, bytes: &[Vec<u8>], until: usize, what: &str) {
    let names = files(folder);
    let (full, last) = (name(&chain.files[0]), name(&chain.files[until]));
    let interim = last.replacen("INC", "FULL", 1);
    for file in &names {
        let got = restored(folder, file);
        let want: Vec<usize> = match chain.files.iter().position(|f| name(f) == file) {
            // The FULL may have its old state or the new one.
            Some(0) => vec![0, until],
            Some(i) => vec![i],
            None => {
                assert_eq!(*file, interim, "{what}");
                vec![until]
            }
        };
        let right = want.iter().any(|&i| first_difference(&got, &bytes[i]).is_none());
        assert!(right, "{what}: {file} is wrong; there are {names:?}");
    }
    for later in &chain.files[until + 1..] {
        assert!(names.iter().any(|n| n == name(later)), "{what}: {} is lost", name(later));
    }
    let full_is_new = || first_difference(&restored(folder, full), &bytes[until]).is_none();
    let kept = names.iter().any(|n| n == last) || names.contains(&interim) || full_is_new();
    assert!(kept, "{what}: the state of {last} is lost; there are {names:?}");
}

#[test]
fn a_kill_at_any_moment_loses_nothing() {
    if !have("a_kill_at_any_moment_loses_nothing", &TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let sizes = [8 * MIB, 6 * MIB, 8 * MIB];
    let (chain, bytes) = chain(dir.path(), "sda", &sizes);
    let chain = chain.finish();
    let kept = tempfile::tempdir().unwrap();
    let plain = copy_of(&chain.dir, kept.path());
    add_manifests(&chain, &sizes);
    let work = tempfile::tempdir().unwrap();
    let recorded = kept.path().join("recorded");
    std::fs::rename(copy_of(&chain.dir, work.path()), &recorded).unwrap();
    ok(&["rebase", s(&chain.dir)]);
    let (mut rng, mut cut) = (Rng(77), 0);
    let mut took = HashMap::new();
    // More on demand: each round copies the folder and waits for the disk many times.
    let rounds = std::env::var("FLEECEFS_KILLS").map_or(9, |n| n.parse().unwrap());
    for round in 0..rounds {
        let verb = ["commit", "snapshot-rebase", "rebase"][round % 3];
        let from = match (verb, round / 3 % 2) {
            ("rebase", 0) => &recorded,
            (_, 0) => &chain.dir,
            _ => &plain,
        };
        let folder = work.path().join("sda");
        let args = [verb, s(&folder), "--until", name(&chain.files[2])];
        let took = *took.entry((verb, from)).or_insert_with(|| {
            copy_of(from, work.path());
            let started = Instant::now();
            ok(&args);
            started.elapsed()
        });
        copy_of(from, work.path());
        let mut child = Command::new(env!("CARGO_BIN_EXE_fleecefs")).args(args).spawn().unwrap();
        std::thread::sleep(took.mul_f64(rng.below(1000) as f64 / 1000.0));
        cut += u32::from(child.try_wait().unwrap().is_none());
        let _ = child.kill();
        child.wait().unwrap();
        qemu::wait_until_closed(&folder);
        let what = format!("round {round}, {verb} of {}", from.display());
        nothing_is_lost(&folder, &chain, &bytes, 2, &what);
        let out = fleecefs(&["verify", s(&folder)]);
        let said = String::from_utf8_lossy(&out.stdout).into_owned();
        assert!(matches!(out.status.code(), Some(0 | 19)), "{what}: {said}");
        // The next run finishes it, or does it all.
        let out = fleecefs(&args);
        let done = out.status.success() || out.status.code() == Some(3);
        assert!(done, "{what}: {}", String::from_utf8_lossy(&out.stderr));
        let end: Vec<&str> = match verb {
            "rebase" => chain.files.iter().map(|f| name(f)).collect(),
            _ => vec![name(&chain.files[0]), name(&chain.files[3])],
        };
        assert_eq!(files(&folder), end, "{what}");
        nothing_is_lost(&folder, &chain, &bytes, 2, &what);
        if from != &plain {
            manifests_fit(&folder);
            ok(&["verify", s(&folder)]);
        }
    }
    println!("{cut} of {rounds} runs were cut off");
    assert!(cut > 0, "never cut off");
}

#[test]
fn a_full_disk_loses_nothing() {
    let test = "a_full_disk_loses_nothing";
    // SAFETY: geteuid has no preconditions.
    let root = unsafe { libc::geteuid() } == 0;
    if !have(test, &TOOLS) || !root {
        assert!(root || std::env::var_os("CI").is_none(), "{test} needs root");
        println!("skipped: {test} needs root");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (chain, bytes) = chain(dir.path(), "sda", &[8 * MIB]);
    let chain = chain.finish();
    add_manifests(&chain, &[8 * MIB]);
    let used: u64 = chain.files.iter().map(|f| std::fs::metadata(f).unwrap().blocks() * 512).sum();
    let rounds = std::env::var("FLEECEFS_KILLS").map_or(6, |n| n.parse().unwrap());
    let (mut rng, mut failed) = (Rng(5), 0);
    for round in 0..rounds {
        let small = tempfile::tempdir().unwrap();
        let free = rng.below(used) / 4096 * 4096 / if round % 2 == 0 { 1 } else { 16 };
        let size = format!("size={}", used + (48 << 10) + free);
        run("mount", &["-t", "tmpfs", "-o", &size, "none", s(small.path())]);
        let verb = ["commit", "rebase", "snapshot-rebase", "rebase"][round % 4];
        let check = std::panic::catch_unwind(|| {
            let folder = copy_of(&chain.dir, small.path());
            let out = fleecefs(&[verb, s(&folder), "--until", name(&chain.files[2])]);
            let code = out.status.code();
            let said = String::from_utf8_lossy(&out.stderr).into_owned();
            let what = format!("round {round}, {verb}, {free} bytes free: {said}");
            assert!(matches!(code, Some(0 | 7)), "{what}");
            nothing_is_lost(&folder, &chain, &bytes, 2, &what);
            let out = fleecefs(&["verify", s(&folder)]);
            let found = String::from_utf8_lossy(&out.stdout).into_owned();
            assert!(matches!(out.status.code(), Some(0 | 19)), "{what}: {found}");
            code != Some(0)
        });
        run("umount", &[s(small.path())]);
        failed += u32::from(check.unwrap());
    }
    println!("{failed} of {rounds} runs met a full disk");
    assert!(failed > 0, "the disk was never full");
}
