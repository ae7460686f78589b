//! `backup` of disks that are odd: larger than a file can be, with names that no folder can have, of
//! removable devices, of throw-away overlays; and what others see while it works.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::support::backup::{Caller, images, leftovers, level, newest, ours_in_qemu};
use crate::support::checked::daemon;
use crate::support::guest::Qmp;
use crate::support::mount::Mount;
use crate::support::qemu::any_devices::{self, Bare, node};
use crate::support::refusing::Refusing;
use crate::support::storage::SmallFiles;
use crate::support::tools::{have, is_root};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

fn fleecefs(args: &[&OsStr]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_fleecefs")).args(args).output().unwrap()
}

fn said(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned()
}

fn create(path: &Path, format: &str, size: &str) {
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", format]).arg(path).arg(size);
    assert!(command.status().unwrap().success());
}

fn bytes_at(path: &Path, at: u64) -> [u8; 4] {
    let mut bytes = [0; 4];
    std::fs::File::open(path).unwrap().read_exact_at(&mut bytes, at).unwrap();
    bytes
}

fn clean(qmp: &mut Qmp, dir: &Path) {
    assert_eq!(ours_in_qemu(qmp), Vec::<String>::new());
    assert_eq!(leftovers(dir), Vec::<PathBuf>::new());
}

/// Runs a backup that is held at its freeze point for `meanwhile`; gives what it said.
fn held(caller: &Caller, wish: &str, meanwhile: impl FnOnce()) -> String {
    let hold = tempfile::tempdir().unwrap();
    let err = hold.path().join("stderr");
    let mut command = caller.command(wish);
    command.env("FLEECEFS_HOLD", hold.path()).stderr(std::fs::File::create(&err).unwrap());
    let mut child = command.spawn().unwrap();
    let text = || std::fs::read_to_string(&err).unwrap();
    while !hold.path().join("ready").exists() {
        assert!(child.try_wait().unwrap().is_none(), "{}", text());
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    meanwhile();
    std::fs::write(hold.path().join("go"), "").unwrap();
    assert!(child.wait().unwrap().success(), "{}", text());
    text()
}

/// A disk of 32 GiB where a file has at most 16: what is written while the view is copied goes to a
/// fleece image that is no longer than what it holds.
#[test]
fn a_disk_that_is_larger_than_a_file_can_be() {
    let name = "a_disk_that_is_larger_than_a_file_can_be";
    if !have(name, any_devices::TOOLS) || !have(name, SmallFiles::TOOLS) || !is_root(name) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let small = SmallFiles::new();
    let mut args: Vec<OsString> = Vec::new();
    for (name, format) in [("a", "qcow2"), ("b", "raw")] {
        create(&dir.path().join(name), format, "32G");
        args.extend(node(name, format, &dir.path().join(name)));
        args.extend(["-device".into(), format!("virtio-blk-pci,drive={name},id=v{name}").into()]);
    }
    let bare = Bare::start(dir.path(), &args);
    let io = |byte: u8, at: &str| {
        for disk in ["a", "b"] {
            let device = format!("/machine/peripheral/v{disk}/virtio-backend");
            bare.io(&device, &format!("write -P {byte} {at} 1M"));
        }
    };
    io(1, "20G");
    let folder = small.path();
    let fleeces = folder.to_str().unwrap();
    let caller = bare.caller("T").with(&["--fleece-dir", fleeces]);
    for (wish, want, old, new) in [("full", "FULL", 1, 2), ("inc", "INC", 2, 3)] {
        let said = held(&caller, wish, || {
            io(new, "20G");
            io(new, "31G");
        });
        let mount = Mount::new(&caller.target);
        for disk in ["a", "b"] {
            assert_eq!(level(&caller, disk), want, "{said}");
            let point = mount.point(disk, &newest(&caller.target, disk));
            assert_eq!(bytes_at(&point, 20 << 30), [old; 4], "{disk}: {said}");
            assert_eq!(bytes_at(&point, 31 << 30), [if old == 1 { 0 } else { 2 }; 4], "{disk}");
        }
        clean(&mut bare.qmp(), dir.path());
    }
    // A raw file of that length cannot be made there; what to do is said.
    let to = small.path().join("out.raw");
    let restore = |to: &Path| {
        fleecefs(&["restore".as_ref(), caller.target.as_ref(), "a/latest".as_ref(), to.as_ref()])
    };
    let out = restore(&to);
    assert!(
        out.status.code() == Some(1) && said(&out).contains("too large for this file system"),
        "{}",
        said(&out)
    );
    assert!(!to.exists());
    assert!(restore(&small.path().join("out.qcow2")).status.success());
    drop(bare);
    assert_eq!(std::fs::read_dir(small.path()).unwrap().count(), 2, "lost+found, out.qcow2");
}

/// While a backup works there are files in its target that are no points: the image that is being
/// written, its announcement, and a fleece image where that needs a name there.
#[test]
fn others_see_finished_points_alone() {
    let name = "others_see_finished_points_alone";
    if !have(name, &["qemu-storage-daemon", "qemu-img", "qemu-io", "/dev/fuse"]) {
        return;
    }
    let d = daemon(&[("b", "driver=raw")]);
    let caller = Caller::of(&d);
    let target = caller.target.as_os_str();
    // Those of other programs stay.
    let put = |name: &str| {
        let path = caller.target.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::copy(d.path("a.img"), path).unwrap();
    };
    put("FULL-1700000000-sda.fleece.qcow2");
    put("a.img/INC-1700000001-a.fleece.raw");
    put("images/100/vm-100-fleece-0.qcow2");
    put("images/100/vm-100-fleece-1.raw");
    let run = |args: &[&OsStr]| {
        let out = fleecefs(args);
        (out.status.code(), String::from_utf8(out.stdout.clone()).unwrap(), self::said(&out))
    };
    let points = || {
        let (code, list, said) = run(&["list".as_ref(), "--json".as_ref(), target]);
        assert_eq!(code, Some(0), "{said}");
        let list: Value = serde_json::from_str(&list).unwrap();
        let disks = list["disks"].as_array().unwrap().clone();
        let names = |d: &Value| d["points"].as_array().unwrap().len();
        disks.iter().map(|d| (d["disk"].to_string(), names(d))).collect::<Vec<_>>()
    };
    let fleeces = || {
        let all = images_below(&caller.target);
        all.iter().filter(|n| n.starts_with("fleecefs-") && n.ends_with(".fleece.raw")).count()
    };
    for count in 0..3 {
        let wish = if count == 0 { "full" } else { "inc" };
        held(&caller, wish, || {
            assert_eq!(fleeces(), 2, "they need names");
            let seen = points();
            assert!(seen.iter().all(|p| p.1 == count), "{seen:?}");
            assert_eq!(seen.len(), if count == 0 { 0 } else { 2 }, "{seen:?}");
            if count == 0 {
                return;
            }
            let (code, _, said) = run(&["verify".as_ref(), target]);
            assert_eq!(code, Some(0), "{said}");
            let mount = Mount::new(&caller.target);
            for disk in ["a.img", "b.img"] {
                let files = std::fs::read_dir(mount.path().join(disk)).unwrap().flatten();
                let raw = files.filter(|f| f.file_type().unwrap().is_file()).count();
                assert_eq!(raw, count, "{disk}");
            }
            let folders = std::fs::read_dir(mount.path()).unwrap().count();
            assert_eq!(folders, 3, "two disks and .fleecefs");
            let (code, plan, said) = run(&["prune", "--dry-run", "--keep-last", "9"]
                .map(OsStr::new)
                .into_iter()
                .chain([target])
                .collect::<Vec<_>>());
            assert_eq!(code, Some(0), "{said}");
            assert!(!plan.contains("fleece"), "{plan}");
            // Those that change it wait for the end of the run.
            for args in [&["prune", "--keep-last", "1"][..], &["consolidate"]] {
                let mut args: Vec<&OsStr> = args.iter().map(OsStr::new).chain([target]).collect();
                if args[0] == "consolidate" {
                    args.extend([OsStr::new("a.img"), "--until".as_ref(), "latest".as_ref()]);
                }
                let (code, _, said) = run(&args);
                assert_eq!(code, Some(6), "{args:?}: {said}");
            }
        });
        d.io("a", &["write -P 7 1M 1M"]);
    }
    assert_eq!(fleeces(), 0);
}

/// The names of all files below a folder.
fn images_below(dir: &Path) -> Vec<String> {
    let mut names = Vec::new();
    let mut todo = vec![dir.to_path_buf()];
    while let Some(d) = todo.pop() {
        for e in std::fs::read_dir(&d).unwrap().flatten() {
            match e.file_type().unwrap().is_dir() {
                true => todo.push(e.path()),
                false => names.push(e.file_name().to_string_lossy().into_owned()),
            }
        }
    }
    names
}

/// Names of disks that cannot be those of folders, or that would be taken for something else there.
fn odd_names() -> Vec<Vec<u8>> {
    let long = |last: u8| [vec![b'x'; 239], vec![last], b".qcow2".to_vec()].concat();
    let mut names =
        vec![long(b'1'), long(b'2'), vec![b'y'; 255], "\u{fc}".repeat(127).into_bytes()];
    let words = [
        "plain.qcow2",
        "uuid",
        "d.partial",
        "d",
        "d.config",
        ".fleecefs",
        ".hidden",
        "FULL-d",
        "FULL-1-x",
        "x",
        "INC-2-x",
        "line\nbreak",
        "d.fleece.raw",
        "vm-1-fleece-0.qcow2",
        "latest",
        "by-time",
        ".fleecefs-tmp-0",
        "a.vma",
        "sda.full.data",
    ];
    names.extend(words.map(|w| w.as_bytes().to_vec()));
    names.push(b"not\xfftext".to_vec());
    names.push(b"not\xfetext".to_vec());
    names
}

#[test]
fn disks_whose_names_are_odd() {
    let name = "disks_whose_names_are_odd";
    if !have(name, any_devices::TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("disks")).unwrap();
    let names = odd_names();
    let mut args: Vec<OsString> = vec!["-device".into(), "virtio-scsi-pci,id=s".into()];
    for (i, name) in names.iter().enumerate() {
        let path = dir.path().join("disks").join(OsString::from_vec(name.clone()));
        create(&path, "qcow2", "2M");
        args.extend(node(&format!("n{i}"), "qcow2", &path));
        args.extend([
            "-device".into(),
            format!("scsi-hd,bus=s.0,scsi-id={i},drive=n{i},id=v{i}").into(),
        ]);
    }
    let bare = Bare::start(dir.path(), &args);
    let device = |i: usize| format!("/machine/peripheral/v{i}");
    for i in 0..names.len() {
        bare.io(&device(i), &format!("write -P {} 0 64k", i + 1));
    }
    for (n, layout) in
        [&[][..], &["--no-subdir"], &["--no-timestamp"], &["--no-subdir", "--no-timestamp"]]
            .into_iter()
            .enumerate()
    {
        let first = bare.caller(&format!("T{n}")).with(layout);
        first.must("full");
        // An INC has a time.
        let more: Vec<&str> = layout.iter().filter(|l| **l == "--no-subdir").copied().collect();
        let caller = bare.caller(&format!("T{n}")).with(&more);
        for i in 0..names.len() {
            bare.io(&device(i), &format!("write -P {} 1M 64k", 100 + n * 30 + i));
        }
        let said = caller.must("inc");
        assert_eq!(said.matches("INC ->").count(), names.len(), "{said}");
        let said = caller.with(&["--exclude", "n0"]).must("inc");
        assert_eq!(said.matches("INC ->").count(), names.len() - 1, "{said}");
        let target = caller.target.as_os_str();
        let check = |points: usize| {
            let out = fleecefs(&["verify".as_ref(), target]);
            assert!(
                out.status.success(),
                "{layout:?}: {}{}",
                String::from_utf8_lossy(&out.stdout),
                self::said(&out)
            );
            let mount = Mount::new(&caller.target);
            let mut found = BTreeSet::new();
            for e in std::fs::read_dir(mount.path()).unwrap().flatten() {
                if e.file_name() == ".fleecefs" {
                    continue;
                }
                let latest = e.path().join("latest.raw");
                found.insert((bytes_at(&latest, 0)[0], bytes_at(&latest, MIB)[0]));
                let files = std::fs::read_dir(e.path()).unwrap().flatten();
                let count = files.filter(|f| f.file_type().unwrap().is_file()).count();
                assert!(count == points || count + 1 == points || points == 1, "{:?}", e.path());
            }
            let all = (0..names.len()).map(|i| ((i + 1) as u8, (100 + n * 30 + i) as u8));
            assert_eq!(found, all.collect(), "{layout:?}");
        };
        check(3);
        let keep: Vec<&OsStr> =
            ["prune", "--keep-last", "1", "--consolidate"].map(OsStr::new).to_vec();
        let out = fleecefs(&[&keep[..], &[target]].concat());
        assert!(
            out.status.success(),
            "{layout:?}: {}{}",
            String::from_utf8_lossy(&out.stdout),
            self::said(&out)
        );
        check(1);
        clean(&mut bare.qmp(), &caller.target);
    }
}

/// A device of the machine with a disk of its own: node, options.
fn with_disk(dir: &Path, name: &str, device: &str) -> Vec<OsString> {
    let path = dir.join(format!("{name}.qcow2"));
    if !path.exists() {
        create(&path, "qcow2", "16M");
    }
    let mut args = node(name, "qcow2", &path).to_vec();
    args.extend(["-device".into(), format!("{device},drive={name}").into()]);
    args
}

/// Buses call more removable than CDs and floppies.
#[test]
fn disks_of_removable_devices_are_disks() {
    let name = "disks_of_removable_devices_are_disks";
    if !have(name, any_devices::TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut args: Vec<OsString> =
        ["-device", "virtio-scsi-pci,id=s", "-device", "qemu-xhci"].map(Into::into).to_vec();
    args.extend(["-device", "sdhci-pci"].map(Into::into));
    args.extend(with_disk(dir.path(), "scsi", "scsi-hd,id=d0,bus=s.0,removable=on"));
    args.extend(with_disk(dir.path(), "usb", "usb-storage,id=d1,removable=on"));
    args.extend(with_disk(dir.path(), "sd", "sd-card,id=d2"));
    args.extend(with_disk(dir.path(), "floppy", "floppy,id=d3"));
    args.extend(["-device".into(), "scsi-cd,id=empty,bus=s.0".into()]);
    // The floppy's image is no qcow2 one in life, but may be.
    create(&dir.path().join("cd.iso"), "raw", "1M");
    let mut cd = node("cd", "raw", &dir.path().join("cd.iso"));
    cd[1].push(",read-only=on");
    args.extend(cd);
    args.extend(["-device".into(), "scsi-cd,id=cd0,bus=s.0,drive=cd".into()]);
    let bare = Bare::start(dir.path(), &args);
    bare.io("/machine/peripheral/d0", "write -P 5 0 64k");
    let caller = bare.caller("T");
    let said = caller.must("auto");
    assert!(said.contains("cd: skipped: a CD or floppy that is read-only"), "{said}");
    assert!(said.contains("floppy: skipped: a CD or floppy"), "{said}");
    assert!(said.contains("skipped: no medium is inserted"), "{said}");
    bare.io("/machine/peripheral/d2", "write -P 6 0 64k");
    let said = caller.must("auto");
    for disk in ["scsi", "usb", "sd"] {
        assert_eq!(level(&caller, &format!("{disk}.qcow2")), "INC", "{said}");
    }
    let mount = Mount::new(&caller.target);
    let latest = |disk: &str| mount.path().join(format!("{disk}.qcow2/latest.raw"));
    assert_eq!((bytes_at(&latest("scsi"), 0), bytes_at(&latest("sd"), 0)), ([5; 4], [6; 4]));
    drop(mount);
    // What is left out by rule is there for who asks for it.
    let said = caller.with(&["--include", "d3"]).must("auto");
    assert_eq!(level(&caller, "floppy.qcow2"), "FULL", "{said}");
    assert_eq!(images(&caller.target.join("usb.qcow2")).len(), 2);
    // What cannot be had is said.
    for (name, why) in [("cd0", "read-only"), ("cd", "read-only"), ("empty", "no medium")] {
        let out = caller.with(&["--include", name]).run("auto");
        let said = self::said(&out);
        assert_eq!(out.status.code(), Some(11), "{name}: {said}");
        assert!(
            said.contains("--include names it, but it cannot be backed up") && said.contains(why),
            "{said}"
        );
    }
    clean(&mut bare.qmp(), dir.path());
}

/// The overlay that `snapshot=on` gives a guest goes with QEMU.
#[test]
fn a_throw_away_overlay_is_told_and_has_the_name_of_its_disk() {
    let name = "a_throw_away_overlay_is_told_and_has_the_name_of_its_disk";
    if !have(name, any_devices::TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (disk, raw) = (dir.path().join("real.qcow2"), dir.path().join("other.img"));
    create(&disk, "qcow2", "16M");
    create(&raw, "raw", "16M");
    let start = |snapshot: &str| {
        let drive = |id: &str, format: &str, path: &Path| {
            let path = path.display();
            [
                "-drive".to_string(),
                format!("if=none,id={id},file={path},format={format},snapshot={snapshot}"),
                "-device".into(),
                format!("virtio-blk-pci,drive={id},id=v{id}"),
            ]
        };
        Bare::start(dir.path(), &[drive("a", "qcow2", &disk), drive("b", "raw", &raw)].concat())
    };
    let device = "/machine/peripheral/va/virtio-backend";
    let mut now = 0;
    for (snapshot, first) in [("off", "FULL"), ("on", "FULL"), ("on", "FULL"), ("off", "FULL")] {
        let bare = start(snapshot);
        let caller = bare.caller("T");
        for want in [first, "INC"] {
            now += 1;
            bare.io(device, &format!("write -P {now} 0 64k"));
            let said = caller.must("auto");
            assert_eq!(
                said.matches("snapshot=on: guest writes").count(),
                if snapshot == "on" { 2 } else { 0 }
            );
            for disk in ["real.qcow2", "other.img"] {
                assert_eq!(level(&caller, disk), want, "{snapshot}: {said}");
            }
            if snapshot == "on" && want == "FULL" {
                assert!(said.contains("the disk is reset at each start of QEMU"), "{said}");
            }
            let folders = std::fs::read_dir(&caller.target).unwrap().flatten();
            assert_eq!(folders.filter(|e| e.path().is_dir()).count(), 3, "two and .fleecefs");
            let mount = Mount::new(&caller.target);
            let point = mount.point("real.qcow2", &newest(&caller.target, "real.qcow2"));
            assert_eq!(bytes_at(&point, 0), [now; 4]);
        }
        let info = Command::new(env!("CARGO_BIN_EXE_fleecefs"))
            .args(["info", "blockdev", "--qmp"])
            .arg(&caller.qmp)
            .output()
            .unwrap();
        let info = String::from_utf8_lossy(&info.stdout).into_owned();
        assert_eq!(info.contains("temporary overlay (snapshot=on)"), snapshot == "on", "{info}");
        clean(&mut bare.qmp(), dir.path());
        let _ = bare.qmp().try_execute("quit", json!({}));
        bare.ended();
    }
}

/// What shares and FUSE file systems refuse, alone and all at once; how often it is told.
const LESSER: [(&str, Refusing); 7] = [
    ("sync folders", Refusing { folder_sync: Some(libc::EINVAL), ..Refusing::NOTHING }),
    ("sync folders", Refusing { folder_sync: Some(libc::EACCES), ..Refusing::NOTHING }),
    ("no locks", Refusing { calls: &[(libc::SYS_flock, libc::ENOLCK)], ..Refusing::NOTHING }),
    ("no locks", Refusing { calls: &[(libc::SYS_flock, libc::EOPNOTSUPP)], ..Refusing::NOTHING }),
    ("file times", Refusing { calls: &[(libc::SYS_utimensat, libc::EPERM)], ..Refusing::NOTHING }),
    ("file times", Refusing { calls: &[(libc::SYS_utimensat, libc::ENOSYS)], ..Refusing::NOTHING }),
    (
        "sync folders",
        Refusing {
            folder_sync: Some(libc::EINVAL),
            calls: &[
                (libc::SYS_flock, libc::EOPNOTSUPP),
                (libc::SYS_utimensat, libc::EPERM),
                (libc::SYS_symlinkat, libc::EPERM),
                (libc::SYS_renameat2, libc::EINVAL),
                (libc::SYS_fchmod, libc::EPERM),
                (libc::SYS_fchown, libc::EPERM),
            ],
            ..Refusing::NOTHING
        },
    ),
];

#[test]
fn a_target_on_a_file_system_with_fewer_features_works() {
    let name = "a_target_on_a_file_system_with_fewer_features_works";
    if !have(name, any_devices::TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let args = with_disk(dir.path(), "a", "virtio-blk-pci,id=va");
    let bare = Bare::start(dir.path(), &args);
    let write = |byte: u8| {
        bare.io("/machine/peripheral/va/virtio-backend", &format!("write -P {byte} 0 64k"));
    };
    for (n, (word, refusing)) in LESSER.into_iter().enumerate() {
        let caller = bare.caller(&format!("T{n}"));
        for (wish, byte) in [("full", 1), ("inc", 2), ("inc", 3)] {
            write(byte);
            let out = refusing.run(&mut caller.command(wish));
            let said = self::said(&out);
            assert!(out.status.success(), "{refusing:?} {wish}: {said}");
            assert_eq!(said.matches(word).count(), 1, "{refusing:?}: {said}");
            let mount = Mount::new(&caller.target);
            let point = mount.point("a.qcow2", &newest(&caller.target, "a.qcow2"));
            assert_eq!(bytes_at(&point, 0), [byte; 4], "{refusing:?}");
            clean(&mut bare.qmp(), dir.path());
        }
    }
    // And the whole life of it.
    let (_, refusing) = LESSER[6];
    let target = dir.path().join("T6");
    let disk = target.join("a.qcow2");
    let name = |n: usize| images(&disk)[n].file_name().unwrap().to_str().unwrap().to_string();
    let of = |args: &[&str]| {
        let out = refusing.run(Command::new(env!("CARGO_BIN_EXE_fleecefs")).args(args));
        assert!(out.status.success(), "{args:?}: {}", self::said(&out));
    };
    let (target, to) = (target.to_str().unwrap(), dir.path().join("out.raw"));
    of(&["verify", "--create", target]);
    of(&["restore", target, "a.qcow2/latest", to.to_str().unwrap()]);
    assert_eq!(bytes_at(&to, 0), [3; 4]);
    of(&["consolidate", target, "a.qcow2", "--until", &name(1)]);
    of(&["rebase", disk.to_str().unwrap()]);
    of(&["commit", disk.to_str().unwrap(), "--until", &name(1)]);
    of(&["prune", "--keep-last", "1", target]);
    of(&["verify", target]);
    let plain = bare.caller("P").with(&["--no-timestamp"]);
    let out = refusing.run(&mut plain.command("full"));
    assert!(out.status.success(), "{}", self::said(&out));
}
