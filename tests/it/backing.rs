//! What is below a disk's own image: its bitmaps do not record what is written there, so that an INC is taken
//! only where that is known to be as it was.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::backup::{self, Caller, images, level, newest, same, stopped};
use crate::support::guard::{self, tied};
use crate::support::guest::Qmp;
use crate::support::mount::Mount;
use crate::support::qemu::one_disk::{Vm, image};
use crate::support::shut_off::{self, UUID, bytes, s, verified, write};
use crate::support::tools::{have, is_root, run};
use serde_json::{Value, json};

const QEMU: &[&str] = &["qemu-system-x86_64", "qemu-storage-daemon", "qemu-img", "qemu-io"];

/// A VM whose only disk is the overlay `vm/thin.qcow2` in a folder of its own.
struct Thin {
    d: tempfile::TempDir,
    /// QEMU's options for the disk, node `n`.
    disk: Vec<String>,
    vm: Option<Vm>,
}

impl Thin {
    fn new(d: tempfile::TempDir, disk: &[&str]) -> Self {
        Thin { d, disk: disk.iter().map(|a| a.to_string()).collect(), vm: None }
    }

    fn thin(&self) -> PathBuf {
        self.d.path().join("vm/thin.qcow2")
    }

    fn start(&mut self) -> &Vm {
        let mut args: Vec<&str> = self.disk.iter().map(String::as_str).collect();
        args.extend(["-device", "virtio-scsi-pci", "-device", "scsi-hd,drive=n,id=vda"]);
        args.extend(UUID);
        self.vm.insert(Vm::with(self.d.path(), &args))
    }

    fn caller(&self) -> Caller {
        self.vm.as_ref().unwrap().caller.clone()
    }

    /// A backup that has this level; gives what it said.
    fn take(&self, want: &str) -> String {
        let caller = self.caller();
        let said = caller.must("auto");
        assert_eq!(level(&caller, "thin.qcow2"), want, "{said}");
        said
    }

    /// The VM is off, and its newest point is what its disk is now.
    fn stop(&mut self) {
        let caller = self.caller();
        self.vm.take().unwrap().quit();
        let mount = Mount::new(&caller.target);
        let point = newest(&caller.target, "thin.qcow2");
        same(&mount, "thin.qcow2", &point, &bytes(&self.thin(), "qcow2"));
    }

    /// A FULL and nights after it; `again` is the level when the VM was off meanwhile, and `change` writes to
    /// what the disk depends on.
    fn nights(mut self, again: &str, change: impl Fn(&Path)) {
        self.start();
        self.take("FULL");
        self.take("INC");
        self.take("INC");
        self.stop();
        write(&self.thin(), "write -P 7 0 64k");
        self.start();
        let said = self.take(again);
        let why = "cannot tell whether backing file";
        assert_eq!(said.contains(why), again == "FULL", "{said}");
        self.take("INC");
        self.stop();
        change(self.d.path());
        write(&self.thin(), "write -P 8 64k 64k");
        self.start();
        let said = self.take("FULL");
        assert!(said.contains("taking a FULL:"), "{said}");
        for _ in 0..3 {
            self.take("INC");
        }
        self.stop();
        verified(&self.d.path().join("T"));
    }
}

/// A folder with `vm/base.qcow2`.
fn folder() -> tempfile::TempDir {
    let d = tempfile::tempdir().unwrap();
    image(&d.path().join("vm/base.qcow2"));
    d
}

/// A folder with `vm/thin.qcow2`, whose backing file is `vm/base.raw`.
fn on_raw() -> (tempfile::TempDir, PathBuf) {
    let d = tempfile::tempdir().unwrap();
    std::fs::create_dir(d.path().join("vm")).unwrap();
    let raw = d.path().join("vm/base.raw");
    run("qemu-img", &["create", "-q", "-f", "raw", s(&raw), "4M"]);
    overlay(d.path(), "base.raw", "raw");
    (d, raw)
}

fn overlay(dir: &Path, base: &str, format: &str) {
    let thin = dir.join("vm/thin.qcow2");
    let args = ["create", "-q", "-f", "qcow2", "-b", base, "-F", format, s(&thin), "4M"];
    run("qemu-img", &args);
}

/// The disk as QEMU opens it by its header alone.
fn by_header(file: &Path) -> [String; 2] {
    let file = file.display();
    ["-blockdev".into(), format!("qcow2,node-name=n,file.driver=file,file.filename={file}")]
}

fn change_base(dir: &Path) {
    write(&dir.join("vm/base.qcow2"), "write -P 9 1M 256k");
}

/// A server that ends with its guard.
struct Server(Child);

impl Server {
    fn start(program: &str, args: &[&str], is_ready: impl Fn() -> bool) -> Self {
        let server =
            Server(tied(Command::new(program).args(args).stdin(Stdio::null())).spawn().unwrap());
        let end = Instant::now() + Duration::from_secs(60);
        while !is_ready() {
            assert!(Instant::now() < end, "{program} does not come up");
            std::thread::sleep(Duration::from_millis(20));
        }
        server
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // SAFETY: a signal to our own child, which is not reaped: it unmounts what it has mounted.
        unsafe { libc::kill(self.0.id() as i32, libc::SIGTERM) };
        let _ = self.0.wait();
    }
}

#[test]
fn a_backing_file_named_as_seen_from_qemus_folder() {
    if !have("a_backing_file_named_as_seen_from_qemus_folder", QEMU) {
        return;
    }
    let d = folder();
    overlay(d.path(), "base.qcow2", "qcow2");
    let [flag, disk] = by_header(Path::new("vm/thin.qcow2"));
    Thin::new(d, &[&flag, &disk]).nights("INC", change_base);
}

#[test]
fn a_filter_in_the_backing_chain() {
    if !have("a_filter_in_the_backing_chain", QEMU) {
        return;
    }
    let d = folder();
    let file = |name: &str| json!({"driver": "file", "filename": d.path().join("vm").join(name)});
    overlay(d.path(), s(&d.path().join("vm/base.qcow2")), "qcow2");
    let base = json!({"driver": "qcow2", "file": file("base.qcow2")});
    let base = json!({"driver": "throttle", "node-name": "b", "throttle-group": "tg",
        "read-only": true, "file": base});
    let disk =
        json!({"driver": "qcow2", "node-name": "n", "file": file("thin.qcow2"), "backing": "b"});
    let (base, disk) = (base.to_string(), disk.to_string());
    let args = ["-object", "throttle-group,id=tg", "-blockdev", &base, "-blockdev", &disk];
    Thin::new(d, &args).nights("INC", change_base);
}

#[test]
fn a_base_whose_data_is_in_another_file() {
    if !have("a_base_whose_data_is_in_another_file", QEMU) {
        return;
    }
    let d = tempfile::tempdir().unwrap();
    std::fs::create_dir(d.path().join("vm")).unwrap();
    let (base, data) = (d.path().join("vm/base.qcow2"), d.path().join("vm/base.raw"));
    let option = format!("data_file={},data_file_raw=on", s(&data));
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &option, s(&base), "4M"]);
    write(&base, "write -P 5 0 2M");
    overlay(d.path(), s(&base), "qcow2");
    let [flag, disk] = by_header(&d.path().join("vm/thin.qcow2"));
    Thin::new(d, &[&flag, &disk]).nights("INC", |dir| {
        let data = dir.join("vm/base.raw");
        run("qemu-io", &["-f", "raw", "-c", "write -P 9 1M 256k", s(&data)]);
    });
}

/// A raw file behind an NBD server, and the server's address.
fn remote(dir: &Path) -> (Server, String) {
    let raw = dir.join("base.raw");
    run("qemu-img", &["create", "-q", "-f", "raw", s(&raw), "4M"]);
    let socket = dir.join("nbd");
    let args = ["-t", "-e", "8", "-f", "raw", "--cache=writeback", "-k", s(&socket), s(&raw)];
    let ready = || std::os::unix::net::UnixStream::connect(&socket).is_ok();
    let server = Server::start("qemu-nbd", &args, ready);
    (server, format!("nbd+unix:///?socket={}", s(&socket)))
}

#[test]
fn a_base_on_another_host() {
    if !have("a_base_on_another_host", &[QEMU, &["qemu-nbd"]].concat()) {
        return;
    }
    let d = tempfile::tempdir().unwrap();
    std::fs::create_dir(d.path().join("vm")).unwrap();
    let (_server, address) = remote(d.path());
    overlay(d.path(), &address, "raw");
    let [flag, disk] = by_header(&d.path().join("vm/thin.qcow2"));
    Thin::new(d, &[&flag, &disk]).nights("FULL", |_| {
        run("qemu-io", &["-f", "raw", "-c", "write -P 9 1M 256k", &address]);
    });
}

#[test]
fn a_base_on_a_block_device() {
    let name = "a_base_on_a_block_device";
    if !have(name, &[QEMU, &["losetup"]].concat()) || !is_root(name) {
        return;
    }
    let d = tempfile::tempdir().unwrap();
    std::fs::create_dir(d.path().join("vm")).unwrap();
    let raw = d.path().join("base.raw");
    run("qemu-img", &["create", "-q", "-f", "raw", s(&raw), "4M"]);
    let attached = guard::Guard::attach("", &raw);
    let device = s(attached.made()).to_string();
    overlay(d.path(), &device, "raw");
    let [flag, disk] = by_header(&d.path().join("vm/thin.qcow2"));
    Thin::new(d, &[&flag, &disk]).nights("FULL", |_| {
        run("qemu-io", &["-f", "raw", "-c", "write -P 9 1M 256k", &device]);
    });
}

/// QEMU's own FUSE server says of each file that it was written to just now.
#[test]
fn a_base_on_a_fuse_file_system() {
    if !have("a_base_on_a_fuse_file_system", &[QEMU, &["/dev/fuse"]].concat()) {
        return;
    }
    let d = tempfile::tempdir().unwrap();
    std::fs::create_dir(d.path().join("vm")).unwrap();
    let (raw, shown) = (d.path().join("base.raw"), d.path().join("shown"));
    run("qemu-img", &["create", "-q", "-f", "raw", s(&raw), "4M"]);
    std::fs::write(&shown, "").unwrap();
    let file = format!("file,node-name=f,filename={}", s(&raw));
    let export = format!("fuse,id=e,node-name=f,mountpoint={},writable=on,growable=off", s(&shown));
    let ready = || std::fs::metadata(&shown).is_ok_and(|m| m.len() == 4 << 20);
    let args = ["--blockdev", &file, "--export", &export];
    let _server = Server::start("qemu-storage-daemon", &args, ready);
    overlay(d.path(), s(&shown), "raw");
    let [flag, disk] = by_header(&d.path().join("vm/thin.qcow2"));
    Thin::new(d, &[&flag, &disk]).nights("FULL", |_| {
        run("qemu-io", &["-f", "raw", "-c", "write -P 9 1M 256k", s(&shown)]);
    });
}

#[test]
fn a_disk_that_gets_its_first_backing_file() {
    if !have("a_disk_that_gets_its_first_backing_file", QEMU) {
        return;
    }
    let d = folder();
    let thin = d.path().join("vm/thin.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", s(&thin), "4M"]);
    let [flag, disk] = by_header(&thin);
    let mut thin = Thin::new(d, &[&flag, &disk]);
    let rebase = |dir: &Path, base: &str| {
        let file = dir.join("vm/thin.qcow2");
        run(
            "qemu-img",
            &["rebase", "-q", "-u", "-f", "qcow2", "-b", base, "-F", "qcow2", s(&file)],
        );
    };
    thin.start();
    thin.take("FULL");
    thin.stop();
    thin.start();
    thin.take("INC");
    thin.stop();
    rebase(thin.d.path(), "base.qcow2");
    thin.start();
    assert!(thin.take("FULL").contains("had none at INC-"));
    thin.take("INC");
    thin.stop();
    rebase(thin.d.path(), "");
    thin.start();
    assert!(thin.take("FULL").contains("no longer the backing file"));
    thin.stop();
    verified(&thin.d.path().join("T"));
}

/// QEMU lives on, but had closed the disk.
#[test]
fn a_disk_that_was_unplugged_meanwhile() {
    if !have("a_disk_that_was_unplugged_meanwhile", &[QEMU, &["qemu-nbd"]].concat()) {
        return;
    }
    let d = tempfile::tempdir().unwrap();
    std::fs::create_dir(d.path().join("vm")).unwrap();
    let (_server, address) = remote(d.path());
    overlay(d.path(), &address, "raw");
    let socket = json!({"type": "unix", "path": d.path().join("nbd")});
    let disk = json!({"driver": "qcow2", "node-name": "n",
        "file": {"driver": "file", "filename": d.path().join("vm/thin.qcow2"), "node-name": "f"},
        "backing": "b"});
    let base = json!({"driver": "raw", "node-name": "b", "read-only": true,
        "file": {"driver": "nbd", "node-name": "r", "server": socket}});
    let args = ["-blockdev", &base.to_string(), "-blockdev", &disk.to_string()];
    let mut thin = Thin::new(d, &args);
    thin.start();
    thin.take("FULL");
    thin.take("INC");
    let ask = |thin: &Thin, command: &str, arguments: Value| {
        let mut qmp = Qmp::connect(&thin.caller().qmp);
        qmp.execute(command, arguments)
    };
    ask(&thin, "device_del", json!({"id": "vda"}));
    let gone = || {
        let list = ask(&thin, "query-block", json!({}));
        list.as_array().unwrap().iter().all(|d| d["inserted"]["node-name"] != "n")
    };
    let end = Instant::now() + Duration::from_secs(60);
    while !gone() {
        assert!(Instant::now() < end, "it is not unplugged");
    }
    ask(&thin, "blockdev-del", json!({"node-name": "n"}));
    run("qemu-io", &["-f", "raw", "-c", "write -P 9 1M 256k", &address]);
    ask(&thin, "blockdev-add", disk);
    ask(&thin, "device_add", json!({"driver": "scsi-hd", "drive": "n", "id": "vda"}));
    assert!(thin.take("FULL").contains("cannot tell whether backing file"));
    thin.take("INC");
    thin.stop();
}

/// The frozen view reads it.
#[test]
fn a_backing_file_that_is_written_to_during_a_backup_fails_it() {
    if !have("a_backing_file_that_is_written_to_during_a_backup_fails_it", QEMU) {
        return;
    }
    let (d, raw) = on_raw();
    let [flag, disk] = by_header(&d.path().join("vm/thin.qcow2"));
    let mut thin = Thin::new(d, &[&flag, &disk]);
    let fails = |command: Command, err: &Path, byte: u8| {
        let mut child = stopped(command, "files created", err);
        write_raw(&raw, byte);
        // The file that QEMU has open is looked at, whatever it is called.
        let moved = raw.with_extension("moved");
        if byte == 2 {
            std::fs::rename(&raw, &moved).unwrap();
        }
        // SAFETY: a signal to our own child, which is not reaped.
        unsafe { libc::kill(child.id() as i32, libc::SIGCONT) };
        let code = child.wait().unwrap().code();
        let said = std::fs::read_to_string(err).unwrap();
        let words = "was written to or replaced during the backup";
        assert!(code == Some(13) && said.contains(words), "{code:?}: {said}");
        if byte == 2 {
            std::fs::rename(&moved, &raw).unwrap();
        }
    };
    let err = thin.d.path().join("stderr");
    thin.start();
    thin.take("FULL");
    fails(thin.caller().command("inc"), &err, 1);
    fails(thin.caller().command("full"), &err, 2);
    assert!(thin.take("FULL").contains("base.raw is not as it was at FULL-"));
    let caller = thin.caller();
    thin.stop();
    let lies = ["--backing-file", s(&raw)];
    let file = thin.thin();
    let off = |level: &str| shut_off::command(&caller, level, &[s(&file)], &lies);
    assert!(off("inc").status().unwrap().success());
    fails(off("inc"), &err, 3);
    assert_eq!(images(&caller.target.join("thin.qcow2")).len(), 3);
    assert!(off("auto").status().unwrap().success());
    assert_eq!(level(&caller, "thin.qcow2"), "FULL");
    let mount = Mount::new(&caller.target);
    let point = newest(&caller.target, "thin.qcow2");
    same(&mount, "thin.qcow2", &point, &bytes(&file, "qcow2"));
    drop(mount);
    verified(&caller.target);
    assert_eq!(backup::leftovers(thin.d.path()), Vec::<PathBuf>::new());
}

#[test]
fn a_base_that_is_replaced_by_a_copy_with_its_times() {
    if !have("a_base_that_is_replaced_by_a_copy_with_its_times", &[QEMU, &["cp"]].concat()) {
        return;
    }
    let (d, raw) = on_raw();
    let [flag, disk] = by_header(&d.path().join("vm/thin.qcow2"));
    Thin::new(d, &[&flag, &disk]).nights("INC", |_| {
        let other = raw.with_extension("new");
        run("cp", &["-p", s(&raw), s(&other)]);
        run("qemu-io", &["-f", "raw", "-c", "write -P 9 1M 256k", s(&other)]);
        run("touch", &["-r", s(&raw), s(&other)]);
        // In place: it keeps its inode.
        run("cp", &["-p", s(&other), s(&raw)]);
    });
}

/// What QEMU calls its base is another file now, which another node of it reads.
#[test]
fn a_base_whose_name_leads_to_the_file_of_another_node() {
    if !have("a_base_whose_name_leads_to_the_file_of_another_node", QEMU) {
        return;
    }
    let d = folder();
    let base = d.path().join("vm/base.qcow2");
    overlay(d.path(), "base.qcow2", "qcow2");
    let [flag, disk] = by_header(&d.path().join("vm/thin.qcow2"));
    let mut thin = Thin::new(d, &[&flag, &disk]);
    thin.start();
    thin.take("FULL");
    thin.take("INC");
    std::fs::rename(&base, base.with_extension("first")).unwrap();
    run("cp", &[s(&base.with_extension("first")), s(&base)]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 9 1M 256k", s(&base)]);
    let other = json!({"driver": "qcow2", "node-name": "other", "read-only": true,
        "file": {"driver": "file", "filename": s(&base)}});
    Qmp::connect(&thin.caller().qmp).execute("blockdev-add", other);
    assert!(thin.take("FULL").contains("is the same file as at INC-"));
    // In one process nothing is exchanged behind QEMU's back.
    thin.take("INC");
    thin.vm.take().unwrap().quit();
    thin.start();
    thin.take("FULL");
    thin.stop();
}

#[test]
fn a_raw_node_above_a_qcow2_overlay_has_its_backing_file_too() {
    if !have("a_raw_node_above_a_qcow2_overlay_has_its_backing_file_too", QEMU) {
        return;
    }
    let (d, raw) = on_raw();
    let file = d.path().join("vm/thin.qcow2");
    let disk = format!(
        "raw,node-name=n,file.driver=qcow2,file.file.driver=file,file.file.filename={}",
        s(&file)
    );
    let mut thin = Thin::new(d, &["-blockdev", &disk]);
    thin.start();
    thin.take("FULL");
    thin.take("INC");
    write_raw(&raw, 9);
    assert!(thin.take("FULL").contains("base.raw is not as it was at INC-"));
    thin.stop();
}

fn write_raw(file: &Path, byte: u8) {
    let file = std::fs::File::options().write(true).open(file).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[byte; 4096], 1 << 20).unwrap();
}
