//! A QEMU that lies, and an owner of the backup directory who exchanges what is in it, while a backup
//! runs with more rights than they have: nothing outside the backup directory is opened for them,
//! made or removed, and no backup that was disturbed says that it succeeded.

use std::fs::File;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::support::backup::{self, Caller, images, leftovers, ours_in_qemu};
use crate::support::guest::Qmp;
use crate::support::qemu::proxy::{self, Lies};
use crate::support::qemu::storage_daemon::Daemon;
use crate::support::tools::{self, have, run};
use fleecefs::backup::state::journal;
use fleecefs::qmp::Address;
use serde_json::{Value, json};

const TOOLS: &[&str] = &["qemu-system-x86_64", "qemu-img", "qemu-io"];

/// QEMU with one disk and a guest that does not run. Ended on drop.
struct Machine {
    dir: tempfile::TempDir,
    child: Child,
}

impl Machine {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("d.qcow2");
        let text = disk.to_str().unwrap();
        run("qemu-img", &["create", "-q", "-f", "qcow2", text, "4M"]);
        run("qemu-io", &["-c", "write -P 7 0 1M", text]);
        let mut c = Command::new("qemu-system-x86_64");
        c.args(["-M", "q35", "-accel", "tcg", "-m", "32", "-nodefaults", "-display", "none", "-S"]);
        for socket in ["real.sock", "own.sock"] {
            let path = dir.path().join(socket);
            c.arg("-qmp").arg(format!("unix:{},server=on,wait=off", path.display()));
        }
        c.arg("-blockdev")
            .arg(format!("driver=qcow2,node-name=disk0,file.driver=file,file.filename={text}"));
        c.args(["-device", "virtio-blk-pci,id=vd0,drive=disk0"]).stdin(Stdio::null());
        let child = c.spawn().expect("QEMU starts");
        let m = Machine { dir, child };
        let end = Instant::now() + Duration::from_secs(60);
        while std::os::unix::net::UnixStream::connect(m.path("own.sock")).is_err() {
            assert!(Instant::now() < end, "QEMU does not come up");
            std::thread::sleep(Duration::from_millis(20));
        }
        std::fs::create_dir(m.path("outside")).unwrap();
        std::fs::write(m.path("outside/victim"), "precious").unwrap();
        m
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn qmp(&self) -> Qmp {
        Qmp::connect(&self.path("own.sock"))
    }

    /// For a backup through a liar.
    fn caller(&self, lies: impl Lies) -> Caller {
        let socket = self.path("qmp.sock");
        let _ = std::fs::remove_file(&socket);
        proxy::listen(&socket, &self.path("real.sock"), lies);
        self.called(socket)
    }

    fn called(&self, qmp: PathBuf) -> Caller {
        let (state, target) = (self.path("state"), self.path("T"));
        Caller { qmp, state, target, more: Vec::new() }
    }

    /// Nothing was done to the file that is none of a backup's business, nor beside it.
    fn check_outside(&self) {
        let list = std::fs::read_dir(self.path("outside")).unwrap();
        let names: Vec<_> = list.flatten().map(|e| e.file_name()).collect();
        assert_eq!(names, ["victim"]);
        assert_eq!(std::fs::read(self.path("outside/victim")).unwrap(), b"precious");
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn said(out: &std::process::Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned()
}

/// Refuses to open images, and puts a link in the place of whatever it finds by its name.
struct Thief {
    target: PathBuf,
    victim: PathBuf,
    got: Arc<Mutex<Vec<(u64, u64)>>>,
}

impl Lies for Thief {
    fn asked(&self, request: &Value, passed: &[File]) -> Option<Value> {
        let metas = passed.iter().map(|f| f.metadata().unwrap());
        self.got.lock().unwrap().extend(metas.map(|m| (m.dev(), m.ino())));
        if request["execute"] != "blockdev-add" {
            return None;
        }
        let name = request["arguments"]["file"]["filename"].as_str()?;
        let open = |p: &Path| symlink(&self.victim, p);
        for path in
            leftovers(&self.target).iter().filter(|p| p.extension().is_some_and(|e| e == "partial"))
        {
            std::fs::remove_file(path).unwrap();
            open(path).unwrap();
        }
        if !name.starts_with("/dev/fdset/") {
            std::fs::remove_file(name).unwrap();
            open(Path::new(name)).unwrap();
        }
        Some(proxy::refusal("Could not open: Permission denied"))
    }
}

#[test]
fn qemu_gets_descriptors_of_nothing_but_what_was_made_for_it() {
    if !have("qemu_gets_descriptors_of_nothing_but_what_was_made_for_it", TOOLS) {
        return;
    }
    let m = Machine::start();
    let got = Arc::new(Mutex::new(Vec::new()));
    let victim = m.path("outside/victim");
    let thief = Thief { target: m.path("T"), victim: victim.clone(), got: got.clone() };
    let caller = m.caller(thief);
    std::fs::create_dir(&caller.target).unwrap();
    let out = caller.run("full");
    assert_eq!(out.status.code(), Some(14), "{}", said(&out));
    let meta = victim.metadata().unwrap();
    let got = got.lock().unwrap();
    assert!(!got.is_empty() && !got.contains(&(meta.dev(), meta.ino())), "{got:?}");
    assert_eq!(leftovers(&caller.target), Vec::<PathBuf>::new());
    m.check_outside();
}

/// A fleece image in a folder that QEMU names has no name there, and is gone with its end.
#[test]
fn the_fleece_image_has_no_name_in_the_folder_of_the_disk() {
    let name = "the_fleece_image_has_no_name_in_the_folder_of_the_disk";
    if !have(name, TOOLS) {
        return;
    }
    let m = Machine::start();
    let caller = m.called(m.path("real.sock")).with(&["--no-stop"]);
    let mut run = caller.command("full");
    let hold = tempfile::tempdir().unwrap();
    let mut child = run.env("FLEECEFS_HOLD", hold.path()).spawn().unwrap();
    backup::read_views(&mut child, hold.path());
    let list = std::fs::read_dir(m.dir.path()).unwrap().flatten();
    let names: Vec<_> = list.map(|e| e.file_name().into_string().unwrap()).collect();
    let found = leftovers(&caller.target);
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!names.iter().any(|n| n.contains("fleece")), "{names:?}");
    let named = |p: &PathBuf| p.file_name().unwrap().to_str().unwrap().contains(".fleece");
    assert!(!found.iter().any(named), "{found:?}");
    caller.must("auto");
    assert_eq!(ours_in_qemu(&mut m.qmp()), Vec::<String>::new());
    assert_eq!(m.qmp().execute("query-fdsets", json!({})), json!([]));
    assert_eq!(leftovers(m.dir.path()), Vec::<PathBuf>::new());
}

/// Replaces text in what QEMU says about its disks.
struct Renames(Vec<(String, String)>);

impl Lies for Renames {
    fn answered(&self, command: &str, answer: &mut Value) {
        let about = ["query-block", "query-named-block-nodes", "x-debug-query-block-graph"];
        if about.contains(&command) {
            let mut text = answer.to_string();
            for (from, to) in &self.0 {
                text = text.replace(from, to);
            }
            *answer = serde_json::from_str(&text).unwrap();
        }
    }
}

#[test]
fn what_qemu_calls_a_disk_is_no_path() {
    if !have("what_qemu_calls_a_disk_is_no_path", TOOLS) {
        return;
    }
    let m = Machine::start();
    let disk = json!(m.path("d.qcow2")).to_string();
    let absolute = m.path("outside/abs").display().to_string();
    for (device, file, layout) in [
        ("../outside/x", "..", "--no-hash"),
        (&absolute, "/", "--no-hash"),
        ("../../outside/x", "..", "--no-subdir"),
        ("", "/vm/.fleecefs", "--no-hash"),
        ("", "/vm/uuid", "--no-subdir"),
        ("", "/vm/x.fleece.raw", "--no-hash"),
        ("", "/vm/x\u{1b}[31m", "--no-hash"),
        ("", "/vm/x\u{202e}y", "--no-hash"),
    ] {
        let lies = [
            (r#""device":"""#.to_string(), format!(r#""device":{}"#, json!(device))),
            (disk.clone(), json!(file).to_string()),
        ];
        let caller = m.caller(Renames(lies.to_vec())).with(&[layout, "--init"]);
        let out = caller.run("full");
        assert_eq!(out.status.code(), Some(0), "{device} {file}: {}", said(&out));
        // Whatever it is called, it has a plain name of ours.
        let there = std::fs::read_dir(&caller.target).unwrap();
        let there = there.map(|e| e.unwrap().file_name().into_string().unwrap());
        let (own, made): (Vec<_>, Vec<_>) =
            there.partition(|n| [".fleecefs", "uuid"].contains(&n.as_str()));
        assert_eq!((own.len(), made.len()), (2, 2), "{device} {file}: {made:?}");
        for name in made {
            assert!(name.contains('~') && !name.chars().any(char::is_control), "{name:?}");
        }
        std::fs::remove_dir_all(&caller.target).unwrap();
        m.check_outside();
    }
}

/// Two disks whose folders would be one where case does not count.
#[test]
fn disks_that_differ_in_case_alone_get_folders_that_differ_in_more() {
    let name = "disks_that_differ_in_case_alone_get_folders_that_differ_in_more";
    if !have(name, &["qemu-storage-daemon", "qemu-img", "qemu-io"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for disk in ["sda", "SDA"] {
        let path = dir.path().join(format!("{disk}.img"));
        run("qemu-img", &["create", "-q", "-f", "qcow2", path.to_str().unwrap(), "1M"]);
    }
    let d = Daemon::start(dir, &[("sda", "driver=qcow2"), ("SDA", "driver=qcow2")]);
    let caller = Caller::of(&d);
    for (level, count) in [("full", 1), ("inc", 2)] {
        caller.must(level);
        let list = std::fs::read_dir(&caller.target).unwrap().flatten();
        let folders = list.filter(|e| e.path().is_dir() && e.file_name() != ".fleecefs");
        let mut names: Vec<_> =
            folders.map(|e| e.file_name().to_str().unwrap().to_lowercase()).collect();
        names.sort();
        assert_eq!(names, ["sda.img", "sda.img-2"]);
        let all = std::fs::read_dir(&caller.target).unwrap().flatten().map(|e| e.path());
        assert!(
            all.filter(|p| p.file_name().unwrap() != ".fleecefs" && p.is_dir())
                .all(|p| images(&p).len() == count)
        );
    }
}

#[test]
fn what_qemu_calls_a_fleece_image_of_an_earlier_run_stays() {
    if !have("what_qemu_calls_a_fleece_image_of_an_earlier_run_stays", TOOLS) {
        return;
    }
    let m = Machine::start();
    let (stand_in, victim) = (m.path("zzzz"), m.path("outside/victim"));
    let partial = m.path("outside/x.partial");
    for (role, word) in [("f", "backup"), ("t", "recover")] {
        std::fs::write(&stand_in, vec![0; 1 << 20]).unwrap();
        std::fs::write(&partial, "an image of somebody else").unwrap();
        let node = format!("fleecefs-0123456789ab-{role}0");
        m.qmp().execute(
            "blockdev-add",
            json!({"driver": "raw", "node-name": node,
                "file": {"driver": "file", "filename": stand_in}}),
        );
        let named = if role == "f" { &victim } else { &partial };
        let text = |p: &Path| json!(p).to_string();
        let caller = m.caller(Renames(vec![(text(&stand_in), text(named))]));
        let out = match word {
            "backup" => caller.run("full"),
            _ => Command::new(env!("CARGO_BIN_EXE_fleecefs"))
                .args(["recover", "--qmp"])
                .arg(&caller.qmp)
                .arg("--state-dir")
                .arg(&caller.state)
                .output()
                .unwrap(),
        };
        assert!(out.status.success(), "{}", said(&out));
        assert_eq!(ours_in_qemu(&mut m.qmp()), Vec::<String>::new());
        assert!(stand_in.exists());
        std::fs::remove_file(&partial).expect("it is still there");
        m.check_outside();
    }
}

#[test]
fn a_journal_in_a_folder_that_others_may_write_to_is_not_followed() {
    if !have("a_journal_in_a_folder_that_others_may_write_to_is_not_followed", TOOLS) {
        return;
    }
    let m = Machine::start();
    let caller = m.called(m.path("real.sock"));
    std::fs::create_dir_all(m.path("outside/d")).unwrap();
    std::fs::write(m.path("outside/d/x.partial"), "x").unwrap();
    std::fs::create_dir(&caller.state).unwrap();
    std::fs::set_permissions(&caller.state, PermissionsExt::from_mode(0o777)).unwrap();
    let disk = json!({"disk": {"index": 0, "dir": m.path("outside/d"), "image": "x",
        "fleece": m.path("outside/victim"), "node": "n", "top": "n", "bitmap": null}});
    let begin = json!({"begin": {"run": "0123456789ab", "target": m.path("outside"),
        "agent": null, "qemu": null}});
    let path = journal::path(&caller.state, &Address::Unix(caller.qmp.clone()));
    let write = || std::fs::write(&path, format!("{begin}\n{disk}\n")).unwrap();
    write();
    let recover = || {
        let mut c = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
        c.args(["recover", "--qmp"]).arg(&caller.qmp).arg("--state-dir").arg(&caller.state);
        c.output().unwrap()
    };
    for out in [recover(), caller.run("full")] {
        assert_eq!(out.status.code(), Some(5), "{}", said(&out));
    }
    assert!(m.path("outside/d/x.partial").exists());
    // Ours, but what it calls a fleece image is none: it stays.
    std::fs::set_permissions(&caller.state, PermissionsExt::from_mode(0o700)).unwrap();
    let out = recover();
    assert!(out.status.success(), "{}", said(&out));
    assert!(said(&out).contains("x was not complete: removed"), "{}", said(&out));
    std::fs::remove_dir_all(m.path("outside/d")).unwrap();
    m.check_outside();
}

/// Exchanges each unfinished image for a link, as fast as it can, until it is dropped.
struct Exchanger {
    end: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<usize>>,
}

impl Exchanger {
    fn start(folder: PathBuf, victim: PathBuf) -> Self {
        let end = Arc::new(AtomicBool::new(false));
        let ended = end.clone();
        let thread = std::thread::spawn(move || {
            let mut count = 0;
            while !ended.load(Ordering::SeqCst) {
                for e in std::fs::read_dir(&folder).unwrap().flatten() {
                    let partial = e.path().extension().is_some_and(|x| x == "partial");
                    if partial && e.file_type().is_ok_and(|t| t.is_file()) {
                        let away = folder.join("moved");
                        if std::fs::rename(e.path(), away).is_ok() {
                            let _ = symlink(&victim, e.path());
                            count += 1;
                        }
                    }
                }
            }
            count
        });
        Exchanger { end, thread: Some(thread) }
    }

    /// How often it did.
    fn end(mut self) -> usize {
        self.end.store(true, Ordering::SeqCst);
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Exchanger {
    fn drop(&mut self) {
        self.end.store(true, Ordering::SeqCst);
    }
}

#[test]
fn an_unfinished_image_that_is_exchanged_for_a_link_leads_nowhere() {
    if !have("an_unfinished_image_that_is_exchanged_for_a_link_leads_nowhere", TOOLS) {
        return;
    }
    let m = Machine::start();
    let caller = m.called(m.path("real.sock"));
    let folder = caller.target.join("d.qcow2");
    std::fs::create_dir_all(folder.join(".fleecefs")).unwrap();
    for round in 0..10 {
        let exchanger = Exchanger::start(folder.clone(), m.path("outside/victim"));
        let out = caller.run("full");
        let exchanged = exchanger.end();
        let points: Vec<_> = std::fs::read_dir(&folder)
            .unwrap()
            .flatten()
            .filter(|e| e.file_name().to_str().unwrap().starts_with("FULL-"))
            .collect();
        // One that found no time to do it has done nothing.
        if exchanged > 0 {
            assert_eq!(out.status.code(), Some(18), "{round}: {}", said(&out));
            assert_eq!(points.len(), 0, "{round}: {points:?}");
        }
        points.iter().for_each(|p| std::fs::remove_file(p.path()).unwrap());
        m.check_outside();
    }
}

fn fifo(path: &Path) {
    run("mkfifo", &[path.to_str().unwrap()]);
}

#[test]
fn links_and_pipes_in_the_target_are_refused_or_replaced() {
    if !have("links_and_pipes_in_the_target_are_refused_or_replaced", TOOLS) {
        return;
    }
    let m = Machine::start();
    let outside = m.path("outside");
    let config = m.path("guest.xml");
    std::fs::write(&config, "<domain/>").unwrap();
    // Without --init a folder that has something else is refused at once.
    let more = ["--init", "--config", config.to_str().unwrap()];
    let caller = m.called(m.path("real.sock")).with(&more);
    let target = caller.target.clone();
    let fresh = || {
        let _ = std::fs::remove_dir_all(&target);
        std::fs::create_dir(&target).unwrap();
    };
    type Prepare<'a> = &'a dyn Fn();
    let refused: [Prepare<'_>; 5] = [
        &|| symlink(&outside, target.join("d.qcow2")).unwrap(),
        &|| {
            std::fs::create_dir(target.join("d.qcow2")).unwrap();
            symlink(&outside, target.join("d.qcow2/.fleecefs")).unwrap();
        },
        &|| symlink(outside.join("victim"), target.join("uuid")).unwrap(),
        &|| fifo(&target.join("uuid")),
        &|| std::fs::create_dir(target.join("uuid")).unwrap(),
    ];
    for (i, prepare) in refused.iter().enumerate() {
        fresh();
        prepare();
        let out = caller.run("full");
        assert_eq!(out.status.code(), Some(11), "{i}: {}", said(&out));
        m.check_outside();
    }
    // What is replaced whole may be a link before.
    fresh();
    symlink(outside.join("victim"), target.join("d.qcow2.config")).unwrap();
    caller.must("full");
    assert!(target.join("d.qcow2.config").symlink_metadata().unwrap().is_file());
    m.check_outside();
}

/// The target that the user names may be a link: it is followed once.
#[test]
fn a_linked_target_and_a_linked_state_folder_work() {
    if !have("a_linked_target_and_a_linked_state_folder_work", TOOLS) {
        return;
    }
    let m = Machine::start();
    let mut caller = m.called(m.path("real.sock"));
    for name in ["T", "state"] {
        std::fs::create_dir(m.path(&format!("real-{name}"))).unwrap();
        symlink(format!("real-{name}"), m.path(&format!("link-{name}"))).unwrap();
    }
    caller.target = m.path("link-T");
    caller.state = m.path("link-state");
    caller.must("full");
    caller.must("inc");
    assert_eq!(images(&m.path("real-T/d.qcow2")).len(), 2);
    std::fs::create_dir(m.path("real-T/deeper")).unwrap();
    caller.target = m.path("link-T/deeper/still");
    caller.must("full");
    assert_eq!(images(&m.path("real-T/deeper/still/d.qcow2")).len(), 1);
}

/// Each way in which QEMU opens what it gets descriptors of.
#[test]
fn all_ways_to_write_an_image_work_with_descriptors() {
    let name = "all_ways_to_write_an_image_work_with_descriptors";
    if !have(name, TOOLS) {
        return;
    }
    let m = Machine::start();
    let caller = m.called(m.path("real.sock"));
    let fleeces = m.path("fleeces");
    std::fs::create_dir(&fleeces).unwrap();
    let fleeces = fleeces.to_str().unwrap();
    let ways: [&[&str]; 5] = [
        &["--direct"],
        &["--direct", "--aio", "native"],
        &["--direct", "--compress"],
        &["--fleece-dir", fleeces],
        &["--pause"],
    ];
    for (i, way) in ways.iter().enumerate() {
        caller.with(way).must(if i == 0 { "full" } else { "auto" });
    }
    caller.must("full");
    let list = images(&caller.target.join("d.qcow2"));
    assert_eq!(list.len(), ways.len() + 1);
    for full in [&list[0], &list[ways.len()]] {
        let (disk, full) = (m.path("d.qcow2"), full.to_str().unwrap());
        run("qemu-img", &["compare", "-q", "-U", disk.to_str().unwrap(), full]);
    }
    assert_eq!(leftovers(m.dir.path()), Vec::<PathBuf>::new());
    assert_eq!(m.qmp().execute("query-fdsets", json!({})), json!([]));
}

/// Who may reach the socket can back up, whoever QEMU runs as: QEMU gets descriptors.
#[test]
fn a_user_without_rights_backs_up_what_he_may_not_read() {
    let name = "a_user_without_rights_backs_up_what_he_may_not_read";
    // SAFETY: geteuid has no preconditions.
    if unsafe { libc::geteuid() } != 0 {
        println!("skipped: {name} needs root");
        return;
    }
    if !have(name, &[TOOLS, &["setpriv"]].concat()) {
        return;
    }
    const USER: u32 = 65534;
    let m = Machine::start();
    let (program, home) = (m.path("fleecefs"), m.path("home"));
    tools::copy_program(env!("CARGO_BIN_EXE_fleecefs"), &program);
    std::fs::create_dir(&home).unwrap();
    std::os::unix::fs::chown(&home, Some(USER), Some(USER)).unwrap();
    let open = |p: &Path, mode| {
        std::fs::set_permissions(p, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    open(m.dir.path(), 0o711);
    open(&m.path("d.qcow2"), 0o600);
    open(&m.path("real.sock"), 0o666);
    let run = |level: &str, home: Option<&Path>| {
        let mut c = Command::new("setpriv");
        c.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(&program);
        c.args(["backup", "--level", level, "--qmp"]).arg(m.path("real.sock"));
        c.arg("--target").arg(m.path("home/T"));
        for variable in ["HOME", "XDG_STATE_HOME", "FLEECEFS_STATE_DIR"] {
            c.env_remove(variable);
        }
        if let Some(home) = home {
            c.env("HOME", home);
        }
        c.output().unwrap()
    };
    let out = run("full", None);
    assert_eq!(out.status.code(), Some(2), "no place for its state: {}", said(&out));
    for level in ["full", "inc"] {
        let out = run(level, Some(&home));
        assert!(out.status.success(), "{}", said(&out));
    }
    let list = images(&home.join("T/d.qcow2"));
    assert_eq!(list.len(), 2);
    assert!(list.iter().all(|p| p.metadata().unwrap().uid() == USER));
    let (disk, full) = (m.path("d.qcow2"), list[0].to_str().unwrap());
    tools::run("qemu-img", &["compare", "-q", "-U", disk.to_str().unwrap(), full]);
    assert_eq!(leftovers(&home), Vec::<PathBuf>::new());
}
