//! Files out of NTFS: what `files` copies is what ntfs-3g shows of it, whatever the cluster size, compressed,
//! fragmented or sparse; what cannot be given is named; and no bytes that a guest can write end in a panic or hang.

use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fleecefs::error::{Error, Result};
use fleecefs::files::{At, Blocks, NodeKind, Source, Tree, Visitor, open_tree, volumes_of, walk};
use fleecefs::storage::MemStorage;
use serde_json::Value;

use crate::support::file_systems::{Image, Listing, Points, TOOLS, said, set_xattr, shell};
use crate::support::images::Rng;
use crate::support::tools::{have, is_root, run};

/// Streams are compared as extended attributes, and permissions are those of a reader without any.
const OPTIONS: &str = "compression,streams_interface=xattr,fmask=133,dmask=022";
const MKNTFS: [&str; 4] = ["mkntfs", "-q", "-Q", "-F"];
const XATTRS: [&str; 1] = ["user."];

fn ready(test: &str) -> bool {
    let more = ["mkntfs", "ntfs-3g", "ntfsfix", "setfattr", "/dev/fuse"];
    have(test, &[TOOLS.as_slice(), &more].concat()) && is_root(test)
}

fn image(size: u64, options: &[&str]) -> Image {
    Image::new(size, &[MKNTFS.as_slice(), options].concat())
}

/// Fills a mounted volume with one of everything that ntfs-3g can make.
fn fill(mnt: &Path) {
    shell(
        mnt,
        r#"
        mkdir -p dir/sub/deeper many empty
        echo hello > dir/hello
        head -c 3000000 /dev/urandom > dir/random
        truncate -s 100M dir/sparse
        printf x | dd of=dir/sparse bs=1 seek=50000000 conv=notrunc status=none
        i=0; while [ $i -lt 200 ]; do
            printf y | dd of=dir/holes bs=1 seek=$((i * 20000)) conv=notrunc status=none; i=$((i + 1))
        done
        printf tiny > dir/tiny
        printf %150s inline > dir/inline
        : > dir/nothing
        i=0; while [ $i -lt 1500 ]; do : > many/a-name-that-is-not-so-short-$i; i=$((i + 1)); done
        i=0; while [ $i -lt 1500 ]; do rm many/a-name-that-is-not-so-short-$i; i=$((i + 3)); done
        p=deep; i=0; while [ $i -lt 60 ]; do p=$p/deep-$i; i=$((i + 1)); done; mkdir -p $p; echo deep > $p/file
        echo 1 > "dir/Größe 日本 😀.txt"; : > "dir/$(printf %0250d 1)"
        ln dir/hello dir/sub/hard; ln dir/hello many/hard
        ln -s hello dir/short; ln -s "$(printf %0200d 7)" dir/long; ln -s ../../../etc/passwd dir/out
        touch -d '2031-01-01 00:00:00.123456789Z' dir/hello
        touch -d '1969-12-31 23:00:00Z' dir/tiny; touch -d '1902-01-02 03:04:05Z' dir/inline
        "#,
    );
    let at = |name: &str| mnt.join("dir").join(name);
    assert!(set_xattr(&at("hello"), "user.comment", b"a comment"));
    assert!(set_xattr(&at("hello"), "user.Größe", &[b'v'; 900]));
    assert!(set_xattr(&at("sub"), "user.folder", b"of a folder"));
}

/// Files that ntfs-3g compresses, with units of all kinds: packed, not worth it, and empty.
fn fill_compressed(mnt: &Path) {
    shell(
        mnt,
        r#"
        mkdir packed; setfattr -h -n system.ntfs_attrib_be -v 0x00000810 packed
        seq 1 200000 > packed/seq
        head -c 500000 /dev/urandom > packed/random
        (seq 1 10000; head -c 200000 /dev/urandom; head -c 300000 /dev/zero; seq 1 50000) > packed/mixed
        head -c 1000000 /dev/zero > packed/zeros
        truncate -s 3000000 packed/holes; seq 1 9000 | dd of=packed/holes bs=1M seek=1 conv=notrunc status=none
        yes "the same again and again" | head -c 70000 > packed/same
        echo short > packed/short
        "#,
    );
}

/// The volumes: cluster and sector sizes, and whether they compress.
const KINDS: [(u64, &[&str], bool); 6] = [
    (96 << 20, &["-C", "-L", "a label"], true),
    (96 << 20, &["-C", "-c", "512"], true),
    (96 << 20, &["-C", "-c", "1024"], true),
    (96 << 20, &["-c", "65536"], false),
    (600 << 20, &["-c", "2097152"], false),
    (96 << 20, &["-s", "4096"], false),
];

#[test]
fn all_of_ntfs_is_copied_as_ntfs_3g_shows_it() {
    if !ready("all_of_ntfs_is_copied_as_ntfs_3g_shows_it") {
        return;
    }
    let mut seen = 0;
    for (size, options, compresses) in KINDS {
        let image = image(size, options);
        let Some(mounted) = image.try_mount(OPTIONS) else { continue };
        fill(&image.mnt());
        if compresses {
            fill_compressed(&image.mnt());
        }
        drop(mounted);
        let mut points = Points::new();
        points.add(&image.path());
        let full = same(&image, &points, &format!("{options:?}, FULL"));
        let mounted = image.mount(OPTIONS);
        shell(
            &image.mnt(),
            "rm -r many; mv dir/hello dir/sub/renamed; head -c 70000 /dev/urandom >> dir/tiny; \
             truncate -s 1000 dir/random; mkdir new; i=0; while [ $i -lt 300 ]; do echo $i > new/$i; i=$((i + 1)); done",
        );
        drop(mounted);
        points.add(&image.path());
        let now = same(&image, &points, &format!("{options:?}, INC"));
        assert!(full.0 != now.0);
        seen += 1;
    }
    assert!(seen >= 5, "{seen} kinds could be mounted");
}

/// Compares a copy of the last point with what ntfs-3g shows; gives that.
fn same(image: &Image, points: &Points, what: &str) -> Listing {
    let copied = points.copied("vda/latest");
    let stat = points.printed(&["stat", "--json"], "vda/latest:disk/", &[]);
    let stat: Value = serde_json::from_str(&stat).unwrap();
    let _mounted = image.mount(&format!("ro,{OPTIONS}"));
    let free = rustix::fs::statvfs(image.mnt()).unwrap();
    assert_eq!(stat["file_system"]["free"], free.f_bfree * free.f_frsize, "{what}");
    let oracle = Listing::of(&image.mnt(), &XATTRS);
    oracle.assert_same(&Listing::of(copied.path(), &XATTRS), what);
    let sparse = copied.path().join("dir/sparse").metadata().unwrap();
    assert!(sparse.blocks() * 512 <= 4 << 20, "{what}: holes stay holes");
    oracle
}

#[test]
fn what_is_in_many_fragments_is_read_right() {
    if !ready("what_is_in_many_fragments_is_read_right") {
        return;
    }
    let image = image(24 << 20, &[]);
    let mounted = image.mount(OPTIONS);
    shell(
        &image.mnt(),
        r#"
        mkdir dir; truncate -s 1M dir/sparse; head -c 4096 /dev/urandom > block
        i=0; while [ $i -lt 1400 ]; do cp block fill-$i; i=$((i + 1)); done
        head -c 30M /dev/urandom > rest 2>/dev/null || true
        j=0; while [ $j -lt $i ]; do rm fill-$j fill-$((j + 1)); j=$((j + 4)); done
        head -c 2800000 /dev/urandom > fragmented; rm rest
        i=0; while [ $i -lt 900 ]; do echo $i > "another-name-$i"; i=$((i + 1)); done
        setfattr -n user.comment -v 'with an attribute list' fragmented
        "#,
    );
    drop(mounted);
    let info = run("ntfsinfo", &["-F", "/fragmented", image.path().to_str().unwrap()]);
    assert!(String::from_utf8_lossy(&info.stdout).contains("ATTRIBUTE_LIST"), "is it fragmented?");
    let mut points = Points::new();
    points.add(&image.path());
    same(&image, &points, "fragmented");
}

#[test]
fn files_beyond_4_gib_are_read_right() {
    if !ready("files_beyond_4_gib_are_read_right") {
        return;
    }
    const AT: u64 = 6_000_000_000;
    let image = image(32 << 20, &[]);
    let mounted = image.mount(OPTIONS);
    shell(
        &image.mnt(),
        "truncate -s 9G big; printf middle | dd of=big bs=1 seek=6000000000 conv=notrunc status=none",
    );
    drop(mounted);
    let mut points = Points::new();
    points.add(&image.path());
    let copied = points.copied("vda/latest");
    let file = std::fs::File::open(copied.path().join("big")).unwrap();
    let mut found = [1; 10];
    file.read_exact_at(&mut found, AT - 2).unwrap();
    assert_eq!(&found, b"\0\0middle\0\0");
    let meta = file.metadata().unwrap();
    assert_eq!(meta.len(), 9 << 30);
    assert!(meta.blocks() * 512 < 1 << 20);
}

/// Gives a file a reparse point.
fn reparse(path: &Path, tag: u32, data: &[u8]) {
    let len = data.len() as u16;
    let value = [&tag.to_le_bytes()[..], &len.to_le_bytes(), &[0, 0], data].concat();
    assert!(set_xattr(path, "system.ntfs_reparse_data", &value), "{path:?}");
}

/// The data of a link of Windows.
fn link(target: &str, shown: &str, flags: Option<u32>) -> Vec<u8> {
    let units = |t: &str| t.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<u8>>();
    let (target, shown) = (units(target), units(shown));
    let numbers = [0, target.len(), target.len(), shown.len()];
    let mut data: Vec<u8> = numbers.iter().flat_map(|n| (*n as u16).to_le_bytes()).collect();
    data.extend(flags.map(u32::to_le_bytes).into_iter().flatten());
    [data, target, shown].concat()
}

#[test]
fn what_only_windows_has_is_shown_or_named() {
    if !ready("what_only_windows_has_is_shown_or_named") {
        return;
    }
    let image = image(32 << 20, &[]);
    let mounted = image.mount("streams_interface=windows");
    let mnt = image.mnt();
    shell(
        &mnt,
        r#"
        mkdir Folder junction linked; echo text > "Folder/A Long Name.txt"; echo other > "Folder/a.TXT"
        setfattr -n system.ntfs_dos_name -v ALONGN~1.TXT "Folder/A Long Name.txt"
        for f in symlink unknown dedup system; do echo $f > $f; done
        mknod block b 8 1; mknod char c 300 70000
        setfattr -h -n system.ntfs_attrib_be -v 0x00000007 Folder/a.TXT
        echo stream > Folder/a.TXT:Zone.Identifier; head -c 100000 /dev/zero > Folder/a.TXT:large
        "#,
    );
    reparse(&mnt.join("junction"), 0xa000_0003, &link(r"\??\D:\data", r"D:\data", None));
    reparse(&mnt.join("symlink"), 0xa000_000c, &link(r"Folder\a.TXT", r"Folder\a.TXT", Some(1)));
    reparse(&mnt.join("linked"), 0xa000_000c, &link(r"\??\C:\Users", r"C:\Users", Some(0)));
    reparse(&mnt.join("unknown"), 0x8000_1234, b"something");
    reparse(&mnt.join("dedup"), 0x8000_0013, b"somewhere else");
    reparse(&mnt.join("system"), 0x8000_0017, &[1, 0, 0, 0, 1, 0, 0, 0]);
    drop(mounted);
    let mut points = Points::new();
    points.add(&image.path());
    let root = points.printed(&["ls"], "vda/latest:disk", &[]);
    assert_eq!(root, "Folder\nblock\nchar\ndedup\njunction\nlinked\nsymlink\nsystem\nunknown\n");
    let long = points.printed(&["ls", "-l"], "vda/latest:disk", &[]);
    for text in [
        "junction -> D:/data",
        "symlink -> Folder/a.TXT",
        "linked -> C:/Users",
        "8, 1 ",
        "300, 70000 ",
    ] {
        assert!(long.contains(text), "{text}: {long}");
    }
    assert_eq!(points.printed(&["cat"], "vda/latest:disk/symlink", &[]), "other\n");
    // In any case; short names are not shown, and count as no link.
    assert_eq!(points.printed(&["cat"], "vda/latest:disk/FOLDER/a long NAME.TXT", &[]), "text\n");
    assert_eq!(points.printed(&["ls"], "vda/latest:disk/Folder", &[]), "A Long Name.txt\na.TXT\n");
    let stat = |what: &str| -> Value {
        serde_json::from_str(&points.printed(&["stat", "--json"], what, &[])).unwrap()
    };
    assert_eq!(stat("vda/latest:disk/Folder/A Long Name.txt")["entry"]["links"], 1);
    let flags = &stat("vda/latest:disk/Folder/a.TXT")["entry"]["flags"];
    assert_eq!(*flags, serde_json::json!(["read-only", "hidden", "system"]));
    // Its own files are not listed, but there.
    assert!(points.printed(&["cat"], "vda/latest:disk/$UpCase", &[]).len() > 65536);
    let stream = points.printed(&["cat"], "vda/latest:disk/Folder/a.TXT:zone.identifier", &[]);
    assert_eq!(stream, "stream\n");
    let large = points.printed(&["cat"], "vda/latest:disk/Folder/a.TXT:large", &[]);
    assert_eq!(large.len(), 100_000);
    let out = tempfile::tempdir().unwrap();
    let copy = points.files(&["cp"], "vda/latest", &[out.path().to_str().unwrap()]);
    assert_eq!(copy.status.code(), Some(16), "{}", said(&copy));
    for text in [
        "the stream 'large' of 100000 bytes",
        "Data Deduplication",
        "a WIM image",
        "a reparse point of an unknown kind (0x80001234)",
    ] {
        assert!(said(&copy).contains(text), "{text}: {}", said(&copy));
    }
    assert!(!out.path().join("dedup").exists() && !out.path().join("system").exists());
    assert_eq!(std::fs::read(out.path().join("unknown")).unwrap(), b"unknown\n");
    assert_eq!(std::fs::read_link(out.path().join("linked")).unwrap(), Path::new("C:/Users"));
}

/// What wimlib makes of a file, compressed by this method in chunks of this size: it is what Windows has in the
/// stream of a file that it has compressed for itself.
fn wim_resource(dir: &Path, method: &str, chunk: u32) -> Vec<u8> {
    let wim = dir.join(format!("{method}-{chunk}.wim"));
    let (compress, chunk) = (format!("--compress={method}"), format!("--chunk-size={chunk}"));
    let (from, to) = (dir.join("tree"), wim.to_str().unwrap());
    run("wimlib-imagex", &["capture", from.to_str().unwrap(), to, &compress, &chunk, "--quiet"]);
    let bytes = std::fs::read(&wim).unwrap();
    let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    let place = |at: usize| (number(at + 8) as usize, (number(at) & ((1 << 56) - 1)) as usize);
    // The table of resources, 50 bytes each: length and flags, offset, length before compression.
    let (table, len) = place(0x30);
    let size = from.join("file").metadata().unwrap().len();
    let entry = (table..table + len).step_by(50).find(|at| number(at + 16) == size);
    let (at, len) = place(entry.expect("the file is in the image"));
    assert!((len as u64) < size, "it is compressed");
    bytes[at..at + len].to_vec()
}

#[test]
fn what_windows_compresses_for_itself_is_read_right() {
    let test = "what_windows_compresses_for_itself_is_read_right";
    if !ready(test) || !have(test, &["wimlib-imagex"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("tree")).unwrap();
    // A program has calls, for which LZX has a filter; and some that cannot be compressed.
    let program = std::fs::read("/proc/self/exe").unwrap();
    let mut rng = Rng(7);
    let noise: Vec<u8> = (0..100_000).map(|_| rng.next() as u8).collect();
    let zeros = vec![0; 70_000];
    let plain = [&program[..3_000_000], &noise, &zeros, b"the end"].concat();
    std::fs::write(dir.path().join("tree/file"), &plain).unwrap();
    let image = image(32 << 20, &[]);
    let mounted = image.mount("streams_interface=windows");
    let methods = [("XPRESS", 4096), ("LZX", 32768), ("XPRESS", 8192), ("XPRESS", 16384)];
    for (number, (method, chunk)) in methods.iter().enumerate() {
        let at = |name: &str| image.mnt().join(format!("file-{number}{name}"));
        let packed = wim_resource(dir.path(), method, *chunk);
        std::fs::File::create(at("")).unwrap().set_len(plain.len() as u64).unwrap();
        std::fs::write(at(":WofCompressedData"), packed).unwrap();
        let data = [1, 2, 1, number as u32].map(u32::to_le_bytes).concat();
        reparse(&at(""), 0x8000_0017, &data);
    }
    drop(mounted);
    let mut points = Points::new();
    points.add(&image.path());
    let copied = points.copied("vda/latest");
    for number in 0..methods.len() {
        let found = std::fs::read(copied.path().join(format!("file-{number}"))).unwrap();
        let differs = plain.iter().zip(&found).position(|(a, b)| a != b);
        assert!(found.len() == plain.len() && differs.is_none(), "{number}: {differs:?}");
    }
    let stat = points.printed(&["stat", "--json"], "vda/latest:disk/file-1", &[]);
    let stat: Value = serde_json::from_str(&stat).unwrap();
    assert_eq!(stat["entry"]["size"].as_u64(), Some(plain.len() as u64));
    assert_eq!(stat["xattrs"].as_array().map_or(0, Vec::len), 0, "{stat}");
}

/// What `stat` says of a point of an image, and whether a file in it is right.
fn told(image: &Image) -> String {
    let mut points = Points::new();
    points.add(&image.path());
    assert_eq!(points.printed(&["cat"], "vda/latest:disk/file", &[]), "1\n");
    said(&points.files(&["stat"], "vda/latest:disk/", &[]))
}

/// A small volume with one file.
fn small() -> Image {
    let image = image(8 << 20, &[]);
    let mounted = image.mount(OPTIONS);
    shell(
        &image.mnt(),
        "echo 1 > file; mkdir dir; i=0; while [ $i -lt 60 ]; do echo $i > dir/name-$i; i=$((i + 1)); done",
    );
    drop(mounted);
    image
}

/// Where the first `what` is, at a multiple of `step`.
fn find(image: &Image, what: &[u8], step: usize) -> u64 {
    let bytes = std::fs::read(image.path()).unwrap();
    let found = (0..bytes.len()).step_by(step).find(|at| bytes[*at..].starts_with(what));
    found.expect("it is there") as u64
}

fn write(image: &Image, bytes: &[u8], at: u64) {
    let file = std::fs::File::options().write(true).open(image.path()).unwrap();
    file.write_all_at(bytes, at).unwrap();
}

#[test]
fn the_state_of_the_volume_is_told() {
    if !ready("the_state_of_the_volume_is_told") {
        return;
    }
    let image = small();
    assert_eq!(told(&image), "");
    // A restart page of a log that is in use.
    let mut page = vec![0; 4096];
    page[..8].copy_from_slice(b"RSTR\x1e\0\x09\0");
    page[0x10..0x1a].copy_from_slice(&[0, 0x10, 0, 0, 0, 0x10, 0, 0, 0x30, 0]);
    let log = find(&image, &[0xff; 8192], 4096);
    write(&image, &page, log);
    let text = told(&image);
    assert!(text.contains("its log is not replayed"), "{text}");
    assert!(text.contains("start the guest from this point"), "{text}");
    write(&image, &[0xff; 4096], log);
    assert_eq!(told(&image), "");
    run("ntfsfix", &[image.path().to_str().unwrap()]);
    assert!(told(&image).contains("marked as dirty"));
    run("ntfsfix", &["-d", image.path().to_str().unwrap()]);
    let mounted = image.mount(OPTIONS);
    shell(&image.mnt(), "printf 'hibr' > hiberfil.sys; head -c 5000 /dev/zero >> hiberfil.sys");
    drop(mounted);
    assert!(told(&image).contains("Windows is hibernated"));
}

#[test]
fn a_damaged_table_is_read_by_its_copy_and_torn_records_cost_one_file() {
    if !ready("a_damaged_table_is_read_by_its_copy_and_torn_records_cost_one_file") {
        return;
    }
    let image = small();
    let table = find(&image, b"FILE", 4096);
    write(&image, &[0; 64], table);
    assert!(told(&image).contains("$MFTMirr"));
    // The record of one file, and its own number in it: the 65th.
    let image = small();
    write(&image, &[0xee; 2], table + 65 * 1024 + 510);
    let mut points = Points::new();
    points.add(&image.path());
    let out = tempfile::tempdir().unwrap();
    let copy = points.files(&["cp"], "vda/latest", &[out.path().to_str().unwrap()]);
    assert_eq!(copy.status.code(), Some(16), "{}", said(&copy));
    assert!(said(&copy).contains("MFT record 65 is torn"), "{}", said(&copy));
    assert_eq!(std::fs::read(out.path().join("file")).unwrap(), b"1\n");
}

/// Marks the contents of a file as encrypted.
fn encrypt(image: &Image, name: &str) {
    let bytes = std::fs::read(image.path()).unwrap();
    let name: Vec<u8> = name.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let number = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
    let is_record = |at: &usize| {
        bytes[*at..].starts_with(b"FILE") && bytes[*at..*at + 1024].windows(12).any(|w| w == name)
    };
    let record = (0..bytes.len()).step_by(1024).find(is_record).expect("there is such a file");
    let mut at = record + (number(record + 0x14) & 0xffff);
    while number(at) != 0x80 {
        at += number(at + 4);
    }
    write(image, &[0x40], at as u64 + 0xd);
}

#[test]
fn encrypted_files_are_named_as_such() {
    if !ready("encrypted_files_are_named_as_such") {
        return;
    }
    let image = small();
    let mounted = image.mount(OPTIONS);
    shell(&image.mnt(), "head -c 9000 /dev/urandom > secret");
    drop(mounted);
    encrypt(&image, "secret");
    let mut points = Points::new();
    points.add(&image.path());
    let cat = points.files(&["cat"], "vda/latest:disk/secret", &[]);
    assert!(cat.stdout.is_empty() && cat.status.code() == Some(11), "{}", said(&cat));
    assert!(said(&cat).contains("is encrypted (EFS)"), "{}", said(&cat));
    assert_eq!(points.printed(&["cat"], "vda/latest:disk/file", &[]), "1\n");
}

/// Reads all that it comes by.
struct Look<'a> {
    tree: &'a dyn Tree,
    left: usize,
    read: usize,
}

impl Look<'_> {
    fn file(&self, at: &At<'_>) -> Result<usize> {
        let file = self.tree.open(at.node)?;
        let mut buf = vec![0; 64 << 10];
        let n = file.read_at(&mut buf, 0)?;
        file.read_at(&mut buf, file.size().saturating_sub(1000))?;
        let mut offset = 0;
        for _ in 0..64 {
            let Some(stretch) = file.stretch(offset)? else { break };
            assert!(stretch.end > offset && stretch.end <= file.size());
            offset = stretch.end;
        }
        Ok(n)
    }

    fn look(&mut self, at: &At<'_>) -> Result<()> {
        let more = self.left.checked_sub(1);
        self.left = more.ok_or_else(|| Error::new(fleecefs::error::Kind::Interrupted, "enough"))?;
        let _ = self.tree.xattrs(at.node);
        match at.attributes.kind {
            NodeKind::File => self.read += self.file(at).unwrap_or(0),
            NodeKind::Folder => drop(self.tree.lookup(at.node, b"name-7")),
            _ => drop(self.tree.read_link(at.node)),
        }
        Ok(())
    }
}

impl Visitor for Look<'_> {
    fn node(&mut self, at: &At<'_>) -> Result<()> {
        self.look(at)
    }

    fn failed(&mut self, _: &[u8], _: Error) -> Result<()> {
        Ok(())
    }
}

/// Reads all of an image; how many bytes of files.
fn look(bytes: Vec<u8>) -> usize {
    const CACHE: u64 = 4 << 20;
    let blocks = Blocks::new(CACHE);
    let disk = Source::new(Arc::new(MemStorage::new("disk", bytes)), "disk", &blocks);
    let Ok((volumes, _)) = volumes_of(&disk, Vec::new) else { return 0 };
    let mut read = 0;
    for volume in volumes.iter().take(4) {
        let Ok(tree) = open_tree(volume) else { continue };
        let mut look = Look { tree: &*tree, left: 3000, read: 0 };
        let _ = walk(&*tree, tree.root(), &mut look);
        let _ = tree.statistics();
        assert!(blocks.used() <= CACHE);
        read += look.read;
    }
    read
}

#[test]
fn mutated_volumes_end() {
    if !ready("mutated_volumes_end") {
        return;
    }
    let image = image(6 << 20, &["-C"]);
    let mounted = image.mount(OPTIONS);
    shell(
        &image.mnt(),
        r#"
        mkdir dir packed; i=0; while [ $i -lt 120 ]; do echo $i > dir/name-$i; i=$((i + 1)); done
        setfattr -h -n system.ntfs_attrib_be -v 0x00000810 packed; seq 1 20000 > packed/seq
        truncate -s 1M sparse; echo x >> sparse; ln -s dir link; setfattr -n user.a -v stream dir/name-7
        i=0; while [ $i -lt 300 ]; do
            echo $i | dd of=fragmented bs=4096 seek=$((i * 97 % 301)) conv=notrunc status=none; i=$((i + 1))
        done
        "#,
    );
    drop(mounted);
    let good = std::fs::read(image.path()).unwrap();
    assert!(look(good.clone()) > 100_000);
    // Bytes of records, index blocks and the boot sector: the rest are contents.
    let meta: Vec<usize> = (0..good.len())
        .step_by(512)
        .filter(|at| *at == 0 || [&b"FILE"[..], b"INDX"].iter().any(|m| good[*at..].starts_with(m)))
        .collect();
    let (begun, mut read) = (Instant::now(), 0);
    for seed in 0..400 {
        let (mut rng, mut bytes) = (Rng(seed), good.clone());
        for _ in 0..=rng.below(30) {
            let at = meta[rng.below(meta.len() as u64) as usize] + rng.below(1000) as usize;
            bytes[at] = match rng.below(4) {
                0 => 0xff,
                1 => 0,
                2 => bytes[at] ^ (1 << rng.below(8)),
                _ => rng.next() as u8,
            };
        }
        read += look(bytes);
    }
    assert!(read > 1 << 20, "most of it is read all the same");
    assert!(begun.elapsed() < Duration::from_secs(300), "{:?}", begun.elapsed());
}
