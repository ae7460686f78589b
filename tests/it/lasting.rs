//! The promise: a mount lasts. Storage that does not answer, disks that are mounted late and kernels
//! that forget inodes do not end it.

use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::channel;
use std::time::Duration;

use crate::support::guard::Guard;
use crate::support::mount::Mount;
use crate::support::process::{Stopped, eventually, server_pid, state, status};
use crate::support::tools::have;

const SIZE: usize = 1 << 20;

/// A backup directory with so many raw disks.
fn backups(disks: usize) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for i in 0..disks {
        point(dir.path(), i);
    }
    dir
}

fn point(backups: &Path, i: usize) {
    let disk = backups.join(format!("vm{i}"));
    std::fs::create_dir(&disk).unwrap();
    std::fs::write(disk.join("FULL-1-a"), vec![i as u8 + 1; SIZE]).unwrap();
}

fn shown(mount: &Mount, i: usize) -> PathBuf {
    mount.path().join(format!("vm{i}/latest.raw"))
}

/// Readers that are killed when the test is over.
struct Readers(Vec<Child>);

impl Drop for Readers {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// `command` ends, and well. (If it waits for storage, it does so for ever: however busy the machine is, this is
/// enough.)
fn answers(command: &str) {
    let mut child = Command::new("timeout");
    let out = child.args(["60", "sh", "-c", command]).stdout(Stdio::null()).output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{command}: {} (124: it waited): {said}", out.status);
}

#[test]
fn names_answer_while_more_readers_than_threads_wait_for_storage() {
    let test = "names_answer_while_more_readers_than_threads_wait_for_storage";
    if !have(test, &["/dev/fuse", "timeout"]) {
        return;
    }
    let disks = 12;
    let dir = backups(disks);
    // Storage that can be stopped: a mount of ours, whose points are raw backups themselves.
    let storage = Mount::new(dir.path());
    let mount = Mount::with(storage.path(), &["--threads=2"]);
    let at = mount.path().display().to_string();
    let points: Vec<PathBuf> = (0..disks).map(|i| find(&mount, i)).collect();
    let last = points[disks - 1].display().to_string();
    // One is open and has been read.
    let open = File::open(&points[0]).unwrap();
    open.read_exact_at(&mut [0; 16], 0).unwrap();
    // Dropped last: nobody can be killed as long as the storage does not answer.
    let mut readers = Readers(Vec::new());
    let stopped = Stopped::new(server_pid(storage.path()));
    for point in &points[1..disks - 1] {
        let mut head = Command::new("head");
        readers.0.push(head.args(["-c", "4096"]).arg(point).stdout(Stdio::null()).spawn().unwrap());
    }
    // They have all asked when there is nothing else for them to do.
    let sleeps = |(i, child): (usize, &Child)| {
        let state = state(Path::new(&format!("/proc/{}", child.id())));
        assert!(!matches!(state, Some('Z')), "reader {i} got an answer of storage that is stopped");
        matches!(state, Some('S' | 'D')) && waits_for_fuse(child)
    };
    eventually("that all wait", || readers.0.iter().enumerate().all(sleeps));
    for command in [
        format!("ls {at}"),
        format!("ls -lL {last}"),
        format!("cat {at}/.fleecefs/status.json"),
        format!("stat -f {at}"),
        format!("df {at}"),
    ] {
        answers(&command);
    }
    drop(stopped);
    for (i, child) in readers.0.iter_mut().enumerate() {
        let status = child.wait().unwrap();
        assert!(status.success(), "reader {i}, when storage answers again: {status}");
    }
    readers.0.clear();
    open.read_exact_at(&mut [0; 16], 4096).unwrap();
}

/// Where the only point of the disk `vm{i}` is shown.
fn find(mount: &Mount, i: usize) -> PathBuf {
    let folder = mount.path().join(format!("vm{i}"));
    let names = std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let is_point = |p: &PathBuf| {
        let name = p.file_name().unwrap().to_string_lossy().into_owned();
        name.starts_with("FULL-1-a") && p.is_file()
    };
    names.flatten().map(|e| e.path()).find(is_point).unwrap()
}

/// Whether a process is inside a request to a FUSE server.
fn waits_for_fuse(child: &Child) -> bool {
    let call = std::fs::read_to_string(format!("/proc/{}/syscall", child.id()));
    // Where the kernel does not tell, sleeping has to do.
    call.map_or(true, |text| !text.starts_with("running"))
}

/// A folder that is mounted over another until this is dropped.
fn bound(from: &Path, at: &Path) -> Guard {
    Guard::mount("--bind", from, at)
}

fn is_root(test: &str) -> bool {
    // SAFETY: cannot fail.
    let root = unsafe { libc::geteuid() } == 0;
    if !root {
        println!("skipped: {test}: needs root");
    }
    root
}

#[test]
fn a_disk_that_is_mounted_later_shows_and_shows_again() {
    let test = "a_disk_that_is_mounted_later_shows_and_shows_again";
    if !have(test, &["/dev/fuse", "mount", "umount"]) || !is_root(test) {
        return;
    }
    let (disk, place) = (backups(2), tempfile::tempdir().unwrap());
    // The directory itself, and one on a disk that is mounted above it.
    for below in ["", "sub/backups"] {
        let root = place.path().join(below);
        std::fs::create_dir_all(&root).unwrap();
        std::fs::create_dir_all(disk.path().join(below)).unwrap();
        let (from, at) = (disk.path().to_path_buf(), place.path().to_path_buf());
        if !below.is_empty() {
            point(&disk.path().join(below), 0);
        }
        let mount = Mount::new(&root);
        assert!(!shown(&mount, 0).exists());
        for _ in 0..2 {
            let bound = bound(&from, &at);
            eventually("the points", || shown(&mount, 0).exists());
            assert_eq!(std::fs::read(shown(&mount, 0)).unwrap(), [1; SIZE]);
            // With nothing open the disk can be unmounted, and goes.
            eventually("that it is free", || {
                Command::new("umount").arg(&at).output().unwrap().status.success()
            });
            std::mem::forget(bound);
            eventually("that the points go", || !shown(&mount, 0).exists());
        }
        assert_eq!(status(mount.path())["watch"], "inotify");
    }
}

#[test]
fn a_backup_directory_that_is_replaced_is_followed() {
    let test = "a_backup_directory_that_is_replaced_is_followed";
    if !have(test, &["/dev/fuse"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("above/backups");
    std::fs::create_dir_all(&root).unwrap();
    point(&root, 0);
    let mount = Mount::new(&root);
    assert!(shown(&mount, 0).exists());
    std::fs::rename(dir.path().join("above"), dir.path().join("old")).unwrap();
    std::fs::create_dir_all(&root).unwrap();
    point(&root, 1);
    eventually("the new one's points", || shown(&mount, 1).exists() && !shown(&mount, 0).exists());
    assert_eq!(std::fs::read(shown(&mount, 1)).unwrap(), [2; SIZE]);
}

#[test]
fn links_to_the_backup_directory_are_followed_as_they_change() {
    let test = "links_to_the_backup_directory_are_followed_as_they_change";
    if !have(test, &["/dev/fuse"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let here = |name: &str| dir.path().join(name);
    for (i, name) in ["called", "b2", "b3", "far/b4"].iter().enumerate() {
        std::fs::create_dir_all(here(name)).unwrap();
        point(&here(name), i);
    }
    let root = here("called");
    let mount = Mount::new(&root);
    let shows = |i: usize, what: &str| {
        let only = || (0..5).all(|other| shown(&mount, other).exists() == (other == i));
        eventually(what, only);
        assert_eq!(std::fs::read(shown(&mount, i)).unwrap(), vec![i as u8 + 1; SIZE]);
    };
    let link = |to: &str| std::os::unix::fs::symlink(to, &root).unwrap();
    shows(0, "the folder");
    std::fs::rename(&root, here("b1")).unwrap();
    link("b2");
    shows(1, "a link in its place");
    std::fs::remove_file(&root).unwrap();
    link("b3");
    shows(2, "another link");
    std::fs::remove_file(&root).unwrap();
    link("far/b4");
    shows(3, "a link further away");
    // What the link leads to is replaced, with a folder missing for a while.
    std::fs::rename(here("far"), here("moved")).unwrap();
    std::fs::create_dir(here("far")).unwrap();
    std::thread::sleep(Duration::from_millis(500));
    std::fs::create_dir(here("far/b4")).unwrap();
    point(&here("far/b4"), 4);
    shows(4, "what the link leads to now");
    // The mount itself is no backup directory: all stays.
    std::fs::remove_file(&root).unwrap();
    std::os::unix::fs::symlink(mount.path(), &root).unwrap();
    std::thread::sleep(Duration::from_millis(500));
    shows(4, "the last one");
    std::fs::remove_file(&root).unwrap();
    std::fs::rename(here("b1"), &root).unwrap();
    shows(0, "the first folder again");
    assert_eq!(status(mount.path())["watch"], "inotify");
}

#[repr(C)]
struct Handle {
    bytes: u32,
    kind: i32,
    data: [u8; 128],
}

fn handle_of(path: &Path) -> Handle {
    let mut handle = Handle { bytes: 128, kind: 0, data: [0; 128] };
    let (path, mut id) = (CString::new(path.to_str().unwrap()).unwrap(), 0i32);
    // SAFETY: valid pointers, and a handle as long as it says.
    let done = unsafe {
        let to = &raw mut handle;
        libc::syscall(libc::SYS_name_to_handle_at, -100, path.as_ptr(), to, &raw mut id, 0)
    };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    handle
}

fn open_handle(mount: &File, handle: &Handle) -> std::io::Result<File> {
    let flags = libc::O_RDONLY | libc::O_CLOEXEC;
    let from = (&raw const *handle).cast::<libc::c_void>();
    // SAFETY: a handle that the kernel made, and an open folder.
    let fd = unsafe { libc::syscall(libc::SYS_open_by_handle_at, mount.as_raw_fd(), from, flags) };
    match i32::try_from(fd) {
        // SAFETY: a fresh descriptor.
        Ok(fd) if fd >= 0 => Ok(unsafe { File::from_raw_fd(fd) }),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// NFS servers work with such handles (`open_by_handle_at` is what they call, in the kernel or not).
#[test]
fn handles_of_nfs_servers_outlive_the_kernels_memory() {
    let test = "handles_of_nfs_servers_outlive_the_kernels_memory";
    if !have(test, &["/dev/fuse"]) || !is_root(test) {
        return;
    }
    let dir = backups(3);
    let mount = Mount::new(dir.path());
    let (folder, file) = (mount.path().join("vm1"), find(&mount, 1));
    let handles = [handle_of(mount.path()), handle_of(&folder), handle_of(&file)];
    let inode = file.metadata().unwrap().ino();
    let at = File::open(mount.path()).unwrap();
    for forget in [false, true] {
        if forget {
            std::fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
        }
        for (i, handle) in handles.iter().enumerate() {
            let open = open_handle(&at, handle).unwrap_or_else(|e| panic!("{i}, {forget}: {e}"));
            if i == 2 {
                let mut bytes = [0; 16];
                open.read_exact_at(&mut bytes, 0).unwrap();
                assert_eq!((bytes, open.metadata().unwrap().ino()), ([2; 16], inode));
            } else {
                // The way up is found again, too.
                let path = format!("/proc/self/fd/{}/..", open.as_raw_fd());
                assert!(std::fs::read_dir(path).unwrap().count() > 0);
            }
        }
    }
    // What is gone is stale.
    std::fs::remove_dir_all(dir.path().join("vm1")).unwrap();
    eventually("that it is gone", || !folder.exists());
    std::fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
    eventually("that it is stale", || {
        let error = open_handle(&at, &handles[2]).err().and_then(|e| e.raw_os_error());
        error == Some(libc::ESTALE)
    });
}

#[test]
fn a_thread_of_the_test_is_not_kept_by_a_stopped_server() {
    // The judge of the first test: a stopped server does keep a reader waiting.
    let test = "a_thread_of_the_test_is_not_kept_by_a_stopped_server";
    if !have(test, &["/dev/fuse"]) {
        return;
    }
    let dir = backups(1);
    let mount = Mount::new(dir.path());
    let path = shown(&mount, 0);
    let stopped = Stopped::new(server_pid(mount.path()));
    let (tell, told) = channel();
    std::thread::spawn(move || tell.send(std::fs::read(path).is_ok()));
    assert!(told.recv_timeout(Duration::from_millis(500)).is_err());
    drop(stopped);
    assert!(told.recv_timeout(Duration::from_secs(60)).unwrap());
}
