//! Folders whose contents are those of others: each is read once, whatever the file system.

use crate::support::file_systems::{Image, Points, said, shell};
use crate::support::guard::Guard;
use crate::support::mutants::Contents;
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
    if !have(name, &["sh", "mkfs.fat", "mcopy", "qemu-img"]) {
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
    assert_eq!(loops(bytes, 4), COUNT);
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
}
