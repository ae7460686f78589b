//! qmprestore's verbs, killed or on a full file system: no state is lost, and whoever writes next
//! finishes the work.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use crate::support::guard::Guard;
use crate::support::images::{self, Chain, Rng, first_difference};
use crate::support::synced::{Then, before_each};
use crate::support::tools::{have, run};
use crate::support::verbs::{
    MIB, TOOLS, add_manifests, assert_same, chain, files, fleecefs, manifests_fit, name, ok,
    restored, s,
};
use fleecefs::manifest;
use fleecefs::manifest::Manifest;

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
fn a_kill_at_any_time_loses_nothing() {
    if !have("a_kill_at_any_time_loses_nothing", &TOOLS) {
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
        images::wait_until_closed(&folder);
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
        let size = (used + (48 << 10) + free).to_string();
        let mounted = Guard::tmpfs(&size, small.path());
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
        drop(mounted);
        failed += u32::from(check.unwrap());
    }
    println!("{failed} of {rounds} runs met a full disk");
    assert!(failed > 0, "the disk was never full");
}

/// Runs `words` on a fresh copy of a chain, killed before its change of a name number `at`. None if there are fewer.
fn killed_before(words: &[&str], chain: &Chain, to: &Path, at: usize) -> Option<PathBuf> {
    let folder = copy_of(&chain.dir, to);
    let words = words.iter().map(|w| if *w == "DIR" { s(&folder) } else { w });
    let mut command = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
    let mut left = at;
    let out = before_each(command.args(words), &folder, |act| {
        left = left.wrapping_sub(usize::from(act.path().is_some()));
        if left == usize::MAX { Then::Kill } else { Then::GoOn }
    });
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.code().is_none_or(|c| c == 0), "{at}: {said}");
    out.status.code().is_none().then_some(folder)
}

/// A child that has a backing pointer has one in the end, to what has taken the place of its parent.
#[test]
fn killed_before_each_change_points_and_pointers_are_right() {
    if !have("killed_before_each_change_points_and_pointers_are_right", &TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (chain, bytes) = chain(dir.path(), "sda", &[4 * MIB]);
    add_manifests(&chain, &[4 * MIB]);
    ok(&["rebase", s(&chain.dir)]);
    std::fs::remove_file(chain.dir.join("image")).unwrap();
    let (full, until, last) = (name(&chain.files[0]), name(&chain.files[2]), name(&chain.files[3]));
    let merged = until.replacen("INC", "FULL", 1);
    for (words, new) in [
        (&["commit", "DIR", "--until", until][..], full),
        (&["consolidate", "DIR", "sda.qcow2", "--until", until], &*merged),
    ] {
        let work = tempfile::tempdir().unwrap();
        let mut at = 0;
        while let Some(folder) = killed_before(words, &chain, work.path(), at) {
            let what = format!("{words:?} before change {at}");
            ok(&["verify", "--create", s(&folder)]);
            ok(&["verify", s(&folder)]);
            let parent = match folder.join(until).exists() {
                true => until,
                false => new,
            };
            assert_same(&what, &restored(&folder, last), &bytes[3]);
            assert_same(&what, &restored(&folder, parent), &bytes[2]);
            let info = run("qemu-img", &["info", "--output=json", s(&folder.join(last))]);
            let info: serde_json::Value = serde_json::from_slice(&info.stdout).unwrap();
            assert_eq!(info["backing-filename"], parent, "{what}");
            manifests_fit(&folder);
            let kept = std::fs::read_dir(folder.join(".fleecefs")).unwrap();
            let kept = kept.map(|e| e.unwrap().file_name().into_string().unwrap());
            // A new image before its journal may stay until somebody merges there again.
            let odd = kept.filter(|n| {
                let new = n.starts_with(".fleecefs-tmp-") || n.starts_with("consolidate-");
                n == "fold.json" || !new && !n.ends_with(".json") && n != "lock"
            });
            assert_eq!(odd.collect::<Vec<_>>(), [""; 0], "{what}");
            at += 1;
        }
        assert!(at > 10, "{words:?}: there are {at} changes");
    }
}
