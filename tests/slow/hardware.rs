//! `backup` of guests whose hardware is not just disks that stay: firmware flash, a monitor on TCP,
//! disks that come and go, block devices of the host.

use std::path::{Path, PathBuf};

use crate::support::backup::{
    self, Caller, bitmaps, leftovers, level, manifest_of, newest, ours_in_qemu, same,
};
use crate::support::guest::{Disk, Guest, Qmp, has_qemu};
use crate::support::mount::Mount;
use crate::support::qemu::storage_daemon::Daemon;
use crate::support::storage::Loop;
use crate::support::tools::{have, is_root, run};
use serde_json::{Value, json};

const TOOLS: &[&str] = &["qemu-img", "/dev/fuse"];

fn image(dir: &Path, name: &str, format: &str, size: &str) -> PathBuf {
    let path = dir.join(format!("{name}.img"));
    run("qemu-img", &["create", "-q", "-f", format, path.to_str().unwrap(), size]);
    path
}

/// A backup that is held at its freeze point, succeeds, equals the frozen views, and leaves nothing.
fn good(guest: &Guest, caller: &Caller, wish: &str, expect: &[(&str, &str)]) -> String {
    let (said, views) = caller.held(wish);
    let mut disks: Vec<&str> = views.iter().map(|v| v.0.as_str()).collect();
    disks.sort_unstable();
    assert_eq!(disks, expect.iter().map(|e| e.0).collect::<Vec<_>>(), "{said}");
    let mount = Mount::new(&caller.target);
    for (disk, view) in &views {
        same(&mount, disk, &newest(&caller.target, disk), view);
    }
    for (disk, want) in expect {
        assert_eq!(level(caller, disk), *want, "{disk}: {said}");
        println!("{wish}: {disk} {want}");
    }
    clean(guest);
    said
}

/// Nothing of ours is left, and the guest runs.
fn clean(guest: &Guest) {
    let mut qmp = guest.qmp();
    assert_eq!(ours_in_qemu(&mut qmp), Vec::<String>::new());
    assert_eq!(qmp.execute("query-status", json!({}))["status"], "running");
    assert_eq!(leftovers(&guest.path("")), Vec::<PathBuf>::new());
}

/// The size of a variable store for OVMF: no multiple of 64 KiB, so that clusters end beyond it.
const FLASH: u64 = 528 << 10;

/// SeaBIOS, which comes with QEMU.
fn firmware() -> Option<PathBuf> {
    let folders = ["/usr/share/seabios", "/usr/share/qemu"];
    folders.iter().map(|d| Path::new(d).join("bios-256k.bin")).find(|p| p.is_file())
}

/// The guest programs bytes of its second flash, just below the first, as firmware does.
fn program_flash(guest: &Guest, offset: u64, byte: u8) {
    let at = (4u64 << 30) - (256 << 10) - FLASH + offset;
    // The commands of Intel's flash chips: program a byte, be memory again.
    let command = format!("devmem {at} 8 0x40; devmem {at} 8 {byte}; devmem {at} 8 0xff");
    guest.shell(&command);
}

#[test]
fn firmware_flash_is_copied_whole_each_time() {
    let name = "firmware_flash_is_copied_whole_each_time";
    if !have(name, TOOLS) || !has_qemu(name) {
        return;
    }
    let Some(firmware) = firmware() else {
        assert!(std::env::var_os("CI").is_none(), "{name} needs SeaBIOS");
        println!("skipped: {name} needs SeaBIOS");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let code = dir.path().join("code.fd");
    std::fs::copy(firmware, &code).unwrap();
    let vars = dir.path().join("vars.fd");
    // Erased flash is all ones, and programming clears bits.
    let erased: Vec<u8> = vec![0xff; FLASH as usize];
    std::fs::write(&vars, &erased).unwrap();
    let file = |n: &str, p: &Path, more: &str| {
        format!("driver=raw,node-name={n},file.driver=file,file.filename={}{more}", p.display())
    };
    let options = [
        "-blockdev",
        &file("code", &code, ",read-only=on"),
        "-blockdev",
        &file("vars", &vars, ""),
        "-machine",
        "pflash0=code,pflash1=vars",
    ];
    let disks = [Disk::new("a", image(dir.path(), "a", "qcow2", "16M"))];
    let guest = Guest::launch(name, &disks, &[], &options).expect("QEMU is there");
    guest.wait_ready();
    let caller = Caller::guest(&guest).with(&["--exclude", "root"]);
    let levels = [("auto", "FULL"), ("auto", "INC"), ("inc", "INC"), ("diff", "DIFF")];
    for (round, (wish, of_disk)) in levels.into_iter().enumerate() {
        // In the last bytes too: they are no whole cluster.
        let byte = 0x10 + round as u8;
        program_flash(&guest, 0x1000 + round as u64, byte);
        program_flash(&guest, FLASH - 8 + round as u64, byte);
        let said = good(&guest, &caller, wish, &[("a.img", of_disk), ("vars.fd", "FULL")]);
        assert!(said.contains("code: skipped: read-only"), "{said}");
        let now = std::fs::read(&vars).unwrap();
        assert_eq!((now[0x1000 + round], now[FLASH as usize - 8 + round]), (byte, byte));
        let mount = Mount::new(&caller.target);
        same(&mount, "vars.fd", &newest(&caller.target, "vars.fd"), &now);
    }
    // No bitmap records what is copied whole.
    assert_eq!(bitmaps(&mut guest.qmp()).len(), 2);
    println!("pflash: FULL each time, as the file; the read-only one is skipped and said");
}

/// The port that a monitor of QEMU listens on.
fn port(qmp: &mut Qmp) -> u16 {
    let list = qmp.execute("query-chardev", json!({}));
    let names = list.as_array().unwrap().iter().filter_map(|c| c["filename"].as_str());
    let mut ports = names.filter_map(|n| n.split("tcp:127.0.0.1:").nth(1)?.split(',').next());
    ports.next().expect("a monitor listens on TCP").parse().expect("a port")
}

#[test]
fn a_monitor_on_tcp() {
    let name = "a_monitor_on_tcp";
    if !have(name, TOOLS) || !has_qemu(name) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let disks = [Disk::new("a", image(dir.path(), "a", "qcow2", "16M"))];
    let tcp = ["-qmp", "tcp:127.0.0.1:0,server=on,wait=off"];
    let guest = Guest::launch(name, &disks, &["churn /dev/disk/a 1"], &tcp).expect("QEMU is there");
    guest.wait_ready();
    let port = port(&mut guest.qmp());
    let caller = Caller { qmp: format!("tcp:127.0.0.1:{port}").into(), ..Caller::guest(&guest) }
        .with(&["--include", "a"]);
    for (wish, level) in [("full", "FULL"), ("inc", "INC"), ("auto", "INC")] {
        good(&guest, &caller, wish, &[("a.img", level)]);
    }
    // The same guest by another of its sockets, and by another name of this one.
    for qmp in [guest.qmp_socket(), format!("tcp:localhost:{port}").into()] {
        good(&guest, &Caller { qmp, ..caller.clone() }, "auto", &[("a.img", "INC")]);
    }
    guest.kill();
    let out = caller.run("auto");
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(!out.status.success());
    assert!(said.contains("nothing listens on the socket") && said.contains(&port.to_string()));
    println!("nobody listens: {}", said.lines().last().unwrap());
}

/// Adds a disk to the running guest, which writes to it.
fn plug(guest: &Guest, path: &Path, name: &str, device: &Value) {
    let mut qmp = guest.qmp();
    let file = json!({"driver": "file", "filename": path, "discard": "unmap"});
    qmp.execute("blockdev-add", json!({"driver": "qcow2", "node-name": name, "file": file}));
    let mut all = json!({"drive": name, "id": name, "serial": name});
    all.as_object_mut().unwrap().extend(device.as_object().unwrap().clone());
    qmp.execute("device_add", all);
    drop(qmp);
    let wait = format!(
        "for i in $(seq 300); do link-disks; [ -b /dev/disk/{name} ] && exit 0; usleep 100000; done; exit 1"
    );
    guest.shell(&wait);
    guest.shell(&format!("writer fill /dev/disk/{name} 3 1048576 1048576"));
}

/// Asks the guest to give up a disk, and waits until it has.
fn unplug(qmp: &mut Qmp, name: &str) {
    qmp.execute("device_del", json!({"id": name}));
    while qmp.wait_event("DEVICE_DELETED")["data"]["device"] != name {}
}

/// A disk goes while the backup is held at its freeze point: the frozen view stays, and so does the point.
fn a_disk_removed_during_a_backup(guest: &Guest, caller: &Caller, name: &str) {
    guest.shell(&format!("writer fill /dev/disk/{name} 5 3145728 1048576"));
    let hold = tempfile::tempdir().unwrap();
    let mut child =
        caller.command("inc").env("FLEECEFS_HOLD", hold.path()).spawn().expect("fleecefs starts");
    let views = backup::read_views(&mut child, hold.path());
    assert_eq!(views.len(), 2);
    unplug(&mut guest.qmp(), name);
    std::fs::write(hold.path().join("go"), "").unwrap();
    assert!(child.wait().unwrap().success());
    let mount = Mount::new(&caller.target);
    for (disk, view) in &views {
        same(&mount, disk, &newest(&caller.target, disk), view);
        assert_eq!(level(caller, disk), "INC");
    }
    println!("{name}: unplugged during the backup: exit 0, both points right");
}

#[test]
fn disks_attached_and_removed() {
    let name = "disks_attached_and_removed";
    if !have(name, TOOLS) || !has_qemu(name) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let disks = [Disk::new("a", image(dir.path(), "a", "qcow2", "16M"))];
    let bus = ["-device", "pcie-root-port,id=hot,chassis=1,slot=1"];
    let options = [bus, ["-device", "virtio-scsi-pci,id=hba"]].concat();
    let guest =
        Guest::launch(name, &disks, &["churn /dev/disk/a 1"], &options).expect("QEMU is there");
    guest.wait_ready();
    let caller = Caller::guest(&guest).with(&["--exclude", "root"]);
    good(&guest, &caller, "auto", &[("a.img", "FULL")]);
    let new = image(dir.path(), "new", "qcow2", "16M");
    let pci = json!({"driver": "virtio-blk-pci", "bus": "hot"});
    let scsi = json!({"driver": "scsi-hd", "bus": "hba.0"});
    // Plugged again, the disk has its bitmap in its image, and gets an INC.
    for (name, device, level, during) in
        [("new", &pci, "FULL", false), ("scsi", &scsi, "INC", true), ("again", &pci, "INC", true)]
    {
        plug(&guest, &new, name, device);
        let said = good(&guest, &caller, "auto", &[("a.img", "INC"), ("new.img", level)]);
        assert_eq!(said.contains("new: first backup to this target"), level == "FULL", "{said}");
        if during {
            a_disk_removed_during_a_backup(&guest, &caller, name);
        } else {
            good(&guest, &caller, "inc", &[("a.img", "INC"), ("new.img", "INC")]);
            unplug(&mut guest.qmp(), name);
        }
        clean(&guest);
        guest.qmp().execute("blockdev-del", json!({"node-name": name}));
        good(&guest, &caller, "auto", &[("a.img", "INC")]);
    }
}

#[test]
fn a_block_device_of_the_host() {
    let name = "a_block_device_of_the_host";
    if !have(name, TOOLS)
        || !have(name, &["losetup", "/dev/loop-control"])
        || !has_qemu(name)
        || !is_root(name)
    {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let device = Loop::new(&image(dir.path(), "volume", "raw", "32M"));
    let disks = [Disk::new("a", device.path()).format("raw")];
    let guest = Guest::start(name, &disks, &["churn /dev/disk/a 1"]).expect("QEMU is there");
    let folder = device.path().file_name().unwrap().to_str().unwrap().to_owned();
    let caller = Caller::guest(&guest).with(&["--include", "a"]);
    for (wish, level) in [("full", "FULL"), ("inc", "INC"), ("diff", "DIFF"), ("inc", "INC")] {
        good(&guest, &caller, wish, &[(&folder, level)]);
        assert_eq!(format(&newest(&caller.target, &folder)), "qcow2");
    }
    // With no writer the point is what the device holds.
    guest.shell("killall writer; sync");
    let said = good(&guest, &caller, "auto", &[(&folder, "INC")]);
    let mount = Mount::new(&caller.target);
    let bytes = std::fs::read(device.path()).unwrap();
    same(&mount, &folder, &newest(&caller.target, &folder), &bytes);
    drop(mount);
    println!("{}", said.lines().find(|l| l.contains("INC")).unwrap());
    guest.kill();
    guest.boot(&guest.path("root.qcow2"), &disks, &[], &[]);
    guest.wait_ready();
    let said = good(&guest, &caller, "auto", &[(&folder, "FULL")]);
    let why = said.lines().find(|l| l.contains("taking a FULL:")).expect("it says why");
    println!("restarted: {why}");
}

/// Gives a raw disk another size while QEMU lives. A volume of LVM that has grown holds there what
/// was on its storage before, which this does for a file. (An exported node cannot be resized.)
fn grow(d: &Daemon, name: &str, from: u64, to: u64, byte: u8) {
    put(d, name, from, to - from, byte);
    resize(d, name, &[to]);
}

/// Bytes that come without QEMU.
fn put(d: &Daemon, name: &str, at: u64, len: u64, byte: u8) {
    let junk = vec![byte; len as usize];
    let file = std::fs::File::options().write(true).open(d.path(&format!("{name}.img"))).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &junk, at).unwrap();
}

fn resize(d: &Daemon, name: &str, sizes: &[u64]) {
    let mut qmp = d.qmp();
    let (export, top) = (format!("{name}-export"), format!("{name}-top"));
    qmp.execute("block-export-del", json!({"id": export}));
    while qmp.wait_event("BLOCK_EXPORT_DELETED")["data"]["id"] != export.as_str() {}
    for size in sizes {
        qmp.execute("block_resize", json!({"node-name": top, "size": size}));
    }
    let again =
        json!({"type": "nbd", "id": export, "node-name": top, "name": name, "writable": true});
    qmp.execute("block-export-add", again);
}

/// Cuts a raw disk and grows it again: there are the bytes of now, which QEMU knows nothing of.
fn cut(d: &Daemon, name: &str, to: u64, size: u64, byte: u8) {
    resize(d, name, &[to, size]);
    put(d, name, to, size - to, byte);
}

#[test]
fn a_raw_disk_that_was_smaller_between_two_points() {
    const KIB: u64 = 1 << 10;
    let name = "a_raw_disk_that_was_smaller_between_two_points";
    if !have(name, TOOLS) || !have(name, &["qemu-storage-daemon", "qemu-io"]) {
        return;
    }
    // All bits are marks, or few are; no size is a multiple of what a bit stands for.
    for size in [4128 * KIB, 20000 * KIB] {
        let dir = tempfile::tempdir().unwrap();
        image(dir.path(), "a", "raw", &size.to_string());
        let d = Daemon::start(dir, &[("a", "driver=raw")]);
        let caller = Caller::of(&d);
        let good = |wish: &str, want: &str| {
            let (said, views) = caller.held(wish);
            let mount = Mount::new(&caller.target);
            let point = newest(&caller.target, "a.img");
            same(&mount, "a.img", &point, &views[0].1);
            assert_eq!(level(&caller, "a.img"), want, "{said}");
            assert_eq!(ours_in_qemu(&mut d.qmp()), Vec::<String>::new());
            let stored = point.metadata().unwrap().len() / KIB;
            println!("{wish}: {want} of {} KiB, {stored} stored", views[0].1.len() as u64 / KIB);
            (said, stored)
        };
        let smaller = |wish: &str, want: &str| {
            let (said, stored) = good(wish, want);
            assert!(said.contains("was shrunk and grown again since FULL"), "{said}");
            stored
        };
        let same_size = |wish: &str, want: &str| {
            let (said, stored) = good(wish, want);
            assert!(!said.contains("shrunk") && stored < 1100, "{stored}: {said}");
        };
        d.io("a", &[&format!("write -P 1 0 {size}")]);
        good("full", "FULL");
        same_size("diff", "DIFF");
        cut(&d, "a", 3 * 1024 * KIB + 512, size, 0x55);
        // What has many a bit set again: a partition table has a copy at the disk's end.
        d.io("a", &[&format!("write -P 3 {} 512", size - 512)]);
        assert!(smaller("diff", "DIFF") < 1100 + (size / KIB - 3000));
        smaller("inc", "INC");
        same_size("inc", "INC");
        smaller("diff", "DIFF");
        // Within what the last bit stands for, and in the middle of a page: nobody can tell.
        cut(&d, "a", size - 512, size, 0x66);
        same_size("inc", "INC");
        resize(&d, "a", &[0, size + 96 * KIB]);
        put(&d, "a", 0, size + 96 * KIB, 0x77);
        let (said, _) = good("inc", "INC");
        assert!(said.contains("was shrunk") && said.contains("has grown by 96.0 KiB"), "{said}");
        same_size("inc", "INC");
        // A new chain has seen nothing of it.
        good("full", "FULL");
        same_size("inc", "INC");
        same_size("diff", "DIFF");
        assert_eq!(bitmaps(&mut d.qmp()).len(), 2, "those of the FULL and of the INC");
    }
}

#[test]
fn a_raw_disk_that_grows_while_qemu_lives() {
    const KIB: u64 = 1 << 10;
    let name = "a_raw_disk_that_grows_while_qemu_lives";
    if !have(name, TOOLS) || !have(name, &["qemu-storage-daemon", "qemu-io"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    // The first end is in the middle of what a bit stands for.
    image(dir.path(), "a", "raw", "2080K");
    let d = Daemon::start(dir, &[("a", "driver=raw")]);
    let caller = Caller::of(&d);
    let good = |wish: &str, want: &str| {
        let (said, views) = caller.held(wish);
        let mount = Mount::new(&caller.target);
        same(&mount, "a.img", &newest(&caller.target, "a.img"), &views[0].1);
        assert_eq!(level(&caller, "a.img"), want, "{said}");
        assert_eq!(ours_in_qemu(&mut d.qmp()), Vec::<String>::new());
        println!("{wish}: {want} of {} KiB", views[0].1.len() as u64 / KIB);
        said
    };
    d.io("a", &["write -P 1 0 2080K"]);
    good("full", "FULL");
    grow(&d, "a", 2080 * KIB, 4096 * KIB, 0x55);
    d.io("a", &["write -P 2 3M 64K"]);
    let said = good("inc", "INC");
    assert!(said.contains("has grown by 2.0 MiB"), "{said}");
    assert!(!said.contains("without a dirty bit"), "{said}");
    // The part is copied once.
    assert!(!good("auto", "INC").contains("has grown"));
    grow(&d, "a", 4096 * KIB, 6144 * KIB, 0x66);
    // A DIFF depends on the FULL, and has all that came since.
    assert!(good("diff", "DIFF").contains("has grown by 4.0 MiB"));
    assert!(good("inc", "INC").contains("has grown by 2.0 MiB"));
}

#[test]
fn without_an_nbd_server_a_full_has_no_watermark() {
    let name = "without_an_nbd_server_a_full_has_no_watermark";
    if !have(name, TOOLS) || !have(name, &["qemu-storage-daemon", "qemu-io"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    image(dir.path(), "a", "raw", "4M");
    let d = Daemon::start(dir, &[("a", "driver=raw")]);
    let mut caller = Caller::of(&d);
    d.io("a", &["write -P 1 0 4M"]);
    let floor = |caller: &Caller| {
        manifest_of(&newest(&caller.target, "a.img"))["bitmap"]["floor"] == json!(true)
    };
    let with_server = std::mem::take(&mut caller.more);
    caller.must("full");
    assert!(!floor(&caller));
    assert_eq!(bitmaps(&mut d.qmp()).len(), 1);
    caller.more = with_server;
    d.io("a", &["write -P 2 0 1M"]);
    let said = caller.must("inc");
    assert!(said.contains("take a FULL"), "{said}");
    // From then on it is known.
    assert!(floor(&caller));
    cut(&d, "a", 1 << 20, 4 << 20, 0x55);
    let (said, views) = caller.held("inc");
    assert!(!said.contains("take a FULL") && said.contains("was shrunk"), "{said}");
    let mount = Mount::new(&caller.target);
    same(&mount, "a.img", &newest(&caller.target, "a.img"), &views[0].1);
    // A server that is not there is no reason to have no FULL.
    let nowhere = d.path("nowhere.sock").display().to_string();
    caller.more = vec!["--nbd".into(), nowhere];
    let said = caller.must("full");
    assert!(said.contains("the next INC has to read the whole disk") && !floor(&caller), "{said}");
    assert_eq!(ours_in_qemu(&mut d.qmp()), Vec::<String>::new());
}

/// The format of an image file, by qemu-img.
fn format(image: &Path) -> String {
    let out = run("qemu-img", &["info", "--output=json", image.to_str().unwrap()]);
    let info: Value = serde_json::from_slice(&out.stdout).unwrap();
    info["format"].as_str().unwrap().to_owned()
}
