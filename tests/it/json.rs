//! `contrib/doc/json.md` is what is printed: each key of real output is in its tables, with its type, and each key
//! there that is not optional is printed.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use crate::support::attached::{self, Attach, succeeded};
use crate::support::backup::{Caller, PausedBackup, images};
use crate::support::guard::Guard;
use crate::support::lost_vm;
use crate::support::mount::Mount;
use crate::support::qemu::storage_daemon::Daemon;
use crate::support::qemu::two_disks;
use crate::support::tools::{have, is_root, run};
use serde_json::{Value, json};

const TOOLS: &[&str] = &["qemu-storage-daemon", "qemu-img", "qemu-io", "/dev/fuse"];

/// The tables: for each heading the keys and their types.
struct Paper(BTreeMap<String, BTreeMap<String, String>>);

impl Paper {
    fn read() -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("contrib/doc/json.md");
        let (mut tables, mut at) = (BTreeMap::new(), String::new());
        for line in std::fs::read_to_string(path).unwrap().lines() {
            if let Some(heading) = line.strip_prefix("## ") {
                at = heading.to_string();
            } else if let Some(row) = line.strip_prefix("| `") {
                let (key, rest) = row.split_once("` | ").unwrap();
                let kind = rest.split_once(" | ").unwrap().0.to_string();
                let table: &mut BTreeMap<_, _> = tables.entry(at.clone()).or_default();
                assert!(table.insert(key.to_string(), kind).is_none(), "{at}: {key} twice");
            }
        }
        Paper(tables)
    }

    /// Checks a value against the table of `heading`; gives what was seen of it.
    fn check(&self, heading: &str, value: &Value) -> BTreeSet<String> {
        let mut seen = BTreeSet::new();
        self.walk(heading, "", value, &mut seen);
        seen
    }

    fn walk(&self, heading: &str, at: &str, value: &Value, seen: &mut BTreeSet<String>) {
        let table = &self.0[heading];
        match value {
            Value::Array(items) => {
                items.iter().for_each(|v| self.walk(heading, &format!("{at}[]"), v, seen));
            }
            Value::Object(fields) => {
                let inside =
                    |key: &str| if at.is_empty() { key.into() } else { format!("{at}.{key}") };
                for (key, value) in fields {
                    let path = inside(key);
                    let kind = table.get(&path).unwrap_or_else(|| panic!("{heading}: no {path}"));
                    seen.insert(path.clone());
                    self.field(heading, &path, kind, value, seen);
                }
                let own = |k: &&String| {
                    let rest = k.strip_prefix(at).map(|r| r.trim_start_matches('.'));
                    k.as_str() != at
                        && rest.is_some_and(|r| !r.is_empty() && !r.contains(['.', '[']))
                };
                for key in table.keys().filter(own).filter(|k| !table[*k].contains("optional")) {
                    let name = key.rsplit('.').next().unwrap();
                    assert!(fields.contains_key(name), "{heading}: {key} is not printed: {value}");
                }
            }
            _ => {}
        }
    }

    fn field(
        &self,
        heading: &str,
        path: &str,
        kind: &str,
        value: &Value,
        seen: &mut BTreeSet<String>,
    ) {
        let first = kind.split([' ', ',']).next().unwrap();
        let fits = match first {
            "any" => return,
            "text" => value.is_string(),
            "number" => value.is_number(),
            "boolean" => value.is_boolean(),
            "object" | "finding" => value.is_object(),
            "list" | "findings" => value.is_array(),
            _ => panic!("{heading}: {path}: what is {kind:?}?"),
        };
        assert!(fits || value.is_null() && kind.contains("or null"), "{heading}: {path}: {value}");
        match (first, value) {
            ("finding", Value::Object(_)) => drop(self.check("Finding", value)),
            ("findings", Value::Array(all)) => {
                all.iter().for_each(|f| drop(self.check("Finding", f)))
            }
            // Lists of small objects that the text tells.
            _ if kind == "list" && !self.has_inside(heading, path) => {}
            _ => self.walk(heading, path, value, seen),
        }
    }

    fn has_inside(&self, heading: &str, path: &str) -> bool {
        self.0[heading].keys().any(|k| k.starts_with(&format!("{path}[]")))
    }
}

/// What a command prints: a document, or one per line.
fn printed(args: &[&str]) -> Vec<Value> {
    let mut c = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
    let out = c.args(args).output().unwrap();
    let found: Vec<Value> = serde_json::Deserializer::from_slice(&out.stdout)
        .into_iter()
        .map(|v| v.unwrap_or_else(|e| panic!("{args:?}: {e}")))
        .collect();
    assert!(!found.is_empty(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    found
}

/// Two disks with a FULL and two INCs each, and a point whose parent is gone.
fn daemon() -> (Daemon, Caller) {
    let dir = tempfile::tempdir().unwrap();
    for name in ["a", "b"] {
        let path = dir.path().join(format!("{name}.img"));
        run("qemu-img", &["create", "-q", "-f", "qcow2", path.to_str().unwrap(), "4M"]);
    }
    let d = Daemon::start(dir, &[("a", "driver=qcow2"), ("b", "driver=qcow2")]);
    let caller = Caller::of(&d);
    for level in ["full", "inc", "inc"] {
        d.io("a", &["write -P 7 1M 64k"]);
        caller.must(level);
    }
    std::fs::remove_file(&images(&caller.target.join("b.img"))[1]).unwrap();
    (d, caller)
}

#[test]
fn tables_have_what_is_printed() {
    if !have("tables_have_what_is_printed", TOOLS) {
        return;
    }
    let paper = Paper::read();
    let (d, caller) = daemon();
    let target = caller.target.to_str().unwrap();
    let qmp = caller.qmp.to_str().unwrap().to_string();
    let state = caller.state.to_str().unwrap();
    let check = |heading: &str, args: &[&str]| {
        let mut seen = BTreeSet::new();
        printed(args).iter().for_each(|v| seen.extend(paper.check(heading, v)));
        seen
    };
    let seen = check("list", &["list", "--json", target]);
    assert!(seen.contains("disks[].points[].unavailable"), "{seen:?}");
    check("list --runs", &["list", "--runs", "--json", target]);
    check("show", &["show", "--json", target, "a.img/latest"]);
    let seen = check("stats", &["stats", "--json", target, "--keep-last", "1"]);
    assert!(seen.contains("disks[].changed.percent"), "{seen:?}");
    let seen = check("diff", &["diff", "--json", target, "b.img/latest", "a.img/latest"]);
    assert!(seen.contains("ranges[].to"), "{seen:?}");
    let seen = check("verify", &["verify", "--json", target]);
    assert!(seen.contains("points[].reason"), "{seen:?}");
    // What it found is kept.
    let seen = check("list", &["list", "--json", target]);
    assert!(seen.contains("disks[].points[].verified.time"), "{seen:?}");
    let seen = check("show", &["show", "--json", target, "a.img/latest"]);
    assert!(seen.contains("verified.outcome"), "{seen:?}");
    let out = d.path("out.raw");
    let out = out.to_str().unwrap();
    check("restore --dry-run", &["restore", "-n", "--json", target, "a.img/latest", out]);
    check("restore", &["restore", "--json", target, "a.img/latest", out]);
    let keep = ["prune", "-n", "--json", target, "--keep-last", "1", "--keep-daily", "1"];
    let seen = check("prune", &keep);
    assert!(seen.contains("disks[].points[].keep[].needed-by"), "{seen:?}");
    // An error is an object too, alone or after what was printed.
    let missing = ["restore", "--json", target, "a.img/FULL-1-a.img", "/nowhere/x"];
    for args in [&["list", "--json", "/nowhere"][..], &["show", "--json", target, "x"], &missing] {
        let seen = check("Error", args);
        assert!(seen.contains("error.kind"), "{args:?}: {seen:?}");
    }
    let newest = |c: &Caller| {
        let name = images(&c.target.join("a.img")).last().unwrap().file_name().unwrap().to_owned();
        name.into_string().unwrap()
    };
    let until = ["consolidate", "--json", target, "a.img", "--until"];
    let upto = newest(&caller);
    check("consolidate", &[&until[..], &[&upto, "-n"]].concat());
    let status =
        check("info status", &["info", "status", "--json", "--qmp", &qmp, "--state-dir", state]);
    assert!(status.contains("state"), "{status:?}");
    for (what, heading) in [("blockdev", "info blockdev"), ("bitmaps", "info bitmaps")] {
        let seen = check(heading, &["info", what, "--json", "--qmp", &qmp, "--state-dir", state]);
        assert!(seen.iter().any(|k| k.ends_with(".owner")), "{seen:?}");
    }
    let nbd = d.path("nbd.sock");
    let common = ["--qmp", &qmp, "--state-dir", state, "--target", target, "--nbd"];
    let backup = |more: &[&str]| {
        let mut all = vec!["backup", "--level", "auto", "--progress", "json"];
        all.extend(common);
        all.push(nbd.to_str().unwrap());
        all.extend(more);
        all.iter().map(|a| a.to_string()).collect::<Vec<_>>()
    };
    for (heading, more) in [("backup --dry-run", ["-n"].as_slice()), ("backup", &[])] {
        let args = backup(more);
        let seen = check(heading, &args.iter().map(String::as_str).collect::<Vec<_>>());
        let result = ["points[].run", "format_version"];
        assert!(heading != "backup" || result.iter().all(|k| seen.contains(*k)), "{seen:?}");
    }
    let seen = check("history", &["history", "--json", "--state-dir", state]);
    assert!(seen.contains("runs[].disks[].copied"), "{seen:?}");
    // The point that is gone is trouble.
    let seen =
        check("health", &["health", "--json", "--max-age", "1h", "--state-dir", state, target]);
    let wanted = ["directories[].disks[].newest.time", "directories[].last_runs[].exit_code"];
    assert!(wanted.iter().all(|k| seen.contains(*k)), "{seen:?}");
    // What fails: the disk, and the run.
    let mut args = backup(&["--include", "nothing"]);
    args[2] = "inc".into();
    let all = printed(&args.iter().map(String::as_str).collect::<Vec<_>>());
    let last = all.last().unwrap();
    assert!(last["event"] == "error" && last["error"]["exit_code"].is_number(), "{all:?}");
    paper.check("Error", last);
    let mount = Mount::new(&caller.target);
    let status = std::fs::read(mount.path().join(".fleecefs/status.json")).unwrap();
    let seen = paper.check("status.json", &serde_json::from_slice(&status).unwrap());
    assert!(seen.contains("disks[].chains[].points[].unavailable"), "{seen:?}");
}

/// A table that no test compares with output says what somebody remembers.
#[test]
fn every_table_is_compared_with_output() {
    let (source, paper) = (include_str!("json.rs"), Paper::read());
    for heading in paper.0.keys() {
        assert!(source.contains(&format!("\"{heading}\"")), "{heading}");
    }
    assert!(paper.0.len() > 35, "{}", paper.0.len());
}

#[test]
fn a_running_backup_and_a_job_print_what_their_tables_have() {
    if !have("a_running_backup_and_a_job_print_what_their_tables_have", TOOLS) {
        return;
    }
    let (d, caller) = daemon();
    let (paper, qmp) = (Paper::read(), caller.qmp.to_str().unwrap());
    let created = d.path("created.img");
    let options = json!({"driver": "file", "filename": created, "size": 1 << 20});
    // It stays until somebody dismisses it.
    d.qmp().execute("blockdev-create", json!({"job-id": "made", "options": options}));
    let seen = paper.check("info jobs", &printed(&["info", "jobs", "--json", "--qmp", qmp])[0]);
    assert!(seen.contains("jobs[].id"), "{seen:?}");
    let held = PausedBackup::start(&caller, "auto");
    let state = caller.state.to_str().unwrap();
    let status = ["info", "status", "--json", "--qmp", qmp, "--state-dir", state];
    let told = printed(&status);
    let (code, said) = held.end();
    assert_eq!(code, Some(0), "{said}");
    let seen = paper.check("info status", &told[0]);
    let wanted = ["run", "pid", "started", "target", "phase", "disks[].total"];
    assert!(told[0]["state"] == "running", "{told:?}");
    assert!(wanted.iter().all(|k| seen.contains(*k)), "{seen:?}");
}

#[test]
fn config_and_boot_print_what_their_tables_have() {
    let test = "config_and_boot_print_what_their_tables_have";
    if !have(test, two_disks::TOOLS) {
        return;
    }
    let mut m = two_disks::Machine::launch(&["-device", "virtio-net-pci"]);
    m.write(0, 0, 4096);
    let caller = m.caller();
    assert!(caller.run("full").status.success());
    let (paper, target) = (Paper::read(), caller.target.to_str().unwrap());
    let seen = paper.check("config", &printed(&["config", "--json", target])[0]);
    let wanted = ["machine.disks[].address", "machine.nets[].mac", "drives[].restored_as"];
    assert!(wanted.iter().all(|k| seen.contains(*k)), "{seen:?}");
    let boot = ["boot", "--check", "--json", "--accel", "tcg", "--expect", "x", "--timeout", "1s"];
    let fixed = ["--memory", "64M", target];
    let told = printed(&[&boot[..], &fixed].concat());
    let seen = paper.check("boot --check", &told[0]);
    assert!(seen.contains("checks[].points[].disk"), "{seen:?}");
    m.off();
    let home = m.text("home");
    let end = Guard::of(lost_vm::END, &[Path::new(&home)]);
    let state = m.text("state");
    let live = ["live-restore", target, "--to", &home, "--state-dir", &state, "--accel", "tcg"];
    let told = printed(&[&live[..], &["--progress", "json"]].concat());
    let seen: BTreeSet<String> = told.iter().flat_map(|v| paper.check("live-restore", v)).collect();
    assert!(["seconds", "disks[].file", "text"].iter().all(|k| seen.contains(*k)), "{seen:?}");
    drop(end);
    // What does not start says why.
    let told = printed(&[&boot[..], &fixed, &["--kernel", "/dev/null"]].concat());
    let seen = paper.check("boot --check", &told[0]);
    assert!(seen.contains("checks[].error.kind"), "{seen:?}");
}

#[test]
fn a_writable_mount_prints_what_its_tables_have() {
    if !have("a_writable_mount_prints_what_its_tables_have", TOOLS) {
        return;
    }
    let (dir, scratch) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let path = dir.path().join("sda/FULL-1700000000-sda.qcow2");
    std::fs::create_dir(dir.path().join("sda")).unwrap();
    run("qemu-img", &["create", "-q", "-f", "qcow2", path.to_str().unwrap(), "4M"]);
    let option = format!("--writable={}", scratch.path().display());
    let mount = Mount::with(dir.path(), &[&option, "--keep"]);
    let point = mount.point("sda", &path);
    std::os::unix::fs::FileExt::write_all_at(
        &std::fs::OpenOptions::new().write(true).open(point).unwrap(),
        b"written",
        0,
    )
    .unwrap();
    let paper = Paper::read();
    let status = std::fs::read(mount.path().join(".fleecefs/status.json")).unwrap();
    let seen = paper.check("status.json", &serde_json::from_slice(&status).unwrap());
    assert!(seen.contains("writable.overlays[].kept"), "{seen:?}");
    let list = ["scratch", "list", "--json", scratch.path().to_str().unwrap()];
    let seen = paper.check("scratch list", &printed(&list)[0]);
    assert!(seen.contains("overlays[].shown"), "{seen:?}");
}

#[test]
fn link_disk_prints_what_its_table_has() {
    if !have("link_disk_prints_what_its_table_has", TOOLS) {
        return;
    }
    let (d, caller) = daemon();
    let target = caller.target.to_str().unwrap();
    let old = caller.target.join("old");
    std::fs::create_dir(&old).unwrap();
    let path = old.join("FULL-1700000000-old.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", path.to_str().unwrap(), "4M"]);
    let args = ["link-disk", "-n", "--json", target, "old", "a.img"];
    let seen = Paper::read().check("link-disk", &printed(&args)[0]);
    assert!(seen.contains("points[].from"), "{seen:?}");
    drop(d);
}

#[test]
fn replicate_prints_what_its_table_has() {
    if !have("replicate_prints_what_its_table_has", TOOLS) {
        return;
    }
    let (d, caller) = daemon();
    caller.must("full");
    let copy = d.path("copy").display().to_string();
    let args = ["replicate", "--json", "--keep-last", "1", caller.target.to_str().unwrap(), &copy];
    let seen = Paper::read().check("replicate", &printed(&args)[0]);
    // The point whose parent is gone is left.
    assert!(seen.contains("pruned.points") && seen.contains("images[].why"), "{seen:?}");
}

#[test]
fn files_print_what_their_tables_have() {
    if !have("files_print_what_their_tables_have", &[TOOLS, &["mke2fs"]].concat()) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    std::fs::create_dir_all(at("files/etc")).unwrap();
    std::fs::write(at("files/etc/fstab"), "none\n").unwrap();
    std::os::unix::fs::symlink("fstab", at("files/etc/link")).unwrap();
    std::fs::create_dir(at("backups")).unwrap();
    let image = at("backups/vda.img");
    run("mke2fs", &["-q", "-F", "-t", "ext4", "-d", &at("files"), &image, "8M"]);
    let paper = Paper::read();
    let backups = at("backups");
    let check = |heading: &str, args: &[&str]| {
        let mut seen = BTreeSet::new();
        let all = [&["files"], &args[..1], &["--json", &backups], &args[1..]].concat();
        printed(&all).iter().for_each(|v| seen.extend(paper.check(heading, v)));
        seen
    };
    // A disk with two partitions, by a table of its own.
    let mut disk = vec![0; 1 << 20];
    for (i, (start, sectors)) in [(2048u32, 16384u32), (18432, 2048)].into_iter().enumerate() {
        let entry = 446 + 16 * i;
        disk[entry + 4] = 0x83;
        disk[entry + 8..entry + 12].copy_from_slice(&start.to_le_bytes());
        disk[entry + 12..entry + 16].copy_from_slice(&sectors.to_le_bytes());
    }
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    disk.extend(std::fs::read(&image).unwrap());
    disk.resize(10 << 20, 0);
    std::fs::write(at("backups/vdc.img"), disk).unwrap();
    let seen = check("files ls of a disk", &["ls", "vdc.img/latest"]);
    assert!(seen.contains("file_system.uuid"), "{seen:?}");
    std::fs::remove_file(at("backups/vdc.img")).unwrap();
    let seen = check("files ls", &["ls", "vda.img/latest/etc"]);
    assert!(seen.contains("target"), "{seen:?}");
    check("files ls", &["find", "vda.img/latest"]);
    check("files stat", &["stat", "vda.img/latest/etc/fstab"]);
    check("files find --all-points", &["find", "vda.img", "--all-points"]);
    let seen = check("files versions", &["versions", "--hash", "vda.img/etc/fstab"]);
    assert!(seen.contains("blake3"), "{seen:?}");
    let other = at("backups/vdb.img");
    std::fs::write(at("files/etc/fstab"), "other\n").unwrap();
    std::fs::rename(at("files/etc/link"), at("files/etc/new")).unwrap();
    run("mke2fs", &["-q", "-F", "-t", "ext4", "-d", &at("files"), &other, "8M"]);
    let points = ["vda.img/latest", "vdb.img/latest"];
    let all = printed(&[&["diff", "--files", "--json", &backups], &points[..]].concat());
    let seen: BTreeSet<String> = all.iter().flat_map(|v| paper.check("diff --files", v)).collect();
    assert!(["what", "from_size"].iter().all(|k| seen.contains(*k)), "{seen:?}");
    check("files cp", &["cp", "vda.img/latest/etc", &at("copy")]);
}

#[test]
fn attach_prints_what_its_tables_have() {
    let test = "attach_prints_what_its_tables_have";
    if !have(test, &[TOOLS, &attached::TOOLS, &["mke2fs"]].concat()) || !is_root(test) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("vda.img");
    run("mke2fs", &["-q", "-F", "-t", "ext4", image.to_str().unwrap(), "8M"]);
    let (paper, attach) = (Paper::read(), Attach::new());
    let told = attach.attach(dir.path(), "vda.img/latest", &["--json"]);
    let seen = paper.check("attach", &serde_json::from_str(&told).unwrap());
    assert!(seen.contains("volumes[].mounted"), "{seen:?}");
    let listed = attach.command(&["attach", "--list", "--json"]).output().unwrap();
    let listed = serde_json::from_str(&succeeded(&listed)).unwrap();
    let seen = paper.check("attach --list", &listed);
    assert!(seen.contains("attached[].volumes[].content"), "{seen:?}");
    attach.detach("--all");
}

#[test]
fn the_configuration_prints_what_its_tables_have() {
    let test = "the_configuration_prints_what_its_tables_have";
    if !have(test, two_disks::TOOLS) {
        return;
    }
    let mut m = two_disks::Machine::launch(&[]);
    m.write(0, 0, 4096);
    let (paper, dir) = (Paper::read(), m.folder().to_str().unwrap().to_string());
    let file = format!("{dir}/c.toml");
    let text = format!(
        "[defaults]\ntarget = \"{dir}/{{vm}}\"\n[vms.a]\nqmp = \"{dir}/qmp.sock\"\nkeep_last = 1\n\
         [vms.b]\nqmp = \"{dir}/none.sock\"\n[vms.c]\nlevle = 1\n"
    );
    std::fs::write(&file, text).unwrap();
    let check = |heading: &str, args: &[&str]| {
        let args = [args, &["--json", "--config-file", &file]].concat();
        paper.check(heading, &printed(&args)[0])
    };
    let state = format!("--state-dir={dir}/state");
    for more in [&["--dry-run"][..], &[]] {
        let seen = check("backup --all", &[&["backup", "--all", &state], more].concat());
        let wanted = ["vms[].points[].copied", "vms[].failures[].message"];
        assert!(wanted.iter().all(|k| seen.contains(*k)), "{seen:?}");
    }
    let seen = check("config check", &["config", "check"]);
    assert!(seen.contains("problems[].message"), "{seen:?}");
    check("config list", &["config", "list"]);
    check("config show", &["config", "show", "a"]);
}
