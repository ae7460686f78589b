//! `health` says what is not well, in words, in exit codes, to Nagios and to Prometheus; and what is well is quiet.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::support::backup::{Caller, PausedBackup, images};
use crate::support::checked::{code, daemon};
use crate::support::guard::{Guard, tied};
use crate::support::images::Chain;
use crate::support::qemu::two_disks;
use crate::support::tools::{have, is_root, run};
use crate::support::tree::Backups;

const TOOLS: &[&str] = &["qemu-img", "qemu-io"];
const DAEMON: &[&str] = &["qemu-storage-daemon", "qemu-img", "qemu-io"];

/// Exit code and standard output of `health`.
fn health(state: &Path, words: &[&str]) -> (Option<i32>, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
    let out = command.args(["health", "--state-dir"]).arg(state).args(words).output().unwrap();
    (out.status.code(), String::from_utf8(out.stdout).unwrap())
}

/// The exit code, and what `--json` prints.
fn judged(state: &Path, words: &[&str]) -> (Option<i32>, Value) {
    let (code, text) = health(state, &[&["--json"], words].concat());
    (code, serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}")))
}

/// The kinds of all trouble: of directories, and of disks.
fn trouble(all: &Value) -> Vec<String> {
    let list = |v: &Value| v.as_array().unwrap().clone();
    let kinds = |v: &Value| -> Vec<String> {
        list(&v["trouble"]).iter().map(|t| t["kind"].as_str().unwrap().to_string()).collect()
    };
    let mut found = Vec::new();
    for dir in list(&all["directories"]) {
        found.extend(kinds(&dir));
        list(&dir["disks"]).iter().for_each(|d| found.extend(kinds(d)));
    }
    found
}

/// A disk of three points, made in 2023.
fn chain() -> (tempfile::TempDir, PathBuf, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let top = dir.path().canonicalize().unwrap();
    let mut chain = Chain::new(&top.join("vm1"), "sda");
    for i in 1..4 {
        chain.point("", 1 << 20, &[format!("write -P {i} {} 64k", i * 65536)]);
    }
    chain.finish();
    (dir, top.join("vm1"), top.join("state"))
}

#[test]
fn what_is_old_or_damaged_is_told_and_the_rest_is_well() {
    if !have("what_is_old_or_damaged_is_told_and_the_rest_is_well", TOOLS) {
        return;
    }
    let (_dir, backups, state) = chain();
    let dir = backups.to_str().unwrap();
    let (code, all) = judged(&state, &[dir]);
    assert_eq!((code, all["status"].as_str()), (Some(0), Some("ok")), "{all:#}");
    assert!(!state.exists(), "looking makes no state folder");
    let disk = &all["directories"][0]["disks"][0];
    assert_eq!((&disk["points"], &disk["chain_points"]), (&3.into(), &3.into()));
    assert_eq!(disk["newest"]["level"], "inc");
    assert_eq!(disk["newest"]["time"], "2023-11-15T01:13:20Z");
    let age = disk["newest"]["age_seconds"].as_i64().unwrap();
    assert!(age > 2 * 365 * 86_400, "{disk:#}");
    assert!(disk["verified"].is_null() && disk["booted"].is_null());
    let space = run("df", &["--output=size", "-B1", dir]).stdout;
    let space = String::from_utf8(space).unwrap();
    let size = all["directories"][0]["size_bytes"].to_string();
    assert_eq!(space.lines().last().unwrap().trim(), size);
    // Beyond the limit, and just not.
    let (code, all) = judged(&state, &[dir, "--max-age", "26h"]);
    assert_eq!((code, trouble(&all)), (Some(18), vec!["old".to_string()]), "{all:#}");
    assert_eq!(judged(&state, &[dir, "--max-age", "90y"]).0, Some(0));
    // What verify found, and when.
    let verify = |more: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
        let args = command.args(["verify", "--state-dir"]).arg(&state).arg(dir).args(more);
        args.output().unwrap().status.code()
    };
    assert_eq!(verify(&["--create"]), Some(0));
    let (code, all) = judged(&state, &[dir]);
    assert_eq!(code, Some(0), "{all:#}");
    assert_eq!(all["directories"][0]["disks"][0]["verified"]["outcome"], "sound");
    let full = images(&backups.join("sda")).remove(0);
    let bytes = std::fs::read(&full).unwrap();
    let at = bytes.windows(16).position(|w| w == [1; 16]).unwrap();
    let mut damaged = bytes.clone();
    damaged[at] ^= 1;
    std::fs::write(&full, &damaged).unwrap();
    assert_eq!(verify(&[]), Some(18));
    let (code, all) = judged(&state, &[dir]);
    assert_eq!((code, trouble(&all)), (Some(18), vec!["unsound".to_string()]), "{all:#}");
    let (code, text) = health(&state, &[dir]);
    assert!(
        code == Some(18) && text.contains("'fleecefs verify' found errors in 3 points"),
        "{text}"
    );
    assert!(text.lines().all(|l| l.len() <= 80 || l.contains(dir)), "{text}");
    // A point in the middle that is gone: what is above it cannot be served.
    std::fs::write(&full, &bytes).unwrap();
    std::fs::write(&images(&backups.join("sda"))[1], "no image").unwrap();
    let (code, all) = judged(&state, &[dir]);
    assert_eq!(code, Some(18));
    assert!(trouble(&all).contains(&"unavailable".to_string()), "{all:#}");
    assert_eq!(all["directories"][0]["disks"][0]["newest"]["level"], "full");
}

#[test]
fn a_directory_that_is_gone_or_empty_is_trouble_and_the_others_are_told() {
    if !have("a_directory_that_is_gone_or_empty_is_trouble_and_the_others_are_told", TOOLS) {
        return;
    }
    let (top, backups, state) = chain();
    let empty = top.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    let gone = top.path().join("gone");
    let all = [&backups, &empty, &gone].map(|p| p.to_str().unwrap());
    let (code, told) = judged(&state, &all);
    assert_eq!(code, Some(18));
    let words: Vec<_> =
        told["directories"].as_array().unwrap().iter().map(|d| &d["status"]).collect();
    assert_eq!(words, ["ok", "error", "error"], "{told:#}");
    assert_eq!(trouble(&told), ["empty", "unreadable"]);
    // Nagios: one line, codes of its own.
    let (code, text) = health(&state, &["--nagios", all[0]]);
    let first = text.lines().next().unwrap();
    assert_eq!(code, Some(0), "{text}");
    assert!(first.starts_with("FLEECEFS OK - 1 disk, newest points made "), "{text}");
    let (said, data) = first.split_once(" | ").unwrap();
    assert!(!said.contains('|') && data.starts_with("disks=1;;;0 age="), "{text}");
    let (code, text) = health(&state, &[&["--nagios", "--max-age", "1d"], &all[..]].concat());
    assert_eq!(code, Some(2), "{text}");
    assert!(
        text.starts_with("FLEECEFS CRITICAL - 1 disk: ") && text.lines().count() == 4,
        "{text}"
    );
    // Nothing can be told: the metrics cannot be written.
    let (code, text) = health(&state, &["--nagios", "--metrics", "/nowhere/x.prom", all[0]]);
    assert_eq!(code, Some(3), "{text}");
    assert!(text.starts_with("FLEECEFS UNKNOWN - /nowhere"), "{text}");
}

#[test]
fn the_configured_vms_are_looked_at_with_their_limits() {
    if !have("the_configured_vms_are_looked_at_with_their_limits", TOOLS) {
        return;
    }
    let (dir, backups, state) = chain();
    let config = dir.path().join("fleecefs.toml");
    let text = format!(
        "[vms.one]\nqmp = \"/run/1.sock\"\ntarget = \"{}\"\nmax_age = \"26h\"\n\
         [vms.off]\nqmp = \"/run/2.sock\"\ntarget = \"/nowhere\"\nenabled = false\n",
        backups.display()
    );
    std::fs::write(&config, text).unwrap();
    let file = ["--config-file", config.to_str().unwrap()];
    let (code, all) = judged(&state, &file);
    assert_eq!((code, trouble(&all)), (Some(18), vec!["old".to_string()]), "{all:#}");
    assert_eq!(all["directories"].as_array().unwrap().len(), 1, "{all:#}");
    // What is asked for holds for all.
    assert_eq!(judged(&state, &[&file[..], &["--max-age", "90y"]].concat()).0, Some(0));
    let mut nobody = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
    let nobody = nobody.args(["health", "--config-file", "/nowhere/x"]).output().unwrap();
    let said = String::from_utf8_lossy(&nobody.stderr).into_owned();
    assert!(nobody.status.code() == Some(3) && said.contains("name backup directories"), "{said}");
}

/// VMs that the configuration has lost are not backed up, and no directory shows that.
#[test]
fn what_is_wrong_with_the_configuration_is_trouble() {
    if !have("what_is_wrong_with_the_configuration_is_trouble", TOOLS) {
        return;
    }
    let (dir, backups, state) = chain();
    let top = dir.path().canonicalize().unwrap();
    let (main, more) = (top.join("fleecefs.toml"), top.join("vms.d"));
    std::fs::create_dir(&more).unwrap();
    let file = ["--config-file", main.to_str().unwrap()];
    let one = format!("[vms.one]\nqmp = \"/run/1.sock\"\ntarget = \"{}\"\n", backups.display());
    std::fs::write(&main, &one).unwrap();
    assert_eq!(judged(&state, &file).0, Some(0));
    let (_, text) = health(&state, &file);
    assert!(text.ends_with("note: without 'max_age' points never are too old: one\n"), "{text}");
    let check = |errors: usize| {
        let (code, all) = judged(&state, &file);
        assert_eq!((code, trouble(&all)), (Some(18), vec!["configuration".into(); errors]));
        let (code, text) = health(&state, &[&file[..], &["--nagios"]].concat());
        assert!(code == Some(2) && text.starts_with("FLEECEFS CRITICAL - 1 disk: "), "{text}");
        assert!(text.contains(&format!("errors={errors};")), "{text}");
        let (code, text) = health(&state, &file);
        assert!(code == Some(18) && text.contains(": ERROR\n"), "{text}");
    };
    std::fs::write(&main, format!("{one}max_age = \"26 hrs\"\n")).unwrap();
    check(1);
    std::fs::write(&main, &one).unwrap();
    std::fs::write(more.join("two.toml"), "qmp = ").unwrap();
    check(1);
    std::fs::write(more.join("a b.toml"), &one).unwrap();
    check(2);
    let metrics = top.join("m.prom");
    health(&state, &[&file[..], &["--metrics", metrics.to_str().unwrap()]].concat());
    let text = std::fs::read_to_string(metrics).unwrap();
    let line = format!(
        "fleecefs_troubles{{directory=\"{}\",status=\"error\"}} 1\n",
        more.join("two.toml").display()
    );
    assert!(text.contains(&line), "{text}");
}

/// What a night itself fails with, of which no backup has told.
#[test]
fn a_night_that_came_to_no_backup_is_trouble_until_one_goes_well() {
    let test = "a_night_that_came_to_no_backup_is_trouble_until_one_goes_well";
    if !have(test, DAEMON) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let top = dir.path().canonicalize().unwrap();
    let (main, image, state) = (top.join("fleecefs.toml"), top.join("sda.qcow2"), top.join("S"));
    let target = top.join("T");
    run("qemu-img", &["create", "-q", "-f", "qcow2", image.to_str().unwrap(), "1M"]);
    let night = |before: &str| {
        let text = format!(
            "[vms.one]\noffline = [\"{}\"]\ntarget = \"{}\"\nlevel = \"full\"\n\
             before = [\"{before}\"]\n",
            image.display(),
            target.display()
        );
        std::fs::write(&main, text).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
        command.args(["backup", "--all", "--config-file"]).arg(&main);
        command.arg("--state-dir").arg(&state).output().unwrap()
    };
    let told = || judged(&state, &[target.to_str().unwrap()]);
    let failed = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
        let command = command.args(["history", "--failed", "--json", "--state-dir"]).arg(&state);
        let all: Value = serde_json::from_slice(&command.output().unwrap().stdout).unwrap();
        all["runs"].as_array().unwrap().clone()
    };
    let is_good = |night: &std::process::Output| {
        assert!(night.status.success(), "{night:?}");
        let (code, all) = told();
        assert_eq!((code, trouble(&all)), (Some(0), vec![]), "{all:#}");
    };
    is_good(&night("/bin/true"));
    let out = night("/bin/false");
    assert!(!out.status.success(), "{out:?}");
    let (code, all) = told();
    assert_eq!((code, trouble(&all)), (Some(18), vec!["run-failed".to_string()]), "{all:#}");
    let text = all["directories"][0]["trouble"][0]["text"].as_str().unwrap();
    assert!(text.starts_with("the last backup of one failed just now: before: "), "{text}");
    let runs = failed();
    assert_eq!(runs.len(), 1, "{runs:#?}");
    assert_eq!((&runs[0]["vm"], &runs[0]["command"]), (&"one".into(), &"backup".into()));
    is_good(&night("/bin/true"));
    // What the backup has told itself is there once.
    std::fs::write(&image, "no image").unwrap();
    let out = night("/bin/true");
    assert!(!out.status.success() && failed().len() == 2, "{out:?} {:#?}", failed());
}

#[test]
fn metrics_replace_nothing_but_a_file() {
    if !have("metrics_replace_nothing_but_a_file", TOOLS) {
        return;
    }
    use std::os::unix::fs::FileTypeExt;
    let (dir, backups, state) = chain();
    let pipe = dir.path().join("pipe");
    run("mkfifo", &[pipe.to_str().unwrap()]);
    let dir = backups.to_str().unwrap();
    for file in [pipe.to_str().unwrap(), dir] {
        let (code, text) = health(&state, &["--nagios", "--metrics", file, dir]);
        assert!(code == Some(3) && text.contains("it is no plain file"), "{file}: {text}");
    }
    assert!(std::fs::metadata(&pipe).unwrap().file_type().is_fifo());
}

/// A night on which the disk is full, and one on which the backup is killed.
#[test]
fn a_failed_night_and_a_killed_one_are_trouble_until_the_next_good_one() {
    let test = "a_failed_night_and_a_killed_one_are_trouble_until_the_next_good_one";
    if !have(test, DAEMON) || !is_root(test) {
        return;
    }
    let small = tempfile::tempdir().unwrap();
    let _mount = Guard::tmpfs("13M", small.path());
    let d = daemon(&[]);
    let elsewhere = d.dir.path().to_str().unwrap();
    let mut caller = Caller::of(&d).with(&["--fleece-dir", elsewhere]);
    caller.target = small.path().canonicalize().unwrap().join("T");
    let dir = caller.target.to_str().unwrap().to_string();
    let told = |words: &[&str]| judged(&caller.state, &[words, &[&dir]].concat());
    caller.must("full");
    // What was mistyped is nobody's trouble for ever.
    let mut mistyped = caller.clone();
    mistyped.target = caller.target.join("none/such");
    assert_ne!(code(&mistyped, "inc").0, Some(0));
    let mut socket = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
    socket.args(["backup", "--level", "inc", "--qmp", "/nowhere/qmp.sock", "--target", &dir]);
    let socket = socket.arg("--state-dir").arg(&caller.state).output().unwrap();
    assert!(!socket.status.success(), "{socket:?}");
    let (of_socket, all) = told(&[]);
    assert_eq!((of_socket, trouble(&all)), (Some(18), vec!["run-failed".to_string()]), "{all:#}");
    d.io("a", &["write -P 5 0 64k"]);
    caller.must("inc");
    let (code_before, all) = told(&["--max-age", "1h"]);
    assert_eq!((code_before, trouble(&all)), (Some(0), vec![]), "{all:#}");
    d.io("a", &["write -P 6 0 8M"]);
    assert_eq!(code(&caller, "inc").0, Some(7));
    let (failed, all) = told(&[]);
    assert_eq!((failed, trouble(&all)), (Some(18), vec!["run-failed".to_string()]), "{all:#}");
    let text = all["directories"][0]["trouble"][0]["text"].as_str().unwrap();
    assert!(
        text.starts_with("the last backup failed just now: ") && text.contains("needs about"),
        "{text}"
    );
    // Seen from above, too.
    let above = small.path().canonicalize().unwrap();
    let (failed, all) = judged(&caller.state, &[above.to_str().unwrap()]);
    assert_eq!((failed, trouble(&all)), (Some(18), vec!["run-failed".to_string()]), "{all:#}");
    run("mount", &["-o", "remount,size=64M", small.path().to_str().unwrap()]);
    caller.must("inc");
    assert_eq!(told(&[]).0, Some(0));
    let mut command = caller.command("inc");
    let dead = command.env("FLEECEFS_CRASH_AT", "job concluded").output().unwrap();
    assert_eq!(dead.status.signal(), Some(libc::SIGKILL), "{dead:?}");
    let (killed, all) = told(&[]);
    assert_eq!((killed, trouble(&all)), (Some(18), vec!["interrupted".to_string()]), "{all:#}");
    caller.must_recover(&[]);
    assert_eq!(told(&[]).0, Some(0));
}

/// A backup that is at work has left nothing behind.
#[test]
fn a_running_backup_is_no_trouble_and_is_watched_line_by_line() {
    let test = "a_running_backup_is_no_trouble_and_is_watched_line_by_line";
    if !have(test, DAEMON) {
        return;
    }
    let d = daemon(&[]);
    let caller = Caller::of(&d);
    caller.must("full");
    let held = PausedBackup::start(&caller, "inc");
    let dir = caller.target.to_str().unwrap();
    let (code, all) = judged(&caller.state, &[dir]);
    assert_eq!((code, trouble(&all)), (Some(0), vec![]), "{all:#}");
    let mut watch = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
    watch.args(["info", "status", "--watch", "--state-dir"]).arg(&caller.state);
    let mut watch = tied(watch.stdout(Stdio::piped()).stderr(Stdio::null())).spawn().unwrap();
    let mut lines = BufReader::new(watch.stdout.take().unwrap()).lines();
    let head = lines.next().unwrap().unwrap();
    assert!(head.starts_with(&format!("{dir}: run ")) && head.contains("(process "), "{head}");
    let disk = lines.next().unwrap().unwrap();
    assert!(disk.starts_with("  a INC "), "{disk}");
    // It goes on as long as nobody ends it, and says that the backup is over.
    assert_eq!(held.end().0, Some(0));
    assert!(lines.by_ref().any(|l| l.unwrap() == "no backup is running"));
    // SAFETY: a signal to our own child.
    unsafe { libc::kill(watch.id() as i32, libc::SIGINT) };
    assert_eq!(watch.wait().unwrap().code(), Some(0));
}

/// Metrics with a value of each kind, of a real VM with two disks.
fn metrics(dir: &Path) -> (String, PathBuf) {
    let m = two_disks::Machine::launch(&["-name", "vm \"one\""]);
    let caller = m.caller();
    caller.must("full");
    caller.must("inc");
    let file = dir.join("fleecefs.prom");
    std::fs::write(&file, "old").unwrap();
    let words = ["--metrics", file.to_str().unwrap(), caller.target.to_str().unwrap()];
    let (code, said) = health(&caller.state, &words);
    assert_eq!(code, Some(0), "{said}");
    (std::fs::read_to_string(&file).unwrap(), file)
}

#[test]
fn prometheus_reads_the_metrics_and_the_rules() {
    let test = "prometheus_reads_the_metrics_and_the_rules";
    if !have(test, &[two_disks::TOOLS, &["promtool"]].concat()) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (text, file) = metrics(dir.path());
    let mode = std::fs::metadata(&file).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o644);
    let mut check = Command::new("promtool");
    check.args(["check", "metrics"]).stdin(std::fs::File::open(&file).unwrap());
    let out = check.output().unwrap();
    let said = [out.stdout, out.stderr].concat();
    assert!(out.status.success() && said.is_empty(), "{}\n{text}", String::from_utf8_lossy(&said));
    let rules = Path::new(env!("CARGO_MANIFEST_DIR")).join("contrib/grafana/rules.yml");
    run("promtool", &["check", "rules", rules.to_str().unwrap()]);
    let tests = rules.with_file_name("rules-test.yml");
    run("promtool", &["test", "rules", tests.to_str().unwrap()]);
}

/// Names of metrics in a text: a dashboard, rules.
fn named(text: &str) -> BTreeSet<String> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let words = text.split(|c| !is_part(c)).filter(|w| w.starts_with("fleecefs_"));
    words.map(str::to_string).collect()
}

#[test]
fn the_dashboard_and_the_rules_ask_for_metrics_that_there_are() {
    let test = "the_dashboard_and_the_rules_ask_for_metrics_that_there_are";
    if !have(test, two_disks::TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (text, _) = metrics(dir.path());
    let types = text.lines().filter_map(|l| l.strip_prefix("# TYPE ")?.split(' ').next());
    let there: BTreeSet<String> = types.map(str::to_string).collect();
    let value = |start: &str| {
        let line = text.lines().find(|l| l.starts_with(start));
        let line = line.unwrap_or_else(|| panic!("no {start}: {text}"));
        line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()
    };
    assert!(value("fleecefs_newest_point_timestamp_seconds{") > 1.7e9);
    assert_eq!(value("fleecefs_chain_points{"), 2.0);
    assert!(value("fleecefs_last_run_stopped_seconds{") < 60.0);
    assert_eq!(value("fleecefs_last_run_exit_code{"), 0.0);
    assert!(text.contains(r#"vm="vm \"one\"""#), "{text}");
    let grafana = Path::new(env!("CARGO_MANIFEST_DIR")).join("contrib/grafana");
    let mut asked = 0;
    let board = std::fs::read_to_string(grafana.join("fleecefs.json")).unwrap();
    let parsed: Value = serde_json::from_str(&board).unwrap();
    for panel in parsed["panels"].as_array().unwrap() {
        for target in panel["targets"].as_array().into_iter().flatten() {
            let names = named(target["expr"].as_str().unwrap());
            assert!(!names.is_empty(), "{target:#}");
            asked += names.len();
        }
    }
    for source in [board, std::fs::read_to_string(grafana.join("rules.yml")).unwrap()] {
        let unknown: Vec<_> = named(&source).into_iter().filter(|n| !there.contains(n)).collect();
        assert!(unknown.is_empty(), "{unknown:?}");
    }
    assert!(asked > 10, "{asked}");
}

/// Thirty VMs with a year of nights each: headers are read, and nothing else. Each image claims a disk of 1 TiB in a
/// file that has that length, and no test could wait for its bytes.
#[test]
fn a_year_of_many_vms_is_judged_by_headers() {
    let backups = Backups::new();
    for vm in 0..30 {
        for night in 0..365 {
            let level = if night == 0 { "FULL" } else { "INC" };
            let time = 1_700_000_000 + night * 86_400;
            let name = format!("vm{vm}/sda/{level}-{time}-sda.qcow2");
            backups.image(&name, None);
            let file = std::fs::File::options().write(true).open(backups.path(&name)).unwrap();
            file.set_len(1 << 40).unwrap();
        }
    }
    let state = tempfile::tempdir().unwrap();
    std::fs::set_permissions(state.path(), PermissionsExt::from_mode(0o700)).unwrap();
    let (code, all) = judged(state.path(), &[backups.root().to_str().unwrap()]);
    assert_eq!(code, Some(0), "{}", all["status"]);
    let disks = all["directories"][0]["disks"].as_array().unwrap();
    assert_eq!(disks.len(), 30);
    assert!(disks.iter().all(|d| d["chain_points"] == 365 && d["newest"]["level"] == "inc"));
}
