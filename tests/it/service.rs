//! The promise: a mount comes, goes and comes back, also when something went wrong; and what is
//! installed finds it.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use crate::support::guard::{Guard, tied};
use crate::support::mount::Mount;
use crate::support::process::{eventually, is_gone, is_mounted, server_pid, signal, stderr};
use crate::support::tools::have;

const FLEECEFS: &str = env!("CARGO_BIN_EXE_fleecefs");
const POINT: &str = "d/FULL-1-d.raw";

/// A backup directory with one raw FULL.
fn backups() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("d")).unwrap();
    std::fs::write(dir.path().join("d/FULL-1-d"), [7; 1 << 20]).unwrap();
    dir
}

fn fleecefs(args: &[&dyn AsRef<std::ffi::OsStr>]) -> Output {
    Command::new(FLEECEFS).args(args.iter().map(|a| a.as_ref())).output().unwrap()
}

/// A mount in the foreground, which ends with its guard whatever happens to the test.
struct Foreground {
    child: Child,
    /// Of what the child leaves if both are killed.
    _mount: Guard,
    at: tempfile::TempDir,
    /// Where it is mounted, if not there.
    elsewhere: Option<PathBuf>,
}

impl Foreground {
    fn start(args: impl FnOnce(&mut Command, &Path)) -> Self {
        let at = tempfile::tempdir().unwrap();
        let umount = r#""$1" umount --lazy "$2""#;
        let guard = Guard::of(umount, &[Path::new(FLEECEFS), at.path()]);
        let mut command = Command::new(FLEECEFS);
        args(&mut command, at.path());
        command.env("FLEECEFS_LOG", "info").stdout(Stdio::null()).stderr(Stdio::piped());
        Foreground {
            child: tied(&mut command).spawn().unwrap(),
            _mount: guard,
            at,
            elsewhere: None,
        }
    }

    fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }
}

impl Drop for Foreground {
    fn drop(&mut self) {
        // Both fail where it has ended as it should.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let at = self.elsewhere.as_deref().unwrap_or(self.at.path());
        let _ = Command::new(FLEECEFS).args(["umount", "--lazy"]).arg(at).output();
    }
}

#[test]
fn a_dead_mount_is_recognised_and_the_next_takes_its_place() {
    if !have("a_dead_mount_is_recognised_and_the_next_takes_its_place", &["/dev/fuse"]) {
        return;
    }
    let dir = backups();
    let mount = Mount::new(dir.path());
    let at = mount.path();
    let pid = server_pid(at);
    let held = std::fs::File::open(at.join(POINT)).unwrap();
    signal(pid, libc::SIGKILL);
    eventually("its end", || is_gone(pid));
    eventually("that it is dead", || {
        let error = std::fs::metadata(at).err().and_then(|e| e.raw_os_error());
        error == Some(libc::ENOTCONN)
    });
    // As a backup directory it is as dead.
    let elsewhere = tempfile::tempdir().unwrap();
    let out = fleecefs(&[&"mount", &at.join("."), &elsewhere.path()]);
    assert!(stderr(&out).contains("dead mount"), "{}", stderr(&out));
    let out = fleecefs(&[&"umount", &at]);
    let told = stderr(&out);
    assert_eq!(out.status.code(), Some(6), "{told}");
    assert!(told.contains("its server has ended"), "{told}");
    assert!(told.contains(&format!("process {}", std::process::id())), "{told}");
    // Also while somebody has a file of the dead one open.
    let out = fleecefs(&[&"mount", &dir.path(), &at]);
    assert!(out.status.success(), "{}", stderr(&out));
    assert!(stderr(&out).contains("dead mount"), "{}", stderr(&out));
    assert!(at.join(POINT).exists());
    assert!(held.read_at(&mut [0], 0).is_err());
    // One that lives is left alone.
    let out = fleecefs(&[&"mount", &dir.path(), &at]);
    assert_eq!(out.status.code(), Some(6), "{}", stderr(&out));
    assert!(stderr(&out).contains(&format!("fleecefs umount {}", at.display())));
}

/// Kills all processes of a mount, so that nobody takes it away.
fn kill_both(at: &Path) {
    let pid = server_pid(at);
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let parent = stat.rsplit_once(") ").unwrap().1.split(' ').nth(1).unwrap().to_string();
    let text = std::fs::read_to_string(format!("/proc/{parent}/cmdline")).unwrap_or_default();
    if text.starts_with(&format!("{FLEECEFS}\0mount\0")) {
        signal(parent.parse().unwrap(), libc::SIGKILL);
    }
    signal(pid, libc::SIGKILL);
    eventually("its end", || is_gone(pid));
    // The kernel may still remember the folder's attributes: stat(2) would not do.
    eventually("that it is dead", || {
        let error = std::fs::read_dir(at).err().and_then(|e| e.raw_os_error());
        error == Some(libc::ENOTCONN)
    });
}

#[test]
fn a_mount_that_has_just_died_is_recognised_also_through_a_link() {
    if !have("a_mount_that_has_just_died_is_recognised_also_through_a_link", &["/dev/fuse"]) {
        return;
    }
    let dir = backups();
    let mount = Mount::new(dir.path());
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(mount.path(), &link).unwrap();
    for at in [mount.path(), &link] {
        // The kernel remembers this for a second.
        std::fs::metadata(mount.path()).unwrap();
        kill_both(mount.path());
        let out = fleecefs(&[&"mount", &dir.path(), &at]);
        assert!(out.status.success(), "{}", stderr(&out));
        assert!(stderr(&out).contains("dead mount"), "{}", stderr(&out));
        assert!(mount.path().join(POINT).exists());
    }
    // Long after its death, when nothing is remembered any more.
    kill_both(mount.path());
    eventually("that it is forgotten", || std::fs::metadata(mount.path()).is_err());
    let out = fleecefs(&[&"mount", &dir.path(), &link]);
    assert!(out.status.success(), "{}", stderr(&out));
    assert!(mount.path().join(POINT).exists());
}

#[test]
fn a_mount_that_another_one_hides_is_not_there() {
    let test = "a_mount_that_another_one_hides_is_not_there";
    if !have(test, &["/dev/fuse", "mount", "umount"]) {
        return;
    }
    // SAFETY: cannot fail.
    if unsafe { libc::geteuid() } != 0 {
        println!("skipped: {test}: needs root");
        return;
    }
    let (dir, above) = (backups(), tempfile::tempdir().unwrap());
    let at = above.path().join("at");
    std::fs::create_dir(&at).unwrap();
    let run = |name: &str, args: &[&dyn AsRef<std::ffi::OsStr>]| {
        let out = Command::new(name).args(args.iter().map(|a| a.as_ref())).output().unwrap();
        assert!(out.status.success(), "{}", stderr(&out));
    };
    run(FLEECEFS, &[&"mount", &dir.path(), &at]);
    let pid = server_pid(&at);
    let hidden = Guard::tmpfs("50%", above.path());
    std::fs::create_dir(&at).unwrap();
    let again = fleecefs(&[&"mount", &dir.path(), &at]);
    let both = at.join(POINT).exists();
    let gone = fleecefs(&[&"umount", &at]);
    let none = fleecefs(&[&"umount", &at]);
    // One signal: it goes as soon as it can be reached.
    signal(pid, libc::SIGTERM);
    drop(hidden);
    eventually("its end", || is_gone(pid));
    assert!(!is_mounted(&at));
    assert!(again.status.success() && both, "{}", stderr(&again));
    assert!(gone.status.success(), "{}", stderr(&gone));
    assert_eq!(none.status.code(), Some(3), "{}", stderr(&none));
}

#[test]
fn a_third_signal_ends_a_detached_mount() {
    if !have("a_third_signal_ends_a_detached_mount", &["/dev/fuse"]) {
        return;
    }
    let dir = backups();
    let log = dir.path().join("log");
    let mut mount = Foreground::start(|command, at| {
        command.args(["mount", "--foreground", "--log-file"]).arg(&log).arg(dir.path()).arg(at);
    });
    let (pid, at) = (mount.pid(), mount.at.path().to_path_buf());
    let said = |text: &str| std::fs::read_to_string(&log).unwrap_or_default().matches(text).count();
    eventually("the mount", || said("is mounted at") == 1);
    let held = File::open(at.join(POINT)).unwrap();
    signal(pid, libc::SIGTERM);
    // Two signals that are pending at a time are one.
    eventually("that the first is seen", || said("unmounting") == 1);
    signal(pid, libc::SIGTERM);
    eventually("that it is detached", || !is_mounted(&at));
    held.read_exact_at(&mut [0; 16], 0).unwrap();
    signal(pid, libc::SIGTERM);
    assert_eq!(mount.child.wait().unwrap().code(), Some(130));
}

#[test]
fn an_idle_mount_inside_its_backup_directory_goes_away() {
    if !have("an_idle_mount_inside_its_backup_directory_goes_away", &["/dev/fuse"]) {
        return;
    }
    let dir = backups();
    let at = dir.path().join("points");
    std::fs::create_dir(&at).unwrap();
    // Looking for new points must not count as use, or this would never end.
    let mut mount = Foreground::start(|command, _| {
        let options = ["--foreground", "--idle-timeout=3", "--poll-interval=1"];
        command.arg("mount").args(options).arg(dir.path()).arg(&at);
    });
    mount.elsewhere = Some(at.clone());
    eventually("the mount", || at.join(POINT).exists());
    eventually("that it has ended", || mount.child.try_wait().unwrap().is_some());
    assert!(!is_mounted(&at));
}

#[test]
fn a_foreground_mount_logs_to_its_file() {
    if !have("a_foreground_mount_logs_to_its_file", &["/dev/fuse"]) {
        return;
    }
    let dir = backups();
    let log = dir.path().join("log");
    // The way in which mount.fuse calls a program, with a flag that is ours.
    let mut mount = Foreground::start(|command, at| {
        command.arg(dir.path()).arg(at).arg("-f");
        command.arg("-o").arg(format!("log_file={}", log.display()));
    });
    let text = || std::fs::read_to_string(&log).unwrap_or_default();
    eventually("the log", || text().contains("is mounted at"));
    signal(mount.pid(), libc::SIGTERM);
    assert!(mount.child.wait().unwrap().success());
    assert!(text().contains("is unmounted"), "{}", text());
    let mut rest = String::new();
    std::io::Read::read_to_string(mount.child.stderr.as_mut().unwrap(), &mut rest).unwrap();
    assert_eq!(rest, "");
}

#[test]
fn every_exit_code_is_explained() {
    let out = fleecefs(&[&"--help"]);
    let help = String::from_utf8_lossy(&out.stdout).into_owned();
    let codes = help.split("Exit codes:").nth(1).expect("exit codes in --help");
    let readme = std::fs::read_to_string(root("README.md")).unwrap();
    let readme = readme.split("## Exit codes").nth(1).expect("exit codes in README.md");
    let explained = |text: &str, code: u8| {
        let numbers = text.split(|c: char| !c.is_ascii_digit());
        numbers.filter_map(|n| n.parse().ok()).any(|n: u8| n == code)
    };
    for code in [0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 130] {
        assert!(explained(codes, code), "--help does not explain {code}");
        assert!(explained(readme, code), "README.md does not explain {code}");
    }
}

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// Runs contrib/install.sh into a folder.
fn install(dest: &Path, args: &[&str]) -> Output {
    Command::new(root("contrib/install.sh"))
        .args(args)
        .env("DESTDIR", dest)
        .env("BINARY", FLEECEFS)
        .env_remove("PREFIX")
        .output()
        .unwrap()
}

#[test]
fn what_is_installed_is_complete_and_finds_the_program() {
    let dest = tempfile::tempdir().unwrap();
    let out = install(dest.path(), &[]);
    assert!(out.status.success(), "{}", stderr(&out));
    let there = |path: &str| dest.path().join(path);
    assert_eq!(there("usr/local/bin/fleecefs").metadata().unwrap().mode() & 0o777, 0o755);
    for helper in ["mount.fleecefs", "mount.fuse.fleecefs"] {
        let target = std::fs::read_link(there("sbin").join(helper)).unwrap();
        assert_eq!(target, Path::new("/usr/local/bin/fleecefs"));
    }
    for file in [
        "share/man/man1/fleecefs.1",
        "share/man/man1/fleecefs-mount.1",
        "share/bash-completion/completions/fleecefs",
        "share/zsh/site-functions/_fleecefs",
        "share/fish/vendor_completions.d/fleecefs.fish",
        "lib/systemd/system/fleecefs@.service",
        "lib/systemd/system/fleecefs-backup.service",
        "lib/systemd/system/fleecefs-backup.timer",
        "share/doc/fleecefs/systemd/mnt-backups.mount",
        "share/doc/fleecefs/fleecefs.toml",
    ] {
        let path = there("usr/local").join(file);
        assert!(path.metadata().is_ok_and(|m| m.len() > 100), "{}", path.display());
    }
}

/// Everything below a folder, by name; with what links lead to.
fn names(dir: &Path) -> Vec<String> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        all.push(match std::fs::read_link(&path) {
            Ok(to) => format!("{} -> {}", path.display(), to.display()),
            Err(_) => path.display().to_string(),
        });
        if path.symlink_metadata().unwrap().is_dir() {
            all.extend(names(&path));
        }
    }
    all.sort();
    all
}

#[test]
fn what_was_installed_is_removed_and_nothing_else() {
    let dest = tempfile::tempdir().unwrap();
    let there = |path: &str| dest.path().join(path);
    let none = install(dest.path(), &["--uninstall"]);
    assert_eq!(none.status.code(), Some(3), "{}", stderr(&none));
    for folder in
        ["usr/local/share/man/man1", "etc/systemd/system/timers.target.wants", "etc/fleecefs"]
    {
        std::fs::create_dir_all(there(folder)).unwrap();
    }
    std::fs::write(there("usr/local/share/man/man1/fleecefsd.1"), "another program's").unwrap();
    std::fs::write(there("etc/fleecefs/fleecefs.toml"), "").unwrap();
    let others = there("etc/systemd/system/timers.target.wants/other.timer");
    std::os::unix::fs::symlink("/usr/local/lib/systemd/system/other.timer", others).unwrap();
    let before = names(dest.path());
    // Twice: the second finds folders that the first has made.
    for _ in 0..2 {
        let out = install(dest.path(), &[]);
        assert!(out.status.success(), "{}", stderr(&out));
    }
    assert!(names(dest.path()).len() > before.len() + 40);
    // As 'systemctl enable' does.
    let enabled = there("etc/systemd/system/timers.target.wants/fleecefs-backup.timer");
    let unit = "/usr/local/lib/systemd/system/fleecefs-backup.timer";
    std::os::unix::fs::symlink(unit, enabled).unwrap();
    // Lines that somebody has written into the list lead nowhere else.
    let list = there("usr/local/share/doc/fleecefs/installed");
    let lines =
        "file /etc/fleecefs/fleecefs.toml\nfile /usr/local/../../etc/fleecefs/fleecefs.toml\n";
    std::fs::write(&list, std::fs::read_to_string(&list).unwrap() + lines).unwrap();
    let out = install(dest.path(), &["--uninstall"]);
    assert!(out.status.success(), "{}", stderr(&out));
    assert_eq!(names(dest.path()), before);
}

#[test]
fn what_version_0_1_0_has_installed_is_removed_and_links_of_a_package_stay() {
    let dest = tempfile::tempdir().unwrap();
    let there = |path: &str| dest.path().join(path);
    std::fs::create_dir_all(there("usr/local/share/man/man1")).unwrap();
    let out = install(dest.path(), &[]);
    assert!(out.status.success(), "{}", stderr(&out));
    // It wrote no list, and had one unit.
    std::fs::remove_file(there("usr/local/share/doc/fleecefs/installed")).unwrap();
    std::fs::remove_file(there("usr/local/share/doc/fleecefs/fleecefs.toml")).unwrap();
    let units = there("usr/local/lib/systemd/system");
    for entry in std::fs::read_dir(&units).unwrap().map(|e| e.unwrap()) {
        if entry.file_name() != "fleecefs@.service" {
            std::fs::remove_file(entry.path()).unwrap();
        }
    }
    // A package was installed over it, which has its helper in the same place.
    let helper = there("sbin/mount.fuse.fleecefs");
    std::fs::remove_file(&helper).unwrap();
    std::os::unix::fs::symlink("../bin/fleecefs", &helper).unwrap();
    let out = install(dest.path(), &["--uninstall"]);
    assert!(out.status.success(), "{}", stderr(&out));
    let left = names(dest.path());
    let files: Vec<_> = left.iter().filter(|n| !Path::new(n).is_dir()).collect();
    assert_eq!(files.len(), 1, "{left:?}");
    assert!(files[0].ends_with("sbin/mount.fuse.fleecefs -> ../bin/fleecefs"), "{left:?}");
    assert!(!there("usr/local/share/doc/fleecefs").exists());
}
