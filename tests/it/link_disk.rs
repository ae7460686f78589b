//! link-disk: a renamed disk's points and those under its new name become one history, whatever dies
//! whenever.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use crate::support::backup::{self, Caller, level, newest, same};
use crate::support::checked;
use crate::support::images;
use crate::support::mount::Mount;
use crate::support::process;
use crate::support::renamed::*;
use crate::support::tools::{have, run};
use crate::support::verbs::{MIB, TOOLS, assert_same, files, fleecefs, ok, s};
use fleecefs::chain::scan::{ScanOptions, scan};
use fleecefs::manifest;

use serde_json::Value;

#[test]
fn two_names_become_one_disk() {
    if !have("two_names_become_one_disk", &TOOLS) {
        return;
    }
    for r in [Renamed::folders(), Renamed::flat()] {
        let dir = r.dir.path();
        let mtimes = |d: &Path| {
            let all = std::fs::read_dir(d).unwrap().map(|e| e.unwrap().metadata().unwrap());
            let mut t: Vec<_> = all.filter(|m| m.is_file()).map(|m| m.mtime()).collect();
            t.sort();
            t
        };
        let times = match r.old {
            "old" => [mtimes(&dir.join("old")), mtimes(&dir.join("new"))].concat(),
            _ => mtimes(dir),
        };
        let before = ok(&["list", s(dir), "--json"]).stdout;
        let plan = r.must(dir, &["--dry-run"]);
        assert!(plan.contains("FULL-1700003600-old.qcow2 -> "), "{plan}");
        assert!(plan.contains("FULL-1700003600-new.qcow2"), "{plan}");
        assert!(plan.contains("dry run"), "{plan}");
        let json: Value = serde_json::from_str(&r.must(dir, &["--dry-run", "--json"])).unwrap();
        assert_eq!(json["points"][1]["time"], "2023-11-15T00:13:20Z", "{json:#}");
        assert_eq!(before, ok(&["list", s(dir), "--json"]).stdout, "a dry run changed something");
        r.must(dir, &[]);
        r.check_end(dir, r.old);
        let mut times = times;
        times.sort();
        let at = if r.old == "old" { dir.join("new") } else { dir.to_path_buf() };
        assert_eq!(mtimes(&at), times, "the files' times stay");
        // Once more there is nothing to do.
        assert!(r.must(dir, &[]).contains("already"));
        // It is one disk for retention, too.
        ok(&["prune", s(dir), "--keep-last", "1"]);
        assert_eq!(files(&r.joined(dir)).len(), 4);
    }
}

/// Reads all of an open point, past the page cache.
fn read_whole(file: &std::fs::File, len: usize) -> std::io::Result<Vec<u8>> {
    let layout = std::alloc::Layout::from_size_align(MIB as usize, 4096).unwrap();
    let mut all = Vec::new();
    while all.len() < len {
        // SAFETY: the size is not zero; freed below with the same layout.
        let at = unsafe { std::alloc::alloc_zeroed(layout) };
        assert!(!at.is_null());
        // SAFETY: so many bytes, written to with zeros, that nobody else has.
        let part = unsafe { std::slice::from_raw_parts_mut(at, layout.size()) };
        let read = std::os::unix::fs::FileExt::read_at(file, part, all.len() as u64);
        all.extend_from_slice(part);
        // SAFETY: allocated above.
        unsafe { std::alloc::dealloc(at, layout) };
        assert_ne!(read?, 0);
    }
    all.truncate(len);
    Ok(all)
}

#[test]
fn what_is_open_in_a_mount_is_read_on() {
    if !have("what_is_open_in_a_mount_is_read_on", &TOOLS) {
        return;
    }
    let r = Renamed::folders();
    let dir = r.dir.path();
    let mount = Mount::new(dir);
    let open = |disk: &str, image: &str| {
        let direct = std::fs::File::options();
        let mut direct = direct;
        std::os::unix::fs::OpenOptionsExt::custom_flags(direct.read(true), libc::O_DIRECT);
        direct.open(mount.point(disk, Path::new(image))).unwrap()
    };
    let old = files(&dir.join("old"));
    let handles: Vec<_> = old.iter().map(|n| (stamp(Path::new(n)), open("old", n))).collect();
    let check = |(time, file): &(i64, std::fs::File), what: &str| {
        let (_, truth) = r.truth.iter().find(|(t, _)| t == time).unwrap();
        let got = read_whole(file, truth.len()).unwrap_or_else(|e| panic!("{what}, {time}: {e}"));
        assert_same(&format!("{what}, {time}"), &got, truth);
    };
    // One has been read before, the others not.
    check(&handles[1], "before");
    r.must(dir, &[]);
    handles.iter().for_each(|h| check(h, "after"));
    let there = || mount.point("new", Path::new("FULL-1700003600-new.qcow2")).exists();
    process::eventually("the new names", there);
    handles.iter().for_each(|h| check(h, "after the mount has the new names"));
    for name in old.iter().map(|n| n.replace("-old", "-new")) {
        check(&(stamp(Path::new(&name)), open("new", &name)), "by the new name");
    }
}

#[test]
fn killed_at_any_step_no_point_is_lost() {
    if !have("killed_at_any_step_no_point_is_lost", &TOOLS) {
        return;
    }
    for r in [Renamed::folders(), Renamed::flat(), Renamed::called("sda", "vda")] {
        let mut crashes = 0;
        loop {
            let copy = r.copy();
            let status = Command::new(env!("CARGO_BIN_EXE_fleecefs"))
                .args(["-q", "link-disk", s(copy.path()), r.old, r.new])
                .env("FLEECEFS_CRASH_AT", (crashes + 1).to_string())
                .status()
                .unwrap();
            if status.success() {
                break;
            }
            assert_eq!(status.code(), None, "step {}", crashes + 1);
            crashes += 1;
            let what = format!("{}, killed at step {crashes}", r.old);
            r.check(copy.path(), &what);
            // Nothing is damaged, and whoever looks is told how to go on.
            let out = fleecefs(&["verify", s(copy.path())]);
            let said = String::from_utf8_lossy(&out.stdout);
            assert_eq!(out.status.code(), Some(0), "{what}: {said}");
            assert!(
                said.contains("the same 'fleecefs link-disk'") || crashes >= 18,
                "{what}: {said}"
            );
            // Whatever writes next finishes it, and so does the same command.
            let consolidate = ["consolidate", s(copy.path()), r.new, "--until", "latest"];
            let finishing: [&[&str]; 3] = [
                &["verify", "--create", s(copy.path())],
                &["prune", s(copy.path()), "--keep-last", "100"],
                &[&consolidate[..], &["--skip-check"]].concat(),
            ];
            if (3..18).contains(&crashes)
                && let Some(args) = finishing.get(crashes % 4)
            {
                let out = fleecefs(args);
                assert!(out.status.success(), "{what}: {args:?}: {out:?}");
                if args[0] == "consolidate" {
                    r.check_one(copy.path(), &what);
                    continue;
                }
            } else {
                r.must(copy.path(), &[]);
            }
            r.check_end(copy.path(), &what);
        }
        // Two journals; manifest and image of four points; a journal, four that go, its end; the ends of
        // the first two (which are one where the folder is).
        assert_eq!(crashes, if r.is_flat() { 18 } else { 19 }, "steps");
    }
}

#[test]
fn broken_off_and_worked_on_in_one_folder_alone_or_in_one_above() {
    if !have("broken_off_and_worked_on_in_one_folder_alone_or_in_one_above", &TOOLS) {
        return;
    }
    let r = Renamed::folders();
    let dir = r.dir.path();
    killed(&r, dir, "6");
    // From further up the disks have longer names.
    let above = images::tempdir();
    run("cp", &["-a", s(dir), s(&above.path().join("vm"))]);
    ok(&["prune", s(above.path()), "--keep-last", "100"]);
    r.check_end(&above.path().join("vm"), "from above");
    // Where only one of both is in sight nobody else has to wait for it; a chain is not altered.
    for disk in ["old", "new"] {
        let path = dir.join(disk);
        for (args, code) in
            [(&["commit", s(&path)][..], 12), (&["prune", s(&path), "--keep-last", "99"], 0)]
        {
            let out = fleecefs(args);
            let said = String::from_utf8_lossy(&out.stderr);
            assert!(said.contains("run the same 'fleecefs link-disk'"), "{args:?}: {said}");
            assert_eq!(out.status.code(), Some(code), "{args:?}: {said}");
        }
    }
    r.check(dir, "refused");
    // The owner of one folder has no say about another.
    let sly = r.copy();
    for keep in ["old", "new"] {
        let copy = r.copy();
        let other = if keep == "old" { "new" } else { "old" };
        std::fs::remove_file(copy.path().join(other).join(".fleecefs/link-disk.journal")).unwrap();
        let out = fleecefs(&["prune", s(copy.path()), "--keep-last", "100"]);
        assert_eq!(out.status.code(), Some(0), "{keep}: {out:?}");
        assert_eq!(files(&copy.path().join("old")).len(), 4, "{keep}");
    }
    std::fs::write(sly.path().join("new/.fleecefs/link-disk.journal"), "{").unwrap();
    let out = fleecefs(&["prune", s(sly.path()), "--keep-last", "100"]);
    assert_eq!(out.status.code(), Some(10), "{out:?}");
}

/// Finished from a folder further down than where it was begun.
#[test]
fn broken_off_above_it_is_finished_from_below() {
    if !have("broken_off_above_it_is_finished_from_below", &TOOLS) {
        return;
    }
    let r = Renamed::folders();
    // Also when all is done but for the journals.
    for (step, command) in [("6", "prune"), ("6", "link-disk"), ("18", "prune"), ("19", "prune")] {
        let above = images::tempdir();
        let dir = above.path().join("vm");
        run("cp", &["-a", s(r.dir.path()), s(&dir)]);
        let mut c = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
        c.args(["-q", "link-disk", s(above.path()), "vm/old", "vm/new"]);
        assert_eq!(c.env("FLEECEFS_CRASH_AT", step).status().unwrap().code(), None);
        assert_eq!(points_of_runs(&dir).len(), 8, "{step}");
        let out = match command {
            "prune" => ok(&["prune", s(&dir), "--keep-last", "100"]),
            _ => r.link(&dir, &[]),
        };
        let said = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(0), "{step} {command}: {said}");
        assert!(!said.contains("cannot be finished"), "{step} {command}: {said}");
        r.check_end(&dir, &format!("{step} {command}"));
        assert!(!dir.join("new/.fleecefs/link-disk.journal").exists(), "{step} {command}");
    }
}

/// A copy of hard links, in the same backup directory and elsewhere: each is finished by itself.
#[test]
fn broken_off_and_copied_by_hard_links_each_copy_is_whole() {
    if !have("broken_off_and_copied_by_hard_links_each_copy_is_whole", &TOOLS) {
        return;
    }
    let r = Renamed::folders();
    for step in ["4", "11", "15", "18", "19"] {
        let above = images::tempdir();
        let (dir, copy) = (above.path().join("vm"), above.path().join("copy"));
        run("cp", &["-a", s(r.dir.path()), s(&dir)]);
        killed(&r, &dir, step);
        run("cp", &["-al", s(&dir), s(&copy)]);
        let out = ok(&["prune", s(above.path()), "--keep-last", "100"]);
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(!said.contains("cannot be finished"), "{step}: {said}");
        let elsewhere = images::tempdir();
        std::fs::rename(&copy, elsewhere.path().join("copy")).unwrap();
        for place in [dir, elsewhere.path().join("copy")] {
            r.check(&place, step);
            r.check_one(&place, step);
            assert_eq!(points_of_runs(&place).len(), 8, "{step}");
            assert_eq!(files(&place.join("new")).len(), 8, "{step}");
            assert!(!place.join("new/.fleecefs/link-disk.journal").exists(), "{step}");
        }
    }
    // Whoever removed the new names has the old ones left, whatever other names the files have.
    let above = images::tempdir();
    let (dir, copy) = (above.path().join("vm"), above.path().join("copy"));
    run("cp", &["-a", s(r.dir.path()), s(&dir)]);
    killed(&r, &dir, "12");
    run("cp", &["-al", s(&dir), s(&copy)]);
    for file in files(&dir.join("new")).iter().filter(|f| f.contains("-17000")) {
        std::fs::remove_file(dir.join("new").join(file)).unwrap();
    }
    ok(&["prune", s(&dir), "--keep-last", "100"]);
    r.check(&dir, "the new names removed");
    r.check(&copy, "the copy");
}

/// Journals that nobody can finish cost one look at the directory, however many.
#[test]
fn many_forged_journals_are_counted_and_cost_one_scan() {
    if !have("many_forged_journals_are_counted_and_cost_one_scan", &TOOLS) {
        return;
    }
    let r = Renamed::folders();
    let journal = serde_json::json!({"old": "x/y", "new": "z/w", "arriving": []}).to_string();
    for i in 0..300 {
        let side = r.dir.path().join(format!("d{i}/.fleecefs"));
        std::fs::create_dir_all(&side).unwrap();
        std::fs::write(side.join("link-disk.journal"), &journal).unwrap();
    }
    let out = ok(&["prune", s(r.dir.path()), "--keep-last", "100"]);
    let said = String::from_utf8_lossy(&out.stderr);
    assert_eq!(said.matches("cannot be finished").count(), 10, "{said}");
    assert!(said.contains("290 more journals"), "{said}");
    r.check(r.dir.path(), "forged journals");
    // One that no link-disk writes is damaged, and not read whole.
    let large = r.dir.path().join("d0/.fleecefs/link-disk.journal");
    std::fs::File::create(large).unwrap().set_len(5 << 20).unwrap();
    let list = ok(&["list", s(r.dir.path()), "--json"]);
    assert!(String::from_utf8_lossy(&list.stdout).contains("d0/.fleecefs/link-disk.journal"));
}

#[test]
fn broken_off_and_the_new_names_removed_the_old_ones_stay() {
    if !have("broken_off_and_the_new_names_removed_the_old_ones_stay", &TOOLS) {
        return;
    }
    let r = Renamed::called("aaa", "bbb");
    // From when all are there twice.
    for step in ["11", "12"] {
        let copy = r.copy();
        killed(&r, copy.path(), step);
        let new = copy.path().join("bbb");
        for file in files(&new).iter().filter(|f| f.contains("-17000")) {
            std::fs::remove_file(new.join(file)).unwrap();
        }
        let out = fleecefs(&["verify", s(copy.path())]);
        assert_ne!(out.status.code(), Some(0), "step {step}: images are missing: {out:?}");
        ok(&["prune", s(copy.path()), "--keep-last", "99"]);
        r.check_end(copy.path(), &format!("step {step}"));
    }
}

/// The points of all runs.
fn points_of_runs(dir: &Path) -> Vec<String> {
    let out = ok(&["list", "--runs", "--json", s(dir)]);
    let runs: Value = serde_json::from_slice(&out.stdout).unwrap();
    let points =
        runs["runs"].as_array().unwrap().iter().flat_map(|r| r["points"].as_array().unwrap());
    points.map(|p| p["point"].as_str().unwrap().to_string()).collect()
}

/// A run has each disk once, also while its points have two names.
#[test]
fn broken_off_each_run_has_each_point_once() {
    if !have("broken_off_each_run_has_each_point_once", &TOOLS) {
        return;
    }
    let r = Renamed::folders();
    let before = points_of_runs(r.dir.path());
    assert_eq!(before.len(), 8);
    for step in ["4", "7", "11", "13"] {
        let copy = r.copy();
        killed(&r, copy.path(), step);
        let now = points_of_runs(copy.path());
        assert_eq!(now.len(), 8, "step {step}: {now:?}");
    }
}

#[test]
fn what_is_no_file_stays_and_is_told() {
    if !have("what_is_no_file_stays_and_is_told", &TOOLS) {
        return;
    }
    let r = Renamed::folders();
    let old = r.dir.path().join("old");
    run("mkfifo", &[s(&old.join("INC-1700018000-old.qcow2"))]);
    std::fs::create_dir(old.join("INC-1700021600-old.qcow2")).unwrap();
    let out = r.link(r.dir.path(), &[]);
    let said = String::from_utf8_lossy(&out.stdout);
    assert_eq!(out.status.code(), Some(16), "{out:?}");
    for name in ["INC-1700018000-old.qcow2", "INC-1700021600-old.qcow2"] {
        assert!(said.contains(&format!("{name}: not a plain file")), "{said}");
        assert!(old.join(name).exists());
    }
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(said.contains("2 images of 'old' not joined"), "{said}");
    r.check(r.dir.path(), "what is left stays");
    // It is told until it is seen to.
    for more in [&[][..], &["--dry-run"], &[]] {
        let out = r.link(r.dir.path(), more);
        let said = String::from_utf8_lossy(&out.stdout);
        assert!(said.contains("INC-1700018000-old.qcow2: not a plain file"), "{more:?}: {said}");
        assert_eq!(out.status.code(), Some(if more.is_empty() { 16 } else { 0 }), "{more:?}");
    }
    std::fs::remove_file(old.join("INC-1700018000-old.qcow2")).unwrap();
    std::fs::remove_dir(old.join("INC-1700021600-old.qcow2")).unwrap();
    r.must(r.dir.path(), &[]);
    r.check_end(r.dir.path(), "done");
}

/// What cannot be read is known by its name.
#[test]
fn broken_off_with_a_damaged_point_it_goes_on() {
    if !have("broken_off_with_a_damaged_point_it_goes_on", &TOOLS) {
        return;
    }
    let r = Renamed::folders();
    let dir = r.dir.path();
    let damaged = files(&dir.join("old")).pop().unwrap();
    let file = std::fs::File::options().write(true).open(dir.join("old").join(damaged)).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[7; 512], 0).unwrap();
    for step in ["4", "9"] {
        let mut c = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
        c.args(["-q", "link-disk", s(dir), "old", "new"]).env("FLEECEFS_CRASH_AT", step);
        assert_eq!(c.status().unwrap().code(), None);
    }
    r.must(dir, &[]);
    assert!(!dir.join("old").exists());
    assert_eq!(files(&dir.join("new")).len(), 8);
}

/// It is refused with this code and these words, and changes nothing.
fn refused(r: &Renamed, more: &[&str], code: i32, words: &str) {
    let before = ok(&["list", s(r.dir.path()), "--json"]).stdout;
    for dry in [true, false] {
        let dry_run: &[&str] = if dry { &["--dry-run"] } else { &[] };
        let out = r.link(r.dir.path(), &[dry_run, more].concat());
        let said = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(code), "{words}: {said}");
        assert!(said.contains(words), "{said}");
    }
    assert_eq!(before, ok(&["list", s(r.dir.path()), "--json"]).stdout, "{words}");
}

#[test]
fn what_is_not_one_disks_history_is_refused() {
    if !have("what_is_not_one_disks_history_is_refused", &TOOLS) {
        return;
    }
    let r = Renamed::folders();
    let swapped = Renamed { old: "new", new: "old", ..Renamed::folders() };
    refused(&swapped, &[], 2, "swap the two names");
    refused(&Renamed { old: "new", ..Renamed::folders() }, &[], 2, "the same disk");
    refused(&Renamed { old: "none", ..Renamed::folders() }, &[], 3, "no disk 'none'");
    refused(&Renamed { new: "none", ..Renamed::folders() }, &[], 3, "no disk 'none'");

    // Both were backed up at the same time.
    let both = Renamed::folders();
    let dir = both.dir.path();
    let last = dir.join("old/FULL-1701007201-old.qcow2");
    std::fs::copy(dir.join("old/FULL-1700003600-old.qcow2"), last).unwrap();
    refused(&both, &[], 2, "of the same time");

    // Another file has the name.
    let taken = Renamed::folders();
    let dir = taken.dir.path();
    let to = dir.join("new/FULL-1700003600-new.qcow2");
    std::fs::copy(dir.join("new/FULL-1701003600-new.qcow2"), &to).unwrap();
    std::fs::rename(&to, dir.join("new/COPY-1699990000-new.qcow2")).unwrap();
    let copy = dir.join("old/COPY-1699990000-old.qcow2");
    std::fs::copy(dir.join("old/FULL-1700003600-old.qcow2"), &copy).unwrap();
    let out = taken.link(dir, &[]);
    assert!([2, 4].contains(&out.status.code().unwrap()), "{out:?}");

    // A header names the old name.
    let linked = Renamed::folders();
    ok(&["rebase", s(&linked.dir.path().join("old"))]);
    refused(&linked, &[], 11, "rebased");

    // Of another VM.
    let vms = Renamed::folders();
    for (disk, uuid) in [("old", "1"), ("new", "2")] {
        let dir = vms.dir.path().join(disk);
        for file in files(&dir) {
            let m = manifest::read(&dir, file.as_ref()).unwrap().unwrap();
            let vm = serde_json::json!({"query-uuid": {"UUID": format!("{uuid}1111111-1111-4111-8111-111111111111")}});
            manifest::write(&dir, &manifest::Manifest { vm: vm.into(), ..m }).unwrap();
        }
    }
    refused(&vms, &[], 2, "another VM");
    vms.must(vms.dir.path(), &["--other-vm"]);
    vms.check_end(vms.dir.path(), "--other-vm");

    // A run had both; then, other sizes, and other devices.
    let change = |r: &Renamed, disk: &str, change: &dyn Fn(&mut manifest::Manifest)| {
        let dir = r.dir.path().join(disk);
        for file in files(&dir) {
            let mut m = manifest::read(&dir, file.as_ref()).unwrap().unwrap();
            change(&mut m);
            manifest::write(&dir, &m).unwrap();
        }
    };
    let together = Renamed::folders();
    change(&together, "new", &|m| m.run = m.run.replace("-new", ""));
    refused(&together, &[], 2, "in one run");
    refused(&together, &["--force"], 2, "in one run");
    let devices = Renamed::folders();
    change(&devices, "old", &|m| m.disk.qdev = "v1".into());
    change(&devices, "new", &|m| m.disk.qdev = "v2".into());
    refused(&devices, &[], 2, "(v1, v2)");
    devices.must(devices.dir.path(), &["--force"]);
    devices.check_end(devices.dir.path(), "--force");

    // Somebody writes there.
    let side = r.dir.path().join(".fleecefs");
    std::fs::create_dir_all(&side).unwrap();
    let lock = std::fs::File::create(side.join("lock")).unwrap();
    lock.lock().unwrap();
    let out = r.link(r.dir.path(), &[]);
    assert_eq!(out.status.code(), Some(6), "{out:?}");
}

#[test]
fn a_gap_stays_known_and_what_has_no_manifest_comes_along() {
    if !have("a_gap_stays_known_and_what_has_no_manifest_comes_along", &TOOLS) {
        return;
    }
    let r = Renamed::folders();
    let dir = r.dir.path();
    std::fs::remove_file(dir.join("old/INC-1700007200-old.qcow2")).unwrap();
    manifest::remove(&dir.join("old"), "INC-1700014400-old.qcow2".as_ref()).unwrap();
    r.must(dir, &[]);
    let list: Value = serde_json::from_slice(&ok(&["list", s(dir), "--json"]).stdout).unwrap();
    let disks = list["disks"].as_array().unwrap();
    assert_eq!(disks.len(), 1, "{list:#}");
    let (catalog, _) = scan(dir, &ScanOptions::default(), None).unwrap();
    let served = |t: i64| catalog.disks[0].points.iter().find(|p| p.time == t).unwrap().is_served();
    assert!(served(1_700_003_600) && !served(1_700_010_800) && !served(1_700_014_400));
    assert!(served(1_701_014_400));
    assert!(!dir.join("old").exists());
}

#[test]
fn the_next_inc_goes_on_under_the_new_name() {
    let tools = ["qemu-storage-daemon", "qemu-img", "qemu-io"];
    if !have("the_next_inc_goes_on_under_the_new_name", &tools) {
        return;
    }
    let d = checked::daemon(&[]);
    let caller = Caller::of(&d);
    let config = d.path("vm.xml");
    std::fs::write(&config, "<secret/>").unwrap();
    let config = ["--config", s(&config)];
    let old = caller.with(&["--name", "a=old"]).with(&config);
    let new = caller.with(&["--name", "a=new"]);
    let mut truth: Vec<(i64, Vec<u8>)> = Vec::new();
    for (caller, wish, op) in [
        (&old, "full", "write -P 7 0 64k"),
        (&old, "inc", "write -P 8 1M 64k"),
        (&new, "auto", "write -P 9 2M 64k"),
        (&new, "inc", "write -P 10 3M 64k"),
    ] {
        d.io("a", &[op]);
        let (_, views) = caller.held(wish);
        let disk = if caller.more.contains(&"a=old".to_string()) { "old" } else { "new" };
        let time = stamp(&newest(&caller.target, disk));
        truth.push((time, views[0].1.clone()));
        // A point's time may be some seconds ahead, where several are made in one.
        while fleecefs::backup::now() <= time {
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
    }
    ok(&["link-disk", s(&caller.target), "old", "new"]);
    assert!(!caller.target.join("old").exists());
    let kept = std::fs::read_dir(caller.target.join("new/.fleecefs")).unwrap();
    let kept =
        kept.filter(|e| e.as_ref().unwrap().file_name().to_str().unwrap().contains("vm.xml"));
    assert_eq!(kept.count(), 2, "copies of the configuration");
    // Whatever the user calls it: the disk is known by its points.
    for (caller, op) in [(&new, "write -P 11 4M 64k"), (&caller, "write -P 12 5M 64k")] {
        d.io("a", &[op]);
        let (_, views) = caller.held("inc");
        assert_eq!(level(caller, "new"), "INC");
        truth.push((stamp(&newest(&caller.target, "new")), views[0].1.clone()));
    }
    let mount = Mount::new(&caller.target);
    let images = backup::images(&caller.target.join("new"));
    assert_eq!(images.len(), truth.len());
    for (image, (time, view)) in images.iter().zip(&truth) {
        assert_eq!(stamp(image), *time);
        same(&mount, "new", image, view);
    }
    drop(mount);
    // The old chain goes by the rules for one disk; its configuration goes with it.
    ok(&["prune", s(&caller.target), "--keep-last", "2"]);
    let left = backup::images(&caller.target.join("new"));
    assert_eq!(left.len(), 4);
}
