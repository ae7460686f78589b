//! What belongs together: the runs of a backup directory as they are listed, shown and restored.

use std::path::Path;
use std::process::Command;

use crate::support::backup;
use crate::support::images::{self, first_difference};
use crate::support::qemu::two_disks::Machine;
use crate::support::tools::{have, run};
use crate::support::tree;
use fleecefs::manifest;
use serde_json::Value;

const QEMU: &[&str] = &["qemu-system-x86_64", "qemu-img", "qemu-io"];

fn fleecefs(args: &[&str]) -> (Option<i32>, String) {
    let out = Command::new(env!("CARGO_BIN_EXE_fleecefs")).args(args).output().unwrap();
    let text = [out.stdout, out.stderr].concat();
    (out.status.code(), String::from_utf8_lossy(&text).into_owned())
}

fn must(args: &[&str]) -> String {
    let (exit, said) = fleecefs(args);
    assert_eq!(exit, Some(0), "{args:?}: {said}");
    said
}

fn parsed(args: &[&str]) -> Value {
    serde_json::from_str(&must(&[args, &["--json"]].concat())).unwrap()
}

/// The bytes of a qcow2 image, by QEMU.
fn bytes(image: &Path) -> Vec<u8> {
    let raw = image.with_extension("bytes");
    let (from, to) = (image.to_str().unwrap(), raw.to_str().unwrap());
    run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", from, to]);
    std::fs::read(raw).unwrap()
}

#[test]
fn points_of_another_program_are_of_the_vm_whose_disk_they_are_of() {
    if !have("points_of_another_program_are_of_the_vm_whose_disk_they_are_of", QEMU) {
        return;
    }
    let mut m = Machine::begin();
    let caller = m.caller();
    let target = caller.target.to_str().unwrap().to_string();
    caller.must("full");
    m.write(0, 0, 1 << 20);
    caller.must("inc");
    let all = || parsed(&["list", "--runs", &target])["runs"].as_array().unwrap().clone();
    // The VM has a name, as most have.
    for run in all() {
        for p in run["points"].as_array().unwrap() {
            let folder = caller.target.join(p["disk"].as_str().unwrap()).join(".fleecefs");
            let path = folder.join(format!("{}.json", p["point"].as_str().unwrap()));
            let mut m: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
            m["vm"] = serde_json::json!({"query-name": {"name": "vm1"}});
            m.as_object_mut().unwrap().remove("checksum");
            std::fs::write(&path, m.to_string()).unwrap();
        }
    }
    // As qmpbackup leaves it in the same folder, from before.
    let disk = caller.target.join(all()[1]["points"][0]["disk"].as_str().unwrap());
    let names = backup::images(&disk).into_iter();
    let mut names = names.map(|p| p.file_name().unwrap().to_str().unwrap().to_string());
    let full = names.find(|n| n.starts_with("FULL-")).unwrap();
    let old = full.replacen(full.split('-').nth(1).unwrap(), "1700000000", 1);
    std::fs::copy(disk.join(&full), disk.join(&old)).unwrap();
    let runs = all();
    assert_eq!(runs.len(), 3);
    assert!(runs.iter().all(|r| r["vm"] == "vm1"), "{runs:?}");
    // The newest run is one, and not one more of what was there before.
    let to = m.text("restored");
    let plans = must(&["restore", &target, "--run", "latest", "--to", &to, "-n", "--json"]);
    let points: Vec<Value> =
        plans.lines().map(|l| serde_json::from_str::<Value>(l).unwrap()["point"].take()).collect();
    assert!(!points.contains(&old.clone().into()), "{points:?}");
    assert_eq!(points.len(), runs[0]["points"].as_array().unwrap().len());
    // It is found by its own time.
    let plan = must(&["restore", &target, "--run", "1700000000", "--to", &to, "-n", "--json"]);
    let plans: Vec<&str> = plan.lines().filter(|l| l.starts_with('{')).collect();
    assert!(plans.len() == 1 && plans[0].contains(&old), "{plan}");
}

#[test]
fn a_run_is_listed_shown_and_restored_as_the_vm_knows_it() {
    if !have("a_run_is_listed_shown_and_restored_as_the_vm_knows_it", QEMU) {
        return;
    }
    let mut m = Machine::begin();
    let config = m.text("vm.xml");
    std::fs::write(&config, "<domain/>\n").unwrap();
    let caller = m.caller().with(&["--config", &config, "--exclude", "b"]);
    let target = caller.target.to_str().unwrap();
    caller.must("full");
    let first = m.expect.clone();
    m.write(0, 0, 1 << 20);
    caller.must("inc");

    let runs = parsed(&["list", "--runs", target])["runs"].take();
    let levels = |run: &Value| -> Vec<String> {
        let points = run["points"].as_array().unwrap().iter();
        points
            .map(|p| format!("{} {}", p["disk"].as_str().unwrap(), p["level"].as_str().unwrap()))
            .collect()
    };
    assert_eq!(runs.as_array().unwrap().len(), 2, "{runs}");
    assert_eq!(levels(&runs[0]), ["a.qcow2 inc", "o.qcow2 inc"], "the newest first");
    assert_eq!(levels(&runs[1]), ["a.qcow2 full", "o.qcow2 full"]);
    let text = must(&["list", "--runs", target]);
    assert!(text.contains("a.qcow2 INC, o.qcow2 INC"), "{text}");

    // By all its names, the same.
    let (id, time) = (runs[1]["run"].as_str().unwrap(), seconds(&runs[1]["time"]).to_string());
    let utc = runs[1]["time"].as_str().unwrap();
    for (n, name) in [id, &time, utc].into_iter().enumerate() {
        let to = m.text(&format!("first{n}"));
        must(&["restore", target, "--run", name, "--to", &to]);
        for (disk, want) in [("a.qcow2", &first[0]), ("o.qcow2", &first[1])] {
            let got = bytes(&Path::new(&to).join(disk));
            assert_eq!(first_difference(&got, want), None, "{name}: {disk}");
        }
    }
    let day = runs[0]["time"].as_str().unwrap()[..10].to_string();
    for name in ["latest", &day] {
        let to = m.text(&format!("latest-{name}"));
        must(&["restore", target, "--run", name, "--to", &to]);
        assert_eq!(first_difference(&bytes(&Path::new(&to).join("a.qcow2")), &m.expect[0]), None);
    }
    assert_eq!(fleecefs(&["restore", target, "--run", "1999-01-01", "--to", "/x"]).0, Some(3));
    // In another format under another name.
    let to = m.text("raw");
    must(&["restore", target, "--run", "latest", "--to", &to, "--format", "raw"]);
    assert!(std::fs::read(Path::new(&to).join("a.qcow2.raw")).unwrap() == m.expect[0]);

    let text = must(&["show", target, "a.qcow2/latest"]);
    for part in ["disk file", "a.qcow2", "vm.xml", "parent", "FULL-", "blake3"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert_eq!(must(&["show", target, "a.qcow2/latest", "--config", "vm.xml"]), "<domain/>\n");
    let (exit, said) = fleecefs(&["show", target, "a.qcow2/latest", "--config", "other"]);
    assert!(exit == Some(3) && said.contains("vm.xml"), "{said}");
    let point = parsed(&["show", target, "a.qcow2/latest"]);
    assert_eq!((&point["depth"], &point["manifest"]["run"]), (&2.into(), &runs[0]["run"]));

    // A later run of one disk takes nothing from the run before it.
    m.caller().with(&["--exclude", "b", "--include", "a"]).must("inc");
    must(&["list", target, "--strict"]);
    must(&["verify", target]);
    let newest = std::fs::read_dir(caller.target.join("a.qcow2")).unwrap();
    let newest = newest.map(|e| e.unwrap().file_name().into_string().unwrap());
    let newest = newest.filter(|n| n.starts_with("INC-")).max().unwrap();
    std::fs::remove_file(caller.target.join("a.qcow2").join(&newest)).unwrap();
    manifest::remove(&caller.target.join("a.qcow2"), newest.as_ref()).unwrap();
    // An image that is gone with its manifest is told by the run's other disks.
    must(&["list", target, "--strict"]);
    must(&["verify", target]);
    let image = runs[0]["points"][1]["point"].as_str().unwrap();
    let folder = caller.target.join("o.qcow2");
    std::fs::remove_file(folder.join(image)).unwrap();
    manifest::remove(&folder, image.as_ref()).unwrap();
    for command in [&["list", target, "--strict"][..], &["verify", target]] {
        let (exit, said) = fleecefs(command);
        assert!(exit.is_some_and(|e| e != 0) && said.contains(image), "{command:?}: {said}");
    }
    assert!(must(&["list", target]).contains(&format!("missing {image} of disk o")));
    let text = must(&["list", "--runs", target]);
    assert!(text.contains("partial: without o"), "{text}");
    // The run before has all that it made; of one disk's points nothing is told about the other.
    assert_eq!(text.matches("partial: without").count(), 1, "{text}");
    assert!(!must(&["list", "--runs", target, "--disk", "a.qcow2"]).contains("partial"));
    let to = m.text("incomplete");
    let (exit, said) = fleecefs(&["restore", target, "--run", "latest", "--to", &to]);
    assert!(exit == Some(16) && said.contains(&format!("image {image} of this run")), "{said}");
    assert_eq!(first_difference(&bytes(&Path::new(&to).join("a.qcow2")), &m.expect[0]), None);
}

/// A time of JSON in seconds since 1970.
fn seconds(time: &Value) -> i64 {
    fleecefs::units::parse_when(time.as_str().unwrap()).unwrap()
}

/// Of two runs in a second the one that was made later is the newest, whatever its id.
#[test]
fn runs_of_one_second_are_ordered_and_told_apart() {
    let dir = images::tempdir();
    let root = dir.path().to_str().unwrap();
    let time = 1_700_000_000;
    // The first has a disk and the second another one; then both in one second, so that the name of one
    // has the next.
    let points = [
        ("a", time, "ffffffffffff", 1),
        ("b", time, "000000000000", 2),
        ("a", time + 1, "eeeeeeeeeeee", 3),
        ("c", time, "eeeeeeeeeeee", 3),
    ];
    for (disk, stamp, id, nanos) in points {
        let folder = dir.path().join(disk);
        std::fs::create_dir_all(&folder).unwrap();
        let image = format!("FULL-{stamp}-{disk}.raw");
        std::fs::write(folder.join(&image), vec![1; 4096]).unwrap();
        must(&["verify", "--create", "--point", &format!("{disk}/{image}"), root]);
        let mut m = manifest::read(&folder, image.as_ref()).unwrap().unwrap();
        (m.run, m.time, m.time_nanos) = (id.into(), time, nanos);
        m.vm = serde_json::json!({"query-name": {"name": "vm"}}).into();
        manifest::write(&folder, &m).unwrap();
    }
    let runs = parsed(&["list", "--runs", root])["runs"].take();
    let ids: Vec<&str> =
        runs.as_array().unwrap().iter().map(|r| r["run"].as_str().unwrap()).collect();
    assert_eq!(ids, ["eeeeeeeeeeee", "000000000000", "ffffffffffff"], "{runs:#}");
    assert_eq!(seconds(&runs[0]["time"]), time + 1);
    // A time that fits several names them.
    for name in
        [time.to_string(), "2023-11-14T22:13:20Z".into(), "2023-11-14T23:13:20+01:00".into()]
    {
        let (exit, said) = fleecefs(&["restore", root, "--run", &name, "--to", "/x", "-n"]);
        assert_eq!(exit, Some(2), "{said}");
        assert!(ids.iter().all(|id| said.contains(id)), "{said}");
    }
    let to = images::tempdir();
    let restored = |name: &str| {
        let to = to.path().join(name);
        must(&["restore", root, "--run", name, "--to", to.to_str().unwrap()]);
        let mut names: Vec<_> =
            std::fs::read_dir(&to).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names
    };
    for newest in ["latest", "2023-11-14", "2023-11-14 22:13", "@1700000001", "eeeeeeeeeeee"] {
        assert_eq!(restored(newest), ["a.raw", "c.raw"], "{newest}");
    }
    assert_eq!(restored("ffffffffffff"), ["a.raw"]);
}

#[test]
fn a_list_is_of_what_was_asked_for() {
    let dir = images::tempdir();
    let root = dir.path().to_str().unwrap();
    for (disk, times) in
        [("vm/sda", &[1_700_000_000, 1_700_000_100][..]), ("sdb", &[1_700_000_000])]
    {
        let folder = dir.path().join(disk);
        std::fs::create_dir_all(&folder).unwrap();
        let name = disk.rsplit('/').next().unwrap();
        for time in times {
            std::fs::write(folder.join(format!("FULL-{time}-{name}.raw")), vec![1; 4096]).unwrap();
        }
    }
    let points = |more: &[&str]| -> Vec<String> {
        let all = parsed(&[&["list", root], more].concat());
        let disks = all["disks"].as_array().unwrap().iter();
        let points = disks.flat_map(|d| d["points"].as_array().unwrap());
        points.map(|p| p["point"].as_str().unwrap().to_string()).collect()
    };
    assert_eq!(points(&[]).len(), 3);
    assert_eq!(points(&["--disk", "sda"]).len(), 2);
    assert_eq!(
        points(&["--disk", "vm/sda", "--since", "@1700000001"]),
        ["FULL-1700000100-sda.raw"]
    );
    assert_eq!(points(&["--until", "2023-11-14T22:13:20Z"]).len(), 2);
    assert_eq!(fleecefs(&["list", root, "--disk", "sdc"]).0, Some(3));
    // Without manifests time says what belongs together, guest by guest.
    let runs = parsed(&["list", "--runs", root])["runs"].take();
    assert_eq!(runs.as_array().unwrap().len(), 3, "{runs}");
}

/// Writes a disk's FULL or INC of a run that made these images, with its manifest.
fn point_of(b: &tree::Backups, image: &str, run: (&str, i64), vm: &Value, made: &[&str]) {
    point_in(b, "", image, run, vm, made);
}

/// The same in a folder of the backup directory.
fn point_in(
    b: &tree::Backups,
    folder: &str,
    image: &str,
    (run, time): (&str, i64),
    vm: &Value,
    made: &[&str],
) {
    let disk = format!("{folder}{}", image.rsplit('-').next().unwrap());
    if !image.starts_with("lost/") {
        b.image(&format!("{disk}/{image}"), None);
    }
    let image = image.trim_start_matches("lost/");
    let made = made.iter().map(|i| serde_json::json!({"disk": i.rsplit('-').next(), "image": i}));
    let level = if image.starts_with("FULL") { "full" } else { "inc" };
    let m = serde_json::json!({
        "format_version": manifest::FORMAT_VERSION, "run": run, "image": image, "level": level, "time": time,
        "format": "qcow2", "content": if level == "full" { "full" } else { "dirty-only" },
        "virtual_size": 0, "file_size": 0, "vm": vm, "run_images": made.collect::<Vec<_>>(),
        "parent": (level == "inc").then(|| format!("FULL-100-{}", image.rsplit('-').next().unwrap())),
    });
    let m = manifest::parse(m.to_string().as_bytes()).unwrap();
    manifest::write(&b.path(&disk), &m).unwrap();
}

/// What `list` says about the newest runs.
fn gaps(b: &tree::Backups) -> Vec<String> {
    let (_, said) = fleecefs(&["list", b.root().to_str().unwrap()]);
    said.lines().filter(|l| l.contains("is incomplete: missing")).map(str::to_string).collect()
}

/// The time in a name is later than that of each before, whatever the clock did.
#[test]
fn the_newest_run_is_the_one_with_the_latest_names() {
    let b = tree::Backups::new();
    let vm = serde_json::json!({"query-name": {"name": "web"}});
    point_of(&b, "FULL-100-a", ("r1", 1000), &vm, &[]);
    point_of(&b, "FULL-100-b", ("r1", 1000), &vm, &[]);
    point_of(&b, "INC-200-a", ("r2", 500), &vm, &["INC-200-a", "INC-200-b"]);
    let told = gaps(&b);
    assert!(told.len() == 1 && told[0].contains("missing INC-200-b of disk b"), "{told:?}");
    // An image that is there lacks its manifest, which says that it is of this run.
    b.image("b/INC-200-b", None);
    let told = gaps(&b);
    assert!(told.len() == 1 && told[0].contains("missing the manifest of INC-200-b"), "{told:?}");
    assert!(told[0].contains("restore the missing manifest"), "{told:?}");
    let root = b.root().to_str().unwrap();
    let older = "name an older run: r1 of 1970-01-01T00:01:40Z has all disks";
    let (exit, said) = fleecefs(&["config", root]);
    assert!(exit == Some(12) && said.contains(older), "{said}");
    assert!(said.contains("the manifest of image INC-200-b of this run is missing"), "{said}");
    // By its time it is restored all the same.
    let to = tempfile::tempdir().unwrap();
    let to = to.path().join("vm").display().to_string();
    let (_, said) = fleecefs(&["restore", root, "--run", "latest", "--to", &to, "-n"]);
    assert!(!said.contains("not restored: the manifest"), "{said}");
    assert!(said.contains("of image INC-200-b of this run is missing: it is restored"), "{said}");
    std::fs::remove_file(b.path("b/INC-200-b")).unwrap();
    let (exit, said) = fleecefs(&["config", root]);
    assert!(exit == Some(12) && said.contains(older), "{said}");
    assert!(said.contains("fleecefs: image INC-200-b of this run is missing"), "{said}");
    assert!(fleecefs(&["config", root, "r1"]).1.contains("FULL-100-b"));
    // What has a manifest left is told as a finding of its disk, and once.
    point_of(&b, "lost/INC-200-b", ("r2", 500), &vm, &[]);
    assert!(gaps(&b).is_empty());
    assert!(b.findings().iter().any(|f| f.path.ends_with("INC-200-b")));
}

#[test]
fn vms_of_one_name_have_runs_of_their_own_and_what_was_recorded_later_is_of_none() {
    let b = tree::Backups::new();
    let vm = |n: u32| serde_json::json!({"query-name": {"name": "web"}, "query-uuid": {"UUID": format!("{n:08}-0000")}});
    point_of(&b, "FULL-100-a", ("r1", 100), &vm(1), &["FULL-100-a", "FULL-100-b"]);
    point_of(&b, "FULL-200-c", ("r2", 200), &vm(2), &["FULL-200-c"]);
    assert_eq!(gaps(&b).len(), 1);
    let b = tree::Backups::new();
    point_of(&b, "FULL-100-a", ("", 100), &vm(1), &["FULL-100-a", "FULL-100-b"]);
    assert!(gaps(&b).is_empty());
}

/// Backups of one second have images of one name, each in its VM's folder.
#[test]
fn a_lost_image_is_that_of_one_vm_and_of_no_other() {
    let b = tree::Backups::new();
    for (vm, run) in [("vm1", "r1"), ("vm2", "r2"), ("vm3", "r3"), ("vm4", "r4")] {
        let about = serde_json::json!({"query-name": {"name": vm}});
        let (folder, made) = (format!("{vm}/"), ["FULL-100-a", "FULL-100-b"]);
        // Those of 0.1.0 do not name each other.
        let made = if vm == "vm4" { &[] } else { &made[..] };
        point_in(&b, &folder, "FULL-50-b", (&format!("old-{run}"), 50), &about, &["FULL-50-b"]);
        point_in(&b, &folder, "FULL-100-a", (run, 100), &about, made);
        // Of the first nothing is left of it, of the second and the last its manifest, and the third is whole.
        match vm {
            "vm1" => {}
            "vm2" | "vm4" => point_in(&b, &folder, "lost/FULL-100-b", (run, 100), &about, made),
            _ => point_in(&b, &folder, "FULL-100-b", (run, 100), &about, made),
        }
    }
    let root = b.root().to_str().unwrap();
    let to = images::tempdir();
    let to = to.path().join("to");
    let (exit, said) =
        fleecefs(&["restore", root, "--run", "latest", "--to", to.to_str().unwrap(), "-n"]);
    let lost = |vm: &str| format!("disk {vm}/b: not restored: image FULL-100-b of this run");
    assert!(["vm1", "vm2", "vm4"].iter().all(|vm| said.contains(&lost(vm))), "{said}");
    assert!(exit == Some(16) && said.contains("3 of 8 disks not restored"), "{exit:?}: {said}");
    assert_eq!(said.matches("not restored: image FULL").count(), 3, "{said}");
    // That of which a manifest is left is told by its disk, and the other as a gap of its VM's run.
    let told = gaps(&b);
    assert!(told.len() == 1 && told[0].contains("missing FULL-100-b of disk vm1/b"), "{told:?}");
    assert!(b.findings().iter().any(|f| f.path.ends_with("vm2/b/FULL-100-b")));
    // What is asked for one VM is about that one.
    let config = fleecefs(&["config", b.path("vm3").to_str().unwrap(), "--json"]);
    assert_eq!(config.0, Some(0), "{}", config.1);
    let (exit, said) = fleecefs(&["config", b.path("vm2").to_str().unwrap()]);
    assert!(exit == Some(12) && said.contains("FULL-100-b of this run is missing"), "{said}");
}

/// The paths of all that is in a folder.
fn below(folder: &Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path());
    let mut all: Vec<_> = entries
        .flat_map(|p| if p.is_dir() { [vec![p.clone()], below(&p)].concat() } else { vec![p] })
        .collect();
    all.sort();
    all
}

#[test]
fn what_is_refused_has_made_no_folder() {
    use std::os::unix::fs::PermissionsExt;
    let (b, dir, state) = (tree::Backups::new(), images::tempdir(), images::tempdir());
    b.image("vm/a/FULL-100-a", None);
    let (root, at) = (b.root().to_str().unwrap(), |name: &str| {
        dir.path().join(name).to_str().unwrap().to_string()
    });
    let (new, absent, shared) = (at("new"), at("absent"), at("shared/new"));
    let scratch = |path: &str| format!("--writable={path}");
    std::fs::create_dir_all(dir.path().join("shared")).unwrap();
    std::fs::create_dir_all(dir.path().join("mountpoint")).unwrap();
    // In it others could put something else in the place of what is made there.
    let open = std::fs::Permissions::from_mode(0o777);
    std::fs::set_permissions(dir.path().join("shared"), open).unwrap();
    let before = below(dir.path());
    let (writable, unsafe_one) = (scratch(&new), scratch(&shared));
    let refused: &[&[&str]] = &[
        &["live-restore", root, "1999-01-01", "--to", &new],
        &["live-restore", root, "--to", &shared],
        &["restore", root, "--run", "1999-01-01", "--to", &new],
        &["boot", root, "1999-01-01", "--check", "--out", &new],
        &[
            "boot",
            root,
            "--check",
            "--out",
            &new,
            "--firmware",
            &absent,
            "--firmware-vars",
            &absent,
        ],
        &["attach", root, "a/FULL-200-a", "--mount", &new],
        &["mount", &writable, root, &absent],
        &["mount", &unsafe_one, root, &at("mountpoint")],
        &["replicate", &absent, &new],
        &["backup", "--init", "--level", "full", "--qmp", &absent, "--target", &new],
    ];
    for args in refused {
        let out = Command::new(env!("CARGO_BIN_EXE_fleecefs"))
            .args(*args)
            .env("XDG_STATE_HOME", state.path())
            .env("HOME", state.path())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.code().is_some_and(|code| code != 0), "{args:?}: {said}");
        assert_eq!(below(dir.path()), before, "{args:?}: {said}");
    }
}
