//! `attach` and `detach` where something is not as usual: what cannot be made ready, odd names and sizes, other people's
//! journals, a machine without device nodes, disks that mean harm. Each is told, and the machine stays as it was.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::support::attached::{self, Attach, succeeded};
use crate::support::file_systems::{Image, Points, TOOLS, said, shell};
use crate::support::guard::Guard;
use crate::support::tools::{have, is_root, run};

/// The exit code of what was done in part.
const PARTIAL: Option<i32> = Some(16);

fn ready(test: &str, more: &[&str]) -> bool {
    have(test, &[TOOLS.as_slice(), &attached::TOOLS, more].concat()) && is_root(test)
}

/// A point of an ext4 with a file.
fn small() -> (Image, Points) {
    let files = tempfile::tempdir().unwrap();
    std::fs::write(files.path().join("file"), "of ext4\n").unwrap();
    let from = files.path().to_str().unwrap();
    let image = Image::new(8 << 20, &["mke2fs", "-q", "-F", "-t", "ext4", "-d", from]);
    let mut points = Points::new();
    points.add(&image.path());
    (image, points)
}

/// A point of a disk with these partitions of one MiB each, all that is in them zeros but for what is written at their
/// beginning.
fn partitions(contents: &[&[u8]]) -> (tempfile::TempDir, Points) {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    let file = std::fs::File::create(&disk).unwrap();
    file.set_len((2 + contents.len() as u64) << 20).unwrap();
    let table = r#"(echo label: gpt; i=1; while [ $i -le $2 ]; do echo "start=$((i * 2048)), size=2048"; i=$((i + 1)); done) |
        sfdisk -q "$1""#;
    let count = contents.len().to_string();
    run("sh", &["-e", "-c", table, "sh", disk.to_str().unwrap(), &count]);
    for (i, bytes) in contents.iter().enumerate() {
        file.write_all_at(bytes, (i as u64 + 1) << 20).unwrap();
    }
    let mut points = Points::new();
    points.add(&disk);
    (dir, points)
}

/// `attach --json` without a folder to mount in: its exit code, and what it printed.
fn devices(attach: &Attach, points: &Points, more: &[&OsStr]) -> (Option<i32>, Value) {
    let mut command = attach.command(&["attach", "--json"]);
    let out = command.args(more).arg(points.dir.path()).arg("vda/latest").output().unwrap();
    let told = serde_json::from_slice(&out.stdout);
    (out.status.code(), told.unwrap_or_else(|e| panic!("{e}: {}", said(&out))))
}

#[test]
fn what_cannot_be_made_ready_is_told_and_a_failure_also_where_nothing_is_mounted() {
    let test = "what_cannot_be_made_ready_is_told_and_a_failure_also_where_nothing_is_mounted";
    if !ready(test, &["sfdisk", "cryptsetup"]) {
        return;
    }
    // Neither header has anything behind it.
    let bitlocker = b"\xeb\x58\x90-FVE-FS-";
    let luks = b"LUKS\xba\xbe\0\x02";
    let (_dir, points) = partitions(&[bitlocker, luks, b"no file system"]);
    let attach = Attach::new();
    let (code, told) = devices(&attach, &points, &[]);
    assert_eq!(code, Some(0), "{told}");
    for (at, kind) in [(0, "bitlk"), (1, "luks")] {
        let volume = &told["volumes"][at];
        let device = volume["device"].as_str().unwrap();
        let command = format!("'cryptsetup open --type {kind} {device} NAME'");
        let note = volume["note"].as_str().unwrap();
        assert!(note.contains(&command) && note.contains("--key-file"), "{note}");
    }
    assert_eq!(told["volumes"][2]["note"], Value::Null);
    attach.detach("--all");
    // With a key that cannot open them it is a failure; the devices are there all the same.
    let key = attach.state.path().with_extension("key");
    std::fs::write(&key, "key").unwrap();
    let (code, told) = devices(&attach, &points, &["--key-file".as_ref(), key.as_ref()]);
    std::fs::remove_file(&key).unwrap();
    assert_eq!(code, PARTIAL, "{told}");
    for at in [0, 1] {
        let note = told["volumes"][at]["note"].as_str().unwrap();
        assert!(note.contains("cryptsetup") && !note.contains('\n'), "{note}");
        assert!(Path::new(told["volumes"][at]["device"].as_str().unwrap()).exists());
    }
    let shown = succeeded(&attach.command(&["attach", "--list"]).output().unwrap());
    assert!(!shown.contains("\\n"), "{shown}");
    attach.detach("--all");
}

#[test]
fn a_partition_is_a_name_of_what_it_is_on() {
    let test = "a_partition_is_a_name_of_what_it_is_on";
    if !ready(test, &["sfdisk"]) {
        return;
    }
    let (dir, points) = partitions(&[b"one", b"two"]);
    let attach = Attach::new();
    let (_, told) = devices(&attach, &points, &[]);
    attach.detach(told["volumes"][1]["device"].as_str().unwrap());
    let (_, told) = devices(&attach, &points, &[]);
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(told["volumes"][0]["device"].as_str().unwrap(), &link).unwrap();
    attach.detach(link.to_str().unwrap());
    // Nor is what is not attached found by a number alone.
    let (_, told) = devices(&attach, &points, &[]);
    let none = attach.command(&["detach", "/dev/loop-control"]).output().unwrap();
    assert_eq!(none.status.code(), Some(3), "{}", said(&none));
    attach.detach(told["id"].as_str().unwrap());
}

#[test]
fn a_journal_that_cannot_be_read_does_not_hide_the_others() {
    let test = "a_journal_that_cannot_be_read_does_not_hide_the_others";
    if !ready(test, &["mke2fs"]) {
        return;
    }
    let (_image, points) = small();
    let attach = Attach::new();
    attach.attach(points.dir.path(), "vda/latest", &[]);
    let odd = attach.state.path().join("attach-00000000.journal");
    std::fs::write(&odd, "{\"step\":{\"crypt\":{\"name\":\"root\"}}}\n").unwrap();
    let listed = attach.command(&["attach", "--list"]).output().unwrap();
    let shown = String::from_utf8_lossy(&listed.stdout).into_owned();
    assert_eq!(listed.status.code(), PARTIAL, "{shown}{}", said(&listed));
    for told in
        ["00000000: ", "never makes", "(unreadable)", "vda/", attach.at("disk").to_str().unwrap()]
    {
        assert!(shown.contains(told), "{told}: {shown}");
    }
    let listed = attach.command(&["attach", "--list", "--json"]).output().unwrap();
    let json: Value = serde_json::from_slice(&listed.stdout).unwrap();
    let states: Vec<_> = json["attached"].as_array().unwrap().iter().map(|a| &a["state"]).collect();
    assert_eq!(states, ["unreadable", "attached"], "{json}");
    // The other one is detached; this one is named.
    let all = attach.command(&["detach", "--all"]).output().unwrap();
    assert!(!all.status.success() && said(&all).contains("00000000"), "{}", said(&all));
    std::fs::remove_file(&odd).unwrap();
    assert!(attach.left().iter().all(|l| l.contains("00000000")), "{:?}", attach.left());
    let _ = std::fs::remove_file(attach.state.path().join("attach-00000000.lock"));
}

/// In a place of its own for mounts, since others read the list of them as text: `$1` the program, `$2` the state
/// folder, `$3` the folder to mount in, `$4` the backups.
const ANY_BYTES: &str = r#"
    mount --make-rprivate /
    "$1" attach --state-dir "$2" --mount "$3" "$4" vda/latest >/dev/null
    cat "$3/disk/file"
    "$1" attach --list --state-dir "$2"
    "$1" detach --state-dir "$2" "$3"
    rmdir "$3"
"#;

#[test]
fn paths_may_have_any_bytes() {
    let test = "paths_may_have_any_bytes";
    if !ready(test, &["mke2fs", "unshare"]) {
        return;
    }
    let (_image, points) = small();
    let attach = Attach::new();
    let odd = |dir: &Path| {
        let odd = dir.join(OsStr::from_bytes(b"a \xff\n\\b"));
        std::fs::create_dir(&odd).unwrap();
        odd
    };
    let (view, backups) = (odd(attach.view.path()), odd(points.dir.path()));
    std::fs::rename(points.dir.path().join("vda"), backups.join("vda")).unwrap();
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-e", "-x", "-c", ANY_BYTES, "sh", env!("CARGO_BIN_EXE_fleecefs")]);
    let out = command.arg(attach.state.path()).arg(&view).arg(&backups).output();
    let said = succeeded(&out.unwrap());
    assert!(said.starts_with("of ext4\n") && !said.contains("(stale"), "{said}");
    assert_eq!(attach.left(), Vec::<String>::new());
}

#[test]
fn sectors_are_whole() {
    let test = "sectors_are_whole";
    if !ready(test, &["mke2fs", "blockdev"]) {
        return;
    }
    let (image, _points) = small();
    let file = std::fs::File::options().write(true).open(image.path()).unwrap();
    file.set_len((8 << 20) + 512).unwrap();
    let mut points = Points::new();
    points.add(&image.path());
    let attach = Attach::new();
    let refused = attach
        .attach_command(points.dir.path(), "vda/latest", &["--sector", "4096"])
        .output()
        .unwrap();
    assert_eq!(refused.status.code(), Some(2), "{}", said(&refused));
    assert!(said(&refused).contains("--sector 512"), "{}", said(&refused));
    assert_eq!(attach.left(), Vec::<String>::new());
    let told = attach.attach(points.dir.path(), "vda/latest", &["--sector", "512", "--json"]);
    let told: Value = serde_json::from_str(&told).unwrap();
    let out = run("blockdev", &["--getsize64", told["points"][0]["device"].as_str().unwrap()]);
    assert_eq!(String::from_utf8_lossy(&out.stdout).trim(), ((8 << 20) + 512).to_string());
    attach.detach("--all");
    // What is behind the last whole one is left out by the kernel: of a raw disk, whose size may be any.
    let raw = tempfile::tempdir().unwrap();
    for (name, size) in [("vda", (1 << 20) + 100), ("vdb", 1 << 20)] {
        let folder = raw.path().join(name);
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join(format!("FULL-1700000000-{name}.raw")), vec![7; size]).unwrap();
        let mut command = attach.command(&["attach"]);
        let out = command.arg(raw.path()).arg(format!("{name}/latest")).output().unwrap();
        assert!(out.status.success(), "{}", said(&out));
        let is_told = said(&out).contains("its last 100 bytes are no whole sector");
        assert_eq!(is_told, size % 512 != 0, "{name}: {}", said(&out));
        attach.detach("--all");
    }
}

#[test]
fn what_is_in_use_names_what_detach_can_do() {
    let test = "what_is_in_use_names_what_detach_can_do";
    if !ready(test, &["mke2fs"]) {
        return;
    }
    let (_image, points) = small();
    let attach = Attach::new();
    attach.attach(points.dir.path(), "vda/latest", &[]);
    let held = std::fs::File::open(attach.at("disk/file")).unwrap();
    let busy = attach.command(&["detach", "--all"]).output().unwrap();
    assert_eq!(busy.status.code(), Some(6), "{}", said(&busy));
    assert!(
        said(&busy).contains("detach again") && !said(&busy).contains("lazy"),
        "{}",
        said(&busy)
    );
    drop(held);
    attach.detach("--all");
}

#[test]
fn btrfs_that_others_could_be_taken_for_is_not_given_to_the_kernel() {
    let test = "btrfs_that_others_could_be_taken_for_is_not_given_to_the_kernel";
    if !ready(test, &["mkfs.btrfs", "btrfstune", "btrfs"]) {
        return;
    }
    let attach = Attach::new();
    let refused = |image: &Path, more: &[&str], why: &str| {
        let mut points = Points::new();
        points.add(image);
        let out = attach.attach_command(points.dir.path(), "vda/latest", more).output().unwrap();
        assert_eq!(out.status.code(), Some(11), "{}", said(&out));
        assert!(said(&out).contains(why), "{}", said(&out));
        assert_eq!(attach.left(), Vec::<String>::new());
    };
    let seed = Image::new(128 << 20, &["mkfs.btrfs", "-q"]);
    // Beside an original that is not mounted: it would be known by the same id.
    refused(&seed.path(), &["--no-replay"], "an id of its own");
    run("btrfstune", &["-S", "1", seed.path().to_str().unwrap()]);
    refused(&seed.path(), &[], "is the seed of others");
    // One that is based on it, and has one device of its own.
    let sprout = Image::new(128 << 20, &["true"]);
    let make = r#"l=$(losetup -f --show "$3"); echo "$l"; mount -o loop "$1" "$2" && btrfs -q device add -f "$l" "$2" >/dev/null"#;
    let undo = r#"umount "$2" || umount -l "$2"; losetup -d "$made"; btrfs device scan -u "$made""#;
    let made = Guard::new(make, undo, &[&seed.path(), &seed.mnt(), &sprout.path()]);
    drop(made);
    let dump = run("btrfs", &["inspect-internal", "dump-super", sprout.path().to_str().unwrap()]);
    let dump = String::from_utf8_lossy(&dump.stdout).into_owned();
    let devices = dump.lines().find(|l| l.starts_with("num_devices")).unwrap().to_string();
    let why = if devices.ends_with('1') { "based on another device" } else { "devices" };
    refused(&sprout.path(), &[], why);
}

/// In a place of its own for mounts, with a `/dev` that has no more than it needs: `$1` the program, `$2` the state
/// folder, `$3` the folder to mount in, `$4` the backups.
const BARE: &str = r#"
    mount --make-rprivate /
    d=$(mktemp -d); mount -t tmpfs tmpfs "$d"
    cp -a /dev/null /dev/zero /dev/random /dev/urandom /dev/fuse /dev/loop-control "$d"
    mount --bind "$d" /dev; umount "$d"; rmdir "$d"
    attach() { "$1" attach --state-dir "$2" --mount "$3" "$4" vda/latest; }
    attach "$@" >/dev/null
    cat "$3/p1/file"
    listed=$("$1" attach --list --json --state-dir "$2")
    echo "$listed" | grep -q '"state": "attached"'
    device=$(echo "$listed" | grep -A1 '"devices"' | sed -n 's/^ *"\(.*\)",*$/\1/p')
    test -b "$device"
    "$1" detach --state-dir "$2" "$device"
    test -z "$(ls /dev | grep 'loop[0-9]')"
    attach "$@" >/dev/null
    "$1" detach --state-dir "$2" "$("$1" attach --list --json --state-dir "$2" | sed -n 's/^ *"device": "\(.*p1\)",*$/\1/p')"
"#;

#[test]
fn a_container_without_device_nodes_has_those_of_the_attachment() {
    let test = "a_container_without_device_nodes_has_those_of_the_attachment";
    if !ready(test, &["mke2fs", "sfdisk", "unshare"]) {
        return;
    }
    let (image, _points) = small();
    let ext4 = std::fs::read(image.path()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    std::fs::File::create(&disk).unwrap().set_len(10 << 20).unwrap();
    shell(dir.path(), "echo 'start=2048, size=16384' | sfdisk -q --label gpt disk");
    let file = std::fs::File::options().write(true).open(&disk).unwrap();
    file.write_all_at(&ext4, 1 << 20).unwrap();
    let mut points = Points::new();
    points.add(&disk);
    let attach = Attach::new();
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-e", "-x", "-c", BARE, "sh", env!("CARGO_BIN_EXE_fleecefs")]);
    let out =
        command.arg(attach.state.path()).arg(attach.view.path()).arg(points.dir.path()).output();
    assert_eq!(succeeded(&out.unwrap()), "of ext4\n");
    assert_eq!(attach.left(), Vec::<String>::new());
}

/// What the machine has of mounts, loop devices and volumes.
fn state_of_machine() -> Vec<String> {
    let of = |program: &str, args: &[&str]| {
        let out = Command::new(program).args(args).output();
        out.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default()
    };
    let volumes = if Path::new("/dev/mapper/control").exists() {
        of("dmsetup", &["table"])
    } else {
        String::new()
    };
    let folders = ["/run/udev/rules.d", "/etc/lvm"].map(|d| of("find", &[d, "-type", "f"]));
    [&[volumes][..], &folders].concat()
}

#[test]
fn a_volume_group_that_cannot_be_had_is_told_with_the_reason() {
    let test = "a_volume_group_that_cannot_be_had_is_told_with_the_reason";
    if !ready(test, &["lvm"]) {
        return;
    }
    // One that belongs to no group, and one of a group that a cluster has locked.
    const MAKE: &str = r#"
        mkdir lvm
        make() {
            l=$(losetup -f --show "$1")
            echo "devices { filter=[\"a|^$l\$|\",\"r|.*|\"] global_filter=[\"a|^$l\$|\",\"r|.*|\"] scan=[\"/dev\"]
                use_devicesfile=0 obtain_device_list_from_udev=0 hints=\"none\" }
                activation { udev_sync=0 udev_rules=0 monitoring=0 } backup { backup=0 archive=0 }
                global { use_lvmpolld=0 use_lvmlockd=0 event_activation=0 }" > lvm/lvm.conf
            shift
            "$@" || { losetup -d "$l"; exit 1; }
            losetup -d "$l"
        }
        single() { lvm pvcreate -q -q "$l"; }
        locked() {
            lvm vgcreate -q -q locked "$l" && lvm vgcfgbackup -q -q -f plain locked &&
            sed 's/^\t*status = \["RESIZEABLE".*/&\nlock_type = "sanlock"\nlock_args = "1.0.0:x"/' plain > text &&
            lvm vgcfgrestore -q -q -y -f text locked
        }
        export LVM_SYSTEM_DIR=$PWD/lvm
        make one single; make two locked
    "#;
    let dir = tempfile::tempdir().unwrap();
    for name in ["one", "two"] {
        std::fs::File::create(dir.path().join(name)).unwrap().set_len(32 << 20).unwrap();
    }
    shell(dir.path(), MAKE);
    let before = state_of_machine();
    for (name, why) in [("one", "it is in no volume group"), ("two", "sanlock")] {
        let mut points = Points::new();
        points.add(&dir.path().join(name));
        let attach = Attach::new();
        let (code, told) = devices(&attach, &points, &[]);
        let note = told["volumes"][0]["note"].as_str().unwrap_or_default().to_string();
        assert!(note.contains(why), "{note}");
        assert_eq!(code, PARTIAL, "{told}");
        attach.detach("--all");
    }
    assert_eq!(state_of_machine(), before);
}
