//! Folders that are in several places, or whose contents are those of others: each is read once, whatever the file
//! system, by commands and in the mount.

use std::path::Path;
use std::process::Command;

use crate::support::file_systems::{Image, Points, TOOLS, said, shell};
use crate::support::guard::Guard;
use crate::support::mount::Mount;
use crate::support::mutants::Contents;
use crate::support::process::status;
use crate::support::tools::{have, is_root, run};

const SHARED: &str = "its contents are also those of another directory";

/// Counts what is said of loops in an image; all that is not in one is there.
fn loops(image: Vec<u8>, files: usize) -> usize {
    let found = Contents::of(image).unwrap();
    assert_eq!(found.files.len(), files, "{:?}", found.failed.first());
    assert!(
        found.failed.iter().all(|f| f.contains("directory loop")),
        "{:?}",
        found.failed.first()
    );
    found.failed.len()
}

/// What `find` says of the files of an image in a mount.
struct Found {
    /// How many names it came by.
    names: usize,
    /// How many folders it could not enter.
    refused: usize,
    /// What the mount found.
    findings: String,
}

/// Goes through all of an image in a mount, which comes to an end: one that would not has more paths than anybody can
/// wait for.
fn found(image: &Path, options: &[&str]) -> Found {
    let mut points = Points::new();
    points.add(image);
    let mount = Mount::with(points.dir.path(), &[&["--files"], options].concat());
    let mut find = Command::new("timeout");
    find.args(["300", "find"]).arg(mount.path().join("vda/latest.files/disk")).env("LC_ALL", "C");
    let out = find.output().unwrap();
    assert_ne!(out.status.code(), Some(124), "it does not end");
    let refused = said(&out).matches("Input/output error").count();
    assert_eq!(refused, said(&out).lines().count(), "{:.2000}", said(&out));
    let names = out.stdout.iter().filter(|b| **b == b'\n').count();
    Found { names, refused, findings: status(mount.path())["findings"].to_string() }
}

/// An image of FAT with `count` empty folders in one.
fn fat(width: &str, size: u64, count: usize) -> Image {
    let image = Image::new(size << 20, &["mkfs.fat", "-F", width, "-s", "1"]);
    let from = tempfile::tempdir().unwrap();
    shell(
        from.path(),
        &format!(
            "mkdir -p good in; echo 1 > good/file; i=0; while [ $i -lt {count} ]; do mkdir in/sub$i; i=$((i + 1)); done"
        ),
    );
    let path = image.path();
    let at = |name: &str| from.path().join(name).display().to_string();
    run("mcopy", &["-s", "-Q", "-i", path.to_str().unwrap(), &at("good"), &at("in"), "::/"]);
    image
}

/// Where the entry with this short name is.
fn entry(bytes: &[u8], name: &[u8]) -> usize {
    (0..bytes.len()).step_by(32).find(|at| bytes[*at..].starts_with(name)).unwrap()
}

#[test]
fn folders_of_fat_that_begin_at_their_parent_are_read_once() {
    let name = "folders_of_fat_that_begin_at_their_parent_are_read_once";
    if !have(name, &["sh", "mkfs.fat", "mcopy", "qemu-img", "/dev/fuse"]) {
        return;
    }
    // No more are told one by one.
    const COUNT: usize = 90;
    for (width, size) in [("16", 9), ("32", 34)] {
        let image = fat(width, size, COUNT);
        let whole = std::fs::read(image.path()).unwrap();
        // The root, two folders and a file, and the others.
        assert_eq!(loops(whole.clone(), 4 + COUNT), 0);
        let parent = entry(&whole, b"IN         ");
        let all: Vec<usize> = (0..COUNT)
            .map(|i| entry(&whole, format!("{:<11}", format!("SUB{i}")).as_bytes()))
            .collect();
        let with = |cluster: &[u8]| {
            let mut bytes = whole.clone();
            all.iter().for_each(|at| bytes[at + 26..at + 28].copy_from_slice(cluster));
            bytes
        };
        // Each is its parent, and each a part of it.
        assert_eq!(loops(with(&whole[parent + 26..parent + 28]), 4), COUNT);
        // The second cluster of it, by the table.
        let cluster = usize::from(u16::from_le_bytes([whole[parent + 26], whole[parent + 27]]));
        let table = 512 * usize::from(u16::from_le_bytes([whole[14], whole[15]]));
        let link = table + cluster * if width == "16" { 2 } else { 4 };
        let inside = with(&whole[link..link + 2]);
        assert_eq!(loops(inside.clone(), 4), COUNT);
        // All that goes through a tree says so, and takes the rest.
        std::fs::write(image.path(), &inside).unwrap();
        let mut points = Points::new();
        points.add(&image.path());
        let out = tempfile::tempdir().unwrap();
        let to = out.path().join("t").display().to_string();
        for (verb, more) in [
            (&["cp"][..], &[to.as_str()][..]),
            (&["cp", "--tar"], &[]),
            (&["find"], &[]),
            (&["ls", "-R"], &[]),
        ] {
            let done = points.files(verb, "vda/latest", more);
            // `find` and `ls` end with the first once more.
            let told = said(&done).matches(SHARED).count();
            assert!((COUNT..=COUNT + 1).contains(&told), "{verb:?}: {told}");
        }
        assert_eq!(std::fs::read_to_string(out.path().join("t/good/file")).unwrap(), "1\n");
        for (bytes, seen) in [(with(&whole[parent + 26..parent + 28]), 4), (inside, 4)] {
            std::fs::write(image.path(), &bytes).unwrap();
            let found = found(&image.path(), &[]);
            assert_eq!((found.names, found.refused), (seen + COUNT, COUNT));
            assert!(found.findings.contains(SHARED), "{}", found.findings);
        }
    }
}

#[test]
fn folders_of_exfat_that_begin_at_their_parent_are_read_once() {
    let name = "folders_of_exfat_that_begin_at_their_parent_are_read_once";
    let tools = ["sh", "mkfs.exfat", "mount.exfat-fuse", "/dev/fuse", "/dev/loop-control"];
    if !have(name, &tools) || !is_root(name) {
        return;
    }
    const COUNT: usize = 60;
    let image = Image::new(20 << 20, &["mkfs.exfat", "-c", "512"]);
    let make = r#"loop=$(losetup -f --show "$1") && mount.exfat-fuse "$loop" "$2" >/dev/null 2>&1 && echo "$loop""#;
    let undo = r#"umount "$2" || umount -l "$2"; for l in $(losetup -n -O NAME -j "$1"); do losetup -d "$l"; done"#;
    let mounted = Guard::new(make, undo, &[&image.path(), &image.mnt()]);
    shell(
        &image.mnt(),
        &format!(
            "mkdir in good; echo 1 > good/file; i=0; while [ $i -lt {COUNT} ]; do mkdir in/$((100 + i))-of-many-folders; i=$((i + 1)); done"
        ),
    );
    drop(mounted);
    let mut bytes = std::fs::read(image.path()).unwrap();
    assert_eq!(loops(bytes.clone(), 4 + COUNT), 0);
    // A set of four entries is all in one cluster.
    let set_of = |bytes: &[u8], name: &str| {
        let units = name.encode_utf16().take(15);
        let units: Vec<u8> = units.flat_map(u16::to_le_bytes).collect();
        let is_it = |at: &usize| {
            bytes[*at] == 0x85
                && bytes[at + 32] == 0xc0
                && usize::from(bytes[at + 35]) == name.len()
                && bytes[at + 66..].starts_with(&units)
        };
        (0..bytes.len() - 96).step_by(32).find(is_it).unwrap()
    };
    let parent = set_of(&bytes, "in");
    let stream: Vec<u8> = bytes[parent + 32..parent + 64].to_vec();
    for i in 0..COUNT {
        let at = set_of(&bytes, &format!("{}-of-many-folders", 100 + i));
        // Flags, lengths and the first cluster of the parent.
        bytes[at + 33] = stream[1];
        bytes[at + 40..at + 48].copy_from_slice(&stream[8..16]);
        bytes[at + 52..at + 64].copy_from_slice(&stream[20..32]);
        let len = 32 * (1 + usize::from(bytes[at + 1]));
        let others = (at..at + len).filter(|i| !(at + 2..at + 4).contains(i));
        let sum = others.fold(0u16, |sum, i| sum.rotate_right(1).wrapping_add(bytes[i].into()));
        bytes[at + 2..at + 4].copy_from_slice(&sum.to_le_bytes());
    }
    assert_eq!(loops(bytes.clone(), 4), COUNT);
    std::fs::write(image.path(), &bytes).unwrap();
    let found = found(&image.path(), &[]);
    assert_eq!((found.names, found.refused), (4 + COUNT, COUNT));
    assert!(found.findings.contains(SHARED), "{}", found.findings);
}

#[test]
fn folders_of_ext_with_the_same_blocks_are_read_once() {
    let name = "folders_of_ext_with_the_same_blocks_are_read_once";
    if !have(name, &["sh", "mke2fs", "debugfs"]) {
        return;
    }
    let from = tempfile::tempdir().unwrap();
    shell(from.path(), "mkdir -p a/x a/y b; echo 1 > a/file; echo 2 > b/other");
    let mkfs = ["mke2fs", "-q", "-F", "-t", "ext2", "-d", from.path().to_str().unwrap()];
    let image = Image::new(4 << 20, &mkfs);
    let path = image.path();
    let debugfs = |command: &str| {
        let out = run("debugfs", &["-w", "-R", command, path.to_str().unwrap()]);
        String::from_utf8_lossy(&out.stdout).into_owned()
    };
    assert_eq!(loops(std::fs::read(&path).unwrap(), 8), 0);
    let block = debugfs("blocks /a").trim().to_string();
    for folder in ["/a/x", "/a/y", "/b"] {
        debugfs(&format!("set_inode_field {folder} block[0] {block}"));
    }
    // What is first is read: a, and in it a file; the others are the same.
    let found = Contents::of(std::fs::read(&path).unwrap()).unwrap();
    assert!(found.files.contains_key(b"a/file".as_slice()), "{:?}", found.files.keys());
    assert_eq!(found.failed.iter().filter(|f| f.contains(SHARED)).count(), 3, "{:?}", found.failed);
    if have(name, &["/dev/fuse", "qemu-img"]) {
        let found = self::found(&path, &[]);
        assert_eq!(
            (found.refused, found.findings.contains(SHARED)),
            (3, true),
            "{}",
            found.findings
        );
    }
}

const TWICE: &str = "already visited under another name";

/// A disk with folders in folders, `depth` deep, each of which the one above has by two names; by `link`, which is given
/// the folder above and the one in it.
fn doubled(mkfs: &[&str], folder: impl Fn(usize) -> String, depth: usize) -> Image {
    let image = Image::new(16 << 20, mkfs);
    let deepest = folder(depth);
    let mut commands: Vec<String> = (0..=depth).map(|i| format!("mkdir {}", folder(i))).collect();
    commands.extend((0..depth).map(|i| format!("link {} {}/again", folder(i + 1), folder(i))));
    // And the lowest leads to the highest.
    commands.push(format!("link {} {deepest}/up", folder(0)));
    let list = image.dir.path().join("commands");
    std::fs::write(&list, commands.join("\n")).unwrap();
    let list = list.to_str().unwrap();
    run("debugfs", &["-w", "-f", list, image.path().to_str().unwrap()]);
    image
}

#[test]
fn folders_with_two_names_are_entered_by_one() {
    let name = "folders_with_two_names_are_entered_by_one";
    if !have(name, &["mke2fs", "debugfs", "qemu-img", "/dev/fuse", "timeout"]) {
        return;
    }
    // With two names each there are 2^40 paths.
    const DEPTH: usize = 40;
    let folder = |i: usize| (0..=i).map(|i| format!("/d{i}")).collect::<String>();
    for kind in
        [&["-t", "ext4"][..], &["-t", "ext4", "-O", "inline_data", "-I", "256"], &["-t", "ext2"]]
    {
        let mkfs = [&["mke2fs", "-q", "-F", "-b", "1024"][..], kind].concat();
        let image = doubled(&mkfs, folder, DEPTH);
        let all = Contents::of(std::fs::read(image.path()).unwrap()).unwrap();
        assert_eq!(all.failed.iter().filter(|f| f.contains(TWICE)).count(), DEPTH + 1);
        // Also where there is no memory to remember folders: then each says where it is.
        for options in [&[][..], &["--cache-size=8K"]] {
            let found = found(&image.path(), options);
            assert_eq!(
                (found.names, found.refused),
                (2 * DEPTH + 4, DEPTH + 1),
                "{kind:?} {options:?}"
            );
            assert!(found.findings.contains(TWICE), "{}", found.findings);
        }
    }
}

/// Where the entry with this name is in the index of a folder of NTFS.
fn index_entry(bytes: &[u8], name: &str) -> usize {
    let units: Vec<u8> = name.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let key = 0x42 + units.len();
    let is_it = |at: &usize| {
        bytes[at + 0x52..].starts_with(&units)
            && bytes[at + 10..at + 12] == (key as u16).to_le_bytes()
    };
    (0..bytes.len() - 0x100).step_by(8).find(is_it).expect("it is there")
}

#[test]
fn folders_of_ntfs_with_two_names_are_entered_by_one() {
    let name = "folders_of_ntfs_with_two_names_are_entered_by_one";
    let tools = [TOOLS.as_slice(), &["mkntfs", "ntfs-3g", "/dev/fuse", "timeout"]].concat();
    if !have(name, &tools) || !is_root(name) {
        return;
    }
    const DEPTH: usize = 30;
    let image = Image::new(8 << 20, &["mkntfs", "-q", "-Q", "-F"]);
    let make = r#"ntfs-3g "$1" "$2" >/dev/null 2>&1"#;
    let mounted =
        Guard::new(make, r#"umount "$2" || umount -l "$2""#, &[&image.path(), &image.mnt()]);
    let script = format!(
        "i=0; while [ $i -lt {DEPTH} ]; do mkdir one-of-$i two-of-$i; cd one-of-$i; i=$((i + 1)); done"
    );
    shell(&image.mnt(), &script);
    drop(mounted);
    let mut bytes = std::fs::read(image.path()).unwrap();
    for i in 0..DEPTH {
        let [one, two] = ["one", "two"].map(|n| index_entry(&bytes, &format!("{n}-of-{i}")));
        let reference = bytes[one..one + 8].to_vec();
        bytes[two..two + 8].copy_from_slice(&reference);
    }
    let all = Contents::of(bytes.clone()).unwrap();
    assert_eq!(all.failed.iter().filter(|f| f.contains(TWICE)).count(), DEPTH, "{:?}", all.failed);
    std::fs::write(image.path(), &bytes).unwrap();
    for options in [&[][..], &["--cache-size=512K"]] {
        let found = found(&image.path(), options);
        assert_eq!(found.refused, DEPTH, "{options:?} {}", found.findings);
        assert!(found.findings.contains(TWICE), "{}", found.findings);
    }
}

#[test]
fn more_folders_than_there_is_memory_for_are_where_they_say() {
    let name = "more_folders_than_there_is_memory_for_are_where_they_say";
    let tools = [TOOLS.as_slice(), &["mkfs.ext4", "/dev/fuse", "timeout"]].concat();
    if !have(name, &tools) || !is_root(name) {
        return;
    }
    // More than two thousand, in folders of all forms.
    const FILL: &str = r#"mkdir -p one/small two/three; cd two
        seq -f a-folder-with-a-name-%.0f 1800 | xargs mkdir; cd three; seq -f %.0f/in 40 | xargs mkdir -p"#;
    const SUBVOLUMES: &str = "btrfs -q subvolume create two/sub && mkdir two/sub/below
        btrfs -q subvolume snapshot . copy";
    let all: [(&[&str], &str, &str); 6] = [
        (&["mkfs.ext4", "-q", "-F"], "", "true"),
        (&["mkfs.ext4", "-q", "-F", "-O", "inline_data", "-I", "256"], "", "true"),
        (&["mke2fs", "-q", "-F", "-t", "ext2"], "", "true"),
        (&["mkfs.xfs", "-q", "-f"], "", "true"),
        (&["mkfs.btrfs", "-q"], "", SUBVOLUMES),
        (&["mkntfs", "-q", "-Q", "-F"], "ntfs-3g", "true"),
    ];
    let tree = |dir: &Path| {
        let out = run("find", &[dir.to_str().unwrap(), "-printf", "%P %y\n"]);
        let mut all: Vec<_> = out.stdout.split(|b| *b == b'\n').map(<[u8]>::to_vec).collect();
        all.sort();
        all
    };
    for (mkfs, by, more) in all.into_iter().filter(|(m, ..)| have(name, &[m[0]])) {
        let image = Image::new(320 << 20, mkfs);
        let mount =
            format!(r#"mount {} -o loop "$1" "$2""#, if by.is_empty() { "" } else { "-t ntfs-3g" });
        let undo = r#"umount "$2" || umount -l "$2""#;
        let mounted = Guard::new(&mount, undo, &[&image.path(), &image.mnt()]);
        shell(&image.mnt(), FILL);
        shell(&image.mnt(), more);
        let shown = tree(&image.mnt());
        drop(mounted);
        let mut points = Points::new();
        points.add(&image.path());
        let mount = Mount::with(points.dir.path(), &["--files", "--cache-size=1M"]);
        assert!(tree(&mount.path().join("vda/latest.files/disk")) == shown, "{mkfs:?}");
    }
    // FAT does not say: there is a word about the memory.
    if have(name, &["mkfs.fat", "mcopy"]) {
        let found = found_of_fat(&["--files", "--cache-size=64K"]);
        assert!(found.contains("give a larger --cache-size"), "{found}");
    }
}

/// What a mount with these options finds in a FAT of some hundred folders, by `ls -R`, which goes on.
fn found_of_fat(options: &[&str]) -> String {
    let image = fat("32", 34, 700);
    let mut points = Points::new();
    points.add(&image.path());
    let mount = Mount::with(points.dir.path(), options);
    let mut list = Command::new("ls");
    let out = list.arg("-R").arg(mount.path().join("vda/latest.files/disk")).output().unwrap();
    assert!(said(&out).contains("Operation not supported"), "{}", said(&out));
    status(mount.path())["findings"].to_string()
}
