//! Files out of points: what `files` copies of ext2, ext3 and ext4 is what the kernel shows of them, also where the
//! journal was not worked off; and what a hostile guest has made of its file system neither leads out of the target
//! nor ends in a hang.

use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::support::file_systems::{
    self, Image, Listing, Points, TOOLS, fill, fill_unix, mount, patch, said, shell,
};
use crate::support::guard::Guard;
use crate::support::tools::{have, is_root, run};
use serde_json::Value;

/// All attributes: copied with `--preserve=all`.
const ALL: [&str; 4] = ["user.", "security.", "trusted.", "system."];

fn ready(test: &str) -> bool {
    let more = ["mkfs.ext4", "debugfs", "dumpe2fs"];
    have(test, &[TOOLS.as_slice(), &more].concat()) && is_root(test)
}

/// What mkfs is asked for.
const KINDS: [&[&str]; 9] = [
    &["mke2fs", "-q", "-F", "-t", "ext2"],
    &["mke2fs", "-q", "-F", "-t", "ext2", "-I", "128", "-b", "1024"],
    &["mke2fs", "-q", "-F", "-t", "ext3", "-b", "1024"],
    &["mke2fs", "-q", "-F", "-t", "ext4"],
    &["mke2fs", "-q", "-F", "-t", "ext4", "-b", "1024", "-O", "^64bit,uninit_bg,^metadata_csum"],
    &["mke2fs", "-q", "-F", "-t", "ext4", "-O", "bigalloc,^resize_inode", "-C", "65536"],
    &["mke2fs", "-q", "-F", "-t", "ext4", "-O", "inline_data,metadata_csum_seed,orphan_file"],
    &[
        "mke2fs",
        "-q",
        "-F",
        "-t",
        "ext4",
        "-O",
        "ea_inode,large_dir,meta_bg,^resize_inode",
        "-b",
        "1024",
    ],
    &["mke2fs", "-q", "-F", "-t", "ext4", "-O", "^filetype,^metadata_csum,sparse_super2"],
];

#[test]
fn all_of_ext_is_copied_as_the_kernel_shows_it() {
    if !ready("all_of_ext_is_copied_as_the_kernel_shows_it") {
        return;
    }
    let mut seen = 0;
    for kind in KINDS {
        let image = Image::new(96 << 20, kind);
        let Some(mounted) = image.try_mount("") else { continue };
        fill(&image.mnt());
        fill_unix(&image.mnt());
        drop(mounted);
        let mut points = Points::new();
        points.add(&image.path());
        let full = Listing::of(points.copied("vda/latest").path(), &ALL);
        let mounted = image.mount("ro");
        Listing::of(&image.mnt(), &ALL).assert_same(&full, &format!("{kind:?}, FULL"));
        drop(mounted);
        let mounted = image.mount("");
        shell(
            &image.mnt(),
            "rm -r many; mv dir/hello dir/sub/renamed; head -c 70000 /dev/urandom >> dir/tiny; \
             truncate -s 1000 dir/random; mkdir new; i=0; while [ $i -lt 300 ]; do echo $i > new/$i; i=$((i + 1)); done",
        );
        drop(mounted);
        points.add(&image.path());
        let copied = points.copied("vda/latest");
        let _mounted = image.mount("ro");
        let kernel = Listing::of(&image.mnt(), &ALL);
        kernel.assert_same(&Listing::of(copied.path(), &ALL), &format!("{kind:?}, INC"));
        // Holes stay holes.
        let blocks = |dir: &Path, f: &str| dir.join(f).metadata().unwrap().blocks() * 512;
        assert!(blocks(copied.path(), "dir/sparse") < 1 << 20, "{kind:?}");
        // The point before is what it was.
        let first = format!("vda/{}", name_of(&points, "FULL"));
        full.assert_same(&Listing::of(points.copied(&first).path(), &ALL), "FULL again");
        seen += 1;
    }
    assert!(seen >= 6, "{seen} kinds could be mounted");
}

/// An ext4 with files of all kinds, mounted.
fn filled() -> (Image, Guard) {
    let image = Image::new(64 << 20, KINDS[3]);
    let mounted = image.mount("");
    fill(&image.mnt());
    fill_unix(&image.mnt());
    (image, mounted)
}

/// The file name of a point.
fn name_of(points: &Points, level: &str) -> String {
    let names = std::fs::read_dir(points.dir.path().join("vda")).unwrap();
    let mut names = names.map(|e| e.unwrap().file_name().into_string().unwrap());
    names.find(|n| n.starts_with(level)).unwrap()
}

#[test]
fn usually_nothing_is_copied_that_a_kernel_obeys() {
    if !ready("usually_nothing_is_copied_that_a_kernel_obeys") {
        return;
    }
    let (image, mounted) = filled();
    drop(mounted);
    let mut points = Points::new();
    points.add(&image.path());
    let out = tempfile::tempdir().unwrap();
    let target = out.path().join("copy");
    points.printed(&["cp"], "vda/latest:disk/dir", &[target.to_str().unwrap()]);
    let random = target.join("random").metadata().unwrap();
    assert_eq!((random.mode() & 0o7777, random.uid(), random.gid()), (0o751, 1000, 70000));
    assert!(!target.join("block").exists() && !target.join("char").exists());
    let all = Listing::of(&target, &ALL);
    assert!(all.0.values().all(|l| !l.contains("security.") && !l.contains("trusted.")));
    assert!(all.0[Path::new("hello")].contains("user.comment"));
    assert!(all.0[Path::new("inline")].contains("system.posix_acl_access"));
    assert_eq!(std::fs::read_link(target.join("out")).unwrap(), Path::new("../../../etc/passwd"));
    // Nothing is replaced.
    let again = points.files(
        &["cp"],
        "vda/latest:disk/dir/tiny",
        &[out.path().join("copy/tiny").to_str().unwrap()],
    );
    assert_eq!(again.status.code(), Some(4), "{}", said(&again));
    // tar(1) unpacks the same.
    let tar = points.files(&["cp", "--tar", "--preserve=all"], "vda/latest/dir", &[]);
    assert!(tar.status.success(), "{}", said(&tar));
    std::fs::write(out.path().join("a.tar"), &tar.stdout).unwrap();
    std::fs::create_dir(out.path().join("tar")).unwrap();
    let unpack = format!("{}/a.tar", out.path().display());
    let more = ["--xattrs", "--xattrs-include=*", "--same-owner", "-p"];
    run(
        "tar",
        &[&["-xf", &unpack, "-C", out.path().join("tar").to_str().unwrap()][..], &more].concat(),
    );
    let whole = out.path().join("whole");
    points.printed(&["cp", "--preserve=all"], "vda/latest/dir", &[whole.to_str().unwrap()]);
    let kept = ["user.", "security.", "trusted."];
    let without_links = |l: Listing| l;
    without_links(Listing::of(&whole, &kept))
        .assert_same(&Listing::of(&out.path().join("tar/dir"), &kept), "tar");
}

#[test]
fn files_are_listed_found_and_read() {
    if !ready("files_are_listed_found_and_read") {
        return;
    }
    let (image, mounted) = filled();
    shell(&image.mnt(), "ln -s /dir dir/sub/absolute; ln -s loop-a loop-b; ln -s loop-b loop-a");
    drop(mounted);
    let mut points = Points::new();
    points.add(&image.path());
    let root = points.printed(&["ls"], "vda/latest:disk", &[]);
    assert_eq!(root, "dir\nempty\nloop-a\nloop-b\nlost+found\nmany\n");
    let long = points.printed(&["ls", "-l"], "vda/latest/dir", &[]);
    let has = |text: &str| assert!(long.lines().any(|l| l.contains(text)), "{text}: {long}");
    has("-rwsr-x--x   1   1000  70000      3000000");
    has("short -> hello");
    has("  8, 1 ");
    has("n\\xff\\u{1}ame");
    let all: Vec<Value> = lines(&points.printed(&["ls", "-R", "--json"], "vda/latest", &[]));
    let hello = all.iter().find(|v| v["path"] == "dir/hello").unwrap();
    assert_eq!((hello["size"].as_u64(), hello["links"].as_u64()), (Some(6), Some(3)));
    assert_eq!(hello["mtime_utc"], "2031-01-01T00:00:00.123456789Z");
    // Links are followed inside the file system, and not round in a circle.
    assert_eq!(points.printed(&["cat"], "vda/latest:disk/dir/sub/absolute/short", &[]), "hello\n");
    assert_eq!(points.files(&["cat"], "vda/latest:disk/loop-a", &[]).status.code(), Some(2));
    assert_eq!(points.files(&["cat"], "vda/latest:disk/dir/out", &[]).status.code(), Some(3));
    assert_eq!(points.files(&["cat"], "vda/latest:disk/no/such", &[]).status.code(), Some(3));
    assert_eq!(points.files(&["ls"], "vda/latest:p3/x", &[]).status.code(), Some(3));
    let found = points.printed(&["find", "--name", "*hard", "--type", "file"], "vda/latest/", &[]);
    let mut found: Vec<&str> = found.lines().collect();
    found.sort();
    assert_eq!(found, ["dir/sub/hard", "many/hard"]);
    assert_eq!(points.printed(&["find", "--larger", "50M"], "vda/latest", &[]), "dir/sparse\n");
    let stat: Value =
        serde_json::from_str(&points.printed(&["stat", "--json"], "vda/latest/dir/hello", &[]))
            .unwrap();
    assert_eq!(stat["file_system"]["kind"], "ext4");
    large_attribute();
    assert!(stat["xattrs"].as_array().unwrap().iter().any(|x| x["name"] == "user.comment"));
}

/// Values that are in inodes of their own; few file systems could take a copy.
fn large_attribute() {
    let image = Image::new(16 << 20, KINDS[7]);
    let Some(mounted) = image.try_mount("") else { return };
    shell(&image.mnt(), "echo 1 > file");
    assert!(file_systems::set_xattr(&image.mnt().join("file"), "user.large", &[b'l'; 30_000]));
    drop(mounted);
    let mut points = Points::new();
    points.add(&image.path());
    let stat = points.printed(&["stat", "--json"], "vda/latest/file", &[]);
    let stat: Value = serde_json::from_str(&stat).unwrap();
    assert_eq!(stat["xattrs"][0]["value"], "l".repeat(30_000));
}

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

/// What a kernel shows of a copy of `image` after it has replayed the journal.
fn replayed(image: &Path) -> Listing {
    let dir = tempfile::tempdir().unwrap();
    let (copy, mnt) = (dir.path().join("copy"), dir.path().join("mnt"));
    std::fs::create_dir(&mnt).unwrap();
    run("cp", &["--sparse=always", image.to_str().unwrap(), copy.to_str().unwrap()]);
    // It writes what it replays.
    let _mounted = mount(&copy, &mnt, "").expect("the kernel replays it");
    Listing::of(&mnt, &ALL)
}

#[test]
fn a_journal_that_was_not_worked_off_is_replayed() {
    if !ready("a_journal_that_was_not_worked_off_is_replayed") {
        return;
    }
    let journals: [(&str, &str, &str); 4] = [
        ("ext4", "metadata_csum", ""),
        ("ext4", "^metadata_csum,^64bit", ""),
        ("ext4", "metadata_csum,64bit", "data=journal"),
        ("ext3", "^metadata_csum", "data=journal"),
    ];
    for (kind, features, options) in journals {
        let what = format!("{kind} {features} {options}");
        let mkfs = ["mke2fs", "-q", "-F", "-t", kind, "-O", features, "-b", "1024", "-J", "size=1"];
        let image = Image::new(16 << 20, &mkfs);
        let mounted = image.mount(options);
        let copy = dirty(&image);
        drop(mounted);
        let dump = run("dumpe2fs", &["-h", copy.to_str().unwrap()]);
        assert!(String::from_utf8_lossy(&dump.stdout).contains("needs_recovery"), "{what}");
        let stat =
            Command::new("debugfs").args(["-c", "-R", "stat /last"]).arg(&copy).output().unwrap();
        assert!(said(&stat).contains("not found"), "{what}: not only in the journal");
        compare(&copy, &what);
        // A transaction with a wrong checksum was not written as it should be. (Linux refuses to mount that.)
        let wrong = image.dir.path().join("wrong");
        run("cp", &[copy.to_str().unwrap(), wrong.to_str().unwrap()]);
        break_last_commit(&wrong, 56);
        // The last transaction without its end: it never was.
        break_last_commit(&copy, 0);
        let kernel = compare(&copy, &format!("{what}, cut"));
        if !features.starts_with('^') {
            let mut points = Points::new();
            points.add(&wrong);
            kernel.assert_same(&Listing::of(points.copied("vda/latest").path(), &ALL), &what);
            let told = said(&points.files(&["stat"], "vda/latest/", &[]));
            assert!(told.contains("bad checksum of a journal transaction"), "{told}");
        }
    }
}

/// Works on a mounted file system until its journal has gone around, and folders have become files: then what the
/// journal has of the folders is revoked. Gives a copy of the image as it is then.
fn dirty(image: &Image) -> std::path::PathBuf {
    for round in 0..8 {
        shell(
            &image.mnt(),
            &format!(
                "mkdir d{round}; i=0; while [ $i -lt 150 ]; do mkdir d{round}/$i; echo $i > d{round}/$i/f; \
                 i=$((i + 1)); done; sync d{round}/1/f; ln -s big{round} d{round}/link; sync d{round}"
            ),
        );
    }
    // All blocks that folders had are used by a file a moment later.
    shell(
        &image.mnt(),
        "head -c 20M /dev/urandom > most 2>/dev/null || true; truncate -s -200K most; sync most; mkdir gone; \
         i=0; while [ $i -lt 100 ]; do mkdir gone/$i; i=$((i + 1)); done; sync gone; rm -rf gone; sync .; \
         head -c 20M /dev/urandom > all 2>/dev/null || true; sync all; rm -rf d1; sync .",
    );
    // A block that looks like one of the journal's own is in it in another form.
    let magic = [0xc0, 0x3b, 0x39, 0x98, 0, 0, 0, 1].repeat(512);
    std::fs::write(image.mnt().join("magic"), magic).unwrap();
    shell(&image.mnt(), "sync magic; echo last > last; sync last");
    let copy = image.dir.path().join("dirty");
    run("cp", &["--sparse=always", image.path().to_str().unwrap(), copy.to_str().unwrap()]);
    copy
}

/// Compares what `files` and the kernel make of an image whose journal has to be replayed.
fn compare(image: &Path, what: &str) -> Listing {
    let mut points = Points::new();
    points.add(image);
    let ours = Listing::of(points.copied("vda/latest").path(), &ALL);
    let kernel = replayed(image);
    kernel.assert_same(&ours, what);
    kernel
}

/// Damages the commit block with the highest number, from byte `from` on.
fn break_last_commit(image: &Path, from: u64) {
    let file = std::fs::File::options().read(true).write(true).open(image).unwrap();
    let bytes = std::fs::read(image).unwrap();
    let commit = [0xc0, 0x3b, 0x39, 0x98, 0, 0, 0, 2];
    let blocks = bytes.chunks(1024).enumerate().filter(|(_, b)| b.starts_with(&commit));
    let last = blocks.max_by_key(|(_, b)| u32::from_be_bytes(b[8..12].try_into().unwrap()));
    let (number, _) = last.expect("there is a commit block");
    file.write_all_at(&[0; 4], number as u64 * 1024 + from).unwrap();
}

/// An image without checksums, so that it can be patched, with the files `abcde` in it.
fn soft() -> Image {
    let kind = [
        "mke2fs",
        "-q",
        "-F",
        "-t",
        "ext4",
        "-O",
        "^metadata_csum,^has_journal,^dir_index",
        "-b",
        "1024",
    ];
    let image = Image::new(16 << 20, &kind);
    let mounted = image.mount("");
    shell(
        &image.mnt(),
        "mkdir -p a/b/c good; echo 1 > good/file; echo 2 > abcde; echo 3 > a/vwxyz; echo 4 > a/b/klmno",
    );
    drop(mounted);
    image
}

fn debugfs(image: &Image, command: &str) {
    run("debugfs", &["-w", "-R", command, image.path().to_str().unwrap()]);
}

/// Runs a verb on a hostile image: it ends in time, with this code, and what is good is there.
fn survive(image: &Image, code: i32, finding: &str) {
    let mut points = Points::new();
    points.add(&image.path());
    let out = tempfile::tempdir().unwrap();
    let target = out.path().join("t");
    let begun = Instant::now();
    let copy = points.files(&["cp"], "vda/latest", &[target.to_str().unwrap()]);
    assert_eq!(copy.status.code(), Some(code), "{}", said(&copy));
    assert!(said(&copy).contains(finding), "{finding}: {}", said(&copy));
    assert_eq!(std::fs::read_to_string(target.join("good/file")).unwrap(), "1\n");
    let list = points.files(&["ls", "-lR"], "vda/latest", &[]);
    assert!(String::from_utf8_lossy(&list.stdout).contains("good/file"), "{}", said(&list));
    let mut inside: Vec<_> =
        std::fs::read_dir(out.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    inside.sort();
    assert_eq!(inside, ["t"], "nothing is written beside the target");
    crate::files_mount::survives(points.dir.path());
    assert!(begun.elapsed() < Duration::from_secs(60));
}

#[test]
fn names_that_cannot_be_are_left_out() {
    if !ready("names_that_cannot_be_are_left_out") {
        return;
    }
    let image = soft();
    for (from, to) in [(b"abcde", b"../xx"), (b"vwxyz", b"/etc/"), (b"klmno", b"a\0b/c")] {
        assert_eq!(patch(&image.path(), from, to), 1);
    }
    survive(&image, 0, "invalid entry skipped: '../xx'");
}

#[test]
fn a_name_that_is_there_twice_leads_no_write_elsewhere() {
    if !ready("a_name_that_is_there_twice_leads_no_write_elsewhere") {
        return;
    }
    let image = soft();
    let outside = tempfile::tempdir().unwrap();
    let mounted = image.mount("");
    // The link comes first; then a folder and a file of its name.
    let to = outside.path().display();
    shell(
        &image.mnt(),
        &format!("ln -s {to} linkA; mkdir linkB; echo evil > linkB/evil; echo x > linkC"),
    );
    drop(mounted);
    assert_eq!(patch(&image.path(), b"linkB", b"linkA"), 1);
    assert_eq!(patch(&image.path(), b"linkC", b"linkA"), 1);
    survive(&image, 16, "linkA");
    assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
}

#[test]
fn folders_inside_themselves_end() {
    if !ready("folders_inside_themselves_end") {
        return;
    }
    let image = soft();
    debugfs(&image, "link a /a/b/c/loop");
    debugfs(&image, "link / /a/root");
    survive(&image, 16, "directory loop: already visited");
}

#[test]
fn sizes_and_maps_that_lie_end() {
    if !ready("sizes_and_maps_that_lie_end") {
        return;
    }
    let image = soft();
    // An exabyte of nothing; a folder of terabytes; a map that leads out of the file system.
    debugfs(&image, "sif abcde size 0x1000000000000000");
    debugfs(&image, "sif a/b size 0xfffffc00");
    survive(&image, 16, "abcde");
    let image = soft();
    debugfs(&image, "sif abcde block[5] 0x7fffffff");
    survive(&image, 16, "has blocks beyond the end");
}

#[test]
fn encrypted_folders_are_named_as_such() {
    if !ready("encrypted_folders_are_named_as_such") {
        return;
    }
    let kind = ["mke2fs", "-q", "-F", "-t", "ext4", "-O", "encrypt"];
    let image = Image::new(16 << 20, &kind);
    let files = image.dir.path().join("files");
    std::fs::create_dir_all(files.join("good")).unwrap();
    std::fs::create_dir_all(files.join("secret")).unwrap();
    std::fs::write(files.join("good/file"), "1\n").unwrap();
    std::fs::write(files.join("secret/name"), "secret").unwrap();
    let path = image.path();
    run(kind[0], &[&kind[1..], &["-d", files.to_str().unwrap(), path.to_str().unwrap()]].concat());
    // 0x80000 for extents, 0x800 for encrypted.
    debugfs(&image, "sif secret flags 0x80800");
    debugfs(&image, "sif secret/name flags 0x80800");
    survive(&image, 16, "is an encrypted folder");
}

#[test]
fn wrong_checksums_cost_one_file() {
    if !ready("wrong_checksums_cost_one_file") {
        return;
    }
    let image = Image::new(16 << 20, &["mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096"]);
    let mounted = image.mount("");
    shell(&image.mnt(), "mkdir good dir; echo 1 > good/file; echo 2 > bad; echo 3 > dir/zyxwvu");
    let inode = image.mnt().join("bad").metadata().unwrap().ino();
    drop(mounted);
    let at = run("debugfs", &["-R", &format!("imap <{inode}>"), image.path().to_str().unwrap()]);
    let text = String::from_utf8_lossy(&at.stdout).into_owned();
    // `located at block N, offset 0xM`.
    let block: u64 =
        text.split("block ").last().unwrap().split(',').next().unwrap().parse().unwrap();
    let offset = text.split("offset 0x").nth(1).unwrap().trim();
    let place = block * 4096 + u64::from_str_radix(offset, 16).unwrap();
    let file = std::fs::File::options().write(true).open(image.path()).unwrap();
    // Its owner; and a name in a folder.
    file.write_all_at(&[7], place + 2).unwrap();
    drop(file);
    // In the folder, and in the journal.
    assert!(patch(&image.path(), b"zyxwvu", b"zyxwvv") >= 1);
    survive(&image, 16, &format!("bad checksum of inode {inode}"));
    survive(&image, 16, "bad checksum of a block of directory inode");
}
