//! `fleecefs boot`: a run as a test VM, whether it comes up, and what it leaves: nothing. Without an operating system: a
//! boot sector that reads the second disk, writes to the first, and says so on the serial port.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

use crate::support::guard::tied;
use crate::support::process::{eventually, is_gone};
use crate::support::tools::{have, run};

const TOOLS: &[&str] = &["qemu-system-x86_64", "qemu-img", "qemu-io"];

/// What the boot sector reads from the second disk.
const WORDS: &str = "the second disk is here";

/// 16-bit code: reads the first sector of disk 0x81, writes it to the second sector of disk 0x80, and sends its text to
/// the first serial port.
const SECTOR: &[u8] = &[
    0xfa, 0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0, 0xbc, 0x00, 0x7c,
    0xfb, // segments, stack
    0xbb, 0x00, 0x80, 0xb8, 0x01, 0x02, 0xb9, 0x01, 0x00, 0xba, 0x81, 0x00, 0xcd,
    0x13, // read
    0x72, 0x27, // failed: stop
    0xb8, 0x01, 0x03, 0xb9, 0x02, 0x00, 0xba, 0x80, 0x00, 0xcd, 0x13, // write
    0x72, 0x1a, // failed: stop
    0xbe, 0x00, 0x80, 0xac, 0x84, 0xc0, 0x74, 0x12, 0x88, 0xc4, // next character
    0xba, 0xfd, 0x03, 0xec, 0xa8, 0x20, 0x74, 0xf8, // wait until the port is free
    0x88, 0xe0, 0xba, 0xf8, 0x03, 0xee, 0xeb, 0xe9, // send
    0xf4, 0xeb, 0xfd, // stop
];

/// Two disks; the second has a FULL with other words, and an INC.
struct Backups {
    dir: tempfile::TempDir,
}

impl Backups {
    fn new(boots: bool) -> Self {
        let b = Backups { dir: tempfile::tempdir().unwrap() };
        let mut first = vec![0; 1 << 20];
        if boots {
            first[..SECTOR.len()].copy_from_slice(SECTOR);
            first[510..512].copy_from_slice(&[0x55, 0xaa]);
        }
        b.image("vda/FULL-1700000000-vda.qcow2", &first);
        let words = |w: &str| [w.as_bytes(), b"\r\n\0", &[0; 1 << 20]].concat()[..1 << 20].to_vec();
        b.image("vdb/FULL-1700000000-vdb.qcow2", &words("an older state"));
        b.image("vda/INC-1700000060-vda.qcow2", &[]);
        b.image("vdb/INC-1700000060-vdb.qcow2", &words(WORDS)[..65536]);
        b
    }

    /// An image of 1 MiB whose beginning is `bytes`, and which has nothing else.
    fn image(&self, name: &str, bytes: &[u8]) {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let text = path.to_str().unwrap();
        run("qemu-img", &["create", "-q", "-f", "qcow2", text, "1M"]);
        if !bytes.is_empty() {
            let raw = self.path("raw.bytes");
            std::fs::write(&raw, bytes).unwrap();
            let write = format!("write -q -s {} 0 {}", raw.display(), bytes.len());
            run("qemu-io", &["-f", "qcow2", "-c", &write, text]);
            std::fs::remove_file(raw).unwrap();
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("b").join(name)
    }

    fn command(&self, more: &[&str]) -> Command {
        let mut c = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
        c.arg("boot").arg(self.path("")).arg("--state-dir").arg(self.dir.path().join("state"));
        c.args(more).stdin(Stdio::null());
        c
    }

    /// `boot --check`, with a report in the folder `out`.
    fn check(&self, more: &[&str]) -> (Output, Value) {
        let out = self.dir.path().join("out");
        let fixed = ["--check", "--accel", "tcg", "--memory", "64M", "--json", "--out"];
        let output = self.command(&fixed).arg(out).args(more).output().unwrap();
        let told = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&output.stderr)));
        (output, told)
    }

    /// The bytes of all that is in the backup directory, and when it was changed.
    fn state(&self) -> Vec<(PathBuf, Vec<u8>, std::time::SystemTime)> {
        fn add(dir: &Path, all: &mut Vec<(PathBuf, Vec<u8>, std::time::SystemTime)>) {
            for entry in std::fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                match path.is_dir() {
                    true => add(&path, all),
                    false => {
                        let changed = path.metadata().unwrap().modified().unwrap();
                        all.push((path.clone(), std::fs::read(&path).unwrap(), changed));
                    }
                }
            }
        }
        let mut all = Vec::new();
        add(&self.path(""), &mut all);
        all.sort();
        all
    }
}

#[test]
fn both_disks_of_a_run_are_booted_and_the_backup_stays_as_it_is() {
    if !have("both_disks_of_a_run_are_booted_and_the_backup_stays_as_it_is", TOOLS) {
        return;
    }
    let b = Backups::new(true);
    let before = b.state();
    let (out, told) = b.check(&["--expect", &format!("^{WORDS}$"), "--timeout", "5m"]);
    assert!(out.status.success(), "{told}");
    let check = &told["checks"][0];
    assert_eq!((&check["passed"], &check["disk_errors"]), (&true.into(), &Value::Array(vec![])));
    let read = |key: &str| std::fs::read(check[key].as_str().unwrap()).unwrap();
    assert!(String::from_utf8(read("serial_log")).unwrap().contains(WORDS));
    assert!(read("picture").starts_with(b"\x89PNG\r\n"), "no picture");
    assert_eq!(b.state(), before);
    // The older run says the older words; by now all that the first guest wrote is gone.
    let (out, told) = b.check(&["@1700000000", "--expect", "^an older state", "--timeout", "5m"]);
    assert!(out.status.success(), "{told}");
    // Points of each disk by name.
    let points = ["vdb/FULL-1700000000-vdb.qcow2", "vda/INC-1700000060-vda.qcow2", "--bus", "scsi"];
    let (out, told) = b.check(&[&points[..], &["--expect", "older", "--timeout", "5m"]].concat());
    assert!(out.status.success(), "{told}");
    assert_eq!(b.state(), before);
}

#[test]
fn a_point_without_a_boot_sector_does_not_come_up_and_list_says_so() {
    let test = "a_point_without_a_boot_sector_does_not_come_up_and_list_says_so";
    if !have(test, TOOLS) {
        return;
    }
    let b = Backups::new(false);
    let (out, told) = b.check(&["--expect", WORDS, "--timeout", "3s"]);
    assert_eq!(out.status.code(), Some(18), "{told}");
    let check = &told["checks"][0];
    assert_eq!(check["passed"], false);
    // The firmware's words are on it: a black one is much smaller.
    let picture = std::fs::read(check["picture"].as_str().unwrap()).unwrap();
    assert!(picture.starts_with(b"\x89PNG\r\n") && picture.len() > 1500, "{}", picture.len());
    let mut list = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
    list.args(["list", "--json"]).arg(b.path("")).arg("--state-dir");
    let list = list.arg(b.dir.path().join("state")).output().unwrap();
    let list: Value = serde_json::from_slice(&list.stdout).unwrap();
    let point = |disk: usize, point: usize| &list["disks"][disk]["points"][point]["booted"];
    assert_eq!((&point(0, 1)["passed"], &point(1, 1)["passed"]), (&false.into(), &false.into()));
    assert!(point(0, 0).is_null() && point(0, 1)["time"].is_string());
}

/// The processes whose parent is `pid`.
fn children(pid: u32) -> Vec<u32> {
    let list = format!("/proc/{pid}/task/{pid}/children");
    let list = std::fs::read_to_string(list).unwrap_or_default();
    list.split_whitespace().map(|p| p.parse().unwrap()).collect()
}

#[test]
fn a_killed_boot_leaves_neither_qemu_nor_what_the_guest_wrote() {
    let test = "a_killed_boot_leaves_neither_qemu_nor_what_the_guest_wrote";
    if !have(test, TOOLS) {
        return;
    }
    let b = Backups::new(true);
    let before = b.state();
    let scratch = b.dir.path().join("scratch");
    let mut command = b.command(&["--accel", "tcg", "--memory", "64M", "--scratch"]);
    command.arg(&scratch).stdout(Stdio::piped());
    let mut child = tied(&mut command).spawn().unwrap();
    // What the guest says tells that it has written.
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().unwrap()));
    assert!(lines.any(|l| l.unwrap().contains(WORDS)));
    let qemus = children(child.id());
    assert_eq!(qemus.len(), 1, "{qemus:?}");
    let status = std::fs::read_to_string(format!("/proc/{}/status", qemus[0])).unwrap();
    let field = |name: &str| status.lines().find(|l| l.starts_with(name)).unwrap().to_string();
    assert!(field("CapEff:").ends_with("0000000000000000"), "{status}");
    assert!(field("NoNewPrivs:").ends_with('1') && field("Seccomp:").ends_with('2'), "{status}");
    // SAFETY: geteuid has no preconditions.
    let root = unsafe { libc::geteuid() } == 0;
    assert!(!root || field("Uid:").contains("65534"), "{status}");
    child.kill().unwrap();
    child.wait().unwrap();
    eventually("QEMU ends", || is_gone(qemus[0] as i32));
    assert_eq!(std::fs::read_dir(&scratch).unwrap().count(), 0);
    assert_eq!(b.state(), before);
}

#[test]
fn qemu_reads_the_same_bytes_through_the_printed_graph() {
    if !have("qemu_reads_the_same_bytes_through_the_printed_graph", TOOLS) {
        return;
    }
    let b = Backups::new(true);
    let out = b.command(&["--print-blockdev"]).output().unwrap();
    let text = String::from_utf8(out.stdout).unwrap();
    let graphs: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(graphs.len(), 2, "{text}");
    let raw = b.dir.path().join("raw");
    for (graph, point) in graphs.iter().zip(["vda/latest", "vdb/latest"]) {
        let mut graph = graph.clone();
        assert_eq!(graph["backing"]["backing"], Value::Null);
        // A name is for QEMU's -blockdev alone.
        graph.as_object_mut().unwrap().remove("node-name");
        let from = format!("json:{graph}");
        run("qemu-img", &["convert", "-O", "raw", &from, raw.to_str().unwrap()]);
        let mut restore = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
        let ours = restore.arg("restore").arg(b.path("")).args([point, "-"]).output().unwrap();
        assert!(ours.status.success() && ours.stdout == std::fs::read(&raw).unwrap(), "{point}");
    }
}

/// The printed commands, with a monitor that is asked what the VM has.
#[test]
fn the_printed_commands_start_the_vm() {
    if !have("the_printed_commands_start_the_vm", TOOLS) {
        return;
    }
    let b = Backups::new(true);
    let before = b.state();
    let out = b.command(&["--print", "--accel", "tcg", "--memory", "64M"]).output().unwrap();
    let mut script = format!("set -e\n{}", String::from_utf8(out.stdout).unwrap().trim());
    script += " -S -display none -qmp stdio <<'END'\n";
    for command in ["qmp_capabilities", "query-block", "quit"] {
        script += &format!("{{\"execute\": \"{command}\"}}\n");
    }
    script += "END\n";
    let work = tempfile::tempdir().unwrap();
    let out = Command::new("timeout")
        .args(["120", "sh", "-c", &script])
        .current_dir(work.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success(), "{said}\n{script}");
    let answers: Vec<Value> = String::from_utf8(out.stdout)
        .unwrap()
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    let drives = answers.iter().find_map(|a| a["return"].as_array()).unwrap();
    assert_eq!(drives.len(), 2);
    for drive in drives {
        let image = &drive["inserted"]["image"];
        assert!(image["filename"].as_str().unwrap().contains("fleecefs-boot-"), "{image}");
        let below = image["backing-image"]["filename"].as_str().unwrap();
        assert!(below.contains("INC-1700000060"), "{image}");
    }
    assert_eq!(b.state(), before);
    let xml = b.command(&["--libvirt"]).output().unwrap();
    let xml = String::from_utf8(xml.stdout).unwrap();
    assert!(xml.contains("<disk type='file'") && xml.contains("INC-1700000060-vdb.qcow2"), "{xml}");
}

#[test]
fn what_cannot_be_meant_is_refused() {
    let b = Backups { dir: tempfile::tempdir().unwrap() };
    std::fs::create_dir(b.path("")).unwrap();
    for args in [
        &["--expect", "x"][..],
        &["--check", "--tcp", "22", "--net", "none"],
        &["--check", "--print"],
        &["--check", "--expect", "("],
        &["--keep-going", "--check"],
        &["--json"],
    ] {
        assert_eq!(b.command(args).output().unwrap().status.code(), Some(2), "{args:?}");
    }
    assert_eq!(b.command(&[]).output().unwrap().status.code(), Some(3));
}

/// Two VMs in one directory; the first does not come up.
#[test]
fn the_newest_run_of_each_vm_is_checked_also_where_one_is_not_up() {
    if !have("the_newest_run_of_each_vm_is_checked_also_where_one_is_not_up", TOOLS) {
        return;
    }
    let all = Backups { dir: tempfile::tempdir().unwrap() };
    std::fs::create_dir(all.path("")).unwrap();
    for (name, boots) in [("vm1", false), ("vm2", true)] {
        let one = Backups::new(boots);
        run("cp", &["-r", one.path("").to_str().unwrap(), all.path(name).to_str().unwrap()]);
    }
    let expect = format!("^{WORDS}$");
    let (out, told) =
        all.check(&["--all-latest", "--keep-going", "--expect", &expect, "--timeout", "20s"]);
    assert_eq!(out.status.code(), Some(18), "{told}");
    let checks = told["checks"].as_array().unwrap();
    let seen: Vec<_> = checks.iter().map(|c| (c["vm"].as_str(), c["passed"].as_bool())).collect();
    assert_eq!(seen, [(Some("vm1"), Some(false)), (Some("vm2"), Some(true))], "{told}");
    assert!(checks[0]["picture"] != checks[1]["picture"] && checks[1]["picture"].is_string());
}

/// It is not the backup of the other that lacks it.
#[test]
fn a_vm_whose_image_is_missing_stops_no_other() {
    if !have("a_vm_whose_image_is_missing_stops_no_other", TOOLS) {
        return;
    }
    let all = Backups { dir: tempfile::tempdir().unwrap() };
    std::fs::create_dir(all.path("")).unwrap();
    for name in ["vm1", "vm2"] {
        let one = Backups::new(true);
        run("cp", &["-r", one.path("").to_str().unwrap(), all.path(name).to_str().unwrap()]);
    }
    // With manifests that name no other image of their run.
    let mut create = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
    create.args(["verify", "--create"]).arg(all.path("vm1"));
    let created = create.env("XDG_STATE_HOME", all.dir.path().join("state")).output().unwrap();
    assert!(created.status.code().is_some(), "{created:?}");
    let lost = "INC-1700000060-vdb.qcow2";
    assert!(all.path(&format!("vm1/vdb/.fleecefs/{lost}.json")).exists());
    std::fs::remove_file(all.path(&format!("vm1/vdb/{lost}"))).unwrap();
    let expect = format!("^{WORDS}$");
    let (out, told) = all.check(&["--all-latest", "--expect", &expect, "--timeout", "5m"]);
    assert_eq!(out.status.code(), Some(19), "{told}");
    let checks = told["checks"].as_array().unwrap();
    let seen: Vec<_> = checks.iter().map(|c| (c["vm"].as_str(), c["passed"].as_bool())).collect();
    assert_eq!(seen, [(Some("vm1"), Some(false)), (Some("vm2"), Some(true))], "{told}");
    let why = checks[0]["error"]["message"].as_str().unwrap();
    assert!(why.contains(lost) && why.contains("vm1/vdb"), "{told}");
}
