//! A virtual machine boots from a point of the mount, without restoring it, and changes nothing.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

use crate::support::backup::Caller;
use crate::support::guest::{Disk, Guest, must};
use crate::support::mount::Mount;
use crate::support::tools::{have, run};

const FULL: &str = "FULL-1700003600-root.qcow2";
const INC: &str = "INC-1700007200-root.qcow2";

/// The guest's own disk as a FULL, and as an INC what it writes when it runs on top of that.
fn make_backups(dir: &Path, guest: &Guest, root: &Path) {
    let (full, inc) = (dir.join("root").join(FULL), dir.join("root").join(INC));
    std::fs::create_dir(dir.join("root")).unwrap();
    std::fs::copy(root, &full).unwrap();
    must(
        Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"])
            .args([&full, &inc]),
    );
    guest.boot(&inc, &[], &[], &[]);
    guest.wait_ready();
    guest.shell("echo written later > /marker; sync");
    guest.kill();
    must(Command::new("qemu-img").args(["rebase", "-q", "-u", "-f", "qcow2", "-b", ""]).arg(&inc));
}

/// Boots from a point with a throw-away overlay and says what the guest sees.
fn boot(guest: &Guest, point: &Path) -> String {
    let root = format!("{},format=raw,snapshot=on", point.display());
    guest.boot(Path::new(&root), &[], &[], &[]);
    guest.wait_ready();
    let seen =
        guest.shell("cat /marker 2>/dev/null || echo nothing; echo scribble > /marker; sync");
    guest.kill();
    seen.trim().to_string()
}

#[test]
fn a_guest_boots_from_either_point() {
    let name = "a_guest_boots_from_either_point";
    let Some((guest, root)) = Guest::unstarted(name) else { return };
    let dir = tempfile::tempdir().unwrap();
    make_backups(dir.path(), &guest, &root);
    let mount = Mount::new(dir.path());
    // One of them twice: what the first guest wrote is gone.
    for (file, expected) in [(FULL, "nothing"), (FULL, "nothing"), (INC, "written later")] {
        let point = mount.point("root", Path::new(file));
        assert_eq!(boot(&guest, &point), expected, "{file}");
    }
}

/// `boot --check` of `dir`; with `state`, where it keeps what it found.
fn check(dir: &Path, state: &Path, more: &[&str]) -> (Output, Value) {
    let mut c = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
    c.arg("boot").arg(dir).arg("--state-dir").arg(state).args(["--check", "--json"]);
    c.args(["--accel", "tcg", "--memory", "256M", "--timeout", "10m", "--out"]);
    let out = c.arg(state.with_file_name("out")).args(more).output().unwrap();
    let told = serde_json::from_slice(&out.stdout)
        .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&out.stderr)));
    (out, told)
}

/// A running guest with two disks, backed up twice: from each run a VM comes up, with the disks that it had and what
/// was on them.
#[test]
fn a_guest_comes_up_from_each_of_its_runs_and_its_agent_tells_what_it_has() {
    let name = "a_guest_comes_up_from_each_of_its_runs_and_its_agent_tells_what_it_has";
    let Some((guest, image)) = Guest::unstarted(name) else { return };
    let cache = image.parent().unwrap();
    let (root, data) = (guest.path("root.qcow2"), guest.path("data.qcow2"));
    std::fs::copy(&image, &root).unwrap();
    run("qemu-img", &["create", "-q", "-f", "qcow2", data.to_str().unwrap(), "64M"]);
    guest.boot(&root, &[Disk::new("data", data).on("virtio-scsi")], &[], &[]);
    guest.wait_ready();
    let caller = Caller::guest(&guest);
    for (level, words) in [("full", "first"), ("inc", "second")] {
        guest.shell(&format!("echo {words} > /marker; echo {words} > /dev/disk/data; sync"));
        let out = caller.run(level);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    }
    guest.kill();
    let state = guest.path("boot-state");
    let list = Command::new(env!("CARGO_BIN_EXE_fleecefs"))
        .args(["list", "--runs", "--json"])
        .arg(&caller.target)
        .output()
        .unwrap();
    let list: Value = serde_json::from_slice(&list.stdout).unwrap();
    let (kernel, initrd) = (cache.join("vmlinuz"), cache.join("initrd"));
    let direct = ["--kernel", kernel.to_str().unwrap(), "--initrd", initrd.to_str().unwrap()];
    let words = ["--append", "console=ttyS0 quiet panic=-1 mitigations=off nokaslr no_timer_check"];
    let booted = |run: &str, command: &str| {
        let exec = [run, "--exec", command];
        check(&caller.target, &state, &[&direct[..], &words, &exec].concat())
    };
    for (run, words) in list["runs"].as_array().unwrap().iter().zip(["second", "first"]) {
        let id = run["run"].as_str().unwrap();
        let (out, told) =
            booted(id, "cat /marker; head -n 1 /dev/disk/data; ls /dev/disk; echo x > /marker");
        assert!(out.status.success(), "{told}");
        let said = told["checks"][0]["exec"]["stdout"].as_str().unwrap();
        let lines: Vec<&str> = said.lines().collect();
        assert_eq!(lines[..2], [words, words], "{said}");
        // Serial numbers are those that the disks had.
        assert!(["data", "root"].iter().all(|d| lines[2..].contains(d)), "{said}");
    }
    // The command's own word counts.
    let (out, told) = booted("latest", "echo no good >&2; exit 3");
    assert_eq!(out.status.code(), Some(18), "{told}");
    let exec = &told["checks"][0]["exec"];
    assert_eq!((&exec["exit_code"], &exec["stderr"]), (&3.into(), &"no good\n".into()));
}

/// A disk with an EFI system partition and no boot code: UEFI is taken without being asked for, and runs its script.
#[test]
fn a_disk_for_uefi_is_booted_by_uefi() {
    let tools = [
        "qemu-system-x86_64",
        "qemu-img",
        "sfdisk",
        "mformat",
        "mcopy",
        "/usr/share/OVMF/OVMF_CODE_4M.fd",
    ];
    if !have("a_disk_for_uefi_is_booted_by_uefi", &tools) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    std::fs::create_dir_all(at("b/vda")).unwrap();
    std::fs::write(at("startup.nsh"), "echo the shell of UEFI is here\r\n").unwrap();
    std::fs::File::create(at("raw")).unwrap().set_len(64 << 20).unwrap();
    let table = "printf 'label: gpt\nstart=1MiB, size=60MiB, type=uefi\n' | sfdisk -q \"$1\"";
    run("sh", &["-c", table, "sh", &at("raw")]);
    run("mformat", &["-i", &(at("raw") + "@@1M"), "-F", "::"]);
    run("mcopy", &["-i", &(at("raw") + "@@1M"), &at("startup.nsh"), "::"]);
    run(
        "qemu-img",
        &["convert", "-O", "qcow2", &at("raw"), &at("b/vda/FULL-1700000000-vda.qcow2")],
    );
    let expect = ["--expect", "^the shell of UEFI is here$"];
    let (out, told) = check(&dir.path().join("b"), &dir.path().join("state"), &expect);
    assert!(out.status.success(), "{told}");
    let picture = std::fs::read(told["checks"][0]["picture"].as_str().unwrap()).unwrap();
    assert!(picture.starts_with(b"\x89PNG"));
}
