//! What file systems keep twice: a damaged superblock or boot sector is replaced by its copy, and told; and whatever
//! is damaged there, nothing wrong is read.

use std::path::Path;

use crate::support::file_systems::{Image, shell};
use crate::support::mutants::{Contents, Random};
use crate::support::tools::{have, run};

/// Makes a file system without mounting it: its bytes.
type Make = fn() -> Vec<u8>;

/// A kind: what it is called, what it needs, how it is made, and where its first superblock is, up to where its fields
/// go.
struct Kind {
    name: &'static str,
    tool: &'static str,
    make: Make,
    at: usize,
    len: usize,
}

const KINDS: [Kind; 8] = [
    Kind { name: "ext4", tool: "mke2fs", make: || ext(&["-t", "ext4"]), at: 1024, len: 1024 },
    Kind { name: "ext2", tool: "mke2fs", make: || ext(&["-t", "ext2"]), at: 1024, len: 264 },
    Kind { name: "xfs", tool: "mkfs.xfs", make: || xfs("1"), at: 0, len: 272 },
    Kind { name: "xfs v4", tool: "mkfs.xfs", make: || xfs("0"), at: 0, len: 208 },
    Kind { name: "btrfs", tool: "mkfs.btrfs", make: btrfs, at: 64 << 10, len: 1000 },
    Kind { name: "ntfs", tool: "ntfscp", make: ntfs, at: 0, len: 80 },
    Kind { name: "fat32", tool: "mcopy", make: fat, at: 0, len: 90 },
    Kind { name: "exfat", tool: "mkfs.exfat", make: exfat, at: 0, len: 120 },
];

/// Files to put into it.
fn sources() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    shell(
        dir.path(),
        "mkdir -p dir/sub; seq 30000 > dir/numbers; seq 100 > dir/sub/few; \
         i=0; while [ $i -lt 150 ]; do echo $i > dir/sub/name-$i; i=$((i + 1)); done",
    );
    dir
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn bytes(image: &Image) -> Vec<u8> {
    std::fs::read(image.path()).unwrap()
}

fn ext(options: &[&str]) -> Vec<u8> {
    let from = sources();
    let mkfs = ["mke2fs", "-q", "-F", "-b", "1024", "-N", "3000"];
    bytes(&Image::new(20 << 20, &[&mkfs, options, &["-d", text(from.path())]].concat()))
}

fn xfs(crc: &str) -> Vec<u8> {
    let from = sources();
    let file = |name: &str| format!("{} ---644 0 0 {}/dir/{name}", name, text(from.path()));
    let mut lines = vec!["/nothing".to_string(), "1 1".into(), "d--755 0 0".into()];
    lines.extend([file("numbers"), "some d--755 0 0".into()]);
    lines.extend((0..100).map(|i| file("numbers").replacen("numbers", &format!("name-{i}"), 1)));
    lines.extend(["$".into(), "$".into(), String::new()]);
    let prototype = from.path().join("prototype");
    std::fs::write(&prototype, lines.join("\n")).unwrap();
    let crc = format!("crc={crc}");
    let mkfs = ["mkfs.xfs", "-q", "-f", "--unsupported", "-b", "size=1024", "-d", "agcount=2"];
    let image = Image::new(40 << 20, &[&mkfs[..], &["-m", &crc, "-p", text(&prototype)]].concat());
    bytes(&image)
}

fn btrfs() -> Vec<u8> {
    let from = sources();
    bytes(&Image::new(128 << 20, &["mkfs.btrfs", "-q", "--rootdir", text(from.path())]))
}

fn ntfs() -> Vec<u8> {
    let from = sources();
    let image = Image::new(8 << 20, &["mkntfs", "-q", "-Q", "-F"]);
    for (name, to) in [("dir/numbers", "/numbers"), ("dir/sub/few", "/few")] {
        run("ntfscp", &["-q", text(&image.path()), text(&from.path().join(name)), to]);
    }
    bytes(&image)
}

fn fat() -> Vec<u8> {
    let from = sources();
    let image = Image::new(70 << 20, &["mkfs.fat", "-F", "32", "-s", "1"]);
    let dir = from.path().join("dir");
    run("mcopy", &["-s", "-Q", "-i", text(&image.path()), text(&dir), "::/"]);
    bytes(&image)
}

/// There is no tool that puts files into it without a mount: its root has none.
fn exfat() -> Vec<u8> {
    bytes(&Image::new(8 << 20, &["mkfs.exfat", "-c", "4K"]))
}

#[test]
fn a_superblock_that_is_gone_is_replaced_by_its_copy() {
    let mut seen = 0;
    for kind in KINDS {
        if !have("a_superblock_that_is_gone_is_replaced_by_its_copy", &["sh", kind.tool]) {
            continue;
        }
        let image = (kind.make)();
        let right = Contents::of(image.clone()).expect(kind.name);
        assert!(!right.has_told("its copy at"), "{}: {:?}", kind.name, right.told);
        assert!(right.files.len() > if kind.name == "exfat" { 0 } else { 2 }, "{}", kind.name);
        // Nothing, something else, and one byte.
        for (fill, len) in [(Some(0), kind.len), (Some(0xa5), kind.len), (None, 4)] {
            let mut damaged = image.clone();
            let magic = if kind.name.starts_with("ext") { 0x38 } else { 0 };
            let magic = if kind.name == "btrfs" { 0x40 } else { magic };
            let magic = if ["ntfs", "exfat"].contains(&kind.name) { 3 } else { magic };
            // Of FAT a magic number does not matter; the sector size does.
            let magic = if kind.name == "fat32" { 11 } else { magic };
            match fill {
                Some(fill) => damaged[kind.at..kind.at + len].fill(fill),
                None => damaged[kind.at + magic] ^= 0x5a,
            }
            let found = Contents::of(damaged).unwrap_or_else(|| panic!("{} {fill:?}", kind.name));
            assert!(found.has_told("its copy at"), "{}: {:?}", kind.name, found.told);
            assert!(found.files == right.files && found.failed.is_empty(), "{}", kind.name);
        }
        // Both.
        let mut both = image.clone();
        both.fill(0);
        assert!(Contents::of(both).is_none());
        seen += 1;
    }
    assert!(
        seen == KINDS.len() || !have("all of them", &["mke2fs", "mkfs.xfs", "mkntfs"]),
        "{seen}"
    );
}

#[test]
fn a_damaged_superblock_never_leads_to_wrong_files() {
    let name = "a_damaged_superblock_never_leads_to_wrong_files";
    for kind in KINDS {
        if !have(name, &["sh", kind.tool]) {
            continue;
        }
        let image = (kind.make)();
        let right = Contents::of(image.clone()).expect(kind.name);
        // Each is copied: fewer of the large ones.
        let rounds = match image.len() >> 20 {
            ..50 => 120,
            50..100 => 80,
            _ => 30,
        };
        let (mut copies, mut refused) = (0, 0);
        for seed in 1..=rounds {
            let mut random = Random(u64::wrapping_mul(seed, 0x9e37_79b9_7f4a_7c15));
            let mut damaged = image.clone();
            let at = kind.at + random.below(kind.len as u64) as usize;
            damaged[at] = match random.below(3) {
                0 => damaged[at] ^ (1 << random.below(8)),
                1 => 0,
                _ => random.next() as u8,
            };
            let Some(found) = Contents::of(damaged) else {
                refused += 1;
                continue;
            };
            copies += usize::from(found.has_told("its copy at"));
            let wrong: Vec<_> = found
                .files
                .iter()
                .filter(|(path, line)| right.files.get(*path) != Some(line))
                .collect();
            assert!(wrong.is_empty(), "{} byte {at}: {wrong:?} {:?}", kind.name, found.told);
            // What is missing is told.
            let all = found.files.len() == right.files.len();
            assert!(all || found.told.len() > right.told.len(), "{} byte {at}", kind.name);
        }
        println!("{}: {rounds} damaged, {copies} by the copy, {refused} refused", kind.name);
        assert!(copies > 0, "{}", kind.name);
    }
}

#[test]
fn where_nothing_tells_which_copy_is_right_none_is_used() {
    let name = "where_nothing_tells_which_copy_is_right_none_is_used";
    // Inodes of a group, their size; blocks of a directory's block; sectors of a cluster, of the table.
    let changes: [(&str, usize, u8); 5] = [
        ("ext2", 0x28, 0x10),
        ("ext2", 0x59, 3),
        ("xfs v4", 192, 1),
        ("fat32", 13, 3),
        ("fat32", 36, 1),
    ];
    let mut used = Vec::new();
    for (kind, at, bits) in changes {
        let kind = KINDS.into_iter().find(|k| k.name == kind).unwrap();
        if !have(name, &["sh", kind.tool]) {
            continue;
        }
        let mut image = (kind.make)();
        assert!(Contents::of(image.clone()).is_some());
        image[kind.at + at] ^= bits;
        // Some values contradict themselves, too: then the other copy is the right one.
        let found = Contents::of(image);
        if found.is_some_and(|f| !f.has_told("its copy at")) {
            used.push((kind.name, at));
        }
    }
    assert_eq!(used, []);
}
