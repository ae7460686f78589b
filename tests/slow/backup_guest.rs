//! `backup` of real guests: every bus, lockstep writers, overlays, quiesce.

use std::path::PathBuf;

use crate::support::backup::{self, Caller, bitmaps, leftovers, newest, ours_in_qemu, same};
use crate::support::guard::{Guard, UNMOUNT};
use crate::support::guest::{Disk, Guest, has_qemu};
use crate::support::mount::Mount;
use crate::support::small_guest::{TOOLS, clean, image, journal, manifest, small_guest};
use crate::support::storage::Slow;
use crate::support::tools::{have, run};

/// Virtio-blk with an iothread where its frozen view can be looked at: QEMU before 9.1 dies when an
/// NBD client of a node in an iothread leaves, so `backup` takes no INC there and this test cannot
/// read.
fn iothread() -> &'static str {
    let out = run("qemu-system-x86_64", &["--version"]);
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let version = text.split("version ").nth(1).unwrap_or_default();
    let mut parts = version.split(['.', ' ']).map(|p| p.parse::<u32>().unwrap_or(0));
    let old = (parts.next(), parts.next()) < (Some(9), Some(1));
    if old { "virtio-blk" } else { "virtio-blk-iothread" }
}

/// The highest counter that the lockstep writer has left.
fn counter(bytes: &[u8]) -> u64 {
    bytes[..256 * 4096]
        .chunks(4096)
        .map(|b| u64::from_le_bytes(b[..8].try_into().unwrap()))
        .max()
        .unwrap()
}

#[test]
fn every_bus_under_load_at_one_time() {
    let name = "every_bus_under_load_at_one_time";
    if !have(name, TOOLS) || !has_qemu(name) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let base = image(dir.path(), "base", "qcow2", "");
    let overlay = dir.path().join("o.img");
    run(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-F",
            "qcow2",
            "-b",
            base.to_str().unwrap(),
            overlay.to_str().unwrap(),
        ],
    );
    let disks = [
        Disk::new("a", image(dir.path(), "a", "qcow2", "")).on(iothread()),
        Disk::new("b", image(dir.path(), "b", "raw", "")).format("raw").on("virtio-scsi"),
        Disk::new("c", image(dir.path(), "c", "qcow2", "cluster_size=2M")).on("ahci"),
        Disk::new("d", image(dir.path(), "d", "qcow2", "extended_l2=on")).on("nvme"),
        Disk::new("", image(dir.path(), "e", "qcow2", "")),
        Disk::new("o", overlay),
    ];
    let writers = [
        "lockstep /dev/disk/a /dev/disk/b",
        "churn /dev/disk/a 1 4194304 50331648",
        "churn /dev/disk/b 2 4194304 50331648",
        "churn /dev/disk/c 3",
        "churn /dev/disk/d 4",
        "churn /dev/disk/disk5 5",
        "churn /dev/disk/o 6",
    ];
    let guest = Guest::start(name, &disks, &writers).expect("QEMU is there");
    let caller = Caller::guest(&guest);
    let mut points = Vec::new();
    for level in ["full", "inc", "diff", "inc", "inc"] {
        let (said, views) = caller.held(level);
        assert!(said.contains("the guest was stopped for"), "{said}");
        println!("{level}: {}", said.lines().find(|l| l.contains("stopped for")).unwrap());
        // The root disk is a seventh.
        assert_eq!(views.len(), 7, "{said}");
        for (disk, view) in views {
            points.push((level, newest(&caller.target, &disk), disk, view));
        }
    }
    let mount = Mount::new(&caller.target);
    for (_, image, disk, view) in &points {
        same(&mount, disk, image, view);
    }
    for round in points.chunks(7) {
        let of = |d: &str| counter(&round.iter().find(|p| p.2 == d).unwrap().3);
        let (a, b) = (of("a.img"), of("b.img"));
        assert!(b <= a && a - b <= 1, "{}: lockstep disks at {a} and {b}", round[0].0);
    }
    let mut qmp = guest.qmp();
    assert_eq!(ours_in_qemu(&mut qmp), Vec::<String>::new());
    assert_eq!(bitmaps(&mut qmp).len(), 2 * 7);
    assert_eq!(leftovers(dir.path()), Vec::<PathBuf>::new());
    assert_eq!(leftovers(guest.path("").as_path()), Vec::<PathBuf>::new());
    assert_eq!(qmp.execute("query-status", serde_json::json!({}))["status"], "running");
}

/// A guest with one small qcow2 disk and a writer.
fn status(guest: &Guest) -> serde_json::Value {
    guest.qmp().execute("query-status", serde_json::json!({}))["status"].clone()
}

#[test]
fn freezing_what_does_not_freeze() {
    let name = "freezing_what_does_not_freeze";
    let dir = tempfile::tempdir().unwrap();
    let Some(guest) = small_guest(name, dir.path(), "churn /dev/disk/a 1", &[]) else { return };
    let caller = Caller::guest(&guest).with(&["--include", "a", "--quiesce"]);
    caller.with(&["--agent", guest.agent_socket().to_str().unwrap()]).must("full");
    assert_eq!(manifest(&caller, "a.img")["consistency"]["achieved"], "file-system");
    assert_eq!(guest.agent("guest-fsfreeze-status"), "thawed");

    // An agent that never answers.
    let deaf = dir.path().join("deaf.sock");
    let _listener = std::os::unix::net::UnixListener::bind(&deaf).unwrap();
    let said =
        caller.with(&["--agent", deaf.to_str().unwrap(), "--agent-timeout", "1"]).must("inc");
    assert!(said.contains("does not answer"), "{said}");
    let m = manifest(&caller, "a.img");
    assert_eq!(m["consistency"]["achieved"], "crash");
    assert!(m["consistency"]["reason"].as_str().unwrap().contains("does not answer"));

    // An agent that freezes nothing has not frozen.
    let socket = guest.agent_socket();
    let agent = ["--agent", socket.to_str().unwrap(), "--freeze", "/nosuch"];
    let said = caller.with(&agent).must("inc");
    assert!(said.contains("nothing to freeze"), "{said}");
    let m = manifest(&caller, "a.img");
    assert_eq!(m["consistency"]["achieved"], "crash");
    assert_eq!(m["consistency"]["frozen"], serde_json::json!([]));
    assert_eq!(guest.agent("guest-fsfreeze-status"), "thawed");
    let strict = [&agent[..], &["--strict"]].concat();
    let out = caller.with(&strict).run("inc");
    assert!(!out.status.success(), "{out:?}");

    // Frozen by somebody else: reported, left so.
    guest.agent("guest-fsfreeze-freeze");
    let said = caller.with(&["--agent", guest.agent_socket().to_str().unwrap()]).must("inc");
    assert!(said.contains("already frozen"), "{said}");
    assert_eq!(guest.agent("guest-fsfreeze-status"), "frozen");
    guest.agent("guest-fsfreeze-thaw");
    assert_eq!(status(&guest), "running");
    clean(&guest, dir.path());
    println!("agent deaf, freeze held: exit 0, INC, crash-consistent and said");
}

#[test]
fn a_paused_guest_stays_paused() {
    let name = "a_paused_guest_stays_paused";
    let dir = tempfile::tempdir().unwrap();
    let Some(guest) = small_guest(name, dir.path(), "churn /dev/disk/a 1", &[]) else { return };
    let caller = Caller::guest(&guest).with(&["--include", "a"]);
    guest.qmp().execute("stop", serde_json::json!({}));
    caller.must("full");
    assert_eq!(status(&guest), "paused");
    assert_eq!(manifest(&caller, "a.img")["consistency"]["achieved"], "paused");
    guest.qmp().execute("cont", serde_json::json!({}));
    let (said, views) = caller.with(&["--pause"]).held("inc");
    assert!(said.contains("INC"), "{said}");
    assert_eq!(status(&guest), "running");
    let mount = Mount::new(&caller.target);
    same(&mount, "a.img", &newest(&caller.target, "a.img"), &views[0].1);
    drop(mount);
    let (_, views) = caller.with(&["--no-stop"]).held("inc");
    let mount = Mount::new(&caller.target);
    same(&mount, "a.img", &newest(&caller.target, "a.img"), &views[0].1);
    clean(&guest, dir.path());

    // Paused by its owner when the backup was about to stop it.
    let hung = caller.command("inc").env("FLEECEFS_HANG_AT", "send query-status").spawn();
    let pid = hung.expect("fleecefs starts").id() as i32;
    let mut paused = false;
    let exit = loop {
        let mut state = 0;
        // SAFETY: our own child, which nobody else waits for, and a status of our own.
        assert_eq!(unsafe { libc::waitpid(pid, &mut state, libc::WUNTRACED) }, pid);
        if !libc::WIFSTOPPED(state) {
            break libc::WEXITSTATUS(state);
        }
        if !paused && journal(&caller).contains("\"stop\"") {
            guest.qmp().execute("stop", serde_json::json!({}));
            paused = true;
        }
        // SAFETY: a signal to our own child.
        unsafe { libc::kill(pid, libc::SIGCONT) };
    };
    assert_eq!((exit, paused), (0, true));
    assert_eq!(status(&guest), "paused");
    assert_eq!(manifest(&caller, "a.img")["consistency"]["achieved"], "paused");
    clean(&guest, dir.path());
}

/// Waits until the guest runs and is thawed.
fn wait_free(guest: &Guest, what: &str) {
    for _ in 0..200 {
        if status(guest) == "running" && guest.agent("guest-fsfreeze-status") == "thawed" {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    panic!("{what}: still held");
}

#[test]
fn a_guest_paused_and_frozen_for_the_whole_backup() {
    let name = "a_guest_paused_and_frozen_for_the_whole_backup";
    let dir = tempfile::tempdir().unwrap();
    let Some(guest) = small_guest(name, dir.path(), "churn /dev/disk/a 1", &[]) else { return };
    let agent = guest.agent_socket().display().to_string();
    let caller = Caller::guest(&guest).with(&[
        "--include",
        "a",
        "--pause",
        "--quiesce",
        "--agent",
        &agent,
        "--hold-limit",
        "10",
    ]);
    let (said, views) = caller.held("full");
    assert!(said.contains("froze") && !said.contains("thawing failed"), "{said}");
    assert_eq!(status(&guest), "running");
    assert_eq!(guest.agent("guest-fsfreeze-status"), "thawed");
    assert_eq!(manifest(&caller, "a.img")["consistency"]["achieved"], "file-system");
    let mount = Mount::new(&caller.target);
    same(&mount, "a.img", &newest(&caller.target, "a.img"), &views[0].1);
    drop(mount);
    clean(&guest, dir.path());

    // Killed while the guest is stopped and frozen: the watchdog is still there.
    let hold = tempfile::tempdir().unwrap();
    let mut child =
        caller.command("inc").env("FLEECEFS_HOLD", hold.path()).spawn().expect("fleecefs starts");
    assert_eq!(backup::read_views(&mut child, hold.path()).len(), 1);
    assert_eq!(status(&guest), "paused");
    child.kill().unwrap();
    child.wait().unwrap();
    wait_free(&guest, "killed under --pause --quiesce");
    wait_noted(&caller);
    // What the watchdog has undone is not undone again: this pause is its owner's.
    guest.qmp().execute("stop", serde_json::json!({}));
    let said = Caller { more: vec!["--include".into(), "a".into()], ..caller.clone() }.must("auto");
    assert!(!said.contains("taking a FULL:") && !said.contains("runs again"), "{said}");
    assert_eq!(status(&guest), "paused");
    guest.qmp().execute("cont", serde_json::json!({}));
    clean(&guest, dir.path());

    // QEMU dies meanwhile: letting the guest go fails, and all the rest is undone.
    let hold = tempfile::tempdir().unwrap();
    let mut child =
        caller.command("inc").env("FLEECEFS_HOLD", hold.path()).spawn().expect("fleecefs starts");
    assert_eq!(backup::read_views(&mut child, hold.path()).len(), 1);
    guest.kill();
    std::fs::write(hold.path().join("go"), "").unwrap();
    assert!(!child.wait().unwrap().success());
    assert_eq!(leftovers(dir.path()), Vec::<PathBuf>::new());
    assert_eq!(leftovers(guest.path("").as_path()), Vec::<PathBuf>::new());
}

/// Waits until the watchdog has written down that the guest is thawed: the last thing it does.
fn wait_noted(caller: &Caller) {
    let noted = || {
        let text = journal(caller);
        text.contains("\"continued\"") && text.contains("\"thawed\"")
    };
    for _ in 0..100 {
        if noted() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    panic!("the watchdog wrote nothing down");
}

#[test]
fn the_watchdog_releases_a_guest_whose_backup_hangs() {
    let name = "the_watchdog_releases_a_guest_whose_backup_hangs";
    let dir = tempfile::tempdir().unwrap();
    let Some(guest) = small_guest(name, dir.path(), "churn /dev/disk/a 1", &[]) else { return };
    let agent = guest.agent_socket().display().to_string();
    let caller = Caller::guest(&guest).with(&[
        "--include",
        "a",
        "--quiesce",
        "--agent",
        &agent,
        "--hold-limit",
        "3",
    ]);
    caller.must("full");
    for (step, frozen) in [("answer stop", true), ("frozen", true), ("send stop", true)] {
        let mut child =
            caller.command("inc").env("FLEECEFS_HANG_AT", step).spawn().expect("fleecefs starts");
        // It stops itself; the watchdog kills it at the limit.
        let exit = child.wait().unwrap();
        assert!(!exit.success() && exit.code().is_none(), "{step}: {exit}");
        let mut waited = 0;
        while status(&guest) != "running" || guest.agent("guest-fsfreeze-status") != "thawed" {
            waited += 1;
            assert!(waited < 100, "{step}: still held (frozen: {frozen})");
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        let said = caller.must("auto");
        assert!(!said.contains("taking a FULL:"), "{step}: {said}");
        clean(&guest, dir.path());
        println!("hung at {step}: freed by the watchdog, then exit 0, INC");
    }
}

#[test]
fn qemu_that_may_not_open_the_files_gets_descriptors() {
    let name = "qemu_that_may_not_open_the_files_gets_descriptors";
    let dir = tempfile::tempdir().unwrap();
    // SAFETY: geteuid has no preconditions.
    if unsafe { libc::geteuid() } != 0 {
        println!("skipped: {name} needs root");
        return;
    }
    let user = ["-run-with", "user=nobody"];
    let Some(guest) = small_guest(name, dir.path(), "churn /dev/disk/a 1", &user) else { return };
    let caller = Caller::guest(&guest);
    for level in ["full", "inc", "inc"] {
        let (_, views) = caller.held(level);
        let mount = Mount::new(&caller.target);
        for (disk, view) in &views {
            same(&mount, disk, &newest(&caller.target, disk), view);
        }
    }
    clean(&guest, dir.path());
    let sets = guest.qmp().execute("query-fdsets", serde_json::json!({}));
    assert_eq!(sets, serde_json::json!([]));
}

#[test]
fn qemu_killed_and_booted_again() {
    let name = "qemu_killed_and_booted_again";
    let dir = tempfile::tempdir().unwrap();
    let Some(guest) = small_guest(name, dir.path(), "churn /dev/disk/a 1", &[]) else { return };
    let caller = Caller::guest(&guest).with(&["--include", "a"]);
    caller.must("full");
    caller.must("inc");
    guest.kill();
    let disks = [Disk::new("a", dir.path().join("a.img"))];
    guest.boot(&guest.path("root.qcow2"), &disks, &["churn /dev/disk/a 2"], &[]);
    guest.wait_ready();
    let (said, views) = caller.held("auto");
    assert!(said.contains("taking a FULL:"), "{said}");
    let mount = Mount::new(&caller.target);
    same(&mount, "a.img", &newest(&caller.target, "a.img"), &views[0].1);
    clean(&guest, dir.path());
    // The FULL's own bitmap is the only one left.
    assert_eq!(bitmaps(&mut guest.qmp()).len(), 1);
}

/// An ext4 file system in a file; writing to it hangs while it is frozen. Needs root.
struct Freezable {
    _mount: Guard,
    dir: tempfile::TempDir,
}

impl Freezable {
    fn new(test: &str) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let (file, mnt) = (dir.path().join("fs"), dir.path().join("mnt"));
        std::fs::create_dir(&mnt).unwrap();
        std::fs::File::create(&file).unwrap().set_len(256 << 20).unwrap();
        let make = r#"mkfs.ext4 -q "$2" && mount -o loop "$2" "$1""#;
        let undo = format!(r#"fsfreeze -u "$1"; {UNMOUNT}"#);
        let Ok(mount) = Guard::try_new(make, &undo, &[&mnt, &file]) else {
            assert!(std::env::var_os("CI").is_none(), "{test} needs root and mkfs.ext4");
            println!("skipped: {test} needs root and mkfs.ext4");
            return None;
        };
        Some(Freezable { _mount: mount, dir })
    }

    fn mnt(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }

    fn freeze(&self, flag: &str) {
        run("fsfreeze", &[flag, self.mnt().to_str().unwrap()]);
    }
}

/// Ends the guest's writer, and starts one that has not waited yet.
fn measure_anew(guest: &Guest) {
    let script = "killall writer; echo 'guest: anew' >/dev/console; \
                  setsid writer stall /dev/disk/a >/dev/console 2>&1 </dev/null &";
    guest.shell(script);
}

/// The longest wait, in milliseconds, that the guest's writer has seen.
fn longest(guest: &Guest) -> u64 {
    let log = std::fs::read_to_string(guest.path("serial.log")).unwrap_or_default();
    let now = log.rsplit("guest: anew").next().unwrap_or_default();
    let waits =
        now.lines().filter_map(|l| l.split(" waited ").nth(1)?.split(' ').next()?.parse().ok());
    waits.max().unwrap_or(0u64) / 1000
}

/// A fleece on a disk of 128 KiB/s: the guest feels it, the point is right, and no write waits
/// for more than the time limit.
fn slow_fleece(guest: &Guest, caller: &Caller) {
    let limit = 20;
    let fs = Slow::new(128 << 10);
    let fleece = fs.mnt().display().to_string();
    let hold = tempfile::tempdir().unwrap();
    measure_anew(guest);
    let slow = caller.with(&["--fleece-dir", &fleece, "--cbw-timeout", &limit.to_string()]);
    let mut child =
        slow.command("inc").env("FLEECEFS_HOLD", hold.path()).spawn().expect("fleecefs starts");
    let views = backup::read_views(&mut child, hold.path());
    // A cluster of 64 KiB takes 500 ms there: that is how it is known that the fleece is slow.
    let mut tries = 0;
    while longest(guest) < 400 {
        tries += 1;
        assert!(tries < 300, "the guest does not feel the slow fleece");
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    std::fs::write(hold.path().join("go"), "").unwrap();
    assert!(child.wait().unwrap().success());
    let waited = longest(guest);
    println!("slow fleece of 128 KiB/s, --cbw-timeout {limit}: {waited} ms");
    assert!(waited < limit * 1000 + 2500, "{waited} ms");
    let mount = Mount::new(&caller.target);
    same(&mount, "a.img", &newest(&caller.target, "a.img"), &views[0].1);
}

#[test]
fn how_long_a_guest_write_waits() {
    let name = "how_long_a_guest_write_waits";
    let dir = tempfile::tempdir().unwrap();
    if !have(name, Slow::TOOLS) {
        return;
    }
    let Some(fs) = Freezable::new(name) else { return };
    let Some(guest) = small_guest(name, dir.path(), "stall /dev/disk/a", &[]) else { return };
    let caller = Caller::guest(&guest).with(&["--include", "a"]);
    guest.shell("writer fill /dev/disk/a 3 0 16777216");
    println!("longest wait without a backup: {} ms", longest(&guest));
    caller.with(&["--speed-limit", "1M"]).must("full");
    println!("fast fleece, target at 1 MB/s: {} ms", longest(&guest));
    assert!(longest(&guest) < 5000);

    slow_fleece(&guest, &caller);
    clean(&guest, dir.path());

    measure_anew(&guest);
    let fleece = fs.mnt().display().to_string();
    let hung = caller.with(&["--fleece-dir", &fleece, "--cbw-timeout", "5"]);
    let hold = tempfile::tempdir().unwrap();
    let mut child =
        hung.command("inc").env("FLEECEFS_HOLD", hold.path()).spawn().expect("fleecefs starts");
    backup::read_views(&mut child, hold.path());
    fs.freeze("-f");
    // It ends by the time limit alone: the fleece hangs all the time. (Were there no limit, this
    // would be the end of the test.)
    let began = std::time::Instant::now();
    while longest(&guest) < 4000 && began.elapsed() < std::time::Duration::from_secs(60) {
        std::thread::sleep(std::time::Duration::from_millis(200));
    }
    let waited = longest(&guest);
    fs.freeze("-u");
    std::fs::write(hold.path().join("go"), "").unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(14));
    println!("hung fleece, --cbw-timeout 5: {waited} ms");
    // Room for a slow machine, and below the default of 20 s.
    assert!((4000..15_000).contains(&waited), "{waited} ms");
    assert_eq!(status(&guest), "running");
    clean(&guest, dir.path());
    let (said, views) = caller.held("auto");
    assert!(said.contains("INC"), "{said}");
    let mount = Mount::new(&caller.target);
    same(&mount, "a.img", &newest(&caller.target, "a.img"), &views[0].1);
}
