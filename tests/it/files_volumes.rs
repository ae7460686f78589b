//! Where files are on a disk: partitions by GPT and MBR, volumes of LVM on one and on two disks.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use crate::support::file_systems::{Points, TOOLS, said};
use crate::support::guard::Guard;
use crate::support::images::Chain;
use crate::support::mount::Mount;
use crate::support::tools::{have, is_root, run};

#[test]
fn partitions_are_found_by_their_numbers() {
    let more = ["sfdisk", "mkfs.ext4"];
    if !have("partitions_are_found_by_their_numbers", &[TOOLS.as_slice(), &more].concat()) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    std::fs::create_dir(at("files")).unwrap();
    for (label, table) in [
        ("gpt", "label: gpt\nstart=2048, size=40960, name=one\nstart=43008, size=40960\n"),
        (
            "dos",
            "label: dos\nstart=2048, size=40960\nstart=43008, size=90000, type=5\nstart=45056, size=40960\n",
        ),
    ] {
        let disk = at(label);
        std::fs::File::create(&disk).unwrap().set_len(80 << 20).unwrap();
        let input = at("table");
        std::fs::write(&input, table).unwrap();
        run("sh", &["-c", &format!("sfdisk -q {disk} < {input}")]);
        let places = if label == "gpt" { [(2048, 1), (43008, 2)] } else { [(2048, 1), (45056, 5)] };
        for (sector, number) in places {
            std::fs::write(at("files/number"), format!("{number}\n")).unwrap();
            let offset = format!("offset={}", sector * 512);
            run("mkfs.ext4", &["-q", "-F", "-E", &offset, "-d", &at("files"), &disk, "20M"]);
        }
        let mut points = Points::new();
        points.add(Path::new(&disk));
        for (_, number) in places {
            let path = format!("vda/latest:p{number}/number");
            assert_eq!(points.printed(&["cat"], &path, &[]), format!("{number}\n"));
        }
        let listed = points.printed(&["ls"], "vda/latest", &[]);
        assert_eq!(listed.lines().filter(|l| l.contains("ext4")).count(), 2, "{listed}");
        // Which one is not guessed.
        let out = points.files(&["cat"], "vda/latest/number", &[]);
        assert_eq!(out.status.code(), Some(2));
        assert!(said(&out).contains("p1 (ext4)"), "{}", said(&out));
        if label == "gpt" {
            backup_table(Path::new(&disk));
        }
    }
}

/// Without the first copy of its GPT a disk is read by the second one.
fn backup_table(disk: &Path) {
    let file = std::fs::File::options().write(true).open(disk).unwrap();
    file.write_all_at(&[0; 512], 512).unwrap();
    let mut points = Points::new();
    points.add(disk);
    let out = points.files(&["cat"], "vda/latest:2/number", &[]);
    assert_eq!(String::from_utf8_lossy(&out.stdout), "2\n", "{}", said(&out));
    assert!(said(&out).contains("using the backup GPT"), "{}", said(&out));
}

/// Where the stripes of a stretch are: which disk, which extent, and how many.
type Stripes = Vec<(usize, u64, u64)>;

/// LVM's own tools on two loop devices, without a device mapper: what they write is what is read.
struct Lvm {
    dir: tempfile::TempDir,
    devices: Vec<Guard>,
}

impl Lvm {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut devices = Vec::new();
        for name in ["vda", "vdb"] {
            let path = dir.path().join(name);
            std::fs::File::create(&path).unwrap().set_len(64 << 20).unwrap();
            devices.push(Guard::attach("", &path));
        }
        let accepted = |d: &Guard| format!("\"a|^{}$|\"", d.made().display());
        let filter: Vec<String> = devices.iter().map(accepted).collect();
        let conf = format!(
            "devices {{ filter=[{},\"r|.*|\"] use_devicesfile=0 }}\n\
             activation {{ udev_sync=0 udev_rules=0 monitoring=0 }}\n\
             global {{ use_lvmpolld=0 }}\nbackup {{ backup=0 archive=0 }}\n",
            filter.join(",")
        );
        std::fs::write(dir.path().join("lvm.conf"), conf).unwrap();
        let lvm = Lvm { dir, devices };
        let all = lvm.names();
        lvm.run(&[&["pvcreate", "-y"], &all.each_ref().map(String::as_str)[..]].concat());
        lvm.run(
            &[&["vgcreate", "-s", "1M", "vg-x"], &all.each_ref().map(String::as_str)[..]].concat(),
        );
        for more in [
            &["-L", "20M", "-n", "linear"][..],
            &["-L", "24M", "-i", "2", "-I", "64k", "-n", "striped"],
            &["-l", "100%FREE", "-n", "both"],
        ] {
            lvm.run(&[&["lvcreate", "-y", "-an", "-Zn", "-Wn"], more, &["vg-x"]].concat());
        }
        lvm
    }

    fn names(&self) -> [String; 2] {
        [0, 1].map(|i| self.devices[i].made().to_str().unwrap().to_string())
    }

    fn run(&self, args: &[&str]) -> String {
        let mut command = Command::new("lvm");
        command.arg(args[0]).args(["--driverloaded", "n"]).args(&args[1..]);
        let out = command.env("LVM_SYSTEM_DIR", self.dir.path()).output().unwrap();
        assert!(out.status.success(), "{args:?}: {}", said(&out));
        String::from_utf8_lossy(&out.stdout).into_owned()
    }

    /// Of each volume its stretches.
    fn places(&self) -> BTreeMap<String, Vec<Stripes>> {
        let text = self.run(&["lvs", "--noheadings", "-o", "name,seg_pe_ranges"]);
        let mut found: BTreeMap<String, Vec<_>> = BTreeMap::new();
        for line in text.lines() {
            let mut words = line.split_whitespace();
            let Some(name) = words.next() else { continue };
            let stripe = |word: &str| {
                let (device, range) = word.rsplit_once(':').unwrap();
                let (from, to) = range.split_once('-').unwrap();
                let (from, to): (u64, u64) = (from.parse().unwrap(), to.parse().unwrap());
                let disk = self.names().iter().position(|n| n == device).unwrap();
                (disk, from, to - from + 1)
            };
            found.entry(name.to_string()).or_default().push(words.map(stripe).collect());
        }
        found
    }

    /// Puts a file system with the file `name` into a volume.
    fn fill(&self, name: &str, places: &[Stripes]) {
        const EXTENT: u64 = 1 << 20;
        /// pe_start, as pvcreate chooses it.
        const START: u64 = 1 << 20;
        const STRIPE: u64 = 64 << 10;
        let extents: u64 = places.iter().flatten().map(|(_, _, n)| n).sum();
        let at = |name: &str| self.dir.path().join(name);
        std::fs::create_dir_all(at("files")).unwrap();
        std::fs::write(at("files/name"), format!("{name}\n")).unwrap();
        std::fs::write(at("files/large"), name.repeat(2_000_000)).unwrap();
        let image = at("fs");
        let path = image.to_str().unwrap();
        std::fs::File::create(&image).unwrap().set_len(extents * EXTENT).unwrap();
        run("mkfs.ext4", &["-q", "-F", "-d", at("files").to_str().unwrap(), path]);
        let bytes = std::fs::read(&image).unwrap();
        let disks =
            ["vda", "vdb"].map(|d| std::fs::File::options().write(true).open(at(d)).unwrap());
        let mut done = 0;
        for stripes in places {
            let len: u64 = stripes.iter().map(|(_, _, n)| n * EXTENT).sum();
            let unit = if stripes.len() == 1 { EXTENT } else { STRIPE };
            for i in 0..len / unit {
                let (disk, from, _) = stripes[(i % stripes.len() as u64) as usize];
                let place = START + from * EXTENT + i / stripes.len() as u64 * unit;
                let part = &bytes[done as usize..(done + unit) as usize];
                disks[disk].write_all_at(part, place).unwrap();
                done += unit;
            }
        }
    }
}

#[test]
fn volumes_of_lvm_are_put_together_from_the_disks_of_a_run() {
    let test = "volumes_of_lvm_are_put_together_from_the_disks_of_a_run";
    let more = ["lvm", "mkfs.ext4"];
    if !have(test, &[TOOLS.as_slice(), &more].concat()) || !is_root(test) {
        return;
    }
    let lvm = Lvm::new();
    let places = lvm.places();
    assert_eq!(places["striped"][0].len(), 2);
    assert_eq!(places["both"].len(), 2, "on both disks");
    places.iter().for_each(|(name, p)| lvm.fill(name, p));
    let names = ["vda", "vdb"].map(|n| lvm.dir.path().join(n));
    let mut points = Points::new();
    points.add(&names[0]);
    // With one disk only what is on that.
    let listed = points.files(&["ls"], "vda/latest", &[]);
    let text = String::from_utf8_lossy(&listed.stdout).into_owned();
    assert!(text.contains("vg--x-linear") && !text.contains("vg--x-both"), "{text}");
    assert!(said(&listed).contains("physical volume pv1 is missing"), "{}", said(&listed));
    // The other disk's point of the same time.
    let mut other = Chain::new(points.dir.path(), "vdb");
    let path = other.next_path();
    run(
        "qemu-img",
        &[
            "convert",
            "-f",
            "raw",
            "-O",
            "qcow2",
            names[1].to_str().unwrap(),
            path.to_str().unwrap(),
        ],
    );
    for disk in ["vda", "vdb"] {
        for name in ["linear", "striped", "both"] {
            let at = |file: &str| format!("{disk}/latest:vg--x-{name}/{file}");
            assert_eq!(points.printed(&["cat"], &at("name"), &[]), format!("{name}\n"));
            assert_eq!(points.printed(&["cat"], &at("large"), &[]), name.repeat(2_000_000));
        }
    }
    // A mount finds the other disk, too.
    let mount = Mount::with(points.dir.path(), &["--files"]);
    for disk in ["vda", "vdb"] {
        for name in ["linear", "striped", "both"] {
            let at = mount.path().join(format!("{disk}/latest.files/vg--x-{name}"));
            let read = |file: &str| std::fs::read_to_string(at.join(file)).unwrap();
            assert_eq!(read("name"), format!("{name}\n"));
            assert!(read("large") == name.repeat(2_000_000));
        }
    }
}
