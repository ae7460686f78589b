use super::*;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

fn test_folder() -> (tempfile::TempDir, Folder) {
    let dir = tempfile::tempdir().unwrap();
    let folder = Folder::open(&dir.path().canonicalize().unwrap()).unwrap();
    (dir, folder)
}

fn is_refused(e: io::Error) -> bool {
    crate::error::Error::io(e, "").kind() == crate::error::Kind::Unsupported
}

fn fifo(path: &Path) {
    use std::os::unix::ffi::OsStrExt;
    let name = std::ffi::CString::new(path.as_os_str().as_bytes()).unwrap();
    // SAFETY: a string that ends in NUL.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
}

#[test]
fn only_plain_names_are_names() {
    let (_dir, folder) = test_folder();
    for bad in ["", ".", "..", "a/b", "/etc/passwd", "a\0b", &"x".repeat(256)] {
        assert!(PlainName::new(bad).is_err(), "{bad:?}");
        assert!(folder.create_new(bad).is_err(), "{bad:?}");
        assert!(folder.remove(bad).is_err(), "{bad:?}");
        assert!(folder.look(bad).is_err(), "{bad:?}");
    }
    let name: PlainName = serde_json::from_str("\"a\"").unwrap();
    assert_eq!(name.as_os_str(), "a");
    assert!(serde_json::from_str::<PlainName>("\"../a\"").is_err());
}

#[test]
fn links_are_followed_nowhere() {
    let (dir, folder) = test_folder();
    std::fs::create_dir(dir.path().join("real")).unwrap();
    std::fs::write(dir.path().join("real/file"), "x").unwrap();
    symlink("real", dir.path().join("link")).unwrap();
    symlink("real/file", dir.path().join("to-file")).unwrap();
    assert!(folder.folder("link").is_err());
    assert!(is_refused(Folder::open(&folder.join("link")).unwrap_err()));
    assert!(is_refused(folder.open_file("to-file").unwrap_err()));
    assert!(is_refused(open_file(&folder.join("link/file")).unwrap_err()));
    assert!(look(&folder.join("link/file")).is_err());
    assert!(look(&folder.join("link")).unwrap().is_symlink());
    assert!(folder.make_folder("link").is_err());
    assert!(write_whole(&folder.join("link/new"), b"").is_err());
    assert_eq!(read_small(&folder.join("real/file"), 1).unwrap(), b"x");
    assert_eq!(folder.beneath(Path::new("real")).unwrap().entries().unwrap().len(), 1);
    assert_eq!(folder.read_link("to-file").unwrap(), Path::new("real/file"));
}

#[test]
fn the_walk_by_hand_refuses_links_too() {
    let (dir, folder) = test_folder();
    std::fs::create_dir_all(dir.path().join("real/deep")).unwrap();
    symlink("real", dir.path().join("link")).unwrap();
    let walk = |p: &str| {
        open::walk(
            folder.as_fd(),
            Path::new(p),
            OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW,
        )
    };
    assert!(walk("real/deep").is_ok());
    assert_eq!(walk("link/deep").unwrap_err(), rustix::io::Errno::LOOP);
    assert_eq!(walk("link").unwrap_err(), rustix::io::Errno::LOOP);
    assert_eq!(walk("none").unwrap_err(), rustix::io::Errno::NOENT);
    let absolute = dir.path().canonicalize().unwrap().join("real");
    assert!(open::walk(rustix::fs::CWD, &absolute, OFlags::PATH).is_ok());
}

#[test]
fn pipes_and_long_files_neither_block_nor_fill_the_memory() {
    let (dir, folder) = test_folder();
    fifo(&dir.path().join("pipe"));
    assert!(is_refused(folder.open_file("pipe").unwrap_err()));
    assert!(is_refused(folder.read_small("pipe", 10).unwrap_err()));
    assert!(folder.lock("pipe").is_err());
    std::fs::File::create(dir.path().join("long")).unwrap().set_len(1 << 40).unwrap();
    assert!(is_refused(folder.read_small("long", 1000).unwrap_err()));
    assert!(is_refused(open_file(Path::new("/dev/zero")).unwrap_err()));
    assert!(folder.read_if_there("none", 1).unwrap().is_none());
}

#[test]
fn what_has_two_names_is_not_changed_in_place() {
    let (dir, folder) = test_folder();
    std::fs::write(dir.path().join("a"), "x").unwrap();
    drop(folder.open_with("a", Access::ReadWrite).unwrap());
    std::fs::hard_link(dir.path().join("a"), dir.path().join("b")).unwrap();
    assert!(is_refused(folder.open_with("a", Access::ReadWrite).unwrap_err()));
    drop(folder.open_file("a").unwrap());
}

#[test]
fn a_file_appears_whole_or_not_at_all() {
    let (dir, folder) = test_folder();
    for named in [false, true] {
        let make = || match named {
            true => Temp::create_named(folder.try_clone().unwrap()).unwrap(),
            false => folder.temp().unwrap(),
        };
        let name = format!("file-{named}");
        let temp = make();
        temp.file().write_all(b"one").unwrap();
        assert!(!folder.has(&name));
        temp.publish(&name, Replace::No).unwrap();
        assert_eq!(folder.read_small(&name, 9).unwrap(), b"one");
        assert_eq!(folder.look(&name).unwrap().mode() & 0o777, 0o600);
        let again = make().publish(&name, Replace::No).unwrap_err();
        assert_eq!(again.kind(), io::ErrorKind::AlreadyExists);
        let temp = make();
        temp.file().write_all(b"two").unwrap();
        temp.publish(&name, Replace::Yes).unwrap();
        assert_eq!(folder.read_small(&name, 9).unwrap(), b"two");
        drop(make());
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
}

#[test]
fn a_link_in_the_place_of_a_file_is_replaced_and_not_followed() {
    let (dir, folder) = test_folder();
    std::fs::write(dir.path().join("victim"), "v").unwrap();
    symlink("victim", dir.path().join("name")).unwrap();
    folder.write_whole("name", b"new").unwrap();
    assert_eq!(folder.read_small("victim", 9).unwrap(), b"v");
    assert_eq!(folder.read_small("name", 9).unwrap(), b"new");
}

#[test]
fn only_what_a_killed_run_left_is_swept() {
    let (dir, folder) = test_folder();
    let living = Temp::create_named(folder.try_clone().unwrap()).unwrap();
    std::fs::write(dir.path().join(format!("{TEMPORARY}dead")), "x").unwrap();
    std::fs::write(dir.path().join(".disk.fleecefs-partial"), "x").unwrap();
    std::fs::write(dir.path().join("disk"), "x").unwrap();
    symlink("disk", dir.path().join(format!("{TEMPORARY}link"))).unwrap();
    assert_eq!(sweep(&folder, &[".fleecefs-partial"]).unwrap(), 2);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 3);
    drop(living);
}

/// Between the two steps in which an unnamed file takes the place of another.
#[test]
fn what_is_just_being_published_is_not_swept() {
    let (_dir, folder) = test_folder();
    let mut temp = folder.temp().unwrap();
    temp.file().write_all(b"new").unwrap();
    if temp.name().is_none() {
        temp.name_temporarily().unwrap();
    }
    let name = temp.name().unwrap().to_os_string();
    assert_eq!(sweep(&folder, &[]).unwrap(), 0);
    assert!(folder.has(&name));
    temp.publish("file", Replace::Yes).unwrap();
    assert_eq!(folder.read_small("file", 9).unwrap(), b"new");
    assert!(!folder.has(&name));
}

#[test]
fn renaming_replaces_nothing_and_finishes_what_was_half_done() {
    let (dir, folder) = test_folder();
    std::fs::write(dir.path().join("a"), "a").unwrap();
    std::fs::write(dir.path().join("b"), "b").unwrap();
    let e = folder.rename_new("a", &folder, "b").unwrap_err();
    assert_eq!(e.kind(), io::ErrorKind::AlreadyExists);
    let e = folder.rename_new_by_link(OsStr::new("a"), &folder, OsStr::new("b")).unwrap_err();
    assert_eq!(e.kind(), io::ErrorKind::AlreadyExists);
    folder.rename_new_by_link(OsStr::new("a"), &folder, OsStr::new("c")).unwrap();
    // As after a crash between the second name and the end of the first.
    std::fs::hard_link(dir.path().join("c"), dir.path().join("a")).unwrap();
    folder.rename_new("a", &folder, "c").unwrap();
    assert!(!folder.has("a") && folder.has("b") && folder.has("c"));
}

#[test]
fn removal_looks_at_what_it_removes() {
    let (dir, folder) = test_folder();
    std::fs::write(dir.path().join("a"), "a").unwrap();
    let id = FileId::of(&folder.look("a").unwrap());
    std::fs::rename(dir.path().join("a"), dir.path().join("b")).unwrap();
    std::fs::write(dir.path().join("a"), "other").unwrap();
    assert!(!folder.remove_if_same("a", id).unwrap());
    assert!(folder.remove_if_same("b", id).unwrap());
    assert!(!folder.remove_if_same("b", id).unwrap());
}

#[test]
fn times_are_those_of_plain_files_and_of_nothing_else() {
    let (dir, folder) = test_folder();
    let file = File::create(dir.path().join("f")).unwrap();
    let old = SystemTime::UNIX_EPOCH;
    for time in [old, old + Duration::new(1_700_000_000, 5), SystemTime::now()] {
        file.set_modified(time).unwrap();
        assert_eq!(folder.modified("f").unwrap(), Some(time));
    }
    file.set_modified(old - Duration::from_secs(7)).unwrap();
    assert_eq!(folder.modified("f").unwrap(), Some(old), "as if it were the first");
    symlink("f", dir.path().join("to-f")).unwrap();
    std::fs::create_dir(dir.path().join("sub")).unwrap();
    assert_eq!((folder.modified("to-f").unwrap(), folder.modified("sub").unwrap()), (None, None));
    assert_eq!(folder.modified("none").unwrap_err().kind(), io::ErrorKind::NotFound);
    assert!(folder.modified("sub/f").is_err());
}

#[test]
fn a_folder_that_was_exchanged_is_still_the_one_that_was_opened() {
    let (dir, folder) = test_folder();
    std::fs::create_dir(dir.path().join("disk")).unwrap();
    std::fs::write(dir.path().join("disk/a"), "mine").unwrap();
    let disk = folder.folder("disk").unwrap();
    std::fs::rename(dir.path().join("disk"), dir.path().join("moved")).unwrap();
    symlink("/etc", dir.path().join("disk")).unwrap();
    disk.write_whole("b", b"new").unwrap();
    assert_eq!(std::fs::read(dir.path().join("moved/b")).unwrap(), b"new");
}

#[test]
fn links_on_the_command_line_are_followed_if_they_are_ours() {
    let (dir, folder) = test_folder();
    std::fs::create_dir(dir.path().join("real")).unwrap();
    symlink("real", dir.path().join("link")).unwrap();
    symlink("link", dir.path().join("second")).unwrap();
    symlink("loop", dir.path().join("loop")).unwrap();
    assert_eq!(resolve(&folder.join("second")).unwrap(), folder.join("real"));
    assert_eq!(resolve_target(&folder.join("second/new")).unwrap(), folder.join("real/new"));
    assert_eq!(resolve_target(&folder.join("second")).unwrap(), folder.join("real"));
    assert_eq!(resolve(&folder.join("loop")).unwrap_err().raw_os_error(), Some(libc::ELOOP));
    assert_eq!(resolve(&folder.join("none")).unwrap_err().kind(), io::ErrorKind::NotFound);
    assert_eq!(resolve(Path::new("/../..")).unwrap(), Path::new("/"));
}

#[test]
fn a_link_of_another_user_leads_only_to_what_is_his() {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: a_link_of_another_user_leads_only_to_what_is_his (needs root)");
        return;
    }
    let (dir, folder) = test_folder();
    for (name, owner) in [("ours", 0), ("his", 65534)] {
        std::fs::create_dir(dir.path().join(name)).unwrap();
        std::os::unix::fs::chown(dir.path().join(name), Some(owner), None).unwrap();
        symlink(name, dir.path().join(format!("to-{name}"))).unwrap();
        std::os::unix::fs::lchown(dir.path().join(format!("to-{name}")), Some(65534), None)
            .unwrap();
    }
    assert!(is_refused(resolve(&folder.join("to-ours")).unwrap_err()));
    assert_eq!(resolve(&folder.join("to-his")).unwrap(), folder.join("his"));
    let his = Folder::open(&folder.join("his")).unwrap();
    assert_eq!(foreign_owner(&his).unwrap(), Some(ForeignOwner::User(65534)));
    assert!(check_private(&folder.join("his")).is_err());
    check_private(&folder.join("ours")).unwrap();
    assert_eq!(foreign_owner(&Folder::open(&folder.join("ours")).unwrap()).unwrap(), None);
    let open = std::fs::Permissions::from_mode(0o2770);
    std::fs::set_permissions(dir.path().join("ours"), open).unwrap();
    assert!(check_private(&folder.join("ours")).is_err());
    let ours = Folder::open(&folder.join("ours")).unwrap();
    assert_eq!(foreign_owner(&ours).unwrap(), Some(ForeignOwner::Others));
}

#[test]
fn missing_folders_are_made_private() {
    let (_dir, folder) = test_folder();
    let made = make_folders(&folder.join("a/b/c")).unwrap();
    make_folders(&folder.join("a/b/c")).unwrap();
    assert_eq!(made.path(), folder.join("a/b/c"));
    assert_eq!(look(&folder.join("a/b")).unwrap().mode() & 0o777, 0o700);
}

#[test]
fn a_lock_is_exclusive_and_goes_with_its_holder() {
    let (_dir, folder) = test_folder();
    let held = folder.lock("lock").unwrap().unwrap();
    assert!(folder.lock("lock").unwrap().is_none());
    drop(held);
    assert!(folder.lock("lock").unwrap().is_some());
}

#[test]
fn a_file_without_a_name_is_opened_again_and_gets_none() {
    let (dir, folder) = test_folder();
    let Some(file) = folder.create_unnamed().unwrap() else { return };
    file.set_len(4096).unwrap();
    let again = reopen(&file, Access::ReadWrite).unwrap();
    (&again).write_all(b"x").unwrap();
    let path = open::proc_path(file.as_raw_fd());
    assert_eq!(std::fs::read(&path).unwrap()[0], b'x');
    let link = std::fs::hard_link(&path, folder.proc_path().join("named"));
    assert!(link.is_err());
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_name_is_compared_with_a_held_file() {
    let (dir, folder) = test_folder();
    let file = folder.create_new("a").unwrap();
    assert!(folder.is_same("a", &file).unwrap());
    std::fs::rename(dir.path().join("a"), dir.path().join("b")).unwrap();
    assert!(!folder.is_same("a", &file).unwrap());
    symlink("b", dir.path().join("a")).unwrap();
    assert!(!folder.is_same("a", &file).unwrap());
}

#[test]
fn sockets_are_made_private() {
    let (_dir, folder) = test_folder();
    let _listener = folder.listen("s").unwrap();
    assert_eq!(folder.look("s").unwrap().mode() & 0o777, 0o600);
    assert!(folder.listen("s").is_err());
}

#[test]
fn a_log_is_appended_to_and_nothing_else_is_written() {
    let (dir, folder) = test_folder();
    for _ in 0..2 {
        folder.append("log").unwrap().write_all(b"x").unwrap();
    }
    assert_eq!(folder.read_small("log", 9).unwrap(), b"xx");
    assert_eq!(folder.look("log").unwrap().mode() & 0o777, 0o600);
    std::fs::hard_link(dir.path().join("log"), dir.path().join("second")).unwrap();
    symlink("log", dir.path().join("link")).unwrap();
    fifo(&dir.path().join("pipe"));
    for bad in ["second", "link", "pipe", "../log"] {
        assert!(folder.append(bad).is_err(), "{bad}");
    }
    Folder::open(Path::new("/dev")).unwrap().append("null").unwrap();
}

#[test]
fn no_path_goes_up() {
    let (dir, folder) = test_folder();
    std::fs::create_dir_all(dir.path().join("a/b")).unwrap();
    let up = Folder::open(&folder.join("a/..")).unwrap_err();
    assert_eq!(up.kind(), io::ErrorKind::InvalidInput);
    assert!(look(&folder.join("a/../a")).is_err());
    assert!(folder.beneath(Path::new("a/../a")).is_err());
}

#[test]
fn a_file_is_no_folder_on_a_path() {
    let (dir, folder) = test_folder();
    std::fs::write(dir.path().join("file"), "x").unwrap();
    for path in ["file/x", "file/..", "file/../file"] {
        let e = resolve(&folder.join(path)).unwrap_err();
        assert_eq!(e.raw_os_error(), Some(libc::ENOTDIR), "{path}");
    }
}

#[test]
fn a_refusal_says_what_is_there() {
    let (dir, folder) = test_folder();
    symlink("nowhere", dir.path().join("link")).unwrap();
    let e = folder.open_file("link").unwrap_err();
    assert!(e.to_string().contains("symbolic link"), "{e}");
    std::fs::write(dir.path().join("file"), "x").unwrap();
    for path in [folder.join("file"), "/dev/null".into()] {
        let e = open_device(&path).unwrap_err();
        assert!(e.to_string().contains("not a block device"), "{path:?}: {e}");
    }
}

/// Files of /proc have no length before they are read, as one that grows meanwhile.
#[test]
fn what_is_longer_than_its_length_said_is_refused() {
    let status = || File::open("/proc/self/status").unwrap();
    assert_eq!(status().metadata().unwrap().len(), 0);
    assert!(is_refused(read_bounded(status(), 10).unwrap_err()));
    assert!(read_bounded(status(), 1 << 20).unwrap().len() > 10);
}

#[test]
fn a_log_is_no_pipe_that_somebody_reads() {
    use std::os::unix::fs::OpenOptionsExt;
    let (dir, folder) = test_folder();
    fifo(&dir.path().join("pipe"));
    let mut reads = std::fs::OpenOptions::new();
    let _reader =
        reads.read(true).custom_flags(libc::O_NONBLOCK).open(dir.path().join("pipe")).unwrap();
    assert!(is_refused(folder.append("pipe").unwrap_err()));
}

#[test]
fn a_folder_for_a_user_is_taken_over_from_root_alone() {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: a_folder_for_a_user_is_taken_over_from_root_alone (needs root)");
        return;
    }
    let (dir, folder) = test_folder();
    for (name, owner) in [("root", 0), ("own", 1000), ("other", 65534)] {
        std::fs::create_dir(dir.path().join(name)).unwrap();
        std::os::unix::fs::chown(dir.path().join(name), Some(owner), None).unwrap();
    }
    for name in ["root", "own", "new"] {
        let made = folder.make_folder_of(name, 1000).unwrap();
        assert_eq!(made.metadata().unwrap().uid(), 1000, "{name}");
    }
    assert!(is_refused(folder.make_folder_of("other", 1000).unwrap_err()));
    assert_eq!(folder.look("other").unwrap().uid(), 65534);
}

#[test]
fn what_is_swept_is_the_users_own_and_has_one_name() {
    let (dir, folder) = test_folder();
    let name = |n: &str| dir.path().join(format!("{TEMPORARY}{n}"));
    std::fs::write(name("two"), "x").unwrap();
    std::fs::hard_link(name("two"), dir.path().join("second")).unwrap();
    std::fs::write(name("other"), "x").unwrap();
    let is_root = rustix::process::geteuid().is_root();
    if is_root {
        std::os::unix::fs::chown(name("other"), Some(65534), None).unwrap();
    }
    assert_eq!(sweep(&folder, &[]).unwrap(), usize::from(!is_root));
    assert!(name("two").exists());
    assert_eq!(name("other").exists(), is_root);
}

/// In a folder that is sticky itself everybody may make what we would look for.
#[test]
fn a_shared_folder_is_not_private_and_may_be_above_one() {
    let (dir, folder) = test_folder();
    std::fs::create_dir_all(dir.path().join("shared/own")).unwrap();
    let shared = folder.join("shared");
    std::fs::set_permissions(&shared, std::fs::Permissions::from_mode(0o1777)).unwrap();
    assert!(check_private(&shared).is_err());
    check_private(&shared.join("own")).unwrap();
}

/// Runs `act` where there is no /proc, as in some containers.
fn without_proc(act: impl FnOnce() + Send) {
    let mount = |source: &std::ffi::CStr, at: &std::ffi::CStr, flags| {
        // SAFETY: strings that end in NUL; no file system here has data.
        let done = unsafe {
            libc::mount(source.as_ptr(), at.as_ptr(), c"tmpfs".as_ptr(), flags, std::ptr::null())
        };
        assert_eq!(done, 0, "{}", io::Error::last_os_error());
    };
    std::thread::scope(|s| {
        s.spawn(|| {
            // SAFETY: of this thread alone, which ends with it.
            let apart = unsafe { libc::unshare(libc::CLONE_NEWNS) };
            assert_eq!(apart, 0, "{}", io::Error::last_os_error());
            mount(c"none", c"/", libc::MS_REC | libc::MS_PRIVATE);
            mount(c"none", c"/proc", 0);
            act();
        });
    });
}

#[test]
fn without_proc_a_file_is_opened_by_its_name_if_that_is_still_its() {
    if !rustix::process::geteuid().is_root() {
        println!(
            "skipped: without_proc_a_file_is_opened_by_its_name_if_that_is_still_its (needs root)"
        );
        return;
    }
    let (dir, folder) = test_folder();
    for name in ["a", "b"] {
        std::fs::write(dir.path().join(name), name).unwrap();
    }
    without_proc(|| {
        assert_eq!(folder.read_small("a", 9).unwrap(), b"a");
        let probe = folder.probe(OsStr::new("a")).unwrap();
        let meta = probe.metadata().unwrap();
        let open = |name| {
            open::plain_file(folder.as_fd(), OsStr::new(name), (&probe, &meta), Access::Read)
        };
        open("a").unwrap();
        assert!(is_refused(open("b").unwrap_err()), "another file has its name by now");
        folder.write_whole("new", b"new").unwrap();
        assert_eq!(folder.read_small("new", 9).unwrap(), b"new");
    });
}

/// Runs `act` where a system call gives this error, as on some file systems.
fn refusing(call: i64, error: i32, act: impl FnOnce() + Send) {
    use libc::{BPF_ABS, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W};
    let step = |code, k, jt, jf| libc::sock_filter { code: code as u16, jt, jf, k };
    std::thread::scope(|s| {
        s.spawn(|| {
            let mut code = [
                step(BPF_LD | BPF_W | BPF_ABS, 0, 0, 0),
                step(BPF_JMP | BPF_JEQ | BPF_K, call as u32, 0, 1),
                step(BPF_RET | BPF_K, libc::SECCOMP_RET_ERRNO | error as u32, 0, 0),
                step(BPF_RET | BPF_K, libc::SECCOMP_RET_ALLOW, 0, 0),
            ];
            let filter = libc::sock_fprog { len: code.len() as u16, filter: code.as_mut_ptr() };
            // SAFETY: of this thread alone, which ends with it; the program lives through the call.
            let set = unsafe {
                libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
                libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter)
            };
            assert_eq!(set, 0, "{}", io::Error::last_os_error());
            act();
        });
    });
}

#[test]
fn where_a_file_has_one_name_only_renaming_replaces_nothing_either() {
    let (dir, folder) = test_folder();
    std::fs::write(dir.path().join("a"), "a").unwrap();
    std::fs::write(dir.path().join("b"), "b").unwrap();
    refusing(libc::SYS_linkat, libc::EPERM, || {
        let rename = |to: &str| folder.rename_new_by_link(OsStr::new("a"), &folder, OsStr::new(to));
        assert_eq!(rename("b").unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(folder.read_small("b", 9).unwrap(), b"b");
        rename("c").unwrap();
    });
    assert!(!folder.has("a") && folder.has("c"));
}

/// flock(2) on shares: another host has the lock, or there are no locks.
#[test]
fn a_lock_that_another_host_has_is_held() {
    let (_dir, folder) = test_folder();
    refusing(libc::SYS_flock, libc::EACCES, || assert!(folder.lock("lock").unwrap().is_none()));
    refusing(libc::SYS_flock, libc::ENOLCK, || assert!(folder.lock("lock").unwrap().is_some()));
    refusing(libc::SYS_flock, libc::EIO, || assert!(folder.lock("lock").is_err()));
}
