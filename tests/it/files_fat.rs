//! Files out of FAT and exFAT: what `files` copies is what mtools and exfat-fuse read there; damage costs the file
//! that it is in.

use std::collections::BTreeMap;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::support::file_systems::{Image, Points, patch, said, shell};
use crate::support::guard::Guard;
use crate::support::mutants;
use crate::support::tools::{have, is_root};

const TOOLS: [&str; 7] = ["qemu-img", "qemu-io", "sh", "mkfs.fat", "mcopy", "mdel", "mattrib"];
const EXFAT: [&str; 6] =
    ["qemu-img", "qemu-io", "mkfs.exfat", "mount.exfat-fuse", "/dev/fuse", "/dev/loop-control"];

/// What a folder has in it: kind, size, time and contents, by path.
fn plain(dir: &Path) -> BTreeMap<PathBuf, String> {
    let (mut all, mut todo) = (BTreeMap::new(), vec![PathBuf::new()]);
    while let Some(at) = todo.pop() {
        for entry in std::fs::read_dir(dir.join(&at)).unwrap() {
            let path = at.join(entry.unwrap().file_name());
            let meta = std::fs::symlink_metadata(dir.join(&path)).unwrap();
            let line = match meta.is_dir() {
                true => {
                    todo.push(path.clone());
                    "folder".to_string()
                }
                false => {
                    let hash = blake3::hash(&std::fs::read(dir.join(&path)).unwrap()).to_hex();
                    format!("{} {}.{:09} {hash}", meta.size(), meta.mtime(), meta.mtime_nsec())
                }
            };
            all.insert(path, line);
        }
    }
    all
}

fn assert_same(right: &BTreeMap<PathBuf, String>, found: &BTreeMap<PathBuf, String>, what: &str) {
    let differ: Vec<_> = right
        .iter()
        .filter(|(p, l)| found.get(*p) != Some(l))
        .map(|(p, l)| format!("{p:?}: {l}, but is {:?}", found.get(p)))
        .chain(found.keys().filter(|p| !right.contains_key(*p)).map(|p| format!("{p:?} is new")))
        .collect();
    assert!(
        differ.is_empty(),
        "{what}: {} differ: {:#?}",
        differ.len(),
        &differ[..differ.len().min(10)]
    );
    assert!(right.len() > 5, "{what}: {}", right.len());
}

/// Runs one of mtools on an image, in UTC.
fn mtools(image: &Image, tool: &str, args: &[&str]) {
    let mut command = Command::new(tool);
    command.env("TZ", "UTC").env("LC_ALL", "C.UTF-8").env("MTOOLS_SKIP_CHECK", "1");
    let out = command.args(["-i", image.path().to_str().unwrap()]).args(args).output().unwrap();
    assert!(out.status.success(), "{tool} {args:?}: {}", said(&out));
}

/// Everything below `from`, into the root of the image.
fn put(image: &Image, from: &Path) {
    let mut names: Vec<_> = std::fs::read_dir(from).unwrap().map(|e| e.unwrap().path()).collect();
    names.sort();
    let names: Vec<&str> = names.iter().map(|p| p.to_str().unwrap()).collect();
    mtools(image, "mcopy", &[&["-s", "-m", "-Q"], names.as_slice(), &["::/"]].concat());
}

/// What mtools read of an image.
fn got(image: &Image) -> BTreeMap<PathBuf, String> {
    let out = tempfile::tempdir().unwrap();
    mtools(image, "mcopy", &["-s", "-m", "-Q", "-n", "::/*", out.path().to_str().unwrap()]);
    plain(out.path())
}

/// Files with names of all kinds.
fn sources(dir: &Path) {
    shell(
        dir,
        r#"
        mkdir -p dir/sub/deeper many "A folder with a long name" empty
        echo hello > dir/hello; echo upper > UPPER.TXT; echo lower > lower.txt; echo mixed > MiXed.Txt
        printf x > "a name that is too long for eight and three.text"
        printf x > 'dir/äöü — Ελληνικά.txt'; printf é > dir/É.TXT
        printf y > "$(printf 'n%0200d' 7)"
        head -c 900000 /dev/urandom > dir/random; head -c 70000 /dev/urandom > dir/sub/deeper/more
        : > dir/nothing
        i=0; while [ $i -lt 200 ]; do echo $i > many/a-name-that-is-not-so-short-$i; i=$((i + 1)); done
        find . -exec touch -d '2031-01-01 00:00:02Z' {} +
        touch -d '1999-12-31 23:59:58Z' dir/hello; touch -d '2024-02-29 12:00:00Z' dir/random
        "#,
    );
}

/// What mkfs.fat is asked for, and the size of the image in MiB.
const KINDS: [(&str, u64, &[&str]); 5] = [
    ("fat12", 8, &["mkfs.fat", "-F", "12", "-n", "TWELVE", "-i", "12345678"]),
    ("fat16", 40, &["mkfs.fat", "-F", "16"]),
    ("fat16", 60, &["mkfs.fat", "-F", "16", "-S", "4096", "-s", "1", "-f", "1"]),
    ("fat32", 70, &["mkfs.fat", "-F", "32", "-s", "1"]),
    ("fat32", 600, &["mkfs.fat", "-F", "32", "-s", "16", "-n", "some label"]),
];

#[test]
fn all_of_fat_is_copied_as_mtools_read_it() {
    if !have("all_of_fat_is_copied_as_mtools_read_it", &TOOLS) {
        return;
    }
    let from = tempfile::tempdir().unwrap();
    sources(from.path());
    for (kind, size, mkfs) in KINDS {
        let image = Image::new(size << 20, mkfs);
        put(&image, from.path());
        let mut points = Points::new();
        points.add(&image.path());
        let full = got(&image);
        assert_same(&plain(from.path()), &full, "mtools");
        let copied = points.copied("vda/latest");
        assert_same(&full, &plain(copied.path()), &format!("{mkfs:?}, FULL"));
        // In pieces: into the gaps that were deleted.
        let odd: Vec<String> =
            (0..100).map(|i| format!("::/many/a-name-that-is-not-so-short-{}", 2 * i)).collect();
        mtools(&image, "mdel", &odd.iter().map(String::as_str).collect::<Vec<_>>());
        let more = tempfile::tempdir().unwrap();
        shell(
            more.path(),
            "head -c 400000 /dev/urandom > pieces; touch -d '2030-05-05 05:05:06Z' pieces; printf r > ro.bin",
        );
        put(&image, more.path());
        mtools(&image, "mattrib", &["+r", "+h", "+s", "::/ro.bin"]);
        points.add(&image.path());
        let copied = points.copied("vda/latest");
        assert_same(&got(&image), &plain(copied.path()), &format!("{mkfs:?}, INC"));
        facts(&points, kind, mkfs.contains(&"TWELVE"));
        assert!(mutants::folders_go_on(&image.path()) > 100);
    }
}

/// What is shown beside contents.
fn facts(points: &Points, kind: &str, named: bool) {
    let stat = |path: &str| -> Value {
        serde_json::from_str(&points.printed(&["stat", "--json"], path, &[])).unwrap()
    };
    let read_only = stat("vda/latest/RO.BIN");
    assert_eq!(read_only["entry"]["mode"], "0444");
    assert_eq!(read_only["entry"]["flags"].to_string(), r#"["read-only","hidden","system"]"#);
    let system = &read_only["file_system"];
    assert_eq!(system["kind"], kind);
    if named {
        assert_eq!(
            (system["label"].as_str(), system["uuid"].as_str()),
            (Some("TWELVE"), Some("1234-5678"))
        );
    }
    assert!(system["free"].as_u64().unwrap() > 100_000, "{system}");
    assert_eq!(read_only["findings"].to_string(), "[]");
    // Case is not told, and the short name does as well.
    for path in ["DIR/HELLO", "dir/hello", "Dir/heLLo"] {
        assert_eq!(points.printed(&["cat"], &format!("vda/latest/{path}"), &[]), "hello\n");
    }
    assert_eq!(points.printed(&["cat"], "vda/latest/ANAMET~1.TEX", &[]), "x");
    assert_eq!(points.printed(&["cat"], "vda/latest/dir/é.txt", &[]), "é");
    assert_eq!(points.files(&["cat"], "vda/latest/dir/nosuch", &[]).status.code(), Some(3));
}

/// An image of FAT16 with a few files in it, some in several clusters.
fn small() -> Image {
    let image = Image::new(9 << 20, &["mkfs.fat", "-F", "16", "-s", "1"]);
    let from = tempfile::tempdir().unwrap();
    shell(
        from.path(),
        "mkdir good dir; echo 1 > good/file; head -c 5000 /dev/zero > chained; echo hello > dir/hello; \
         echo x > 'a long name for this'",
    );
    put(&image, from.path());
    image
}

/// Where the root folder is in it, and where its cluster 2 is.
fn places(image: &Path) -> (u64, u64, u64) {
    let boot = std::fs::read(image).unwrap();
    let number = |at: usize| u64::from(u16::from_le_bytes(boot[at..at + 2].try_into().unwrap()));
    let table = number(14) * 512;
    let root = table + u64::from(boot[16]) * number(22) * 512;
    (table, root, root + number(17) * 32)
}

/// Copies out of an image: exit code, what was said, and that `good/file` is there.
fn copied(image: &Image, code: i32) -> String {
    let mut points = Points::new();
    points.add(&image.path());
    let out = tempfile::tempdir().unwrap();
    let copy = points.files(&["cp"], "vda/latest", &[out.path().join("t").to_str().unwrap()]);
    assert_eq!(copy.status.code(), Some(code), "{}", said(&copy));
    assert_eq!(std::fs::read_to_string(out.path().join("t/good/file")).unwrap(), "1\n");
    said(&copy)
}

#[test]
fn damage_of_fat_costs_the_file_that_it_is_in() {
    if !have("damage_of_fat_costs_the_file_that_it_is_in", &TOOLS) {
        return;
    }
    let image = small();
    let (table, root, _) = places(&image.path());
    let bytes = std::fs::read(image.path()).unwrap();
    let entry = (0..512).find(|i| bytes[root as usize + i * 32..].starts_with(b"CHAINED")).unwrap();
    let at = root + entry as u64 * 32;
    let first = u64::from(u16::from_le_bytes(bytes[at as usize + 26..][..2].try_into().unwrap()));
    let file = std::fs::File::options().write(true).open(image.path()).unwrap();
    let link = |value: u16, cluster: u64| {
        file.write_all_at(&value.to_le_bytes(), table + cluster * 2).unwrap();
    };
    assert_eq!(copied(&image, 0), "");
    for (value, why) in [
        (first as u16, "is a loop"),
        (0, "is marked as free"),
        (0xfff7, "is marked as bad"),
        (0xffff, "has 3 clusters, but 10 are needed"),
        (0xff00, "leads to cluster 65280, which does not exist"),
    ] {
        link(value, first + 2);
        let told = copied(&image, 16);
        assert!(told.contains("chained") && told.contains(why), "{why}: {told}");
        assert!(told.contains("copies of the file allocation table differ"), "{told}");
    }
    link(first as u16 + 3, first + 2);
    // Not unmounted.
    file.write_all_at(&[0xff, 0x7f], table + 2).unwrap();
    let told = copied(&image, 0);
    assert!(told.contains("was in use and not unmounted") && told.contains("fsck.fat"), "{told}");
    file.write_all_at(&[0xff, 0xff], table + 2).unwrap();
    // A folder in itself; and names that lead elsewhere.
    assert_eq!(patch(&image.path(), b"HELLO      ", b"A/B        "), 1);
    assert!(copied(&image, 0).contains("invalid directory entry"));
}

#[test]
fn mutants_of_fat_come_to_an_end() {
    if !have("mutants_of_fat_come_to_an_end", &TOOLS) {
        return;
    }
    for (width, size) in [("12", 2), ("16", 9), ("32", 34)] {
        let image = Image::new(size << 20, &["mkfs.fat", "-F", width, "-s", "1"]);
        let from = tempfile::tempdir().unwrap();
        shell(
            from.path(),
            "mkdir -p a/b/c; head -c 30000 /dev/urandom > a/b/file; echo 1 > 'a long name'",
        );
        put(&image, from.path());
        let bytes = std::fs::read(image.path()).unwrap();
        let used = bytes.chunks(512).rposition(|c| c.iter().any(|b| *b != 0)).unwrap() as u64 * 512;
        let (table, root, _) = places(&image.path());
        let places = [(0, 96), (table, 256), (root, 512), (table, used - table)];
        let opened = mutants::survive(&bytes, &places, 120, |_, _| ());
        assert!(opened > 40, "{opened}");
    }
}

/// A mount of an image by exfat-fuse, by way of a loop device: so that all is written when it is unmounted.
fn exfat(image: &Image, options: &str) -> Guard {
    let make = format!(
        r#"loop=$(losetup -f --show "$1") && mount.exfat-fuse {options} "$loop" "$2" >/dev/null 2>&1 && echo "$loop""#
    );
    let undo = r#"umount "$2" || umount -l "$2"; for l in $(losetup -n -O NAME -j "$1"); do losetup -d "$l"; done"#;
    Guard::new(&make, undo, &[&image.path(), &image.mnt()])
}

#[test]
fn all_of_exfat_is_copied_as_exfat_fuse_reads_it() {
    let test = "all_of_exfat_is_copied_as_exfat_fuse_reads_it";
    if !have(test, &EXFAT) || !is_root(test) {
        return;
    }
    for mkfs in [
        ["mkfs.exfat", "-L", "a label", "-c", "4K"],
        ["mkfs.exfat", "-L", "Ünïcode", "-c", "512"],
        ["mkfs.exfat", "-L", "large", "-c", "128K"],
    ] {
        let image = Image::new(100 << 20, &mkfs);
        let mounted = exfat(&image, "");
        sources(&image.mnt());
        shell(&image.mnt(), "printf 😀 > dir/ä😀.txt");
        // Names that take more than a cluster of 512 bytes, wherever they begin in one.
        shell(
            &image.mnt(),
            "mkdir longest; i=0; while [ $i -lt 40 ]; do printf $i > longest/$(printf %0255d $i); i=$((i + 1)); done",
        );
        // In pieces, and longer than what was written.
        shell(
            &image.mnt(),
            "i=0; while [ $i -lt 40 ]; do head -c 9000 /dev/urandom >> dir/pieces; head -c 9000 /dev/urandom \
             >> dir/others; i=$((i + 1)); done; echo x > long; truncate -s 1M long",
        );
        drop(mounted);
        let mut points = Points::new();
        points.add(&image.path());
        let copied = points.copied("vda/latest");
        let mounted = exfat(&image, "-o ro");
        let full = plain(&image.mnt());
        assert_same(&full, &plain(copied.path()), &format!("{mkfs:?}, FULL"));
        drop(mounted);
        let mounted = exfat(&image, "");
        shell(
            &image.mnt(),
            "rm -r many/*1 dir/others; mv dir/hello dir/sub/renamed; head -c 70000 /dev/urandom >> dir/random; \
             mkdir new; i=0; while [ $i -lt 150 ]; do echo $i > new/another-name-$i; i=$((i + 1)); done",
        );
        drop(mounted);
        points.add(&image.path());
        let copied = points.copied("vda/latest");
        assert!(mutants::folders_go_on(&image.path()) > 150);
        let _mounted = exfat(&image, "-o ro");
        let now = plain(&image.mnt());
        assert_same(&now, &plain(copied.path()), &format!("{mkfs:?}, INC"));
        assert!(now.contains_key(Path::new("dir/äöü — Ελληνικά.txt")));
        assert_eq!(points.printed(&["cat"], "vda/latest/DIR/Ä😀.TXT", &[]), "😀");
        let stat = points.printed(&["stat", "--json"], "vda/latest/long", &[]);
        let stat: Value = serde_json::from_str(&stat).unwrap();
        let system = &stat["file_system"];
        assert_eq!(
            (system["kind"].as_str(), system["label"].as_str()),
            (Some("exfat"), Some(mkfs[2]))
        );
        assert_eq!(stat["findings"].to_string(), "[]");
        let statfs = rustix::fs::statfs(image.mnt()).unwrap();
        assert_eq!(system["free"].as_u64(), Some(statfs.f_bfree * statfs.f_bsize as u64));
    }
}

#[test]
fn damage_of_exfat_is_told_and_costs_what_it_is_in() {
    let test = "damage_of_exfat_is_told_and_costs_what_it_is_in";
    if !have(test, &EXFAT) || !is_root(test) {
        return;
    }
    let image = Image::new(20 << 20, &["mkfs.exfat", "-c", "512"]);
    let mounted = exfat(&image, "");
    shell(&image.mnt(), "mkdir good; echo 1 > good/file; echo 2 > zyxwvu; echo 3 > other");
    drop(mounted);
    assert_eq!(copied(&image, 0), "");
    let whole = std::fs::read(image.path()).unwrap();
    let change = |at: u64, value: u8| {
        let file = std::fs::File::options().write(true).open(image.path()).unwrap();
        file.write_all_at(&[value], at).unwrap();
    };
    // The dirty flag is not in the checksum.
    change(106, 2);
    let told = copied(&image, 0);
    assert!(told.contains("was in use and not unmounted") && !told.contains("checksum"), "{told}");
    change(106, 0);
    // The first copy of the boot region, then both.
    change(200, 1);
    assert!(copied(&image, 0).contains("its copy at 0x1800 is used"));
    change(12 * 512 + 200, 1);
    assert!(copied(&image, 0).contains("and of its backup"));
    // They do not agree about what is needed.
    change(109, 1);
    let mut points = Points::new();
    points.add(&image.path());
    let refused = points.files(&["ls"], "vda/latest", &[]);
    assert!(said(&refused).contains("and its backup are damaged"), "{}", said(&refused));
    std::fs::write(image.path(), &whole).unwrap();
    let name: Vec<u8> = "zyxwvu".encode_utf16().flat_map(u16::to_le_bytes).collect();
    let other: Vec<u8> = "zyxwvv".encode_utf16().flat_map(u16::to_le_bytes).collect();
    assert_eq!(patch(&image.path(), &name, &other), 1);
    assert!(copied(&image, 0).contains("bad checksum of an entry set skipped"));
    let used = whole.chunks(512).rposition(|c| c.iter().any(|b| *b != 0)).unwrap() as u64 * 512;
    let number = |at: usize| u64::from(u32::from_le_bytes(whole[at..at + 4].try_into().unwrap()));
    let (table, heap) = (number(80) * 512, number(88) * 512);
    let places = [(0, 128), (table, 256), (heap, used - heap)];
    let opened = mutants::survive(&whole, &places, 150, |_, _| ());
    assert!(opened > 40, "{opened}");
}
