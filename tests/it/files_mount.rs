//! Files of points in the mount: what is seen there is what the kernel shows of the same file system, to whoever may
//! see it.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use crate::support::file_systems::{
    Image, Listing, Points, TOOLS, fill, fill_unix, said, set_xattr, shell,
};
use crate::support::mount::Mount;
use crate::support::process::{Stopped, eventually, server_pid, state, status};
use crate::support::tools::{have, is_root, run};

/// Attributes that are shown in the mount.
const SHOWN: [&str; 2] = ["user.", "system."];
const EXT4: [&str; 5] = ["mke2fs", "-q", "-F", "-t", "ext4"];

fn ready(test: &str) -> bool {
    have(test, &[TOOLS.as_slice(), &["mkfs.ext4", "/dev/fuse"]].concat()) && is_root(test)
}

/// An image with one of everything.
fn filled(mkfs: &[&str]) -> Image {
    let image = Image::new(96 << 20, mkfs);
    let mounted = image.mount("");
    fill(&image.mnt());
    fill_unix(&image.mnt());
    drop(mounted);
    image
}

fn sh(script: &str, paths: &[&Path]) -> Output {
    Command::new("sh").args(["-e", "-c", script, "sh"]).args(paths).output().unwrap()
}

#[track_caller]
fn must(script: &str, paths: &[&Path]) -> String {
    let out = sh(script, paths);
    assert!(
        out.status.success(),
        "{script}: {}{}",
        String::from_utf8_lossy(&out.stdout),
        said(&out)
    );
    String::from_utf8_lossy(&out.stdout).into_owned()
}

/// The folder of the newest point's only file system.
fn latest(mount: &Mount) -> PathBuf {
    mount.path().join("vda/latest.files/disk")
}

#[test]
fn files_in_the_mount_are_those_that_the_kernel_shows() {
    if !ready("files_in_the_mount_are_those_that_the_kernel_shows") {
        return;
    }
    for kind in [&[][..], &["-b", "1024", "-O", "inline_data,^64bit"]] {
        let image = filled(&[&EXT4, kind].concat());
        let mut points = Points::new();
        points.add(&image.path());
        let mount = Mount::with(points.dir.path(), &["--files"]);
        let (here, there) = (latest(&mount), image.mnt());
        let _mounted = image.mount("ro");
        let shown = Listing::of(&here, &SHOWN);
        Listing::of(&there, &SHOWN).assert_same(&shown, &format!("{kind:?}"));
        // Numbers stay.
        let numbers = "find \"$1\" -printf '%p %i %n\\n' | sort | sha256sum";
        let before = must(numbers, &[&here]);
        must("echo 2 > /proc/sys/vm/drop_caches", &[]);
        assert_eq!(must(numbers, &[&here]), before);
        compare_with_tools(&here, &there);
    }
}

/// What people compare and copy with finds no difference either.
fn compare_with_tools(here: &Path, there: &Path) {
    let special = "-x pipe -x block -x char";
    must(&format!("diff -r --no-dereference {special} \"$1\" \"$2\""), &[here, there]);
    // Names of its own have the number of its process in them, so that holes are compared below.
    let tar = "cd \"$1\" && tar --sort=name --xattrs --xattrs-include='user.*' --acls --numeric-owner \
        --pax-option=exthdr.name=%d/x/%f -cf - . | sha256sum";
    assert_eq!(must(tar, &[here]), must(tar, &[there]));
    let find = "cd \"$1\" && find . -printf '%p %y %s %m %U %G %n %T@ %l\\n' | sort";
    assert_eq!(must(find, &[here]), must(find, &[there]));
    let grep = "cd \"$1\" && grep -rac -D skip e . | sort | sha256sum";
    assert_eq!(must(grep, &[here]), must(grep, &[there]));
    for file in ["dir/sparse", "dir/holes", "dir/random"] {
        let blocks = |at: &Path| at.join(file).metadata().unwrap().blocks();
        assert_eq!(blocks(here), blocks(there), "{file}");
        assert_eq!(data_runs(&here.join(file)), data_runs(&there.join(file)), "{file}");
    }
    if have("rsync", &["rsync"]) {
        let dir = tempfile::tempdir().unwrap();
        must("rsync -aHX --checksum --filter='-x security.*' \"$1/\" \"$2\"", &[here, dir.path()]);
        let again = must("rsync -aHni --checksum --delete \"$1/\" \"$2\"", &[there, dir.path()]);
        assert_eq!(again, "");
    }
}

/// Where a file has data, as lseek says.
fn data_runs(path: &Path) -> Vec<(u64, u64)> {
    use rustix::fs::SeekFrom;
    let file = std::fs::File::open(path).unwrap();
    let (mut runs, mut at) = (Vec::new(), 0);
    while let Ok(start) = rustix::fs::seek(&file, SeekFrom::Data(at)) {
        at = rustix::fs::seek(&file, SeekFrom::Hole(start)).unwrap();
        runs.push((start, at));
    }
    runs
}

#[test]
fn nothing_of_it_is_there_unless_it_is_asked_for() {
    if !ready("nothing_of_it_is_there_unless_it_is_asked_for") {
        return;
    }
    let image = Image::new(16 << 20, &EXT4);
    let mut points = Points::new();
    points.add(&image.path());
    let mount = Mount::new(points.dir.path());
    assert_eq!(must("find \"$1\" -name '*.files*'", &[mount.path()]), "");
    drop(mount);
    let mount = Mount::with(points.dir.path(), &["-o", "files,squash"]);
    let names = must("cd \"$1\" && find . ! -path '*.files/disk/*' | sort", &[mount.path()]);
    let point = format!("{}.files", points_file(&points));
    for name in [
        format!("./vda/{point}"),
        format!("./vda/{point}/disk"),
        "./vda/latest.files".into(),
        "./vda/by-time".into(),
    ] {
        assert!(names.lines().any(|l| l == name), "{name}: {names}");
    }
    let by_time = must("ls -d \"$1\"/vda/by-time/*.files/disk/lost+found", &[mount.path()]);
    assert_eq!(by_time.lines().count(), 1, "{by_time}");
}

/// The name of the only image.
fn points_file(points: &Points) -> String {
    let names = std::fs::read_dir(points.dir.path().join("vda")).unwrap();
    let mut names = names.map(|e| e.unwrap().file_name().into_string().unwrap());
    names.find(|n| n.starts_with("FULL")).unwrap()
}

#[test]
fn partitions_have_folders_of_their_names() {
    let name = "partitions_have_folders_of_their_names";
    if !ready(name) || !have(name, &["sfdisk"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    std::fs::File::create(&disk).unwrap().set_len(80 << 20).unwrap();
    must(
        "printf 'label: gpt\\nstart=2048, size=40960\\nstart=43008, size=8192\\nstart=51200, size=40960\\n' | sfdisk -q \"$1\"",
        &[&disk],
    );
    for (sector, number) in [(2048, 1), (51200, 3)] {
        let files = dir.path().join(format!("files{number}"));
        std::fs::create_dir(&files).unwrap();
        std::fs::write(files.join("number"), format!("{number}\n")).unwrap();
        let offset = format!("offset={}", sector * 512);
        let (from, to) = (files.to_str().unwrap(), disk.to_str().unwrap());
        run("mkfs.ext4", &["-q", "-F", "-E", &offset, "-d", from, to, "20M"]);
    }
    let mut points = Points::new();
    points.add(&disk);
    let mount = Mount::with(points.dir.path(), &["--files"]);
    let shown = must("cd \"$1/vda/latest.files\" && cat */number && ls", &[mount.path()]);
    assert_eq!(shown, "1\n3\np1\np3\n");
}

#[test]
fn a_new_point_has_its_files_and_a_removed_one_is_read_on_by_who_has_it_open() {
    let name = "a_new_point_has_its_files_and_a_removed_one_is_read_on_by_who_has_it_open";
    if !ready(name) {
        return;
    }
    let image = filled(&EXT4);
    let mut points = Points::new();
    points.add(&image.path());
    let mount = Mount::with(points.dir.path(), &["--files"]);
    let first = points_file(&points);
    let random = latest(&mount).join("dir/random");
    let bytes = std::fs::read(&random).unwrap();
    let mounted = image.mount("");
    shell(&image.mnt(), "echo more > new; rm dir/random");
    drop(mounted);
    points.add(&image.path());
    eventually("the new point is there", || {
        latest(&mount).join("new").exists() && !latest(&mount).join("dir/random").exists()
    });
    let old = mount.path().join(format!("vda/{first}.files/disk/dir/random"));
    assert_eq!(std::fs::read(&old).unwrap(), bytes);
    let open = std::fs::File::open(&old).unwrap();
    // Longer than the files of a point are held for who may come back.
    let begun = std::time::Instant::now();
    eventually("nothing lingers", || begun.elapsed().as_millis() > 600);
    std::fs::remove_dir_all(points.dir.path().join("vda")).unwrap();
    eventually("the disk is gone", || !mount.path().join("vda").exists());
    must("echo 3 > /proc/sys/vm/drop_caches", &[]);
    let mut again = vec![0; bytes.len()];
    std::os::unix::fs::FileExt::read_exact_at(&open, &mut again, 0).unwrap();
    assert!(again == bytes);
    drop(open);
    eventually("nothing is held", || mount.open_files(points.dir.path()) == 0);
}

/// A mount of hostile file systems is walked through in time; its findings are there to be read, and it goes on.
pub(crate) fn survives(backups: &Path) {
    let mount = Mount::with(backups, &["--files", "--squash"]);
    let walk = "cd \"$1\" && for i in 1 2; do
        timeout 60 find vda/latest.files/ -type f -exec timeout 20 cat {} + > /dev/null 2>&1 || [ $? -lt 124 ]
        timeout 60 find vda/latest.files/ -printf '%l %s' > /dev/null 2>&1 || [ $? -lt 124 ]
        done; cat vda/latest.files/disk/good/file";
    assert_eq!(must(walk, &[mount.path()]), "1\n");
    let status = status(mount.path());
    assert!(status["findings"].is_array());
}

/// Runs a shell command as the user nobody.
fn as_nobody(command: &str) -> Output {
    let user = ["--reuid=65534", "--regid=65534", "--clear-groups", "sh", "-c", command];
    Command::new("setpriv").args(user).output().unwrap()
}

/// An access list as getxattr(2) gives it: tag, permissions and id of each entry.
fn access_list(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut list = 2u32.to_le_bytes().to_vec();
    for (tag, perm, id) in entries {
        list.extend(tag.to_le_bytes());
        list.extend(perm.to_le_bytes());
        list.extend(id.to_le_bytes());
    }
    list
}

#[test]
fn others_see_what_the_guest_lets_them_see() {
    let name = "others_see_what_the_guest_lets_them_see";
    if !ready(name) || !have(name, &["setpriv"]) {
        return;
    }
    const NONE: u32 = u32::MAX;
    let image = Image::new(16 << 20, &EXT4);
    let mounted = image.mount("");
    shell(
        &image.mnt(),
        "for f in own roots open given taken; do echo $f > $f; done; mkdir closed; echo x > closed/x; cp /bin/true set
         chown 65534:65534 own; chown 0:65534 taken given; chmod 600 own roots given; chmod 644 open
         chmod 640 taken; chmod 700 closed; chmod 4755 set",
    );
    // One that lets nobody in by name, and one whose group bits are but the mask over an entry that keeps him out.
    let given = [(1, 6, NONE), (2, 4, 65534), (4, 0, NONE), (0x10, 4, NONE), (0x20, 0, NONE)];
    let taken = [(1, 6, NONE), (2, 0, 65534), (4, 4, NONE), (0x10, 4, NONE), (0x20, 0, NONE)];
    for (file, list) in [("given", given), ("taken", taken)] {
        let list = access_list(&list);
        assert!(set_xattr(&image.mnt().join(file), "system.posix_acl_access", &list));
    }
    drop(mounted);
    let mut points = Points::new();
    points.add(&image.path());
    let reads = |mount: &Mount| -> Vec<&str> {
        // The directory that holds the mount point is private, too.
        let parent = mount.path().parent().unwrap();
        std::fs::set_permissions(parent, std::os::unix::fs::PermissionsExt::from_mode(0o1777))
            .unwrap();
        let at = latest(mount);
        let can = |f: &&str| as_nobody(&format!("cat '{}/{f}'", at.display())).status.success();
        ["own", "roots", "open", "given", "taken", "closed/x"].into_iter().filter(can).collect()
    };
    let all = ["own", "roots", "open", "given", "taken", "closed/x"];
    let open = Mount::with(points.dir.path(), &["--files", "--allow-other", "--mode=0444"]);
    assert_eq!(reads(&open), ["own", "open", "given"]);
    drop(open);
    // The folder itself is the mount's, and private as points are.
    assert!(reads(&Mount::with(points.dir.path(), &["--files", "--allow-other"])).is_empty());
    assert!(reads(&Mount::with(points.dir.path(), &["--files"])).is_empty());
    let squash = ["--files", "--squash", "--allow-other", "--uid=65534"];
    let squashed = Mount::with(points.dir.path(), &squash);
    assert_eq!(reads(&squashed), all);
    let mode = |file: &str| {
        let meta = latest(&squashed).join(file).metadata().unwrap();
        (meta.uid(), meta.mode() & 0o7777)
    };
    assert_eq!(mode("roots"), (65534, 0o600));
    assert_eq!(mode("set"), (65534, 0o755));
    assert_eq!(mode("closed"), (65534, 0o700));
    drop(squashed);
    let out = Command::new(env!("CARGO_BIN_EXE_fleecefs"))
        .args(["mount", "--squash"])
        .args([points.dir.path(), points.dir.path()])
        .output()
        .unwrap();
    assert_eq!(out.status.code(), Some(2), "{}", said(&out));
}

/// A backup directory with so many raw disks `vm{i}`, all with the file system of `image`.
fn copies(image: &Path, count: usize) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for i in 0..count {
        let disk = dir.path().join(format!("vm{i}"));
        std::fs::create_dir(&disk).unwrap();
        let to = disk.join("FULL-1-a");
        run("cp", &["--sparse=always", image.to_str().unwrap(), to.to_str().unwrap()]);
    }
    dir
}

/// A small file system with a file, in which the guest's kernel has noted errors.
fn small() -> Image {
    let image = Image::new(1 << 20, &["mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal"]);
    let file = image.dir.path().join("file");
    std::fs::write(&file, "contents\n").unwrap();
    let path = image.path();
    for command in [format!("write {} file", file.display()), "ssv state 2".into()] {
        run("debugfs", &["-w", "-R", &command, path.to_str().unwrap()]);
    }
    image
}

#[test]
fn a_thousand_points_are_walked_with_few_descriptors_and_findings_are_told_once() {
    let name = "a_thousand_points_are_walked_with_few_descriptors_and_findings_are_told_once";
    if !ready(name) || !have(name, &["debugfs"]) {
        return;
    }
    let dir = copies(&small().path(), 1000);
    let logs = tempfile::tempdir().unwrap();
    let log = logs.path().join("log");
    let options = format!("--files --cache-size=16M --log-file={}", log.display());
    let (mount, _) = Mount::limited(dir.path(), 256, &options);
    // To look at the disks opens none of them.
    must("cd \"$1\" && ls -l . by-time > /dev/null", &[&mount.path().join("vm7")]);
    assert_eq!(mount.open_files(dir.path()), 0);
    let walk = "cd \"$1\" && find . -path '*/FULL*.files/disk/*' -type f -printf '%i ' -exec cat {} + | sha256sum";
    let begun = must(walk, &[mount.path()]);
    assert!(mount.open_files(dir.path()) < 256);
    must("echo 3 > /proc/sys/vm/drop_caches", &[]);
    assert_eq!(must(walk, &[mount.path()]), begun, "opened again, all have the same numbers");
    eventually("that nothing is held", || mount.open_files(dir.path()) == 0);
    let findings = status(mount.path())["findings"].as_array().unwrap().clone();
    assert_eq!(findings.len(), 1000);
    let told = "the guest's kernel noted errors";
    assert!(findings.iter().all(|f| f["message"].as_str().unwrap().contains(told)));
    let log = std::fs::read_to_string(&log).unwrap();
    assert_eq!(log.lines().filter(|l| l.contains(told)).count(), 1000, "{log:.2000}");
}

#[test]
fn a_folder_of_a_hundred_thousand_names_takes_little_memory() {
    let name = "a_folder_of_a_hundred_thousand_names_takes_little_memory";
    if !ready(name) {
        return;
    }
    let image = Image::new(128 << 20, &[&EXT4, &["-N", "110000"][..]].concat());
    let mounted = image.mount("");
    shell(
        &image.mnt(),
        "mkdir many; cd many; seq -f 'a-name-that-is-not-so-short-%.0f' 100000 | xargs touch",
    );
    drop(mounted);
    let mut points = Points::new();
    points.add(&image.path());
    let mount = Mount::with(points.dir.path(), &["--files", "--cache-size=8M"]);
    let count = "cd \"$1\" && ls -f many | wc -l && ls -f many | sort -u | wc -l";
    assert_eq!(must(count, &[&latest(&mount)]), "100002\n100002\n");
    let pid = server_pid(mount.path());
    let peak = |pid: i32| -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = text.lines().find(|l| l.starts_with("VmHWM")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    assert!(peak(pid) < 48 << 10, "{} KiB", peak(pid));
    // Each of these is looked for by its name, and the folder is not read from its start for each; what the kernel
    // knows of, we have to know, too.
    let find = "find \"$1/many\" -name '*7' -size 0 | wc -l";
    assert_eq!(must(find, &[&latest(&mount)]), "10000\n");
    assert!(peak(pid) < 128 << 10, "{} KiB", peak(pid));
}

/// Processes that are killed when the test is over.
struct Killed(Vec<Child>);

impl Drop for Killed {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[test]
fn names_of_points_answer_while_storage_does_not() {
    let name = "names_of_points_answer_while_storage_does_not";
    if !ready(name) || !have(name, &["timeout", "debugfs"]) {
        return;
    }
    let disks = 12;
    let dir = copies(&small().path(), disks);
    // Storage that can be stopped: a mount of ours, whose points are raw backups themselves.
    let storage = Mount::new(dir.path());
    let mount = Mount::with(storage.path(), &["--threads=2", "--files"]);
    let at = |i: usize| mount.path().join(format!("vm{i}/latest.files"));
    let mut walks = Killed(Vec::new());
    let stopped = Stopped::new(server_pid(storage.path()));
    for i in 1..disks {
        let mut walk = Command::new("find");
        walks.0.push(walk.arg(at(i).join("disk")).stdout(Stdio::null()).spawn().unwrap());
    }
    let waits = |c: &Child| {
        let call = std::fs::read_to_string(format!("/proc/{}/syscall", c.id()));
        matches!(state(Path::new(&format!("/proc/{}", c.id()))), Some('S' | 'D'))
            && call.map_or(true, |text| !text.starts_with("running"))
    };
    eventually("that all wait", || walks.0.iter().all(waits));
    for command in [
        "timeout 60 ls \"$1\" \"$1/vm0\"",
        "timeout 60 ls -lL \"$1/vm0/latest.files/..\"",
        "timeout 60 ls -ld \"$1/vm1/latest.files/\"",
        "timeout 60 cat \"$1/.fleecefs/status.json\"",
    ] {
        must(command, &[mount.path()]);
    }
    drop(stopped);
    for walk in &mut walks.0 {
        assert!(walk.wait().unwrap().success());
    }
    walks.0.clear();
    assert_eq!(must("cat \"$1/disk/file\"", &[&at(0)]), "contents\n");
}

#[test]
fn what_cannot_be_read_says_why() {
    let name = "what_cannot_be_read_says_why";
    if !ready(name) || !have(name, &["debugfs", "sfdisk"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (disk, fs) = (dir.path().join("disk"), dir.path().join("fs"));
    std::fs::File::create(&disk).unwrap().set_len(64 << 20).unwrap();
    let table = "printf 'label: gpt\\nstart=2048, size=32768\\nstart=34816, size=32768\\nstart=67584, size=32768\\n' \
        | sfdisk -q \"$1\"";
    must(table, &[&disk]);
    let make = |commands: &[&str]| {
        let _ = std::fs::remove_file(&fs);
        run("mke2fs", &["-q", "-F", "-t", "ext4", "-O", "encrypt", fs.to_str().unwrap(), "16M"]);
        for command in commands {
            run("debugfs", &["-w", "-R", command, fs.to_str().unwrap()]);
        }
        std::fs::read(&fs).unwrap()
    };
    let put = |bytes: &[u8], sector: u64| {
        let file = std::fs::File::options().write(true).open(&disk).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, bytes, sector * 512).unwrap();
    };
    // 0x80000 for extents, 0x800 for encrypted; an incompatible feature that nobody has; LUKS.
    put(&make(&["mkdir secret", "sif secret flags 0x80800", "mkdir good"]), 2048);
    put(&make(&["ssv feature_incompat 0x800002c2"]), 34816);
    put(b"LUKS\xba\xbe\0\x02", 67584);
    let mut points = Points::new();
    points.add(&disk);
    let mount = Mount::with(points.dir.path(), &["--files"]);
    let at = mount.path().join("vda/latest.files");
    assert_eq!(must("ls \"$1/\"; ls \"$1/p1\"", &[&at]), "p1\np2\ngood\nlost+found\nsecret\n");
    let refused = std::fs::read_dir(at.join("p2")).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EOPNOTSUPP));
    let secret = sh("ls \"$1/p1/secret\"", &[&at]);
    assert!(said(&secret).contains("Required key not available"), "{}", said(&secret));
    let findings = status(mount.path())["findings"].to_string();
    for told in ["is an encrypted folder", "unsupported file system feature", "LUKS2", "cryptsetup"]
    {
        assert!(findings.contains(told), "{told}: {findings}");
    }
}
