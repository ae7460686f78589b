//! The promise: systemd takes the units as they are, and they say what a backup, a mount and a verification need.

use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::support::guard::{Guard, tied};
use crate::support::process::{signal, stderr};
use crate::support::tools::have;

const FLEECEFS: &str = env!("CARGO_BIN_EXE_fleecefs");

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("contrib/systemd")
}

/// The names of all units, sorted.
fn units() -> Vec<String> {
    let list = std::fs::read_dir(folder()).unwrap().map(|e| e.unwrap().file_name());
    let mut names: Vec<String> = list.map(|n| n.into_string().unwrap()).collect();
    names.retain(|n| n != "README.md");
    names.sort();
    assert!(names.len() > 8, "{names:?}");
    names
}

fn text(unit: &str) -> String {
    std::fs::read_to_string(folder().join(unit)).unwrap()
}

/// Its settings, without comments and sections.
fn settings(unit: &str) -> Vec<String> {
    let is_setting = |l: &&str| !l.is_empty() && !l.starts_with(['#', '[']);
    text(unit).lines().filter(is_setting).map(str::to_string).collect()
}

/// The units in a folder of their own, with the program of this build: systemd looks for commands where programs are
/// installed.
fn with_program() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for unit in units() {
        let program = |line: &str| match line.split_once('=') {
            Some((key, command)) if key.starts_with("Exec") => {
                let (dash, command) = match command.strip_prefix('-') {
                    Some(rest) => ("-", rest),
                    None => ("", command),
                };
                let rest = command.strip_prefix("fleecefs ").map(|r| format!("{FLEECEFS} {r}"));
                format!("{key}={dash}{}\n", rest.unwrap_or(command.to_string()))
            }
            _ => format!("{line}\n"),
        };
        let text: String = text(&unit).lines().map(program).collect();
        std::fs::write(dir.path().join(unit), text).unwrap();
    }
    dir
}

#[test]
fn systemd_has_nothing_to_say_about_the_units() {
    if !have("systemd_has_nothing_to_say_about_the_units", &["systemd-analyze"]) {
        return;
    }
    let dir = with_program();
    for unit in units() {
        let out = Command::new("systemd-analyze")
            .args(["verify", "--man=no", "--recursive-errors=one"])
            .arg(dir.path().join(&unit))
            .output()
            .unwrap();
        assert!(out.status.success() && out.stderr.is_empty(), "{unit}: {}", stderr(&out));
    }
    // It looks: a setting that is misspelt is told.
    let wrong = dir.path().join("wrong.service");
    std::fs::write(&wrong, format!("[Service]\nTyp=oneshot\nExecStart={FLEECEFS}\n")).unwrap();
    let out = Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&wrong).output();
    assert!(stderr(&out.unwrap()).contains("Typ"));
}

/// As `systemd-analyze security` counts it, in tenths: what reads images is shut in; a backup runs commands of its
/// administrator's, and a mount is for everybody to see, so that both stay in the host's own mount namespace.
#[test]
fn the_services_are_hardened_as_far_as_it_holds() {
    if !have("the_services_are_hardened_as_far_as_it_holds", &["systemd-analyze"]) {
        return;
    }
    let dir = with_program();
    for (unit, most) in [
        ("fleecefs-backup.service", 65),
        ("fleecefs-backup@.service", 65),
        ("fleecefs-verify.service", 20),
        ("fleecefs-verify@.service", 20),
        ("fleecefs@.service", 57),
    ] {
        let out = Command::new("systemd-analyze")
            .args(["security", "--offline=yes", "--no-pager", &format!("--threshold={most}")])
            .arg(dir.path().join(unit))
            .output()
            .unwrap();
        let table = String::from_utf8_lossy(&out.stdout).into_owned();
        assert!(out.status.success(), "{unit}: {table}{}", stderr(&out));
        assert!(table.contains("Overall exposure level"), "{unit}: {table}");
    }
}

/// A unit with a mount namespace of its own would mount where nobody else sees it: points, and what commands before a
/// backup mount.
#[test]
fn mounts_and_backups_are_in_the_hosts_namespace() {
    for unit in ["fleecefs@.service", "fleecefs-backup.service", "fleecefs-backup@.service"] {
        for line in settings(unit) {
            let apart = ["Protect", "Private", "ReadOnly", "ReadWrite", "Inaccessible", "Bind"];
            assert!(!apart.iter().any(|a| line.starts_with(a)), "{unit}: {line}");
            let apart = ["Root", "DynamicUser", "TemporaryFile", "ProcSubset", "MountFlags"];
            assert!(!apart.iter().any(|a| line.starts_with(a)), "{unit}: {line}");
        }
    }
    // A mount comes back after it was killed.
    let settings = settings("fleecefs@.service");
    let place = |line: &str| settings.iter().position(|l| l == line);
    let pre = place("ExecStartPre=-fleecefs umount --lazy /mnt/%i");
    assert!(pre.is_some() && pre < place("ExecStartPre=mkdir -p /mnt/%i"));
    assert!(place("Restart=on-failure").is_some());
}

/// Whatever ends a backup, its watchdog must go on: it thaws and continues the guest.
#[test]
fn ending_a_backup_leaves_its_watchdog() {
    for unit in ["fleecefs-backup.service", "fleecefs-backup@.service"] {
        let settings = settings(unit);
        for line in ["KillMode=process", "Type=oneshot", "OOMPolicy=continue"] {
            assert!(settings.iter().any(|l| l == line), "{unit}: no {line}");
        }
        // While a guest is stopped it waits for this program.
        for line in &settings {
            let slow = ["Nice", "CPU", "IOScheduling", "IOWeight", "Memory", "LimitCPU"];
            assert!(!slow.iter().any(|s| line.starts_with(s)), "{unit}: {line}");
        }
    }
}

#[test]
fn what_runs_for_one_vm_is_set_as_what_runs_for_all() {
    let apart = ["Description", "ExecStart", "RequiresMountsFor", "After"];
    let common = |l: &String| !apart.iter().any(|a| l.starts_with(a));
    let of = |unit: &str| settings(unit).into_iter().filter(common).collect::<Vec<_>>();
    for name in ["fleecefs-backup", "fleecefs-verify"] {
        for kind in ["service", "timer"] {
            let (all, one) = (format!("{name}.{kind}"), format!("{name}@.{kind}"));
            assert_eq!(of(&all), of(&one), "{one}");
        }
    }
}

#[test]
fn units_are_explained_and_run_commands_that_exist() {
    let readme = text("README.md");
    let mut commands = 0;
    for unit in units() {
        assert!(readme.contains(&format!("`{unit}`")), "the README does not name {unit}");
        for line in settings(&unit) {
            let Some((_, command)) = line.split_once('=').filter(|(k, _)| k.starts_with("Exec"))
            else {
                continue;
            };
            let Some(words) = command.trim_start_matches('-').strip_prefix("fleecefs ") else {
                continue;
            };
            // A word that it does not know is told before help is given.
            let out = Command::new(FLEECEFS).args(words.split(' ')).arg("--help").output().unwrap();
            assert!(out.status.success(), "{unit}: {command}: {}", stderr(&out));
            commands += 1;
        }
    }
    assert!(commands >= 5, "{commands}");
}

/// What a service tells on the socket of its service manager.
fn told(socket: &UnixDatagram) -> String {
    socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let mut bytes = [0; 4096];
    let len = socket.recv(&mut bytes).expect("nothing was told");
    String::from_utf8(bytes[..len].to_vec()).unwrap()
}

#[test]
fn a_mount_tells_systemd_when_it_is_ready() {
    if !have("a_mount_tells_systemd_when_it_is_ready", &["/dev/fuse"]) {
        return;
    }
    let (dir, at) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    std::fs::write(dir.path().join("FULL-1-d"), [7; 4096]).unwrap();
    let path = dir.path().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    let _guard = Guard::of(r#""$1" umount --lazy "$2""#, &[Path::new(FLEECEFS), at.path()]);
    let mut command = Command::new(FLEECEFS);
    command.args(["mount", "--foreground"]).arg(dir.path()).arg(at.path());
    command.env("NOTIFY_SOCKET", &path).stderr(Stdio::null());
    let mut child = tied(&mut command).spawn().unwrap();
    let told = told(&socket);
    let is_there = at.path().read_dir().unwrap().count() > 0;
    signal(i32::try_from(child.id()).unwrap(), libc::SIGTERM);
    child.wait().unwrap();
    assert_eq!(told, "READY=1");
    assert!(is_there);
}

#[test]
fn a_verification_tells_systemd_what_it_is_at() {
    let dir = tempfile::tempdir().unwrap();
    // Two names of a folder would be two lines if they were told as they are.
    let backups = dir.path().join("a\nb");
    std::fs::create_dir(&backups).unwrap();
    std::fs::write(backups.join("FULL-1-d"), [7; 4096]).unwrap();
    let socket = UnixDatagram::bind(dir.path().join("notify")).unwrap();
    let out = Command::new(FLEECEFS)
        .arg("verify")
        .arg(&backups)
        .env("NOTIFY_SOCKET", dir.path().join("notify"))
        .env("FLEECEFS_STATE_DIR", dir.path().join("state"))
        .output()
        .unwrap();
    assert_eq!(out.status.code(), Some(19), "{}", stderr(&out));
    let told = told(&socket);
    assert!(told.starts_with("STATUS=verifying /") && !told.contains('\n'), "{told:?}");
}
