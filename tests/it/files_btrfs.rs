//! Files out of btrfs: what `files` copies is what the kernel shows, with subvolumes, snapshots and compression; what
//! is damaged is read from its other copy, or costs the file that it is in.

use std::collections::BTreeMap;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use serde_json::Value;

use crate::support::file_systems::{
    Image, Listing, Points, TOOLS, fill, fill_unix, mount, said, shell,
};
use crate::support::guard::Guard;
use crate::support::mutants::{self, Contents};
use crate::support::tools::{have, is_root, run};

/// All attributes: copied with `--preserve=all`.
const ALL: [&str; 4] = ["user.", "security.", "trusted.", "system."];

fn ready(test: &str) -> bool {
    let more = ["mkfs.btrfs", "btrfs", "chattr", "grep"];
    have(test, &[TOOLS.as_slice(), &more].concat()) && is_root(test)
}

/// What mkfs is asked for, and how it is mounted.
const KINDS: [(&[&str], &str); 6] = [
    (&["mkfs.btrfs", "-q"], ""),
    (&["mkfs.btrfs", "-q", "-m", "single", "-n", "4096"], "compress-force=zlib"),
    (&["mkfs.btrfs", "-q", "--csum", "xxhash"], "compress-force=zstd"),
    (&["mkfs.btrfs", "-q", "--csum", "sha256", "-d", "dup"], "compress-force=lzo"),
    (
        &["mkfs.btrfs", "-q", "--csum", "blake2", "-n", "65536", "-O", "^no-holes"],
        "compress=zstd:1",
    ),
    (&["mkfs.btrfs", "-q", "-M", "-m", "single", "-d", "single"], "max_inline=0"),
];

/// What only btrfs has.
fn fill_btrfs(mnt: &Path) {
    shell(
        mnt,
        r#"
        seq 400000 > dir/text; seq 3000 > dir/short-text; printf %3000s x > dir/packed-inside
        btrfs -q subvolume create sub; cp -a dir/hello dir/text sub/; mkdir sub/below; echo 1 > sub/below/file
        btrfs -q subvolume snapshot -r sub snapshot; echo 2 > sub/below/file; rm sub/text
        btrfs -q subvolume create dir/inner; echo inner > dir/inner/file
        cp --reflink=always dir/text dir/same; printf changed | dd of=dir/same bs=1 seek=300000 conv=notrunc status=none
        mkdir cow; chattr +C cow; seq 50000 > cow/plain
        fallocate -p -o 65536 -l 65536 dir/random
        "#,
    );
}

#[test]
fn all_of_btrfs_is_copied_as_the_kernel_shows_it() {
    if !ready("all_of_btrfs_is_copied_as_the_kernel_shows_it") {
        return;
    }
    for (mkfs, options) in KINDS {
        let what = format!("{mkfs:?} {options}");
        let image = Image::new(300 << 20, mkfs);
        let mounted = image.mount(options);
        fill(&image.mnt());
        fill_unix(&image.mnt());
        fill_btrfs(&image.mnt());
        drop(mounted);
        let mut points = Points::new();
        points.add(&image.path());
        let copied = points.copied("vda/latest");
        let mounted = image.mount("ro");
        let kernel = Listing::of(&image.mnt(), &ALL);
        kernel.assert_same(&Listing::of(copied.path(), &ALL), &format!("{what}, FULL"));
        assert!(kernel.0.contains_key(Path::new("snapshot/text")), "{what}");
        drop(mounted);
        let mounted = image.mount(options);
        shell(
            &image.mnt(),
            "rm -r many; mv dir/hello dir/sub/renamed; seq 70000 >> dir/tiny; truncate -s 1000 dir/random; \
             btrfs -q subvolume delete snapshot; btrfs -q subvolume snapshot sub again; \
             mkdir new; i=0; while [ $i -lt 300 ]; do echo $i > new/$i; i=$((i + 1)); done",
        );
        drop(mounted);
        points.add(&image.path());
        let copied = points.copied("vda/latest");
        let _mounted = image.mount("ro");
        let kernel = Listing::of(&image.mnt(), &ALL);
        kernel.assert_same(&Listing::of(copied.path(), &ALL), &format!("{what}, INC"));
        let stat = points.printed(&["stat", "--json"], "vda/latest/dir/text", &[]);
        let stat: Value = serde_json::from_str(&stat).unwrap();
        assert_eq!(stat["file_system"]["kind"], "btrfs");
        assert_eq!(stat["findings"].to_string(), "[]");
        assert!(stat["entry"]["crtime_utc"].as_str().unwrap().starts_with("20"));
    }
}

#[test]
fn a_mount_without_options_shows_the_default_subvolume() {
    if !ready("a_mount_without_options_shows_the_default_subvolume") {
        return;
    }
    let image = Image::new(150 << 20, KINDS[0].0);
    let mounted = image.mount("");
    shell(
        &image.mnt(),
        "btrfs -q subvolume create root; echo 1 > root/file; echo 2 > beside; btrfs -q subvolume create root/in; \
         echo 3 > root/in/file; btrfs -q subvolume snapshot root root/snapshot; btrfs subvolume set-default root",
    );
    drop(mounted);
    let mut points = Points::new();
    points.add(&image.path());
    let all = points.printed(&["ls", "-R"], "vda/latest/", &[]);
    // In the snapshot the subvolume below is an empty folder, as the kernel shows it.
    let all: Vec<&str> = all.lines().collect();
    assert_eq!(all, ["file", "in", "in/file", "snapshot", "snapshot/file", "snapshot/in"]);
    assert_eq!(points.printed(&["cat"], "vda/latest/in/file", &[]), "3\n");
    assert_eq!(mutants::folders_go_on(&image.path()), 6);
    let _mounted = image.mount("ro");
    assert!(image.mnt().join("snapshot/in").read_dir().unwrap().next().is_none());
}

#[test]
fn what_is_in_the_log_tree_only_is_told() {
    if !ready("what_is_in_the_log_tree_only_is_told") {
        return;
    }
    let image = Image::new(200 << 20, KINDS[0].0);
    let mounted = image.mount("commit=300");
    fill(&image.mnt());
    shell(&image.mnt(), "sync -f .");
    shell(
        &image.mnt(),
        "echo new > last; sync last; echo more >> dir/hello; sync dir/hello; seq 90000 > unsynced",
    );
    let copy = image.dir.path().join("dirty");
    run("cp", &["--sparse=always", image.path().to_str().unwrap(), copy.to_str().unwrap()]);
    drop(mounted);
    let mut points = Points::new();
    points.add(&copy);
    let told = points.files(&["cat"], "vda/latest/dir/hello", &[]);
    assert_eq!(String::from_utf8_lossy(&told.stdout), "hello\n", "{}", said(&told));
    assert!(said(&told).contains("log tree is not replayed"), "{}", said(&told));
    let copied = points.copied("vda/latest");
    let _mounted = mount(&copy, &image.mnt(), "ro,rescue=nologreplay").unwrap();
    Listing::of(&image.mnt(), &ALL)
        .assert_same(&Listing::of(copied.path(), &ALL), "without the log");
}

#[test]
fn a_disk_that_is_being_written_is_read_as_after_a_power_cut() {
    if !ready("a_disk_that_is_being_written_is_read_as_after_a_power_cut") {
        return;
    }
    // The disk is a file on btrfs, too: so that it can be copied at one moment.
    let outer = Image::new(2 << 30, KINDS[0].0);
    let _outer = outer.mount("");
    let at = |name: &str| outer.mnt().join(name);
    std::fs::File::create(at("disk")).unwrap().set_len(300 << 20).unwrap();
    std::fs::create_dir(at("mnt")).unwrap();
    run("mkfs.btrfs", &["-q", at("disk").to_str().unwrap()]);
    let mounted = mount(&at("disk"), &at("mnt"), "commit=1,compress=zstd").unwrap();
    shell(
        &at("mnt"),
        r#"
        : > ../go; trap 'rm -f ../go' EXIT
        (i=0; while [ -e ../go ] && [ $i -lt 20000 ]; do
            seq $i 3000 > f$((i % 60)); i=$((i + 1)); [ $((i % 9)) != 0 ] || sync f$((i % 9))
        done) & writer=$!
        for n in 1 2 3 4; do
            mkdir d$n; i=0; while [ $i -lt 150 ]; do echo $i > d$n/$i; i=$((i + 1)); done
            [ $n = 4 ] || sync -f .; rm -r d$n/1*; head -c 3000000 /dev/urandom > r$n; sync r$n
            cp --reflink=always ../disk ../copy$n
        done
        rm ../go; wait $writer
        "#,
    );
    drop(mounted);
    let mut points = Points::new();
    for n in 1..=4 {
        let copy = at(&format!("copy{n}"));
        points.add(&copy);
        let copied = points.copied("vda/latest");
        let _mounted = mount(&copy, &at("mnt"), "ro,rescue=nologreplay").unwrap();
        let kernel = Listing::of(&at("mnt"), &ALL);
        assert!(kernel.0.len() > 30, "{}", kernel.0.len());
        kernel.assert_same(&Listing::of(copied.path(), &ALL), &format!("copy {n}"));
    }
}

/// Changes a byte of each place that has these bytes in the first of two copies, or in the only one; how often.
/// (Older versions of a node are there as well; the second copies are all behind the first ones.)
fn break_first_copy(path: &Path, of: &str, copies: usize) -> usize {
    let out = run("grep", &["-obUaF", of, path.to_str().unwrap()]);
    let out = String::from_utf8_lossy(&out.stdout).into_owned();
    let found: Vec<u64> =
        out.lines().map(|l| l.split(':').next().unwrap().parse().unwrap()).collect();
    assert_eq!(found.len() % copies, 0, "{found:?}");
    let broken = found.len() / copies;
    let file = std::fs::File::options().write(true).open(path).unwrap();
    found.iter().take(broken).for_each(|at| file.write_all_at(b"#", *at).unwrap());
    broken
}

/// Copies all: exit code, and what was said.
fn copied(image: &Path, code: i32) -> String {
    let mut points = Points::new();
    points.add(image);
    let out = tempfile::tempdir().unwrap();
    let copy = points.files(&["cp"], "vda/latest", &[out.path().join("t").to_str().unwrap()]);
    assert_eq!(copy.status.code(), Some(code), "{}", said(&copy));
    assert_eq!(std::fs::read_to_string(out.path().join("t/good/file")).unwrap(), "1\n");
    said(&copy)
}

#[test]
fn damage_is_read_from_the_other_copy_or_costs_a_file() {
    if !ready("damage_is_read_from_the_other_copy_or_costs_a_file") {
        return;
    }
    for (data, copies, code) in [("single", 1, 16), ("dup", 2, 0)] {
        let image = Image::new(300 << 20, &["mkfs.btrfs", "-q", "-d", data, "-m", "dup"]);
        let mounted = image.mount("max_inline=0");
        shell(
            &image.mnt(),
            "mkdir good; echo 1 > good/file; (echo 'unlikely text'; seq 9000) > bad; echo 3 > zyxwvutsrq",
        );
        drop(mounted);
        assert_eq!(copied(&image.path(), 0), "");
        // A name.
        assert!(break_first_copy(&image.path(), "zyxwvutsrq", 2) >= 1);
        let told = copied(&image.path(), 0);
        assert!(told.contains("another copy is right, and was used"), "{told}");
        assert_eq!(break_first_copy(&image.path(), "unlikely text", copies), 1);
        let told = copied(&image.path(), code);
        assert!(told.contains("bad checksum"), "{told}");
        let file = std::fs::File::options().write(true).open(image.path()).unwrap();
        file.write_all_at(b"x", (64 << 10) + 0x12b).unwrap();
        let told = copied(&image.path(), code);
        assert!(
            told.contains("superblock is damaged")
                && told.contains("its copy at 0x4000000 is used"),
            "{told}"
        );
    }
}

#[test]
fn one_disk_of_several_is_read_as_far_as_it_goes() {
    if !ready("one_disk_of_several_is_read_as_far_as_it_goes") {
        return;
    }
    for (profile, reads) in [("raid1", true), ("raid0", false)] {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        for name in ["a", "b"] {
            std::fs::File::create(path(name)).unwrap().set_len(150 << 20).unwrap();
        }
        std::fs::create_dir(path("mnt")).unwrap();
        let [a, b] = ["a", "b"].map(|n| Guard::attach("", &path(n)));
        let devices = [a.made().to_str().unwrap(), b.made().to_str().unwrap()];
        run("mkfs.btrfs", &[&["-q", "-d", profile, "-m", profile][..], &devices].concat());
        let options = format!("-o device={},device={}", devices[0], devices[1]);
        let mounted = Guard::mount(&options, a.made(), &path("mnt"));
        shell(&path("mnt"), "mkdir good; echo 1 > good/file; seq 100000 > numbers");
        drop(mounted);
        drop((a, b));
        for name in ["a", "b"] {
            let mut points = Points::new();
            points.add(&path(name));
            let out = points.files(&["cat"], "vda/latest/numbers", &[]);
            if reads {
                let right: String = (1..=100_000).map(|i| format!("{i}\n")).collect();
                assert!(out.stdout == right.as_bytes(), "{}", said(&out));
                assert_eq!(said(&out), "");
            } else {
                assert_eq!(out.status.code(), Some(11));
                assert!(said(&out).contains("profile RAID0"), "{}", said(&out));
            }
        }
    }
}

/// CRC-32C as btrfs has it, bit by bit.
fn crc32c(bytes: &[u8]) -> u32 {
    let step = |crc: u32| (crc >> 1) ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 };
    !bytes.iter().fold(!0, |crc, b| (0..8).fold(crc ^ u32::from(*b), |crc, _| step(crc)))
}

/// An item in a leaf: the place of its key, and of its data.
type Found = (usize, std::ops::Range<usize>);

/// Changes all items of a kind (of one object, if that is not 0) in all leaves of an image with nodes of 4 KiB, and
/// mends their checksums; how many there were.
fn change(
    bytes: &mut [u8],
    (object, kind): (u64, u8),
    with: impl Fn(&mut [u8], Found) -> bool,
) -> usize {
    const HEAD: usize = 101;
    let number =
        |b: &[u8], at: usize| u32::from_le_bytes(b[at..at + 4].try_into().unwrap()) as usize;
    let id = bytes[(64 << 10) + 0x20..][..16].to_vec();
    let mut changed = 0;
    for node in bytes.chunks_mut(4096) {
        let is_leaf = node[0x20..0x30] == id && node[0x64] == 0 && &node[0x40..0x48] != b"_BHRfS_M";
        let count = if is_leaf { number(node, 0x60).min(150) } else { 0 };
        let before = changed;
        for at in (0..count).map(|i| HEAD + 25 * i) {
            let begin = HEAD + number(node, at + 17);
            let data = begin..begin + number(node, at + 21);
            let is_object = object == 0 || node[at..at + 8] == object.to_le_bytes();
            if node[at + 8] == kind && is_object && data.end <= node.len() {
                changed += usize::from(with(node, (at, data)));
            }
        }
        if changed > before {
            let sum = crc32c(&node[32..]);
            node[..4].copy_from_slice(&sum.to_le_bytes());
        }
    }
    changed
}

/// A small file system with nodes of 4 KiB, and the numbers of some of its inodes.
fn odd(names: &[&str]) -> (Image, Vec<u64>) {
    let mkfs = ["mkfs.btrfs", "-q", "-M", "-m", "single", "-d", "single", "-n", "4096"];
    let image = Image::new(64 << 20, &mkfs);
    let mounted = image.mount("compress=zstd");
    shell(
        &image.mnt(),
        "mkdir good; echo 1 > good/file; btrfs -q subvolume create sub; echo 2 > sub/inside; echo 3 > one; \
         echo 4 > two; seq 20000 > packed; cp --reflink=always packed same; : > plain; chattr +C plain; \
         seq 90000 > plain; head -c 90000 /dev/urandom > random",
    );
    let numbers = names.iter().map(|n| std::fs::metadata(image.mnt().join(n)).unwrap().ino());
    let numbers = numbers.collect();
    drop(mounted);
    (image, numbers)
}

#[test]
fn what_is_odd_in_btrfs_costs_what_it_is_in() {
    if !ready("what_is_odd_in_btrfs_costs_what_it_is_in") {
        return;
    }
    const KINDS: [u8; 4] = [1, 84, 108, 128];
    let [inode, by_hash, extent, sums] = KINDS;
    let (image, numbers) = odd(&["one", "two", "same", "random"]);
    let whole = std::fs::read(image.path()).unwrap();
    let right = Contents::of(whole.clone()).unwrap();
    assert!(right.failed.is_empty() && right.files.len() == 11, "{:?}", right.failed);
    // Data without checksums is read, and that is told.
    assert!(right.has_told("data without checksums"), "{:?}", right.told);
    // What is said of a change: all but the files named is there and right.
    let costs = |change: &dyn Fn(&mut [u8]) -> usize, lost: &[&str], why: &str| {
        let mut bytes = whole.clone();
        assert!(change(&mut bytes) > 0, "{why}");
        let found = Contents::of(bytes).unwrap();
        let gone: Vec<_> = right.files.keys().filter(|p| !found.files.contains_key(*p)).collect();
        let gone: Vec<_> = gone.iter().map(|p| String::from_utf8_lossy(p)).collect();
        assert_eq!(gone, lost, "{why}: {:?}", found.failed);
        assert!(found.files.iter().all(|(p, line)| right.files.get(p) == Some(line)), "{why}");
        assert!(found.failed.len() == 1 && found.failed[0].contains(why), "{:?}", found.failed);
    };
    let set = |at: usize, value: u8| {
        move |node: &mut [u8], (_, data): Found| {
            node[data.start + at] = value;
            true
        }
    };
    // The root of a subvolume: the level of its tree.
    let root = |b: &mut [u8]| change(b, (256, 132), set(238, 99));
    costs(&root, &["sub", "sub/inside"], "root item of tree 256 is invalid");
    let size = |b: &mut [u8]| change(b, (numbers[0], inode), set(23, 0x80));
    costs(&size, &["one"], "has an invalid size");
    // Two files have the same extent, and one says that it is compressed in another way.
    let packing = |b: &mut [u8]| change(b, (numbers[2], extent), set(16, 1));
    costs(&packing, &["same"], "cannot be decompressed");
    // All checksums are those of other places.
    let moved = |b: &mut [u8]| {
        change(b, (0, sums), |node, (key, _)| {
            node[key + 16] = 1;
            true
        })
    };
    let mut bytes = whole.clone();
    assert!(moved(&mut bytes) > 0);
    let found = Contents::of(bytes).unwrap();
    assert!(found.failed.iter().all(|f| f.contains("should have a checksum, and has none")));
    assert!(found.failed.len() == 3 && found.files.contains_key(b"plain".as_slice()));
    // What is found by hash: something else, and nothing; and what is listed is something else.
    let cases =
        [(by_hash, numbers[1], "one"), (by_hash, numbers[0], "onx"), (96, numbers[1], "one")];
    for (kind, object, name) in cases {
        let mut bytes = whole.clone();
        let names = change(&mut bytes, (0, kind), |node, (_, data)| {
            let is_it = &node[data.start + 30..data.end] == b"one";
            if is_it {
                node[data.start..data.start + 8].copy_from_slice(&object.to_le_bytes());
                node[data.start + 30..data.end].copy_from_slice(name.as_bytes());
            }
            is_it
        });
        assert!(names > 0);
        std::fs::write(image.path(), bytes).unwrap();
        assert_eq!(mutants::folders_go_on(&image.path()), 10, "{kind} {name}");
    }
}

#[test]
fn mutants_of_btrfs_come_to_an_end() {
    const NODE: usize = 4096;
    if !ready("mutants_of_btrfs_come_to_an_end") {
        return;
    }
    let mkfs = ["mkfs.btrfs", "-q", "-M", "-m", "single", "-d", "single", "-n", "4096"];
    let image = Image::new(32 << 20, &mkfs);
    let mounted = image.mount("compress-force=zstd");
    shell(
        &image.mnt(),
        "mkdir -p a/b/c; seq 50000 > a/b/file; echo hello > hello; ln -s hello link; truncate -s 1M sparse; \
         btrfs -q subvolume create sub; echo 1 > sub/file; btrfs -q subvolume snapshot sub a/snapshot; \
         i=0; while [ $i -lt 200 ]; do echo $i > a/b/c/file-$i; i=$((i + 1)); done; seq 9 > x; chattr +m x",
    );
    drop(mounted);
    let bytes = std::fs::read(image.path()).unwrap();
    let id = bytes[(64 << 10) + 0x20..][..16].to_vec();
    let is_node = |b: &[u8]| b[0x20..0x30] == id;
    let nodes: BTreeMap<u64, u64> = bytes
        .chunks(NODE)
        .enumerate()
        .filter(|(_, b)| is_node(b))
        .map(|(i, _)| (i as u64 * NODE as u64, NODE as u64))
        .collect();
    assert!(nodes.len() > 10);
    assert!(mutants::folders_go_on(&image.path()) > 200);
    let places: Vec<(u64, u64)> = nodes.into_iter().collect();
    let mend = |bytes: &mut [u8], at: u64| {
        let node = &mut bytes[at as usize / NODE * NODE..][..NODE];
        let sum = crc32c(&node[32..]);
        node[..4].copy_from_slice(&sum.to_le_bytes());
    };
    let opened = mutants::survive(&bytes, &places, 200, mend);
    assert!(opened > 100, "{opened}");
    mutants::survive(&bytes, &[(64 << 10, 0x400)], 40, mend);
}
