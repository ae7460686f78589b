//! `fleecefs live-restore`: whoever is killed whenever, what the guest has flushed is there, the backup stays as it is, and
//! at the end nothing refers to it. Without an operating system: the test writes as the guest's devices would.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::support::backup::{Caller, images, stopped};
use crate::support::guard::{Guard, tied};
use crate::support::images::first_difference;
use crate::support::lost_vm::{FILES, Home, Lost, UUID, write_while};
use crate::support::points::{point, points};
use crate::support::process::{eventually, signal, stderr};
use crate::support::qemu::two_disks::bytes;
use crate::support::tools::{have, is_root, run};

#[test]
fn a_vm_runs_again_and_its_disks_come_home() {
    let Some(lost) = Lost::new("a_vm_runs_again_and_its_disks_come_home") else { return };
    let mut home = lost.home("home");
    let child = tied(&mut home.command(&["--rate-limit", "4M"])).spawn().unwrap();
    write_while(&mut home, child, "first");
    // The same command again has nothing to do, whether the backup is there or not.
    let again = home.run(&[]);
    assert!(again.status.success() && stderr(&again).contains("already"), "{}", stderr(&again));
    // Commands to type would destroy what the guest wrote.
    let print = home.run(&["--print"]);
    assert_eq!(print.status.code(), Some(4), "{}", stderr(&print));
    assert!(print.stdout.is_empty());
    let mut qmp = home.monitor().unwrap();
    let uuid = qmp.execute("query-uuid", json!({}));
    let name = qmp.execute("query-name", json!({}));
    assert_eq!((&uuid["UUID"], &name["name"]), (&UUID.into(), &"vm1".into()));
    drop(qmp);
    home.check("home");
    assert!(marks(&lost).is_empty());
    // Shut off by now: the same command starts it again, and needs no backup for that.
    let again = home.run(&["--memory", "64M"]);
    assert!(again.status.success(), "{}", stderr(&again));
    assert!(stderr(&again).contains("--memory 67108864: ignored"), "{}", stderr(&again));
    home.check("shut off");
}

/// What is killed at each of these steps leaves a state of its own.
const STEPS: [&str; 11] = [
    "journal",
    "image made",
    "QEMU started",
    "answer block-dirty-bitmap-add",
    "send cont",
    "answer cont",
    "answer block-stream",
    "waiting",
    "send blockdev-reopen",
    "answer job-finalize",
    "send blockdev-del",
];

#[test]
fn the_command_may_be_killed_at_any_step() {
    let Some(lost) = Lost::new("the_command_may_be_killed_at_any_step") else { return };
    for (number, step) in STEPS.into_iter().enumerate() {
        let mut home = lost.home(&format!("home{number}"));
        let mut command = home.command(&[]);
        let out = command.env("FLEECEFS_CRASH_AT", step).output().unwrap();
        assert_eq!(out.status.code(), None, "{step}: {}", stderr(&out));
        if let Some(mut qmp) = home.monitor() {
            let wrote = home.write(&mut qmp);
            // From this step on it runs.
            let runs = STEPS.iter().position(|s| *s == "answer cont").unwrap() <= number;
            assert_eq!(wrote, runs, "{step}");
        }
        let child = home.command(&[]).spawn().unwrap();
        write_while(&mut home, child, step);
        home.check(step);
    }
}

#[test]
fn qemu_may_be_killed_at_any_step() {
    let Some(lost) = Lost::new("qemu_may_be_killed_at_any_step") else { return };
    for (number, step) in STEPS.into_iter().enumerate().skip(2) {
        let mut home = lost.home(&format!("home{number}"));
        let mut child = stopped(home.command(&[]), step, &lost.m.path("err"));
        // A flush of the guest's would also write out what QEMU has to write out by itself before this step.
        let quiet = step == "answer job-finalize";
        if let Some(mut qmp) = home.monitor().filter(|_| !quiet) {
            home.write(&mut qmp);
        }
        home.kill_qemu();
        // It finds out, and says what to do; the hook would stop it again at the next step of that name.
        child.kill().unwrap();
        child.wait().unwrap();
        let child = home.command(&[]).spawn().unwrap();
        write_while(&mut home, child, step);
        home.check(step);
    }
}

#[test]
fn a_qemu_that_ends_is_told_and_an_unfinished_image_is_opened_by_nobody() {
    let test = "a_qemu_that_ends_is_told_and_an_unfinished_image_is_opened_by_nobody";
    let Some(lost) = Lost::new(test) else { return };
    let mut home = lost.home("home");
    // So slow that it never comes to its end.
    let mut slow = home.command(&["--rate-limit", "65536"]);
    let child = slow.stderr(Stdio::piped()).spawn().unwrap();
    eventually("the guest runs", || home.monitor().is_some_and(|mut q| home.write(&mut q)));
    // Meanwhile nobody else changes the backup, or works in the folder.
    let prune = Command::new(env!("CARGO_BIN_EXE_fleecefs"))
        .args(["prune", "--keep-last", "1"])
        .arg(lost.target())
        .output()
        .unwrap();
    assert_eq!(prune.status.code(), Some(6), "{}", stderr(&prune));
    assert_eq!(home.run(&[]).status.code(), Some(6));
    home.kill_qemu();
    let out = child.wait_with_output().unwrap();
    assert_eq!(out.status.code(), Some(14), "{}", stderr(&out));
    assert!(stderr(&out).contains("the same command"), "{}", stderr(&out));
    for file in FILES {
        let image = home.path.join(file);
        let mut read = Command::new("qemu-io");
        let read = read.args(["-f", "qcow2", "-c", "read 0 512"]).arg(image).output().unwrap();
        assert!(!read.status.success() && stderr(&read).contains("fleecefs"), "{}", stderr(&read));
    }
    // Another run than the one that was begun is refused, the newest goes on.
    let full = images(&lost.target().join(FILES[0]))[0].file_name().unwrap().to_owned();
    let full = format!("{}/{}", FILES[0], full.to_str().unwrap());
    let out = home.run(&[&full]);
    assert_eq!(out.status.code(), Some(2), "{}", stderr(&out));
    let child = home.command(&["latest"]).spawn().unwrap();
    write_while(&mut home, child, "again");
    home.check("again");
}

/// The marks in the backup directory.
fn marks(lost: &Lost) -> Vec<PathBuf> {
    let all = std::fs::read_dir(lost.target().join(".fleecefs")).unwrap().flatten();
    let is_one = |p: &PathBuf| p.file_name().unwrap().to_str().unwrap().starts_with("live-");
    all.map(|e| e.path()).filter(is_one).collect()
}

/// What runs against the backup while the VM lives and no command watches it.
fn refused_by_the_mark(lost: &Lost) {
    assert_eq!(marks(lost).len(), 1);
    let program = |words: &[&str]| {
        let mut c = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
        c.args(words).arg(lost.target()).output().unwrap()
    };
    let consolidate = ["prune", "--keep-last", "1", "--consolidate"];
    for words in [&consolidate[..3], &consolidate, &["commit"], &["snapshot-rebase"], &["rebase"]] {
        let out = program(words);
        assert_eq!(out.status.code(), Some(6), "{words:?}: {}", stderr(&out));
        assert!(stderr(&out).contains("/.fleecefs/live-restore-"), "{}", stderr(&out));
    }
    let other = lost.home("other");
    let out = other.run(&[]);
    assert_eq!(out.status.code(), Some(6), "{}", stderr(&out));
    assert!(stderr(&out).contains("--new-identity") && other.pids().is_empty());
}

/// A folder that was copied or moved takes over nothing of the VM that runs.
fn refused_in_copies(home: &Home<'_>) {
    let mut copy = home.lost.home("copy");
    run("cp", &["-a", home.path.to_str().unwrap(), copy.path.to_str().unwrap()]);
    let out = copy.run(&[]);
    assert_eq!(out.status.code(), Some(13), "{}", stderr(&out));
    assert!(stderr(&out).contains("a copy of"), "{}", stderr(&out));
    std::fs::remove_dir_all(&copy.path).unwrap();
    // Another VM by the first one's name would take its sockets.
    copy.path = home.path.with_extension("moved");
    std::fs::rename(&home.path, &copy.path).unwrap();
    let out = home.run(&[]);
    assert_eq!(out.status.code(), Some(6), "{}", stderr(&out));
    std::fs::remove_dir_all(&home.path).unwrap();
    std::fs::rename(&copy.path, &home.path).unwrap();
}

#[test]
fn only_the_same_backup_goes_on() {
    let Some(lost) = Lost::new("only_the_same_backup_goes_on") else { return };
    let mut home = lost.home("home");
    let mut child = stopped(home.command(&[]), "waiting", &lost.m.path("err"));
    assert!(home.write(&mut home.monitor().unwrap()));
    home.kill_qemu();
    child.kill().unwrap();
    child.wait().unwrap();
    let refused = |mut command: Command| {
        let out = command.output().unwrap();
        assert_eq!(out.status.code(), Some(13), "{}", stderr(&out));
        assert!(home.pids().is_empty());
    };
    // Another directory with the same names, sizes, times and bytes: nothing says that it stays so.
    let (target, other) = (lost.target(), lost.m.path("T2"));
    run("cp", &["-a", target.to_str().unwrap(), other.to_str().unwrap()]);
    let mut command = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
    command.arg("live-restore").arg(&other).arg("--to").arg(&home.path);
    command.arg("--state-dir").arg(home.state()).args(["--accel", "tcg"]);
    refused(command);
    // The same directory with another file of that name and size, without any manifest that could tell.
    let image = images(&target.join(FILES[1]))[0].clone();
    let side = image.parent().unwrap().join(".fleecefs");
    let away = lost.m.path("side");
    std::fs::rename(&side, &away).unwrap();
    let mut bytes = std::fs::read(&image).unwrap();
    let modified = std::fs::metadata(&image).unwrap().modified().unwrap();
    let put = |bytes: &[u8], time| {
        std::fs::write(&image, bytes).unwrap();
        std::fs::File::options().write(true).open(&image).unwrap().set_modified(time).unwrap();
    };
    *bytes.last_mut().unwrap() ^= 1;
    put(&bytes, modified);
    refused(home.command(&[]));
    *bytes.last_mut().unwrap() ^= 1;
    put(&bytes, modified + std::time::Duration::from_nanos(1));
    refused(home.command(&[]));
    put(&bytes, modified);
    // A manifest is part of what was begun.
    if side.exists() {
        std::fs::remove_dir_all(&side).unwrap();
    }
    std::fs::rename(&away, &side).unwrap();
    let child = home.command(&[]).spawn().unwrap();
    write_while(&mut home, child, "the same");
    home.check("the same");
}

#[test]
fn a_point_that_is_known_to_be_unsound_is_not_started() {
    let test = "a_point_that_is_known_to_be_unsound_is_not_started";
    let Some(lost) = Lost::new(test) else { return };
    let home = lost.home("home");
    let image = images(&lost.target().join(FILES[1]))
        .into_iter()
        .find(|p| p.file_name().is_some_and(|n| n.to_str().unwrap().starts_with("INC-")));
    let image = image.unwrap();
    let mut bytes = std::fs::read(&image).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&image, &bytes).unwrap();
    let mut verify = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
    verify.arg("verify").arg("--state-dir").arg(home.state()).arg(lost.target());
    let verified = verify.output().unwrap();
    assert!(!verified.status.success());
    let out = home.run(&[]);
    assert!(!out.status.success() && home.pids().is_empty());
    let said = stderr(&out);
    assert!(said.contains("newest sound point is o.qcow2/FULL-"), "{said}");
    let child = tied(&mut home.command(&["--force"])).spawn().unwrap();
    assert!(child.wait_with_output().unwrap().status.success());
}

#[test]
fn sigterm_leaves_the_vm_running() {
    let Some(lost) = Lost::new("sigterm_leaves_the_vm_running") else { return };
    let mut home = lost.home("home");
    let mut slow = home.command(&["--rate-limit", "65536"]);
    let child = slow.stderr(Stdio::piped()).spawn().unwrap();
    eventually("the guest runs", || home.monitor().is_some_and(|mut q| home.write(&mut q)));
    signal(child.id() as i32, libc::SIGTERM);
    let out = child.wait_with_output().unwrap();
    assert_eq!(out.status.code(), Some(130), "{}", stderr(&out));
    assert!(home.write(&mut home.monitor().unwrap()), "the guest does not run");
    refused_by_the_mark(&lost);
    refused_in_copies(&home);
    // The new limit is that of the jobs that are at work.
    assert!(home.run(&["--rate-limit", "0"]).status.success());
    home.check("after SIGTERM");
    assert!(marks(&lost).is_empty());
}

/// UEFI, with the variables that the VM had, and with empty ones.
#[test]
fn firmware_and_its_variables_come_home_too() {
    const CODE: &str = "/usr/share/OVMF/OVMF_CODE_4M.fd";
    const VARS: &str = "/usr/share/OVMF/OVMF_VARS_4M.fd";
    let test = "firmware_and_its_variables_come_home_too";
    if !have(test, &[CODE, VARS]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let vars = dir.path().join("vars.fd");
    std::fs::copy(VARS, &vars).unwrap();
    let flash = |unit: u32, more: &str, file: &Path| {
        format!("if=pflash,unit={unit},format=raw{more},file={}", file.display())
    };
    let (code, own) = (flash(0, ",readonly=on", Path::new(CODE)), flash(1, "", &vars));
    let more = ["-drive", code.as_str(), "-drive", own.as_str()];
    let Some(lost) = Lost::with(test, &more) else { return };
    for (name, more, file) in
        [("own", &[][..], "vars.fd.qcow2"), ("bios", &["--bios"][..], ""), ("none", &[][..], "")]
    {
        let mut home = lost.home(name);
        let points = FILES.map(|f| format!("{f}/latest"));
        // Without its point nothing is known of the variables.
        let named: Vec<&str> = match name {
            "none" => points.iter().map(String::as_str).collect(),
            _ => Vec::new(),
        };
        let child = home.command(&[more, named.as_slice()].concat()).spawn().unwrap();
        write_while(&mut home, child, name);
        let nodes = home.monitor().unwrap().execute("query-named-block-nodes", json!({}));
        let vars = nodes.as_array().unwrap().iter().find(|n| n["node-name"] == "vars").cloned();
        let wanted = match name {
            "own" => Some(home.path.join(file)),
            "none" => Some(home.path.join("efi-vars.fd")),
            _ => None,
        };
        let found = vars.map(|v| PathBuf::from(v["file"].as_str().unwrap()));
        assert_eq!(found, wanted, "{name}");
        home.check(name);
        if let Some(file) = wanted {
            let format = if name == "own" { "qcow2" } else { "raw" };
            // What begins a firmware volume.
            assert_eq!(&bytes(&file, format)[40..44], b"_FVH", "{name}");
        }
    }
}

/// The first backup afterwards, with a walk over the whole disk that must find nothing more than the bitmap names.
#[test]
fn the_first_backup_after_it_is_an_inc_where_that_is_right() {
    let test = "the_first_backup_after_it_is_an_inc_where_that_is_right";
    let Some(lost) = Lost::new(test) else { return };
    let mut home = lost.home("home");
    let child = home.command(&[]).spawn().unwrap();
    write_while(&mut home, child, "first");
    let qmp = home.socket().unwrap();
    let more = vec!["--progress".into(), "none".into()];
    let caller = Caller { qmp, state: home.state(), target: lost.target(), more };
    let said = caller.must("auto");
    // One disk had a base image, which nothing tells of any more.
    assert!(said.contains("backing file"), "{said}");
    for (file, expect) in FILES.iter().zip(&home.expect) {
        let newest = points(&caller, file).pop().unwrap();
        let name = newest.file_name().unwrap().to_str().unwrap();
        let level = if *file == FILES[0] { "FULL-" } else { "INC-" };
        assert!(name.starts_with(level), "{file}: {name}: {said}");
        assert_eq!(first_difference(&point(&caller, file, &newest), expect), None, "{file}");
    }
    // And the next one of both.
    home.write(&mut home.monitor().unwrap());
    caller.must("inc");
    for (file, expect) in FILES.iter().zip(&home.expect) {
        let newest = points(&caller, file).pop().unwrap();
        assert_eq!(first_difference(&point(&caller, file, &newest), expect), None, "{file}");
    }
}

/// A crash in between: what was written is not in any bitmap, and a FULL follows.
#[test]
fn after_a_crash_of_qemu_the_next_backup_is_a_full() {
    let Some(lost) = Lost::new("after_a_crash_of_qemu_the_next_backup_is_a_full") else { return };
    let mut home = lost.home("home");
    let mut child = stopped(home.command(&[]), "waiting", &lost.m.path("err"));
    assert!(home.write(&mut home.monitor().unwrap()));
    home.kill_qemu();
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(home.run(&[]).status.success());
    let qmp = home.socket().unwrap();
    let more = vec!["--progress".into(), "none".into()];
    let caller = Caller { qmp, state: home.state(), target: lost.target(), more };
    let said = caller.must("auto");
    // Its bitmap was never written to the image, and this state folder knows of no run.
    assert!(said.contains("taking a FULL"), "{said}");
    // Without that bitmap nothing proves which disks they are: they get folders of their own ('link-disk' joins them).
    let all = std::fs::read_dir(lost.target()).unwrap().flatten();
    let mut new: Vec<String> = all.map(|e| e.file_name().into_string().unwrap()).collect();
    new.retain(|n| !FILES.contains(&n.as_str()) && !points(&caller, n).is_empty());
    new.sort();
    assert_eq!(new.len(), 2, "{new:?}");
    for (file, expect) in new.iter().zip(&home.expect) {
        let newest = points(&caller, file).pop().unwrap();
        assert!(newest.file_name().unwrap().to_str().unwrap().starts_with("FULL-"), "{said}");
        assert_eq!(first_difference(&point(&caller, file, &newest), expect), None, "{file}");
    }
}

#[test]
fn a_full_storage_stops_the_guest_and_it_goes_on_when_there_is_room() {
    let test = "a_full_storage_stops_the_guest_and_it_goes_on_when_there_is_room";
    if !is_root(test) {
        return;
    }
    let Some(lost) = Lost::new(test) else { return };
    let mut home = lost.home("home");
    std::fs::create_dir(&home.path).unwrap();
    let _tmpfs = Guard::tmpfs("6M", &home.path);
    std::fs::set_permissions(&home.path, std::os::unix::fs::PermissionsExt::from_mode(0o700))
        .unwrap();
    let mut command = home.command(&[]);
    let mut child = tied(command.stderr(Stdio::piped())).spawn().unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stderr.take().unwrap()));
    let waits = lines.by_ref().any(|l| l.unwrap().contains("no space is left"));
    assert!(waits, "it does not say that it waits");
    run("mount", &["-o", "remount,size=64M", home.path.to_str().unwrap()]);
    let rest: Vec<String> = lines.map(|l| l.unwrap()).collect();
    assert!(child.wait().unwrap().success(), "{rest:?}");
    home.check("after there was room");
}

/// The printed commands, up to the end.
#[test]
fn the_printed_commands_do_the_same() {
    let Some(lost) = Lost::new("the_printed_commands_do_the_same") else { return };
    let mut home = lost.home("home");
    let out = home.run(&["--print"]);
    let text = String::from_utf8(out.stdout.clone()).unwrap();
    assert!(out.status.success() && !home.path.exists(), "{}", stderr(&out));
    std::fs::create_dir(&home.path).unwrap();
    let (told, script): (Vec<&str>, Vec<&str>) = text.lines().partition(|l| l.starts_with('#'));
    let script = format!("set -e\n{} -display none -qmp stdio", script.join("\n"));
    let mut command = Command::new("sh");
    command.args(["-c", &script]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = tied(&mut command).spawn().unwrap();
    let (mut to, from) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    let mut answers = std::io::BufRead::lines(std::io::BufReader::new(from)).map(|l| {
        let value: Value = serde_json::from_str(&l.unwrap()).unwrap();
        value
    });
    let mut ask = |command: &str| {
        use std::io::Write;
        writeln!(to, "{command}").unwrap();
        let answer = answers.find(|a| !a["return"].is_null() || !a["error"].is_null()).unwrap();
        assert!(answer["error"].is_null(), "{command}: {answer}");
        answer["return"].clone()
    };
    ask(r#"{"execute": "qmp_capabilities"}"#);
    for command in told.iter().filter_map(|l| l.strip_prefix("# {")) {
        let command = format!("{{{command}");
        if command.contains("blockdev-reopen") {
            eventually("its job is pending", || {
                let jobs = ask(r#"{"execute": "query-jobs"}"#);
                jobs.as_array().unwrap().iter().any(|j| j["status"] == "pending")
            });
        }
        ask(&command);
    }
    eventually("all jobs are concluded", || {
        let jobs = ask(r#"{"execute": "query-jobs"}"#);
        jobs.as_array().unwrap().iter().all(|j| j["status"] == "concluded")
    });
    ask(r#"{"execute": "quit"}"#);
    child.wait().unwrap();
    home.expect = lost.m.expect.clone();
    home.compare("by hand");
}

#[test]
fn what_cannot_be_meant_is_refused() {
    let Some(lost) = Lost::new("what_cannot_be_meant_is_refused") else { return };
    let inside = lost.home("T/home");
    assert_eq!(inside.run(&[]).status.code(), Some(2));
    assert!(!inside.path.exists());
    let home = lost.home("home");
    let owner = home.run(&["--as-owner"]);
    assert!(owner.status.code() == Some(2) && stderr(&owner).contains("whoever calls"));
    // A file of somebody's stays as it is.
    std::fs::create_dir(&home.path).unwrap();
    std::fs::write(home.path.join(FILES[1]), "precious").unwrap();
    for _ in 0..2 {
        assert_eq!(home.run(&[]).status.code(), Some(4));
        assert_eq!(home.run(&["--print"]).status.code(), Some(4));
        assert_eq!(std::fs::read(home.path.join(FILES[1])).unwrap(), b"precious");
    }
    assert!(!home.path.join(FILES[0]).exists());
    // QEMU opens its images by their names, so nobody may exchange them.
    let open = lost.home("open");
    std::fs::create_dir(&open.path).unwrap();
    let everybody = std::os::unix::fs::PermissionsExt::from_mode(0o777);
    std::fs::set_permissions(&open.path, everybody).unwrap();
    assert_eq!(open.run(&[]).status.code(), Some(5));
    // What QEMU does not take is told in its words, and the next call begins anew.
    let mut wrong = lost.home("wrong");
    let out = wrong.run(&["--", "-device", "no-such-device"]);
    assert_eq!(out.status.code(), Some(14), "{}", stderr(&out));
    assert!(stderr(&out).contains("no-such-device"), "{}", stderr(&out));
    let child = wrong.command(&[]).spawn().unwrap();
    write_while(&mut wrong, child, "with right options");
    wrong.check("with right options");
    assert!(lost.files() == lost.before);
}
