//! Single files out of a point: its partitions, mounted through a loop device.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::guard::Guard;
use crate::support::images::Chain;
use crate::support::mount::Mount;
use crate::support::tools::{have, run};
use serde_json::Value;

const TOOLS: [&str; 3] = ["qemu-img", "qemu-io", "/dev/fuse"];

#[test]
fn partitions_mount_through_a_loop_device() {
    let tools = ["losetup", "sfdisk", "mkfs.ext4", "mkfs.xfs", "mount", "/dev/loop-control"];
    // SAFETY: cannot fail.
    let root = unsafe { libc::geteuid() } == 0;
    if !have("partitions_mount_through_a_loop_device", &[TOOLS.as_slice(), &tools].concat())
        || !root
    {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let work = tempfile::tempdir().unwrap();
    let disk = partitioned_disk(work.path());
    let mut chain = Chain::new(dir.path(), "vda");
    let full = chain.next_path();
    let (from, to) = (disk.to_str().unwrap(), full.to_str().unwrap());
    run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", "-c", from, to]);
    // An INC that changes nothing either file system uses: the gap before the first partition.
    chain.point("", disk.metadata().unwrap().len(), &["write -P 9 512k 64k".to_string()]);
    let mount = Mount::new(dir.path());
    let latest = mount.path().join("vda/latest.raw");
    let looped = Loop::new(&latest);
    for (n, options) in [(1, "ro,noload"), (2, "ro,norecovery,nouuid")] {
        let part = looped.partition(n, &latest);
        let inner = Inner::new(part.path(), options);
        let text = std::fs::read_to_string(inner.dir.path().join("hello")).unwrap();
        assert_eq!(text, "hello from the backup\n");
    }
}

/// A raw disk with an ext4 and an XFS partition that each hold the file `hello`.
fn partitioned_disk(work: &Path) -> PathBuf {
    let path = |name: &str| work.join(name).to_str().unwrap().to_string();
    std::fs::create_dir(path("files")).unwrap();
    std::fs::write(path("files/hello"), "hello from the backup\n").unwrap();
    run("truncate", &["-s", "64M", &path("ext4")]);
    run("mkfs.ext4", &["-q", "-F", "-d", &path("files"), &path("ext4")]);
    let proto = format!("-\n0 0\nd--755 0 0\nhello ---644 0 0 {}\n$\n$\n", path("files/hello"));
    std::fs::write(path("proto"), proto).unwrap();
    run("truncate", &["-s", "320M", &path("xfs")]);
    run("mkfs.xfs", &["-q", "-p", &path("proto"), &path("xfs")]);
    run("truncate", &["-s", "386M", &path("disk")]);
    let table = "label: gpt\nstart=1MiB, size=64MiB\nstart=65MiB, size=320MiB\n";
    let mut sfdisk = Command::new("sfdisk")
        .args(["-q", &path("disk")])
        .stdin(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    sfdisk.stdin.take().unwrap().write_all(table.as_bytes()).unwrap();
    assert!(sfdisk.wait().unwrap().success());
    for (part, at) in [("ext4", 1), ("xfs", 65)] {
        let (from, to) = (format!("if={}", path(part)), format!("of={}", path("disk")));
        let seek = format!("seek={at}");
        run("dd", &[&from, &to, &seek, "bs=1M", "conv=notrunc,sparse", "status=none"]);
    }
    work.join("disk")
}

/// A loop device, or the device of a partition, which goes with its disk's.
enum Loop {
    Whole(Guard),
    Part(PathBuf),
}

impl Loop {
    fn new(file: &Path) -> Self {
        Loop::Whole(Guard::attach("-r -P", file))
    }

    fn path(&self) -> &Path {
        match self {
            Loop::Whole(guard) => guard.made(),
            Loop::Part(device) => device,
        }
    }

    /// The device of partition `n`. A kernel without partition tables gets a loop device that
    /// begins where sfdisk, reading through this one, says that the partition does.
    fn partition(&self, n: usize, file: &Path) -> Loop {
        let own = self.path().to_str().unwrap();
        let out = run("sfdisk", &["--json", own]);
        let table: Value = serde_json::from_slice(&out.stdout).unwrap();
        let part = &table["partitiontable"]["partitions"][n - 1];
        let device = PathBuf::from(format!("{own}p{n}"));
        if device.exists() {
            return Loop::Part(device);
        }
        let bytes = |key: &str| part[key].as_u64().unwrap() * 512;
        let (start, size) = (bytes("start"), bytes("size"));
        Loop::Whole(Guard::attach(&format!("-r -o {start} --sizelimit {size}"), file))
    }
}

/// A mounted partition.
struct Inner {
    _mount: Guard,
    dir: tempfile::TempDir,
}

impl Inner {
    fn new(device: &Path, options: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mount = Guard::mount(&format!("-o {options}"), device, dir.path());
        Inner { _mount: mount, dir }
    }
}
