//! `attach`: file systems of points as the kernel mounts them, cut off while somebody wrote; `detach` leaves nothing,
//! and the backups stay as they are.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::support::attached::{self, Attach, succeeded};
use crate::support::file_systems::{Image, Listing, Points, TOOLS, mount, said, shell};
use crate::support::guard::Guard;
use crate::support::images::Chain;
use crate::support::process::{eventually, is_gone, server_pid, signal};
use crate::support::tools::{have, is_root, run};
use crate::support::writable::hashes;

const XATTRS: [&str; 2] = ["user.", "trusted."];

fn ready(test: &str, more: &[&str]) -> bool {
    have(test, &[TOOLS.as_slice(), &attached::TOOLS, more].concat()) && is_root(test)
}

/// What is written while the disk is copied.
const WRITER: &str = r#"
    : > "$GO"; trap 'rm -f "$GO"' EXIT
    (i=0; while [ -e "$GO" ] && [ $i -lt 20000 ]; do
        seq $i 3000 > f$((i % 60)); i=$((i + 1)); [ $((i % 9)) != 0 ] || sync f$((i % 9))
    done) & writer=$!
    for n in 1 2; do
        mkdir d$n; i=0; while [ $i -lt 100 ]; do echo $i > d$n/$i; i=$((i + 1)); done
        sync -f .; rm -r d$n/1*; head -c 2000000 /dev/urandom > r$n; sync r$n
    done
    echo last > last; sync last
    cp --reflink=always "$DISK" "$COPY"
    rm "$GO"; wait $writer
"#;

/// A btrfs on which a disk can be copied at one moment.
struct Outer {
    image: Image,
    _mounted: Guard,
}

impl Outer {
    fn new() -> Self {
        let image = Image::new(2 << 30, &["mkfs.btrfs", "-q"]);
        let mounted = image.mount("");
        std::fs::create_dir(image.mnt().join("mnt")).unwrap();
        Outer { image, _mounted: mounted }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.image.mnt().join(name)
    }

    /// A new disk with a file system, mounted by `make` (a shell command), and a copy of it from while a writer wrote.
    fn cut_off(&self, mkfs: &[&str], make: &str) -> (Guard, PathBuf) {
        let (disk, copy) = (self.at("disk"), self.at("copy"));
        for old in [&disk, &copy] {
            let _ = std::fs::remove_file(old);
        }
        std::fs::File::create(&disk).unwrap().set_len(400 << 20).unwrap();
        run(mkfs[0], &[&mkfs[1..], &[disk.to_str().unwrap()]].concat());
        let mounted =
            Guard::new(make, r#"umount "$2" || umount -l "$2""#, &[&disk, &self.at("mnt")]);
        let mut writer = Command::new("sh");
        writer.args(["-e", "-c", WRITER]).current_dir(self.at("mnt"));
        writer.env("GO", self.at("go")).env("DISK", &disk).env("COPY", &copy);
        succeeded(&writer.output().unwrap());
        (mounted, copy)
    }
}

#[test]
fn what_was_cut_off_under_a_writer_is_what_the_kernel_makes_of_it() {
    let test = "what_was_cut_off_under_a_writer_is_what_the_kernel_makes_of_it";
    let more = ["mkfs.ext4", "mkfs.xfs", "mkfs.btrfs", "mkntfs", "ntfs-3g"];
    if !ready(test, &more) {
        return;
    }
    const LOOP: &str = r#"mount -o loop "$1" "$2""#;
    const XFS: &str = r#"mount -o loop,nouuid "$1" "$2""#;
    const NTFS: &str = r#"ntfs-3g "$1" "$2" >/dev/null 2>&1"#;
    const NTFS_READ: &str = r#"ntfs-3g -o ro,umask=0077 "$1" "$2" >/dev/null 2>&1"#;
    let outer = Outer::new();
    for (mkfs, writing, reading) in [
        (&["mkfs.ext4", "-q", "-F"][..], LOOP, LOOP),
        (&["mkfs.xfs", "-q", "-f"], LOOP, XFS),
        (&["mkfs.btrfs", "-q"], LOOP, LOOP),
        (&["mkntfs", "-q", "-Q", "-F"], NTFS, NTFS_READ),
    ] {
        let what = mkfs[0];
        let (original, copy) = outer.cut_off(mkfs, writing);
        let mut points = Points::new();
        points.add(&copy);
        let before = hashes(points.dir.path());
        let attach = Attach::new();
        // Beside the original, which is mounted.
        let told = attach.attach(points.dir.path(), "vda/latest", &["--json"]);
        if what == "mkfs.btrfs" {
            has_its_own_id(&told, &copy);
        }
        let ours = Listing::of(&attach.at("disk"), &XATTRS);
        assert!(ours.0.len() > 150, "{what}: {}", ours.0.len());
        std::fs::write(attach.at("disk").join("new"), "").unwrap_err();
        let link = points.dir.path().with_extension("link");
        std::os::unix::fs::symlink(attach.view.path(), &link).unwrap();
        attach.detach(link.to_str().unwrap());
        std::fs::remove_file(&link).unwrap();
        assert!(hashes(points.dir.path()) == before, "{what}");
        drop(original);
        let at = outer.at("mnt");
        let replayed = Guard::new(reading, r#"umount "$2" || umount -l "$2""#, &[&copy, &at]);
        Listing::of(&at, &XATTRS).assert_same(&ours, what);
        drop(replayed);
    }
}

/// What is attached has another id than the disk, whose nodes it keeps.
fn has_its_own_id(told: &str, disk: &Path) {
    let told: Value = serde_json::from_str(told).unwrap();
    let device = told["points"][0]["device"].as_str().unwrap();
    let ids = |path: &str| {
        let out = run("btrfs", &["inspect-internal", "dump-super", "-a", path]);
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        assert!(!text.contains("DON'T MATCH"), "{text}");
        let of = |key: &str| -> Vec<String> {
            let lines = text.lines().filter(|l| l.starts_with(key));
            lines.map(|l| l.split_whitespace().nth(1).unwrap().to_string()).collect()
        };
        (of("fsid"), of("metadata_uuid"))
    };
    let (own, copied) = (ids(device), ids(disk.to_str().unwrap()));
    assert!(own.0.len() >= 2 && own.0.iter().all(|id| *id != copied.0[0]), "{own:?} {copied:?}");
    assert!(own.1.iter().all(|id| *id == copied.0[0]), "{own:?} {copied:?}");
}

/// A disk with an ext4 that was cut off with a dirty journal.
fn dirty_ext4() -> (Image, PathBuf) {
    let mkfs = ["mke2fs", "-q", "-F", "-t", "ext4", "-b", "1024", "-J", "size=1"];
    let image = Image::new(16 << 20, &mkfs);
    let mounted = image.mount("");
    shell(&image.mnt(), "mkdir d; seq 1000 > d/numbers; sync .; echo last > last; sync last");
    let copy = image.dir.path().join("copy");
    run("cp", &["--sparse=always", image.path().to_str().unwrap(), copy.to_str().unwrap()]);
    drop(mounted);
    (image, copy)
}

#[test]
fn without_replay_nothing_is_written_and_what_is_only_in_the_journal_is_missing() {
    let test = "without_replay_nothing_is_written_and_what_is_only_in_the_journal_is_missing";
    if !ready(test, &["mke2fs", "blockdev"]) {
        return;
    }
    let (image, copy) = dirty_ext4();
    let mut points = Points::new();
    points.add(&copy);
    let attach = Attach::new();
    let told = attach.attach(points.dir.path(), "vda/latest", &["--no-replay", "--json"]);
    let told: Value = serde_json::from_str(&told).unwrap();
    let device = told["points"][0]["device"].as_str().unwrap();
    let only = |device: &str| {
        let out = run("blockdev", &["--getro", device]);
        String::from_utf8_lossy(&out.stdout).trim().to_string()
    };
    assert_eq!(only(device), "1");
    let ours = Listing::of(&attach.at("disk"), &XATTRS);
    attach.detach(told["id"].as_str().unwrap());
    let mounted = mount(&copy, &image.mnt(), "ro,noload").unwrap();
    Listing::of(&image.mnt(), &XATTRS).assert_same(&ours, "noload");
    drop(mounted);
    // With it, it is there; and what is written for a moment goes with the device.
    attach.attach(points.dir.path(), "vda/latest", &["--rw"]);
    assert_eq!(std::fs::read_to_string(attach.at("disk/last")).unwrap(), "last\n");
    std::fs::write(attach.at("disk/new"), "new").unwrap();
    attach.detach(attach.at("disk").to_str().unwrap());
    attach.attach(points.dir.path(), "vda/latest", &[]);
    assert!(!attach.at("disk/new").exists() && attach.at("disk/last").exists());
    attach.detach("--all");
}

#[test]
fn a_table_is_attached_with_sectors_of_its_own_and_a_run_with_all_its_disks() {
    let test = "a_table_is_attached_with_sectors_of_its_own_and_a_run_with_all_its_disks";
    if !ready(test, &["mkfs.ext4", "sfdisk", "blockdev"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut points = Points::new();
    // The table of one disk counts in sectors of 4096 bytes. The other's name has no place in a path.
    for (disk, sector) in [("vda", 4096), ("v d\nb", 512)] {
        let image = dir.path().join("image");
        partitioned(&image, disk, sector);
        match disk {
            "vda" => points.add(&image),
            _ => {
                let mut chain = Chain::new(points.dir.path(), disk);
                let full = chain.next_path();
                let (from, to) = (image.to_str().unwrap(), full.to_str().unwrap());
                run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", from, to]);
            }
        }
    }
    let attach = Attach::new();
    let told = attach.attach(points.dir.path(), "vda/latest", &["--run", "--json"]);
    let told: Value = serde_json::from_str(&told).unwrap();
    let names = |value: &Value| -> Vec<String> {
        let all = value["volumes"].as_array().unwrap().iter();
        all.map(|v| v["name"].as_str().unwrap().to_string()).collect()
    };
    let wanted = ["vda-p1", "vda-p2", "v_d_b-p1", "v_d_b-p2"];
    assert_eq!(names(&told), wanted);
    for (disk, prefix, at) in [("vda", "vda", 0), ("v d\nb", "v_d_b", 1)] {
        for number in [1, 2] {
            let file = attach.at(&format!("{prefix}-p{number}/file"));
            assert_eq!(std::fs::read_to_string(file).unwrap(), format!("{disk} {number}\n"));
        }
        let device = told["points"][at]["device"].as_str().unwrap();
        let out = run("blockdev", &["--getss", device]);
        let sector = String::from_utf8_lossy(&out.stdout).trim().to_string();
        assert_eq!(sector, ["4096", "512"][at]);
    }
    let listed = succeeded(&attach.command(&["attach", "--list", "--json"]).output().unwrap());
    let listed: Value = serde_json::from_str(&listed).unwrap();
    let one = &listed["attached"][0];
    assert_eq!((one["state"].as_str(), one["user"].as_str()), (Some("attached"), Some("root")));
    assert_eq!((one["points"].as_array().unwrap().len(), names(one)), (2, names(&told)));
    assert_eq!(one["devices"][1], told["points"][1]["device"]);
    attach.detach(one["devices"][1].as_str().unwrap());
    let none = attach.command(&["attach", "--list"]).output().unwrap();
    assert_eq!(succeeded(&none), "nothing is attached\n");
}

/// A disk with two partitions of ext4 that say which they are.
fn partitioned(image: &Path, disk: &str, sector: u64) {
    let _ = std::fs::remove_file(image);
    std::fs::File::create(image).unwrap().set_len(64 << 20).unwrap();
    let path = image.to_str().unwrap();
    let files = image.with_extension("files");
    let _ = std::fs::create_dir(&files);
    let (first, second, size) = ((1 << 20) / sector, (24 << 20) / sector, (20 << 20) / sector);
    if sector == 512 {
        let table =
            format!("label: dos\nstart={first}, size={size}\nstart={second}, size={size}\n");
        let make = format!("printf '{table}' | sfdisk -q '{path}'");
        run("sh", &["-e", "-c", &make]);
    } else {
        let text = format!("label: gpt\nstart={first}, size={size}\nstart={second}, size={size}\n");
        let make =
            r#"l=$(losetup -b 4096 -f --show "$1"); printf "$2" | sfdisk -q "$l"; losetup -d "$l""#;
        run("sh", &["-e", "-c", make, "sh", path, &text]);
    }
    for (number, start) in [(1, first), (2, second)] {
        std::fs::write(files.join("file"), format!("{disk} {number}\n")).unwrap();
        let offset = format!("offset={}", start * sector);
        let files = files.to_str().unwrap();
        run("mkfs.ext4", &["-q", "-F", "-b", "4096", "-E", &offset, "-d", files, path, "20M"]);
    }
}

#[test]
fn what_is_in_use_stays_and_what_lost_its_server_is_stale_and_goes() {
    let test = "what_is_in_use_stays_and_what_lost_its_server_is_stale_and_goes";
    if !ready(test, &["mke2fs"]) {
        return;
    }
    let (_image, copy) = dirty_ext4();
    let mut points = Points::new();
    points.add(&copy);
    let attach = Attach::new();
    attach.attach(points.dir.path(), "vda/latest", &[]);
    // The name is taken now; the other attachment is undone, and the first stays.
    let second = attach.attach_command(points.dir.path(), "vda/latest", &[]).output().unwrap();
    assert_eq!(second.status.code(), Some(4), "{}", said(&second));
    let held = std::fs::File::open(attach.at("disk/last")).unwrap();
    let busy = attach.command(&["detach", "--all"]).output().unwrap();
    assert_eq!(busy.status.code(), Some(6), "{}", said(&busy));
    assert_eq!(std::fs::read_to_string(attach.at("disk/last")).unwrap(), "last\n");
    drop(held);
    let wrong = attach.command(&["detach", "/nothing"]).output().unwrap();
    assert_eq!(wrong.status.code(), Some(3), "{}", said(&wrong));
    let private = attach.private();
    // A file of the private mount that is closed later than its device, as udev may have it.
    let late = std::fs::File::open(private.join("mnt/vda/latest.raw")).unwrap();
    let mut detaching = attach.command(&["detach", "--all"]).spawn().unwrap();
    eventually("the device is gone", || !attach.left().iter().any(|l| l.starts_with("/dev/loop")));
    drop(late);
    assert!(detaching.wait().unwrap().success());
    assert_eq!(attach.left(), Vec::<String>::new());
    // Served by nobody any more.
    attach.attach(points.dir.path(), "vda/latest", &[]);
    let private = attach.private();
    let server = server_pid(&private.join("mnt"));
    signal(server, libc::SIGKILL);
    eventually("the server is gone", || is_gone(server));
    eventually("it is stale", || {
        let listed = attach.command(&["attach", "--list"]).output().unwrap();
        succeeded(&listed).contains("(stale")
    });
    attach.detach("--all");
}

/// `$1` is a loop device, `$2` a disk of somebody else, `$3` where the device is mounted.
const TAKEN: &str = r#"umount "$3" && losetup -d "$1" && losetup "$1" "$2" && mount "$1" "$3""#;

#[test]
fn a_device_that_is_somebody_elses_by_now_stays_as_it_is() {
    let test = "a_device_that_is_somebody_elses_by_now_stays_as_it_is";
    if !ready(test, &["mke2fs"]) {
        return;
    }
    let (image, copy) = dirty_ext4();
    let mut points = Points::new();
    points.add(&copy);
    let attach = Attach::new();
    let other = image.path().with_extension("other");
    std::fs::copy(&copy, &other).unwrap();
    let at = attach.at("disk");
    let source = || {
        let mounts = std::fs::read("/proc/mounts").unwrap();
        let mounts = String::from_utf8_lossy(&mounts).into_owned();
        let ours = mounts.lines().find(|l| l.contains(at.to_str().unwrap()));
        ours.and_then(|l| l.split(' ').next()).map(PathBuf::from)
    };
    // Another test may be faster in taking the number.
    let taken = (0..20).find_map(|_| {
        attach.attach(points.dir.path(), "vda/latest", &[]);
        let device = source().unwrap();
        let undo = r#"umount "$3"; losetup -d "$1""#;
        let taken = Guard::try_new(TAKEN, undo, &[&device, &other, &at]);
        if taken.is_err() {
            attach.detach("--all");
        }
        taken.ok()
    });
    let taken = taken.unwrap();
    let device = source().unwrap();
    let told = attach.command(&["detach", "--all"]).output().unwrap();
    assert_eq!(told.status.code(), Some(6), "{}", said(&told));
    assert!(said(&told).contains("is mounted over it"), "{}", said(&told));
    assert_eq!(source(), Some(device.clone()));
    // Nor is it what the user calls by the name of that device.
    let named = attach.command(&["detach", device.to_str().unwrap()]).output().unwrap();
    assert_eq!(named.status.code(), Some(6), "{}", said(&named));
    drop(taken);
    attach.detach("--all");
}

#[test]
fn what_reaches_beyond_its_disk_is_not_given_to_the_kernel() {
    let test = "what_reaches_beyond_its_disk_is_not_given_to_the_kernel";
    if !ready(test, &["mke2fs", "mkfs.btrfs"]) {
        return;
    }
    let attach = Attach::new();
    let refused = |image: &Path, why: &str| {
        let mut points = Points::new();
        points.add(image);
        for more in [&[][..], &["--no-replay"]] {
            let command = attach.attach_command(points.dir.path(), "vda/latest", more).output();
            let out = command.unwrap();
            assert_eq!(out.status.code(), Some(11), "{}", said(&out));
            assert!(said(&out).contains(why), "{}", said(&out));
            assert_eq!(attach.left(), Vec::<String>::new());
        }
    };
    // A journal on the machine's first disk; options of its own.
    for (at, bytes, why) in [
        (0xe4, &0x0801_u32.to_le_bytes()[..], "the journal is on another device"),
        (0x200, b"errors=panic", "mount options of its own"),
    ] {
        let mkfs = ["mke2fs", "-q", "-F", "-t", "ext4", "-O", "^metadata_csum"];
        let image = Image::new(16 << 20, &mkfs);
        let file = std::fs::File::options().write(true).open(image.path()).unwrap();
        file.write_all_at(bytes, 1024 + at).unwrap();
        refused(&image.path(), why);
    }
    // One of two devices of a btrfs.
    let other = Image::new(200 << 20, &["true"]);
    let other = other.path();
    let image = Image::new(200 << 20, &["mkfs.btrfs", "-q", other.to_str().unwrap()]);
    refused(&image.path(), "has 2 devices");
}

#[test]
fn fat_is_mounted_by_a_kernel_that_knows_it_and_else_refused_whole() {
    let test = "fat_is_mounted_by_a_kernel_that_knows_it_and_else_refused_whole";
    if !ready(test, &["mkfs.fat", "mcopy"]) {
        return;
    }
    let image = Image::new(40 << 20, &["mkfs.fat", "-F", "16"]);
    let (path, file) = (image.path(), image.dir.path().join("file"));
    std::fs::write(&file, "of fat\n").unwrap();
    run("mcopy", &["-i", path.to_str().unwrap(), file.to_str().unwrap(), "::"]);
    let mut points = Points::new();
    points.add(&path);
    let attach = Attach::new();
    let out = attach.attach_command(points.dir.path(), "vda/latest", &[]).output().unwrap();
    let known = std::fs::read_to_string("/proc/filesystems").unwrap();
    if known.lines().any(|l| l.trim() == "vfat") || out.status.success() {
        succeeded(&out);
        assert_eq!(std::fs::read_to_string(attach.at("disk/file")).unwrap(), "of fat\n");
    } else {
        assert_eq!(out.status.code(), Some(11), "{}", said(&out));
        assert!(said(&out).contains("this kernel does not know vfat"), "{}", said(&out));
        assert_eq!(attach.left(), Vec::<String>::new());
    }
    // Without mounting there is a device in any case, and its bytes are the point's.
    let none = succeeded(&attach.command(&["detach", "--all"]).output().unwrap());
    assert!(none.is_empty() || none == "nothing is attached\n");
    let mut command = attach.command(&["attach", "--json"]);
    let told = succeeded(&command.arg(points.dir.path()).arg("vda/latest").output().unwrap());
    let told: Value = serde_json::from_str(&told).unwrap();
    let device = told["points"][0]["device"].as_str().unwrap();
    assert_eq!(told["volumes"][0]["content"], "fat");
    assert!(std::fs::read(device).unwrap() == std::fs::read(&path).unwrap());
    attach.detach(device);
}
