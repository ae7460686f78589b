//! Set-ups that people have, and that the rules about whom to trust must leave working: folders of
//! others, group folders, links, users without root, devices, file systems that lack a lot.

use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::support::chains::{Backups, SIZE, TOOLS};
use crate::support::guard::{Guard, UNMOUNT};
use crate::support::mount::Mount;
use crate::support::process::{self, stderr};
use crate::support::tools::{have, run};

const FLEECEFS: &str = env!("CARGO_BIN_EXE_fleecefs");
/// Users without an entry in the user database.
const OWNER: u32 = 4_000_000;
const STRANGER: u32 = 4_000_001;

/// A backup directory that belongs to somebody, below a folder that everybody may enter, and the
/// program where everybody may run it.
struct Setup {
    top: tempfile::TempDir,
    points: Backups,
}

impl Setup {
    /// `None`, and the test says why, where it cannot be made.
    fn new(test: &str, owner: u32) -> Option<Self> {
        // SAFETY: cannot fail.
        if unsafe { libc::geteuid() } != 0 {
            println!("skipped: {test} needs root");
            return None;
        }
        if !have(test, &TOOLS) {
            return None;
        }
        let top = tempfile::tempdir().unwrap();
        mode(top.path(), 0o755);
        let points = Backups::new(1, 3, "", false);
        let setup = Setup { top, points };
        std::fs::create_dir(setup.path("home")).unwrap();
        setup.fill("home/b");
        // By another process: what another test forks meanwhile would have it open for writing.
        run("cp", &[FLEECEFS, &setup.text("fleecefs")]);
        give(&setup.path("home"), owner);
        Some(setup)
    }

    fn path(&self, below: &str) -> PathBuf {
        self.top.path().join(below)
    }

    /// A copy of the backup directory.
    fn fill(&self, below: &str) {
        let from = self.points.dir.path().to_str().unwrap();
        run("cp", &["-a", from, self.path(below).to_str().unwrap()]);
        mode(&self.path(below), 0o755);
    }

    /// Runs the program as `user`.
    fn run(&self, user: u32, args: &[&str]) -> Output {
        let mut command = Command::new(self.path("fleecefs"));
        command.args(args).uid(user).gid(user).env_remove("FLEECEFS_LOG").current_dir("/");
        command.output().unwrap()
    }

    fn must(&self, user: u32, args: &[&str]) -> Output {
        let out = self.run(user, args);
        assert!(out.status.success(), "{args:?}: {}", stderr(&out));
        out
    }

    fn text(&self, below: &str) -> String {
        self.path(below).to_str().unwrap().into()
    }
}

fn mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
}

fn give(path: &Path, owner: u32) {
    run("chown", &["-R", &format!("{owner}:{owner}"), path.to_str().unwrap()]);
}

/// The whole life of a directory: everything that reads it and everything that changes it.
fn whole_life(setup: &Setup, user: u32, options: &[&str], dir: &str, target: &str) -> Vec<String> {
    let mut told = Vec::new();
    let mut step = |args: &[&str]| {
        let out = setup.must(user, &[options, args].concat());
        told.push(stderr(&out));
    };
    step(&["verify", "--create", dir]);
    step(&["list", dir]);
    step(&["map", dir, "sda/latest"]);
    step(&["restore", dir, "sda/latest", target]);
    step(&["consolidate", dir, "sda", "--until", &setup.points.name(1)]);
    step(&["rebase", &format!("{dir}/sda")]);
    step(&["commit", &format!("{dir}/sda"), "--until", &setup.points.name(2)]);
    step(&["prune", "--keep-last", "1", dir]);
    step(&["verify", dir]);
    assert!(std::fs::read(target).unwrap() == *setup.points.truth.last().unwrap());
    setup.points.check(Path::new(dir), [3], "at the end");
    told
}

#[test]
fn root_works_on_a_folder_of_another_user_and_is_warned_once() {
    let test = "root_works_on_a_folder_of_another_user_and_is_warned_once";
    let Some(setup) = Setup::new(test, OWNER) else { return };
    let (dir, target) = (setup.text("home/b"), setup.text("restored"));
    let told = whole_life(&setup, 0, &[], &dir, &target);
    let warned = |text: &String| text.matches("belongs to user 4000000").count();
    // Not of list, map, restore and verify, which write nothing there.
    assert_eq!(
        told.iter().map(warned).collect::<Vec<_>>(),
        [1, 0, 0, 0, 1, 1, 1, 1, 0],
        "{told:?}"
    );
    let quiet = setup.must(0, &["-q", "prune", "--keep-last", "1", &dir]);
    assert_eq!(stderr(&quiet), "");
}

#[test]
fn as_owner_everything_is_done_with_his_rights_alone() {
    let test = "as_owner_everything_is_done_with_his_rights_alone";
    let Some(setup) = Setup::new(test, OWNER) else { return };
    let (dir, target) = (setup.text("home/b"), setup.text("home/restored"));
    let told = whole_life(&setup, 0, &["--as-owner"], &dir, &target);
    assert!(!told.concat().contains("belongs to"), "{told:?}");
    let mut todo = vec![setup.path("home")];
    while let Some(path) = todo.pop() {
        let meta = std::fs::symlink_metadata(&path).unwrap();
        assert_eq!(meta.uid(), OWNER, "{}", path.display());
        if meta.is_dir() {
            todo.extend(std::fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
        }
    }
    // Where the owner may not write, root does not either.
    let out = setup.run(0, &["--as-owner", "restore", &dir, "sda/latest", &setup.text("outside")]);
    assert_eq!(out.status.code(), Some(5), "{}", stderr(&out));
    // A backup keeps its state where the owner may write, and has only his way to QEMU.
    let state = setup.text("state");
    let backup = ["--as-owner", "backup", "--level", "full", "--target", &dir];
    let more = ["--qmp", "/nonexistent/socket", "--state-dir", &state];
    let out = setup.run(0, &[&backup[..], &more].concat());
    assert_eq!(out.status.code(), Some(3), "{}", stderr(&out));
    let own = std::fs::metadata(setup.path("state.as-4000000")).unwrap();
    assert_eq!((own.uid(), own.mode() & 0o777), (OWNER, 0o700));
    assert!(!Path::new(&state).exists());
    // Nobody but root becomes somebody else.
    let out = setup.run(STRANGER, &["--as-owner", "list", &dir]);
    assert_eq!(out.status.code(), Some(5), "{}", stderr(&out));
    // And there is nobody to become where it is root's.
    setup.fill("roots");
    let out = setup.must(0, &["--as-owner", "list", &setup.text("roots")]);
    assert!(stderr(&out).contains("belongs to root"), "{}", stderr(&out));
    let out = setup.run(0, &["--as-owner", "umount", &dir]);
    assert_eq!(out.status.code(), Some(2), "{}", stderr(&out));
}

#[test]
fn as_owner_roots_group_is_left_behind() {
    let test = "as_owner_roots_group_is_left_behind";
    let Some(setup) = Setup::new(test, OWNER) else { return };
    if !have(test, &["/dev/fuse"]) {
        return;
    }
    run("chgrp", &["-R", "0", &setup.text("home")]);
    let mount = Mount::with(&setup.path("home/b"), &["--as-owner"]);
    let pid = process::server_pid(mount.path());
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let of = |name: &str| {
        let line = text.lines().find_map(|l| l.strip_prefix(name)).unwrap();
        line.split_whitespace().map(str::to_string).collect::<Vec<_>>()
    };
    assert_eq!(of("Uid:"), ["4000000"; 4]);
    assert_eq!(of("Gid:"), ["65534"; 4]);
    assert!(of("Groups:").is_empty(), "{:?}", of("Groups:"));
}

#[test]
fn a_user_without_root_works_in_his_own_folder() {
    let Some(setup) = Setup::new("a_user_without_root_works_in_his_own_folder", OWNER) else {
        return;
    };
    let told = whole_life(&setup, OWNER, &[], &setup.text("home/b"), &setup.text("home/restored"));
    assert!(!told.concat().contains("belongs to"), "{told:?}");
}

#[test]
fn a_group_folder_is_worked_in_and_warned_of() {
    let Some(setup) = Setup::new("a_group_folder_is_worked_in_and_warned_of", 0) else { return };
    for below in ["home/b", "home/b/sda"] {
        chown(setup.path(below), Some(0), Some(OWNER)).unwrap();
        mode(&setup.path(below), 0o2770);
    }
    let told = whole_life(&setup, 0, &[], &setup.text("home/b"), &setup.text("restored"));
    assert!(told[0].contains("users may write there"), "{told:?}");
}

#[test]
fn a_linked_top_directory_is_followed_if_the_link_is_ones_own() {
    let test = "a_linked_top_directory_is_followed_if_the_link_is_ones_own";
    let Some(setup) = Setup::new(test, OWNER) else { return };
    symlink("home", setup.path("backups")).unwrap();
    whole_life(&setup, 0, &[], &setup.text("backups/b"), &setup.text("restored"));

    setup.fill("home/second");
    give(&setup.path("home/second"), OWNER);
    symlink("second", setup.path("home/his")).unwrap();
    std::os::unix::fs::lchown(setup.path("home/his"), Some(OWNER), Some(OWNER)).unwrap();
    whole_life(&setup, OWNER, &[], &setup.text("home/his"), &setup.text("home/again"));
    setup.must(0, &["list", &setup.text("home/his")]);

    // A link of his to what is not his leads root nowhere, whatever the path stands for.
    setup.fill("roots");
    let bad = setup.path("home/bad");
    symlink("../roots", &bad).unwrap();
    std::os::unix::fs::lchown(&bad, Some(OWNER), Some(OWNER)).unwrap();
    let (bad, good) = (setup.text("home/bad"), setup.text("roots"));
    let log = format!("{bad}/log");
    for args in [
        &["list", &bad][..],
        &["prune", "--keep-last", "1", &bad],
        &["restore", &good, "sda/latest", &format!("{bad}/x")],
        &["restore", &good, "--run", "1700000000", "--to", &format!("{bad}/x")],
        &["merge", &format!("{good}/sda"), &format!("{bad}/x")],
        &["mount", &good, &bad],
        &["mount", &good, &setup.text("home"), "--log-file", &log],
        &["man", &bad],
        &["recover", "--qmp", "/nonexistent", "--state-dir", &bad],
    ] {
        let out = setup.run(0, args);
        assert_eq!(out.status.code(), Some(11), "{args:?}: {}", stderr(&out));
        assert!(stderr(&out).contains("symbolic link of another user"), "{}", stderr(&out));
    }
    let left = std::fs::read_dir(setup.path("roots")).unwrap().count();
    assert_eq!(left, 1, "something was written");
}

#[test]
fn a_restore_target_may_be_a_link_to_a_device() {
    let test = "a_restore_target_may_be_a_link_to_a_device";
    if !have(test, &["losetup", "/dev/loop-control"]) {
        return;
    }
    let Some(setup) = Setup::new(test, 0) else { return };
    run("truncate", &["-s", &(2 * SIZE).to_string(), &setup.text("disk")]);
    let guard = Guard::attach("", &setup.path("disk"));
    let device = guard.made();
    // As /dev/vg/lv is.
    symlink(device, setup.path("lv")).unwrap();
    setup.must(0, &["restore", &setup.text("home/b"), "sda/latest", &setup.text("lv"), "--yes"]);
    let bytes = std::fs::read(device).unwrap();
    assert!(bytes[..SIZE as usize] == *setup.points.truth[3]);
    assert!(setup.path("lv").is_symlink());
}

#[test]
fn standard_output_is_no_path() {
    let Some(setup) = Setup::new("standard_output_is_no_path", 0) else { return };
    for target in ["-", "/dev/stdout", "/proc/self/fd/1"] {
        let out = setup.must(0, &["restore", &setup.text("home/b"), "sda/latest", target]);
        assert!(out.stdout == setup.points.truth[3], "{target}");
    }
}

#[test]
fn a_state_folder_that_others_may_change_is_refused() {
    let Some(setup) = Setup::new("a_state_folder_that_others_may_change_is_refused", OWNER) else {
        return;
    };
    std::fs::create_dir(setup.path("open")).unwrap();
    mode(&setup.path("open"), 0o777);
    for state in [setup.text("home"), setup.text("open")] {
        for verb in [&["recover"][..], &["cleanup"], &["cancel"], &["info", "status"]] {
            let args = [verb, &["--qmp", "/nonexistent", "--state-dir", &state]].concat();
            let out = setup.run(0, &args);
            assert_eq!(out.status.code(), Some(5), "{args:?}: {}", stderr(&out));
            assert!(stderr(&out).contains("not safe here"), "{}", stderr(&out));
        }
    }
}

/// The lines of `/proc/PID/status` that say what a process may do.
fn rights(pid: &str) -> String {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let lines = text.lines().filter(|l| {
        ["Uid", "Gid", "CapEff", "CapPrm", "CapBnd", "NoNewPrivs"]
            .iter()
            .any(|n| l.split(':').next() == Some(n))
    });
    lines.map(|l| l.split_whitespace().collect::<Vec<_>>().join(" ") + "\n").collect()
}

/// What each thread of a process may do.
fn all_rights(pid: i32) -> Vec<String> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    threads
        .map(|t| rights(&format!("{pid}/task/{}", t.unwrap().file_name().to_str().unwrap())))
        .collect()
}

#[test]
fn the_process_that_serves_roots_mount_can_only_read() {
    let test = "the_process_that_serves_roots_mount_can_only_read";
    let Some(setup) = Setup::new(test, OWNER) else { return };
    if !have(test, &["/dev/fuse"]) {
        return;
    }
    // Even what nobody but its owner may read.
    mode(&setup.path("home"), 0o700);
    mode(&setup.path("home/b/sda"), 0o700);
    let mount = Mount::new(&setup.path("home/b"));
    let pid = process::server_pid(mount.path());
    let all = all_rights(pid);
    assert!(all.len() > 3, "{all:?}");
    for rights in all {
        // CAP_DAC_READ_SEARCH is number 2.
        for line in ["CapPrm: 0000000000000004", "CapEff: 0000000000000004", "NoNewPrivs: 1"] {
            assert!(rights.contains(line), "{rights}");
        }
        assert!(rights.contains("CapBnd: 0000000000000000"), "{rights}");
    }
    let point = mount.point("sda", &setup.points.files[3]);
    assert!(std::fs::read(point).unwrap() == setup.points.truth[3]);
}

#[test]
fn a_mount_as_owner_is_served_by_him() {
    let test = "a_mount_as_owner_is_served_by_him";
    let Some(setup) = Setup::new(test, OWNER) else { return };
    if !have(test, &["/dev/fuse"]) {
        return;
    }
    let mount = Mount::with(&setup.path("home/b"), &["--as-owner"]);
    let pid = process::server_pid(mount.path());
    for rights in all_rights(pid) {
        assert!(rights.contains("Uid: 4000000 4000000 4000000 4000000"), "{rights}");
        assert!(rights.contains("Gid: 4000000 4000000 4000000 4000000"), "{rights}");
        assert!(rights.contains("CapEff: 0000000000000000"), "{rights}");
        assert!(rights.contains("NoNewPrivs: 1"), "{rights}");
    }
    let point = mount.point("sda", &setup.points.files[3]);
    assert!(std::fs::read(point).unwrap() == setup.points.truth[3]);
    // Root may read this, and the owner may not: so it is no backup of his.
    let closed = setup.points.name(1);
    chown(setup.path("home/b/sda").join(&closed), Some(0), Some(0)).unwrap();
    mode(&setup.path("home/b/sda").join(&closed), 0o600);
    let other = Mount::with(&setup.path("home/b"), &["--as-owner"]);
    assert!(!other.point("sda", &setup.points.files[1]).exists());
}

#[test]
fn a_server_that_crashed_leaves_no_dead_mount() {
    let test = "a_server_that_crashed_leaves_no_dead_mount";
    let Some(setup) = Setup::new(test, 0) else { return };
    if !have(test, &["/dev/fuse"]) {
        return;
    }
    let mount = Mount::new(&setup.path("home/b"));
    let pid = process::server_pid(mount.path());
    process::signal(pid, libc::SIGKILL);
    process::eventually("that it is unmounted", || !process::is_mounted(mount.path()));
    // And one whose other process was killed is not served on without it.
    let mount = Mount::new(&setup.path("home/b"));
    let pid = process::server_pid(mount.path());
    process::signal(parent(pid), libc::SIGKILL);
    process::eventually("the end of the server", || process::is_gone(pid));
}

fn parent(pid: i32) -> i32 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|l| l.strip_prefix("PPid:")).unwrap();
    line.trim().parse().unwrap()
}

/// Lets the system refuse what shares and older kernels do not have: openat2, O_TMPFILE, renameat2,
/// flock, copy_file_range. (Not fsync of folders alone, which this cannot tell apart.)
fn refuse_all_that_is_new() -> std::io::Result<()> {
    use libc::{BPF_ABS, BPF_ALU, BPF_AND, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W};
    let step =
        |code: u32, k: u32, jt: u8, jf: u8| libc::sock_filter { code: code as u16, jt, jf, k };
    let load = |offset| step(BPF_LD | BPF_W | BPF_ABS, offset, 0, 0);
    let errno = |e: i32| step(BPF_RET | BPF_K, libc::SECCOMP_RET_ERRNO | e as u32, 0, 0);
    let mut code = vec![load(0)];
    for (call, e) in [
        (libc::SYS_openat2, libc::ENOSYS),
        (libc::SYS_renameat2, libc::EINVAL),
        (libc::SYS_flock, libc::ENOLCK),
        (libc::SYS_copy_file_range, libc::ENOSYS),
    ] {
        code.extend([step(BPF_JMP | BPF_JEQ | BPF_K, call as u32, 0, 1), errno(e)]);
    }
    // openat with O_TMPFILE, which contains O_DIRECTORY, in its third argument.
    code.extend([
        step(BPF_JMP | BPF_JEQ | BPF_K, libc::SYS_openat as u32, 0, 4),
        load(32),
        step(BPF_ALU | BPF_AND | BPF_K, libc::O_TMPFILE as u32, 0, 0),
        step(BPF_JMP | BPF_JEQ | BPF_K, libc::O_TMPFILE as u32, 0, 1),
        errno(libc::EOPNOTSUPP),
        step(BPF_RET | BPF_K, libc::SECCOMP_RET_ALLOW, 0, 0),
    ]);
    let filter = libc::sock_fprog { len: code.len() as u16, filter: code.as_mut_ptr() };
    // SAFETY: the program lives through the call.
    let done = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            | libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter)
    };
    if done == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

#[test]
fn a_share_that_has_none_of_what_is_new_is_worked_on() {
    let Some(setup) = Setup::new("a_share_that_has_none_of_what_is_new_is_worked_on", 0) else {
        return;
    };
    let (dir, target) = (setup.text("home/b"), setup.text("restored"));
    for args in [
        &["verify", "--create", &dir][..],
        &["list", &dir],
        &["restore", &dir, "sda/latest", &target],
        &["consolidate", &dir, "sda", "--until", &setup.points.name(1)],
        &["commit", &format!("{dir}/sda"), "--until", &setup.points.name(2)],
        &["prune", "--keep-last", "1", &dir],
        &["verify", &dir],
    ] {
        let mut command = Command::new(FLEECEFS);
        // SAFETY: system calls, and memory that this process has alone after the fork.
        unsafe { command.args(args).pre_exec(refuse_all_that_is_new) };
        let out = command.output().unwrap();
        assert!(out.status.success(), "{args:?}: {}", stderr(&out));
    }
    assert!(std::fs::read(&target).unwrap() == setup.points.truth[3]);
    setup.points.check(Path::new(&dir), [3], "at the end");
}

#[test]
fn a_target_on_a_fuse_file_system_is_worked_on() {
    let test = "a_target_on_a_fuse_file_system_is_worked_on";
    if !have(test, &["bindfs", "fusermount3", "/dev/fuse"]) {
        return;
    }
    let Some(setup) = Setup::new(test, 0) else { return };
    std::fs::create_dir(setup.path("bound")).unwrap();
    let undo = r#"fusermount3 -u -z "$1""#;
    let _guard =
        Guard::new(r#"bindfs "$2" "$1""#, undo, &[&setup.path("bound"), &setup.path("home")]);
    whole_life(&setup, 0, &[], &setup.text("bound/b"), &setup.text("bound/restored"));
}

#[test]
fn a_directory_on_an_overlay_is_worked_on() {
    let test = "a_directory_on_an_overlay_is_worked_on";
    let Some(setup) = Setup::new(test, 0) else { return };
    for name in ["lower", "upper", "work", "over"] {
        std::fs::create_dir(setup.path(name)).unwrap();
    }
    // A lower layer on another file system: a file that is changed gets another inode there.
    let _lower = Guard::tmpfs("50%", &setup.path("lower"));
    setup.fill("lower/b");
    let [lower, upper, work] = ["lower", "upper", "work"].map(|n| setup.text(n));
    let options = format!("-t overlay -o lowerdir={lower},upperdir={upper},workdir={work}");
    let over = Guard::try_mount(&options, Path::new("none"), &setup.path("over"));
    let _over = match over {
        Ok(over) => over,
        Err(said) => return println!("skipped: {test}: no overlay here: {said}"),
    };
    whole_life(&setup, 0, &[], &setup.text("over/b"), &setup.text("restored"));
}

/// Mounts `from` at `to` with the user ids shifted (mount_setattr(2)); an error where that is not to be
/// had.
fn mount_shifted(from: &Path, to: &Path, shift: u32) -> std::io::Result<()> {
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
    let mut holder = Command::new("unshare").args(["--user", "sleep", "60"]).spawn()?;
    let proc = PathBuf::from(format!("/proc/{}", holder.id()));
    let own = std::fs::read_link("/proc/self/ns/user")?;
    while std::fs::read_link(proc.join("ns/user"))? == own {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    for map in ["uid_map", "gid_map"] {
        std::fs::write(proc.join(map), format!("0 {shift} 65536"))?;
    }
    let users = std::fs::File::open(proc.join("ns/user"))?;
    holder.kill()?;
    holder.wait()?;
    let attributes: [u64; 4] = [libc::MOUNT_ATTR_IDMAP, 0, 0, users.as_raw_fd() as u64];
    let said =
        |result: i64| if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(result) };
    let [from, to] = [from, to].map(|p| std::ffi::CString::new(p.to_str().unwrap()).unwrap());
    // SAFETY: the strings end with a zero; the attributes are a struct mount_attr of 32 bytes.
    unsafe {
        let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC;
        let tree = said(libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, from.as_ptr(), flags))?;
        let tree = OwnedFd::from_raw_fd(tree as i32);
        let (fd, here) = (tree.as_raw_fd(), c"".as_ptr());
        let empty = libc::AT_EMPTY_PATH;
        said(libc::syscall(libc::SYS_mount_setattr, fd, here, empty, &attributes, 32))?;
        let at = (libc::AT_FDCWD, to.as_ptr());
        // 4: MOVE_MOUNT_F_EMPTY_PATH.
        said(libc::syscall(libc::SYS_move_mount, fd, here, at.0, at.1, 4))?;
    }
    Ok(())
}

/// Root is nobody there, and may write nothing: the owner may.
#[test]
fn on_an_id_mapped_mount_the_owner_does_all() {
    let test = "on_an_id_mapped_mount_the_owner_does_all";
    let Some(setup) = Setup::new(test, 0) else { return };
    std::fs::create_dir(setup.path("shifted")).unwrap();
    let shifted = setup.path("shifted");
    let _shifted = Guard::of(UNMOUNT, &[&shifted]);
    if let Err(e) = mount_shifted(&setup.path("home"), &shifted, OWNER) {
        println!("skipped: {test}: no id-mapped mount here: {e}");
        return;
    }
    let dir = setup.text("shifted/b");
    let out = setup.run(0, &["verify", "--create", &dir]);
    assert_eq!(out.status.code(), Some(5), "{}", stderr(&out));
    assert!(stderr(&out).contains("--as-owner"), "{}", stderr(&out));
    assert!(!setup.path("home/b/.fleecefs").exists());
    whole_life(&setup, 0, &["--as-owner"], &dir, &setup.text("shifted/restored"));
    let mine = std::fs::metadata(setup.path("home/b/.fleecefs")).unwrap();
    assert_eq!(mine.uid(), 0, "as it is on the disk");
}
