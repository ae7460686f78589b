//! Files of points in the mount: what is seen there is what the kernel shows of the same file system, to whoever may
//! see it.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::support::file_systems::{Image, Listing, Points, TOOLS, fill, fill_unix, said, shell};
use crate::support::mount::Mount;
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
    crate::support::process::eventually("the new point is there", || {
        latest(&mount).join("new").exists() && !latest(&mount).join("dir/random").exists()
    });
    let old = mount.path().join(format!("vda/{first}.files/disk/dir/random"));
    assert_eq!(std::fs::read(&old).unwrap(), bytes);
    let open = std::fs::File::open(&old).unwrap();
    let folder = std::fs::File::open(old.parent().unwrap()).unwrap();
    std::fs::remove_dir_all(points.dir.path().join("vda")).unwrap();
    crate::support::process::eventually("the disk is gone", || !mount.path().join("vda").exists());
    must("echo 3 > /proc/sys/vm/drop_caches", &[]);
    let mut again = vec![0; bytes.len()];
    std::os::unix::fs::FileExt::read_exact_at(&open, &mut again, 0).unwrap();
    assert!(again == bytes);
    drop((open, folder));
}
