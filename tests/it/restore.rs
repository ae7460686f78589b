//! What `restore` writes equals QEMU's own answer, on every kind of target, and nothing wrong ever
//! stands under the target's name.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use crate::support::guard::{self, Guard};
use crate::support::images::{self, Chain, Oracle, Rng, first_difference};
use crate::support::tools::{have, is_root, run};

const MIB: u64 = 1 << 20;
const TOOLS: [&str; 2] = ["qemu-img", "qemu-io"];

/// Runs fleecefs and gives back all it said.
fn fleecefs(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_fleecefs")).args(args).output().unwrap()
}

/// The same, which has to succeed.
fn ok(args: &[&str]) -> Output {
    let out = fleecefs(args);
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    out
}

/// The same, which has to fail with `code`.
fn fails(args: &[&str], code: i32) -> String {
    let out = fleecefs(args);
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(code), "{args:?}: {text}");
    text
}

fn s(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn name(file: &Path) -> &str {
    file.file_name().unwrap().to_str().unwrap()
}

/// A chain of `points` points with random writes, zeros and discards; each option of `incs` in
/// turn.
fn chain(dir: &Path, disk: &str, sizes: &[u64], options: &[&str], points: usize) -> Chain {
    let mut rng = Rng(disk.bytes().map(u64::from).sum());
    let mut chain = Chain::new(dir, disk);
    for i in 0..points {
        let size = sizes[i.min(sizes.len() - 1)];
        let options = options[i % options.len()];
        let mut ops = Vec::new();
        // First, because QEMU compresses only into clusters that are not there yet.
        if options.contains("zstd") || options.contains("cluster_size=4k") {
            ops.push(format!("write -c -P 7 {} 4k", (i as u64 * 64) << 10));
        }
        for k in 0..12 {
            let (at, len) = rng.range(size, 512);
            ops.push(match k % 6 {
                4 => format!("write -z {at} {len}"),
                5 => format!("discard {at} {len}"),
                _ => format!("write -P {} {at} {len}", 1 + rng.below(255)),
            });
        }
        chain.point(options, size, &ops);
    }
    chain
}

/// Chains that between them have every kind of extent.
fn chains(dir: &Path) -> Vec<Chain> {
    vec![
        chain(dir, "plain", &[8 * MIB], &[""], 4),
        chain(dir, "small", &[6 * MIB + 512], &["cluster_size=4k"], 4),
        chain(dir, "zstd", &[8 * MIB], &["cluster_size=4k,compression_type=zstd"], 3),
        chain(dir, "sub", &[8 * MIB], &["extended_l2=on,cluster_size=16k"], 3),
        chain(dir, "resize", &[8 * MIB, 3 * MIB, 10 * MIB + 1536], &["", "cluster_size=512"], 3),
        // More than one chunk, and a tail.
        chain(dir, "large", &[130 * MIB + 512], &["cluster_size=2M", ""], 2),
    ]
}

#[test]
fn raw_files_streams_and_qcow2_files_equal_qemus_answer() {
    if !have("raw_files_streams_and_qcow2_files_equal_qemus_answer", &TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    // In memory where there is such a place: dozens of files that each wait for the disk are slow.
    let memory = Path::new("/dev/shm");
    let to = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
    let to = to.unwrap();
    for chain in chains(dir.path()) {
        let oracle = Oracle::new(&chain.files);
        for (i, file) in chain.files.iter().enumerate() {
            let what = format!("{} point {i}", chain.name);
            let want = oracle.bytes(i);
            let raw = to.path().join("r.raw");
            ok(&["restore", "--force", "--verify", s(dir.path()), name(file), s(&raw)]);
            let got = std::fs::read(&raw).unwrap();
            assert_eq!(first_difference(&got, &want), None, "{what}");
            let out = ok(&["restore", s(dir.path()), name(file), "-"]);
            assert_eq!(first_difference(&out.stdout, &want), None, "{what} as a stream");
        }
        let last = chain.files.last().unwrap();
        qcow2_kinds(dir.path(), name(last), &oracle, to.path());
    }
}

#[test]
fn a_disk_without_a_byte_is_restored_too() {
    if !have("a_disk_without_a_byte_is_restored_too", &TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut c = Chain::new(dir.path(), "sda");
    let file = c.point("", 0, &[]);
    let to = tempfile::tempdir().unwrap();
    let [raw, qcow2] = ["r.raw", "r.qcow2"].map(|n| to.path().join(n));
    ok(&["restore", s(dir.path()), name(&file), s(&raw)]);
    assert_eq!(std::fs::metadata(&raw).unwrap().len(), 0);
    ok(&["restore", "--verify", s(dir.path()), name(&file), s(&qcow2)]);
    run("qemu-img", &["check", "-q", s(&qcow2)]);
}

/// Every kind of qcow2 file for one point: it passes QEMU's check and holds the same bytes.
fn qcow2_kinds(dir: &Path, point: &str, oracle: &Oracle, to: &Path) {
    let reference = oracle.files.last().unwrap();
    let kinds: [&[&str]; 12] = [
        &[],
        &["--cluster-size", "512"],
        &["--cluster-size", "4K"],
        &["--cluster-size", "2M"],
        &["--compress"],
        &["--compress=zstd"],
        &["--compress=zlib", "--cluster-size", "512"],
        &["--compress=zlib", "--cluster-size", "2M"],
        &["--compress=zstd", "--cluster-size", "2M"],
        &["--preallocation", "metadata"],
        &["--preallocation", "falloc", "--cluster-size", "8K"],
        &["--preallocation", "full"],
    ];
    for kind in kinds {
        let target = to.join("r.qcow2");
        let mut args = vec!["restore", "--force", "--verify", s(dir), point, s(&target)];
        args.extend(kind);
        ok(&args);
        run("qemu-img", &["check", "-q", "-f", "qcow2", s(&target)]);
        let compare = ["compare", "-q", "-f", "qcow2", "-F", "qcow2", s(&target), s(reference)];
        run("qemu-img", &compare);
    }
}

#[test]
fn holes_stay_holes_and_existing_targets_stay() {
    if !have("holes_stay_holes_and_existing_targets_stay", &TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut c = Chain::new(dir.path(), "sda");
    let f = c.point("", 1 << 30, &["write -P 1 512M 1M".into(), "write -P 0 700M 8M".into()]);
    let to = tempfile::tempdir().unwrap();
    let target = to.path().join("deep/er/r.raw");
    // Mistyped, or not mounted.
    fails(&["restore", s(dir.path()), name(&f), s(&target)], 3);
    assert!(!to.path().join("deep").exists());
    std::fs::create_dir_all(target.parent().unwrap()).unwrap();
    ok(&["restore", s(dir.path()), name(&f), s(&target)]);
    let meta = std::fs::metadata(&target).unwrap();
    assert_eq!(meta.len(), 1 << 30);
    assert!(meta.blocks() * 512 <= 2 * MIB, "{} bytes on disk", meta.blocks() * 512);
    let text = fails(&["restore", s(dir.path()), name(&f), s(&target)], 4);
    assert!(text.contains("--force"), "{text}");
    let inside = dir.path().join("sda/r.raw");
    fails(&["restore", s(dir.path()), name(&f), s(&inside)], 2);
    let plan = ok(&["restore", "--dry-run", "--json", s(dir.path()), name(&f), s(&target)]);
    let plan: serde_json::Value = serde_json::from_slice(&plan.stdout).unwrap();
    assert_eq!(plan["totals"]["data"].as_u64(), Some(9 * MIB));
    assert_eq!(plan["chunks"].as_array().unwrap().len(), 3);
}

/// A VM would go on with a file that has no name any more.
#[test]
fn what_a_vm_has_open_is_not_replaced() {
    if !have("what_a_vm_has_open_is_not_replaced", &TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut c = Chain::new(dir.path(), "sda");
    let f = c.point("", MIB, &["write -P 1 0 64k".into()]);
    let to = tempfile::tempdir().unwrap();
    let target = to.path().join("disk.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", s(&target), "1M"]);
    let before = std::fs::read(&target).unwrap();
    let mut vm = Command::new("qemu-io");
    let vm = vm.args(["-f", "qcow2", s(&target)]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut vm = guard::tied(vm).spawn().unwrap();
    // Its prompt comes when the image is open.
    std::io::Read::read_exact(vm.stdout.as_mut().unwrap(), &mut [0]).unwrap();
    let args = ["restore", "--force", s(dir.path()), name(&f), s(&target)];
    assert!(fails(&args, 6).contains("in use by another process"));
    assert!(std::fs::read(&target).unwrap() == before);
    drop(vm.stdin.take());
    vm.wait().unwrap();
    ok(&args);
}

#[test]
fn all_disks_of_a_run_are_restored_together() {
    if !have("all_disks_of_a_run_are_restored_together", &TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let a = chain(&dir.path().join("vm"), "sda", &[3 * MIB], &[""], 3);
    let b = chain(&dir.path().join("vm"), "sdb", &[2 * MIB], &[""], 2);
    let to = tempfile::tempdir().unwrap();
    let time = |f: &Path| name(f).split('-').nth(1).unwrap().to_string();
    let restore =
        |time: &str, to: &Path| ok(&["restore", s(dir.path()), "--run", time, "--to", s(to)]);
    assert_eq!(time(&a.files[1]), time(&b.files[1]));
    restore(&time(&a.files[1]), &to.path().join("one"));
    for (c, disk) in [(&a, "vm/sda"), (&b, "vm/sdb")] {
        let got = std::fs::read(to.path().join("one").join(format!("{disk}.raw"))).unwrap();
        assert_eq!(first_difference(&got, &Oracle::new(&c.files).bytes(1)), None, "{disk}");
    }
    // One of the disks has no point of this run: said, and the other is restored.
    let out = restore(&time(&a.files[2]), &to.path().join("two"));
    assert!(String::from_utf8_lossy(&out.stderr).contains("sdb has no point"));
    assert!(to.path().join("two/vm/sda.raw").exists());
    // The first of them cannot be restored: the other is, and it is said.
    std::fs::remove_file(&a.files[0]).unwrap();
    let three = to.path().join("three");
    let run = ["restore", s(dir.path()), "--run", &time(&b.files[1]), "--to", s(&three)];
    let text = fails(&run, 16);
    assert!(text.contains("sda: not restored") && text.contains("1 of 2 disks"), "{text}");
    assert!(three.join("vm/sdb.raw").exists() && !three.join("vm/sda.raw").exists());
    fails(&["restore", s(dir.path()), "--run", "12345", "--to", s(to.path())], 3);
}

#[test]
fn two_points_of_a_run_never_get_one_file() {
    if !have("two_points_of_a_run_never_get_one_file", &TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let a = chain(&dir.path().join("vm"), "a", &[MIB], &[""], 1);
    chain(&dir.path().join("vm"), "a.raw", &[MIB], &[""], 1);
    let time = name(&a.files[0]).split('-').nth(1).unwrap().to_string();
    let to = tempfile::tempdir().unwrap();
    let text =
        fails(&["restore", "--force", s(dir.path()), "--run", &time, "--to", s(to.path())], 2);
    assert!(text.contains("the same file"), "{text}");
    assert_eq!(std::fs::read_dir(to.path()).unwrap().count(), 0);
}

#[test]
fn no_way_leads_into_the_backup_directory() {
    if !have("no_way_leads_into_the_backup_directory", &TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let c = chain(dir.path(), "sda", &[MIB], &[""], 2);
    let before: Vec<Vec<u8>> = c.files.iter().map(|f| std::fs::read(f).unwrap()).collect();
    let to = tempfile::tempdir().unwrap();
    let at = |n: &str| to.path().join(n);
    std::os::unix::fs::symlink(&c.files[0], at("link.raw")).unwrap();
    std::os::unix::fs::symlink(&c.dir, at("folder")).unwrap();
    std::fs::hard_link(&c.files[0], at("second.raw")).unwrap();
    let odd = [
        at("link.raw"),
        at("second.raw"),
        at("folder/new.raw"),
        at("folder/deep/er.raw"),
        at("folder").join(name(&c.files[0])),
        c.dir.join("../sda/x.raw"),
    ];
    for target in odd {
        for dry in [&["--dry-run"] as &[&str], &[]] {
            let mut args = vec!["restore", "--force", s(dir.path()), name(&c.files[1]), s(&target)];
            args.extend(dry);
            fails(&args, 2);
        }
    }
    let after: Vec<Vec<u8>> = c.files.iter().map(|f| std::fs::read(f).unwrap()).collect();
    assert!(before == after && std::fs::read_dir(&c.dir).unwrap().count() == 2);
    // A link to another place is followed, as ever.
    std::fs::write(at("old"), b"old").unwrap();
    std::os::unix::fs::symlink(at("old"), at("good.raw")).unwrap();
    ok(&["restore", "--force", s(dir.path()), name(&c.files[1]), s(&at("good.raw"))]);
    assert_eq!(std::fs::metadata(at("old")).unwrap().len(), MIB);
}

/// A disk of an exabyte that holds next to nothing: what is not there is not gone through.
#[test]
fn a_disk_of_exabytes_is_restored_by_what_it_holds() {
    if !have("a_disk_of_exabytes_is_restored_by_what_it_holds", &["qemu-img", "/dev/shm"]) {
        return;
    }
    let dir = images::tempdir();
    let full = dir.path().join("b/sda/FULL-1700000000-sda.qcow2");
    std::fs::create_dir_all(full.parent().unwrap()).unwrap();
    let create = ["create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", s(&full), "1E"];
    run("qemu-img", &create);
    let writes = ["write -P 7 0 64k", "write -P 9 768P 64k"];
    images::qemu_io(&full, &writes.map(String::from));
    let (raw, again) = (dir.path().join("r.raw"), dir.path().join("again.raw"));
    let restore = |from: &Path, point: &str, to: &Path| {
        let mut child = Command::new(env!("CARGO_BIN_EXE_fleecefs"))
            .args(["restore", "--verify", s(from), point, s(to)])
            .spawn()
            .unwrap();
        // Done in a moment, or not in a lifetime.
        let end = std::time::Instant::now() + std::time::Duration::from_secs(180);
        while child.try_wait().unwrap().is_none() {
            if std::time::Instant::now() > end {
                child.kill().unwrap();
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        assert!(child.wait().unwrap().success());
        use std::os::unix::fs::FileExt;
        let file = std::fs::File::open(to).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 1 << 60);
        for (at, byte) in [(0, 7), (768 << 50, 9), (5 << 50, 0)] {
            let mut buf = [1; 65536];
            file.read_exact_at(&mut buf, at).unwrap();
            assert!(buf.iter().all(|b| *b == byte), "at {at}");
        }
    };
    restore(&dir.path().join("b"), name(&full), &raw);
    // And a raw file of that length as a source.
    std::fs::create_dir(dir.path().join("c")).unwrap();
    let source = dir.path().join("c/disk.raw");
    std::fs::rename(&raw, &source).unwrap();
    restore(&dir.path().join("c"), "disk.raw", &again);
}

#[test]
fn unreadable_ranges_fail_or_are_salvaged_and_told() {
    if !have("unreadable_ranges_fail_or_are_salvaged_and_told", &TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut c = Chain::new(dir.path(), "sda");
    c.point("", 4 * MIB, &["write -P 1 0 4M".into()]);
    let inc = c.point("", 4 * MIB, &["write -c -P 9 1M 64k".into(), "write -P 5 2M 64k".into()]);
    let want = Oracle::new(&c.files).bytes(1);
    // The compressed cluster turns to garbage.
    let bytes = std::fs::read(&inc).unwrap();
    let l1 = u64::from_be_bytes(bytes[40..48].try_into().unwrap()) as usize;
    let l2 = u64::from_be_bytes(bytes[l1..l1 + 8].try_into().unwrap()) as usize & 0xff_ffff_ffff;
    let entry = u64::from_be_bytes(bytes[l2 + 128..l2 + 136].try_into().unwrap());
    let mut bytes = bytes;
    let at = (entry & ((1 << 54) - 1)) as usize;
    bytes[at..at + 64].fill(0xff);
    std::fs::write(&inc, bytes).unwrap();
    let to = tempfile::tempdir().unwrap();
    for target in ["r.raw", "r.qcow2"] {
        let target = to.path().join(target);
        let text = fails(&["restore", s(dir.path()), name(&inc), s(&target)], 10);
        assert!(text.contains(name(&inc)) && text.contains("offset"), "{text}");
        assert_eq!(std::fs::read_dir(to.path()).unwrap().count(), 0, "something was left");
        let args = ["restore", "--salvage", "--verify", s(dir.path()), name(&inc), s(&target)];
        let text = fails(&args, 16);
        assert!(text.contains("65536 bytes"), "{text}");
        let raw = to.path().join("raw");
        run("qemu-img", &["convert", "-O", "raw", s(&target), s(&raw)]);
        let mut want = want.clone();
        want[MIB as usize..MIB as usize + 65536].fill(0);
        assert_eq!(first_difference(&std::fs::read(&raw).unwrap(), &want), None);
        std::fs::remove_file(&raw).unwrap();
        std::fs::remove_file(&target).unwrap();
    }
}

#[test]
fn a_block_device_is_overwritten_only_when_meant() {
    let test = "a_block_device_is_overwritten_only_when_meant";
    if !have(test, &["qemu-img", "qemu-io", "losetup", "mkfs.ext4"]) || !is_root(test) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let c = chain(dir.path(), "sda", &[70 * MIB + 512], &[""], 3);
    let want = Oracle::new(&c.files).bytes(2);
    let point = name(&c.files[2]);
    let to = tempfile::tempdir().unwrap();
    let file = to.path().join("device");
    std::fs::write(&file, vec![0xaa; 72 * MIB as usize]).unwrap();
    let guard = Guard::attach("", &file);
    let device = guard.made();
    let dir = s(dir.path());
    let text = fails(&["restore", dir, point, s(device)], 2);
    assert!(text.contains("--yes"), "{text}");
    for extra in [&[] as &[&str], &["--discard"]] {
        run("dd", &["if=/dev/zero", &format!("of={}", s(device)), "bs=1M", "count=72"]);
        run("sh", &["-c", &format!("tr '\\0' '\\252' </dev/zero | head -c 72M >{}", s(device))]);
        let mut args = vec!["restore", "--yes", "--verify", dir, point, s(device)];
        args.extend(extra);
        ok(&args);
        let got = std::fs::read(device).unwrap();
        assert_eq!(first_difference(&got[..want.len()], &want), None, "{extra:?}");
    }
    let small = to.path().join("small");
    std::fs::write(&small, vec![0; MIB as usize]).unwrap();
    let small = Guard::attach("", &small);
    fails(&["restore", "--yes", dir, point, s(small.made())], 7);
    // In use: never.
    run("mkfs.ext4", &["-q", s(device)]);
    let mount = to.path().join("mnt");
    std::fs::create_dir(&mount).unwrap();
    let _mount = Guard::mount("", device, &mount);
    fails(&["restore", "--yes", dir, point, s(device)], 6);
}

#[test]
fn on_one_xfs_ranges_are_cloned() {
    let test = "on_one_xfs_ranges_are_cloned";
    if !have(test, &["qemu-img", "qemu-io", "mkfs.xfs", "losetup"]) || !is_root(test) {
        return;
    }
    let to = tempfile::tempdir().unwrap();
    let file = to.path().join("xfs");
    std::fs::File::create(&file).unwrap().set_len(600 * MIB).unwrap();
    run("mkfs.xfs", &["-q", "-m", "reflink=1", s(&file)]);
    let mount = to.path().join("mnt");
    std::fs::create_dir(&mount).unwrap();
    let _guard = Guard::mount("-o loop", &file, &mount);
    let backups = mount.join("b");
    // Clusters below the file system's block size may be at any place within a block.
    let kinds =
        [("p", "", 20 * MIB), ("q", "cluster_size=4k", 20 * MIB), ("r", "cluster_size=1k", MIB)];
    for (disk, options, least) in kinds {
        let mut c = chain(&backups, disk, &[40 * MIB + 512], &[options], 3);
        c.point(options, 40 * MIB + 512, &["write -P 3 1M 24M".into()]);
        let last = c.files.last().unwrap();
        let want = Oracle::new(&c.files).bytes(3);
        for target in ["r.raw", "r.qcow2"] {
            let target = mount.join(target);
            let args =
                ["restore", "--json", "--verify", "--force", s(&backups), name(last), s(&target)];
            let out = ok(&args);
            let said: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
            assert!(said["result"]["cloned"].as_u64().unwrap() >= least, "{disk}: {said}");
            let raw = to.path().join("raw");
            run("qemu-img", &["convert", "-O", "raw", s(&target), s(&raw)]);
            assert_eq!(first_difference(&std::fs::read(&raw).unwrap(), &want), None, "{disk}");
            if name(&target) == "r.qcow2" {
                run("qemu-img", &["check", "-q", s(&target)]);
            }
        }
    }
    // Elsewhere it cannot: said if it was insisted on.
    let other = to.path().join("r.raw");
    let last = chain(&backups, "z", &[4 * MIB], &[""], 1).files.pop().unwrap();
    fails(&["restore", "--reflink", "always", s(&backups), name(&last), s(&other)], 11);
    assert!(!other.exists());
}

/// How many random moments are tried; FLEECEFS_KILLS sets another number.
fn rounds() -> usize {
    std::env::var("FLEECEFS_KILLS").map_or(5, |n| n.parse().unwrap())
}

/// Whether a process has a file open that is, or was, in `folder`.
fn has_open(pid: u32, folder: &Path) -> bool {
    let folder = folder.canonicalize().unwrap();
    let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    fds.filter_map(|fd| std::fs::read_link(fd.path()).ok())
        .any(|file| file != folder && file.starts_with(&folder))
}

#[test]
fn what_a_killed_restore_of_an_earlier_version_left_goes() {
    let test = "what_a_killed_restore_of_an_earlier_version_left_goes";
    if !have(test, &TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut c = Chain::new(dir.path(), "sda");
    let f = c.point("", MIB, &["write -P 1 0 64k".into()]);
    let to = tempfile::tempdir().unwrap();
    let left = to.path().join(".r.raw.fleecefs-partial");
    std::fs::write(&left, [1; 5000]).unwrap();
    let target = to.path().join("r.raw");
    let out = ok(&["restore", s(dir.path()), name(&f), s(&target)]);
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(said.contains("left by an earlier run") && !left.exists(), "{said}");
    run("qemu-img", &["compare", "-q", "-F", "qcow2", s(&target), s(&f)]);
}

#[test]
fn killed_and_interrupted_restores_leave_nothing_under_the_name() {
    let test = "killed_and_interrupted_restores_leave_nothing_under_the_name";
    if !have(test, &TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut c = Chain::new(dir.path(), "sda");
    let f = c.point("", 64 * MIB, &["write -P 1 0 64M".into()]);
    let to = tempfile::tempdir().unwrap();
    let mut rng = Rng(5);
    let signals = ["-KILL", "-TERM", "-INT", "-KILL", "-KILL"];
    for (i, signal) in signals.iter().cycle().take(rounds()).enumerate() {
        for target in ["r.raw", "r.qcow2"] {
            let target = to.path().join(target);
            let args = ["restore", "--rate-limit", "8M", s(dir.path()), name(&f), s(&target)];
            let mut child =
                Command::new(env!("CARGO_BIN_EXE_fleecefs")).args(args).spawn().unwrap();
            // Some time after the file is open: the rate limit leaves seconds.
            while !has_open(child.id(), to.path()) {
                assert!(child.try_wait().unwrap().is_none(), "ended early");
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            std::thread::sleep(std::time::Duration::from_millis(rng.below(1000)));
            run("kill", &[signal, &child.id().to_string()]);
            let status = child.wait().unwrap();
            assert!(!target.exists(), "{i}: {status}");
            if *signal != "-KILL" {
                assert_eq!(status.code(), Some(130), "{i}");
                assert_eq!(std::fs::read_dir(to.path()).unwrap().count(), 0, "{i}");
                continue;
            }
            // Where the file system can, the file had no name, and nothing is left.
            let left = std::fs::read_dir(to.path()).unwrap();
            let left: u64 = left.map(|e| e.unwrap().metadata().unwrap().len()).sum();
            let out = ok(&["restore", s(dir.path()), name(&f), s(&target)]);
            let told = String::from_utf8_lossy(&out.stderr).contains("earlier run");
            assert_eq!(told, left > 0, "{i}");
            run("qemu-img", &["compare", "-q", "-F", "qcow2", s(&target), s(&f)]);
            std::fs::remove_file(&target).unwrap();
            assert_eq!(std::fs::read_dir(to.path()).unwrap().count(), 0, "{i}");
        }
    }
}

#[test]
fn a_full_disk_leaves_nothing() {
    let test = "a_full_disk_leaves_nothing";
    if !have(test, &TOOLS) || !is_root(test) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut c = Chain::new(dir.path(), "sda");
    let f = c.point("", 32 * MIB, &["write -P 1 0 32M".into()]);
    let to = tempfile::tempdir().unwrap();
    let _guard = Guard::tmpfs("16M", to.path());
    let mut rng = Rng(11);
    // The disk is full at another moment each time; the last is that of the part below.
    let sizes = (1..rounds()).map(|_| 4 + rng.below(32 * MIB / 4096 - 8)).chain([4096]);
    for pages in sizes {
        run("mount", &["-o", &format!("remount,size={}", pages * 4096), s(to.path())]);
        for extra in
            [&["r.raw"] as &[&str], &["r.qcow2"], &["p.qcow2", "--preallocation", "falloc"]]
        {
            let target = to.path().join(extra[0]);
            let mut args = vec!["restore", s(dir.path()), name(&f), s(&target)];
            args.extend(&extra[1..]);
            fails(&args, 7);
            assert_eq!(std::fs::read_dir(to.path()).unwrap().count(), 0, "{pages} pages");
        }
    }
    // With --force, the old target outlives a failure.
    let target = to.path().join("r.raw");
    std::fs::write(&target, b"old").unwrap();
    fails(&["restore", "--force", s(dir.path()), name(&f), s(&target)], 7);
    assert_eq!(std::fs::read(&target).unwrap(), b"old");
}
